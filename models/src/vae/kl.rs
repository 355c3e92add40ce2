//! AutoencoderKL (decoder).
