//! The transformer of HunyuanVideo: noisy latents and text to a predicted flow, video and text tokens first in two streams,
//! then in one.
//!
//! Owns: the network, its patches, its rotations. Does not know: checkpoints, requests, the denoising loop. Shapes: `n`
//! rows, `lv` video tokens, `lt` text tokens, `l = lv + lt` in this order, of which the last ones may be padding.
//! Source: diffusers `models/transformers/transformer_hunyuan_video.py`.

use candle_core::{DType, Device, Tensor};
use tale_kernels::{cat, gated_sum, gelu_tanh, silu};

use super::config::{HunyuanVideoConfig, TIME_CHANNELS};
use super::refiner::TokenRefiner;
use crate::error::Result;
use crate::layers::Linear;
use crate::layers::joint::{ADDED, FeedForward, Modulation, OWN, Projections, Rotations, joint_attention, modulated};
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::runner::diffusion::block_cache::{Blocks, RowCache, select, through_blocks};
use crate::weights::Weights;

/// What an embedded guidance scale is multiplied with.
const GUIDANCE_UNIT: f64 = 1000.0;

/// What the transformer sees in one pass over `n` rows.
pub struct HunyuanVideoInput<'a> {
    /// f32 `[n, in_channels, frames, height, width]`.
    pub latents: &'a Tensor,
    /// 0..1000, one per row.
    pub timesteps: &'a [f32],
    /// `[n, lt, text_embed_dim]` in the compute dtype.
    pub text: &'a Tensor,
    /// How many of them, from the front, are not padding, one per row; at least 1.
    pub text_lens: &'a [usize],
    /// `[n, pooled_projection_dim]` in the compute dtype.
    pub pooled: &'a Tensor,
    /// One per row; read where the model embeds it.
    pub guidance_scales: &'a [f32],
    /// Whether the first frame is a picture, whose tokens have no noise (`token_replace`).
    pub first_is_clean: bool,
    /// Of all tokens: [`HunyuanVideoTransformer::rotations`].
    pub rotations: &'a Rotations,
}

/// `HunyuanVideoTransformer3DModel`.
pub struct HunyuanVideoTransformer {
    x_embedder: PatchEmbedding,
    context_embedder: TokenRefiner,
    time_text_embed: TimeTextEmbed,
    transformer_blocks: Vec<DualBlock>,
    single_transformer_blocks: Vec<SingleBlock>,
    norm_out: Modulation<2>,
    proj_out: Linear,
    compute_dtype: DType,
    device: Device,
    config: HunyuanVideoConfig,
}

