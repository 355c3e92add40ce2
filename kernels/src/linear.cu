// What a matrix product by cuBLAS leaves over: bias, table look-ups.
//
//   add_bias:   y[row, col] += bias[col]
//   embedding:  y[row, :] = table[ids[row], :]
//
// Mapping: one thread per pack of 16 bytes. Bytes moved: add_bias reads and writes y once (the bias stays in the L1
// cache), embedding reads and writes each row once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

/// y [rows, dim] of a dim that is whole packs if `vector`, bias [dim].
template <typename T>
__device__ void add_bias(T* y, const T* bias, long rows, long dim, int vector) {
    const long first = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long stride = static_cast<long>(gridDim.x) * blockDim.x;
    if (vector) {
        constexpr int LEN = Pack<T>::LEN;
        const long packs = dim / LEN;
        for (long item = first; item < rows * packs; item += stride) {
            Pack<T> pack = Pack<T>::load(y + item * LEN);
            const Pack<T> terms = Pack<T>::load(bias + item % packs * LEN);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, pack[i] + terms[i]);
            pack.store(y + item * LEN);
        }
    } else {
        for (long item = first; item < rows * dim; item += stride)
            y[item] = rounded<T>(to_float(y[item]) + to_float(bias[item % dim]));
    }
}

/// One block per row. An id outside of the table gives NaN, which whoever reads the result will notice.
template <typename T>
__device__ void embedding(const unsigned* ids, const T* table, T* y, long num, long dim, int vector) {
    const long id = ids[blockIdx.x];
    const T* from = table + (id < num ? id : 0) * dim;
    T* to = y + blockIdx.x * dim;
    if (vector && id < num) {
        constexpr int LEN = Pack<T>::LEN;
        for (long i = threadIdx.x; i < dim / LEN; i += blockDim.x) Pack<T>::load(from + i * LEN).store(to + i * LEN);
    } else {
        for (long i = threadIdx.x; i < dim; i += blockDim.x)
            to[i] = id < num ? from[i] : rounded<T>(__int_as_float(0x7fffffff));
    }
}

}  // namespace

#define LINEAR_KERNELS(T, dtype)                                                                            \
    KERNEL(THREADS, add_bias_##dtype, T* y, const T* bias, long rows, long dim, int vector) {               \
        add_bias<T>(y, bias, rows, dim, vector);                                                            \
    }                                                                                                       \
    KERNEL(THREADS, embedding_##dtype, const unsigned* ids, const T* table, T* y, long num, long dim, int vector) { \
        embedding<T>(ids, table, y, num, dim, vector);                                                      \
    }
FOR_EACH_DTYPE(LINEAR_KERNELS)
