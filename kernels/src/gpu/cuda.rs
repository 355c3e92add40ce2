//! Launches on a CUDA device, on the stream of its [`CudaDevice`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::{result as cublas, sys as cublas_sys};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaGraph, CudaModule, DevicePtr, result, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, DType, Error, Result, bail};

use super::{Gemm, Launch};

/// Dynamic shared memory that a kernel may have without asking for more.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

thread_local! {
    /// A device is used from one thread, so its modules are that thread's.
    static KERNELS: RefCell<Kernels> = RefCell::new(Kernels::default());
}

#[derive(Default)]
struct Kernels {
    modules: HashMap<(DeviceId, &'static str), Arc<CudaModule>>,
    /// With the most dynamic shared memory that each has asked for.
    functions: HashMap<(DeviceId, &'static str), (CudaFunction, u32)>,
}

impl Kernels {
    fn function(&mut self, device: &CudaDevice, launch: &Launch) -> Result<CudaFunction> {
        let key = (device.id(), launch.kernel);
        if !self.functions.contains_key(&key) {
            let module = self.module(device, launch)?;
            let function = module.load_function(launch.kernel).map_err(Error::wrap)?;
            self.functions.insert(key, (function, DEFAULT_SHARED_BYTES));
        }
        let (function, allowed) = self.functions.get_mut(&key).expect("inserted above: this is a bug");
        if launch.shared_bytes > *allowed {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, launch.shared_bytes as i32).map_err(Error::wrap)?;
            *allowed = launch.shared_bytes;
        }
        Ok(function.clone())
    }

    fn module(&mut self, device: &CudaDevice, launch: &Launch) -> Result<Arc<CudaModule>> {
        let key = (device.id(), launch.module.name);
        if let Some(module) = self.modules.get(&key) {
            return Ok(module.clone());
        }
        let stream = device.cuda_stream();
        let image = Ptx::from_binary(launch.module.fatbin.to_vec());
        let module = stream.context().load_module(image).map_err(|error| {
            Error::msg(format!("{}.cu cannot be loaded onto this GPU: {error}", launch.module.name))
        })?;
        self.modules.insert(key, module.clone());
        Ok(module)
    }
}

pub(super) fn launch(device: &CudaDevice, launch: &Launch) -> Result<()> {
    let function = KERNELS.with_borrow_mut(|kernels| kernels.function(device, launch))?;
    let [x, y, z] = launch.grid;
    let stream = device.cuda_stream();
    // SAFETY: the arguments are those of the kernel; the tensors behind them live on this device, and what frees them
    // does so on this stream.
    let launched = unsafe {
        result::launch_kernel(
            function.cu_function(),
            (x, y, z),
            (launch.threads, 1, 1),
            launch.shared_bytes,
            stream.cu_stream(),
            &mut launch.pointers(),
        )
    };
    launched.map_err(|error| Error::msg(format!("{}: {error}", launch.kernel)))
}

/// A CUDA graph of one stream.
pub(crate) struct Graph(CudaGraph);

// SAFETY: the driver knows graphs by handles that any thread may use, as long as no two do at once; an owner on another
// thread is alone with it, and `Graph` is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    /// Memory that `body` allocates and frees becomes the graph's own.
    pub(super) fn record(device: &CudaDevice, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        // Other threads, with other devices, may do what they like meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(Error::wrap)?;
        let body = body();
        // Ended whatever came of it: a stream that still captures is of no use to anybody.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        body?;
        match graph.map_err(Error::wrap)? {
            Some(graph) => Ok(Self(graph)),
            None => bail!("recording: nothing was launched"),
        }
    }

    pub(super) fn replay(&self) -> Result<()> {
        self.0.launch().map_err(Error::wrap)
    }
}

/// Where the values of a storage begin.
pub(super) fn address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::I64(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U8(slice) => slice.device_ptr(&stream).0,
        _ => bail!("no kernel reads values of this dtype"),
    })
}

#[cfg(any(test, feature = "emulator"))]
pub(super) fn poison(device: &CudaDevice, address: u64, bytes: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's tensor is new, and this is all of its memory.
    let filled = unsafe { result::memset_d8_async(address, 0xff, bytes, device.cuda_stream().cu_stream()) };
    filled.map_err(Error::wrap)
}

/// cuBLAS is column-major: it computes `cᵀ = bᵀ aᵀ`, whose columns are our rows.
pub(super) fn gemm(device: &CudaDevice, gemm: &Gemm, [a, b, c]: [u64; 3]) -> Result<()> {
    use cublas_sys::{cublasComputeType_t as Compute, cublasOperation_t as Operation, cudaDataType_t as Type};
    let data_type = match gemm.dtype {
        DType::F32 => Type::CUDA_R_32F,
        DType::F16 => Type::CUDA_R_16F,
        DType::BF16 => Type::CUDA_R_16BF,
        other => bail!("gemm: matrices are f32, f16 or bf16, got {other:?}"),
    };
    let operation = if gemm.b_transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
    let (alpha, beta) = (1f32, if gemm.accumulate { 1f32 } else { 0f32 });
    let size = |value: usize| {
        i32::try_from(value).map_err(|_| Error::msg(format!("gemm: {value} is more than cuBLAS counts to")))
    };
    let blas = device.cublas_handle();
    // SAFETY: the caller's matrices have these sizes and distances on this device; alpha and beta are read at once.
    let done = unsafe {
        cublas::gemm_ex(
            *blas.handle(),
            operation,
            Operation::CUBLAS_OP_N,
            size(gemm.n)?,
            size(gemm.m)?,
            size(gemm.k)?,
            std::ptr::from_ref(&alpha).cast(),
            b as *const c_void,
            data_type,
            size(gemm.ldb)?,
            a as *const c_void,
            data_type,
            size(gemm.lda)?,
            std::ptr::from_ref(&beta).cast(),
            c as *mut c_void,
            data_type,
            size(gemm.ldc)?,
            // Not ..._FAST_TF32: see `Gemm`.
            Compute::CUBLAS_COMPUTE_32F,
            cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(Error::wrap)
}
