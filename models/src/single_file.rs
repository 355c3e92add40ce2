//! Single files as they are shared: what kind one is, by the tensors that it holds, and which of them are which component.
//!
//! Owns: the table of kinds. Does not know: how a network is built. What a file lacks comes from its base, a folder in
//! diffusers' layout: configurations, tokenizers, scheduler, and every component whose weights are not in the file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::device::Placement;
use crate::error::{Error, Result};
use crate::weights::single::{PartOfFile, WeightFile};
use crate::weights::{MetadataValue, Weights};

/// A kind of single file.
struct Kind {
    /// In words.
    name: &'static str,
    /// Classes of the pipelines that a base may have.
    pipelines: &'static [&'static str],
    /// The network that every file of this kind holds, by its folder in the base.
    denoiser: &'static str,
    /// What the names of its tensors may begin with.
    beginnings: &'static [&'static str],
    /// Tensors that no other kind before it has together, after the beginning.
    marks: &'static [&'static str],
    /// `general.architecture` of GGUF files of this kind; some converters give none.
    architectures: &'static [&'static str],
    /// The other components that a file may hold: folder in the base, and what their names may begin with.
    others: &'static [(&'static str, &'static [&'static str])],
    /// Files beside it that belong to it, where they exist: folder in the base, and file name.
    companions: &'static [(&'static str, &'static str)],
}

const SDXL_PIPELINES: &[&str] =
    &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];
const FLUX_PIPELINES: &[&str] = &["FluxPipeline"];
const WAN_TEXT_PIPELINES: &[&str] = &["WanPipeline"];
const WAN_PICTURE_PIPELINES: &[&str] = &["WanImageToVideoPipeline"];
const WAN_OTHERS: &[(&str, &[&str])] = &[
    ("text_encoder", &["text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl."]),
    ("vae", &["vae.", "first_stage_model."]),
];
const HUNYUAN_VIDEO_OTHERS: &[(&str, &[&str])] = &[
    ("text_encoder", &["text_encoders.llama.transformer."]),
    ("text_encoder_2", &["text_encoders.clip_l.transformer."]),
    ("vae", &["vae.", "first_stage_model."]),
];
/// As files of whole pipelines have it, and as files of the network alone.
const DENOISER_BEGINNINGS: &[&str] = &["model.diffusion_model.", ""];

const KINDS: &[Kind] = &[
    Kind {
        name: "SDXL",
        pipelines: SDXL_PIPELINES,
        denoiser: "unet",
        beginnings: DENOISER_BEGINNINGS,
        marks: &["input_blocks.0.0.weight", "label_emb.0.0.weight"],
        architectures: &[],
        others: &[
            ("text_encoder", &["conditioner.embedders.0.transformer."]),
            // The refiner has this one alone.
            ("text_encoder_2", &["conditioner.embedders.1.model.", "conditioner.embedders.0.model."]),
            ("vae", &["first_stage_model.", "vae."]),
        ],
        companions: &[],
    },
    Kind {
        name: "SDXL's UNet",
        pipelines: SDXL_PIPELINES,
        denoiser: "unet",
        beginnings: &[""],
        marks: &["conv_in.weight", "add_embedding.linear_1.weight", "conv_norm_out.weight"],
        architectures: &[],
        others: &[],
        companions: &[],
    },
    // Before FLUX.1, whose blocks are called the same. What a transformer makes of a picture its tensors do not always tell:
    // a base says it.
    hunyuan_video("HunyuanVideo", &["time_in.mlp.0.weight", "txt_in.input_embedder.weight"]),
    hunyuan_video("HunyuanVideo under ComfyUI's names", &["time_in.in_layer.weight", "txt_in.input_embedder.weight"]),
    hunyuan_video("HunyuanVideo's transformer", &["x_embedder.proj.weight", "context_embedder.proj_in.weight"]),
    Kind {
        name: "FLUX.1",
        pipelines: FLUX_PIPELINES,
        denoiser: "transformer",
        beginnings: DENOISER_BEGINNINGS,
        marks: &["double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight"],
        architectures: &["flux"],
        others: &[
            ("text_encoder", &["text_encoders.clip_l.transformer."]),
            ("text_encoder_2", &["text_encoders.t5xxl.transformer."]),
            ("vae", &["vae.", "first_stage_model."]),
        ],
        companions: &[("vae", "ae.safetensors")],
    },
    Kind {
        name: "FLUX.1's transformer",
        pipelines: FLUX_PIPELINES,
        denoiser: "transformer",
        beginnings: &[""],
        marks: &["transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.proj_mlp.weight"],
        architectures: &["flux"],
        others: &[],
        companions: &[],
    },
    Kind {
        name: "CogVideoX's transformer",
        pipelines: &["CogVideoXPipeline", "CogVideoXImageToVideoPipeline"],
        denoiser: "transformer",
        beginnings: DENOISER_BEGINNINGS,
        marks: &["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"],
        architectures: &[],
        others: &[],
        companions: &[],
    },
    wan("Wan2.1 from a first and a last picture", WAN_PICTURE_PIPELINES, &["head.modulation", "img_emb.emb_pos"]),
    wan("Wan2.1 from a picture", WAN_PICTURE_PIPELINES, &["head.modulation", "img_emb.proj.0.weight"]),
    wan("Wan2.1 from text", WAN_TEXT_PIPELINES, &["head.modulation", "blocks.0.cross_attn.norm_q.weight"]),
    wan(
        "Wan2.1's transformer from pictures",
        WAN_PICTURE_PIPELINES,
        &["blocks.0.scale_shift_table", "condition_embedder.image_embedder.norm1.weight"],
    ),
    wan(
        "Wan2.1's transformer from text",
        WAN_TEXT_PIPELINES,
        &["blocks.0.scale_shift_table", "condition_embedder.time_proj.weight"],
    ),
];

