//! One LoRA file: its header, checked against a model, and its matrices, read when they are needed.
//!
//! A file is read by position and never mapped: its folder is written to while the server runs, and a map of a file that
//! somebody cuts short ends the process.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use tale_kernels::conv_weight;

use super::names::{LoraNames, Mismatch, Part, Term};
use super::slot::LayerShape;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::files::Limit;
use crate::lfs;

/// Most by which a term is multiplied beside the request's weight. Published are 1/64 to 8.
const MAX_SCALE: f64 = 1e4;
/// Largest rank. Published are 1,024 at most.
const MAX_RANK: usize = 1 << 14;
/// Bytes of a tensor that are looked through at a time; whole numbers of every dtype.
const PIECE_BYTES: usize = 1 << 20;
/// Where diffusers writes what it knew of an adapter, as JSON.
const ADAPTER_METADATA: &str = "lora_adapter_metadata";
/// Keys of a header under which trainers note the alpha that they trained with.
const TRAINED_ALPHAS: [&str; 4] = ["ss_network_alpha", "network_alpha", "lora_alpha", "alpha"];
/// `lora_alpha` of PEFT's `LoraConfig` where none is given.
const PEFT_ALPHA: f64 = 8.0;

/// Why a file cannot be used.
#[derive(Debug)]
pub enum Refusal {
    /// It cannot be read, or is no safetensors file.
    Unreadable(String),
    /// It is for another model, or no LoRA.
    Mismatch(Mismatch),
}

/// A file whose tensors all belong to layers of one model, in shapes that fit.
pub struct LoraFile {
    /// Unlike that of every other file that this process has opened.
    id: u64,
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, Located>,
    terms: Vec<ScaledTerm>,
    device_bytes: usize,
}

#[derive(Debug, Clone)]
struct Located {
    dtype: DType,
    shape: Vec<usize>,
    start: u64,
    len: usize,
}

/// A term, and what its file multiplies it with.
#[derive(Debug)]
struct ScaledTerm {
    term: Term,
    scale: f64,
}

/// A term's matrices where and as the model computes.
#[derive(Debug, Clone)]
pub struct LoadedTerm {
    /// Position of the network, and name of the layer.
    pub network: usize,
    /// See `network`.
    pub layer: String,
    /// As in [`super::Delta`].
    pub down: Tensor,
    /// As in [`super::Delta`].
    pub up: Tensor,
    /// Without the request's weight.
    pub scale: f64,
}

impl std::fmt::Debug for LoraFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoraFile").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}

