//! Times of the kernels beside the roof of this machine, measured in the same run.
//!
//! `cargo bench -p tale-kernels [-- FILTER]` on the CPU; `... --features cuda -- cuda:0 [FILTER]` prints the table of
//! `tale bench kernels` for a GPU, in bf16. Memory-bound operations are held against a plain read (sum) of the same
//! bytes by all threads, compute-bound ones against multiply-adds in registers. Figures are medians.

use std::hint::black_box;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use tale_kernels::bench::{Bench, Measured, Roofs, Sizes};
use tale_kernels::{Code, CodeScales, ConvOptions, PackedMatrix, QuantisedMatrix, linear_packed, linear_quantised};

/// A part of the bench, run if its name contains the filter.
type Section = (&'static str, fn() -> Result<()>);

const SECTIONS: &[Section] = &[
    ("linear", linear),
    ("blocks", blocks),
    ("packed", packed),
    ("attention", attention),
    ("paged", paged),
    ("convolution", convolution),
    ("small", small),
];

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if let Some(place) = arguments.iter().position(|argument| argument.starts_with("cuda:")) {
        let ordinal = arguments.remove(place)["cuda:".len()..].parse().map_err(candle_core::Error::wrap)?;
        return on_gpu(ordinal, &arguments.pop().unwrap_or_default());
    }
    let filter = arguments.pop().unwrap_or_default();
    println!("instruction set {:?}, {} threads", tale_kernels::isa(), rayon::current_num_threads());
    for (name, section) in SECTIONS {
        if name.contains(&filter) {
            section()?;
        }
    }
    Ok(())
}

fn on_gpu(ordinal: usize, filter: &str) -> Result<()> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let mut print = |line: &Measured| println!("{line}");
    let mut bench = Bench::new(&device, DType::BF16, Sizes::Published, filter, &mut print)?;
    let Roofs { bytes_per_second, flops_per_second } = bench.roofs();
    println!("copy {:.0} GB/s, cuBLAS bf16 {:.0} TFLOP/s", bytes_per_second / 1e9, flops_per_second / 1e12);
    bench.run()
}

/// Median microseconds of a call, after one to warm up, over at least 5 calls and 0.4 s.
fn time_us(mut call: impl FnMut()) -> f64 {
    call();
    let (mut times, begin) = (Vec::new(), Instant::now());
    while times.len() < 5 || (begin.elapsed().as_secs_f64() < 0.2 && times.len() < 1000) {
        let start = Instant::now();
        call();
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn random(dims: &[usize]) -> Result<Tensor> {
    Tensor::rand(-1f32, 1f32, dims, &Device::Cpu)
}

/// One line: operation, shape, microseconds, rate, percent of the roof.
fn line(op: &str, shape: &str, us: f64, rate: f64, roof: f64, unit: &str) {
    println!("{op:<22} {shape:<34} {us:>10.0} us {rate:>8.1} {unit:<8} {:>5.0} % of {roof:.1}", 100.0 * rate / roof);
}

/// GFLOP/s of all threads doing nothing but multiply-adds in registers.
fn peak_gflops() -> f64 {
    const STEPS: usize = 200_000;
    let us = time_us(|| {
        let threads = rayon::current_num_threads();
        let flops: usize =
            (0..threads).into_par_iter().with_max_len(1).map(|_| tale_kernels::bench::fma_loop(STEPS)).sum();
        black_box(flops);
    });
    rayon::current_num_threads() as f64 * tale_kernels::bench::fma_loop(0).max(1) as f64 * STEPS as f64 / us / 1e3
}

fn linear() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (n, k) in [(2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048)] {
            linear_shape(dtype, n, k)?;
        }
    }
    Ok(())
}

