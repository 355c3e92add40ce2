//! From a LoRA file's tensor names to a model's layers, in whichever dialect the file is written.
//!
//! Owns: the dialects' prefixes, and one table of all the names that a model's layers go by. The table is made from the
//! model's own layers, so that a name is either exactly one of theirs or none of this model. What follows a layer's name
//! is read by `tensors`, and held against the layer by `shapes`.
//!
//! | dialect | name of one tensor |
//! |---|---|
//! | PEFT, diffusers | `unet.….attn1.to_q.lora_A.weight`, `text_encoder.….q_proj.lora_B.weight` |
//! | diffusers before PEFT | `unet.….attn1.processor.to_q_lora.down.weight`, `text_encoder.….q_proj.lora_linear_layer.up.weight` |
//! | kohya, musubi | `lora_unet_…_attn1_to_q.lora_down.weight`, `lora_te1_….lora_up.weight`, `….alpha`; diffusers' names or the original ones |
//! | original, ComfyUI's | `double_blocks.0.img_attn.qkv.lora_A.weight`, also below `diffusion_model.` or `base_model.model.` |
//! | differences | beside the others: `….diff` of a weight, `….diff_b` of a bias, `blocks.0.diff_m` of the modulation of a block |
//!
//! Source of the facts: diffusers `loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`; kohya's sd-scripts
//! `networks/lora.py`; LightX2V `tools/convert/lora_loader.py` (`extract_lora_diffs`).

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use self::tensors::{Module, modules};
use super::refusal::Mismatch;
use super::sites::{LayerShape, Sites};
use crate::weights::names as elsewhere;

mod shapes;
mod tensors;

/// Most names that an error lists; it says how many more there are.
pub const MAX_LISTED: usize = 8;

/// A layer of the model behind another name: the whole of it, or one of several that the other layout keeps in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The model's own name.
    pub layer: String,
    /// Which outputs of the other layout's layer are this one's.
    pub rows: Range<usize>,
    /// Whether the other layout has the second half of these outputs first.
    pub swap_halves: bool,
}

/// What another layout calls a layer, or several side by side.
#[derive(Debug, Clone)]
pub struct Alias {
    /// With dots, without `.weight`.
    pub name: String,
    /// In the order of their outputs.
    pub parts: Vec<Part>,
}

/// All names of one network's layers.
#[derive(Debug)]
pub struct NetworkNames {
    sites: Arc<Sites>,
    layers: BTreeMap<String, LayerShape>,
    /// In front of names with dots.
    dotted_prefixes: &'static [&'static str],
    /// In front of names whose dots have become underscores.
    flat_prefixes: &'static [&'static str],
    dotted: HashMap<String, Vec<Part>>,
    flat: HashMap<String, Vec<Part>>,
}

impl NetworkNames {
    /// A family's own network (`unet`, `transformer`), with its original names and what else its layers are called.
    pub fn denoiser(
        sites: &Arc<Sites>,
        original: &dyn elsewhere::Names,
        more: impl IntoIterator<Item = Alias>,
    ) -> Self {
        let mut names = Self::under_own_names(sites);
        names.enter_original(original);
        more.into_iter().for_each(|alias| names.enter(alias));
        names
    }

    /// These names and those of one more layout.
    pub fn or_named(mut self, layout: &dyn elsewhere::Names) -> Self {
        self.enter_original(layout);
        self
    }

    /// As [`NetworkNames::denoiser`], of a network that goes by diffusers' names alone.
    pub fn under_own_names(sites: &Arc<Sites>) -> Self {
        const DOTTED: &[&str] =
            &["unet.", "transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", ""];
        const FLAT: &[&str] = &["lora_unet_", "lora_transformer_"];
        let mut names = Self::empty(sites, DOTTED, FLAT);
        for (layer, shape) in names.layers.clone() {
            for name in names_before_peft(&layer).chain([layer.clone()]) {
                names.enter(Alias { name, parts: vec![whole(&layer, shape)] });
            }
        }
        names
    }

    /// The first CLIP text encoder.
    pub fn first_text_encoder(sites: &Arc<Sites>) -> Self {
        const DOTTED: &[&str] = &["text_encoder.", "text_encoders.clip_l.transformer."];
        Self::clip(sites, DOTTED, &["lora_te1_", "lora_te_"])
    }

    /// The second CLIP text encoder.
    pub fn second_text_encoder(sites: &Arc<Sites>) -> Self {
        const DOTTED: &[&str] = &["text_encoder_2.", "text_encoders.clip_g.transformer."];
        Self::clip(sites, DOTTED, &["lora_te2_"])
    }

