//! CLIP text encoder.
