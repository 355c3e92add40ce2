//! How much of the denoising may be left out.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How much of the denoising may be left out. What it means is the card's affair
/// ([`CacheThresholds`](crate::card::CacheThresholds)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Everything is computed.
    #[default]
    None,
    /// Where hardly anybody sees it.
    Safe,
    /// Where it shows in details.
    Fast,
}

impl Acceleration {
    /// Its name on the wire and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Safe => "safe",
            Self::Fast => "fast",
        }
    }
}

impl std::str::FromStr for Acceleration {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [Self::None, Self::Safe, Self::Fast]
            .into_iter()
            .find(|acceleration| acceleration.as_str() == name)
            .ok_or_else(|| Error::invalid("acceleration", "is not known; allowed: none, safe, fast"))
    }
}
