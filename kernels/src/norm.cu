// Root-mean-square norm, layer norm with modulation, gated residual sum.
//
//   rms_norm:    s = x + residual (or x);  y = s / sqrt(mean(s²) + eps) * weight
//   layer_norm:  n = (x - mean) / sqrt(var + eps);  y = n * weight + bias;  y = y * (1 + scale) + shift
//   gated_sum:   y = x + gate * z
//
// Mapping: one block per row, a row in registers between its reading and its writing as long as it has at most
// REGISTER_PACKS packs per thread, else read again. Bytes moved: each input once (a long row twice or thrice, from L2),
// each output once. Statistics in f32; the variance is that of the differences from the mean, not of E[x²] - mean².
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
/// 256 threads with 4 packs of 8 values hold a row of 8192 16-bit values.
constexpr int REGISTER_PACKS = 4;

/// A row of `dim` values as this thread's share: packs `threadIdx.x`, `+ blockDim.x`, ... The last pack may be cut short,
/// and a row whose start is not aligned goes value by value.
template <typename T>
struct Row {
    static constexpr int LEN = Pack<T>::LEN;
    const T* from;
    const T* plus;  // added to `from` if not null
    long dim;
    bool aligned;

    __device__ Row(const T* from, const T* plus, long dim)
        : from(from), plus(plus), dim(dim), aligned(is_aligned(from) && is_aligned(plus)) {}

    static __device__ bool is_aligned(const T* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }
    __device__ long packs() const { return (dim + LEN - 1) / LEN; }

    __device__ void load(long pack, float (&values)[LEN]) const {
        const long start = pack * LEN;
        if (aligned && start + LEN <= dim) {
            const Pack<T> found = Pack<T>::load(from + start);
#pragma unroll
            for (int i = 0; i < LEN; ++i) values[i] = found[i];
            if (plus != nullptr) {
                const Pack<T> more = Pack<T>::load(plus + start);
#pragma unroll
                for (int i = 0; i < LEN; ++i) values[i] += more[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < LEN; ++i) {
                const bool inside = start + i < dim;
                values[i] = inside ? to_float(from[start + i]) : 0.0f;
                if (inside && plus != nullptr) values[i] += to_float(plus[start + i]);
            }
        }
    }
};

template <typename T>
__device__ void store(T* to, long dim, long pack, const float (&values)[Pack<T>::LEN]) {
    const long start = pack * Pack<T>::LEN;
    if (Row<T>::is_aligned(to) && start + Pack<T>::LEN <= dim) {
        Pack<T> out;
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) out.set(i, values[i]);
        out.store(to + start);
    } else {
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i)
            if (start + i < dim) to[start + i] = rounded<T>(values[i]);
    }
}

/// Calls `visit(pack, values)` for this thread's packs of the row; `cache` keeps the first ones between two visits.
template <typename T, bool FIRST, typename Visit>
__device__ __forceinline__ void for_each_pack(const Row<T>& row, float (&cache)[REGISTER_PACKS][Pack<T>::LEN], Visit visit) {
    const long packs = row.packs();
#pragma unroll
    for (int i = 0; i < REGISTER_PACKS; ++i) {
        const long pack = threadIdx.x + static_cast<long>(i) * blockDim.x;
        if (pack < packs) {
            if (FIRST) row.load(pack, cache[i]);
            visit(pack, cache[i]);
        }
    }
    for (long pack = threadIdx.x + static_cast<long>(REGISTER_PACKS) * blockDim.x; pack < packs; pack += blockDim.x) {
        float values[Pack<T>::LEN];
        row.load(pack, values);
        visit(pack, values);
    }
}

/// x, residual, y, sum [rows, dim]; weight [dim]. residual and sum may be null together.
template <typename T>
__device__ void rms_norm(const T* x, const T* residual, const T* weight, T* y, T* sum, long dim, float eps) {
    __shared__ float scratch[WARP_SIZE];
    const long start = blockIdx.x * dim;
    const Row<T> row(x + start, residual == nullptr ? nullptr : residual + start, dim);
    const Row<T> weights(weight, nullptr, dim);
    float cache[REGISTER_PACKS][Pack<T>::LEN];
    float squares = 0;
    for_each_pack<T, true>(row, cache, [&](long pack, float (&values)[Pack<T>::LEN]) {
        if (sum != nullptr) store(sum + start, dim, pack, values);
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) squares += values[i] * values[i];
    });
    const float factor = rsqrtf(block_sum(squares, scratch) / static_cast<float>(dim) + eps);
    for_each_pack<T, false>(row, cache, [&](long pack, float (&values)[Pack<T>::LEN]) {
        float scaled[Pack<T>::LEN];
        weights.load(pack, scaled);
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) scaled[i] *= values[i] * factor;
        store(y + start, dim, pack, scaled);
    });
}

