//! Launches of `paged.cu`; shapes are checked by the caller.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::cache::Scales;
use super::plan::{FEW_ROWS, MANY_ROWS, NOTHING, Path, Plan, Task, bucket};
use super::{ByteFormat, PagedBatch, PagedCache, Shape};
use crate::gpu::{Launch, address, by_dtype, module, output};

module!(PAGED, "paged");

/// The kernel's name for what a cache holds: numbers of activations' dtype, or of a format of 8 bits.
macro_rules! by_format {
    ($suffix:literal, $format:expr, $dtype:expr) => {
        match $format {
            None => by_dtype!(concat!("paged", $suffix), $dtype),
            Some(ByteFormat::Int8) => by_dtype!(concat!("paged_int8", $suffix), $dtype),
            Some(ByteFormat::E4m3) => by_dtype!(concat!("paged_e4m3", $suffix), $dtype),
        }
    };
}

/// `THREADS` of the file.
const THREADS: usize = 128;
/// `KEYS` and `EXACT_KEYS` of the file.
const KEYS: usize = 64;
const EXACT_KEYS: usize = 32;
/// Largest head: `EXACT_COLUMNS` of the file for each lane of a warp.
const MAX_HEAD: usize = 256;

/// A step's arrays on its device, all parts of one tensor, with how the rows are dealt out.
#[derive(Debug)]
pub(super) struct DeviceBatch {
    plan: Plan,
    shape: Shape,
    /// What the others are parts of.
    all: Tensor,
    /// `[sequences + 1]`, `[sequences]`, `[sequences, table_len]`, `[rows]`, all filled up to their buckets.
    cu_seqlens: Tensor,
    context_lens: Tensor,
    tables: Tensor,
    slots: Tensor,
    /// `[tasks, 2]` each.
    few: Tensor,
    many: Tensor,
}

impl DeviceBatch {
    /// One copy to the device. `cache` says dtype and device.
    pub(super) fn new(batch: &PagedBatch, shape: Shape, cache: &PagedCache) -> Result<Self> {
        if shape.d > MAX_HEAD {
            bail!("paged_attention: heads of {} values are larger than the largest computed, {MAX_HEAD}", shape.d);
        }
        let plan = Plan::new(&shape, cache.dtype(), batch);
        let sequences = bucket(batch.context_lens.len());
        let mut parts = Parts::default();
        let cu_seqlens =
            parts.add(batch.cu_seqlens_q.iter().map(|start| *start as u32), sequences + 1, shape.len as u32);
        let context_lens = parts.add(batch.context_lens.iter().map(|len| *len as u32), sequences, 0);
        let tables = parts.add_tables(&batch.block_tables, sequences, plan.table_len);
        let slots = parts.add(batch.slot_mapping.iter().copied(), bucket(shape.len), NOTHING);
        let few = parts.add_tasks(&plan.few);
        let many = parts.add_tasks(&plan.many);
        let all = parts.upload(cache.k.device())?;
        let part = |(start, len)| all.narrow(0, start, len);
        Ok(Self {
            shape,
            cu_seqlens: part(cu_seqlens)?,
            context_lens: part(context_lens)?,
            tables: part(tables)?,
            slots: part(slots)?,
            few: part(few)?,
            many: part(many)?,
            all,
            plan,
        })
    }

    /// Whether grids and arguments of all launches are the same.
    pub(super) fn launches_as(&self, other: &Self) -> bool {
        let grids = |plan: &Plan| (plan.path, plan.few.len(), plan.splits, plan.many.len(), plan.table_len);
        let is_idle = |plan: &Plan| plan.few.iter().all(|task| task[0] == NOTHING);
        self.shape == other.shape
            && grids(&self.plan) == grids(&other.plan)
            && is_idle(&self.plan) == is_idle(&other.plan)
            && self.all.dims() == other.all.dims()
    }

    pub(super) fn refill(&self, with: &Self) -> Result<()> {
        self.all.slice_set(&with.all, 0, 0)
    }

    pub(super) fn write_kv(&self, k: &Tensor, v: &Tensor, cache: &PagedCache) -> Result<()> {
        let (k, v) = (rows_apart(k, cache.dtype())?, rows_apart(v, cache.dtype())?);
        if let Some(scales) = &cache.scales {
            return self.write_kv_bytes(&k, &v, cache, scales);
        }
        let len = self.shape.kv_heads * self.shape.d;
        let packs = len.div_ceil(16 / k.dtype().size_in_bytes());
        let threads = packs.next_multiple_of(32).clamp(32, 256);
        Launch::new(&PAGED, by_dtype!("write_kv", k.dtype()), [self.shape.len, 2, 1], threads)?
            .tensor(&k)?
            .tensor(&v)?
            .tensor(&cache.k)?
            .tensor(&cache.v)?
            .tensor(&self.slots)?
            .i64(len)
            .i64(k.stride()[0])
            .i64(v.stride()[0])
            .run(&k)
    }

