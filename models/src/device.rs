//! Where tensors live and in which dtype. The only file of this crate that asks which backend was compiled in.
//!
//! Owns: devices by name, the dtypes that each computes in, what a GPU must be for this build, and how it is opened. Does
//! not know: what is computed. A device is opened on the one thread that uses it: its stream orders all work, and
//! memory that another thread freed could still be read by a kernel.

use candle_core::{DType, Device};

use crate::error::{Error, Result};

pub use tale_kernels::{give_back_freed_memory, keep_freed_memory, share_one_heap};

/// A device by name: `cpu`, `cpu:0/2`, `cuda:0`. Every build knows all names; which of them it can open is another matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The host processor.
    #[default]
    Cpu,
    /// A share of the host processor's cores and memory.
    CpuPart {
        /// Which of the parts, from 0.
        part: usize,
        /// How many parts there are, of the same size.
        of: usize,
    },
    /// The NVIDIA GPU with this number, as the driver counts them.
    Cuda(usize),
}

/// Most parts of a processor.
const MAX_PARTS: usize = 1024;

impl DeviceSpec {
    /// In how many parts the processor is shared out, of which this is one.
    pub fn num_parts(self) -> usize {
        match self {
            Self::CpuPart { of, .. } => of,
            Self::Cpu | Self::Cuda(_) => 1,
        }
    }
}

impl std::str::FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let spec = match name.split_once(':') {
            None if name == "cpu" => Some(Self::Cpu),
            None if name == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", ordinal)) => number(ordinal).map(Self::Cuda),
            Some(("cpu", share)) => part(share),
            _ => None,
        };
        let unknown = || Error::Device(format!("`{name}` is not a device; known: cpu, cpu:PART/PARTS, cuda:N"));
        spec.ok_or_else(unknown)
    }
}

/// Digits alone: a sign would parse too.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Of the processor, such as `0/2`.
fn part(text: &str) -> Option<DeviceSpec> {
    let (part, of) = text.split_once('/')?;
    let (part, of) = (number(part)?, number(of)?);
    (part < of && of <= MAX_PARTS).then_some(DeviceSpec::CpuPart { part, of })
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::CpuPart { part, of } => write!(f, "cpu:{part}/{of}"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Runs `body` on one of the threads that compute for the processor, or for a part of it: one for each of its cores, at least one.
/// From any other thread each operation would cost two changes of threads. For a GPU it runs here.
pub fn on_threads_of<T: Send>(spec: DeviceSpec, body: impl FnOnce() -> T + Send) -> Result<T> {
    let (part, of) = match spec {
        DeviceSpec::Cpu => (0, 1),
        DeviceSpec::CpuPart { part, of } => (part, of),
        DeviceSpec::Cuda(_) => return Ok(body()),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores * (part + 1) / of - cores * part / of).max(1);
    let named = move |thread| format!("{spec}-{thread}");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(named).build();
    let pool = pool.map_err(|error| Error::Device(format!("{spec}: {error}")))?;
    Ok(pool.install(body))
}

/// How many GPUs this process may see, for `cuda:*`; an error where the driver does not say.
pub fn num_gpus() -> Result<usize> {
    cuda::num_devices()
}

/// `--dtype`: on the CPU the dtype of weight matrices, on a GPU that of everything but latents, pixels and tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// On the CPU as the checkpoint publishes them, on a GPU bfloat16.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl std::str::FromStr for WeightDtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(Error::Device(format!("`{name}` is not a dtype; allowed: auto, f32, bf16, f16"))),
        }
    }
}

impl std::fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// A device and the dtypes to use on it.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Where tensors live.
    pub device: Device,
    /// Dtype of activations, norms, biases and convolution kernels. On the CPU f32: the matrix kernels there read 16-bit
    /// weights and widen them in registers, so that nothing is gained by rounding activations. On a GPU as asked.
    pub compute_dtype: DType,
    matrices: Matrices,
}

