//! What a LoRA file says beside its tensors, and how much its terms count because of it.
//!
//! Owns: alphas, ranks and what diffusers wrote of an adapter. Does not know: shapes, layers.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use super::names::{LoraNames, Term};
use super::refusal::{Mismatch, Refusal};
use crate::files::Limit;

/// Where diffusers writes what it knew of an adapter, as JSON.
const ADAPTER_METADATA: &str = "lora_adapter_metadata";
/// Keys of a header under which trainers note the alpha that they trained with.
const TRAINED_ALPHAS: [&str; 4] = ["ss_network_alpha", "network_alpha", "lora_alpha", "alpha"];
/// `lora_alpha` of PEFT's `LoraConfig` where none is given.
const PEFT_ALPHA: f64 = 8.0;

/// What a file says beside its tensors.
pub(super) type Header = HashMap<String, String>;

/// An alpha in the header that asks for another scale than that of a term of one of these ranks, for which the file has no
/// alpha otherwise. It is not heeded: diffusers reads no such keys for SDXL and FLUX.1 (`lora_base.py`,
/// `_fetch_state_dict`), and tools that convert a file keep its header when they multiply the scale into its matrices.
pub(super) fn unheeded_alpha<'a>(header: &'a Header, ranks: &[usize]) -> Option<(&'a str, f64)> {
    let alphas = TRAINED_ALPHAS.iter().filter_map(|key| header.get_key_value(*key));
    let mut alphas = alphas.filter_map(|(key, alpha)| Some((key.as_str(), alpha.trim().parse::<f64>().ok()?)));
    alphas.find(|(_, alpha)| ranks.iter().any(|rank| *alpha != *rank as f64))
}

/// What diffusers writes beside an adapter that PEFT made: fields of a `LoraConfig`, below the name of each network.
#[derive(Debug, Default)]
pub(super) struct AdapterMetadata(BTreeMap<String, PeftConfig>);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PeftConfig {
    lora_alpha: Option<f64>,
    alpha_pattern: HashMap<String, f64>,
    use_rslora: bool,
    use_dora: bool,
}

impl AdapterMetadata {
    /// Of the file with this header.
    pub(super) fn of(header: &Header) -> Result<Self, Refusal> {
        match header.get(ADAPTER_METADATA).filter(|json| !json.is_empty()) {
            Some(json) => Self::parse(json),
            None => Ok(Self::default()),
        }
    }

    fn parse(json: &str) -> Result<Self, Refusal> {
        let unreadable = |error: serde_json::Error| Refusal::Unreadable(format!("its {ADAPTER_METADATA}: {error}"));
        if let Some(problem) = Limit::CONFIG.problem(json.as_bytes()) {
            return Err(Refusal::Unreadable(format!("its {ADAPTER_METADATA} {problem}")));
        }
        let fields: BTreeMap<String, serde_json::Value> = serde_json::from_str(json).map_err(unreadable)?;
        let mut networks: BTreeMap<String, serde_json::Map<String, serde_json::Value>> = BTreeMap::new();
        for (key, value) in fields {
            let Some((network, field)) = key.split_once('.') else { continue };
            let fields = networks.entry(network.to_owned()).or_default();
            if ["lora_alpha", "alpha_pattern", "use_rslora", "use_dora"].contains(&field) && !value.is_null() {
                fields.insert(field.to_owned(), value);
            }
        }
        let config = |fields| serde_json::from_value::<PeftConfig>(fields).map_err(unreadable);
        let networks: BTreeMap<_, _> = networks
            .into_iter()
            .map(|(network, fields)| Ok((network, config(fields.into())?)))
            .collect::<Result<_, Refusal>>()?;
        if networks.values().any(|config| config.use_dora) {
            return Err(Refusal::Mismatch(Mismatch("it is DoRA (use_dora); only LoRA is supported".into())));
        }
        Ok(Self(networks))
    }