    /// A warp for each head, up to eight at a time.
    fn write_kv_bytes(&self, k: &Tensor, v: &Tensor, cache: &PagedCache, scales: &Scales) -> Result<()> {
        let threads = 32 * self.shape.kv_heads.min(8);
        let name = match scales.format {
            ByteFormat::Int8 => by_dtype!("write_kv_int8", k.dtype()),
            ByteFormat::E4m3 => by_dtype!("write_kv_e4m3", k.dtype()),
        };
        Launch::new(&PAGED, name, [self.shape.len, 2, 1], threads)?
            .tensor(k)?
            .tensor(v)?
            .tensor(&cache.k)?
            .tensor(&cache.v)?
            .tensor(&scales.k)?
            .tensor(&scales.v)?
            .tensor(&self.slots)?
            .i32(self.shape.kv_heads as i32)
            .i32(self.shape.d as i32)
            .i64(k.stride()[0])
            .i64(v.stride()[0])
            .run(k)
    }

    pub(super) fn attention(&self, q: &Tensor, cache: &PagedCache, scale: f64) -> Result<Tensor> {
        let dtypes = [q.dtype(), cache.k.dtype(), cache.v.dtype()];
        let expected = if cache.scales.is_some() { DType::U8 } else { cache.dtype() };
        if dtypes != [cache.dtype(), expected, expected] {
            bail!("paged_attention: queries, keys and values have one dtype on a GPU, got {dtypes:?}");
        }
        let q = self.aligned(q.contiguous()?)?;
        for part in [&cache.k, &cache.v] {
            if self.plan.path == Path::TensorCores && !is_aligned(part)? {
                bail!("paged_attention: caches must begin at a multiple of 16 bytes");
            }
        }
        let out = output(q.shape(), q.dtype(), &q)?;
        let operands = Operands { q: &q, cache, out: &out, scale };
        self.many(&operands)?;
        self.few(&operands)?;
        Ok(out)
    }

    /// What 16-byte reads need: a view into the middle of a tensor may begin anywhere.
    fn aligned(&self, q: Tensor) -> Result<Tensor> {
        if self.plan.path == Path::Exact || is_aligned(&q)? { Ok(q) } else { q.copy() }
    }

    fn many(&self, operands: &Operands<'_>) -> Result<()> {
        let (name, shared) = self.kernel(operands, Rows::Many)?;
        let tasks = Tasks { list: &self.many, count: self.plan.many.len(), splits: 1 };
        self.launch(name, shared, operands, &tasks, None)
    }

    /// Name and bytes of shared memory of the kernel for tiles of few rows, or of many.
    fn kernel(&self, operands: &Operands<'_>, rows: Rows) -> Result<(&'static str, usize)> {
        let (dtype, d) = (operands.q.dtype(), self.shape.d);
        let format = operands.cache.scales.as_ref().map(|scales| scales.format);
        let name = match (self.plan.path, rows, d) {
            (Path::Exact, ..) => by_format!("_exact", format, dtype),
            (Path::TensorCores, Rows::Few, 64) => by_format!("_few_64", format, dtype),
            (Path::TensorCores, Rows::Few, _) => by_format!("_few_128", format, dtype),
            (Path::TensorCores, Rows::Many, 64) => by_format!("_many_64", format, dtype),
            (Path::TensorCores, Rows::Many, _) => by_format!("_many_128", format, dtype),
        };
        let shared_bytes = match (self.plan.path, rows) {
            (Path::Exact, _) => exact_shared_bytes(d),
            (Path::TensorCores, Rows::Few) => tensor_shared_bytes(FEW_ROWS, d),
            (Path::TensorCores, Rows::Many) => tensor_shared_bytes(MANY_ROWS, d),
        };
        Ok((name, shared_bytes))
    }

    fn few(&self, operands: &Operands<'_>) -> Result<()> {
        let (name, shared) = self.kernel(operands, Rows::Few)?;
        if self.plan.few.iter().all(|task| task[0] == NOTHING) {
            return Ok(());
        }
        let tasks = Tasks { list: &self.few, count: self.plan.few.len(), splits: self.plan.splits };
        if tasks.splits == 1 {
            return self.launch(name, shared, operands, &tasks, None);
        }
        let rows = tasks.count * self.shape.kv_heads * tasks.splits * FEW_ROWS;
        let partial = output((rows, self.shape.d), DType::F32, operands.q)?;
        let lse = output(rows, DType::F32, operands.q)?;
        self.launch(name, shared, operands, &tasks, Some((&partial, &lse)))?;
        self.merge(operands.out, &partial, &lse)
    }