/// In which dtype matrices are kept.
#[derive(Debug, Clone, Copy)]
enum Matrices {
    /// As published, or as asked.
    Own(WeightDtype),
    /// In that of activations: cuBLAS multiplies matrices of one dtype.
    Compute,
}

impl Placement {
    /// Most bytes that a product with a quantised matrix of so many values takes for a moment: on a GPU the matrix in the
    /// compute dtype and, where that has 16 bits, in f16 on the way; on the CPU a slab that its caches hold.
    pub(crate) fn dequantised_bytes(&self, values: usize) -> usize {
        let on_the_way = if self.compute_dtype == DType::F32 { 0 } else { DType::F16.size_in_bytes() };
        match self.matrices {
            Matrices::Compute => values.saturating_mul(self.compute_dtype.size_in_bytes() + on_the_way),
            Matrices::Own(_) => 0,
        }
    }

    /// As [`Placement::dequantised_bytes`], of codes that are widened straight into the compute dtype.
    pub(crate) fn widened_bytes(&self, values: usize) -> usize {
        match self.matrices {
            Matrices::Compute => values.saturating_mul(self.compute_dtype.size_in_bytes()),
            Matrices::Own(_) => 0,
        }
    }

    /// Opens the device, on the thread that will use it. Errors are one line that begins with the device's name.
    pub fn open(spec: DeviceSpec, dtype: WeightDtype) -> Result<Self> {
        Self::in_host_memory(spec, dtype).opened_on(spec)
    }

    /// As [`Placement::open`], with the dtypes of this one.
    pub fn opened_on(&self, spec: DeviceSpec) -> Result<Self> {
        let device = match spec {
            DeviceSpec::Cpu | DeviceSpec::CpuPart { .. } => Device::Cpu,
            DeviceSpec::Cuda(ordinal) => cuda::open(ordinal)?,
        };
        Ok(Self { device, ..self.clone() })
    }

    /// Tensors in host memory with the dtypes that they have on `spec`, which is not opened and need not exist: for dry
    /// weights, and for tests of 16-bit networks without a GPU.
    pub fn in_host_memory(spec: DeviceSpec, dtype: WeightDtype) -> Self {
        match spec {
            DeviceSpec::Cpu | DeviceSpec::CpuPart { .. } => {
                Self { device: Device::Cpu, compute_dtype: DType::F32, matrices: Matrices::Own(dtype) }
            }
            DeviceSpec::Cuda(_) => {
                let compute_dtype = match dtype {
                    WeightDtype::F32 => DType::F32,
                    WeightDtype::F16 => DType::F16,
                    WeightDtype::Auto | WeightDtype::Bf16 => DType::BF16,
                };
                Self { device: Device::Cpu, compute_dtype, matrices: Matrices::Compute }
            }
        }
    }

    /// What results depend on beside weights and requests: the kind of device and the dtypes.
    pub fn kind(&self) -> Result<String> {
        let device = match (&self.device, self.is_gpu()) {
            (Device::Cpu, false) => format!("cpu with {:?}", tale_kernels::isa()),
            (Device::Cpu, true) => format!("host memory for a GPU with {:?}", tale_kernels::isa()),
            (device, _) => {
                let (major, minor) = cuda::capability(device)?;
                format!("cuda {major}.{minor}")
            }
        };
        Ok(format!("{device}, {:?}, {:?}", self.compute_dtype, self.matrices))
    }

    /// Whether this is a GPU, or host memory that stands for one.
    pub fn is_gpu(&self) -> bool {
        matches!(self.matrices, Matrices::Compute)
    }

    /// The same place for a network that computes in another dtype.
    pub fn computing_in(&self, compute_dtype: DType) -> Self {
        Self { compute_dtype, ..self.clone() }
    }

    /// The same dtypes, in host memory.
    pub fn in_memory_of_the_host(&self) -> Self {
        Self { device: Device::Cpu, ..self.clone() }
    }