    /// As `LoraLayer.update_layer` of PEFT: the layer's own alpha, the common one or PEFT's, over its rank or the root of
    /// that; 1 where nothing is said of the network.
    pub(super) fn scale(&self, term: &Term, rank: usize, names: &LoraNames) -> f64 {
        let config = self.0.iter().find(|(network, _)| names.is_prefix_of(term.network, network));
        let Some((_, config)) = config else { return 1.0 };
        let own = config.alpha_pattern.iter().find(|(pattern, _)| is_pattern_of(pattern, &term.part.layer));
        let alpha = own.map(|(_, alpha)| *alpha).or(config.lora_alpha).unwrap_or(PEFT_ALPHA);
        let rank = rank as f64;
        alpha / if config.use_rslora { rank.sqrt() } else { rank }
    }
}

/// PEFT takes a pattern for a regular expression at the end of a layer's name, after a dot or at its beginning; as
/// diffusers writes them they are names, with a `^` in front of whole ones.
fn is_pattern_of(pattern: &str, layer: &str) -> bool {
    if let Some(whole) = pattern.strip_prefix('^') {
        return whole == layer;
    }
    layer.strip_suffix(pattern).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::names::{Addend, Pair, Part};
    use crate::lora::sites::LayerShape;

    #[test]
    fn patterns_of_metadata_are_ends_of_names() {
        for (pattern, layer, expected) in [
            ("to_q", "blocks.0.attn.to_q", true),
            ("attn.to_q", "blocks.0.attn.to_q", true),
            ("to_q", "to_q", true),
            ("o_q", "blocks.0.attn.to_q", false),
            ("^attn.to_q", "blocks.0.attn.to_q", false),
            ("^blocks.0.attn.to_q", "blocks.0.attn.to_q", true),
        ] {
            assert_eq!(is_pattern_of(pattern, layer), expected, "{pattern} of {layer}");
        }
    }

    /// Of rank 4, without an alpha tensor.
    fn term() -> Term {
        let shape = LayerShape::Linear { in_features: 4, out_features: 4 };
        let part = Part { layer: "a.to_q".into(), rows: 0..4, swap_halves: false };
        let pair = Pair { down: "d".into(), up: "u".into(), alpha: None, rank: 4 };
        Term { network: 0, part, shape, addend: Addend::LowRank(pair) }
    }

    #[test]
    fn an_alpha_that_stands_only_in_the_header_is_noticed_and_not_heeded() {
        let noticed = |header: &[(&str, &str)], ranks: &[usize]| {
            let header: Header = header.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            unheeded_alpha(&header, ranks).map(|(key, alpha)| (key.to_owned(), alpha))
        };
        let (alpha, peft) = ([("ss_network_alpha", "2.0"), ("ss_network_dim", "4")], [("lora_alpha", "8"), ("r", "4")]);
        assert_eq!(noticed(&alpha, &[4]), Some(("ss_network_alpha".to_owned(), 2.0)));
        assert_eq!(noticed(&peft, &[4]), Some(("lora_alpha".to_owned(), 8.0)));
        assert_eq!(noticed(&alpha, &[]), None, "every term has an alpha of its own");
        assert_eq!(noticed(&[("ss_network_alpha", "4")], &[4]), None, "asks for the same");
        assert_eq!(noticed(&[("ss_network_alpha", "Dynamic")], &[4]), None, "no number");
    }

    #[test]
    fn metadata_says_what_a_term_counts() {
        use crate::lora::{NetworkNames, Sites};
        let (sites, term) = (std::sync::Arc::<Sites>::default(), term());
        sites.enter("a.to_q", term.shape);
        let names =
            LoraNames::new(vec![NetworkNames::denoiser(&sites, &crate::families::flux::original::FluxNames, [])]);
        for (json, expected) in [
            ("{}", 1.0),
            (r#"{"unet.lora_alpha": 8}"#, 2.0),
            (r#"{"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.lora_dropout": 0.1}"#, 2.0),
            (r#"{"unet.lora_alpha": 8, "unet.use_rslora": true}"#, 4.0),
            (r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}"#, 0.5),
            (r#"{"unet.r": 4}"#, 2.0),
            (r#"{"text_encoder.lora_alpha": 8}"#, 1.0),
        ] {
            let metadata = AdapterMetadata::parse(json).expect("JSON");
            assert_eq!(metadata.scale(&term, 4, &names), expected, "{json}");
        }
        assert!(AdapterMetadata::parse(r#"{"unet.use_dora": true}"#).is_err());
        assert!(AdapterMetadata::parse("[").is_err());
    }
}
