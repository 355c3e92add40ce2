//! Every operation at the shapes of the published models, beside the roofs of its device measured in the same run.
//!
//! A roof is what the device's own library does with the simplest work: a copy of a large tensor (bytes read and written)
//! for operations bound by memory, a product of large matrices by cuBLAS for those bound by arithmetic. On the CPU, where
//! published sizes would take minutes, rows and pictures are smaller by [`Sizes::Small`]; its roofs are a plain read and
//! multiply-adds in registers.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::{
    AttentionOptions, Code, CodeScales, ConvOptions, Draw, Gelu, PackedMatrix, PagedBatch, PagedCache, QkNorm,
    RopeLayout, SpatialNorm,
};

/// How large the inputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// Those of the models at the sizes at which they are published.
    Published,
    /// A sixteenth of the tokens and pixels: for a laptop, and to see that everything runs.
    Small,
}

impl Sizes {
    /// Tokens or rows.
    fn rows(self, published: usize) -> usize {
        match self {
            Self::Published => published,
            Self::Small => published.div_ceil(16),
        }
    }

    /// Pixels of one side.
    fn side(self, published: usize) -> usize {
        match self {
            Self::Published => published,
            Self::Small => published.div_ceil(4),
        }
    }
}

/// What an operation's rate is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Bytes that it must at least read and write.
    Bytes(f64),
    /// Multiplications and additions that it does.
    Flops(f64),
}

/// Measured limits of a device.
#[derive(Debug, Clone, Copy)]
pub struct Roofs {
    /// Of a copy, read and written bytes together; on the CPU of a read.
    pub bytes_per_second: f64,
    /// Of a matrix product in the dtype of the bench; on the CPU of multiply-adds in registers.
    pub flops_per_second: f64,
}

/// One measured operation.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Name of the function.
    pub op: &'static str,
    /// Whose shape it is, and which.
    pub shape: String,
    /// Median over several rounds of calls.
    pub seconds: f64,
    /// What one call does.
    pub work: Work,
    /// Of the same run.
    pub roofs: Roofs,
}

impl Measured {
    /// Bytes or operations per second.
    pub fn rate(&self) -> f64 {
        let (Work::Bytes(amount) | Work::Flops(amount)) = self.work;
        amount / self.seconds
    }

    /// Share of the roof that it is held against.
    pub fn share_of_roof(&self) -> f64 {
        match self.work {
            Work::Bytes(_) => self.rate() / self.roofs.bytes_per_second,
            Work::Flops(_) => self.rate() / self.roofs.flops_per_second,
        }
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (unit, scale) = match self.work {
            Work::Bytes(_) => ("GB/s", 1e9),
            Work::Flops(_) => ("TFLOP/s", 1e12),
        };
        let (micros, rate, percent) = (self.seconds * 1e6, self.rate() / scale, 100.0 * self.share_of_roof());
        write!(f, "{:<22} {:<44} {micros:>10.1} us {rate:>9.2} {unit:<8} {percent:>4.0} %", self.op, self.shape)
    }
}

/// A bench of one device in one dtype of activations.
pub struct Bench<'a> {
    device: Device,
    dtype: DType,
    sizes: Sizes,
    roofs: Roofs,
    /// Operations whose name contains this.
    filter: &'a str,
    print: &'a mut dyn FnMut(&Measured),
}

impl<'a> Bench<'a> {
    /// Measures the roofs. `dtype` is that of activations: f32 on the CPU. `print` is called for each operation whose
    /// name contains `filter`.
    pub fn new(
        device: &Device,
        dtype: DType,
        sizes: Sizes,
        filter: &'a str,
        print: &'a mut dyn FnMut(&Measured),
    ) -> Result<Self> {
        Ok(Self { roofs: roofs(device, dtype)?, device: device.clone(), dtype, sizes, filter, print })
    }

    /// What the device can do.
    pub fn roofs(&self) -> Roofs {
        self.roofs
    }

    /// All operations.
    pub fn run(&mut self) -> Result<()> {
        self.norms()?;
        self.gates_and_rotations()?;
        self.joints()?;
        self.products()?;
        self.attentions()?;
        self.paged()?;
        self.tokens()?;
        self.pictures()
    }

