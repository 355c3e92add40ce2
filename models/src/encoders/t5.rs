//! T5 and UMT5 encoders.