/// x, y [rows, dim]; weight, bias [dim] or null; scale, shift null or [batch, dim] with `modulation_stride` values from
/// one batch row to the next, `rows_per_batch` rows of x each.
template <typename T>
__device__ void layer_norm(const T* x, const T* weight, const T* bias, const T* scale, const T* shift, T* y, long dim,
                           long rows_per_batch, long modulation_stride, float eps) {
    __shared__ float scratch[WARP_SIZE];
    const long start = blockIdx.x * dim, modulation = blockIdx.x / rows_per_batch * modulation_stride;
    const Row<T> row(x + start, nullptr, dim);
    float cache[REGISTER_PACKS][Pack<T>::LEN];
    float sum = 0;
    for_each_pack<T, true>(row, cache, [&](long, float (&values)[Pack<T>::LEN]) {
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) sum += values[i];
    });
    const float mean = block_sum(sum, scratch) / static_cast<float>(dim);
    float squares = 0;
    for_each_pack<T, false>(row, cache, [&](long pack, float (&values)[Pack<T>::LEN]) {
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i)
            if (pack * Pack<T>::LEN + i < dim) squares += (values[i] - mean) * (values[i] - mean);
    });
    const float factor = rsqrtf(block_sum(squares, scratch) / static_cast<float>(dim) + eps);
    for_each_pack<T, false>(row, cache, [&](long pack, float (&values)[Pack<T>::LEN]) {
        float found[Pack<T>::LEN], more[Pack<T>::LEN];
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) found[i] = (values[i] - mean) * factor;
        // y = y * (offset + factors) + terms, once for weight and bias, once for scale and shift.
        auto affine = [&](const T* factors, const T* terms, float offset) {
            if (factors != nullptr) {
                Row<T>(factors, nullptr, dim).load(pack, more);
#pragma unroll
                for (int i = 0; i < Pack<T>::LEN; ++i) found[i] *= offset + more[i];
            }
            if (terms != nullptr) {
                Row<T>(terms, nullptr, dim).load(pack, more);
#pragma unroll
                for (int i = 0; i < Pack<T>::LEN; ++i) found[i] += more[i];
            }
        };
        affine(weight, bias, 0.0f);
        affine(scale == nullptr ? nullptr : scale + modulation, shift == nullptr ? nullptr : shift + modulation, 1.0f);
        store(y + start, dim, pack, found);
    });
}

/// x, z, y [rows, dim]; gate [batch, dim] as in layer_norm.
template <typename T>
__device__ void gated_sum(const T* x, const T* gate, const T* z, T* y, long dim, long rows_per_batch, long gate_stride) {
    const long start = blockIdx.x * dim;
    const Row<T> xs(x + start, nullptr, dim), zs(z + start, nullptr, dim);
    const Row<T> gates(gate + blockIdx.x / rows_per_batch * gate_stride, nullptr, dim);
    for (long pack = threadIdx.x; pack < xs.packs(); pack += blockDim.x) {
        float sum[Pack<T>::LEN], factors[Pack<T>::LEN], terms[Pack<T>::LEN];
        xs.load(pack, sum);
        gates.load(pack, factors);
        zs.load(pack, terms);
#pragma unroll
        for (int i = 0; i < Pack<T>::LEN; ++i) sum[i] += factors[i] * terms[i];
        store(y + start, dim, pack, sum);
    }
}

}  // namespace

#define NORM_KERNELS(T, dtype)                                                                                         \
    KERNEL(THREADS, rms_norm_##dtype, const T* x, const T* residual, const T* weight, T* y, T* sum, long dim,         \
           float eps) {                                                                                                \
        rms_norm<T>(x, residual, weight, y, sum, dim, eps);                                                            \
    }                                                                                                                  \
    KERNEL(THREADS, layer_norm_##dtype, const T* x, const T* weight, const T* bias, const T* scale, const T* shift,    \
           T* y, long dim, long rows_per_batch, long modulation_stride, float eps) {                                   \
        layer_norm<T>(x, weight, bias, scale, shift, y, dim, rows_per_batch, modulation_stride, eps);                  \
    }                                                                                                                  \
    KERNEL(THREADS, gated_sum_##dtype, const T* x, const T* gate, const T* z, T* y, long dim, long rows_per_batch,     \
           long gate_stride) {                                                                                         \
        gated_sum<T>(x, gate, z, y, dim, rows_per_batch, gate_stride);                                                 \
    }
FOR_EACH_DTYPE(NORM_KERNELS)