    fn norms(&mut self) -> Result<()> {
        // Llama 8B prefill; FLUX.1 with 512 text tokens at 1024 x 1024.
        for (model, rows, dim) in [("llama 8B, 8192 tokens", 8192, 4096), ("flux 1024x1024", 4608, 3072)] {
            let rows = self.sizes.rows(rows);
            let (x, weight) = (self.random(&[1, rows, dim])?, self.random(&[dim])?);
            let part = self.random(&[1, 1, dim])?;
            let bytes = self.bytes(rows * dim);
            self.measure("rms_norm", model, Work::Bytes(2.0 * bytes), || crate::rms_norm(&x, &weight, 1e-6))?;
            self.measure("add_rms_norm", model, Work::Bytes(4.0 * bytes), || {
                crate::add_rms_norm(&x, &x, &weight, 1e-6).map(|(_, norm)| norm)
            })?;
            self.measure("modulated_layer_norm", model, Work::Bytes(2.0 * bytes), || {
                crate::modulated_layer_norm(&x, &part, &part, 1e-6)
            })?;
            self.measure("gated_sum", model, Work::Bytes(3.0 * bytes), || crate::gated_sum(&x, &part, &x))?;
            self.measure("relative_l1", model, Work::Bytes(2.0 * bytes), || crate::relative_l1(&x, &x))?;
        }
        Ok(())
    }

    fn gates_and_rotations(&mut self) -> Result<()> {
        let rows = self.sizes.rows(8192);
        let (gate, up) = (self.random(&[rows, 14336])?, self.random(&[rows, 14336])?);
        let bytes = self.bytes(rows * 14336);
        self.measure("silu_mul", "llama 8B, 8192 tokens", Work::Bytes(3.0 * bytes), || crate::silu_mul(&gate, &up))?;
        let rows = self.sizes.rows(2 * 4096);
        let (x, bytes) = (self.random(&[rows, 2 * 2560])?, self.bytes(rows * 2560));
        self.measure("geglu", "sdxl 1024x1024, 64 x 64", Work::Bytes(3.0 * bytes), || crate::geglu(&x, Gelu::Erf))?;
        for (model, l, heads, across) in
            [("flux 1024x1024, per head", 4608, 24, false), ("wan 1.3B 480p, across heads", 32760, 12, true)]
        {
            let l = self.sizes.rows(l);
            let (x, weight) =
                (self.random(&[1, l, heads, 128])?, self.random(&[if across { heads * 128 } else { 128 }])?);
            let angles = Tensor::rand(-1f32, 1f32, (l, 64), &self.device)?;
            let bytes = 2.0 * self.bytes(l * heads * 128) + (2 * l * 64 * 4) as f64;
            let norm = QkNorm { weight: &weight, eps: 1e-6 };
            self.measure("norm_rope", model, Work::Bytes(bytes), || {
                crate::norm_rope(&x, Some(&norm), &angles, &angles, RopeLayout::Interleaved)
            })?;
        }
        Ok(())
    }

    /// What lies between the blocks of SDXL's UNet at 1024 x 1024, two rows.
    fn joints(&mut self) -> Result<()> {
        for (channels, published) in [(320, 128), (640, 64)] {
            let side = self.sizes.side(published);
            let x = self.random(&[2, channels, side, side])?;
            let (per_channel, tokens) = (self.random(&[2, channels])?, x.flatten_from(2)?);
            let (shape, bytes) = (format!("sdxl, 2 x {channels} x {side} x {side}"), self.bytes(x.elem_count()));
            self.measure("cat", &shape, Work::Bytes(4.0 * bytes), || crate::cat(&[&x, &x], 1))?;
            self.measure("transpose", &shape, Work::Bytes(2.0 * bytes), || crate::transpose(&tokens))?;
            self.measure("sum", &shape, Work::Bytes(3.0 * bytes), || crate::sum(&x, &x))?;
            self.measure("sum_channels", &shape, Work::Bytes(2.0 * bytes), || crate::sum_channels(&x, &per_channel))?;
        }
        Ok(())
    }

