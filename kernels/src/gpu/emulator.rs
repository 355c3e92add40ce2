//! Launches on the CPU, for tests: see `emulator/emulator.h`.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use candle_core::{DType, Result, Tensor, bail};
use half::{bf16, f16};

use super::{Gemm, Launch};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    /// What is being recorded, if anything is.
    static TAPE: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Launches in their order, and the tensors that they write: a GPU's graph owns their memory too.
#[derive(Default)]
pub(crate) struct Tape {
    steps: Vec<Step>,
    tensors: Vec<Tensor>,
}

enum Step {
    Launch(Launch),
    Gemm(Gemm, [u64; 3]),
}

impl Tape {
    pub(super) fn record(body: impl FnOnce() -> Result<()>) -> Result<Self> {
        TAPE.set(Some(Self::default()));
        let done = body();
        let tape = TAPE.take().expect("nobody else takes it: this is a bug");
        done.map(|()| tape)
    }

    pub(super) fn replay(&self) -> Result<()> {
        for step in &self.steps {
            match step {
                Step::Launch(step) => run(step)?,
                Step::Gemm(gemm, addresses) => multiply_matrices(gemm, *addresses)?,
            }
        }
        Ok(())
    }

    /// Whether the step went onto a tape, so that it must not run now.
    fn takes(step: impl FnOnce() -> Step) -> bool {
        TAPE.with_borrow_mut(|tape| tape.as_mut().map(|tape| tape.steps.push(step())).is_some())
    }
}

/// Keeps a tensor as long as what is being recorded.
pub(super) fn keep(tensor: &Tensor) {
    TAPE.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.tensors.push(tensor.clone());
        }
    });
}

/// Runs `body` with every operation on CPU tensors of this thread launched on the emulator.
pub fn emulated<R>(body: impl FnOnce() -> R) -> R {
    struct Off(bool);
    impl Drop for Off {
        fn drop(&mut self) {
            ON.set(self.0);
        }
    }
    let _off = Off(ON.replace(true));
    body()
}

pub(super) fn is_on() -> bool {
    ON.get()
}

unsafe extern "C" {
    fn emulator_launch(
        name: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared_bytes: c_uint,
        arguments: *mut *mut c_void,
    ) -> c_int;
}

/// Shared memory that a block of the smallest GPU served (compute capability 8.6 and 8.9) may have.
const MAX_SHARED_BYTES: u32 = 99 << 10;

pub(super) fn launch(launch: Launch) -> Result<()> {
    if Tape::takes(|| Step::Launch(launch.clone())) { Ok(()) } else { run(&launch) }
}

fn run(launch: &Launch) -> Result<()> {
    let kernel = launch.kernel;
    if launch.shared_bytes > MAX_SHARED_BYTES {
        bail!("{kernel}: {} bytes of shared memory are more than every GPU has", launch.shared_bytes);
    }
    let name = CString::new(kernel).map_err(candle_core::Error::wrap)?;
    let (grid, threads, shared) = (launch.grid.as_ptr(), launch.threads, launch.shared_bytes);
    // SAFETY: the arguments are those of the kernel, as for cuLaunchKernel.
    match unsafe { emulator_launch(name.as_ptr(), grid, threads, shared, launch.pointers().as_mut_ptr()) } {
        0 => Ok(()),
        1 => bail!("{kernel}: {}.cu has no such kernel", launch.module.name),
        _ => bail!("{kernel}: {threads} threads are more than it was declared for"),
    }
}

pub(super) fn gemm(gemm: &Gemm, addresses: [u64; 3]) -> Result<()> {
    if Tape::takes(|| Step::Gemm(gemm.clone(), addresses)) { Ok(()) } else { multiply_matrices(gemm, addresses) }
}

/// What cuBLAS would compute, value by value.
fn multiply_matrices(gemm: &Gemm, addresses: [u64; 3]) -> Result<()> {
    match gemm.dtype {
        DType::F32 => multiply::<f32>(gemm, addresses, |x| x, |x| x),
        DType::F16 => multiply::<f16>(gemm, addresses, f16::to_f32, f16::from_f32),
        DType::BF16 => multiply::<bf16>(gemm, addresses, bf16::to_f32, bf16::from_f32),
        other => bail!("gemm: matrices are f32, f16 or bf16, got {other:?}"),
    }
    Ok(())
}

fn multiply<T: Copy>(gemm: &Gemm, [a, b, c]: [u64; 3], widen: impl Fn(T) -> f32, round: impl Fn(f32) -> T) {
    let (a, b, c) = (a as *const T, b as *const T, c as *mut T);
    for row in 0..gemm.m {
        for col in 0..gemm.n {
            let mut sum = 0f32;
            for k in 0..gemm.k {
                let place = if gemm.b_transposed { col * gemm.ldb + k } else { k * gemm.ldb + col };
                // SAFETY: the caller's matrices have these rows and distances.
                sum += unsafe { widen(*a.add(row * gemm.lda + k)) * widen(*b.add(place)) };
            }
            // SAFETY: as above.
            unsafe {
                let to = c.add(row * gemm.ldc + col);
                *to = round(if gemm.accumulate { widen(*to) + sum } else { sum });
            }
        }
    }
}
