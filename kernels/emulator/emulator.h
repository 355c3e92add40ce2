// CUDA C++ on the host, for tests: enough of the language and its intrinsics that the files src/*.cu compile with a C++
// compiler and run on the CPU, one block after the other, every thread of a block as a fiber.
//
// What it is good for: formulas, indices, fragment layouts, barriers that not all threads reach, copies that nobody
// waited for, copies and matrix loads that are not aligned, reads of memory that nobody wrote (shared memory begins as
// NaN). What it cannot show: races within a warp between two barriers, speed, registers. Tensor core fragments are laid
// out as in the PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const
// One block runs at a time on a host thread, so what its threads share may be static.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::shared_memory()

// A kernel registers itself under its name, to be found by `emulator_launch`.
#define KERNEL(threads, name, ...)                                       \
    static void name(__VA_ARGS__);                                       \
    static const emulator::Registered registered_##name(#name, threads, name); \
    static void name(__VA_ARGS__)

#define KERNEL_RESIDENT(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

// What a lane hands to the others of its warp: at most the fragments a and b of one mma.
constexpr int SLOT_BYTES = 32;
constexpr int WARP = 32;

struct Context {
    Dim3 thread, block, block_dim, grid_dim;
    int lane;
};

Context& context();
unsigned char* shared_memory();
/// Waits for all threads of the block.
void block_barrier();
/// Hands `bytes` of `value` to the warp and waits for its lanes; then `peer(lane)` shows what each handed in, until the
/// next exchange but one.
struct Exchange {
    Exchange(const void* value, int bytes);
    const void* peer(int lane) const;

    const unsigned char (*slots)[SLOT_BYTES];
};
/// Ends the test if a GPU would refuse the access.
void check_alignment(const void* address, int bytes);
void async_copy(void* to, const void* from, int bytes, int bytes_read);
void async_commit();
void async_wait(int groups_left);

/// A kernel by its name, callable through an array of pointers to its arguments, as cuLaunchKernel calls it.
struct Registered {
    using Call = void (*)(void (*)(), void**);

    template <typename... Args>
    Registered(const char* name, int max_threads, void (*kernel)(Args...))
        : name(name), max_threads(max_threads), kernel(reinterpret_cast<void (*)()>(kernel)), call(&invoke<Args...>) {
        next = first();
        first() = this;
    }

    static const Registered*& first() {
        static const Registered* list = nullptr;
        return list;
    }

    const char* name;
    int max_threads;
    void (*kernel)();
    Call call;
    const Registered* next;

  private:
    template <typename... Args>
    static void invoke(void (*kernel)(), void** arguments) {
        apply<Args...>(reinterpret_cast<void (*)(Args...)>(kernel), arguments, std::index_sequence_for<Args...>());
    }
    template <typename... Args, std::size_t... I>
    static void apply(void (*kernel)(Args...), void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_reference_t<Args>*>(arguments[I])...);
    }
};

}  // namespace emulator

#define threadIdx (emulator::context().thread)
#define blockIdx (emulator::context().block)
#define blockDim (emulator::context().block_dim)
#define gridDim (emulator::context().grid_dim)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::Exchange("", 1); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    T found;
    emulator::Exchange exchange(&value, sizeof(T));
    std::memcpy(&found, exchange.peer(lane & 31), sizeof(T));
    return found;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return __shfl_sync(mask, value, emulator::context().lane ^ distance);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
    const int lane = emulator::context().lane;
    return __shfl_sync(mask, value, lane + distance < emulator::WARP ? lane + distance : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const int lane = emulator::context().lane;
    return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const unsigned char mine = vote;
    emulator::Exchange exchange(&mine, 1);
    unsigned votes = 0;
    for (int lane = 0; lane < emulator::WARP; ++lane)
        votes |= static_cast<unsigned>(*static_cast<const unsigned char*>(exchange.peer(lane)) & 1) << lane;
    return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

template <typename T>
T atomicAdd(T* to, T value) {
    const T old = *to;
    *to = old + value;
    return old;
}
template <typename T>
T atomicMax(T* to, T value) {
    const T old = *to;
    if (value > old) *to = value;
    return old;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
// Never joined into one operation that rounds once: build.rs turns contraction off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <typename T>
T __ldg(const T* from) { return *from; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
using std::isfinite;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };

// 16-bit floats: storage, and conversions that round to nearest even.
struct f16 { std::uint16_t bits; };
struct bf16 { std::uint16_t bits; };

inline float to_float(f16 x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return static_cast<float>(y);
}
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline void from_float(float x, f16& y) {
    const _Float16 rounded = static_cast<_Float16>(x);
    std::memcpy(&y, &rounded, 2);
}
inline void from_float(float x, bf16& y) {
    const unsigned bits = __float_as_uint(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The instructions that mma.cuh wraps.
namespace emulator {

template <typename T>
float element(const void* registers, int index) {
    T value;
    std::memcpy(&value, static_cast<const unsigned char*>(registers) + 2 * index, 2);
    return to_float(value);
}

/// d += a b for a [16, 16] row-major and b [16, 8] column-major, both T, over the fragments of a warp.
template <typename T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    Exchange exchange(mine, sizeof(mine));
    const int lane = context().lane, group = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, col = column + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            // Register of a: +1 for the lower eight rows, +2 for the upper eight of k; of b: +1 for the upper eight.
            const int owner = k % 8 / 2, low_high = k % 2;
            const int register_a = row / 8 + k / 8 * 2, register_b = 4 + k / 8;
            const float x = element<T>(exchange.peer(row % 8 * 4 + owner), 2 * register_a + low_high);
            const float y = element<T>(exchange.peer(col * 4 + owner), 2 * register_b + low_high);
            sum += x * y;
        }
        d[i] += sum;
    }
}

/// Four 8x8 matrices of 16-bit values from shared memory; lane 8i + r gives the address of row r of matrix i.
inline void ldmatrix_x4(unsigned (&to)[4], const void* row, bool transposed) {
    check_alignment(row, 16);
    Exchange exchange(&row, sizeof(row));
    const int lane = context().lane;
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const int r = transposed ? lane % 4 * 2 + i : lane / 4;
            const int c = transposed ? lane / 4 : lane % 4 * 2 + i;
            const unsigned char* from;
            std::memcpy(&from, exchange.peer(matrix * 8 + r), sizeof(from));
            std::memcpy(&pair[i], from + 2 * c, 2);
        }
        std::memcpy(&to[matrix], pair, 4);
    }
}

}  // namespace emulator
