// Norm of queries and keys, and their rotation, in one pass.
//
//   s = x / sqrt(mean(x²) + eps) * weight   over one head, or over all heads of a position; or s = x
//   y[a] = s[a] cos - s[b] sin,  y[b] = s[b] cos + s[a] sin
//
// where pair i of a head is (a, b) = (i, i + d/2) in the half-split layout and (2i, 2i + 1) in the interleaved one, and
// cos, sin (f32) belong to the position and i.
//
// Mapping: per head, one warp each; across heads, one block per position. A thread takes units of 16 bytes (two of them
// in the half-split layout), or single pairs where x is not aligned. Bytes moved: x twice (the second time from the L1
// cache), the result once, the tables once per position (from L2 for all heads but the first).
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP_SIZE;

/// x [batch, l, heads, d] by its strides in values, d contiguous; y contiguous; cos, sin [l, d/2].
template <typename T>
struct Shape {
    const T* x;
    const T* weight;  // [d] or [heads d], null for no norm
    const float* cos;
    const float* sin;
    T* y;
    long l, heads, d, stride_b, stride_l, stride_h;

    __device__ const T* head(long position, long head) const {
        return x + position / l * stride_b + position % l * stride_l + head * stride_h;
    }
};

/// The pairs of one unit of a head.
template <typename T, bool HALF, bool VECTOR>
struct Pairs {
    static constexpr int LEN = VECTOR ? (HALF ? Pack<T>::LEN : Pack<T>::LEN / 2) : 1;
    float a[LEN], b[LEN];

    static __device__ long place_of_b(long first, long d) { return HALF ? first + d / 2 : 2 * first + 1; }

    static __device__ Pairs load(const T* head, long first, long d) {
        Pairs pairs;
        if (!VECTOR) {
            pairs.a[0] = to_float(head[HALF ? first : 2 * first]);
            pairs.b[0] = to_float(head[place_of_b(first, d)]);
        } else if (HALF) {
            const Pack<T> a = Pack<T>::load(head + first), b = Pack<T>::load(head + d / 2 + first);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pairs.a[i] = a[i], pairs.b[i] = b[i];
        } else {
            const Pack<T> both = Pack<T>::load(head + 2 * first);
#pragma unroll
            for (int i = 0; i < LEN; ++i) pairs.a[i] = both[2 * i], pairs.b[i] = both[2 * i + 1];
        }
        return pairs;
    }

    __device__ void store(T* head, long first, long d) const {
        if (!VECTOR) {
            head[HALF ? first : 2 * first] = rounded<T>(a[0]);
            head[place_of_b(first, d)] = rounded<T>(b[0]);
        } else if (HALF) {
            Pack<T> pack_a, pack_b;
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack_a.set(i, a[i]), pack_b.set(i, b[i]);
            pack_a.store(head + first);
            pack_b.store(head + d / 2 + first);
        } else {
            Pack<T> both;
#pragma unroll
            for (int i = 0; i < LEN; ++i) both.set(2 * i, a[i]), both.set(2 * i + 1, b[i]);
            both.store(head + 2 * first);
        }
    }

    __device__ float squares() const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < LEN; ++i) sum += a[i] * a[i] + b[i] * b[i];
        return sum;
    }

    /// Multiplies with `factor` and this head's weights, then turns by the angles of the position.
    __device__ void finish(const T* weight, float factor, const float* cos, const float* sin, long first, long d) {
        if (weight != nullptr) {
            const Pairs weights = load(weight, first, d);
#pragma unroll
            for (int i = 0; i < LEN; ++i) a[i] *= factor * weights.a[i], b[i] *= factor * weights.b[i];
        }
#pragma unroll
        for (int i = 0; i < LEN; ++i) {
            const float c = cos[first + i], s = sin[first + i], x = a[i];
            a[i] = x * c - b[i] * s;
            b[i] = b[i] * c + x * s;
        }
    }
};

