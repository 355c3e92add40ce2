//! What the names of a LoRA file's tensors say: which layer a tensor is for, and what it is to it.
//!
//! Owns: the dialects' suffixes, and the kinds of files that are something else. Does not know: which layers there are.

use std::collections::{BTreeMap, BTreeSet};

use super::{Addend, Pair, listed};
use crate::lora::refusal::Mismatch;

/// The tensors of one name, by what they are.
#[derive(Debug, Default)]
pub(super) struct Module(BTreeMap<Role, String>);

/// What a tensor is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Down,
    Up,
    /// A bias of the second matrix.
    UpBias,
    Alpha,
    /// A difference of the layer's weight.
    Weight,
    /// A difference of the layer's bias.
    Bias,
}

impl Module {
    pub(super) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }

    /// What they add. `name` is that of the layer in the file.
    pub(super) fn addends(
        mut self,
        name: &str,
        tensors: &BTreeMap<String, Vec<usize>>,
    ) -> Result<Vec<Addend>, Mismatch> {
        let mut addends = Vec::with_capacity(2);
        let pair = self.pair(name, tensors)?;
        let up_bias = self.0.remove(&Role::UpBias);
        addends.extend(pair.clone().map(Addend::LowRank));
        addends.extend(up_bias.map(|tensor| Addend::Bias { tensor, of: pair }));
        addends.extend(self.0.remove(&Role::Weight).map(Addend::Weight));
        addends.extend(self.0.remove(&Role::Bias).map(|tensor| Addend::Bias { tensor, of: None }));
        Ok(addends)
    }

    /// The matrices, which are both there where anything is that belongs to them.
    fn pair(&mut self, name: &str, tensors: &BTreeMap<String, Vec<usize>>) -> Result<Option<Pair>, Mismatch> {
        let missing = |what: &str| Mismatch(format!("`{name}` has no {what}"));
        let [down, up, alpha] = [Role::Down, Role::Up, Role::Alpha].map(|role| self.0.remove(&role));
        let is_wanted =
            [&down, &up, &alpha].iter().any(|tensor| tensor.is_some()) || self.0.contains_key(&Role::UpBias);
        if !is_wanted {
            return Ok(None);
        }
        let down = down.ok_or_else(|| missing("lora_A (lora_down)"))?;
        let up = up.ok_or_else(|| missing("lora_B (lora_up)"))?;
        let rank = tensors[&down].first().copied().unwrap_or(0);
        Ok(Some(Pair { down, up, alpha, rank }))
    }
}

/// The longer of two endings that both fit comes first.
const SUFFIXES: [(&str, Role); 15] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_up.bias", Role::UpBias),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".down.weight", Role::Down),
    (".up.weight", Role::Up),
    (".alpha", Role::Alpha),
    (".diff", Role::Weight),
    (".diff_b", Role::Bias),
];
/// The difference of a table that lies beside layers instead of in one of them, and what the original calls the table.
const MODULATION_DIFFERENCE: &str = ".diff_m";
const MODULATION: &str = ".modulation";

/// Parts of names that say that a file is something else than LoRA, and what.
const OTHER_KINDS: [(&str, &str); 8] = [
    (".dora_scale", "DoRA (dora_scale)"),
    (".lora_magnitude_vector", "DoRA (lora_magnitude_vector)"),
    (".hada_", "LoHa (hada_w)"),
    (".lokr_", "LoKr (lokr_w)"),
    (".lora_mid", "LoCon with a Tucker core (lora_mid)"),
    (".oft_", "OFT (oft_blocks)"),
    (".glora_", "GLoRA"),
    (".on_input", "IA3 (on_input)"),
];

/// Whether a segment of the name is this one, or begins with it where it ends in an underscore.
fn has_segment(tensor: &str, segment: &str) -> bool {
    if segment.ends_with('_') {
        return tensor.contains(segment);
    }
    tensor.ends_with(segment) || tensor.contains(&format!("{segment}."))
}

/// Tensors by the name of what they are for.
pub(super) fn modules<'a>(tensors: impl Iterator<Item = &'a String>) -> Result<BTreeMap<String, Module>, Mismatch> {
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
        if let Some(other) = module.0.insert(role, tensor.clone()) {
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
    if let Some(block) = tensor.strip_suffix(MODULATION_DIFFERENCE) {
        return Some((format!("{block}{MODULATION}"), Role::Weight));
    }
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
