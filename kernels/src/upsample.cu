// Nearest-neighbour upsampling by 2: y[2 r + i][2 c + j] = x[r][c] for i, j in {0, 1}.
//
// Mapping: a thread takes a pack of 16 bytes of a row of x and writes it twice as wide into two rows of y; a grid that
// strides over the input. Bytes moved: x once, y (four times as many) once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

/// x [rows, width] to y [2 rows, 2 width]: planes follow one another, so their borders do not matter. `vector` if every
/// row of x starts aligned.
template <typename T>
__device__ void upsample_nearest2d(const T* x, T* y, long rows, long width, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long packs = (width + LEN - 1) / LEN, stride = static_cast<long>(gridDim.x) * blockDim.x;
    for (long item = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * packs; item += stride) {
        const long row = item / packs, start = item % packs * LEN;
        const T* from = x + row * width + start;
        T* to = y + 4 * row * width + 2 * start;
        if (vector) {
            const Pack<T> pack = Pack<T>::load(from);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Pack<T> wide;
#pragma unroll
                for (int i = 0; i < LEN; ++i) wide.values[i] = pack.values[half * (LEN / 2) + i / 2];
                wide.store(to + half * LEN);
                wide.store(to + 2 * width + half * LEN);
            }
        } else {
            for (int i = 0; i < LEN && start + i < width; ++i)
                to[2 * i] = to[2 * i + 1] = to[2 * width + 2 * i] = to[2 * width + 2 * i + 1] = from[i];
        }
    }
}

}  // namespace

#define UPSAMPLE_KERNELS(T, dtype)                                                                            \
    KERNEL(THREADS, upsample_nearest2d_##dtype, const T* x, T* y, long rows, long width, int vector) {        \
        upsample_nearest2d<T>(x, y, rows, width, vector);                                                     \
    }
FOR_EACH_DTYPE(UPSAMPLE_KERNELS)
