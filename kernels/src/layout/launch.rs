//! Launches of `layout.cu`.

use candle_core::{Result, Tensor, bail};

use crate::gpu::{Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(LAYOUT, "layout");

const THREADS: usize = 256;
/// `TILE` of the file.
const TILE: usize = 32;

pub(super) fn cat(parts: &[&Tensor], dim: usize) -> Result<Tensor> {
    let first = parts[0];
    let mut dims = first.dims().to_vec();
    if dim >= dims.len() {
        bail!("cat: {:?} has no dimension {dim}", first.shape());
    }
    for part in &parts[1..] {
        let fits = part.rank() == dims.len()
            && part.dtype() == first.dtype()
            && part.dims().iter().zip(&dims).enumerate().all(|(i, (found, wanted))| i == dim || found == wanted);
        if !fits {
            let (first_dtype, dtype) = (first.dtype(), part.dtype());
            bail!("cat: {:?} {dtype:?} does not fit {:?} {first_dtype:?}", part.shape(), first.shape());
        }
        dims[dim] += part.dims()[dim];
    }
    let y = output(dims.as_slice(), first.dtype(), first)?;
    let mut start = 0;
    for part in parts {
        let len = part.dims()[dim];
        copy_rows(&Rows::of(part, dim)?, &y.narrow(dim, start, len)?, dim)?;
        start += len;
    }
    Ok(y)
}

/// A tensor as rows of what lies in the dimensions from one on.
struct Rows {
    tensor: Tensor,
    rows: usize,
    len: usize,
    stride: usize,
}

impl Rows {
    fn of(tensor: &Tensor, dim: usize) -> Result<Self> {
        let (dims, strides) = (tensor.dims(), tensor.stride());
        let (rows, len) = (dims[..dim].iter().product(), dims[dim..].iter().product());
        let packed = |range: std::ops::Range<usize>, innermost: usize| {
            let mut expected = innermost;
            range.rev().all(|i| {
                let fits = dims[i] == 1 || strides[i] == expected;
                expected *= dims[i];
                fits
            })
        };
        // The distance between rows is that of the innermost of the dimensions before `dim` that has more than one place.
        let stride = (0..dim).rev().find(|i| dims[*i] > 1).map_or(len, |i| strides[i]);
        match packed(dim..dims.len(), 1) && packed(0..dim, stride) {
            true => Ok(Self { tensor: tensor.clone(), rows, len, stride }),
            false => Ok(Self { tensor: tensor.force_contiguous()?, rows, len, stride: len }),
        }
    }
}

/// `to` is a part of a contiguous tensor along `dim`.
fn copy_rows(from: &Rows, to: &Tensor, dim: usize) -> Result<()> {
    let pack = 16 / to.dtype().size_in_bytes();
    let stride = if dim == 0 { from.len } else { to.stride()[dim - 1] };
    let is_vector = [from.stride, stride].iter().all(|distance| distance % pack == 0)
        && address(&from.tensor)? % 16 == 0
        && address(to)? % 16 == 0;
    let blocks = (from.rows * from.len.div_ceil(pack)).div_ceil(THREADS).min(MAX_WAVES_BLOCKS);
    Launch::new(&LAYOUT, by_dtype!("copy_rows", to.dtype()), [blocks, 1, 1], THREADS)?
        .tensor(&from.tensor)?
        .tensor(to)?
        .i64(from.rows)
        .i64(from.len)
        .i64(from.stride)
        .i64(stride)
        .i32(i32::from(is_vector))
        .run(to)
}

pub(super) fn transpose(x: &Tensor) -> Result<Tensor> {
    let rank = x.rank();
    let matrices = Rows::of(x, rank - 2)?;
    let (m, n) = (x.dims()[rank - 2], x.dims()[rank - 1]);
    let mut dims = x.dims().to_vec();
    dims.swap(rank - 2, rank - 1);
    let y = output(dims, x.dtype(), x)?;
    let grid = [n.div_ceil(TILE), m.div_ceil(TILE), matrices.rows];
    Launch::new(&LAYOUT, by_dtype!("transpose", x.dtype()), grid, THREADS)?
        .tensor(&matrices.tensor)?
        .tensor(&y)?
        .i64(m)
        .i64(n)
        .i64(matrices.stride)
        .run(&y)?;
    Ok(y)
}