fn linear_shape(dtype: DType, n: usize, k: usize) -> Result<()> {
    // Layers follow one another in a decode step: enough copies that none is found in the cache.
    let bytes = n * k * dtype.size_in_bytes();
    let copies = (256usize << 20).div_ceil(bytes).max(2);
    let weights = (0..copies).map(|_| random(&[n, k])?.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    let reads: Vec<Vec<f32>> = (0..copies).map(|i| vec![i as f32; bytes / 4]).collect();
    let mut turn = 0;
    let part = (bytes / 4).div_ceil(8 * rayon::current_num_threads());
    let read = time_us(|| {
        turn += 1;
        black_box(reads[turn % copies].par_chunks(part).map(tale_kernels::bench::read).sum::<f32>());
    });
    let roof = bytes as f64 / read / 1e3;
    let mut single = 0.0;
    let large = n * k > 16 << 20;
    for m in [1, 2, 4, 16, 64, 512] {
        if large && m > 64 {
            continue;
        }
        let x = random(&[m, k])?;
        let peak = peak_gflops();
        let us = time_us(|| {
            turn += 1;
            black_box(tale_kernels::linear(&x, &weights[turn % copies], None).expect("shapes fit"));
        });
        let shape = format!("{m} x {k} -> {n} {dtype:?}");
        if m == 1 {
            single = us;
        }
        if m <= 4 {
            line("linear", &shape, us, bytes as f64 / us / 1e3, roof, "GB/s");
        } else {
            let flops = 2.0 * (m * n * k) as f64;
            line("linear", &shape, us, flops / us / 1e3, peak, "GFLOP/s");
            println!("{:<22} {:.1} times the rows/s of one row", "", m as f64 * single / us);
        }
        if m == 512 && dtype == DType::F32 {
            let transposed = weights[0].t()?;
            let us = time_us(|| {
                black_box(x.matmul(&transposed).expect("shapes fit"));
            });
            line("  candle matmul", &shape, us, 2.0 * (m * n * k) as f64 / us / 1e3, peak, "GFLOP/s");
        }
    }
    Ok(())
}

/// Matrices of GGUF's blocks.
fn blocks() -> Result<()> {
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let (n, k) = (5632, 2048);
        let made = QTensor::quantize(&random(&[n, k])?, dtype)?;
        let blocks = made.data()?;
        let new = || QuantisedMatrix::new(&blocks, dtype, (n, k), &Device::Cpu);
        small_form(&format!("{dtype:?}"), (n, k), blocks.len(), new, |x, weight| linear_quantised(x, weight, None))?;
    }
    Ok(())
}

/// Matrices of codes, with one scale for 128 and for 32 columns.
fn packed() -> Result<()> {
    for (code, name) in [(Code::Bits4, "4 bits"), (Code::Bits8, "8 bits"), (Code::Float8, "fp8")] {
        for group_size in [128, 32] {
            let (n, k) = (5632, 2048);
            let scales = Tensor::full(0.01f32, (n, k / group_size), &Device::Cpu)?.to_dtype(DType::F16)?;
            let zeros = (code != Code::Float8).then(|| vec![8; n * k / group_size]);
            let scales = CodeScales { scales, zeros, group_size, rows_per_scale: 1 };
            let code_at = |row: usize, column: usize| (7 * row + 3 * column) as u8 & 15;
            let new = || PackedMatrix::new(code, (n, k), scales.clone(), None, &Device::Cpu, code_at);
            let bytes = new()?.size_in_bytes();
            let name = format!("{name}, groups of {group_size}");
            small_form(&name, (n, k), bytes, new, |x, weight| linear_packed(x, weight, None))?;
        }
    }
    Ok(())
}

/// Products with matrices in a form of so many bytes: few rows beside a plain read, more beside multiply-adds.
fn small_form<W>(
    name: &str,
    (n, k): (usize, usize),
    bytes: usize,
    new: impl Fn() -> Result<W>,
    multiply: impl Fn(&Tensor, &W) -> Result<Tensor>,
) -> Result<()> {
    let copies = (128usize << 20).div_ceil(bytes).max(2);
    let weights = (0..copies).map(|_| new()).collect::<Result<Vec<_>>>()?;
    let reads: Vec<Vec<f32>> = (0..copies).map(|i| vec![i as f32; bytes / 4]).collect();
    let part = (bytes / 4).div_ceil(8 * rayon::current_num_threads());
    let mut turn = 0;
    for m in [1, 2, 4, 16, 64, 512] {
        let x = random(&[m, k])?;
        let read = time_us(|| {
            turn += 1;
            black_box(reads[turn % copies].par_chunks(part).map(tale_kernels::bench::read).sum::<f32>());
        });
        let peak = peak_gflops();
        let us = time_us(|| {
            turn += 1;
            black_box(multiply(&x, &weights[turn % copies]).expect("shapes fit"));
        });
        let shape = format!("{m} x {k} -> {n} {name}");
        if m <= 4 {
            line("linear", &shape, us, bytes as f64 / us / 1e3, bytes as f64 / read / 1e3, "GB/s");
        } else {
            line("linear", &shape, us, 2.0 * (m * n * k) as f64 / us / 1e3, peak, "GFLOP/s");
        }
    }
    Ok(())
}

/// Times `call` and prints its rate of multiply-adds against the roof of the moment.
fn compute(op: &str, shape: &str, flops: f64, call: impl FnMut()) {
    let peak = peak_gflops();
    let us = time_us(call);
    line(op, shape, us, flops / us / 1e3, peak, "GFLOP/s");
}

fn attention() -> Result<()> {
    for (b, lq, lk, heads, d) in
        [(1, 4096, 4096, 4, 128), (2, 512, 512, 12, 64), (1, 1560, 512, 12, 128), (1, 77, 77, 12, 64)]
    {
        let (q, k) = (random(&[b, lq, heads, d])?, random(&[b, lk, heads, d])?);
        let flops = 4.0 * (b * heads * lq * lk * d) as f64;
        compute("attention", &format!("{b} x {lq} q, {lk} k, {heads} x {d}"), flops, || {
            black_box(
                tale_kernels::attention(&q, &k, &k, &tale_kernels::AttentionOptions::default()).expect("shapes fit"),
            );
        });
    }
    Ok(())
}

