//! Launching kernels: arguments, outputs, and where they run.
//!
//! A tensor on a CUDA device is computed there. A tensor on the CPU is computed by the kernels' CPU twins, except within
//! [`emulated`], where the very same launches run on the emulator: tests do that. Owns: pointers of tensors, the modules
//! of the device, matrix products by cuBLAS. Does not know: any operation.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulator")]
mod emulator;

#[cfg(feature = "emulator")]
pub use emulator::emulated;

/// Whether operations on this tensor launch kernels.
pub(crate) fn runs_here(tensor: &Tensor) -> bool {
    match tensor.device() {
        Device::Cuda(_) => true,
        #[cfg(feature = "emulator")]
        Device::Cpu => emulator::is_on(),
        _ => false,
    }
}

/// Blocks of a grid that strides over its input: several waves on any GPU, few enough that none is launched to do
/// next to nothing.
pub(crate) const MAX_WAVES_BLOCKS: usize = 132 * 32;

/// The compiled form of one `.cu` file.
pub(crate) struct Module {
    /// For messages; the file's stem.
    pub name: &'static str,
    #[cfg(feature = "cuda")]
    pub fatbin: &'static [u8],
}

/// `module!(NORM, "norm")`: the static `NORM` for `norm.cu`.
macro_rules! module {
    ($name:ident, $stem:literal) => {
        static $name: $crate::gpu::Module = $crate::gpu::Module {
            name: $stem,
            #[cfg(feature = "cuda")]
            fatbin: include_bytes!(concat!(env!("OUT_DIR"), "/", $stem, ".fatbin")),
        };
    };
}
pub(crate) use module;

/// `by_dtype!("rms_norm", dtype)`: the kernel's name for a dtype of activations.
macro_rules! by_dtype {
    ($name:expr, $dtype:expr) => {
        match $dtype {
            candle_core::DType::F32 => concat!($name, "_f32"),
            candle_core::DType::F16 => concat!($name, "_f16"),
            candle_core::DType::BF16 => concat!($name, "_bf16"),
            other => candle_core::bail!("{}: activations are f32, f16 or bf16, got {other:?}", $name),
        }
    };
}
pub(crate) use by_dtype;

/// Launches recorded for [`crate::Recording`].
pub(crate) enum Recorded {
    #[cfg(feature = "cuda")]
    Cuda(cuda::Graph),
    #[cfg(feature = "emulator")]
    Emulator(emulator::Tape),
}

impl Recorded {
    pub(crate) fn of(on: &Tensor, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        match on.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(cuda::Graph::record(device, body)?)),
            #[cfg(feature = "emulator")]
            Device::Cpu => Ok(Self::Emulator(emulator::Tape::record(body)?)),
            device => bail!("recording: this build launches no kernels on {device:?}"),
        }
    }

    pub(crate) fn replay(&self) -> Result<()> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(graph) => graph.replay(),
            #[cfg(feature = "emulator")]
            Self::Emulator(tape) => tape.replay(),
        }
    }
}

/// One argument as the kernel reads it from memory.
#[derive(Clone, Copy)]
#[repr(C)]
union Argument {
    pointer: u64,
    i64: i64,
    i32: i32,
    u64: u64,
    f32: f32,
}

/// A kernel with its grid and arguments. Arguments come in the order of the kernel's parameters; the types are not
/// checked by anybody, so each launch stands in one function next to nothing else.
#[derive(Clone)]
pub(crate) struct Launch {
    module: &'static Module,
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    arguments: Vec<Argument>,
}

impl Launch {
    /// A grid of `grid` blocks (x, y, z) of `threads` threads. An empty grid launches nothing.
    pub(crate) fn new(module: &'static Module, kernel: &'static str, grid: [usize; 3], threads: usize) -> Result<Self> {
        // Limits of every GPU since compute capability 3.0.
        if grid[0] > i32::MAX as usize || grid[1] > 65_535 || grid[2] > 65_535 {
            bail!("{kernel}: a grid of {grid:?} blocks is larger than a GPU can launch");
        }
        let grid = grid.map(|side| side as u32);
        Ok(Self { module, kernel, grid, threads: threads as u32, shared_bytes: 0, arguments: Vec::with_capacity(16) })
    }

    /// Bytes of dynamic shared memory.
    pub(crate) fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    /// The address of the first value of a tensor, read or written by its strides.
    pub(crate) fn tensor(mut self, tensor: &Tensor) -> Result<Self> {
        self.arguments.push(Argument { pointer: address(tensor)? });
        Ok(self)
    }

