//! AutoencoderKLWan (decoder).
