//! Settings that are one of a few words.
//!
//! Owns: the words, and what each means to the engine. Does not know: defaults of other settings.

use serde::Deserialize;
use tale_models::family::TextEncoders;
use tale_models::kv::PrefixCache;
use tale_models::tools::ToolFormat;

/// Where text encoders are while no prompt is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TextEncoderPlace {
    /// On the device where everything fits; else some come and go.
    #[default]
    Auto,
    /// On the device.
    Resident,
    /// Read for each encoding, and gone after it.
    OnDemand,
}

impl TextEncoderPlace {
    /// `None` leaves it to the engine.
    pub fn chosen(self) -> Option<TextEncoders> {
        match self {
            Self::Auto => None,
            Self::Resident => Some(TextEncoders::Resident),
            Self::OnDemand => Some(TextEncoders::OnDemand),
        }
    }
}

/// Whose prompts share what the key/value cache holds of a common beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PrefixCacheScope {
    /// Nobody's.
    Off,
    /// Those of each client.
    PerClient,
    /// All.
    Shared,
}

impl PrefixCacheScope {
    /// As the engine calls it.
    pub fn chosen(self) -> PrefixCache {
        match self {
            Self::Off => PrefixCache::Off,
            Self::PerClient => PrefixCache::PerClient,
            Self::Shared => PrefixCache::Shared,
        }
    }
}

/// How language models write calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ToolCallParser {
    /// As their chat templates write them.
    #[default]
    Auto,
    /// Between `<tool_call>` and `</tool_call>`, as Qwen 2.5 does.
    Hermes,
    /// As JSON with `parameters`, as Llama 3.1 does.
    Llama3Json,
}

impl ToolCallParser {
    /// `None` leaves it to the template.
    pub fn chosen(self) -> Option<ToolFormat> {
        match self {
            Self::Auto => None,
            Self::Hermes => Some(ToolFormat::Hermes),
            Self::Llama3Json => Some(ToolFormat::Llama3),
        }
    }
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}