    fn products(&mut self) -> Result<()> {
        for (model, m, n, k) in [
            ("llama 8B up, 1 token", 1, 14336, 4096),
            ("llama 8B up, 64 tokens", 64, 14336, 4096),
            ("flux mlp 1024x1024", 4608, 12288, 3072),
        ] {
            let m = if m > 64 { self.sizes.rows(m) } else { m };
            let (x, weight) = (self.random(&[m, k])?, self.random(&[n, k])?);
            // One row is bound by reading the weights.
            let work = if m == 1 { Work::Bytes(self.bytes(n * k)) } else { Work::Flops(2.0 * (m * n * k) as f64) };
            self.measure("linear", model, work, || crate::linear(&x, &weight, None))?;
        }
        for (model, m) in [("llama 8B up in 4 bits, 1 token", 1), ("llama 8B up in 4 bits, 64 tokens", 64)] {
            let (n, k, group_size) = (14336, 4096, 128);
            let scales = Tensor::full(0.01f32, (n, k / group_size), &self.device)?.to_dtype(DType::F16)?;
            let zeros = Some(vec![8; n * k / group_size]);
            let scales = CodeScales { scales, zeros, group_size, rows_per_scale: 1 };
            let code_at = |row: usize, column: usize| (7 * row + 3 * column) as u8 & 15;
            let weight = PackedMatrix::new(Code::Bits4, (n, k), scales, None, &self.device, code_at)?;
            let x = self.random(&[m, k])?;
            let bytes = weight.size_in_bytes() as f64;
            let work = if m == 1 { Work::Bytes(bytes) } else { Work::Flops(2.0 * (m * n * k) as f64) };
            self.measure("linear_packed", model, work, || crate::linear_packed(&x, &weight, None))?;
        }
        Ok(())
    }

    fn attentions(&mut self) -> Result<()> {
        for (model, b, lq, lk, heads, d) in [
            ("flux 1024x1024", 1, 4608, 4608, 24, 128),
            ("16k tokens", 1, 16384, 16384, 24, 128),
            ("wan 1.3B 480p", 1, 32760, 32760, 12, 128),
            ("sdxl 1024x1024, 64 x 64", 2, 4096, 4096, 10, 64),
            ("sdxl cross attention", 2, 4096, 77, 10, 64),
        ] {
            let (lq, lk) = (self.sizes.rows(lq), if lk > 77 { self.sizes.rows(lk) } else { lk });
            let (q, k) = (self.random(&[b, lq, heads, d])?, self.random(&[b, lk, heads, d])?);
            let flops = 4.0 * (b * heads * lq * d) as f64 * lk as f64;
            self.measure("attention", model, Work::Flops(flops), || {
                crate::attention(&q, &k, &k, &AttentionOptions::default())
            })?;
        }
        Ok(())
    }

    /// Llama 8B: 32 heads for queries, 8 for keys.
    fn paged(&mut self) -> Result<()> {
        const BLOCK: usize = 32;
        for (sequences, rows, context) in [(1, 1, 4096), (16, 1, 4096), (64, 1, 4096), (1, 512, 4096)] {
            let (rows, context) = (if rows > 1 { self.sizes.rows(rows) } else { rows }, self.sizes.rows(context));
            let blocks = sequences * context / BLOCK;
            let (k, v) = (self.random(&[blocks, BLOCK, 8, 128])?, self.random(&[blocks, BLOCK, 8, 128])?);
            let cache = PagedCache::new(k, v);
            let q = self.random(&[sequences * rows, 32, 128])?;
            let tables = (0..blocks as u32).collect::<Vec<_>>();
            let batch = PagedBatch {
                cu_seqlens_q: (0..=sequences).map(|sequence| sequence * rows).collect(),
                context_lens: vec![context; sequences],
                block_tables: tables.chunks(context / BLOCK).map(<[u32]>::to_vec).collect(),
                slot_mapping: (0..(sequences * rows) as u32).collect(),
            };
            let batch = batch.prepare(32, &cache)?;
            let work = match rows {
                1 => Work::Bytes(self.bytes(2 * sequences * context * 8 * 128)),
                _ => Work::Flops(4.0 * (sequences * rows * 32 * 128) as f64 * (context - rows / 2) as f64),
            };
            let shape = format!("llama 8B, {sequences} x {rows} rows, context {context}");
            self.measure("paged_attention", &shape, work, || crate::paged_attention(&q, &cache, &batch, 0.088))?;
            let (new, bytes) = (self.random(&[sequences * rows, 8, 128])?, self.bytes(4 * sequences * rows * 8 * 128));
            self.measure("write_kv", &shape, Work::Bytes(bytes), || {
                crate::write_kv(&new, &new, &cache, &batch).map(|()| new.clone())
            })?;
        }
        Ok(())
    }

