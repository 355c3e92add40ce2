//! Text encoders shared by picture and video families.

pub mod clip;
pub mod prompt_clean;
pub mod t5;
