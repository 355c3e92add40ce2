//! IP-Adapter: reference pictures to tokens that the UNet's image attention looks at.
//!
//! Owns: the adapter's image projection in its original names, the way from a picture to its tokens, and whether adapter,
//! encoder and UNet belong to each other. Does not know: the UNet's layers, requests. Source: diffusers
//! `loaders/unet.py` (`_convert_ip_adapter_image_proj_to_diffusers`), `models/embeddings.py` (`ImageProjection`,
//! `IPAdapterPlusImageProjection`), and `prepare_ip_adapter_image_embeds` of the pipeline.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use tale_kernels::{AttentionOptions, attention, gelu_erf};

use crate::checkpoint::{CONFIG, Component, Folder};
use crate::device::Placement;
use crate::encoders::clip_vision::{ClipVisionConfig, ClipVisionEncoder};
use crate::encoders::image_processor::ClipImageProcessor;
use crate::error::{Error, Result};
use crate::layers::{LayerNorm, Linear};
use crate::request::Frame;
use crate::weights::Weights;

/// Tokens that a base adapter makes of one picture; the class does not configure it.
const BASE_TOKENS: usize = 4;
/// Values per head of the resampler, likewise.
const HEAD_DIM: usize = 64;
/// Of all layer norms.
const NORM_EPS: f64 = 1e-5;
/// Folder of the image encoder, beside the adapter.
const IMAGE_ENCODER: &str = "image_encoder";

/// Where an adapter lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpAdapterFiles {
    /// Its safetensors file.
    pub adapter: PathBuf,
    /// Folder of the vision encoder that it was trained with.
    pub image_encoder: PathBuf,
}

impl IpAdapterFiles {
    /// `path` is the adapter's file, or a folder that holds just one; the encoder's folder is `image_encoder`, or the
    /// one of this name beside the file.
    pub fn find(path: &Path, image_encoder: Option<&Path>) -> Result<Self> {
        let adapter = if path.is_dir() { only_adapter(path)? } else { path.to_path_buf() };
        if adapter.extension().is_none_or(|extension| extension != "safetensors") {
            let problem = "is no safetensors file, and others (pickles can run code when read) are not read; \
                           adapters are published as .safetensors too";
            return Err(Error::checkpoint(adapter, problem));
        }
        let beside = || adapter.parent().unwrap_or(Path::new("")).join(IMAGE_ENCODER);
        let image_encoder = image_encoder.map_or_else(beside, Path::to_path_buf);
        if !image_encoder.is_dir() {
            let problem = "the adapter's image encoder is missing; `image_encoder` says where its folder is";
            return Err(Error::checkpoint(image_encoder, problem));
        }
        Ok(Self { adapter, image_encoder })
    }
}

fn only_adapter(dir: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(dir).map_err(|error| Error::checkpoint(dir, error))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file());
    let with = |files: &[PathBuf], extension: &str| -> Vec<PathBuf> {
        files.iter().filter(|path| path.extension().is_some_and(|found| found == extension)).cloned().collect()
    };
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    let adapters = with(&files, "safetensors");
    match (&adapters[..], with(&files, "bin").first()) {
        ([adapter], _) => Ok(adapter.clone()),
        ([], Some(pickle)) => {
            let problem = "is a pickle, which can run code when read; take the adapter's .safetensors file";
            Err(Error::checkpoint(pickle, problem))
        }
        ([], None) => Err(Error::checkpoint(dir, "holds no adapter (a .safetensors file)")),
        (several, _) => {
            let names = several.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy());
            let names = names.collect::<Vec<_>>().join(", ");
            Err(Error::checkpoint(dir, format!("holds several adapters; name the file of one of them: {names}")))
        }
    }
}

/// An adapter with its vision encoder. Immutable once loaded.
#[derive(Debug)]
pub struct IpAdapter {
    processor: ClipImageProcessor,
    encoder: ClipVisionEncoder,
    projection: ImageProjection,
    placement: Placement,
}

impl IpAdapter {
    /// Reads the adapter's `image_proj.*` from `adapter` and the encoder from `image_encoder`, whose folder and
    /// `preprocessor` (where a `preprocessor_config.json` may be) are named. `text_dim` is the width of the UNet's text.
    pub fn load(
        files: &IpAdapterFiles,
        preprocessor: Component<'_>,
        adapter: &Weights,
        image_encoder: &Weights,
        text_dim: usize,
    ) -> Result<Self> {
        let folder = Folder::new(&files.image_encoder);
        let config = ClipVisionConfig::read(folder.whole().fields(CONFIG)?)?;
        let processor = ClipImageProcessor::read_or_default(preprocessor, config.image_size)?;
        let projection = ImageProjection::load(&adapter.pp("image_proj"), files, &config, text_dim)?;
        let encoder = match projection {
            ImageProjection::Base(_) => ClipVisionEncoder::load_with_projection(image_encoder, config)?,
            ImageProjection::Plus(_) => ClipVisionEncoder::load(image_encoder, config)?,
        };
        Ok(Self { processor, encoder, projection, placement: adapter.placement().clone() })
    }

