//! The transformer of Wan2.1: noisy latents, text and what a vision encoder says of pictures to a predicted flow.
//!
//! Owns: the network, its patches, its rotations. Does not know: checkpoints, requests, the denoising loop.
//! Source: diffusers `models/transformers/transformer_wan.py`.

use candle_core::{DType, Device, Tensor};
use tale_kernels::{
    AttentionOptions, RopeLayout, attention, gated_sum, gelu_erf, gelu_tanh, modulated_layer_norm, silu,
};

use super::WanConfig;
use crate::error::Result;
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::layers::{LayerNorm, Linear, RmsNorm, Table};
use crate::lora::LayerShape;
use crate::runner::diffusion::block_cache::{Blocks, RowCache, select, through_blocks};
use crate::weights::Weights;

/// Base of the rotary frequencies.
const ROPE_THETA: f64 = 10_000.0;
/// Of the norms around what the vision encoder says: the default of torch.
const IMAGE_NORM_EPS: f64 = 1e-5;

/// What the transformer sees in one pass over `n` rows.
pub struct WanInput<'a> {
    /// f32 `[n, in_channels, frames, height, width]`: the latents, and behind their channels the mask and the latents of
    /// pictures where there are any.
    pub latents: &'a Tensor,
    /// 0..1000, one per row.
    pub timesteps: &'a [f32],
    /// `[n, s, text_dim]` in the compute dtype.
    pub text: &'a Tensor,
    /// `[n, t, image_dim]` in the compute dtype: the vision encoder's hidden states, of two pictures behind each other.
    pub image: Option<&'a Tensor>,
    /// Of all tokens: [`WanTransformer::rope`].
    pub rope: &'a Rope,
}

/// `WanTransformer3DModel`.
pub struct WanTransformer {
    patch_embedding: PatchEmbedding,
    time_embedder: ConditionEmbedder,
    time_proj: Linear,
    /// The same two layers as for time, with a GELU between them.
    text_embedder: [Linear; 2],
    image_embedder: Option<ImageEmbedder>,
    blocks: Vec<Block>,
    /// `[1, 2, dim]`: shift and scale of the last norm.
    scale_shift_table: Table,
    proj_out: Linear,
    compute_dtype: DType,
    /// Bytes that the largest of its quantised matrices takes for a moment.
    dequantised_bytes: usize,
    config: WanConfig,
}

