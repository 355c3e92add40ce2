//! The way to a checkpoint's weights, below everything that is built of them.
//!
//! Owns: opening the weights of each component (`open`), now or once more later (`reread`). Does not know: families,
//! runners.

use crate::error::{Error, Result};

mod open;
mod reread;

pub use open::{Build, OpenWeights};
pub(crate) use open::{Mode, Parts};
pub use reread::{LentParts, Reread};

/// `--load-format`: where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's files, in the format that they have.
    #[default]
    Auto,
    /// Nowhere: random values in the shapes that the configurations ask for, made on the device.
    Dummy,
}

impl std::str::FromStr for LoadFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "dummy" => Ok(Self::Dummy),
            _ => Err(Error::invalid("load_format", format!("`{name}` is not a load format; allowed: auto, dummy"))),
        }
    }
}
