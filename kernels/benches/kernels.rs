//! Times of the kernels beside the roof of this machine, measured in the same run.
//!
//! `cargo bench -p tale-kernels [-- FILTER]`. Memory-bound operations are held against a plain read (sum) of the same
//! bytes by all threads, compute-bound ones against multiply-adds in registers. Figures are medians.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("instruction set {:?}, {} threads", tale_kernels::isa(), rayon::current_num_threads());
    let sections: [(&str, fn() -> Result<()>); 1] = [("linear", linear)];
    for (name, section) in sections {
        if name.contains(&filter) {
            section()?;
        }
    }
    Ok(())
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