    /// As [`Launch::tensor`]; null if absent.
    pub(crate) fn optional(mut self, tensor: Option<&Tensor>) -> Result<Self> {
        let pointer = tensor.map(address).transpose()?.unwrap_or(0);
        self.arguments.push(Argument { pointer });
        Ok(self)
    }

    /// A `long` of the kernel.
    pub(crate) fn i64(mut self, value: usize) -> Self {
        self.arguments.push(Argument { i64: value as i64 });
        self
    }

    /// An `int` of the kernel.
    pub(crate) fn i32(mut self, value: i32) -> Self {
        self.arguments.push(Argument { i32: value });
        self
    }

    /// A `float` of the kernel.
    pub(crate) fn f32(mut self, value: f32) -> Self {
        self.arguments.push(Argument { f32: value });
        self
    }

    /// Runs it after everything that was launched before on the device of `on`. Returns before it has finished on a GPU;
    /// memory that is freed meanwhile is reused in the order of the same stream.
    pub(crate) fn run(self, on: &Tensor) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        match on.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::launch(device, &self),
            #[cfg(feature = "emulator")]
            Device::Cpu => emulator::launch(self),
            device => bail!("{} of {}.cu: this build launches no kernels on {device:?}", self.kernel, self.module.name),
        }
    }

    /// Where each argument lies, as launching functions want it.
    fn pointers(&self) -> Vec<*mut std::ffi::c_void> {
        self.arguments.iter().map(|argument| std::ptr::from_ref(argument).cast_mut().cast()).collect()
    }
}

/// A tensor whose values a kernel will write, every one of them: on the device of `like`, contiguous, not initialised.
/// Tests fill it with NaN first.
pub(crate) fn output(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: the caller's kernel writes every value before anybody reads one.
    let tensor = unsafe { Tensor::empty(shape, dtype, like.device())? };
    #[cfg(any(test, feature = "emulator"))]
    poison(&tensor)?;
    #[cfg(feature = "emulator")]
    emulator::keep(&tensor);
    Ok(tensor)
}

/// Fills with a byte pattern that is NaN in every float dtype.
#[cfg(any(test, feature = "emulator"))]
fn poison(tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::poison(device, address(tensor)?, bytes(tensor)),
        _ => {
            // SAFETY: the tensor is new, and this is all of its memory.
            unsafe { std::ptr::write_bytes(address(tensor)? as *mut u8, 0xff, bytes(tensor)) };
            Ok(())
        }
    }
}

#[cfg(any(test, feature = "emulator"))]
fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Address of the first value of a tensor, on its device.
pub(crate) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let start = layout.start_offset() * tensor.dtype().size_in_bytes();
    let base = match &*storage {
        Storage::Cpu(storage) => cpu_address(storage)?,
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => cuda::address(storage)?,
        _ => bail!("{:?} holds no tensor that a kernel could read", tensor.device()),
    };
    Ok(base + start as u64)
}

fn cpu_address(storage: &CpuStorage) -> Result<u64> {
    Ok(match storage {
        CpuStorage::F32(values) => values.as_ptr() as u64,
        CpuStorage::F16(values) => values.as_ptr() as u64,
        CpuStorage::BF16(values) => values.as_ptr() as u64,
        CpuStorage::U32(values) => values.as_ptr() as u64,
        CpuStorage::I64(values) => values.as_ptr() as u64,
        CpuStorage::U8(values) => values.as_ptr() as u64,
        _ => bail!("no kernel reads values of this dtype"),
    })
}

/// `c [m, n] = a [m, k] b + beta c`, all row-major in one dtype with their distances between rows, sums in f32.
///
/// f32 factors are never rounded to TF32: who asks for f32 gets the results of the CPU, who wants tensor cores asks for
/// 16 bits.
#[derive(Clone)]
pub(crate) struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Distance between rows of a.
    pub lda: usize,
    /// Distance between rows of b, which is `[n, k]` if `b_transposed`, else `[k, n]`.
    pub ldb: usize,
    pub b_transposed: bool,
    /// Distance between rows of c.
    pub ldc: usize,
    /// Whether the product is added to what c holds.
    pub accumulate: bool,
    pub dtype: DType,
}

impl Gemm {
    /// Addresses are of the first values, on the device of `on`.
    pub(crate) fn run(&self, a: u64, b: u64, c: u64, on: &Tensor) -> Result<()> {
        if self.m == 0 || self.n == 0 {
            return Ok(());
        }
        match on.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::gemm(device, self, [a, b, c]),
            #[cfg(feature = "emulator")]
            Device::Cpu => emulator::gemm(self, [a, b, c]),
            device => bail!("this build multiplies no matrices by cuBLAS on {device:?} ({a:x}, {b:x}, {c:x})"),
        }
    }
}
