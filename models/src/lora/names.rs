//! From a LoRA file's tensor names to a model's layers, in whichever dialect the file is written.
//!
//! Owns: the dialects' suffixes and prefixes, and one table of all the names that a model's layers go by. The table is
//! made from the model's own layers, so that a name is either exactly one of theirs or none of this model.
//!
//! | dialect | name of one tensor |
//! |---|---|
//! | PEFT, diffusers | `unet.….attn1.to_q.lora_A.weight`, `text_encoder.….q_proj.lora_B.weight` |
//! | diffusers before PEFT | `unet.….attn1.processor.to_q_lora.down.weight`, `text_encoder.….q_proj.lora_linear_layer.up.weight` |
//! | kohya | `lora_unet_…_attn1_to_q.lora_down.weight`, `lora_te1_….lora_up.weight`, `….alpha`; diffusers' names or the original ones |
//! | original | `double_blocks.0.img_attn.qkv.lora_A.weight`, also below `diffusion_model.` or `base_model.model.` |
//!
//! Source of the facts: diffusers `loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`; kohya's sd-scripts
//! `networks/lora.py`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::slot::{LayerShape, Sites};
use crate::weights::names as elsewhere;

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
        const DOTTED: &[&str] =
            &["unet.", "transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", ""];
        const FLAT: &[&str] = &["lora_unet_", "lora_transformer_"];
        let mut names = Self::empty(sites, DOTTED, FLAT);
        for (layer, shape) in names.layers.clone() {
            for name in names_before_peft(&layer).chain([layer.clone()]) {
                names.enter(Alias { name, parts: vec![whole(&layer, shape)] });
            }
        }
        names.enter_original(original);
        more.into_iter().for_each(|alias| names.enter(alias));
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
        elsewhere::Extent::Whole => whole(layer, shape),
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

/// The two matrices of a term, by the names of their tensors, and what they are added to.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    /// Position of the network.
    pub network: usize,
    /// The layer, and which rows of `up` are its own.
    pub part: Part,
    /// Of the layer.
    pub shape: LayerShape,
    /// `[rank, in, ...]`.
    pub down: String,
    /// `[out, rank, ...]`.
    pub up: String,
    /// The scalar that is divided by the rank and multiplies the term; 1 of its rank where the file has none.
    pub alpha: Option<String>,
    /// Length of the vector between the matrices.
    pub rank: usize,
}

/// Why a file is not for this model, in words that name tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch(pub String);

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
        let missing = |what: &str| Mismatch(format!("`{name}` has no {what}"));
        let down = module.down.ok_or_else(|| missing("lora_A (lora_down)"))?;
        let up = module.up.ok_or_else(|| missing("lora_B (lora_up)"))?;
        let layers = &self.0[network].layers;
        let outputs = parts.iter().map(|part| part.rows.end).max().unwrap_or(0);
        let rank = tensors[&down].first().copied().unwrap_or(0);
        let mut terms = Vec::with_capacity(parts.len());
        for part in parts {
            let shape = *layers.get(&part.layer).ok_or_else(|| {
                Mismatch(format!("`{name}` is for layer {}, which this model does not have", part.layer))
            })?;
            check_shapes(part, shape, (&down, &tensors[&down]), (&up, &tensors[&up]), (rank, outputs))?;
            let (down, up, alpha) = (down.clone(), up.clone(), module.alpha.clone());
            terms.push(Term { network, part: part.clone(), shape, down, up, alpha, rank });
        }
        Ok(terms)
    }
}

