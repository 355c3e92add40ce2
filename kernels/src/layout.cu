// Values in another order: rows side by side, matrices transposed.
//
//   copy_rows: y[r][i] = x[r][i] of rows that lie some distance apart in either        transpose: y[b][j][i] = x[b][i][j]
//
// Mapping: copy_rows takes one thread per pack of 16 bytes, with a grid that strides over long inputs. transpose takes a
// block per tile of 32 by 32 values, which passes through shared memory, so that reads and writes both go along rows; a
// tile's rows are one value apart from a multiple of the banks. Bytes moved: x once, y once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int TILE = 32;

/// Rows of `len` values, `stride_x` apart in x and `stride_y` in y; `vector` if packs are aligned in both.
template <typename T>
__device__ void copy_rows(const T* x, T* y, long rows, long len, long stride_x, long stride_y, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long packs = (len + LEN - 1) / LEN, stride = static_cast<long>(gridDim.x) * blockDim.x;
    for (long item = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * packs; item += stride) {
        const long row = item / packs, start = item % packs * LEN;
        const T* from = x + row * stride_x + start;
        T* to = y + row * stride_y + start;
        if (vector && start + LEN <= len) {
            Pack<T>::load(from).store(to);
        } else {
            for (int i = 0; i < LEN && start + i < len; ++i) to[i] = from[i];
        }
    }
}

/// x [batch, m, n] to y [batch, n, m], where a matrix of x begins `stride_x` values after the one before. The grid is
/// tiles of columns, tiles of rows, batch.
template <typename T>
__device__ void transpose(const T* x, T* y, long m, long n, long stride_x) {
    __shared__ T tile[TILE][TILE + 1];
    x += blockIdx.z * stride_x;
    y += blockIdx.z * m * n;
    const long row0 = static_cast<long>(blockIdx.y) * TILE, column0 = static_cast<long>(blockIdx.x) * TILE;
    const int lane = threadIdx.x % TILE, first = threadIdx.x / TILE;
    for (int r = first; r < TILE; r += THREADS / TILE) {
        if (row0 + r < m && column0 + lane < n) tile[r][lane] = x[(row0 + r) * n + column0 + lane];
    }
    __syncthreads();
    for (int c = first; c < TILE; c += THREADS / TILE) {
        if (column0 + c < n && row0 + lane < m) y[(column0 + c) * m + row0 + lane] = tile[lane][c];
    }
}

}  // namespace

#define LAYOUT_KERNELS(T, dtype)                                                                                      \
    KERNEL(THREADS, copy_rows_##dtype, const T* x, T* y, long rows, long len, long stride_x, long stride_y,           \
           int vector) {                                                                                              \
        copy_rows<T>(x, y, rows, len, stride_x, stride_y, vector);                                                    \
    }                                                                                                                 \
    KERNEL(THREADS, transpose_##dtype, const T* x, T* y, long m, long n, long stride_x) {                             \
        transpose<T>(x, y, m, n, stride_x);                                                                           \
    }
FOR_EACH_DTYPE(LAYOUT_KERNELS)
