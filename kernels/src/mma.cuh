// Tensor cores and asynchronous copies of sm_80 and later, as functions.
//
// Fragments of mma.m16n8k16, for lane l with g = l / 4 and c = 2 (l % 4):
//   a [16, 16] row-major:    a0 = (g, c..c+1)   a1 = (g + 8, c..c+1)   a2 = (g, c+8..c+9)   a3 = (g + 8, c+8..c+9)
//   b [16, 8] column-major:  b0 = (c..c+1, g)   b1 = (c+8..c+9, g)
//   d [16, 8], f32:          d0, d1 = (g, c..c+1)   d2, d3 = (g + 8, c..c+1)
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

/// Four 8x8 matrices of 16-bit values; lane 8i + r gives the address of row r of matrix i (16 bytes, aligned so). Lane l
/// gets of each matrix row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// The same of the transposed matrices: lane l gets rows 2 (l % 4) and the next, column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// 16 bytes from global to shared memory, past the registers; zeros instead if not `valid`, and `from` is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
    const int bytes_read = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes_read)
                 : "memory");
}
/// The same of the first `bytes_read` bytes only, zeros after them.
__device__ __forceinline__ void copy_async_part(void* to, const void* from, int bytes_read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes_read)
                 : "memory");
}
/// Closes the group of the copies since the last call.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `GROUPS` of this thread's groups are under way.
template <int GROUPS>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

/// Two floats as a register of 16-bit values, the first in the lower half.
template <typename T>
__device__ __forceinline__ unsigned pack2(float low, float high);
template <>
__device__ __forceinline__ unsigned pack2<f16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pack2<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

/// 2^x to about two units in the last place, by one instruction; results below 2^-126 are zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

using emulator::mma_m16n8k16;
inline void ldmatrix_x4(unsigned (&to)[4], const void* row) { emulator::ldmatrix_x4(to, row, false); }
inline void ldmatrix_x4_transposed(unsigned (&to)[4], const void* row) { emulator::ldmatrix_x4(to, row, true); }
inline void copy_async_16(void* to, const void* from, bool valid) { emulator::async_copy(to, from, 16, valid ? 16 : 0); }
inline void copy_async_part(void* to, const void* from, int bytes) { emulator::async_copy(to, from, 16, bytes); }
inline void copy_async_commit() { emulator::async_commit(); }
template <int GROUPS>
inline void copy_async_wait() { emulator::async_wait(GROUPS); }
template <typename T>
unsigned pack2(float low, float high) {
    const T pair[2] = {rounded<T>(low), rounded<T>(high)};
    unsigned bits;
    std::memcpy(&bits, pair, 4);
    return bits;
}
inline float exp2_fast(float x) { return std::exp2(x); }

#endif