    /// CLIP's layers lie below `text_model.` or not, in checkpoints as in LoRA files.
    fn clip(sites: &Arc<Sites>, dotted: &'static [&'static str], flat: &'static [&'static str]) -> Self {
        let mut names = Self::empty(sites, dotted, flat);
        for (layer, shape) in names.layers.clone() {
            let bare = layer.strip_prefix("text_model.").unwrap_or(&layer).to_owned();
            for name in names_before_peft(&bare).chain([bare.clone()]) {
                for name in [format!("text_model.{name}"), name] {
                    names.enter(Alias { name, parts: vec![whole(&layer, shape)] });
                }
            }
        }
        names
    }

    fn empty(sites: &Arc<Sites>, dotted: &'static [&'static str], flat: &'static [&'static str]) -> Self {
        Self {
            sites: sites.clone(),
            layers: sites.layers().into_iter().collect(),
            dotted_prefixes: dotted,
            flat_prefixes: flat,
            dotted: HashMap::new(),
            flat: HashMap::new(),
        }
    }

    /// Layers that the original keeps in one matrix become the parts of one name.
    fn enter_original(&mut self, original: &dyn elsewhere::Names) {
        let mut aliases: BTreeMap<String, Vec<Part>> = BTreeMap::new();
        for (layer, shape) in &self.layers {
            if let Some(place) = original.layer(layer) {
                aliases.entry(place.name).or_default().push(part_of(layer, *shape, place.part));
            }
        }
        for (name, parts) in aliases {
            self.enter(Alias { name, parts });
        }
    }

    fn enter(&mut self, Alias { name, parts }: Alias) {
        self.flat.entry(name.replace('.', "_")).or_insert_with(|| parts.clone());
        self.dotted.entry(name).or_insert(parts);
    }

    fn find(&self, module: &str) -> Option<&[Part]> {
        let below =
            |prefixes: &'static [&'static str]| prefixes.iter().filter_map(|prefix| module.strip_prefix(prefix));
        let dotted = below(self.dotted_prefixes).find_map(|name| self.dotted.get(name));
        let found = dotted.or_else(|| below(self.flat_prefixes).find_map(|name| self.flat.get(name)));
        found.map(Vec::as_slice)
    }
}

fn part_of(layer: &str, shape: LayerShape, part: elsewhere::Extent) -> Part {
    match part {
        // LoRA files have rows in the network's order.
        elsewhere::Extent::Whole | elsewhere::Extent::Batched { .. } | elsewhere::Extent::AlternatingHalves { .. } => {
            whole(layer, shape)
        }
        elsewhere::Extent::SwappedHalves => Part { swap_halves: true, ..whole(layer, shape) },
        elsewhere::Extent::Rows(elsewhere::Rows { first, count, .. }) => {
            let start = first * shape.outputs() / count;
            Part { rows: start..start + shape.outputs(), ..whole(layer, shape) }
        }
    }
}

fn whole(layer: &str, shape: LayerShape) -> Part {
    Part { layer: layer.to_owned(), rows: 0..shape.outputs(), swap_halves: false }
}

/// What diffusers called the projections of an attention when LoRA was an attention processor.
fn names_before_peft(layer: &str) -> impl Iterator<Item = String> {
    const LEAVES: [(&str, &str); 11] = [
        ("to_q", "to_q"),
        ("to_k", "to_k"),
        ("to_v", "to_v"),
        ("to_out.0", "to_out"),
        ("add_q_proj", "add_q_proj"),
        ("add_k_proj", "add_k_proj"),
        ("add_v_proj", "add_v_proj"),
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("out_proj", "to_out"),
    ];
    let leaf = LEAVES.iter().find_map(|(leaf, old)| Some((layer.strip_suffix(leaf)?.strip_suffix('.')?, old)));
    leaf.into_iter()
        .flat_map(|(attention, old)| [format!("{attention}.processor.{old}_lora"), format!("{attention}.{old}_lora")])
}

/// All names of a model's layers, network by network.
#[derive(Debug)]
pub struct LoraNames(Vec<NetworkNames>);

/// What a file adds to one layer, by the names of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    /// Position of the network.
    pub network: usize,
    /// The layer, and which of the outputs in the file are its own.
    pub part: Part,
    /// Of the layer.
    pub shape: LayerShape,
    /// See [`Addend`].
    pub addend: Addend,
}

/// What is added, and to what.
#[derive(Debug, Clone, PartialEq)]
pub enum Addend {
    /// A product of two matrices, to the result.
    LowRank(Pair),
    /// To the weight, a tensor of its shape.
    Weight(String),
    /// To the bias.
    Bias {
        /// `[out]`.
        tensor: String,
        /// Where it belongs to the second matrix of a pair, with which it is scaled.
        of: Option<Pair>,
    },
}

