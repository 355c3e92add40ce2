//! The text runner: continuous batching over paged KV.
