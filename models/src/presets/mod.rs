//! Published configurations by name, for benches and load tests of models that are not downloaded.
//!
//! Owns: the table, and writing one of its entries as a checkpoint folder without weights, which the same code reads as any
//! other folder. The files hold the fields that decide about sizes and steps, with the published values. Tokenizers are
//! not published configurations: a preset has one of single bytes instead (see [`bytes`]), so that
//! requests work and their lengths are what the caller makes them. Does not know: families, weights.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::config::read_json;
use crate::error::{Error, Result};
use crate::tokenizer::bytes::{self, Around};

/// One published checkpoint.
#[derive(Debug)]
pub struct Preset {
    /// As people ask for it.
    pub name: &'static str,
    /// In groups, some of which several presets have.
    files: &'static [&'static [File]],
    /// Folders of tokenizers; the empty one is the checkpoint folder itself.
    tokenizers: &'static [&'static str],
    /// What the first of them has beside bytes, for a template whose tokens are counted.
    tokens: &'static [(u32, &'static str)],
}

/// A path below the checkpoint folder, and what is there.
type File = (&'static str, &'static str);

/// What both models of FLUX.1 have.
const FLUX: &[File] = &[
    ("model_index.json", include_str!("flux-index.json")),
    ("text_encoder/config.json", include_str!("clip-l.json")),
    ("text_encoder_2/config.json", include_str!("t5-xxl.json")),
    ("vae/config.json", include_str!("flux-vae.json")),
];
/// What all models of Wan2.1 have.
const WAN: &[File] = &[
    ("scheduler/scheduler_config.json", include_str!("wan-scheduler.json")),
    ("text_encoder/config.json", include_str!("umt5-xxl.json")),
    ("vae/config.json", include_str!("wan-vae.json")),
];
/// What those of them have besides that make videos from text.
const WAN_OF_TEXT: &[File] = &[("model_index.json", include_str!("wan-index.json"))];
/// What those of them have besides that make videos from pictures.
const WAN_OF_PICTURES: &[File] = &[
    ("model_index.json", include_str!("wan-i2v-index.json")),
    ("image_encoder/config.json", include_str!("clip-vit-h.json")),
    ("image_processor/preprocessor_config.json", include_str!("clip-image-processor.json")),
];
/// What all models of CogVideoX have.
const COGVIDEOX: &[File] = &[("text_encoder/config.json", include_str!("t5-xxl.json"))];
/// What those of them have besides that make videos from text.
const COGVIDEOX_OF_TEXT: &[File] = &[("model_index.json", include_str!("cogvideox-index.json"))];
/// What those of them have besides that make videos from pictures.
const COGVIDEOX_OF_PICTURES: &[File] = &[("model_index.json", include_str!("cogvideox-i2v-index.json"))];
/// The scheduler of all but the 2B model.
const COGVIDEOX_5B: &[File] = &[("scheduler/scheduler_config.json", include_str!("cogvideox-scheduler.json"))];
/// The VAE of all but the 2B model and 1.5 from a picture.
const COGVIDEOX_VAE: &[File] = &[("vae/config.json", include_str!("cogvideox-vae.json"))];

/// What all models of HunyuanVideo have.
const HUNYUAN: &[File] = &[
    ("scheduler/scheduler_config.json", include_str!("hunyuanvideo-scheduler.json")),
    ("text_encoder_2/config.json", include_str!("clip-l.json")),
    ("vae/config.json", include_str!("hunyuanvideo-vae.json")),
];

/// Those of the template that HunyuanVideo's prompts of pictures have, under their published numbers where they have one
/// there. The long one is as many words as make the template the published number of tokens.
const OF_LLAVA: &[(u32, &str)] = &[
    (271, "\n\n"),
    (882, "user"),
    (9125, "system"),
    (78_191, "assistant"),
    (128_006, "<|start_header_id|>"),
    (128_007, "<|end_header_id|>"),
    (128_009, "<|eot_id|>"),
    (128_257, "<image>"),
    (128_258, bytes::PAD),
    (
        128_259,
        "Describe the video by detailing the following aspects according to the reference image: 1. The main content \
         and theme of the video.2. The color, shape, size, texture, quantity, text, and spatial relationships of the \
         objects.3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.4. \
         background environment, li",
    ),
];

