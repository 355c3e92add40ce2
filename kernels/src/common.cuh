// What the kernels share: 16-bit floats, 16-byte packs, reductions over a warp and a block.
//
// Compiled by nvcc for GPUs, and by a C++ compiler against emulator/emulator.h for tests on a machine without one.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
// A kernel with its most threads per block, by which ptxas divides the registers.
#define KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// The same, with the blocks that an SM shall hold at a time.
#define KERNEL_RESIDENT(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// Shared memory whose size the launch decides, aligned for 128-byte lines.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
using f16 = __half;
using bf16 = __nv_bfloat16;
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, f16& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, bf16& y) { y = __float2bfloat16_rn(x); }
#else
#include "emulator.h"
#endif

/// An integer of a cache in 8 bits.
using int8 = signed char;
/// A float of a cache in 8 bits, as in e4m3.rs: cards before 8.9 have no instruction for them, and those that have one round as
/// this does.
struct e4m3 {
    unsigned char bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int8 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(e4m3 x) {
    // As an f32 of these bits it is 2^120 times too small: a shift that takes the sign along, a mask and an exact product, where an
    // integer takes a conversion, of which an SM makes a quarter as many.
    const unsigned moved = static_cast<unsigned>(static_cast<int>(static_cast<int8>(x.bits))) << 20;
    return __uint_as_float(moved & 0x87f00000u) * 0x1p120f;
}
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, int8& y) { y = static_cast<int8>(rintf(x)); }
/// The nearest one, of two the one with an even code; the largest of what is beyond it.
__device__ __forceinline__ void from_float(float x, e4m3& y) {
    const unsigned all = __float_as_uint(x), bits = all & 0x7fffffffu;
    const unsigned code = bits < 0x3c800000u ? static_cast<unsigned>(rintf(__uint_as_float(bits) * 512.0f))
                                             : ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    y.bits = static_cast<unsigned char>((all >> 24 & 0x80u) | (code < 0x7eu ? code : 0x7eu));
}

template <typename T>
__device__ __forceinline__ T rounded(float x) {
    T y;
    from_float(x, y);
    return y;
}

// Instantiates `macro(T, suffix)` for the dtypes that activations have; kernels are called NAME_f32, NAME_f16, NAME_bf16.
#define FOR_EACH_DTYPE(macro) \
    macro(float, f32)         \
    macro(f16, f16)           \
    macro(bf16, bf16)

constexpr int WARP_SIZE = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

/// 16 bytes of values: what one memory transaction of a thread should move.
template <typename T>
struct alignas(16) Pack {
    static constexpr int LEN = 16 / sizeof(T);
    T values[LEN];

    static __device__ __forceinline__ Pack load(const T* from) {
        Pack pack;
        *reinterpret_cast<uint4*>(pack.values) = *reinterpret_cast<const uint4*>(from);
        return pack;
    }
    __device__ __forceinline__ void store(T* to) const {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
    }
    __device__ __forceinline__ float operator[](int i) const { return to_float(values[i]); }
    __device__ __forceinline__ void set(int i, float x) { from_float(x, values[i]); }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

/// The sum over all threads of a block of whole warps, known to each of them. `scratch` holds one float per warp.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    const int warps = blockDim.x / WARP_SIZE;
    __syncthreads();  // of an earlier sum nobody reads any more
    if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
    return total;
}