    /// Tokens of one picture.
    pub fn num_tokens(&self) -> usize {
        match &self.projection {
            ImageProjection::Base(_) => BASE_TOKENS,
            ImageProjection::Plus(resampler) => resampler.num_queries,
        }
    }

    /// Bytes that encoding needs at its peak beside the tokens: one picture is encoded at a time.
    pub fn encode_bytes(&self) -> usize {
        self.encoder.config().forward_bytes(self.placement.compute_dtype)
    }

    /// `[1, num_tokens, text_dim]` of `pixel_values [1, 3, image_size, image_size]`.
    fn tokens(&self, pixel_values: &Tensor) -> Result<Tensor> {
        match &self.projection {
            ImageProjection::Base(projection) => projection.forward(&self.encoder.image_embeds(pixel_values)?),
            ImageProjection::Plus(resampler) => resampler.forward(&self.encoder.penultimate(pixel_values)?),
        }
    }

    /// What the negative branch sees instead of a picture: for a base adapter an embedding of zeros, for a plus adapter
    /// what the encoder makes of pixels that are zero.
    fn no_picture(&self) -> Result<Tensor> {
        let (config, Placement { device, compute_dtype, .. }) = (self.encoder.config(), &self.placement);
        match &self.projection {
            ImageProjection::Base(projection) => {
                let embeds = Tensor::zeros((1, config.projection_dim), *compute_dtype, device)?;
                projection.forward(&embeds)
            }
            ImageProjection::Plus(_) => {
                let shape = (1, 3, config.image_size, config.image_size);
                self.tokens(&Tensor::zeros(shape, DType::F32, device)?)
            }
        }
    }
}

impl IpAdapter {
    /// Calls of [`IpAdapter::encode_next`] for so many images; `guided`: with a negative branch.
    pub fn num_encode_steps(images: usize, guided: bool) -> usize {
        images + usize::from(guided)
    }

    /// The tokens of the next image, then what stands for the images in the negative branch; all tokens once that is done.
    ///
    /// The images, one after the other, are more to look at; their order is nothing to the UNet.
    pub fn encode_next(&self, encoding: &mut ReferenceEncoding) -> Result<Option<ReferenceTokens>> {
        let ReferenceEncoding { images, guided, tokens } = encoding;
        let mut negative = None;
        match images.get(tokens.len()) {
            Some(image) => {
                tokens.push(self.tokens(&self.processor.pixel_values(image, &self.placement.device)?)?);
                if tokens.len() < images.len() || *guided {
                    return Ok(None);
                }
            }
            None => negative = Some(self.no_picture()?.repeat((1, images.len(), 1))?),
        }
        Ok(Some(ReferenceTokens { positive: Tensor::cat(tokens, 1)?, negative }))
    }
}

/// Reference images on their way to tokens.
#[derive(Debug)]
pub struct ReferenceEncoding {
    images: Vec<Arc<Frame>>,
    guided: bool,
    /// Of the images that are done.
    tokens: Vec<Tensor>,
}

impl ReferenceEncoding {
    /// Nothing is done yet; `guided`: with a negative branch.
    pub fn new(images: Vec<Arc<Frame>>, guided: bool) -> Self {
        Self { images, guided, tokens: Vec::new() }
    }
}

/// What the branches of a session see of its reference images.
#[derive(Debug)]
pub struct ReferenceTokens {
    /// Of the images, one after the other: `[1, tokens, width]`.
    pub positive: Tensor,
    /// What stands for them in the negative branch, in the same shape; a session without guidance has none.
    pub negative: Option<Tensor>,
}

impl ReferenceTokens {
    /// Of the branch with this number: the positive one is first.
    pub fn of_branch(&self, branch: usize) -> &Tensor {
        match branch {
            0 => &self.positive,
            _ => self.negative.as_ref().expect("a guided session encodes its negative branch: this is a bug"),
        }
    }
}

/// From what the encoder says of a picture to tokens.
#[derive(Debug)]
enum ImageProjection {
    Base(BaseProjection),
    Plus(Resampler),
}

