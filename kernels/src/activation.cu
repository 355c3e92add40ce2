// Activations, alone and as gates.
//
//   unary: y = f(x)        gated: y = f(a) * b
//
// f by its number: 0 silu, 1 gelu (tanh), 2 gelu (erf), 3 quick gelu,
// 4 x itself. Mapping: one thread per pack of 16 bytes, with
// a grid that strides over long inputs; for `gated`, y is the grid's row, so that a and b may be halves of wider rows.
// Bytes moved: every input once, the output once.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(int f, float x) {
    switch (f) {
        case 0: return x * sigmoid(x);
        case 1:
            // (1 + tanh u) / 2 is the sigmoid of 2u, u = sqrt(2 / pi) (x + 0.044715 x³).
            return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
        case 2: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case 3: return x * sigmoid(1.702f * x);
        default: return x;
    }
}

/// x, y [len], both aligned to 16 bytes.
template <typename T>
__device__ void unary(const T* x, T* y, long len, int f) {
    constexpr int LEN = Pack<T>::LEN;
    const long stride = static_cast<long>(gridDim.x) * blockDim.x * LEN;
    for (long start = (static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x) * LEN; start < len; start += stride) {
        if (start + LEN <= len) {
            Pack<T> pack = Pack<T>::load(x + start);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, activate(f, pack[i]));
            pack.store(y + start);
        } else {
            for (long i = start; i < len; ++i) y[i] = rounded<T>(activate(f, to_float(x[i])));
        }
    }
}

/// Rows of a and b lie `stride_a` and `stride_b` values apart, those of y `dim`; `vector` if packs are aligned in all.
template <typename T>
__device__ void gated(const T* a, const T* b, T* y, long rows, long dim, long stride_a, long stride_b, int f, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long packs = (dim + LEN - 1) / LEN;
    const long stride = static_cast<long>(gridDim.x) * blockDim.x;
    for (long item = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * packs; item += stride) {
        const long row = item / packs, start = item % packs * LEN;
        const T *gate = a + row * stride_a + start, *value = b + row * stride_b + start;
        T* to = y + row * dim + start;
        if (vector && start + LEN <= dim) {
            Pack<T> pack = Pack<T>::load(gate);
            const Pack<T> values = Pack<T>::load(value);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, activate(f, pack[i]) * values[i]);
            pack.store(to);
        } else {
            for (int i = 0; i < LEN && start + i < dim; ++i)
                to[i] = rounded<T>(activate(f, to_float(gate[i])) * to_float(value[i]));
        }
    }
}

}  // namespace

#define ACTIVATION_KERNELS(T, dtype)                                                                                \
    KERNEL(THREADS, unary_##dtype, const T* x, T* y, long len, int f) { unary<T>(x, y, len, f); }                  \
    KERNEL(THREADS, gated_##dtype, const T* a, const T* b, T* y, long rows, long dim, long stride_a, long stride_b, \
           int f, int vector) {                                                                                     \
        gated<T>(a, b, y, rows, dim, stride_a, stride_b, f, vector);                                                \
    }
FOR_EACH_DTYPE(ACTIVATION_KERNELS)