impl LoraFile {
    /// Reads the header of an opened file and takes its names for layers of the model; its matrices are looked through for
    /// values that are not finite. `placement` is where the model computes.
    pub fn read(path: &Path, file: File, names: &LoraNames, placement: &Placement) -> Result<Self, Refusal> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let (tensors, header) = read_header(&file).map_err(Refusal::Unreadable)?;
        let shapes = tensors.iter().map(|(name, located)| (name.clone(), located.shape.clone())).collect();
        let terms = names.terms(&shapes).map_err(Refusal::Mismatch)?;
        let mut lora = Self {
            id: NEXT_ID.fetch_add(1, Relaxed),
            path: path.to_owned(),
            file,
            tensors,
            terms: Vec::new(),
            device_bytes: 0,
        };
        for name in terms.iter().flat_map(|term| [&term.down, &term.up]).collect::<BTreeSet<_>>() {
            lora.check_finite(name).map_err(Refusal::Unreadable)?;
        }
        let metadata = header.get(ADAPTER_METADATA).filter(|json| !json.is_empty());
        let metadata = metadata.map(|json| AdapterMetadata::parse(json)).transpose()?.unwrap_or_default();
        for term in terms {
            if !(1..=MAX_RANK).contains(&term.rank) {
                let problem = format!("`{}` has rank {}; allowed: 1 to {MAX_RANK}", term.down, term.rank);
                return Err(Refusal::Mismatch(Mismatch(problem)));
            }
            let scale = lora.scale(&term, &metadata, names)?;
            if !(-MAX_SCALE..=MAX_SCALE).contains(&scale) {
                let problem = format!("`{}` is scaled by {scale:e}; allowed: -{MAX_SCALE} to {MAX_SCALE}", term.down);
                return Err(Refusal::Mismatch(Mismatch(problem)));
            }
            lora.device_bytes += lora.bytes(&term, placement);
            lora.terms.push(ScaledTerm { term, scale });
        }
        if let Some((key, alpha)) = unheeded_alpha(&header, &lora.terms) {
            let path = path.display();
            tracing::warn!(
                "{path}: its header says {key} = {alpha}, but it holds no alpha tensors: its terms count once, as in diffusers"
            );
        }
        Ok(lora)
    }

    /// LoraNames the file among all that were opened.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of the matrices on the model's device; those that several layers share count for each.
    pub fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    /// Bytes that its matrices have in the file, each as often as it is read.
    fn bytes_to_read(&self) -> usize {
        let downs: BTreeSet<_> = self.terms.iter().map(|of| &of.term.down).collect();
        let ups = self.terms.iter().map(|of| &of.term.up);
        downs.into_iter().chain(ups).map(|name| self.tensors[name].len).sum()
    }

    fn matrix(&self, name: &str, shape: LayerShape, half: Half<'_>, placement: &Placement) -> Result<Tensor> {
        let located = &self.tensors[name];
        let values = Tensor::from_raw_buffer(&self.bytes_of(located)?, located.dtype, &located.shape, &Device::Cpu)?;
        let values = match half {
            Half::Down => values,
            Half::Up(part) => own_rows(&values, part)?,
        };
        let (dtype, rank_of_weight) = match shape {
            LayerShape::Linear { .. } => (placement.matrix_dtype(located.dtype), 2),
            LayerShape::Conv2d { .. } => (placement.compute_dtype, 4),
        };
        let values = match (values.rank(), rank_of_weight) {
            (4, 2) => values.flatten_from(1)?,
            _ => values,
        };
        let values = values.to_dtype(dtype)?.to_device(&placement.device)?;
        if rank_of_weight == 4 { Ok(conv_weight(&values)?) } else { Ok(values) }
    }

    /// Refuses a tensor that holds NaN or infinity, which would spoil every picture.
    fn check_finite(&self, name: &str) -> Result<(), String> {
        let Located { dtype, start, len, .. } = self.tensors[name];
        let mut piece = vec![0; len.min(PIECE_BYTES)];
        for at in (0..len).step_by(PIECE_BYTES) {
            let piece = &mut piece[..PIECE_BYTES.min(len - at)];
            let read = self.file.read_exact_at(piece, start + at as u64);
            read.map_err(|error| format!("tensor `{name}` cannot be read: {error}"))?;
            if !are_finite(piece, dtype) {
                return Err(format!("tensor `{name}` holds a value that is not finite"));
            }
        }
        Ok(())
    }

    fn bytes_of(&self, located: &Located) -> Result<Vec<u8>> {
        let mut bytes = vec![0; located.len];
        let read = self.file.read_exact_at(&mut bytes, located.start);
        read.map_err(|error| Error::checkpoint(&self.path, format!("cannot be read any more: {error}")))?;
        Ok(bytes)
    }

    /// `alpha / rank`.
    fn scale(&self, term: &Term, metadata: &AdapterMetadata, names: &LoraNames) -> Result<f64, Refusal> {
        let Some(alpha) = &term.alpha else {
            return Ok(metadata.scale(term, names));
        };
        let located = &self.tensors[alpha];
        if located.shape.iter().product::<usize>() != 1 {
            let (shape, name) = (&located.shape, alpha);
            return Err(Refusal::Mismatch(Mismatch(format!("`{name}` has shape {shape:?} and should be one number"))));
        }
        let number = || -> Result<f64> {
            let value = Tensor::from_raw_buffer(&self.bytes_of(located)?, located.dtype, &[], &Device::Cpu)?;
            Ok(value.to_dtype(DType::F64)?.to_scalar::<f64>()?)
        };
        let value = number().map_err(|error| Refusal::Unreadable(error.to_string()))?;
        if !value.is_finite() {
            return Err(Refusal::Mismatch(Mismatch(format!("`{alpha}` is not a finite number"))));
        }
        Ok(value / term.rank as f64)
    }

    fn bytes(&self, term: &Term, placement: &Placement) -> usize {
        let elements = |name: &str| self.tensors[name].shape[1..].iter().product::<usize>();
        let dtype = match term.shape {
            LayerShape::Linear { .. } => placement.matrix_dtype(self.tensors[&term.down].dtype),
            LayerShape::Conv2d { .. } => placement.compute_dtype,
        };
        (term.rank * elements(&term.down) + term.part.rows.len() * elements(&term.up)) * dtype.size_in_bytes()
    }
}

/// The matrices of a file on their way to the device.
#[derive(Debug)]
pub struct FileReading {
    file: Arc<LoraFile>,
    terms: Vec<LoadedTerm>,
    /// By name: those that several layers share are read once.
    downs: HashMap<String, Tensor>,
    bytes_left: usize,
}