impl WanTransformer {
    /// Tensors as diffusers names them.
    pub fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let dim = config.dim();
        let condition = weights.pp("condition_embedder");
        let text = condition.pp("text_embedder");
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            blocks.push(Block::load(&weights.pp("blocks").pp(layer), config)?);
        }
        let patch_values = config.out_channels * config.patch_size.iter().product::<usize>();
        Ok(Self {
            patch_embedding: PatchEmbedding::load(&weights.pp("patch_embedding"), config)?,
            time_embedder: ConditionEmbedder::load(&condition.pp("time_embedder"), config.freq_dim, dim)?,
            time_proj: Linear::load(&condition.pp("time_proj"), dim, 6 * dim)?,
            text_embedder: [
                Linear::load(&text.pp("linear_1"), config.text_dim, dim)?,
                Linear::load(&text.pp("linear_2"), dim, dim)?,
            ],
            image_embedder: match config.image_dim {
                Some(image_dim) => Some(ImageEmbedder::load(&condition.pp("image_embedder"), config, image_dim)?),
                None => None,
            },
            blocks,
            scale_shift_table: Table::load(weights, [1, 2, dim], "scale_shift_table")?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim, patch_values)?,
            compute_dtype: weights.placement().compute_dtype,
            dequantised_bytes: weights.dequantised_bytes(),
            config: config.clone(),
        })
    }

    /// Most bytes that a forward pass takes for a moment to multiply with a quantised matrix.
    pub(super) fn dequantised_bytes(&self) -> usize {
        self.dequantised_bytes
    }

    /// The rotations of latents of so many frames, rows and columns, the same in all steps.
    pub fn rope(&self, latents: [usize; 3]) -> Result<Rope> {
        Rope::new(self.grid(latents), self.config.attention_head_dim, self.device())
    }

    fn grid(&self, [frames, height, width]: [usize; 3]) -> [usize; 3] {
        let [_, patch_height, patch_width] = self.config.patch_size;
        [frames, height / patch_height, width / patch_width]
    }

    /// The predicted flow, f32 `[n, out_channels, frames, height, width]`.
    pub fn forward(&self, input: &WanInput<'_>) -> Result<Tensor> {
        self.forward_through(input, None)
    }

    /// As [`WanTransformer::forward`], where the rows that their caches answer skip blocks.
    pub fn forward_cached(&self, input: &WanInput<'_>, caches: &mut [RowCache<'_>]) -> Result<Tensor> {
        self.forward_through(input, Some(caches))
    }

    fn forward_through(&self, input: &WanInput<'_>, caches: Option<&mut [RowCache<'_>]>) -> Result<Tensor> {
        let (n, _, frames, height, width) = input.latents.dims5()?;
        let (grid, rope) = (self.grid([frames, height, width]), input.rope);
        let time = sinusoidal(input.timesteps, self.config.freq_dim, self.device())?;
        let time = self.time_embedder.forward(&time)?; // [n, dim]
        let told = Told {
            text: self.embedded_text(input.text)?,
            image: self.embedded_image(input.image)?,
            modulation: self.time_proj.forward(&silu(&time)?)?.reshape((n, 6, ()))?,
        };
        let x = self.patch_embedding.forward(&input.latents.to_dtype(self.compute_dtype)?)?; // [n, l, dim]
        let x = match caches {
            None => all_through(&self.blocks, x, &told, rope)?,
            Some(caches) => through_blocks(caches, Stream { blocks: &self.blocks, x, told: &told, rope })?,
        };
        let last = self.scale_shift_table.values()?.broadcast_add(&time.unsqueeze(1)?)?; // [n, 2, dim]
        let x = modulated_layer_norm(&x, &last.narrow(1, 0, 1)?, &last.narrow(1, 1, 1)?, self.config.eps)?;
        self.unpatchify(&self.proj_out.forward(&x)?.to_dtype(DType::F32)?, grid)
    }

    /// `[n, s, text_dim]` to `[n, s, dim]`.
    fn embedded_text(&self, text: &Tensor) -> Result<Tensor> {
        let [text_1, text_2] = &self.text_embedder;
        text_2.forward(&gelu_tanh(&text_1.forward(text)?)?)
    }

    /// `[n, t, image_dim]` to `[n, t, dim]`; `None` for a network without pictures.
    fn embedded_image(&self, image: Option<&Tensor>) -> Result<Option<Tensor>> {
        let embedder = self.image_embedder.as_ref().zip(image);
        embedder.map(|(embedder, image)| embedder.forward(image)).transpose()
    }

    /// `[n, l, patch_height * patch_width * channels]` to `[n, channels, frames, height, width]`.
    fn unpatchify(&self, x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
        let (n, [_, ph, pw], channels) = (x.dim(0)?, self.config.patch_size, self.config.out_channels);
        let x = x.reshape(vec![n, frames, rows, columns, ph, pw, channels])?;
        let x = x.permute(vec![0, 6, 1, 2, 4, 3, 5])?.contiguous()?; // [n, channels, frames, rows, ph, columns, pw]
        Ok(x.reshape((n, channels, frames, rows * ph, columns * pw))?)
    }

    /// Where it computes.
    pub(super) fn device(&self) -> &Device {
        self.scale_shift_table.device()
    }
}

/// What all blocks are told beside the stream of tokens.
struct Told {
    /// `[n, s, dim]`
    text: Tensor,
    /// `[n, t, dim]`
    image: Option<Tensor>,
    /// `[n, 6, dim]`
    modulation: Tensor,
}

