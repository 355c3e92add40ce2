//! Text encoders shared by picture and video families.

pub mod clip;
pub mod t5;