    /// Dtype in which a matrix published as `published` is kept.
    pub fn matrix_dtype(&self, published: DType) -> DType {
        match (self.matrices, published) {
            (Matrices::Compute, _) => self.compute_dtype,
            (Matrices::Own(WeightDtype::F32), _) => DType::F32,
            (Matrices::Own(WeightDtype::Bf16), _) => DType::BF16,
            (Matrices::Own(WeightDtype::F16), _) => DType::F16,
            (Matrices::Own(WeightDtype::Auto), DType::F16 | DType::BF16) => published,
            (Matrices::Own(WeightDtype::Auto), _) => DType::F32,
        }
    }

    /// Waits until everything that was asked of the device is done; the CPU does at once what it is asked.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    /// Memory of an opened GPU as it is now; `None` on the CPU, whose memory the operating system hands out.
    pub fn memory(&self) -> Result<Option<DeviceMemory>> {
        match &self.device {
            Device::Cpu => Ok(None),
            device => cuda::memory(device).map(Some),
        }
    }

    /// Bytes that this process could take on an opened GPU for a moment: those that nobody holds, and those that were freed
    /// and kept. `None` on the CPU, as above.
    pub fn spare_bytes(&self) -> Result<Option<usize>> {
        let Some(memory) = self.memory()? else { return Ok(None) };
        Ok(Some(memory.usable_bytes() + cuda::kept_bytes(&self.device)?))
    }
}

/// Bytes of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// That nobody holds: no other process, and not this one's context and modules.
    pub free_bytes: usize,
    /// In all.
    pub total_bytes: usize,
}

/// Kept aside on a GPU for what no plan counts and what comes after the free bytes are read: modules that are loaded at
/// the first call of one of their kernels, cuBLAS's workspaces, the host's copies of step inputs.
const RESERVE_BYTES: usize = 512 << 20;
/// One part in this many of the memory is kept aside for fragmentation: the pool gives freed blocks to later
/// allocations, and blocks of one step seldom have the sizes of the next one's.
const RESERVE_SHARE: usize = 25;

impl DeviceMemory {
    /// Bytes that models and sessions may take when nothing is configured.
    pub fn usable_bytes(&self) -> usize {
        self.free_bytes.saturating_sub(RESERVE_BYTES + self.total_bytes / RESERVE_SHARE)
    }
}

/// A GPU's compute capability, major and minor.
pub type Capability = (i32, i32);

/// The oldest GPUs that the kernels are written for (Ampere: bf16 and asynchronous copies to shared memory).
pub const MIN_CAPABILITY: Capability = (8, 0);

/// What this build of the program asks of a machine.
#[derive(Debug, Clone, Copy)]
pub struct CudaBuild {
    /// CUDA version of the toolkit, `1000 * major + 10 * minor`; a driver must be of this version or later.
    pub toolkit_version: i32,
    /// The oldest GPUs that it has code for.
    pub capability: Capability,
}

/// What the driver says of a machine, before anything is opened.
#[derive(Debug, Clone, Default)]
pub struct CudaFacts {
    /// Why the driver refuses to work at all, in its words.
    pub driver_problem: Option<String>,
    /// CUDA version that the driver is for, `1000 * major + 10 * minor`.
    pub driver_version: i32,
    /// GPUs that this process may see.
    pub num_devices: usize,
    /// Name and capability of the GPU asked for, if there is one.
    pub gpu: Option<(String, Capability)>,
}