impl HunyuanVideoTransformer {
    /// Tensors as diffusers names them.
    pub fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let dim = config.dim();
        let (dual, single) = (weights.pp("transformer_blocks"), weights.pp("single_transformer_blocks"));
        let mut transformer_blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            transformer_blocks.push(DualBlock::load(&dual.pp(layer), config)?);
        }
        let mut single_transformer_blocks = Vec::with_capacity(config.num_single_layers);
        for layer in 0..config.num_single_layers {
            single_transformer_blocks.push(SingleBlock::load(&single.pp(layer), config)?);
        }
        let patch_values = config.patch_size_t * config.patch_size * config.patch_size * config.predicted_channels();
        Ok(Self {
            x_embedder: PatchEmbedding::load(&weights.pp("x_embedder"), config)?,
            context_embedder: TokenRefiner::load(&weights.pp("context_embedder"), config)?,
            time_text_embed: TimeTextEmbed::load(&weights.pp("time_text_embed"), config)?,
            transformer_blocks,
            single_transformer_blocks,
            norm_out: Modulation::load(&weights.pp("norm_out"), dim)?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim, patch_values)?,
            compute_dtype: weights.placement().compute_dtype,
            device: weights.placement().device.clone(),
            config: config.clone(),
        })
    }

    /// Where it computes.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// By how much tokens are turned, of latents of so many frames, rows and columns before so many tokens of text. The same in
    /// all steps.
    pub fn rotations(&self, latents: [usize; 3], text_len: usize) -> Result<Rotations> {
        rotations(&self.config, self.grid(latents), text_len, &self.device)
    }

    fn grid(&self, [frames, height, width]: [usize; 3]) -> [usize; 3] {
        let patch = self.config.patch_size;
        [frames / self.config.patch_size_t, height / patch, width / patch]
    }

    /// The predicted flow, f32 `[n, out_channels, frames, height, width]`.
    pub fn forward(&self, input: &HunyuanVideoInput<'_>) -> Result<Tensor> {
        self.forward_through(input, None)
    }

    /// As [`HunyuanVideoTransformer::forward`], where the rows that their caches answer skip blocks.
    pub fn forward_cached(&self, input: &HunyuanVideoInput<'_>, caches: &mut [RowCache<'_>]) -> Result<Tensor> {
        self.forward_through(input, Some(caches))
    }

    fn forward_through(&self, input: &HunyuanVideoInput<'_>, caches: Option<&mut [RowCache<'_>]>) -> Result<Tensor> {
        let (_, _, frames, height, width) = input.latents.dims5()?;
        let grid = self.grid([frames, height, width]);
        let (video_len, text_len) = (grid.iter().product::<usize>(), input.text.dim(1)?);
        let key_lens: Vec<usize> = input.text_lens.iter().map(|len| video_len + len).collect();
        let told = Told {
            conditions: self.time_text_embed.forward(input, grid[1] * grid[2])?,
            rotations: input.rotations,
            key_lens: key_lens.iter().any(|len| *len < video_len + text_len).then_some(key_lens),
        };
        let video = self.x_embedder.forward(&input.latents.to_dtype(self.compute_dtype)?)?; // [n, lv, dim]
        let text = self.context_embedder.forward(input.text, input.text_lens, input.timesteps)?; // [n, lt, dim]
        let video = match caches {
            None => self.blocks_from(0, video, text, &told)?,
            Some(caches) => through_blocks(caches, Streams { network: self, first: 0, video, text, told: &told })?,
        };
        // The last norm alone has its scale before its shift.
        let [scale, shift] = self.norm_out.forward(&told.conditions.all)?;
        let flow = self.proj_out.forward(&modulated(&video, &shift, &scale)?)?.to_dtype(DType::F32)?;
        self.unpatchify(&flow, grid)
    }

    /// `video [n, lv, dim]` and `text [n, lt, dim]` through the dual blocks from number `first` on and all single ones: the
    /// video.
    fn blocks_from(&self, first: usize, mut video: Tensor, mut text: Tensor, told: &Told<'_>) -> Result<Tensor> {
        for block in &self.transformer_blocks[first..] {
            (video, text) = block.forward(&video, &text, told)?;
        }
        let video_len = video.dim(1)?;
        let mut joint = Tensor::cat(&[video, text], 1)?; // [n, l, dim]
        for block in &self.single_transformer_blocks {
            joint = block.forward(&joint, told)?;
        }
        Ok(joint.narrow(1, 0, video_len)?.contiguous()?)
    }

    /// `[n, lv, channels * patch_size_t * patch_size * patch_size]` to `[n, channels, frames, height, width]`.
    fn unpatchify(&self, x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
        let (n, channels) = (x.dim(0)?, self.config.predicted_channels());
        let (patch, patch_t) = (self.config.patch_size, self.config.patch_size_t);
        let x = x.reshape(vec![n, frames, rows, columns, channels, patch_t, patch, patch])?;
        let x = x.permute(vec![0, 4, 1, 5, 2, 6, 3, 7])?.contiguous()?; // [n, channels, frames, pt, rows, p, columns, p]
        Ok(x.reshape((n, channels, frames * patch_t, rows * patch, columns * patch))?)
    }
}

/// What all blocks are told beside the streams of tokens.
struct Told<'a> {
    conditions: Conditions,
    /// Of all tokens; text tokens are not turned.
    rotations: &'a Rotations,
    /// Tokens of each row that are looked at, where they are not all.
    key_lens: Option<Vec<usize>>,
}

/// Tokens of some rows before the dual blocks from number `first` on.
struct Streams<'a> {
    network: &'a HunyuanVideoTransformer,
    first: usize,
    video: Tensor,
    text: Tensor,
    told: &'a Told<'a>,
}

impl Blocks for Streams<'_> {
    fn entered(&self) -> &Tensor {
        &self.video
    }

    /// The video as the first block sees it (TeaCache4HunyuanVideo).
    fn signal(&self) -> Result<Tensor> {
        let norm = &self.network.transformer_blocks[0].video.norm1;
        Modulated::of_video(norm, &self.told.conditions)?.normed(&self.video, 0, 1)
    }

    fn pass_first(&mut self) -> Result<Tensor> {
        let first = &self.network.transformer_blocks[0];
        (self.video, self.text) = first.forward(&self.video, &self.text, self.told)?;
        self.first = 1;
        Ok(self.video.clone())
    }

    fn pass_rest(self, rows: &[usize]) -> Result<Tensor> {
        let (video, text) = (select(&self.video, rows)?, select(&self.text, rows)?);
        self.network.blocks_from(self.first, video, text, &self.told.of_rows(rows)?)
    }
}