/// Linear layers take matrices, or convolutions of one position, which are the same.
fn check_shapes(
    part: &Part,
    shape: LayerShape,
    (down, down_shape): (&str, &[usize]),
    (up, up_shape): (&str, &[usize]),
    (rank, outputs): (usize, usize),
) -> Result<(), Mismatch> {
    let inputs = shape.inputs();
    let (downs, ups) = match shape {
        LayerShape::Linear { .. } => {
            (vec![vec![rank, inputs], vec![rank, inputs, 1, 1]], vec![vec![outputs, rank], vec![outputs, rank, 1, 1]])
        }
        LayerShape::Conv2d { kernel, .. } => {
            (vec![vec![rank, inputs, kernel, kernel]], vec![vec![outputs, rank, 1, 1]])
        }
    };
    for (name, found, allowed) in [(down, down_shape, downs), (up, up_shape, ups)] {
        if rank == 0 || !allowed.iter().any(|shape| shape == found) {
            let (layer, expected) = (&part.layer, &allowed[0]);
            return Err(Mismatch(format!(
                "`{name}` has shape {found:?}; layer {layer} of this model takes {expected:?}"
            )));
        }
    }
    Ok(())
}

/// The tensors of one name, by what they are.
#[derive(Debug, Default)]
struct Module {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

impl Module {
    fn tensors(&self) -> impl Iterator<Item = &str> {
        [&self.down, &self.up, &self.alpha].into_iter().flatten().map(String::as_str)
    }
}

/// What a tensor is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Down,
    Up,
    Alpha,
}

/// The longer of two endings that both fit comes first.
const SUFFIXES: [(&str, Role); 11] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".down.weight", Role::Down),
    (".up.weight", Role::Up),
    (".alpha", Role::Alpha),
];

/// Parts of names that say that a file is something else than LoRA, and what.
const OTHER_KINDS: [(&str, &str); 11] = [
    (".dora_scale", "DoRA (dora_scale)"),
    (".lora_magnitude_vector", "DoRA (lora_magnitude_vector)"),
    (".hada_", "LoHa (hada_w)"),
    (".lokr_", "LoKr (lokr_w)"),
    (".lora_mid", "LoCon with a Tucker core (lora_mid)"),
    (".oft_", "OFT (oft_blocks)"),
    (".glora_", "GLoRA"),
    (".on_input", "IA3 (on_input)"),
    (".diff_b", "differences of whole biases (diff_b)"),
    (".diff", "differences of whole weights (diff)"),
    (".lora_B.bias", "LoRA with biases (lora_B.bias)"),
];

/// Whether a segment of the name is this one, or begins with it where it ends in an underscore.
fn has_segment(tensor: &str, segment: &str) -> bool {
    if segment.ends_with('_') {
        return tensor.contains(segment);
    }
    tensor.ends_with(segment) || tensor.contains(&format!("{segment}."))
}

/// Tensors by the name of what they are for.
fn modules<'a>(tensors: impl Iterator<Item = &'a String>) -> Result<BTreeMap<String, Module>, Mismatch> {
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    let (mut unreadable, mut kinds) = (Vec::new(), BTreeSet::new());
    let mut total = 0;
    for tensor in tensors {
        total += 1;
        if let Some((_, kind)) = OTHER_KINDS.iter().find(|(part, _)| has_segment(tensor, part)) {
            kinds.insert(*kind);
            continue;
        }
        let Some((name, role)) = parse(tensor) else {
            unreadable.push(tensor.as_str());
            continue;
        };
        let module = modules.entry(name).or_default();
        let place = match role {
            Role::Down => &mut module.down,
            Role::Up => &mut module.up,
            Role::Alpha => &mut module.alpha,
        };
        if let Some(other) = place.replace(tensor.clone()) {
            return Err(Mismatch(format!("it has two tensors for one place: `{other}` and `{tensor}`")));
        }
    }
    if !kinds.is_empty() {
        let kinds: Vec<&str> = kinds.into_iter().collect();
        return Err(Mismatch(format!("it is, or is partly, {}; only LoRA is supported", kinds.join(", "))));
    }
    if !unreadable.is_empty() {
        let (found, names) = (unreadable.len(), listed(&unreadable));
        return Err(Mismatch(format!("{found} of its {total} tensors are not LoRA's: {names}")));
    }
    Ok(modules)
}