impl Addend {
    /// The pair whose scale counts; differences by themselves have none.
    pub fn pair(&self) -> Option<&Pair> {
        match self {
            Self::LowRank(pair) => Some(pair),
            Self::Bias { of, .. } => of.as_ref(),
            Self::Weight(_) => None,
        }
    }

    /// Names of the tensors that are added or multiplied.
    pub fn tensors(&self) -> impl Iterator<Item = &String> {
        let (first, second) = match self {
            Self::LowRank(Pair { down, up, .. }) => (down, Some(up)),
            Self::Weight(tensor) | Self::Bias { tensor, .. } => (tensor, None),
        };
        std::iter::once(first).chain(second)
    }
}

/// The two matrices of a term of low rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// `[rank, in, ...]`.
    pub down: String,
    /// `[out, rank, ...]`.
    pub up: String,
    /// The scalar that is divided by the rank and multiplies the term; 1 of its rank where the file has none.
    pub alpha: Option<String>,
    /// Length of the vector between the matrices.
    pub rank: usize,
}

impl LoraNames {
    /// Names of these networks; a tensor belongs to the first that knows it.
    pub fn new(networks: Vec<NetworkNames>) -> Self {
        Self(networks)
    }

    /// The register of a network's layers.
    pub fn sites(&self, network: usize) -> &Sites {
        &self.0[network].sites
    }

    /// Whether the network goes by this name in front of its layers.
    pub fn is_prefix_of(&self, network: usize, prefix: &str) -> bool {
        self.0[network].dotted_prefixes.iter().any(|own| own.strip_suffix('.') == Some(prefix))
    }

    /// The terms of a file whose tensors have these names and shapes. All of them are used, or the file is refused.
    pub fn terms(&self, tensors: &BTreeMap<String, Vec<usize>>) -> Result<Vec<Term>, Mismatch> {
        let modules = modules(tensors.keys())?;
        self.refuse_unknown(&modules)?;
        let mut terms = Vec::with_capacity(modules.len());
        let mut taken = BTreeMap::new();
        for (name, module) in modules {
            let (network, parts) = self.find(&name).expect("unknown modules have been refused: this is a bug");
            for part in parts {
                if let Some(other) = taken.insert((network, &part.layer), name.clone()) {
                    let layer = &part.layer;
                    return Err(Mismatch(format!("it has two terms for layer {layer}: `{other}` and `{name}`")));
                }
            }
            terms.extend(self.terms_of(network, parts, &name, module, tensors)?);
        }
        if terms.is_empty() {
            return Err(Mismatch("it has no tensors".to_owned()));
        }
        Ok(terms)
    }

    fn find(&self, module: &str) -> Option<(usize, &[Part])> {
        self.0.iter().enumerate().find_map(|(network, names)| Some((network, names.find(module)?)))
    }

    fn refuse_unknown(&self, modules: &BTreeMap<String, Module>) -> Result<(), Mismatch> {
        let unknown: Vec<&str> =
            modules.iter().filter(|(name, _)| self.find(name).is_none()).flat_map(|(_, m)| m.tensors()).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let total: usize = modules.values().map(|module| module.tensors().count()).sum();
        let problem = "tensors belong to no layer of this model";
        Err(Mismatch(format!("{} of its {total} {problem}: {}", unknown.len(), listed(&unknown))))
    }

    fn terms_of(
        &self,
        network: usize,
        parts: &[Part],
        name: &str,
        module: Module,
        tensors: &BTreeMap<String, Vec<usize>>,
    ) -> Result<Vec<Term>, Mismatch> {
        let layers = &self.0[network].layers;
        let outputs = parts.iter().map(|part| part.rows.end).max().unwrap_or(0);
        let addends = module.addends(name, tensors)?;
        let mut terms = Vec::with_capacity(parts.len() * addends.len());
        for part in parts {
            let shape = *layers.get(&part.layer).ok_or_else(|| {
                Mismatch(format!("`{name}` is for layer {}, which this model does not have", part.layer))
            })?;
            for addend in &addends {
                shapes::check(&part.layer, shape, outputs, addend, tensors)?;
                terms.push(Term { network, part: part.clone(), shape, addend: addend.clone() });
            }
        }
        Ok(terms)
    }
}

/// The first names, and how many more there are.
pub fn listed(names: &[&str]) -> String {
    let mut shown = names[..names.len().min(MAX_LISTED)].join(", ");
    if names.len() > MAX_LISTED {
        shown.push_str(&format!(" and {} more", names.len() - MAX_LISTED));
    }
    shown
}

#[cfg(test)]
mod tests;