/// What tokens are modulated by.
struct Conditions {
    /// `[n, dim]`, activated.
    all: Tensor,
    /// Of the tokens of a first frame without noise.
    first: Option<FirstFrame>,
}

struct FirstFrame {
    num_tokens: usize,
    /// `[n, dim]`, activated.
    condition: Tensor,
}

/// Shifts, scales and gates of a block, each `[n, 1, dim]`, for all tokens but those of a first frame without noise.
struct Modulated<const N: usize> {
    all: [Tensor; N],
    /// How many tokens have which other ones.
    first: Option<(usize, [Tensor; N])>,
}

impl<const N: usize> Modulated<N> {
    fn of_text(modulation: &Modulation<N>, conditions: &Conditions) -> Result<Self> {
        Ok(Self { all: modulation.forward(&conditions.all)?, first: None })
    }

    fn of_video(modulation: &Modulation<N>, conditions: &Conditions) -> Result<Self> {
        let first = conditions.first.as_ref().map(|FirstFrame { num_tokens, condition }| -> Result<_> {
            Ok((*num_tokens, modulation.forward(condition)?))
        });
        Ok(Self { first: first.transpose()?, ..Self::of_text(modulation, conditions)? })
    }

    /// `norm(x) * (1 + scale) + shift` with the parts of these numbers; `x [n, l, dim]` begins with the first frame.
    fn normed(&self, x: &Tensor, shift: usize, scale: usize) -> Result<Tensor> {
        self.apart(x, |part, parts| modulated(part, &parts[shift], &parts[scale]))
    }

    /// `x + gate * y`; both `[n, l, dim]`.
    fn add(&self, x: &Tensor, gate: usize, y: &Tensor) -> Result<Tensor> {
        match &self.first {
            None => Ok(gated_sum(x, &self.all[gate], y)?),
            Some((num_tokens, first)) => {
                let [x, y] = [in_two(x, *num_tokens)?, in_two(y, *num_tokens)?];
                let sums = [gated_sum(&x[0], &first[gate], &y[0])?, gated_sum(&x[1], &self.all[gate], &y[1])?];
                Ok(cat(&[&sums[0], &sums[1]], 1)?)
            }
        }
    }

    /// What `of` makes of the tokens of the first frame and of the others, each with their parts.
    fn apart(&self, x: &Tensor, of: impl Fn(&Tensor, &[Tensor; N]) -> Result<Tensor>) -> Result<Tensor> {
        match &self.first {
            None => of(x, &self.all),
            Some((num_tokens, first)) => {
                let [head, tail] = in_two(x, *num_tokens)?;
                Ok(cat(&[&of(&head, first)?, &of(&tail, &self.all)?], 1)?)
            }
        }
    }
}

/// The first tokens of `x [n, l, dim]`, and the others.
fn in_two(x: &Tensor, num_tokens: usize) -> Result<[Tensor; 2]> {
    let others = x.dim(1)? - num_tokens;
    Ok([x.narrow(1, 0, num_tokens)?.contiguous()?, x.narrow(1, num_tokens, others)?.contiguous()?])
}

impl Told<'_> {
    fn attend(&self, qkv: &[Tensor; 3]) -> Result<Tensor> {
        joint_attention(qkv, self.key_lens.as_deref())
    }

    /// The same of some rows.
    fn of_rows(&self, rows: &[usize]) -> Result<Self> {
        let Conditions { all, first } = &self.conditions;
        let first = first.as_ref().map(|FirstFrame { num_tokens, condition }| -> Result<FirstFrame> {
            Ok(FirstFrame { num_tokens: *num_tokens, condition: select(condition, rows)? })
        });
        Ok(Self {
            conditions: Conditions { all: select(all, rows)?, first: first.transpose()? },
            rotations: self.rotations,
            key_lens: self.key_lens.as_ref().map(|lens| rows.iter().map(|row| lens[*row]).collect()),
        })
    }
}

/// Timestep, guidance and pooled text as one vector. Source: `HunyuanVideoConditionEmbedding`.
struct TimeTextEmbed {
    timestep_embedder: ConditionEmbedder,
    guidance_embedder: Option<ConditionEmbedder>,
    text_embedder: ConditionEmbedder,
    compute_dtype: DType,
}