    /// Llama 3's vocabulary. A call waits for the tokens, as a step does; the roof is one reading of the logits.
    fn tokens(&mut self) -> Result<()> {
        let greedy = Draw {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            random: 1 << 63,
            biases: Arc::default(),
            penalties: None,
            allowed: None,
        };
        let plain = Draw { temperature: 0.8, ..greedy.clone() };
        let cut = Draw { top_k: 50, top_p: 0.9, ..plain.clone() };
        for (name, draw) in [("greedy", greedy), ("temperature", plain), ("top-k and top-p", cut)] {
            for rows in [1, 64] {
                let logits = (self.random(&[rows, 128_256])? * 8.0)?;
                let draws = vec![draw.clone(); rows];
                let work = Work::Bytes(self.bytes(rows * 128_256));
                self.measure("sample", &format!("llama 3, {rows} rows, {name}"), work, || {
                    crate::sample(&logits, &draws).map(|_| logits.clone())
                })?;
            }
        }
        Ok(())
    }

    /// Of the KL-VAE at 1024 x 1024 and of Wan's at 480 x 832.
    fn pictures(&mut self) -> Result<()> {
        for (channels, published) in [(128, 1024), (512, 256)] {
            let side = self.sizes.side(published);
            let (x, weight) = (self.random(&[1, channels, side, side])?, self.random(&[channels])?);
            let (shape, values) = (format!("KL-VAE, {channels} x {side} x {side}"), channels * side * side);
            let bytes = 2.0 * self.bytes(values);
            // x is read for its statistics before it is read again.
            self.measure("group_norm", &shape, Work::Bytes(1.5 * bytes), || {
                crate::group_norm(&x, 32, &weight, &weight, 1e-6)
            })?;
            let kernel = crate::conv_weight(&self.random(&[channels, channels, 3, 3])?)?;
            let flops = 2.0 * (values * channels * 9) as f64;
            self.measure("conv2d", &shape, Work::Flops(flops), || {
                crate::conv2d(&x, &kernel, Some(&weight), ConvOptions::padded(1))
            })?;
            self.measure("upsample_nearest2d", &shape, Work::Bytes(2.5 * bytes), || crate::upsample_nearest2d(&x))?;
        }
        let (h, w) = (self.sizes.side(480), self.sizes.side(832));
        let (x, kernel) = (self.random(&[1, 96, 6, h, w])?, crate::conv_weight(&self.random(&[96, 96, 3, 3, 3])?)?);
        let flops = 2.0 * (96 * 96 * 27 * 4 * h * w) as f64;
        let shape = format!("Wan VAE, 96 x 4 frames of {h} x {w}");
        self.measure("conv3d", &shape, Work::Flops(flops), || {
            crate::conv3d(&x, &kernel, None, ConvOptions::padded(1))
        })?;
        let weight = self.random(&[96])?;
        let bytes = 2.0 * self.bytes(96 * 6 * h * w);
        self.measure("rms_norm_channels", &shape, Work::Bytes(bytes), || crate::rms_norm_channels(&x, &weight))?;
        let (small_h, small_w) = (self.sizes.side(480) / 8, self.sizes.side(720) / 8);
        let (h, w) = (8 * small_h, 8 * small_w);
        let x = self.random(&[1, 128, 8, h, w])?;
        let (z, weight) = (self.random(&[1, 128, 2, small_h, small_w])?, self.random(&[128])?);
        let shape = format!("CogVideoX VAE, 128 x 8 frames of {h} x {w}");
        // x is read for its statistics before it is read again.
        let bytes = 3.0 * self.bytes(128 * 8 * h * w);
        self.measure("spatial_norm_silu", &shape, Work::Bytes(bytes), || {
            let norm = SpatialNorm { num_groups: 32, weight: &weight, bias: &weight, eps: 1e-6, factor: &z, term: &z };
            crate::spatial_norm_silu(&x, &norm)
        })
    }

