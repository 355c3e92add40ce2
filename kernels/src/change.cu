// How much a tensor has changed: mean |a - b| / mean |b|, without a word to the host.
//
// Two launches: blocks sum their share of |a - b| and |b| into partial[2, blocks], then one block sums those and divides.
// Sums in f32 over at most 2^15 values per thread, then over threads and blocks in a fixed order: the same tensors give
// the same bits. Bytes moved: a and b once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

template <typename T>
__device__ void partial_sums(const T* a, const T* b, float* partial, long len, int vector) {
    __shared__ float scratch[WARP_SIZE];
    constexpr int LEN = Pack<T>::LEN;
    float change = 0, size = 0;
    const long first = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long stride = static_cast<long>(gridDim.x) * blockDim.x;
    const long packs = vector ? len / LEN : 0;
    for (long pack = first; pack < packs; pack += stride) {
        const Pack<T> as = Pack<T>::load(a + pack * LEN), bs = Pack<T>::load(b + pack * LEN);
#pragma unroll
        for (int i = 0; i < LEN; ++i) {
            change += fabsf(as[i] - bs[i]);
            size += fabsf(bs[i]);
        }
    }
    for (long i = packs * LEN + first; i < len; i += stride) {
        change += fabsf(to_float(a[i]) - to_float(b[i]));
        size += fabsf(to_float(b[i]));
    }
    change = block_sum(change, scratch);
    size = block_sum(size, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = change;
        partial[gridDim.x + blockIdx.x] = size;
    }
}

}  // namespace

#define CHANGE_KERNEL(T, dtype)                                                                                   \
    KERNEL(THREADS, partial_changes_##dtype, const T* a, const T* b, float* partial, long len, int vector) {      \
        partial_sums<T>(a, b, partial, len, vector);                                                              \
    }
FOR_EACH_DTYPE(CHANGE_KERNEL)

/// Nothing has changed in a tensor that was zero and still is.
KERNEL(THREADS, relative_change, const float* partial, float* y, int blocks) {
    __shared__ float scratch[WARP_SIZE];
    float change = 0, size = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        change += partial[i];
        size += partial[blocks + i];
    }
    change = block_sum(change, scratch);
    size = block_sum(size, scratch);
    if (threadIdx.x == 0) *y = change == 0.0f ? 0.0f : change / size;
}
