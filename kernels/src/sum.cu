// Sums of two tensors.
//
//   sum: y = a + b        sum_rows: y[r][i] = a[r][i] + b[r]
//
// Mapping: one thread per pack of 16 bytes, with a grid that strides over long inputs. Bytes moved: each once. Added in
// f32 and rounded once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

/// a, b, y [len], all aligned to 16 bytes.
template <typename T>
__device__ void sum(const T* a, const T* b, T* y, long len) {
    constexpr int LEN = Pack<T>::LEN;
    const long stride = static_cast<long>(gridDim.x) * blockDim.x * LEN;
    for (long start = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * LEN; start < len; start += stride) {
        if (start + LEN <= len) {
            Pack<T> pack = Pack<T>::load(a + start);
            const Pack<T> other = Pack<T>::load(b + start);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, pack[i] + other[i]);
            pack.store(y + start);
        } else {
            for (long i = start; i < len; ++i) y[i] = rounded<T>(to_float(a[i]) + to_float(b[i]));
        }
    }
}

/// a and y [rows, len], b [rows]; `vector` if every row is aligned.
template <typename T>
__device__ void sum_rows(const T* a, const T* b, T* y, long rows, long len, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long packs = (len + LEN - 1) / LEN, stride = static_cast<long>(gridDim.x) * blockDim.x;
    for (long item = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * packs; item += stride) {
        const long row = item / packs, start = item % packs * LEN;
        const float added = to_float(b[row]);
        const T* from = a + row * len + start;
        T* to = y + row * len + start;
        if (vector) {
            Pack<T> pack = Pack<T>::load(from);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, pack[i] + added);
            pack.store(to);
        } else {
            for (int i = 0; i < LEN && start + i < len; ++i) to[i] = rounded<T>(to_float(from[i]) + added);
        }
    }
}

}  // namespace

#define SUM_KERNELS(T, dtype)                                                                                 \
    KERNEL(THREADS, sum_##dtype, const T* a, const T* b, T* y, long len) { sum<T>(a, b, y, len); }           \
    KERNEL(THREADS, sum_rows_##dtype, const T* a, const T* b, T* y, long rows, long len, int vector) {       \
        sum_rows<T>(a, b, y, rows, len, vector);                                                             \
    }
FOR_EACH_DTYPE(SUM_KERNELS)