    fn launch(
        &self,
        kernel: &'static str,
        shared_bytes: usize,
        operands: &Operands<'_>,
        tasks: &Tasks<'_>,
        partial: Option<(&Tensor, &Tensor)>,
    ) -> Result<()> {
        let log2_e = std::f64::consts::LOG2_E;
        Launch::new(&PAGED, kernel, [tasks.splits, self.shape.kv_heads, tasks.count], THREADS)?
            .shared(shared_bytes)
            .tensor(operands.q)?
            .tensor(&operands.cache.k)?
            .tensor(&operands.cache.v)?
            .optional(operands.cache.scales.as_ref().map(|scales| &scales.k))?
            .optional(operands.cache.scales.as_ref().map(|scales| &scales.v))?
            .tensor(operands.out)?
            .optional(partial.map(|(partial, _)| partial))?
            .optional(partial.map(|(_, lse)| lse))?
            .tensor(&self.cu_seqlens)?
            .tensor(&self.context_lens)?
            .tensor(&self.tables)?
            .tensor(tasks.list)?
            .i64(self.plan.table_len)
            .i32(self.shape.heads as i32)
            .i32(self.shape.kv_heads as i32)
            .i32(self.shape.d as i32)
            .i32(self.shape.block_size as i32)
            .i32(FEW_ROWS as i32)
            .f32((operands.scale * log2_e) as f32)
            .run(operands.q)
    }

    fn merge(&self, out: &Tensor, partial: &Tensor, lse: &Tensor) -> Result<()> {
        let grid = [1, self.shape.kv_heads, self.plan.few.len()];
        Launch::new(&PAGED, by_dtype!("paged_merge", out.dtype()), grid, THREADS)?
            .tensor(out)?
            .tensor(partial)?
            .tensor(lse)?
            .tensor(&self.cu_seqlens)?
            .tensor(&self.context_lens)?
            .tensor(&self.few)?
            .i32(self.shape.heads as i32)
            .i32(self.shape.kv_heads as i32)
            .i32(self.shape.d as i32)
            .i32(FEW_ROWS as i32)
            .i32(self.plan.splits as i32)
            .run(out)
    }
}

struct Operands<'a> {
    q: &'a Tensor,
    cache: &'a PagedCache,
    out: &'a Tensor,
    scale: f64,
}

/// What a kernel's tiles are for.
#[derive(Clone, Copy)]
enum Rows {
    Few,
    Many,
}

struct Tasks<'a> {
    list: &'a Tensor,
    count: usize,
    splits: usize,
}

/// Arrays that travel to the device together. Each begins at a multiple of 16 bytes.
#[derive(Default)]
struct Parts(Vec<u32>);

impl Parts {
    /// `values`, filled up to `len` (at least one); where they lie.
    fn add(&mut self, values: impl Iterator<Item = u32>, len: usize, filling: u32) -> (usize, usize) {
        let start = self.0.len().next_multiple_of(4);
        self.0.resize(start, 0);
        self.0.extend(values);
        let len = len.max(1);
        self.0.resize(start + len, filling);
        (start, len)
    }

    fn add_tables(&mut self, tables: &[Vec<u32>], rows: usize, table_len: usize) -> (usize, usize) {
        let padded = |table: &Vec<u32>| {
            let filling = std::iter::repeat_n(0, table_len - table.len());
            table.clone().into_iter().chain(filling)
        };
        self.add(tables.iter().flat_map(padded), rows * table_len, 0)
    }

    fn add_tasks(&mut self, tasks: &[Task]) -> (usize, usize) {
        self.add(tasks.iter().flatten().copied(), 2 * tasks.len(), NOTHING)
    }

    fn upload(self, device: &Device) -> Result<Tensor> {
        let len = self.0.len();
        Tensor::from_vec(self.0, len, device)
    }
}

/// Shared memory of the tensor cores' kernels: queries, and two stages of keys and values.
fn tensor_shared_bytes(rows: usize, d: usize) -> usize {
    (rows + 2 * 2 * KEYS) * d * DType::F16.size_in_bytes()
}

/// Of the exact kernel: queries, keys, values, exponentials.
fn exact_shared_bytes(d: usize) -> usize {
    let padded = d.next_multiple_of(4);
    (FEW_ROWS * padded + 2 * EXACT_KEYS * (padded + 4) + FEW_ROWS * EXACT_KEYS) * DType::F32.size_in_bytes()
}

fn is_aligned(tensor: &Tensor) -> Result<bool> {
    Ok(address(tensor)?.is_multiple_of(16))
}

/// `[rows, kv_heads, d]` in the dtype that the cache is written from, whose rows are contiguous and may lie apart: parts of one projection.
fn rows_apart(rows: &Tensor, dtype: DType) -> Result<Tensor> {
    let rows = rows.to_dtype(dtype)?;
    let [_, kv_heads, d] = rows.dims() else {
        bail!("write_kv: rows must be [l, kv_heads, d], got {:?}", rows.shape())
    };
    let together = (*kv_heads == 1 || rows.stride()[1] == *d) && (*d == 1 || rows.stride()[2] == 1);
    if together { Ok(rows) } else { rows.contiguous() }
}