    fn measure(&mut self, op: &'static str, shape: &str, work: Work, call: impl Fn() -> Result<Tensor>) -> Result<()> {
        if op.contains(self.filter) {
            let seconds = seconds_per_call(&self.device, call)?;
            (self.print)(&Measured { op, shape: shape.to_owned(), seconds, work, roofs: self.roofs });
        }
        Ok(())
    }

    fn random(&self, dims: &[usize]) -> Result<Tensor> {
        Tensor::rand(-1f32, 1f32, dims, &self.device)?.to_dtype(self.dtype)
    }

    /// Of so many activations.
    fn bytes(&self, values: usize) -> f64 {
        (values * self.dtype.size_in_bytes()) as f64
    }
}

/// Median seconds of a call: calls follow one another without a wait in rounds of at least 20 ms, as in a model; five
/// rounds after one to warm up.
pub fn seconds_per_call<T>(device: &Device, call: impl Fn() -> Result<T>) -> Result<f64> {
    const ROUND_SECONDS: f64 = 0.02;
    let round = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            std::hint::black_box(call()?);
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    round(2)?;
    let calls = ((ROUND_SECONDS / round(1)?).ceil() as usize).clamp(1, 1000);
    let mut rounds = (0..5).map(|_| round(calls)).collect::<Result<Vec<_>>>()?;
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[rounds.len() / 2])
}

/// What the device does with the simplest work.
pub fn roofs(device: &Device, dtype: DType) -> Result<Roofs> {
    if device.is_cpu() {
        return Ok(Roofs { bytes_per_second: cpu_read()?, flops_per_second: cpu_multiply_adds()? });
    }
    const COPIED_BYTES: usize = 1 << 30;
    let x = Tensor::zeros(COPIED_BYTES / dtype.size_in_bytes(), dtype, device)?;
    let copy = seconds_per_call(device, || x.copy())?;
    drop(x);
    const SIDE: usize = 8192;
    // Random: products of zeros draw less power and run faster than any model will.
    let random = || Tensor::rand(-1f32, 1f32, (SIDE, SIDE), device)?.to_dtype(dtype);
    let (a, b) = (random()?, random()?);
    let product = seconds_per_call(device, || crate::linear(&a, &b, None))?;
    Ok(Roofs {
        bytes_per_second: 2.0 * COPIED_BYTES as f64 / copy,
        flops_per_second: 2.0 * (SIDE as f64).powi(3) / product,
    })
}

/// All threads sum 512 MiB, which no cache holds.
fn cpu_read() -> Result<f64> {
    let values = vec![1f32; 128 << 20];
    let part = values.len().div_ceil(8 * rayon::current_num_threads());
    let seconds = seconds_per_call(&Device::Cpu, || Ok(values.par_chunks(part).map(super::read).sum::<f32>()))?;
    Ok(4.0 * values.len() as f64 / seconds)
}

fn cpu_multiply_adds() -> Result<f64> {
    const STEPS: usize = 1_000_000;
    let seconds = seconds_per_call(&Device::Cpu, || {
        rayon::broadcast(|_| std::hint::black_box(super::fma_loop(STEPS)));
        Ok(())
    })?;
    Ok((rayon::current_num_threads() * super::fma_loop(0) * STEPS) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_roof_that_the_work_is_held_against() {
        let roofs = Roofs { bytes_per_second: 100.0, flops_per_second: 1000.0 };
        let line = |work| Measured { op: "x", shape: String::new(), seconds: 2.0, work, roofs };
        assert_eq!(line(Work::Bytes(100.0)).share_of_roof(), 0.5);
        assert_eq!(line(Work::Flops(100.0)).share_of_roof(), 0.05);
    }

    #[test]
    fn a_filter_chooses_operations() {
        let mut found = Vec::new();
        let mut print = |line: &Measured| found.push((line.op, line.seconds > 0.0));
        let roofs = Roofs { bytes_per_second: 1.0, flops_per_second: 1.0 };
        let (device, dtype, sizes) = (Device::Cpu, DType::F32, Sizes::Small);
        let mut bench = Bench { device, dtype, sizes, roofs, filter: "norm_rope", print: &mut print };
        bench.gates_and_rotations().unwrap();
        assert_eq!(found, [("norm_rope", true), ("norm_rope", true)]);
    }
}