/// Whether this build can use the GPU `ordinal` of the machine that `facts` describe; the error is one line that says
/// why not and what would help.
pub fn check_cuda(ordinal: usize, facts: &CudaFacts, build: &CudaBuild) -> Result<()> {
    let version = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    let spec = DeviceSpec::Cuda(ordinal);
    let refuse = |problem: String| Err(Error::Device(format!("{spec}: {problem}")));
    if let Some(words) = &facts.driver_problem {
        return refuse(format!("the NVIDIA driver does not work here: {words}"));
    }
    if facts.driver_version < build.toolkit_version {
        let (found, needed) = (version(facts.driver_version), version(build.toolkit_version));
        return refuse(format!("the NVIDIA driver is for CUDA {found}, this build needs {needed}; update the driver"));
    }
    let Some((name, (major, minor))) = &facts.gpu else {
        return refuse(match facts.num_devices {
            0 => "no NVIDIA GPU is visible to this process".to_owned(),
            1 => "there is no such GPU; this machine has one, cuda:0".to_owned(),
            n => format!("there is no such GPU; this machine has {n}, cuda:0 to cuda:{}", n - 1),
        });
    };
    let needed = build.capability.max(MIN_CAPABILITY);
    if (*major, *minor) < needed {
        let (reason, (needed_major, needed_minor)) = match needed {
            MIN_CAPABILITY => ("Tale needs", needed),
            _ => ("this build is for", needed),
        };
        return refuse(format!(
            "{name} has compute capability {major}.{minor}; {reason} {needed_major}.{needed_minor} or later"
        ));
    }
    Ok(())
}

#[cfg(feature = "cuda")]
mod cuda {
    //! The driver, through cudarc's bindings, and candle's device over it.

    use std::ffi::c_int;

    use candle_core::Device;
    use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
    use candle_core::cuda_backend::cudarc::driver::sys::{
        self, CUdevice_attribute as Attribute, CUmemPool_attribute as PoolAttribute,
    };
    use candle_core::cuda_backend::{
        CudaDevice, set_gemm_reduced_precision_bf16, set_gemm_reduced_precision_f16, set_gemm_reduced_precision_f32,
    };

    use super::{Capability, CudaBuild, CudaFacts, DeviceMemory, DeviceSpec, MIN_CAPABILITY, check_cuda};
    use crate::error::{Error, Result};

    /// candle's kernels are compiled for this capability; where the variable was not set, the GPU of the building machine
    /// decided and is at least what is needed.
    const CAPABILITY_OF_BUILD: Option<&str> = option_env!("CUDA_COMPUTE_CAP");

    /// Opens the GPU with a stream of its own (the default one is another stream on every thread, which candle takes for
    /// the same one).
    pub(super) fn open(ordinal: usize) -> Result<Device> {
        let named = |error: &dyn std::fmt::Display| Error::Device(format!("{}: {error}", DeviceSpec::Cuda(ordinal)));
        let facts = facts(ordinal).map_err(|error| named(&words(error)))?;
        let build = CudaBuild { toolkit_version: sys::CUDA_VERSION as i32, capability: capability_of_build() };
        check_cuda(ordinal, &facts, &build)?;
        let device = Device::new_cuda_with_stream(ordinal).map_err(|error| named(&first_line(&error)))?;
        let cuda = device.as_cuda_device()?;
        // SAFETY: one thread and one stream use the device, so that the stream's order is all the order there is. Done
        // before the first tensor exists: events would cost two calls per tensor and forbid graph capture.
        unsafe { cuda.disable_event_tracking() };
        keep_freed_memory(cuda).map_err(|error| named(&words(error)))?;
        decide_precision();
        Ok(device)
    }

    pub(super) fn num_devices() -> Result<usize> {
        let named = |problem: &dyn std::fmt::Display| Error::Device(format!("cuda:*: {problem}"));
        let facts = facts(0).map_err(|error| named(&words(error)))?;
        match facts.driver_problem {
            Some(problem) => Err(named(&problem)),
            None => Ok(facts.num_devices),
        }
    }

    /// Sums are f32 in products of every dtype, and f32 products have all 24 bits: TF32 would keep 11 of them, and who
    /// asks for f32 asks for exactness. bf16 is the fast way.
    fn decide_precision() {
        set_gemm_reduced_precision_f32(false);
        set_gemm_reduced_precision_f16(false);
        set_gemm_reduced_precision_bf16(false);
    }