impl FileReading {
    /// Nothing is read yet.
    pub fn new(file: &Arc<LoraFile>) -> Self {
        let bytes_left = file.bytes_to_read();
        Self { file: file.clone(), terms: Vec::new(), downs: HashMap::new(), bytes_left }
    }

    /// Bytes of the file that are still to be read.
    pub fn bytes_left(&self) -> usize {
        self.bytes_left
    }

    /// See [`LoraFile::id`].
    pub fn file_id(&self) -> u64 {
        self.file.id()
    }

    /// See [`LoraFile::device_bytes`].
    pub fn device_bytes(&self) -> usize {
        self.file.device_bytes()
    }

    /// Whether all is there.
    pub fn is_done(&self) -> bool {
        self.terms.len() == self.file.terms.len()
    }

    /// The terms that are there.
    pub fn into_terms(self) -> Vec<LoadedTerm> {
        self.terms
    }

    /// Reads the next terms, as far as their matrices have `budget_bytes` in the file, and one at least: the bytes read.
    pub fn advance(&mut self, budget_bytes: usize, placement: &Placement) -> Result<usize> {
        let file = self.file.clone();
        let mut read = 0;
        while let Some(next) = file.terms.get(self.terms.len()) {
            let bytes = self.bytes_of(&next.term);
            if read > 0 && read + bytes > budget_bytes {
                break;
            }
            let loaded = self.load(next, placement)?;
            self.terms.push(loaded);
            read += bytes;
        }
        self.bytes_left -= read;
        Ok(read)
    }

    /// That are read for a term.
    fn bytes_of(&self, term: &Term) -> usize {
        let len = |name: &str| self.file.tensors[name].len;
        let down = if self.downs.contains_key(&term.down) { 0 } else { len(&term.down) };
        down + len(&term.up)
    }

    fn load(&mut self, of: &ScaledTerm, placement: &Placement) -> Result<LoadedTerm> {
        let ScaledTerm { term, scale } = of;
        let down = match self.downs.get(&term.down) {
            Some(shared) => shared.clone(),
            None => self.file.matrix(&term.down, term.shape, Half::Down, placement)?,
        };
        self.downs.insert(term.down.clone(), down.clone());
        let up = self.file.matrix(&term.up, term.shape, Half::Up(&term.part), placement)?;
        Ok(LoadedTerm { network: term.network, layer: term.part.layer.clone(), down, up, scale: *scale })
    }
}

/// Whether no number of this dtype in `bytes` has an exponent of ones, as infinities and NaN have.
fn are_finite(bytes: &[u8], dtype: DType) -> bool {
    let halves = |exponent: u16| bytes.as_chunks().0.iter().all(|x| u16::from_le_bytes(*x) & exponent != exponent);
    match dtype {
        DType::F16 => halves(0x7c00),
        DType::BF16 => halves(0x7f80),
        _ => bytes.as_chunks().0.iter().all(|x| f32::from_le_bytes(*x).is_finite()),
    }
}

/// Which of a term's matrices.
enum Half<'a> {
    Down,
    Up(&'a Part),
}

/// The outputs that are the layer's own, in its own order, as a copy: a view would keep the others in memory.
fn own_rows(up: &Tensor, part: &Part) -> Result<Tensor> {
    let rows = up.narrow(0, part.rows.start, part.rows.len())?;
    if !part.swap_halves {
        return Ok(rows.force_contiguous()?);
    }
    let half = part.rows.len() / 2;
    Ok(Tensor::cat(&[rows.narrow(0, half, part.rows.len() - half)?, rows.narrow(0, 0, half)?], 0)?)
}

fn refuse_pointer(file: &File) -> Result<(), String> {
    let mut first = [0; 256];
    let len = file.read_at(&mut first, 0).map_err(|error| error.to_string())?;
    lfs::pointer_problem(&first[..len]).map_or(Ok(()), Err)
}

/// What a file says beside its tensors.
type Header = HashMap<String, String>;

/// An alpha in the header that asks for another scale than that of a term, for which the file has no alpha otherwise. It is
/// not heeded: diffusers reads no such keys for SDXL and FLUX.1 (`lora_base.py`, `_fetch_state_dict`), and tools that convert
/// a file keep its header when they multiply the scale into its matrices.
fn unheeded_alpha<'a>(header: &'a Header, terms: &[ScaledTerm]) -> Option<(&'a str, f64)> {
    let alphas = TRAINED_ALPHAS.iter().filter_map(|key| header.get_key_value(*key));
    let mut alphas = alphas.filter_map(|(key, alpha)| Some((key.as_str(), alpha.trim().parse::<f64>().ok()?)));
    let is_without = |term: &&ScaledTerm| term.term.alpha.is_none() && term.scale == 1.0;
    alphas.find(|(_, alpha)| terms.iter().filter(is_without).any(|term| *alpha != term.term.rank as f64))
}