/// One warp per head.
template <typename T, bool HALF, bool VECTOR>
__device__ void per_head(const Shape<T>& shape, long positions, float eps) {
    using Unit = Pairs<T, HALF, VECTOR>;
    const long item = static_cast<long>(blockIdx.x) * WARPS + threadIdx.x / WARP_SIZE;
    if (item >= positions * shape.heads) return;
    const long position = item / shape.heads, head = item % shape.heads, half = shape.d / 2;
    const int lane = threadIdx.x % WARP_SIZE;
    const T* from = shape.head(position, head);
    float factor = 1.0f;
    if (shape.weight != nullptr) {
        float squares = 0;
        for (long first = lane * Unit::LEN; first < half; first += WARP_SIZE * Unit::LEN)
            squares += Unit::load(from, first, shape.d).squares();
        factor = rsqrtf(warp_sum(squares) / static_cast<float>(shape.d) + eps);
    }
    const float *cos = shape.cos + position % shape.l * half, *sin = shape.sin + position % shape.l * half;
    for (long first = lane * Unit::LEN; first < half; first += WARP_SIZE * Unit::LEN) {
        Unit unit = Unit::load(from, first, shape.d);
        unit.finish(shape.weight, factor, cos, sin, first, shape.d);
        unit.store(shape.y + item * shape.d, first, shape.d);
    }
}

/// One block per position: the statistics are those of all heads together.
template <typename T, bool HALF, bool VECTOR>
__device__ void across_heads(const Shape<T>& shape, float eps) {
    using Unit = Pairs<T, HALF, VECTOR>;
    __shared__ float scratch[WARP_SIZE];
    const long position = blockIdx.x, half = shape.d / 2, units = half / Unit::LEN;
    float squares = 0;
    for (long i = threadIdx.x; i < shape.heads * units; i += blockDim.x)
        squares += Unit::load(shape.head(position, i / units), i % units * Unit::LEN, shape.d).squares();
    const float factor = rsqrtf(block_sum(squares, scratch) / static_cast<float>(shape.heads * shape.d) + eps);
    const float *cos = shape.cos + position % shape.l * half, *sin = shape.sin + position % shape.l * half;
    for (long i = threadIdx.x; i < shape.heads * units; i += blockDim.x) {
        const long head = i / units, first = i % units * Unit::LEN;
        Unit unit = Unit::load(shape.head(position, head), first, shape.d);
        unit.finish(shape.weight + head * shape.d, factor, cos, sin, first, shape.d);
        unit.store(shape.y + (position * shape.heads + head) * shape.d, first, shape.d);
    }
}

template <typename T, bool HALF>
__device__ void norm_rope(const Shape<T>& shape, long positions, float eps, int across, int vector) {
    if (across) {
        vector ? across_heads<T, HALF, true>(shape, eps) : across_heads<T, HALF, false>(shape, eps);
    } else {
        vector ? per_head<T, HALF, true>(shape, positions, eps) : per_head<T, HALF, false>(shape, positions, eps);
    }
}

}  // namespace

#define ROPE_KERNEL(T, name, half)                                                                                    \
    KERNEL(THREADS, name, const T* x, const T* weight, const float* cos, const float* sin, T* y, long positions,      \
           long l, long heads, long d, long stride_b, long stride_l, long stride_h, float eps, int across,            \
           int vector) {                                                                                              \
        const Shape<T> shape{x, weight, cos, sin, y, l, heads, d, stride_b, stride_l, stride_h};                      \
        norm_rope<T, half>(shape, positions, eps, across, vector);                                                    \
    }
#define ROPE_KERNELS(T, dtype)                      \
    ROPE_KERNEL(T, norm_rope_half_##dtype, true)    \
    ROPE_KERNEL(T, norm_rope_interleaved_##dtype, false)
FOR_EACH_DTYPE(ROPE_KERNELS)