impl ImageProjection {
    /// Tells the kinds of adapters apart by their tensors, as diffusers does.
    fn load(weights: &Weights, files: &IpAdapterFiles, encoder: &ClipVisionConfig, text_dim: usize) -> Result<Self> {
        let refuse = |problem: String| Err(Error::checkpoint(&files.adapter, problem));
        let width = |name: &str| weights.shape(name).and_then(|shape| shape.last().copied()).unwrap_or(0);
        let is_plus = weights.contains("latents");
        let (input, field, wanted, found) = match (weights.contains("proj.weight"), is_plus) {
            (true, _) => ("image_embeds", "projection_dim", width("proj.weight"), encoder.projection_dim),
            (_, true) => ("hidden states", "hidden_size", width("proj_in.weight"), encoder.hidden_size),
            _ => {
                return refuse(
                    "is neither a base nor a plus adapter; full-face and FaceID ones are not supported".into(),
                );
            }
        };
        if wanted != found {
            let encoder = files.image_encoder.display();
            return refuse(format!(
                "takes {input} of {wanted} values, but {field} of the image encoder in {encoder} is {found}; \
                 `image_encoder` says where the right one is"
            ));
        }
        let output = if is_plus { width("norm_out.weight") } else { width("norm.weight") };
        if output != text_dim {
            return refuse(format!(
                "makes tokens of {output} values, but cross_attention_dim of the UNet is {text_dim}"
            ));
        }
        Ok(match is_plus {
            true => Self::Plus(Resampler::load(weights, encoder.hidden_size, text_dim)?),
            false => Self::Base(BaseProjection::load(weights, encoder.projection_dim, text_dim)?),
        })
    }
}

/// `ImageProjection`: one vector to a few tokens.
#[derive(Debug)]
struct BaseProjection {
    proj: Linear,
    norm: LayerNorm,
    text_dim: usize,
}

impl BaseProjection {
    fn load(weights: &Weights, embed_dim: usize, text_dim: usize) -> Result<Self> {
        Ok(Self {
            proj: Linear::load(&weights.pp("proj"), embed_dim, BASE_TOKENS * text_dim)?,
            norm: LayerNorm::load(&weights.pp("norm"), text_dim, NORM_EPS)?,
            text_dim,
        })
    }

    /// `image_embeds [1, embed_dim]` to `[1, 4, text_dim]`.
    fn forward(&self, image_embeds: &Tensor) -> Result<Tensor> {
        let tokens = self.proj.forward(image_embeds)?.reshape((1, BASE_TOKENS, self.text_dim))?;
        self.norm.forward(&tokens)
    }
}

/// `IPAdapterPlusImageProjection`: learned queries look at the picture's hidden states and at each other.
#[derive(Debug)]
struct Resampler {
    /// `[1, num_queries, hidden]`.
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<ResamplerLayer>,
    proj_out: Linear,
    norm_out: LayerNorm,
    num_queries: usize,
}

impl Resampler {
    /// Sizes are those of the tensors: an adapter has no configuration.
    fn load(weights: &Weights, embed_dim: usize, text_dim: usize) -> Result<Self> {
        let (num_queries, hidden) = match weights.shape("latents") {
            Some(&[1, num_queries, hidden]) => (num_queries, hidden),
            _ => (0, 0),
        };
        let latents = weights.get(&[1, num_queries, hidden], "latents")?;
        let layers = weights.pp("layers");
        let depth = (0..).take_while(|layer| layers.contains_below(&layer.to_string())).count();
        Ok(Self {
            latents,
            proj_in: Linear::load(&weights.pp("proj_in"), embed_dim, hidden)?,
            layers: (0..depth).map(|layer| ResamplerLayer::load(&layers.pp(layer), hidden)).collect::<Result<_>>()?,
            proj_out: Linear::load(&weights.pp("proj_out"), hidden, text_dim)?,
            norm_out: LayerNorm::load(&weights.pp("norm_out"), text_dim, NORM_EPS)?,
            num_queries,
        })
    }

    /// `hidden_states [1, n, embed_dim]` to `[1, num_queries, text_dim]`.
    fn forward(&self, hidden_states: &Tensor) -> Result<Tensor> {
        let x = self.proj_in.forward(hidden_states)?;
        let latents =
            self.layers.iter().try_fold(self.latents.clone(), |latents, layer| layer.forward(&x, &latents))?;
        self.norm_out.forward(&self.proj_out.forward(&latents)?)
    }
}

/// Attention (`{layer}.0`) and feed-forward network (`{layer}.1`) of a resampler.
#[derive(Debug)]
struct ResamplerLayer {
    /// Of the picture.
    norm1: LayerNorm,
    /// Of the queries.
    norm2: LayerNorm,
    to_q: Linear,
    /// Keys, then values.
    to_kv: Linear,
    to_out: Linear,
    ff_norm: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
    /// Width of all heads together.
    inner: usize,
}