    /// Freed blocks stay with this process instead of going back to the driver at every synchronisation: every
    /// operation allocates its result.
    fn keep_freed_memory(cuda: &CudaDevice) -> Result<(), DriverError> {
        let stream = cuda.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            return Ok(());
        }
        let mut threshold = u64::MAX;
        // SAFETY: the device is open; the attribute is a u64, read before the call returns.
        unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device())?;
            let value = (&raw mut threshold).cast();
            sys::cuMemPoolSetAttribute(pool, PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value).result()
        }
    }

    pub(super) fn memory(device: &Device) -> Result<DeviceMemory> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let (free_bytes, total_bytes) =
            stream.context().mem_get_info().map_err(|error| Error::Device(format!("free memory: {}", words(error))))?;
        Ok(DeviceMemory { free_bytes, total_bytes })
    }

    /// Bytes of freed blocks that stay with this process.
    pub(super) fn kept_bytes(device: &Device) -> Result<usize> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            return Ok(0);
        }
        let attribute = |attribute| {
            let mut bytes = 0u64;
            // SAFETY: the device is open; the attributes asked for are a u64 each, written before the call returns.
            unsafe {
                let pool = result::device::get_default_mem_pool(context.cu_device())?;
                sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()).result()?;
            }
            Ok::<u64, DriverError>(bytes)
        };
        let kept = || {
            let reserved = attribute(PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
            let used = attribute(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
            Ok::<u64, DriverError>(reserved.saturating_sub(used))
        };
        let kept = kept().map_err(|error| Error::Device(format!("kept memory: {}", words(error))))?;
        Ok(usize::try_from(kept).unwrap_or(usize::MAX))
    }

    pub(super) fn capability(device: &Device) -> Result<Capability> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let gpu = stream.context().cu_device();
        // SAFETY: the device is open.
        let attribute = |attribute| unsafe { result::device::get_attribute(gpu, attribute) };
        let both = || {
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            Ok::<Capability, DriverError>((major, minor))
        };
        both().map_err(|error| Error::Device(format!("compute capability: {}", words(error))))
    }

    /// Asks the driver. An error is one of a driver that works and yet does not answer.
    fn facts(ordinal: usize) -> Result<CudaFacts, DriverError> {
        let mut facts = CudaFacts::default();
        let mut version: c_int = 0;
        // SAFETY: writes one int; may be called before `cuInit`, and an old driver must be recognised before it fails.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
        facts.driver_version = version;
        match result::init() {
            Ok(()) => facts.num_devices = usize::try_from(result::device::get_count()?).unwrap_or(0),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => (),
            Err(error) => facts.driver_problem = Some(words(error)),
        }
        if ordinal < facts.num_devices {
            let gpu = result::device::get(ordinal as c_int)?;
            // SAFETY: `gpu` is a device that the driver has just named.
            let attribute = |attribute| unsafe { result::device::get_attribute(gpu, attribute) };
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            facts.gpu = Some((result::device::get_name(gpu)?, (major, minor)));
        }
        Ok(facts)
    }

    /// `90` or `90a` is 9.0.
    fn capability_of_build() -> Capability {
        let digits = CAPABILITY_OF_BUILD.map(|cap| cap.trim_end_matches(|c: char| !c.is_ascii_digit()));
        digits.and_then(|digits| digits.parse::<i32>().ok()).map_or(MIN_CAPABILITY, |cap| (cap / 10, cap % 10))
    }

    /// candle puts a backtrace behind its errors where `RUST_BACKTRACE` is set.
    fn first_line(error: &candle_core::Error) -> String {
        let text = error.to_string();
        format!("cannot be opened: {}", text.lines().next().unwrap_or_default())
    }

    /// `CUDA_ERROR_UNKNOWN: unknown error`.
    fn words(error: DriverError) -> String {
        let name = format!("{:?}", error.0);
        match error.error_string() {
            Ok(text) => format!("{name}: {}", text.to_string_lossy()),
            Err(_) => name,
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    //! What is left of CUDA in a build without it: one clear line.

    use candle_core::Device;

    use super::{Capability, DeviceMemory, DeviceSpec};
    use crate::error::{Error, Result};

    pub(super) fn capability(device: &Device) -> Result<Capability> {
        Err(absent(device))
    }

    pub(super) fn open(ordinal: usize) -> Result<Device> {
        Err(missing(&DeviceSpec::Cuda(ordinal)))
    }

    pub(super) fn num_devices() -> Result<usize> {
        Err(missing(&"cuda:*"))
    }

    fn missing(spec: &dyn std::fmt::Display) -> Error {
        Error::Device(format!("{spec}: this build of Tale has no CUDA; scripts/build-cuda makes one that has"))
    }

    pub(super) fn memory(device: &Device) -> Result<DeviceMemory> {
        Err(absent(device))
    }

    pub(super) fn kept_bytes(device: &Device) -> Result<usize> {
        Err(absent(device))
    }

    fn absent(device: &Device) -> Error {
        Error::Device(format!("{:?}: this build of Tale has no CUDA", device.location()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_processor_share_out_its_cores() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = |part, of| on_threads_of(DeviceSpec::CpuPart { part, of }, rayon::current_num_threads);
        let all: usize = (0..cores).map(|part| threads(part, cores).expect("a pool")).sum();
        assert_eq!((all, threads(0, 1).expect("a pool"), threads(7, 1000).expect("a pool")), (cores, cores, 1));
        assert_eq!(on_threads_of(DeviceSpec::Cpu, rayon::current_num_threads).expect("a pool"), cores);
        assert!(on_threads_of(DeviceSpec::Cpu, || rayon::current_thread_index().is_some()).expect("a pool"));
        let here = std::thread::current().id();
        assert_eq!(on_threads_of(DeviceSpec::Cuda(0), || std::thread::current().id()).expect("runs"), here);
    }

    #[test]
    fn devices_are_printed_as_they_are_written() {
        for (name, spec) in [
            ("cpu", DeviceSpec::Cpu),
            ("cpu:1/2", DeviceSpec::CpuPart { part: 1, of: 2 }),
            ("cuda:0", DeviceSpec::Cuda(0)),
            ("cuda:17", DeviceSpec::Cuda(17)),
        ] {
            assert_eq!(name.parse::<DeviceSpec>().expect("known"), spec);
            assert_eq!(spec.to_string(), name);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().expect("known"), DeviceSpec::Cuda(0));
        let gpus = ["gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda0", "CUDA:0", "cuda:99999999999999999999"];
        let parts =
            ["", "cpu:", "cpu:0", "cpu:2/2", "cpu:0/0", "cpu:0/", "cpu:/2", "cpu:+0/2", "cpu:0/2/2", "cpu:0/1025"];
        for name in gpus.into_iter().chain(parts) {
            let error = name.parse::<DeviceSpec>().expect_err("unknown").to_string();
            assert!(error.contains(&format!("`{name}`")) && error.contains("cpu, cpu:PART/PARTS, cuda:N"), "{error}");
        }
    }

    const BUILD: CudaBuild = CudaBuild { toolkit_version: 13_000, capability: (8, 0) };

    /// A machine on which `cuda:1` works.
    fn facts() -> CudaFacts {
        let gpu = Some(("NVIDIA A100-SXM4-80GB".to_owned(), (8, 0)));
        CudaFacts { driver_problem: None, driver_version: 13_000, num_devices: 2, gpu }
    }

    fn check(facts: CudaFacts, build: CudaBuild, expected: &str) {
        let error = check_cuda(1, &facts, &build).expect_err("refused").to_string();
        assert_eq!(error, format!("device: cuda:1: {expected}"));
    }

    #[test]
    fn a_machine_that_fits_is_taken() {
        check_cuda(1, &facts(), &BUILD).expect("fits");
        check_cuda(1, &CudaFacts { driver_version: 13_020, ..facts() }, &BUILD).expect("newer drivers fit");
        let newer = CudaFacts { gpu: Some(("NVIDIA H100".into(), (9, 0))), ..facts() };
        check_cuda(1, &newer, &BUILD).expect("newer GPUs fit");
    }

    #[test]
    fn what_is_wrong_with_a_machine_is_one_line() {
        check(
            CudaFacts { driver_problem: Some("CUDA_ERROR_UNKNOWN: unknown error".into()), ..facts() },
            BUILD,
            "the NVIDIA driver does not work here: CUDA_ERROR_UNKNOWN: unknown error",
        );
        check(
            CudaFacts { driver_version: 12_080, ..facts() },
            BUILD,
            "the NVIDIA driver is for CUDA 12.8, this build needs 13.0; update the driver",
        );
        check(CudaFacts { num_devices: 0, gpu: None, ..facts() }, BUILD, "no NVIDIA GPU is visible to this process");
        check(
            CudaFacts { num_devices: 1, gpu: None, ..facts() },
            BUILD,
            "there is no such GPU; this machine has one, cuda:0",
        );
        check(
            CudaFacts { num_devices: 4, gpu: None, ..facts() },
            BUILD,
            "there is no such GPU; this machine has 4, cuda:0 to cuda:3",
        );
        check(
            CudaFacts { gpu: Some(("Tesla V100".into(), (7, 0))), ..facts() },
            BUILD,
            "Tesla V100 has compute capability 7.0; Tale needs 8.0 or later",
        );
        check(
            facts(),
            CudaBuild { capability: (9, 0), ..BUILD },
            "NVIDIA A100-SXM4-80GB has compute capability 8.0; this build is for 9.0 or later",
        );
    }

    /// A driver too old may say nothing sensible of its devices.
    #[test]
    fn the_first_cause_is_named() {
        let old = CudaFacts { driver_version: 11_040, num_devices: 0, gpu: None, ..facts() };
        check(old, BUILD, "the NVIDIA driver is for CUDA 11.4, this build needs 13.0; update the driver");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_so() {
        let error = Placement::open(DeviceSpec::Cuda(0), WeightDtype::Auto).expect_err("not opened").to_string();
        assert!(error.contains("cuda:0") && error.contains("has no CUDA"), "{error}");
    }

    #[test]
    fn some_memory_is_kept_aside() {
        let memory = DeviceMemory { free_bytes: 20 << 30, total_bytes: 25 << 30 };
        assert_eq!(memory.usable_bytes(), (19 << 30) - RESERVE_BYTES);
        assert_eq!(DeviceMemory { free_bytes: 1 << 20, ..memory }.usable_bytes(), 0);
    }

    #[test]
    fn everything_on_a_gpu_has_the_dtype_asked_for() {
        for (asked, expected) in [
            (WeightDtype::Auto, DType::BF16),
            (WeightDtype::Bf16, DType::BF16),
            (WeightDtype::F16, DType::F16),
            (WeightDtype::F32, DType::F32),
        ] {
            let placement = Placement::in_host_memory(DeviceSpec::Cuda(0), asked);
            assert_eq!(placement.compute_dtype, expected);
            for published in [DType::F32, DType::F16, DType::BF16] {
                assert_eq!(placement.matrix_dtype(published), expected);
            }
        }
    }

    #[test]
    fn the_cpu_computes_in_f32_over_matrices_as_published_or_asked() {
        for (asked, published, expected) in [
            (WeightDtype::Auto, DType::BF16, DType::BF16),
            (WeightDtype::Auto, DType::F32, DType::F32),
            (WeightDtype::F16, DType::F32, DType::F16),
            (WeightDtype::F32, DType::BF16, DType::F32),
        ] {
            let placement = Placement::open(DeviceSpec::Cpu, asked).expect("the CPU");
            assert_eq!(placement.compute_dtype, DType::F32);
            assert_eq!(placement.matrix_dtype(published), expected);
        }
    }
}