/// All presets of this build.
pub const PRESETS: &[Preset] = &[
    language_model("llama-3.1-8b", &[&[("config.json", include_str!("llama-3.1-8b.json"))]]),
    language_model("llama-3.1-70b", &[&[("config.json", include_str!("llama-3.1-70b.json"))]]),
    language_model("qwen2.5-7b", &[&[("config.json", include_str!("qwen2.5-7b.json"))]]),
    language_model("qwen2.5-72b", &[&[("config.json", include_str!("qwen2.5-72b.json"))]]),
    language_model("llama-3.1-70b-awq-int4", &[&[("config.json", include_str!("llama-3.1-70b-awq-int4.json"))]]),
    language_model("llama-3.3-70b-w4a16", &[&[("config.json", include_str!("llama-3.3-70b-w4a16.json"))]]),
    language_model("qwen2.5-72b-awq", &[&[("config.json", include_str!("qwen2.5-72b-awq.json"))]]),
    language_model("qwen2.5-72b-gptq-int4", &[&[("config.json", include_str!("qwen2.5-72b-gptq-int4.json"))]]),
    language_model("tinyllama-1.1b", &[&[("config.json", include_str!("tinyllama-1.1b.json"))]]),
    Preset {
        name: "flux.1-dev",
        files: &[
            FLUX,
            &[
                ("transformer/config.json", include_str!("flux.1-dev.json")),
                ("scheduler/scheduler_config.json", include_str!("flux.1-dev-scheduler.json")),
            ],
        ],
        tokenizers: &["tokenizer", "tokenizer_2"],
        tokens: &[],
    },
    Preset {
        name: "flux.1-schnell",
        files: &[
            FLUX,
            &[
                ("transformer/config.json", include_str!("flux.1-schnell.json")),
                ("scheduler/scheduler_config.json", include_str!("flux.1-schnell-scheduler.json")),
            ],
        ],
        tokenizers: &["tokenizer", "tokenizer_2"],
        tokens: &[],
    },
    Preset {
        name: "sdxl",
        files: &[&[
            ("model_index.json", include_str!("sdxl-index.json")),
            ("unet/config.json", include_str!("sdxl.json")),
            ("scheduler/scheduler_config.json", include_str!("sdxl-scheduler.json")),
            ("text_encoder/config.json", include_str!("sdxl-clip-l.json")),
            ("text_encoder_2/config.json", include_str!("clip-bigg.json")),
            ("vae/config.json", include_str!("sdxl-vae.json")),
        ]],
        tokenizers: &["tokenizer", "tokenizer_2"],
        tokens: &[],
    },
    Preset {
        name: "wan2.1-t2v-1.3b",
        files: &[WAN, WAN_OF_TEXT, &[("transformer/config.json", include_str!("wan2.1-t2v-1.3b.json"))]],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "wan2.1-t2v-14b",
        files: &[WAN, WAN_OF_TEXT, &[("transformer/config.json", include_str!("wan2.1-t2v-14b.json"))]],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "wan2.1-i2v-14b",
        files: &[WAN, WAN_OF_PICTURES, &[("transformer/config.json", include_str!("wan2.1-i2v-14b.json"))]],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "wan2.1-flf2v-14b",
        files: &[
            WAN,
            WAN_OF_PICTURES,
            &[
                ("transformer/config.json", include_str!("wan2.1-flf2v-14b.json")),
                // In place of what all have: the published shift of this one is another.
                ("scheduler/scheduler_config.json", include_str!("wan-flf2v-scheduler.json")),
            ],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "hunyuanvideo",
        files: &[
            HUNYUAN,
            &[
                ("model_index.json", include_str!("hunyuanvideo-index.json")),
                ("text_encoder/config.json", include_str!("llava-llama-3-8b.json")),
                ("transformer/config.json", include_str!("hunyuanvideo.json")),
            ],
        ],
        tokenizers: &["tokenizer", "tokenizer_2"],
        tokens: &[],
    },
    Preset {
        name: "hunyuanvideo-i2v",
        files: &[
            HUNYUAN,
            &[
                ("model_index.json", include_str!("hunyuanvideo-i2v-index.json")),
                ("text_encoder/config.json", include_str!("llava-llama-3-8b-v1_1.json")),
                ("image_processor/preprocessor_config.json", include_str!("clip-image-processor-336.json")),
                ("transformer/config.json", include_str!("hunyuanvideo-i2v.json")),
            ],
        ],
        tokenizers: &["tokenizer", "tokenizer_2"],
        tokens: OF_LLAVA,
    },
    Preset {
        name: "cogvideox-2b",
        files: &[
            COGVIDEOX,
            COGVIDEOX_OF_TEXT,
            &[
                ("transformer/config.json", include_str!("cogvideox-2b.json")),
                ("scheduler/scheduler_config.json", include_str!("cogvideox-2b-scheduler.json")),
                ("vae/config.json", include_str!("cogvideox-2b-vae.json")),
            ],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "cogvideox-5b",
        files: &[
            COGVIDEOX,
            COGVIDEOX_OF_TEXT,
            COGVIDEOX_5B,
            COGVIDEOX_VAE,
            &[("transformer/config.json", include_str!("cogvideox-5b.json"))],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "cogvideox-5b-i2v",
        files: &[
            COGVIDEOX,
            COGVIDEOX_OF_PICTURES,
            COGVIDEOX_5B,
            COGVIDEOX_VAE,
            &[("transformer/config.json", include_str!("cogvideox-5b-i2v.json"))],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "cogvideox1.5-5b",
        files: &[
            COGVIDEOX,
            COGVIDEOX_OF_TEXT,
            COGVIDEOX_5B,
            COGVIDEOX_VAE,
            &[("transformer/config.json", include_str!("cogvideox1.5-5b.json"))],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
    Preset {
        name: "cogvideox1.5-5b-i2v",
        files: &[
            COGVIDEOX,
            COGVIDEOX_OF_PICTURES,
            COGVIDEOX_5B,
            &[
                ("transformer/config.json", include_str!("cogvideox1.5-5b-i2v.json")),
                ("vae/config.json", include_str!("cogvideox1.5-i2v-vae.json")),
            ],
        ],
        tokenizers: &["tokenizer"],
        tokens: &[],
    },
];

const fn language_model(name: &'static str, files: &'static [&'static [File]]) -> Preset {
    Preset { name, files, tokenizers: &[""], tokens: &[] }
}

impl std::str::FromStr for &'static Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
            let names = PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", ");
            Error::invalid("preset", format!("`{name}` is not known; known: {names}"))
        })
    }
}

/// A checkpoint folder without weights, under the system's temporary folder; gone when dropped.
#[derive(Debug)]
pub struct Configurations(TempDir);

const NO_TOKENS: &[(u32, &str)] = &[];
/// What a checkpoint folder has beside its weights.
const EXTENSIONS: [&str; 4] = ["json", "jinja", "txt", "model"];
/// Numbers of layers, as the configurations of all components call them.
const DEPTHS: [&str; 5] =
    ["num_hidden_layers", "num_layers", "num_single_layers", "num_refiner_layers", "transformer_layers_per_block"];
/// Fields with the configuration of one of several networks.
const PARTS: [&str; 2] = ["text_config", "vision_config"];

impl Configurations {
    /// Of a preset.
    pub fn of_preset(preset: &Preset) -> Result<Self> {
        let folder = Self::empty()?;
        for (name, text) in preset.files.iter().copied().flatten() {
            folder.write(name, text)?;
        }
        let all_tokens = std::iter::once(preset.tokens).chain(std::iter::repeat(NO_TOKENS));
        for (tokenizer, tokens) in preset.tokenizers.iter().zip(all_tokens) {
            // A language model's lies in the checkpoint folder itself.
            let around = match tokenizer.is_empty() {
                true => Around::Nothing,
                // A template has its own end.
                false if !tokens.is_empty() => Around::Start,
                false => Around::StartAndEnd,
            };
            bytes::write_with(&create_dir(folder.path().join(tokenizer))?, around, tokens)?;
        }
        Ok(folder)
    }

    /// A copy of those of the checkpoint folder at `path`; its weight files may be there or not.
    pub fn of_folder(path: &Path) -> Result<Self> {
        let folder = Self::empty()?;
        copy_files(path, folder.path())?;
        for component in entries(path)?.into_iter().filter(|entry| entry.is_dir()) {
            let name = component.file_name().expect("an entry of a folder has a name: this is a bug");
            copy_files(&component, &create_dir(folder.path().join(name))?)?;
        }
        Ok(folder)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Cuts each network to at most `max_layers` layers of each kind (FLUX has two kinds).
    pub fn keep_layers(&self, max_layers: usize) -> Result<()> {
        let mut folders = entries(self.path())?;
        folders.push(self.path().to_owned());
        for path in folders.iter().map(|folder| folder.join("config.json")).filter(|path| path.exists()) {
            let mut config: Value = read_json(&path)?;
            cut_fields(&mut config, max_layers);
            // A component that is two networks has a configuration of each.
            for part in PARTS {
                if let Some(fields) = config.get_mut(part) {
                    cut_fields(fields, max_layers);
                }
            }
            std::fs::write(&path, config.to_string()).map_err(|e| Error::checkpoint(path, e))?;
        }
        Ok(())
    }

    fn empty() -> Result<Self> {
        let made = tempfile::Builder::new().prefix("tale-").tempdir();
        made.map(Self).map_err(|e| Error::checkpoint(std::env::temp_dir(), e))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path().join(name);
        create_dir(path.parent().unwrap_or(self.path()).to_owned())?;
        std::fs::write(&path, text).map_err(|e| Error::checkpoint(path, e))
    }
}

fn cut_fields(config: &mut Value, max_layers: usize) {
    for field in DEPTHS {
        if let Some(depth) = config.get_mut(field) {
            cut(depth, max_layers);
        }
    }
}

/// A number of layers, or one for each level.
fn cut(depth: &mut Value, max_layers: usize) {
    match depth {
        Value::Array(levels) => levels.iter_mut().for_each(|level| cut(level, max_layers)),
        Value::Number(layers) => *layers = layers.as_u64().map_or(max_layers, |n| max_layers.min(n as usize)).into(),
        _ => (),
    }
}

fn create_dir(dir: PathBuf) -> Result<PathBuf> {
    match std::fs::create_dir_all(&dir) {
        Ok(()) => Ok(dir),
        Err(error) => Err(Error::checkpoint(dir, error)),
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<_> { std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect() };
    read().map_err(|error| Error::checkpoint(dir, error))
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for path in entries(from)?.into_iter().filter(|path| path.is_file()) {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let Some(name) = path.file_name().filter(|_| EXTENSIONS.contains(&extension)) else { continue };
        std::fs::copy(&path, to.join(name)).map_err(|e| Error::checkpoint(&path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