impl ResamplerLayer {
    fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        let (attention, feed_forward) = (weights.pp("0"), weights.pp("1"));
        let rows = |weights: &Weights, name: &str| weights.shape(name).map_or(0, |shape| shape[0]);
        // Whole heads; what is over shows as a wrong shape.
        let inner = rows(&attention, "to_q.weight").next_multiple_of(HEAD_DIM);
        let wide = rows(&feed_forward, "1.weight");
        let norm = |weights: &Weights, name: &str| LayerNorm::load(&weights.pp(name), hidden, NORM_EPS);
        Ok(Self {
            norm1: norm(&attention, "norm1")?,
            norm2: norm(&attention, "norm2")?,
            to_q: Linear::load_no_bias(&attention.pp("to_q"), hidden, inner)?,
            to_kv: Linear::load_no_bias(&attention.pp("to_kv"), hidden, 2 * inner)?,
            to_out: Linear::load_no_bias(&attention.pp("to_out"), inner, hidden)?,
            ff_norm: norm(&feed_forward, "0")?,
            ff_in: Linear::load_no_bias(&feed_forward.pp("1"), hidden, wide)?,
            ff_out: Linear::load_no_bias(&feed_forward.pp("3"), wide, hidden)?,
            inner,
        })
    }

    /// `x [1, n, hidden]`, `latents [1, q, hidden]`: the shape of `latents`.
    fn forward(&self, x: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let latents = (latents + self.attention(&self.norm1.forward(x)?, &self.norm2.forward(latents)?)?)?;
        let inner = gelu_erf(&self.ff_in.forward(&self.ff_norm.forward(&latents)?)?)?;
        Ok((latents + self.ff_out.forward(&inner)?)?)
    }

    /// The queries look at the picture and at themselves.
    fn attention(&self, x: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let seen = Tensor::cat(&[x, latents], 1)?; // [1, n + q, hidden]
        let kv = self.to_kv.forward(&seen)?; // [1, n + q, 2 * inner]
        let q = heads(&self.to_q.forward(latents)?)?;
        let k = heads(&kv.narrow(2, 0, self.inner)?.contiguous()?)?;
        let v = heads(&kv.narrow(2, self.inner, self.inner)?.contiguous()?)?;
        let y = attention(&q, &k, &v, &AttentionOptions::default())?; // [1, q, heads, 64]
        self.to_out.forward(&y.flatten_from(2)?)
    }
}

/// `[1, n, inner]` to `[1, n, heads, 64]`.
fn heads(x: &Tensor) -> Result<Tensor> {
    let (b, n, inner) = x.dims3()?;
    Ok(x.reshape((b, n, inner / HEAD_DIM, HEAD_DIM))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files, beside an image encoder's folder.
    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(dir.path().join(IMAGE_ENCODER)).expect("a folder");
        files.iter().for_each(|file| std::fs::write(dir.path().join(file), b"").expect("a file"));
        dir
    }

    #[test]
    fn a_folder_with_one_adapter_is_that_adapter() {
        let dir = folder(&["ip-adapter_sdxl.safetensors", "ip-adapter_sdxl.bin", "README.md"]);
        let found = IpAdapterFiles::find(dir.path(), None).expect("one adapter");
        assert_eq!(found.adapter, dir.path().join("ip-adapter_sdxl.safetensors"));
        assert_eq!(found.image_encoder, dir.path().join("image_encoder"));
        let elsewhere = folder(&[]);
        let found = IpAdapterFiles::find(&found.adapter, Some(elsewhere.path())).expect("a file and a folder");
        assert_eq!(found.image_encoder, elsewhere.path());
    }

    #[test]
    fn what_is_no_adapter_is_refused_with_the_way_out() {
        let check = |files: &[&str], path: &str, image_encoder: Option<&str>, expected: &str| {
            let dir = folder(files);
            let image_encoder = image_encoder.map(|name| dir.path().join(name));
            let error = IpAdapterFiles::find(&dir.path().join(path), image_encoder.as_deref()).expect_err("is refused");
            assert!(error.to_string().contains(expected), "expected `{expected}` in: {error}");
        };
        check(&[], "", None, "holds no adapter");
        check(
            &["a.bin"],
            "",
            None,
            "a.bin: is a pickle, which can run code when read; take the adapter's .safetensors",
        );
        check(&["a.bin"], "a.bin", None, "pickles can run code");
        check(
            &["b.safetensors", "a.safetensors"],
            "",
            None,
            "name the file of one of them: a.safetensors, b.safetensors",
        );
        check(&["a.safetensors"], "", Some("nowhere"), "nowhere: the adapter's image encoder is missing");
    }
}
