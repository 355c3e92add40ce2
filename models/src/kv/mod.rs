//! Paged KV blocks.