impl Told {
    /// The same of some rows.
    fn of_rows(&self, rows: &[usize]) -> Result<Self> {
        Ok(Self {
            text: select(&self.text, rows)?,
            image: self.image.as_ref().map(|image| select(image, rows)).transpose()?,
            modulation: select(&self.modulation, rows)?,
        })
    }
}

/// `x [n, l, dim]` through these blocks.
fn all_through(blocks: &[Block], x: Tensor, told: &Told, rope: &Rope) -> Result<Tensor> {
    blocks.iter().try_fold(x, |x, block| block.forward(&x, told, rope))
}

/// Tokens of some rows before the blocks that are ahead of them.
struct Stream<'a> {
    blocks: &'a [Block],
    x: Tensor,
    told: &'a Told,
    rope: &'a Rope,
}

impl Blocks for Stream<'_> {
    fn entered(&self) -> &Tensor {
        &self.x
    }

    /// The modulation of all blocks, that is the timestep (TeaCache4Wan2.1 with `use_ret_steps`).
    fn signal(&self) -> Result<Tensor> {
        Ok(self.told.modulation.clone())
    }

    fn pass_first(&mut self) -> Result<Tensor> {
        let (first, others) = self.blocks.split_first().expect("models of one block are refused: this is a bug");
        self.x = first.forward(&self.x, self.told, self.rope)?;
        self.blocks = others;
        Ok(self.x.clone())
    }

    fn pass_rest(self, rows: &[usize]) -> Result<Tensor> {
        all_through(self.blocks, select(&self.x, rows)?, &self.told.of_rows(rows)?, self.rope)
    }
}

/// What a vision encoder says of pictures, as wide as the stream. Source: `WanImageEmbedding`.
struct ImageEmbedder {
    /// `[1, t, image_dim]`, of the two pictures of a first-last-frame model.
    positions: Option<Tensor>,
    norm1: LayerNorm,
    /// With a GELU between them.
    layers: [Linear; 2],
    norm2: LayerNorm,
}

impl ImageEmbedder {
    fn load(weights: &Weights, config: &WanConfig, image_dim: usize) -> Result<Self> {
        let (dim, net) = (config.dim(), weights.pp("ff").pp("net"));
        let positions = config.pos_embed_seq_len.map(|length| weights.get(&[1, length, image_dim], "pos_embed"));
        Ok(Self {
            positions: positions.transpose()?,
            norm1: LayerNorm::load(&weights.pp("norm1"), image_dim, IMAGE_NORM_EPS)?,
            layers: [
                Linear::load(&net.pp(0).pp("proj"), image_dim, image_dim)?,
                Linear::load(&net.pp(2), image_dim, dim)?,
            ],
            norm2: LayerNorm::load(&weights.pp("norm2"), dim, IMAGE_NORM_EPS)?,
        })
    }

    /// `[n, t, image_dim]` to `[n, t, dim]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.positions {
            Some(positions) => x.broadcast_add(positions)?,
            None => x.clone(),
        };
        let [first, second] = &self.layers;
        let x = gelu_erf(&first.forward(&self.norm1.forward(&x)?)?)?;
        self.norm2.forward(&second.forward(&x)?)
    }
}

/// A convolution whose stride is its kernel, which is a matrix product over patches.
struct PatchEmbedding {
    linear: Linear,
    patch_size: [usize; 3],
}

