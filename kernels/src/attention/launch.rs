//! Launches of `attention.cu`; shapes are checked by the caller.

use candle_core::{DType, Result, Tensor, bail};

use super::chunks::{VALUES_PER_CHUNK, readable};
use super::{AttentionOptions, Shape, flash_attn};
use crate::gpu::{Launch, module, output};

module!(ATTENTION, "attention");

pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttentionOptions<'_>,
    shape: Shape,
) -> Result<Tensor> {
    let dtype = q.dtype();
    if k.dtype() != dtype || v.dtype() != dtype {
        bail!("attention: q, k and v of different dtypes, {dtype:?}, {:?} and {:?}", k.dtype(), v.dtype());
    }
    if let Some(y) = flash_attn::attention([q, k, v], options, shape)? {
        return Ok(y);
    }
    if dtype != DType::F32 && !shape.d.is_multiple_of(VALUES_PER_CHUNK) {
        // Rows that no 16-byte access can follow: multiply-adds in f32 read any.
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32));
        return attention(&q?, &k?, &v?, options, shape)?.to_dtype(dtype);
    }
    let kernel = Kernel::of(dtype, shape.d, options.bias.is_some())?;
    let scale = options.scale.unwrap_or(1.0 / (shape.d as f64).sqrt());
    // The kernels look for the largest score before they scale it.
    let q = if scale < 0.0 { q.neg()? } else { q.clone() };
    let inputs = Inputs::new([&q, k, v], options, shape)?;
    let y = output((shape.b, shape.lq, shape.heads, shape.d), dtype, &q)?;
    kernel.launch(&inputs, scale.abs(), &y)?;
    Ok(y)
}

/// Most values of a head.
const MAX_D: usize = 512;

/// `KEYS` of the file.
const KEYS: usize = 64;

/// One kernel of the file with its constants.
struct Kernel {
    name: &'static str,
    threads: usize,
    /// Queries of a block.
    rows: usize,
    /// Columns of the output that a block computes.
    columns: usize,
    shared_bytes: usize,
}

impl Kernel {
    fn of(dtype: DType, d: usize, biased: bool) -> Result<Self> {
        if d > MAX_D {
            bail!("attention: heads of {d} values; kernels take up to {MAX_D}");
        }
        Ok(match (dtype, biased) {
            (DType::F32, _) if d <= 128 => Self::f32("attention_narrow_f32", 64, 128),
            (DType::F32, _) => Self::f32("attention_deep_f32", 32, MAX_D),
            (DType::F16, true) => Self::tensor_cores("attention_biased_f16", 64, 64, d),
            (DType::F16, false) if d <= 64 => Self::tensor_cores("attention_64_f16", 128, 64, d),
            (DType::F16, false) if d <= 128 => Self::tensor_cores("attention_128_f16", 128, 128, d),
            (DType::F16, false) => Self::tensor_cores("attention_wide_f16", 64, 128, d),
            (DType::BF16, true) => Self::tensor_cores("attention_biased_bf16", 64, 64, d),
            (DType::BF16, false) if d <= 64 => Self::tensor_cores("attention_64_bf16", 128, 64, d),
            (DType::BF16, false) if d <= 128 => Self::tensor_cores("attention_128_bf16", 128, 128, d),
            (DType::BF16, false) => Self::tensor_cores("attention_wide_bf16", 64, 128, d),
            _ => bail!("attention: activations are f32, f16 or bf16, got {dtype:?}"),
        })
    }

    /// `attend` of the file: the queries in slices of `columns`, and two tiles of keys or values.
    fn tensor_cores(name: &'static str, rows: usize, columns: usize, d: usize) -> Self {
        let shared_bytes = (d.div_ceil(columns) * rows + 2 * KEYS) * columns * 2;
        Self { name, threads: 128, rows, columns, shared_bytes }
    }

    /// `attend_f32` of the file: the queries, a piece of keys or values, the weights.
    fn f32(name: &'static str, rows: usize, columns: usize) -> Self {
        let shared_bytes = (rows * (columns + 4) + (KEYS + rows) * (64 + 4)) * 4;
        Self { name, threads: 256, rows, columns, shared_bytes }
    }

    fn launch(&self, inputs: &Inputs, scale: f64, y: &Tensor) -> Result<()> {
        let Shape { b, lq, heads, d, .. } = inputs.shape;
        let blocks = b * lq.div_ceil(self.rows) * d.div_ceil(self.columns);
        // Hidden scores are minus infinity, which a factor of zero would make NaN.
        let scale = ((scale * std::f64::consts::LOG2_E) as f32).max(f32::MIN_POSITIVE);
        let launch = Launch::new(&ATTENTION, self.name, [blocks, heads, 1], self.threads)?.shared(self.shared_bytes);
        inputs.arguments(launch, y)?.f32(scale).i32(inputs.causal.into()).run(y)
    }
}

/// What the kernels read, in layouts that they can follow.
struct Inputs {
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
    /// Per batch row, where they differ.
    key_lens: Option<Tensor>,
    /// Keys that count, where they do not.
    lk: usize,
    causal: bool,
}

impl Inputs {
    fn new([q, k, v]: [&Tensor; 3], options: &AttentionOptions<'_>, shape: Shape) -> Result<Self> {
        let bias = options.bias.map(|bias| rows_together(&bias.to_dtype(q.dtype())?)).transpose()?;
        let (mut key_lens, mut lk) = (None, shape.lk);
        if let Some([first, rest @ ..]) = options.key_lens {
            if rest.iter().all(|len| len == first) {
                lk = *first;
            } else {
                let lens = std::iter::once(first).chain(rest).map(|len| *len as u32);
                key_lens = Some(Tensor::from_iter(lens, q.device())?);
            }
        }
        let (q, k, v) = (readable(q)?, readable(k)?, readable(v)?);
        Ok(Self { shape, q, k, v, bias, key_lens, lk, causal: options.causal })
    }

    /// All arguments but the last two.
    fn arguments(&self, launch: Launch, y: &Tensor) -> Result<Launch> {
        let Shape { lq, heads, d, .. } = self.shape;
        let mut launch = launch
            .tensor(&self.q)?
            .tensor(&self.k)?
            .tensor(&self.v)?
            .optional(self.bias.as_ref())?
            .optional(self.key_lens.as_ref())?
            .tensor(y)?;
        for length in [lq, self.lk, heads, self.shape.group(), d] {
            launch = launch.i32(i32::try_from(length).map_err(candle_core::Error::wrap)?);
        }
        for x in [&self.q, &self.k, &self.v] {
            launch = launch.i64(x.stride()[0]).i64(x.stride()[1]).i64(x.stride()[2]);
        }
        let (bias_head, bias_row) = self.bias.as_ref().map_or((0, 0), |bias| (bias.stride()[0], bias.stride()[1]));
        Ok(launch.i64(bias_head).i64(bias_row))
    }
}

/// `[heads, lq, lk]` whose last dimension is contiguous.
fn rows_together(bias: &Tensor) -> Result<Tensor> {
    if bias.stride()[2] == 1 { Ok(bias.clone()) } else { bias.contiguous() }
}