impl TimeTextEmbed {
    fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let dim = config.dim();
        let time = |name: &str| ConditionEmbedder::load(&weights.pp(name), TIME_CHANNELS, dim);
        Ok(Self {
            timestep_embedder: time("timestep_embedder")?,
            guidance_embedder: if config.guidance_embeds { Some(time("guidance_embedder")?) } else { None },
            text_embedder: ConditionEmbedder::load(&weights.pp("text_embedder"), config.pooled_projection_dim, dim)?,
            compute_dtype: weights.placement().compute_dtype,
        })
    }

    /// A first frame without noise has so many tokens.
    fn forward(&self, input: &HunyuanVideoInput<'_>, frame_tokens: usize) -> Result<Conditions> {
        let device = input.latents.device();
        let embedded = |embedder: &ConditionEmbedder, values: &[f32]| {
            embedder.forward(&sinusoidal(values, TIME_CHANNELS, device)?)
        };
        let pooled = self.text_embedder.forward(input.pooled)?;
        let mut condition = embedded(&self.timestep_embedder, input.timesteps)?;
        if let Some(embedder) = &self.guidance_embedder {
            condition = (condition + embedded(embedder, &self.guidance(input.guidance_scales)?)?)?;
        }
        let clean = || -> Result<FirstFrame> {
            // It is told of no guidance either.
            let time = embedded(&self.timestep_embedder, &vec![0.0; input.timesteps.len()])?;
            Ok(FirstFrame { num_tokens: frame_tokens, condition: silu(&(time + &pooled)?)? })
        };
        let first = input.first_is_clean.then(clean).transpose()?;
        Ok(Conditions { all: silu(&(condition + &pooled)?)?, first })
    }

    /// As the pipeline makes it: in the transformer's dtype, where 6 becomes 6016 in bf16.
    fn guidance(&self, scales: &[f32]) -> Result<Vec<f32>> {
        let scales = Tensor::new(scales, &Device::Cpu)?.to_dtype(self.compute_dtype)?;
        Ok((scales * GUIDANCE_UNIT)?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

/// A convolution whose stride is its kernel, which is a matrix product over patches.
struct PatchEmbedding {
    linear: Linear,
    patch_size: usize,
    patch_size_t: usize,
}

impl PatchEmbedding {
    fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let weights = weights.pp("proj");
        let (dim, channels) = (config.dim(), config.in_channels);
        let (patch_size, patch_size_t) = (config.patch_size, config.patch_size_t);
        let kernel = weights.get(&[dim, channels, patch_size_t, patch_size, patch_size], "weight")?;
        let matrix = kernel.reshape((dim, channels * patch_size_t * patch_size * patch_size))?;
        Ok(Self { linear: Linear::new(matrix, Some(weights.get(&[dim], "bias")?)), patch_size, patch_size_t })
    }

    /// `[n, channels, frames, height, width]` to `[n, lv, dim]`, tokens in the order frame, row, column.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (n, channels, frames, height, width) = x.dims5()?;
        let (p, pt) = (self.patch_size, self.patch_size_t);
        let (frames, rows, columns) = (frames / pt, height / p, width / p);
        let x = x.reshape(vec![n, channels, frames, pt, rows, p, columns, p])?;
        let x = x.permute(vec![0, 2, 4, 6, 1, 3, 5, 7])?.contiguous()?; // [n, frames, rows, columns, channels, pt, p, p]
        self.linear.forward(&x.reshape((n, frames * rows * columns, channels * pt * p * p))?)
    }
}

/// Rotations of the tokens of a grid of frames, rows and columns, three axes side by side; text tokens behind them are not
/// turned. Frequencies and angles are rounded to f32, as in the reference (`get_1d_rotary_pos_embed`).
fn rotations(config: &HunyuanVideoConfig, grid: [usize; 3], text_len: usize, device: &Device) -> Result<Rotations> {
    let theta = config.rope_theta as f32;
    let half = config.attention_head_dim / 2;
    // Of each axis and position, one angle per pair of values that turns together.
    let angles = [0, 1, 2].map(|axis| {
        let dim = config.rope_axes_dim[axis];
        let frequencies: Vec<f32> = (0..dim / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / dim as f32)).collect();
        let at = |position: usize| frequencies.iter().map(|frequency| position as f32 * frequency).collect();
        (0..grid[axis]).map(at).collect::<Vec<Vec<f32>>>()
    });
    let table = |function: fn(f64) -> f64, of_text: f32| {
        let values = angles.each_ref().map(|axis| {
            let rounded = |angle: &f32| function(f64::from(*angle)) as f32;
            axis.iter().map(|position| position.iter().map(rounded).collect()).collect::<Vec<Vec<f32>>>()
        });
        let [frames, rows, columns] = &values;
        let length = grid.iter().product::<usize>() + text_len;
        let mut all = Vec::with_capacity(length * half);
        for frame in frames {
            for row in rows {
                for column in columns {
                    [frame, row, column].into_iter().for_each(|part| all.extend_from_slice(part));
                }
            }
        }
        all.resize(length * half, of_text);
        Tensor::from_vec(all, (length, half), device)
    };
    Ok(Rotations { cos: table(f64::cos, 1.0)?, sin: table(f64::sin, 0.0)? })
}

