//! Paged KV blocks: the caches of all layers, the pool that says who owns which block, one sequence's block table, and the
//! names by which sequences that begin alike share blocks.
//!
//! Deliberately does not know: sessions, models, when a block should be given or taken (the batcher decides).

use candle_core::{DType, Tensor};
use tale_kernels::PagedCache;

use crate::device::Placement;
use crate::error::{Error, Result};

mod format;
mod pool;
mod prefix;

pub use format::{KvCacheDtype, KvFormat};
pub use pool::{BlockPool, BlockTable, Forecast};
pub use prefix::{BlockHash, BlockHasher, BlockNames, PrefixCache, Scope};

/// Tokens in one block. A multiple of 32, as the paged attention kernels for GPUs want it.
pub const BLOCK_SIZE: usize = 32;

/// Blocks that `num_tokens` tokens take.
pub fn blocks_for(num_tokens: usize) -> usize {
    num_tokens.div_ceil(BLOCK_SIZE)
}

/// What one token leaves in the cache. Names as in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct KvShape {
    pub num_layers: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of the keys and values of one token over all layers.
    pub fn token_bytes(&self, format: KvFormat) -> usize {
        2 * self.num_layers * self.num_key_value_heads * format.head_bytes(self.head_dim)
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self, format: KvFormat) -> usize {
        BLOCK_SIZE * self.token_bytes(format)
    }
}

/// The caches of all layers.
#[derive(Debug)]
pub struct KvCaches {
    layers: Vec<PagedCache>,
    num_blocks: usize,
    bytes: usize,
}

impl KvCaches {
    /// Caches of `num_blocks` blocks. On the CPU the zeroed pages are the kernel's until they are first written, so a large
    /// pool costs memory only as far as it is used.
    pub fn new(shape: KvShape, format: KvFormat, num_blocks: usize, placement: &Placement) -> Result<Self> {
        let zeros = |dims: &[usize], dtype| Ok(Tensor::zeros(dims, dtype, &placement.device)?);
        Self::over(shape, format, num_blocks, placement, zeros)
    }

    /// As [`KvCaches::new`], but they take no memory and cannot be written, for an inspection.
    pub fn dry(shape: KvShape, format: KvFormat, num_blocks: usize, placement: &Placement) -> Result<Self> {
        let one = |dims: &[usize], dtype| Ok(Tensor::zeros((), dtype, &placement.device)?.broadcast_as(dims)?);
        Self::over(shape, format, num_blocks, placement, one)
    }

    fn over(
        shape: KvShape,
        format: KvFormat,
        num_blocks: usize,
        placement: &Placement,
        make: impl Fn(&[usize], DType) -> Result<Tensor>,
    ) -> Result<Self> {
        // Block tables and slot mappings count in 32 bits.
        if num_blocks.saturating_mul(BLOCK_SIZE) > u32::MAX as usize {
            return Err(Error::Device(format!("a KV cache of {num_blocks} blocks has more slots than 2^32")));
        }
        let dims = [num_blocks, BLOCK_SIZE, shape.num_key_value_heads, shape.head_dim];
        let values = || make(&dims, format.dtype());
        let scales = || make(&dims[..3], DType::F32);
        let layer = |_| match format {
            KvFormat::Floats(_) => Ok(PagedCache::new(values()?, values()?)),
            KvFormat::Bytes(format) => {
                let (values, scales) = ([values()?, values()?], [scales()?, scales()?]);
                Ok(PagedCache::bytes(format, values, scales, placement.compute_dtype))
            }
        };
        let layers = (0..shape.num_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, num_blocks, bytes: num_blocks * shape.block_bytes(format) })
    }

    /// One per layer, in order.
    pub fn layers(&self) -> &[PagedCache] {
        &self.layers
    }

    /// Blocks of each layer.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Bytes of all layers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};

    fn cpu() -> Placement {
        Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU")
    }

    #[test]
    fn sizes_are_those_of_the_tensors() {
        let shape = KvShape { num_layers: 3, num_key_value_heads: 2, head_dim: 8 };
        let as_on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
        let (on_cpu, on_gpu) = (KvFormat::computed(&cpu()), KvFormat::computed(&as_on_gpu));
        for (placement, format, dtype, head_bytes) in [
            (cpu(), on_cpu, DType::F32, 8 * 4),
            (as_on_gpu, on_gpu, DType::BF16, 8 * 2),
            (cpu(), KvFormat::INT8, DType::U8, 8 + 4),
            (cpu(), KvFormat::FP8, DType::U8, 8 + 4),
        ] {
            let caches = KvCaches::new(shape, format, 5, &placement).expect("allocated");
            let heads: usize =
                caches.layers().iter().map(|layer| layer.k().elem_count() + layer.v().elem_count()).sum();
            assert_eq!(caches.bytes(), heads / 8 * head_bytes);
            assert_eq!((caches.layers().len(), caches.num_blocks()), (3, 5));
            assert_eq!(caches.layers()[0].k().dims(), [5, BLOCK_SIZE, 2, 8]);
            assert_eq!((caches.layers()[0].k().dtype(), caches.layers()[2].v().dtype()), (dtype, dtype));
        }
    }

    #[test]
    fn eight_bits_hold_about_twice_the_tokens_of_sixteen() {
        let shape = KvShape { num_layers: 32, num_key_value_heads: 8, head_dim: 128 };
        assert_eq!(shape.token_bytes(KvFormat::Floats(DType::BF16)), 128 << 10);
        assert_eq!([KvFormat::INT8, KvFormat::FP8].map(|format| shape.token_bytes(format)), [66 << 10; 2]);
    }

    #[test]
    fn a_cache_that_no_slot_number_can_address_is_refused() {
        let shape = KvShape { num_layers: 1, num_key_value_heads: 1, head_dim: 2 };
        let format = KvFormat::computed(&cpu());
        assert!(matches!(KvCaches::new(shape, format, 1 << 28, &cpu()), Err(Error::Device(_))));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_unused_pool_takes_no_memory() {
        let resident_kib = || -> usize {
            let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("and this line");
            line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("in KiB")
        };
        let shape = KvShape { num_layers: 4, num_key_value_heads: 8, head_dim: 128 };
        let before = resident_kib();
        let format = KvFormat::computed(&cpu());
        let caches = KvCaches::new(shape, format, (1 << 30) / shape.block_bytes(format), &cpu()).expect("allocated");
        assert_eq!(caches.bytes(), 1 << 30);
        // Other tests may run in this process; the pool itself would be 1,048,576 KiB.
        assert!(resident_kib().saturating_sub(before) < 256 * 1024, "the pool's pages are in memory already");
    }
}
