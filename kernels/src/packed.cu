// Matrices of small codes (kernels/src/linear/packed.rs), widened: y[row][order[column]] = (code - zero) * scale.
//
// Mapping: one block per tile of 16 rows and 64 columns, one thread per word of it: eight values of two rows. Bytes moved:
// codes, scales and zeros once, y once. A code's place is what `mma.m16n8k16` takes of a weight in four steps (see tiles.rs).
#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int ROWS = 16, COLUMNS = 64;
/// Words of a plane of a tile.
constexpr int PLANE = THREADS;

/// What codes are, as packed.rs numbers them.
constexpr int BITS_4 = 0, FLOAT_8 = 2;
/// Dtypes of scales likewise.
constexpr int SCALES_F32 = 0, SCALES_F16 = 1;

__device__ __forceinline__ float scale_at(const void* scales, int dtype, long at) {
    if (dtype == SCALES_F32) return static_cast<const float*>(scales)[at];
    if (dtype == SCALES_F16) return to_float(static_cast<const f16*>(scales)[at]);
    return to_float(static_cast<const bf16*>(scales)[at]);
}

template <typename T>
__device__ void dequantise(const unsigned* words, const void* scales, const unsigned char* zeros, const unsigned* order,
                           T* y, long rows, long columns, long group, long rows_per_scale, int code, int scale_dtype) {
    const int planes = code == BITS_4 ? 1 : 2;
    const long tile = static_cast<long>(blockIdx.y) * gridDim.x + blockIdx.x;
    const long groups = (columns + group - 1) / group;
    const unsigned low = words[tile * planes * PLANE + threadIdx.x];
    const unsigned high = planes == 2 ? words[(tile * planes + 1) * PLANE + threadIdx.x] : 0;
    // Thread l of a warp that multiplies has four words, one for each step of 16 columns.
    const int lane = threadIdx.x / 4, step = threadIdx.x % 4;
    const long first_row = static_cast<long>(blockIdx.y) * ROWS + lane / 4;
    const long first_column = static_cast<long>(blockIdx.x) * COLUMNS + step * 16 + lane % 4 * 2;
#pragma unroll
    for (int nibble = 0; nibble < 8; ++nibble) {
        const int pair = nibble % 4, upper = nibble / 4;
        const long row = first_row + pair % 2 * 8, column = first_column + pair / 2 * 8 + upper;
        if (row >= rows || column >= columns) continue;
        const unsigned bits = (low >> (4 * nibble) & 15u) | (high >> (4 * nibble) & 15u) << 4;
        const long at = row / rows_per_scale * groups + column / group;
        const float zero = zeros ? static_cast<float>(zeros[at]) : 0.0f;
        const float value = code == FLOAT_8 ? to_float(e4m3{static_cast<unsigned char>(bits)}) : static_cast<float>(bits) - zero;
        y[row * columns + (order ? static_cast<long>(order[column]) : column)] =
            rounded<T>(value * scale_at(scales, scale_dtype, at));
    }
}

}  // namespace

#define PACKED_KERNELS(T, dtype)                                                                                   \
    KERNEL(THREADS, dequantise_##dtype, const unsigned* words, const void* scales, const unsigned char* zeros,     \
           const unsigned* order, T* y, long rows, long columns, long group, long rows_per_scale, int code,        \
           int scale_dtype) {                                                                                      \
        dequantise<T>(words, scales, zeros, order, y, rows, columns, group, rows_per_scale, code, scale_dtype);    \
    }
FOR_EACH_DTYPE(PACKED_KERNELS)