impl PatchEmbedding {
    fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let (dim, channels, [pt, ph, pw]) = (config.dim(), config.in_channels, config.patch_size);
        let kernel = weights.get(&[dim, channels, pt, ph, pw], "weight")?;
        let shape = LayerShape::Patches {
            channels,
            bare_channels: config.out_channels,
            patch: config.patch_size,
            out_features: dim,
        };
        let (kernel, bias) = (kernel.reshape((dim, channels * pt * ph * pw))?, weights.get(&[dim], "bias")?);
        let linear = Linear::reached(kernel, Some(bias), weights, shape);
        Ok(Self { linear, patch_size: config.patch_size })
    }

    /// `[n, channels, frames, height, width]` to `[n, l, dim]`, tokens in the order frame, row, column.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let ((n, channels, frames, height, width), [_, ph, pw]) = (x.dims5()?, self.patch_size);
        let (rows, columns) = (height / ph, width / pw);
        let x = x.reshape(vec![n, channels, frames, rows, ph, columns, pw])?;
        let x = x.permute(vec![0, 2, 3, 5, 1, 4, 6])?.contiguous()?; // [n, frames, rows, columns, channels, ph, pw]
        self.linear.forward(&x.reshape((n, frames * rows * columns, channels * ph * pw))?)
    }
}

/// Rotations of the tokens of a grid; a third of each head turns with time, height and width.
#[derive(Debug)]
pub struct Rope {
    /// f32 `[l, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// `grid` is frames, rows, columns. Angles in f64, as in the reference.
    fn new(grid: [usize; 3], head_dim: usize, device: &Device) -> Result<Self> {
        let side = 2 * (head_dim / 6);
        let dims = [head_dim - 2 * side, side, side];
        // One per pair of values that turns together.
        let frequencies = dims.map(|dim| {
            let exponents = (0..dim / 2).map(|pair| 2.0 * pair as f64 / dim as f64);
            exponents.map(|exponent| 1.0 / ROPE_THETA.powf(exponent)).collect::<Vec<_>>()
        });
        let [frames, rows, columns] = grid;
        let mut angles = Vec::with_capacity(frames * rows * columns * head_dim / 2);
        for frame in 0..frames {
            for row in 0..rows {
                for column in 0..columns {
                    for (axis, position) in [frame, row, column].into_iter().enumerate() {
                        angles.extend(frequencies[axis].iter().map(|frequency| position as f64 * frequency));
                    }
                }
            }
        }
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| function(*angle) as f32).collect();
            Tensor::from_vec(values, (frames * rows * columns, head_dim / 2), device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
}

struct Block {
    attn1: Attention,
    /// Before the cross attention; the other norms have no weights.
    norm2: Option<LayerNorm>,
    attn2: Attention,
    ffn: [Linear; 2],
    /// `[1, 6, dim]`: shift, scale and gate of the self attention, then of the feed-forward layers.
    scale_shift_table: Table,
    eps: f64,
}

impl Block {
    fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let (dim, net) = (config.dim(), weights.pp("ffn").pp("net"));
        let norm2 = || LayerNorm::load(&weights.pp("norm2"), dim, config.eps);
        Ok(Self {
            attn1: Attention::load(&weights.pp("attn1"), config, None)?,
            norm2: config.cross_attn_norm.then(norm2).transpose()?,
            attn2: Attention::load(&weights.pp("attn2"), config, config.added_kv_proj_dim)?,
            ffn: [
                Linear::load(&net.pp(0).pp("proj"), dim, config.ffn_dim)?,
                Linear::load(&net.pp(2), config.ffn_dim, dim)?,
            ],
            scale_shift_table: Table::load(weights, [1, 6, dim], "scale_shift_table")?,
            eps: config.eps,
        })
    }

    /// `x [n, l, dim]`.
    fn forward(&self, x: &Tensor, told: &Told, rope: &Rope) -> Result<Tensor> {
        let modulation = self.scale_shift_table.values()?.broadcast_add(&told.modulation)?;
        let part = |i: usize| modulation.narrow(1, i, 1); // [n, 1, dim]
        let y = modulated_layer_norm(x, &part(0)?, &part(1)?, self.eps)?;
        let y = self.attn1.of_itself(&y, rope)?;
        let x = gated_sum(x, &part(2)?, &y)?;

        let y = match &self.norm2 {
            Some(norm) => norm.forward(&x)?,
            None => x.clone(),
        };
        let x = (x + self.attn2.of_told(&y, told)?)?;

        let y = modulated_layer_norm(&x, &part(3)?, &part(4)?, self.eps)?;
        // Two statements: the widest tensor of the block is freed before the second product.
        let hidden = gelu_tanh(&self.ffn[0].forward(&y)?)?;
        let y = self.ffn[1].forward(&hidden)?;
        Ok(gated_sum(&x, &part(5)?, &y)?)
    }
}