/// TinyLlama's heads: 32 for queries, 4 for keys, 64 values each.
fn paged() -> Result<()> {
    const BLOCK: usize = 32;
    for (sequences, rows, context) in [(1, 1, 1024), (16, 1, 1024), (1, 1, 8192), (1, 256, 256), (1, 256, 4096)] {
        let blocks = sequences * context / BLOCK;
        let cache = tale_kernels::PagedCache::new(random(&[blocks, BLOCK, 4, 64])?, random(&[blocks, BLOCK, 4, 64])?);
        let q = random(&[sequences * rows, 32, 64])?;
        let tables = (0..blocks as u32).collect::<Vec<_>>();
        let batch = tale_kernels::PagedBatch {
            cu_seqlens_q: (0..=sequences).map(|sequence| sequence * rows).collect(),
            context_lens: vec![context; sequences],
            block_tables: tables.chunks(context / BLOCK).map(<[u32]>::to_vec).collect(),
            slot_mapping: vec![0; sequences * rows],
        };
        let batch = batch.prepare(32, &cache)?;
        let flops = 4.0 * (sequences * rows * 32 * 64) as f64 * (context - rows / 2) as f64;
        compute("paged_attention", &format!("{sequences} x {rows} rows, context {context}"), flops, || {
            black_box(tale_kernels::paged_attention(&q, &cache, &batch, 0.125).expect("shapes fit"));
        });
    }
    Ok(())
}

fn convolution() -> Result<()> {
    for (inner, out, h, w, k) in
        [(128, 128, 256, 256, 3), (512, 512, 64, 64, 3), (512, 256, 64, 64, 1), (16, 512, 32, 32, 3)]
    {
        let (x, weight, bias) = (random(&[1, inner, h, w])?, random(&[out, inner, k, k])?, random(&[out])?);
        let flops = 2.0 * (inner * out * h * w * k * k) as f64;
        let shape = format!("{inner} -> {out}, {h} x {w}, k {k}");
        compute("conv2d", &shape, flops, || {
            black_box(tale_kernels::conv2d(&x, &weight, Some(&bias), ConvOptions::padded(k / 2)).expect("shapes fit"));
        });
        compute("  candle conv2d", &shape, flops, || {
            black_box(x.conv2d(&weight, k / 2, 1, 1, 1).expect("shapes fit"));
        });
    }
    let (x, weight) = (random(&[1, 96, 3, 60, 104])?, random(&[96, 96, 3, 3, 3])?);
    let flops = 2.0 * (96 * 96 * 27 * 60 * 104) as f64;
    compute("conv3d", "96 -> 96, 3 frames of 60 x 104, k 3", flops, || {
        black_box(tale_kernels::conv3d(&x, &weight, None, ConvOptions::padded(1)).expect("shapes fit"));
    });
    Ok(())
}

/// What a decode step calls between its matrix products, and the same operations on a picture's worth of rows.
fn small() -> Result<()> {
    for rows in [1, 16, 4096] {
        let (x, weight) = (random(&[rows, 2048])?, random(&[2048])?);
        let bytes = (2 * rows * 2048 * 4) as f64;
        let roof = read_gb_per_s(rows * 2048);
        let passes = |op: &str, call: &dyn Fn() -> Result<Tensor>| {
            let us = time_us(|| {
                black_box(call().expect("shapes fit"));
            });
            line(op, &format!("{rows} x 2048"), us, bytes / us / 1e3, roof, "GB/s");
        };
        passes("rms_norm", &|| tale_kernels::rms_norm(&x, &weight, 1e-5));
        passes("layer_norm", &|| tale_kernels::layer_norm(&x, Some(&weight), Some(&weight), 1e-5));
        passes("silu_mul", &|| tale_kernels::silu_mul(&x, &x));
        passes("gelu_tanh", &|| tale_kernels::gelu_tanh(&x));
        passes("gelu_erf", &|| tale_kernels::gelu_erf(&x));
        let (heads, angles) = (x.reshape((rows, 32, 64))?, random(&[rows, 32])?);
        passes("rope_half", &|| tale_kernels::rope_half(&heads, &angles, &angles));
        let picture = x.reshape((1, 128, rows * 16))?;
        let weight = random(&[128])?;
        passes("group_norm", &|| tale_kernels::group_norm(&picture, 32, &weight, &weight, 1e-6));
        passes("rms_norm_channels", &|| tale_kernels::rms_norm_channels(&picture, &weight));
    }
    Ok(())
}

/// GB/s of all threads that sum `len` values.
fn read_gb_per_s(len: usize) -> f64 {
    let values = vec![1f32; len];
    let part = len.div_ceil(8 * rayon::current_num_threads());
    let us = time_us(|| {
        black_box(values.par_chunks(part).map(tale_kernels::bench::read).sum::<f32>());
    });
    4.0 * len as f64 / us / 1e3
}