/// One stream's half of a dual block, around the attention that both share.
struct Stream {
    norm1: Modulation<6>,
    projections: Projections,
    to_out: Linear,
    ff: FeedForward,
}

impl Stream {
    /// `x + gate * attended`, then the feed-forward. The parts of the modulation are shift, scale and gate of the attention,
    /// then of the feed-forward.
    fn after_attention(&self, x: &Tensor, attended: &Tensor, modulation: &Modulated<6>) -> Result<Tensor> {
        let x = modulation.add(x, 2, &self.to_out.forward(&attended.contiguous()?)?)?;
        let y = self.ff.forward(&modulation.normed(&x, 3, 4)?)?;
        modulation.add(&x, 5, &y)
    }
}

/// Video and text with their own weights, one attention.
struct DualBlock {
    video: Stream,
    text: Stream,
}

impl DualBlock {
    fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let (dim, inner) = (config.dim(), config.inner());
        let attn = weights.pp("attn");
        let projections =
            |names| Projections::load(&attn, config.num_attention_heads, config.attention_head_dim, names);
        let video = Stream {
            norm1: Modulation::load(&weights.pp("norm1"), dim)?,
            projections: projections(OWN)?,
            to_out: Linear::load(&attn.pp("to_out.0"), dim, dim)?,
            ff: FeedForward::load(&weights.pp("ff"), dim, inner)?,
        };
        let text = Stream {
            norm1: Modulation::load(&weights.pp("norm1_context"), dim)?,
            projections: projections(ADDED)?,
            to_out: Linear::load(&attn.pp("to_add_out"), dim, dim)?,
            ff: FeedForward::load(&weights.pp("ff_context"), dim, inner)?,
        };
        Ok(Self { video, text })
    }

    /// `video [n, lv, dim]` and `text [n, lt, dim]` to the same.
    fn forward(&self, video: &Tensor, text: &Tensor, told: &Told<'_>) -> Result<(Tensor, Tensor)> {
        let (video_len, text_len) = (video.dim(1)?, text.dim(1)?);
        let of_video = Modulated::of_video(&self.video.norm1, &told.conditions)?;
        let of_text = Modulated::of_text(&self.text.norm1, &told.conditions)?;
        let attended = {
            let turned = told.rotations.narrow(0, video_len)?;
            let video = self.video.projections.forward(&of_video.normed(video, 0, 1)?, &turned)?;
            let unturned = told.rotations.narrow(video_len, text_len)?;
            let text = self.text.projections.forward(&of_text.normed(text, 0, 1)?, &unturned)?;
            let joint = |i: usize| Tensor::cat(&[&video[i], &text[i]], 1); // [n, l, heads, head_dim]
            told.attend(&[joint(0)?, joint(1)?, joint(2)?])?
        };
        let video = self.video.after_attention(video, &attended.narrow(1, 0, video_len)?, &of_video)?;
        let text = self.text.after_attention(text, &attended.narrow(1, video_len, text_len)?, &of_text)?;
        Ok((video, text))
    }
}

/// All tokens in one stream; attention and feed-forward side by side.
struct SingleBlock {
    norm: Modulation<3>,
    projections: Projections,
    proj_mlp: Linear,
    proj_out: Linear,
}

impl SingleBlock {
    fn load(weights: &Weights, config: &HunyuanVideoConfig) -> Result<Self> {
        let (dim, inner) = (config.dim(), config.inner());
        let (heads, head_dim) = (config.num_attention_heads, config.attention_head_dim);
        Ok(Self {
            norm: Modulation::load(&weights.pp("norm"), dim)?,
            projections: Projections::load(&weights.pp("attn"), heads, head_dim, OWN)?,
            proj_mlp: Linear::load(&weights.pp("proj_mlp"), dim, inner)?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim + inner, dim)?,
        })
    }

    /// `x [n, l, dim]` to the same; the parts of the modulation are shift, scale and gate.
    fn forward(&self, x: &Tensor, told: &Told<'_>) -> Result<Tensor> {
        let modulation = Modulated::of_video(&self.norm, &told.conditions)?;
        let normed = modulation.normed(x, 0, 1)?;
        let attended = told.attend(&self.projections.forward(&normed, told.rotations)?)?;
        let inner = gelu_tanh(&self.proj_mlp.forward(&normed)?)?;
        modulation.add(x, 2, &self.proj_out.forward(&Tensor::cat(&[attended, inner], 2)?)?)
    }
}