/// Attention of `x` over itself, or over text and pictures, with q and k normalised across all heads at once.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    /// Of pictures.
    added: Option<Added>,
    num_heads: usize,
}

/// Keys and values of what is told of pictures.
struct Added {
    to_k: Linear,
    to_v: Linear,
    norm_k: RmsNorm,
}

impl Attention {
    /// `added_dim`: width of what is told of pictures, where there are any.
    fn load(weights: &Weights, config: &WanConfig, added_dim: Option<usize>) -> Result<Self> {
        let dim = config.dim();
        let linear = |name: &str| Linear::load(&weights.pp(name), dim, dim);
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), dim, config.eps);
        // Some conversions carry the norm of a query that image conditioning does not have either.
        weights.ignore("norm_added_q.weight");
        let added = |added_dim: usize| -> Result<Added> {
            Ok(Added {
                to_k: Linear::load(&weights.pp("add_k_proj"), added_dim, dim)?,
                to_v: Linear::load(&weights.pp("add_v_proj"), added_dim, dim)?,
                norm_k: norm("norm_added_k")?,
            })
        };
        Ok(Self {
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: Linear::load(&weights.pp("to_out").pp(0), dim, dim)?,
            norm_q: norm("norm_q")?,
            norm_k: norm("norm_k")?,
            added: added_dim.map(added).transpose()?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `x [n, l, dim]` looks at itself, queries and keys turned.
    fn of_itself(&self, x: &Tensor, rope: &Rope) -> Result<Tensor> {
        let q = self.normed(&self.to_q.forward(x)?, &self.norm_q, Some(rope))?;
        let k = self.normed(&self.to_k.forward(x)?, &self.norm_k, Some(rope))?;
        let v = self.heads(&self.to_v.forward(x)?)?;
        self.to_out.forward(&attend(&q, &k, &v)?)
    }

    /// `x [n, l, dim]` looks at the text, and at the pictures apart from it.
    fn of_told(&self, x: &Tensor, told: &Told) -> Result<Tensor> {
        let q = self.normed(&self.to_q.forward(x)?, &self.norm_q, None)?;
        let k = self.normed(&self.to_k.forward(&told.text)?, &self.norm_k, None)?;
        let v = self.heads(&self.to_v.forward(&told.text)?)?;
        let y = attend(&q, &k, &v)?;
        let y = match self.added.as_ref().zip(told.image.as_ref()) {
            None => y,
            Some((added, image)) => {
                let k = self.normed(&added.to_k.forward(image)?, &added.norm_k, None)?;
                let v = self.heads(&added.to_v.forward(image)?)?;
                (y + attend(&q, &k, &v)?)?
            }
        };
        self.to_out.forward(&y)
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`, normed and turned.
    fn normed(&self, x: &Tensor, norm: &RmsNorm, rope: Option<&Rope>) -> Result<Tensor> {
        match rope {
            Some(Rope { cos, sin }) => norm.rotated(&self.heads(x)?, cos, sin, RopeLayout::Interleaved),
            None => self.heads(&norm.forward(x)?),
        }
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (n, l, _) = x.dims3()?;
        Ok(x.reshape((n, l, self.num_heads, ()))?)
    }
}

/// `q [n, l, heads, head_dim]` over `k`, `v` `[n, s, heads, head_dim]`: `[n, l, dim]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    Ok(attention(q, k, v, &AttentionOptions::default())?.flatten_from(2)?)
}
