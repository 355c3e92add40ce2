//! Paged KV blocks: the caches of all layers, the pool that says who owns which block, one sequence's block table, and the
//! names by which sequences that begin alike share blocks.
//!
//! Deliberately does not know: sessions, models, when a block should be given or taken (the batcher decides).

use candle_core::{DType, Tensor};

use crate::device::Placement;
use crate::error::{Error, Result};

mod pool;
mod prefix;

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
    /// Bytes of one block over all layers, keys and values in `dtype`.
    pub fn block_bytes(&self, dtype: DType) -> usize {
        2 * self.num_layers * BLOCK_SIZE * self.num_key_value_heads * self.head_dim * dtype.size_in_bytes()
    }
}

/// Keys and values of one layer, each `[num_blocks, BLOCK_SIZE, num_key_value_heads, head_dim]`, written in place.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct LayerCache {
    pub k: Tensor,
    pub v: Tensor,
}

/// The caches of all layers.
#[derive(Debug)]
pub struct KvCaches {
    layers: Vec<LayerCache>,
    num_blocks: usize,
    bytes: usize,
}

impl KvCaches {
    /// Caches of `num_blocks` blocks in the compute dtype. On the CPU the zeroed pages are the kernel's until they are first written, so a
    /// large pool costs memory only as far as it is used.
    pub fn new(shape: KvShape, num_blocks: usize, placement: &Placement) -> Result<Self> {
        let dims = (num_blocks, BLOCK_SIZE, shape.num_key_value_heads, shape.head_dim);
        Self::over(shape, num_blocks, placement, || {
            Ok(Tensor::zeros(dims, placement.compute_dtype, &placement.device)?)
        })
    }

    /// As [`KvCaches::new`], but they take no memory and cannot be written, for an inspection.
    pub fn dry(shape: KvShape, num_blocks: usize, placement: &Placement) -> Result<Self> {
        let dims = (num_blocks, BLOCK_SIZE, shape.num_key_value_heads, shape.head_dim);
        let zero = Tensor::zeros((), placement.compute_dtype, &placement.device)?;
        Self::over(shape, num_blocks, placement, || Ok(zero.broadcast_as(dims)?))
    }

    fn over(
        shape: KvShape,
        num_blocks: usize,
        placement: &Placement,
        make: impl Fn() -> Result<Tensor>,
    ) -> Result<Self> {
        // Block tables and slot mappings count in 32 bits.
        if num_blocks.saturating_mul(BLOCK_SIZE) > u32::MAX as usize {
            return Err(Error::Device(format!("a KV cache of {num_blocks} blocks has more slots than 2^32")));
        }
        let layer = |_| Ok(LayerCache { k: make()?, v: make()? });
        let layers = (0..shape.num_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, num_blocks, bytes: num_blocks * shape.block_bytes(placement.compute_dtype) })
    }

    /// One per layer, in order.
    pub fn layers(&self) -> &[LayerCache] {
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
        for (placement, dtype, size) in [(cpu(), DType::F32, 4), (as_on_gpu, DType::BF16, 2)] {
            let caches = KvCaches::new(shape, 5, &placement).expect("allocated");
            let elements: usize = caches.layers().iter().map(|layer| layer.k.elem_count() + layer.v.elem_count()).sum();
            assert_eq!(caches.bytes(), elements * size);
            assert_eq!((caches.layers().len(), caches.num_blocks()), (3, 5));
            assert_eq!(caches.layers()[0].k.dims(), [5, BLOCK_SIZE, 2, 8]);
            assert_eq!((caches.layers()[0].k.dtype(), caches.layers()[2].v.dtype()), (dtype, dtype));
        }
    }

    #[test]
    fn a_cache_that_no_slot_number_can_address_is_refused() {
        let shape = KvShape { num_layers: 1, num_key_value_heads: 1, head_dim: 2 };
        assert!(matches!(KvCaches::new(shape, 1 << 28, &cpu()), Err(Error::Device(_))));
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
        let caches = KvCaches::new(shape, (1 << 30) / shape.block_bytes(DType::F32), &cpu()).expect("allocated");
        assert_eq!(caches.bytes(), 1 << 30);
        // Other tests may run in this process; the pool itself would be 1,048,576 KiB.
        assert!(resident_kib().saturating_sub(before) < 256 * 1024, "the pool's pages are in memory already");
    }
}