const fn hunyuan_video(name: &'static str, marks: &'static [&'static str]) -> Kind {
    Kind {
        name,
        pipelines: &["HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"],
        denoiser: "transformer",
        // ComfyUI saves networks below its own model's.
        beginnings: &["model.diffusion_model.", "model.model.", "model.", ""],
        marks,
        architectures: &["hyvid"],
        others: HUNYUAN_VIDEO_OTHERS,
        companions: &[],
    }
}

/// What beside the text the model sees is told by its tensors: the first kind that fits counts.
const fn wan(name: &'static str, pipelines: &'static [&'static str], marks: &'static [&'static str]) -> Kind {
    Kind {
        name,
        pipelines,
        denoiser: "transformer",
        beginnings: DENOISER_BEGINNINGS,
        marks,
        architectures: &["wan"],
        others: WAN_OTHERS,
        companions: &[],
    }
}

/// Key of the metadata that says what the network predicts. Source: Stability AI's ModelSpec 1.0.
const PREDICTION_TYPE: &str = "modelspec.prediction_type";
/// Names of tensors that say something without being weights.
const MARKERS: [&str; 2] = ["v_pred", "ztsnr"];
/// Markers of models with a noise schedule that is not SDXL's.
const FOREIGN_SCHEDULES: [&str; 3] = ["edm_mean", "edm_std", "edm_vpred.sigma_max"];
/// A single file, recognised but not loaded.
#[derive(Clone)]
pub struct SingleFile {
    file: WeightFile,
    kind: &'static Kind,
    /// Its components, by their folders in the base; the network that gives the kind its name is the first.
    parts: Vec<(&'static str, PartOfFile)>,
    /// Components in other files beside it.
    companions: Vec<(&'static str, WeightFile)>,
}

impl std::fmt::Debug for SingleFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SingleFile").field("file", &self.file).field("kind", &self.kind.name).finish_non_exhaustive()
    }
}

impl SingleFile {
    /// Recognises the file by the names of its tensors. `others`: architectures of GGUF files that are read elsewhere, for
    /// messages.
    pub fn recognised(file: WeightFile, others: impl Iterator<Item = &'static str>) -> Result<Self> {
        check_architecture(&file, others)?;
        let path = file.path().to_owned();
        let found = KINDS.iter().find_map(|kind| Some((kind, kind.beginning(&file)?)));
        let Some((kind, beginning)) = found else { return Err(unknown(&file)) };
        if let Some(marker) = FOREIGN_SCHEDULES.iter().find(|marker| file.contains(marker)) {
            let problem =
                format!("holds `{marker}`: a model with another noise schedule than SDXL's, which is not supported");
            return Err(Error::checkpoint(path, problem));
        }
        let denoiser = PartOfFile { beginning: beginning.to_owned(), must_fit: true };
        let mut parts = vec![(kind.denoiser, denoiser)];
        for (component, beginnings) in kind.others {
            let beginning = beginnings.iter().find(|beginning| file.contains_below(beginning));
            parts.extend(beginning.map(|beginning| (*component, part(beginning))));
        }
        let mut companions = Vec::new();
        for (component, name) in kind.companions {
            let path = path.with_file_name(name);
            let is_there = parts.iter().any(|(there, _)| there == component);
            if !is_there && path.exists() {
                companions.push((*component, WeightFile::open(&path)?));
            }
        }
        Ok(Self { file, kind, parts, companions })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The folder of its base: the given one, or its own if that is in diffusers' layout.
    pub fn base(&self, given: Option<PathBuf>) -> Result<PathBuf> {
        let path = self.path();
        let own = || path.parent().map(|folder| if folder == Path::new("") { Path::new(".") } else { folder });
        match (given, own()) {
            (Some(base), _) if base.is_dir() => Ok(base),
            (Some(base), _) => Err(Error::checkpoint(base, "is not a folder, as the base of a single file must be")),
            (None, Some(folder)) if folder.join("model_index.json").exists() => Ok(folder.to_owned()),
            (None, _) => {
                let (kind, pipeline) = (self.kind.name, self.kind.pipelines[0]);
                let problem = format!(
                    "holds {kind} and needs a base for what it lacks: a folder of a {pipeline} in diffusers' layout (its \
                     configurations, tokenizers and scheduler at least); give one, or put the file into it"
                );
                Err(Error::checkpoint(path, problem))
            }
        }
    }

    /// Refuses a base of another pipeline.
    pub fn check_base(&self, base: &Path, class_name: &str) -> Result<()> {
        let Kind { name, pipelines, .. } = self.kind;
        if pipelines.contains(&class_name) {
            return Ok(());
        }
        let path = self.path().display();
        let problem = format!("is a {class_name}, but {path} holds {name}; its base is a {}", pipelines.join(" or "));
        Err(Error::checkpoint(base, problem))
    }

    /// The weights of the component in the folder `name` of a base, if they are in the file or in one beside it.
    pub fn weights(&self, name: &str, placement: &Placement, dry: bool) -> Option<Weights> {
        if let Some((_, companion)) = self.companions.iter().find(|(component, _)| *component == name) {
            return Some(companion.weights(&part(""), |_| true, placement, dry));
        }
        let (_, part) = self.parts.iter().find(|(component, _)| *component == name)?;
        let belongs = |tensor: &str| self.component_of(tensor) == Some(name);
        Some(self.file.weights(part, belongs, placement, dry))
    }

    /// Fields of `scheduler_config.json` that the file decides, whatever its base says: velocity models carry a tensor
    /// `v_pred`, and those of them whose noise schedule ends in noise alone also `ztsnr` (as ComfyUI reads them); other
    /// files say it in their metadata. Where both say something else the tensors count.
    pub fn schedule_settings(&self) -> Vec<(&'static str, Value)> {
        let marked = self
            .file
            .contains("v_pred")
            .then(|| Schedule { prediction_type: "v_prediction", is_zero_snr: self.file.contains("ztsnr") });
        let schedule = match (marked, self.schedule_of_metadata()) {
            (Some(marked), Some(said)) if marked.prediction_type != said.prediction_type => {
                let path = self.path().display();
                tracing::warn!(%path, "`{PREDICTION_TYPE}` says {}, but there is a tensor `v_pred`: it counts", said.prediction_type);
                Some(marked)
            }
            (Some(marked), Some(said)) => {
                Some(Schedule { is_zero_snr: marked.is_zero_snr || said.is_zero_snr, ..marked })
            }
            (marked, said) => marked.or(said),
        };
        schedule.map(Schedule::settings).unwrap_or_default()
    }

    /// What the metadata says of a model with a discrete noise schedule; for others the key has no settled meaning.
    fn schedule_of_metadata(&self) -> Option<Schedule> {
        let said = self
            .file
            .metadata(PREDICTION_TYPE)
            .and_then(MetadataValue::as_text)
            .filter(|_| self.kind.pipelines == SDXL_PIPELINES)?;
        let schedule = Schedule::named(said);
        if schedule.is_none() {
            let path = self.path().display();
            tracing::warn!(%path, "`{PREDICTION_TYPE}` says `{said}`, which is not known: the scheduler of the base counts");
        }
        schedule
    }

    /// The component that a tensor is read with: the one whose beginning says most of its name. What is nobody's is
    /// reported with the network that the file is named after; markers are no weights.
    fn component_of(&self, tensor: &str) -> Option<&'static str> {
        if MARKERS.contains(&tensor) {
            return None;
        }
        let named = self.parts.iter().filter(|(_, part)| tensor.starts_with(&part.beginning));
        let named = named.max_by_key(|(_, part)| part.beginning.len());
        Some(named.map_or(self.kind.denoiser, |(component, _)| component))
    }
}

/// What a file says of the noise schedule of its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Schedule {
    /// As `scheduler_config.json` spells it.
    prediction_type: &'static str,
    /// Whether the schedule ends in noise alone.
    is_zero_snr: bool,
}

impl Schedule {
    /// As metadata spells it: `v` and `epsilon` by the specification (and by kohya's sd-scripts), `v-zsnr` by SwarmUI, and
    /// diffusers' names.
    fn named(name: &str) -> Option<Self> {
        let (prediction_type, is_zero_snr) = match name.trim().to_lowercase().replace(['-', ' '], "_").as_str() {
            "v" | "v_prediction" | "v_pred" | "vpred" | "velocity" => ("v_prediction", false),
            "v_zsnr" | "v_ztsnr" | "v_prediction_zsnr" => ("v_prediction", true),
            "epsilon" | "eps" | "epsilon_prediction" | "eps_prediction" => ("epsilon", false),
            "sample" | "x0" => ("sample", false),
            _ => return None,
        };
        Some(Self { prediction_type, is_zero_snr })
    }

    /// As fields of `scheduler_config.json`.
    fn settings(self) -> Vec<(&'static str, Value)> {
        let zero_snr = self.is_zero_snr.then(|| ("rescale_betas_zero_snr", json!(true)));
        [("prediction_type", json!(self.prediction_type))].into_iter().chain(zero_snr).collect()
    }
}

impl Kind {
    /// What the names of the denoiser's tensors begin with, if the file is of this kind.
    fn beginning(&self, file: &WeightFile) -> Option<&'static str> {
        let fits = |beginning: &&&str| self.marks.iter().all(|mark| file.contains(&format!("{beginning}{mark}")));
        self.beginnings.iter().find(fits).copied()
    }
}

/// A component beside the denoiser. Tensors of it that nobody asks for are reported and do no harm.
fn part(beginning: &str) -> PartOfFile {
    PartOfFile { beginning: beginning.to_owned(), must_fit: false }
}

/// Refuses GGUF files that say to be of no kind that is read.
fn check_architecture(file: &WeightFile, others: impl Iterator<Item = &'static str>) -> Result<()> {
    let read: BTreeSet<&str> = KINDS.iter().flat_map(|kind| kind.architectures).copied().collect();
    match file.architecture() {
        Some(other) if !read.contains(other) => {
            let read: BTreeSet<&str> = read.into_iter().chain(others).collect();
            let read = read.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let problem = format!("is a GGUF file of architecture `{other}`; read are those of {read}");
            Err(Error::checkpoint(file.path(), problem))
        }
        _ => Ok(()),
    }
}

fn unknown(file: &WeightFile) -> Error {
    let kinds = KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ");
    let is_lora = |name: &str| name.contains("lora_") || name.contains(".lora.");
    let found = match file.names().next() {
        None => "holds no tensor".to_owned(),
        Some(_) if file.names().any(is_lora) => "is a LoRA and not a model".to_owned(),
        Some(first) => format!("holds {} tensors, such as `{first}`, of no model that is known", file.names().count()),
    };
    Error::checkpoint(file.path(), format!("{found}; single files are read of {kinds}"))
}