/// Tensors by name, and what the header says beside them; the error is in words.
fn read_header(file: &File) -> Result<(BTreeMap<String, Located>, Header), String> {
    let unsound = |reason: &str| format!("is not a sound safetensors file: {reason}");
    let file_len = file.metadata().map_err(|error| error.to_string())?.len();
    let mut len = [0; 8];
    file.read_exact_at(&mut len, 0).map_err(|_| unsound("it is shorter than a header"))?;
    refuse_pointer(file)?;
    let (header_len, max) = (u64::from_le_bytes(len), Limit::HEADER.bytes());
    if header_len > file_len.saturating_sub(8) {
        return Err(unsound("its header length points past the end of the file"));
    }
    if header_len > max {
        return Err(unsound(&format!("its header has {header_len} bytes; at most {max}")));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, 8).map_err(|error| error.to_string())?;
    if let Some(problem) = Limit::HEADER.problem(&header) {
        return Err(unsound(&format!("its header {problem}")));
    }
    // Reading checks every offset and size against the others, and that nothing overlaps.
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| unsound(&error.to_string()))?;
    let (data_start, data_len) = (8 + header_len, header.data_len() as u64);
    if data_start + data_len != file_len {
        let has = file_len - data_start;
        return Err(unsound(&format!("its tensors have {data_len} bytes, the file has {has} for them")));
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in header.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 if info.shape.is_empty() => DType::F64,
            Dtype::I64 if info.shape.is_empty() => DType::I64,
            other => return Err(format!("tensor `{name}` has dtype {other:?}; read are F32, F16 and BF16")),
        };
        let (start, end) = info.data_offsets;
        let located = Located { dtype, shape: info.shape.clone(), start: data_start + start as u64, len: end - start };
        tensors.insert(name, located);
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}

/// What diffusers writes beside an adapter that PEFT made: fields of a `LoraConfig`, below the name of each network.
#[derive(Debug, Default)]
struct AdapterMetadata(BTreeMap<String, PeftConfig>);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PeftConfig {
    lora_alpha: Option<f64>,
    alpha_pattern: HashMap<String, f64>,
    use_rslora: bool,
    use_dora: bool,
}

impl AdapterMetadata {
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
    fn scale(&self, term: &Term, names: &LoraNames) -> f64 {
        let config = self.0.iter().find(|(network, _)| names.is_prefix_of(term.network, network));
        let Some((_, config)) = config else { return 1.0 };
        let own = config.alpha_pattern.iter().find(|(pattern, _)| is_pattern_of(pattern, &term.part.layer));
        let alpha = own.map(|(_, alpha)| *alpha).or(config.lora_alpha).unwrap_or(PEFT_ALPHA);
        let rank = term.rank as f64;
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
        Term { network: 0, part, shape, down: "d".into(), up: "u".into(), alpha: None, rank: 4 }
    }

    #[test]
    fn an_alpha_that_stands_only_in_the_header_is_noticed_and_not_heeded() {
        let noticed = |header: &[(&str, &str)], term: Term, scale: f64| {
            let header: Header = header.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            unheeded_alpha(&header, &[ScaledTerm { term, scale }]).map(|(key, alpha)| (key.to_owned(), alpha))
        };
        let (alpha, peft) = ([("ss_network_alpha", "2.0"), ("ss_network_dim", "4")], [("lora_alpha", "8"), ("r", "4")]);
        assert_eq!(noticed(&alpha, term(), 1.0), Some(("ss_network_alpha".to_owned(), 2.0)));
        assert_eq!(noticed(&peft, term(), 1.0), Some(("lora_alpha".to_owned(), 8.0)));
        let with_tensor = Term { alpha: Some("alpha".into()), ..term() };
        assert_eq!(noticed(&alpha, with_tensor, 0.5), None, "its tensor counts");
        assert_eq!(noticed(&[("ss_network_alpha", "4")], term(), 1.0), None, "asks for the same");
        assert_eq!(noticed(&[("ss_network_alpha", "Dynamic")], term(), 1.0), None, "no number");
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
            assert_eq!(metadata.scale(&term, &names), expected, "{json}");
        }
        assert!(AdapterMetadata::parse(r#"{"unet.use_dora": true}"#).is_err());
        assert!(AdapterMetadata::parse("[").is_err());
    }
}
