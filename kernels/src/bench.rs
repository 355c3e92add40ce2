//! Roofs measured with the instruction set of the kernels, and the table of operations beside them.

mod table;

pub use table::{Bench, Measured, Roofs, Sizes, Work, roofs, seconds_per_call};

use crate::simd::{Element, Op, Simd, dispatch};

/// Multiply-adds with nothing but registers; returns the operations of one step (an add and a multiply per lane each).
/// `steps` 0 asks for that number alone.
pub fn fma_loop(steps: usize) -> usize {
    dispatch(FmaLoop { steps })
}

struct FmaLoop {
    steps: usize,
}

impl Op for FmaLoop {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        const CHAINS: usize = 12;
        let factor = s.splat(std::hint::black_box(0.999));
        let mut sums = [s.splat(1.0); CHAINS];
        for _ in 0..self.steps {
            for sum in 0..CHAINS {
                sums[sum] = s.fma(sums[sum], factor, factor);
            }
        }
        for sum in sums {
            std::hint::black_box(s.reduce(sum));
        }
        2 * CHAINS * S::LANES
    }
}

/// Sums all values of `words`: the plain read that memory-bound kernels are held against.
pub fn read(words: &[f32]) -> f32 {
    dispatch(Read { words })
}

struct Read<'a> {
    words: &'a [f32],
}

impl Op for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        const CHAINS: usize = 4;
        let mut sums = [s.splat(0.0); CHAINS];
        let step = CHAINS * S::LANES;
        for part in 0..self.words.len() / step {
            for chain in 0..CHAINS {
                // SAFETY: `part` counts whole steps of the slice.
                let value = unsafe { f32::load(s, self.words.as_ptr().add(part * step + chain * S::LANES)) };
                sums[chain] = s.add(sums[chain], value);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            total += s.reduce(sum);
        }
        total
    }
}