/// PEFT may put an adapter's name before `weight`.
fn parse(tensor: &str) -> Option<(String, Role)> {
    for (suffix, role) in SUFFIXES {
        if let Some(name) = tensor.strip_suffix(suffix) {
            return Some((name.to_owned(), role));
        }
    }
    let inner = tensor.strip_suffix(".weight")?;
    let (rest, adapter) = inner.rsplit_once('.')?;
    let (name, role) = rest
        .strip_suffix(".lora_A")
        .map(|name| (name, Role::Down))
        .or(rest.strip_suffix(".lora_B").map(|name| (name, Role::Up)))?;
    (!adapter.is_empty()).then(|| (name.to_owned(), role))
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
mod tests {
    use super::*;
    use crate::weights::names::Place;

    /// What the layers of [`names`] are called originally.
    struct Original;

    impl elsewhere::Names for Original {
        fn place(&self, name: &str) -> Option<Place> {
            let third = |first| elsewhere::Extent::Rows(elsewhere::Rows { first, count: 1, of: 3 });
            let (name, part) = match name {
                "blocks.0.attn.to_q.weight" => ("double.0.qkv.weight", third(0)),
                "blocks.0.attn.to_k.weight" => ("double.0.qkv.weight", third(1)),
                "blocks.0.attn.to_v.weight" => ("double.0.qkv.weight", third(2)),
                "norm_out.linear.weight" => ("final.adaLN.weight", elsewhere::Extent::SwappedHalves),
                _ => return None,
            };
            Some(Place { name: name.to_owned(), part })
        }
    }

    /// A network of an attention, a convolution and a modulation, all four values wide, and a text encoder.
    fn names() -> LoraNames {
        let [net, text] = [Arc::<Sites>::default(), Arc::default()];
        let linear = LayerShape::Linear { in_features: 4, out_features: 4 };
        for layer in ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"] {
            net.enter(&format!("blocks.0.{layer}"), linear);
        }
        net.enter("conv_in", LayerShape::Conv2d { in_channels: 4, out_channels: 4, kernel: 3 });
        net.enter("norm_out.linear", linear);
        text.enter("text_model.encoder.layers.1.self_attn.out_proj", linear);
        LoraNames::new(vec![NetworkNames::denoiser(&net, &Original, []), NetworkNames::first_text_encoder(&text)])
    }

    fn terms(tensors: &[(&str, &[usize])]) -> Result<Vec<Term>, String> {
        let tensors = tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
        names().terms(&tensors).map_err(|mismatch| mismatch.0)
    }

    /// A pair of matrices under these names is one term of this layer.
    #[track_caller]
    fn check(down: &str, up: &str, layer: &str) {
        let found = terms(&[(down, &[2, 4]), (up, &[4, 2])]).expect("it is for this model");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].part.layer.as_str(), found[0].rank), (layer, 2));
    }

    #[test]
    fn every_dialect_names_the_same_layers() {
        let q = "blocks.0.attn.to_q";
        check("unet.blocks.0.attn.to_q.lora_A.weight", "unet.blocks.0.attn.to_q.lora_B.weight", q);
        check("blocks.0.attn.to_q.lora_A.default.weight", "blocks.0.attn.to_q.lora_B.default.weight", q);
        check("transformer.blocks.0.attn.to_q.lora.down.weight", "transformer.blocks.0.attn.to_q.lora.up.weight", q);
        check(
            "unet.blocks.0.attn.processor.to_q_lora.down.weight",
            "unet.blocks.0.attn.processor.to_q_lora.up.weight",
            q,
        );
        check("lora_unet_blocks_0_attn_to_q.lora_down.weight", "lora_unet_blocks_0_attn_to_q.lora_up.weight", q);
        let out = "blocks.0.attn.to_out.0";
        check("blocks.0.attn.processor.to_out_lora.down.weight", "blocks.0.attn.processor.to_out_lora.up.weight", out);
        check(
            "lora_unet_blocks_0_attn_to_out_0.lora_down.weight",
            "lora_unet_blocks_0_attn_to_out_0.lora_up.weight",
            out,
        );
        let text = "text_model.encoder.layers.1.self_attn.out_proj";
        for name in ["text_encoder.text_model.encoder.layers.1.self_attn", "text_encoder.encoder.layers.1.self_attn"] {
            check(&format!("{name}.out_proj.lora_A.weight"), &format!("{name}.out_proj.lora_B.weight"), text);
            check(&format!("{name}.to_out_lora.down.weight"), &format!("{name}.to_out_lora.up.weight"), text);
            let new = format!("{name}.out_proj.lora_linear_layer");
            check(&format!("{new}.down.weight"), &format!("{new}.up.weight"), text);
        }
        let flat = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj";
        check(&format!("{flat}.lora_down.weight"), &format!("{flat}.lora_up.weight"), text);
    }

    #[test]
    fn a_fused_layer_is_a_term_for_each_of_its_parts() {
        for name in ["diffusion_model.double.0.qkv.lora_A.weight", "lora_unet_double_0_qkv.lora_down.weight"] {
            let up = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up");
            let found = terms(&[(name, &[3, 4]), (&up, &[12, 3])]).expect("it is for this model");
            let parts: Vec<_> = found.iter().map(|term| (term.part.layer.as_str(), term.part.rows.clone())).collect();
            let expected = [("blocks.0.attn.to_k", 4..8), ("blocks.0.attn.to_q", 0..4), ("blocks.0.attn.to_v", 8..12)];
            assert_eq!(parts, expected);
        }
        let swapped = terms(&[("final.adaLN.lora_A.weight", &[1, 4]), ("final.adaLN.lora_B.weight", &[4, 1])]);
        assert!(swapped.expect("it is for this model")[0].part.swap_halves);
    }

    #[test]
    fn linear_layers_take_convolutions_of_one_position_and_convolutions_their_own_kernel() {
        let pair = |layer: &str| [format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight")];
        let [down, up] = pair("blocks.0.attn.to_q");
        assert!(terms(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 2, 1, 1])]).is_ok());
        assert!(terms(&[(&down, &[2, 4, 3, 3]), (&up, &[4, 2, 1, 1])]).is_err());
        assert!(terms(&[(&down, &[0, 4]), (&up, &[4, 0])]).is_err());
        let [down, up] = pair("conv_in");
        assert!(terms(&[(&down, &[2, 4, 3, 3]), (&up, &[4, 2, 1, 1])]).is_ok());
        let error = terms(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 2, 1, 1])]).expect_err("another kernel");
        assert!(error.contains("[2, 4, 1, 1]") && error.contains("[2, 4, 3, 3]"), "{error}");
    }

    #[test]
    fn nothing_is_dropped() {
        let sound: [(&str, &[usize]); 2] =
            [("blocks.0.attn.to_q.lora_A.weight", &[2, 4]), ("blocks.0.attn.to_q.lora_B.weight", &[4, 2])];
        for (extra, expected) in [
            ("blocks.1.attn.to_q.lora_A.weight", "1 of its 3 tensors belong to no layer"),
            ("lora_te2_text_model_encoder_layers_1_self_attn_out_proj.alpha", "belong to no layer"),
            ("blocks.0.attn.to_k.alpha", "`blocks.0.attn.to_k` has no lora_A"),
            ("blocks.0.attn.norm_q.weight", "are not LoRA's"),
            ("diffusion_model.blocks.0.attn.to_q.diff", "differences of whole weights"),
            ("blocks.0.attn.to_q.lora_mid.weight", "Tucker"),
        ] {
            let error = terms(&[&sound[..], &[(extra, &[4])]].concat()).expect_err(extra);
            assert!(error.contains(expected), "{extra}: {error}");
        }
        assert!(terms(&[]).is_err());
        let many: Vec<String> = (0..20).map(|i| format!("blocks.{}.x.lora_A.weight", 7 + i)).collect();
        let many: Vec<(&str, &[usize])> = many.iter().map(|name| (name.as_str(), &[2usize, 4][..])).collect();
        assert!(terms(&many).expect_err("unknown").ends_with("and 12 more"));
    }
}
