// Softmax attention of dense queries over dense keys, never all scores at once.
//
//   y = softmax(scale q kᵀ + bias) v   per batch row and head, over the keys that a row sees
//
// One pass over the keys in tiles of 64 (FlashAttention-2, Dao 2023): per query row a reference score, the sum of
// 2^(score - reference) and the sum of values with these weights, both corrected when the reference moves. `scale`
// comes times log2(e), so that an exponential is one multiply-add and one ex2. The reference moves only when a score
// exceeds it by more than LAZY powers of two: any reference gives the same quotient, 2^LAZY is far inside of what f16
// holds, and most tiles of a long row then need no correction. A row is computed from nothing but itself and the keys in
// their order: its bits are the same in any batch.
//
// 16 bits, d <= 128 (attention_64, attention_128): a block of 4 warps has 128 queries of one head, a warp 32 of them as two
// tiles of m16n8k16, so that each fragment of keys or values read from shared memory feeds two products. For one tile
// of keys at d = 128 a warp reads 16 KiB of keys, 16 KiB of values and 8 KiB of queries, 320 cycles at 128 bytes, for
// 2 * 32 * 64 * 128 multiply-adds: 512 cycles of an SM's tensor cores on 8.0, 1024 or more on 8.6 and 8.9. Products are the
// limit there; 16 rows per warp would make it shared memory. On 9.0 they would take 256 cycles at the rate of wgmma,
// which mma.sync does not reach: both limits lie well above the 45 % of it that this kernel is for. Outputs (128
// registers per thread) and scores (64) stay in registers, queries in shared memory for want of more.
//   Keys and values have a slot each, filled by cp.async while the other is multiplied: values come during q kᵀ, the next
// keys during exponentials and p v, with one __syncthreads each. Shared memory for d = 128: 64 KiB, two blocks per SM on
// 8.0 and 9.0 (as registers allow: 2 * 128 * 255), one on 8.6 and 8.9; for d = 64: 32 KiB, three everywhere (168
// registers). The exponentials of a block's tile (8192 at 16 per cycle: 512 cycles) pass beside the products of
// another's (2048 on 8.0, d = 128).
//   The 16-byte chunk c of row r lies at c ^ (r % 8) of its row: the eight rows that an ldmatrix reads, and the chunks that
// eight threads copy, lie in different banks. Heads shorter than 64 or 128 are filled up with zeros by the copies.
// 16 bits, d <= 512 (attention_wide): 16 rows per warp; keys pass in slices of 128 values through the same two slots; a
// block has 128 columns of the output, so that scores are computed d / 128 times: (1 + d / 128) / 2 of the least
// operations, on tensor cores. attention_biased is the same with slices and columns of 64, where scores have a bias: T5.
// f32 (attention_narrow, d <= 128; attention_deep, d <= 512): multiply-adds out of shared memory, keys and values in pieces
// of 64 x 64, 4 x 4 (deep: 2 x 4) scores per thread. 16 bits whose d is not a multiple of 8 come here, too, converted.
//
// Grid: x is [batch, slices, tiles of queries], y is heads. Blocks that run together share keys and values in L2; causal
// ones begin with the longest. Bytes: q, k, v and y once each from DRAM as long as the keys and values of the running
// heads fit into L2 (S = 16k, d = 128: 8 MiB per head), keys and values once per 128 queries from L2. Operations:
// 4 lq lk d, 128 per byte from L2: at the full rate of 8.0's tensor cores a third of its L2's 5120 bytes per cycle.
#include "mma.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING = -INFINITY;
/// By how many powers of two a score may exceed the reference of its row.
constexpr float LAZY = 8.0f;
/// Keys of a tile.
constexpr int KEYS = 64;

#define PARAMETERS(T)                                                                                                \
    const T *q, const T *k, const T *v, const T *bias, const unsigned *key_lens, T *y, int lq, int lk, int heads,    \
        int group, int d, long q_batch, long q_position, long q_head, long k_batch, long k_position, long k_head,    \
        long v_batch, long v_position, long v_head, long bias_head, long bias_row, float scale, int causal
#define ARGUMENTS                                                                                                      \
    q, k, v, bias, key_lens, y, lq, lk, heads, group, d, q_batch, q_position, q_head, k_batch, k_position, k_head,  \
        v_batch, v_position, v_head, bias_head, bias_row, scale, causal

/// What one block computes: some queries of one head of one batch row, the columns of one slice.
template <typename T>
struct Job {
    /// Position 0 of the head; `bias` is null or the head's `[lq, lk]`.
    const T *q, *k, *v, *bias;
    T* y;
    long q_stride, k_stride, v_stride, bias_stride, y_stride;
    int first, lq, len, d, slice;
    /// Of scores in powers of two: times log2(e).
    float scale;
    bool causal;

    /// Strides in values between batch rows, positions and heads; key_lens null or [batch]; y [batch, lq, heads, d].
    __device__ Job(PARAMETERS(T), int rows, int slices)
        : q_stride(q_position), k_stride(k_position), v_stride(v_position), bias_stride(bias_row),
          y_stride(static_cast<long>(heads) * d), lq(lq), d(d), scale(scale), causal(causal != 0) {
        const int tiles = (lq + rows - 1) / rows;
        const int tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
        slice = slices == 1 ? 0 : rest % slices;
        const long batch = rest / slices, head = blockIdx.y, kv_head = head / group;
        first = (this->causal ? tiles - 1 - tile : tile) * rows;
        len = key_lens == nullptr ? lk : min(static_cast<int>(key_lens[batch]), lk);
        this->q = q + batch * q_batch + head * q_head;
        this->k = k + batch * k_batch + kv_head * k_head;
        this->v = v + batch * v_batch + kv_head * v_head;
        this->bias = bias == nullptr ? nullptr : bias + head * bias_head;
        this->y = y + batch * lq * y_stride + head * d;
    }

    /// How many keys a row sees.
    __device__ int visible(int row) const { return causal ? min(len, row + 1) : len; }

    /// What the outputs of a row are multiplied with whose exponentials have this sum, the largest of which is about 1. If
    /// the sum is zero, no score was above minus infinity: NaN where keys have got such scores, zero where they are hidden.
    template <bool BIASED>
    __device__ float factor(int row, float sum) const {
        if (sum != 0.0f) return 1.0f / sum;
        const int keys = row < lq ? visible(row) : 0;
        if (!BIASED) return keys > 0 ? NAN : 0.0f;
        for (int key = 0; key < keys; ++key)
            if (to_float(bias[row * bias_stride + key]) > -INFINITY) return NAN;
        return 0.0f;
    }
};

/// Where a chunk of eight 16-bit values lies in shared memory whose rows have D values.
template <int D>
__device__ __forceinline__ int place(int row, int chunk) {
    return row * D + ((chunk ^ (row & 7)) * 8);
}

/// Where this lane's rows for ldmatrix lie in a tile of rows of D values, in bytes. The xor with 32 n is the place of
/// the fragment 2 n chunks further, the sum with 32 D n that of the one 16 rows further.
template <int D>
struct Lane {
    /// For fragments of a and of transposed b: matrix i is at rows 8 (i % 2) and chunk i / 2.
    int by_rows;
    /// For fragments of b: matrix i is at rows 8 (i / 2) and chunk i % 2.
    int by_chunks;

    __device__ Lane() {
        const int row = threadIdx.x % 8, matrix = threadIdx.x % WARP_SIZE / 8;
        by_rows = 2 * place<D>(matrix % 2 * 8 + row, matrix / 2);
        by_chunks = 2 * place<D>(matrix / 2 * 8 + row, matrix % 2);
    }

    /// Adds zero, which only we know: else ptxas takes what is derived from these places for constants of the loop over
    /// keys, and keeps two dozen of them in registers.
    __device__ __forceinline__ void forget(int key) {
        by_rows += key >> 30;
        by_chunks += key >> 30;
    }
};

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP_SIZE;

/// This thread's share of a copy of rows of D values: chunk `chunk` of every `STEP`th row from `top` on.
template <int D>
struct Share {
    static constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    int top = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;

    /// Where the share of a head's rows begins.
    template <typename T>
    __device__ __forceinline__ const T* of(const T* rows, long stride) const {
        return rows + top * stride + chunk * 8;
    }

    /// Begins to copy the share of the next ROWS rows, of which `rows` exist, with `d` values; zeros for the others.
    template <int ROWS, typename T>
    __device__ __forceinline__ void copy(T* to, const T* from, long stride, int rows, int d) const {
        const int left = chunk * 8 < d ? rows - top : 0;
        T* const first = to + place<D>(top, chunk);
#pragma unroll
        for (int i = 0; i < ROWS / STEP; ++i) {
            // A step is a multiple of eight rows, so the places of a share's chunks are one step apart.
            copy_async_16(first + i * STEP * D, from, i * STEP < left);
            from += STEP * stride;
        }
    }
};

template <typename T>
__device__ __forceinline__ const unsigned char* bytes(const T* values) {
    return reinterpret_cast<const unsigned char*>(values);
}

/// s += q kᵀ over D values: the warp's 16 M rows at `q`, the tile's keys at `k`.
template <typename T, int D, int M>
__device__ __forceinline__ void add_scores(float (&s)[M][KEYS / 8][4], const Lane<D>& lane, const unsigned char* q,
                                           const unsigned char* k) {
    const int q_place = lane.by_rows, k_place = lane.by_chunks;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_x4(a[m], q + m * 32 * D + (q_place ^ (step * 32)));
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            unsigned b[4];
            ldmatrix_x4(b, k + n * 32 * D + (k_place ^ (step * 32)));
            const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16<T>(s[m][2 * n], a[m], left);
                mma_m16n8k16<T>(s[m][2 * n + 1], a[m], right);
            }
        }
    }
}

/// o += p v: scores' fragments of d are, rounded to 16 bits, fragments of a.
template <typename T, int D, int M>
__device__ __forceinline__ void add_values(float (&o)[M][D / 8][4], const float (&p)[M][KEYS / 8][4], const Lane<D>& lane,
                                           const unsigned char* v) {
    const int v_place = lane.by_rows;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = p[m][2 * step + i / 2];
                a[m][i] = pack2<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned b[4];
            ldmatrix_x4_transposed(b, v + step * 32 * D + (v_place ^ (n * 32)));
            const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16<T>(o[m][2 * n], a[m], left);
                mma_m16n8k16<T>(o[m][2 * n + 1], a[m], right);
            }
        }
    }
}

/// Scores of keys from `key` on become scaled and biased ones.
template <typename T, int M>
__device__ __forceinline__ void add_bias(float (&s)[M][KEYS / 8][4], const Job<T>& job, int row, int key) {
    const int lane = threadIdx.x % WARP_SIZE, column = key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = row + m * 16 + half * 8 + lane / 4;
            const T* const line = job.bias + at * job.bias_stride;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int col = column + n * 8 + i;
                    const float term = at < job.lq && col < job.len ? to_float(line[col]) * LOG2_E : 0.0f;
                    float& score = s[m][n][half * 2 + i];
                    score = score * job.scale + term;
                }
        }
}

/// Hides the keys that a row does not see; `row` is the warp's first, `key` the tile's first.
template <typename T, int M>
__device__ __forceinline__ void hide_keys(float (&s)[M][KEYS / 8][4], const Job<T>& job, int row, int key) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int left = job.visible(row + m * 16 + half * 8 + lane / 4) - key - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (n * 8 + i >= left) s[m][n][half * 2 + i] = NOTHING;
        }
}

/// One row's reference score, unscaled, and this thread's share of the sum of its exponentials.
struct Row {
    float reference = NOTHING, sum = 0;

    /// Takes a new largest score into account; what the row has summed so far is to be multiplied with the result.
    __device__ __forceinline__ float rebase(float largest, float scale) {
        // False while every score was hidden: infinity minus itself is not larger than anything.
        const bool moves = (largest - reference) * scale > LAZY;
        const float correction = moves ? exp2_fast((reference - largest) * scale) : 1.0f;
        if (moves) reference = largest;
        return correction;
    }
    /// What is subtracted from scaled scores.
    __device__ __forceinline__ float shift(float scale) const { return reference == NOTHING ? 0.0f : reference * scale; }
};

// fmaxf passes NaN over, so that a reference is never NaN. A score that is NaN becomes an exponential that is, and with it
// the row; so does one that is infinite.

/// Moves the references of rows whose scores exceed them, and corrects what those rows have summed so far.
template <int M, int COLUMNS>
__device__ __forceinline__ void rebase(const float (&s)[M][KEYS / 8][4], float (&o)[M][COLUMNS][4], Row (&rows)[M][2],
                                       float scale) {
    float correction[M][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = rows[m][half].reference;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
                largest = fmaxf(largest, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            // Four neighbouring lanes share a row.
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            correction[m][half] = rows[m][half].rebase(largest, scale);
            moved = moved || correction[m][half] != 1.0f;
        }
    if (!__any_sync(ALL_LANES, moved)) return;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) rows[m][half].sum *= correction[m][half];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] *= correction[m][i / 2];
    }
}

/// Scores become exponentials, and are summed up.
template <int M>
__device__ __forceinline__ void exponentials(float (&s)[M][KEYS / 8][4], Row (&rows)[M][2], float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Row& row = rows[m][i / 2];
                s[m][n][i] = exp2_fast(fmaf(s[m][n][i], scale, -row.shift(scale)));
                row.sum += s[m][n][i];
            }
}

/// The warp's outputs through shared memory of its own (16 M rows of D values) to the rows from `first` on, columns from
/// `columns` on.
template <typename T, int D, int M, bool BIASED>
__device__ __forceinline__ void store_rows(const float (&o)[M][D / 8][4], Row (&sums)[M][2], T* staging,
                                           const Job<T>& job, int first, int columns) {
    const int lane = threadIdx.x % WARP_SIZE, rows = job.lq - first, d = job.d - columns;
    T* const y = job.y + first * job.y_stride + columns;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = sums[m][half].sum;
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            const float factor = job.template factor<BIASED>(first + m * 16 + half * 8 + lane / 4, sum);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                T* const to = staging + place<D>(m * 16 + half * 8 + lane / 4, n) + lane % 4 * 2;
                *reinterpret_cast<unsigned*>(to) = pack2<T>(o[m][n][half * 2] * factor, o[m][n][half * 2 + 1] * factor);
            }
        }
    __syncwarp();
    for (int i = lane; i < 16 * M * (D / 8); i += WARP_SIZE) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        if (row < rows && chunk * 8 < d) Pack<T>::load(staging + place<D>(row, chunk)).store(y + row * job.y_stride + chunk * 8);
    }
}

/// Heads of up to D values, or, in slices of D, of more. 16 M queries per warp. Shared memory: the queries
/// [slices, rows, D], two slots [KEYS, D].
template <typename T, int D, int M, bool SLICED, bool BIASED>
__device__ __forceinline__ void attend(PARAMETERS(T)) {
    constexpr int ROWS = WARPS * 16 * M;
    DYNAMIC_SHARED(shared);
    const int slices = SLICED ? (d + D - 1) / D : 1;
    const Job<T> job(ARGUMENTS, ROWS, slices);
    const int top = threadIdx.x / WARP_SIZE * 16 * M, row = job.first + top;
    const int columns = job.slice * D;
    T* const queries = reinterpret_cast<T*>(shared);
    T* const slots = queries + slices * ROWS * D;
    Lane<D> lane;
    const Share<D> share;
    const T* const k_share = share.of(job.k, job.k_stride);
    const T* const v_share = share.of(job.v + columns, job.v_stride);
    const T* const q_share = share.of(job.q + job.first * job.q_stride, job.q_stride);
    const auto copy_keys = [&](int slot, int key, int slice) {
        share.template copy<KEYS>(slots + slot * KEYS * D, k_share + key * job.k_stride + slice * D, job.k_stride,
                                  job.len - key, job.d - slice * D);
    };
    const auto copy_values = [&](int slot, int key) {
        share.template copy<KEYS>(slots + slot * KEYS * D, v_share + key * job.v_stride, job.v_stride, job.len - key,
                                  job.d - columns);
    };

    float o[M][D / 8][4] = {};
    Row sums[M][2];
    const int keys = job.visible(min(job.first + ROWS, job.lq) - 1);
    for (int slice = 0; slice < slices; ++slice)
        share.template copy<ROWS>(queries + slice * ROWS * D, q_share + slice * D, job.q_stride, job.lq - job.first,
                                  job.d - slice * D);
    if (keys > 0) copy_keys(0, 0, 0);
    copy_async_commit();

    int slot = 0;  // which holds what is multiplied next
    for (int key = 0; key < keys; key += KEYS) {
        lane.forget(key);
        float s[M][KEYS / 8][4] = {};
        for (int slice = 0; slice < slices; ++slice) {
            copy_async_wait<0>();
            __syncthreads();  // the keys are here, and nobody reads the other slot any more
            if (slice + 1 < slices) {
                copy_keys(slot ^ 1, key, slice + 1);
            } else {
                copy_values(slot ^ 1, key);
            }
            copy_async_commit();
            add_scores<T>(s, lane, bytes(queries + (slice * ROWS + top) * D), bytes(slots + slot * KEYS * D));
            slot ^= 1;
        }
        copy_async_wait<0>();
        __syncthreads();  // the values are here, and nobody reads the keys any more
        if (key + KEYS < keys) copy_keys(slot ^ 1, key + KEYS, 0);
        copy_async_commit();
        if (BIASED) add_bias<T, M>(s, job, row, key);
        if (key + KEYS > job.visible(row)) hide_keys<T, M>(s, job, row, key);
        const float scale = BIASED ? 1.0f : job.scale;
        rebase(s, o, sums, scale);
        exponentials(s, sums, scale);
        add_values<T>(o, s, lane, bytes(slots + slot * KEYS * D));
        slot ^= 1;
    }
    // Without any key the queries may still be on their way to where the outputs pass through.
    copy_async_wait<0>();
    __syncthreads();
    store_rows<T, D, M, BIASED>(o, sums, queries + top * D, job, row, columns);
}

constexpr int F32_THREADS = 256;
/// Distance between rows of 64 values in shared memory: 16 bytes more than they need, so that eight rows lie in
/// different banks.
constexpr int F32_STRIDE = 64 + 4;

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

/// Rows `first..first + ROWS`, columns `column..column + 64`, of a head; zeros outside of `rows` and `d`.
template <int ROWS>
__device__ __forceinline__ void load_piece(float* to, int to_stride, const float* from, long stride, int first, int rows,
                                           int column, int d) {
    const int col = threadIdx.x % 64;
#pragma unroll 4
    for (int row = threadIdx.x / 64; row < ROWS; row += F32_THREADS / 64) {
        const bool valid = first + row < rows && column + col < d;
        to[row * to_stride + col] = valid ? from[(first + row) * stride + column + col] : 0.0f;
    }
}

/// Heads of up to D values in f32. Thread (i, j) of 16 x 16 has queries i, i + 16, ...; of a tile of scores keys j,
/// j + 16, ...; of each 64 columns of the output 4 j .. 4 j + 3.
template <int D, int ROWS>
__device__ __forceinline__ void attend_f32(PARAMETERS(float)) {
    constexpr int M = ROWS / 16, PIECES = D / 64, Q_STRIDE = D + 4;
    DYNAMIC_SHARED(shared);
    float* const queries = reinterpret_cast<float*>(shared);  // [ROWS, Q_STRIDE]
    float* const piece = queries + ROWS * Q_STRIDE;           // [KEYS, F32_STRIDE]
    float* const weights = piece + KEYS * F32_STRIDE;         // [ROWS, F32_STRIDE]
    const Job<float> job(ARGUMENTS, ROWS, 1);
    const int top = threadIdx.x / 16, left = threadIdx.x % 16;
    for (int i = 0; i < PIECES && i * 64 < d; ++i)
        load_piece<ROWS>(queries + i * 64, Q_STRIDE, job.q, job.q_stride, job.first, job.lq, i * 64, d);

    float o[PIECES][M][4] = {};
    Row sums[M];
    const int keys = job.visible(min(job.first + ROWS, job.lq) - 1);
    for (int key = 0; key < keys; key += KEYS) {
        float s[M][4] = {};
        for (int column = 0; column < d; column += 64) {
            __syncthreads();  // nobody reads the last piece any more
            load_piece<KEYS>(piece, F32_STRIDE, job.k, job.k_stride, key, job.len, column, d);
            __syncthreads();
#pragma unroll 2
            for (int x = 0; x < 64; x += 4) {
                float4 a[M], b[4];
#pragma unroll
                for (int m = 0; m < M; ++m) a[m] = load4(queries + (top + 16 * m) * Q_STRIDE + column + x);
#pragma unroll
                for (int n = 0; n < 4; ++n) b[n] = load4(piece + (left + 16 * n) * F32_STRIDE + x);
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int n = 0; n < 4; ++n) s[m][n] = dot(a[m], b[n], s[m][n]);
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const int row = job.first + top + 16 * m, visible = job.visible(row);
            float largest = sums[m].reference;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int at = key + left + 16 * n;
                s[m][n] *= job.scale;
                if (job.bias != nullptr && row < job.lq && at < job.len)
                    s[m][n] = fmaf(job.bias[row * job.bias_stride + at], LOG2_E, s[m][n]);
                if (at >= visible) s[m][n] = NOTHING;
                largest = fmaxf(largest, s[m][n]);
            }
#pragma unroll
            for (int distance = 1; distance < 16; distance *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
            const float correction = sums[m].rebase(largest, 1.0f), shift = sums[m].shift(1.0f);
            sums[m].sum *= correction;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float weight = exp2f(s[m][n] - shift);
                sums[m].sum += weight;
                weights[(top + 16 * m) * F32_STRIDE + left + 16 * n] = weight;
            }
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
#pragma unroll
                for (int c = 0; c < 4; ++c) o[i][m][c] *= correction;
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            if (i * 64 >= d) break;
            __syncthreads();  // the weights are written, the last piece is read
            load_piece<KEYS>(piece, F32_STRIDE, job.v, job.v_stride, key, job.len, i * 64, d);
            __syncthreads();
#pragma unroll 2
            for (int x = 0; x < KEYS; x += 4) {
                float4 p[M];
#pragma unroll
                for (int m = 0; m < M; ++m) p[m] = load4(weights + (top + 16 * m) * F32_STRIDE + x);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float4 value = load4(piece + (x + n) * F32_STRIDE + left * 4);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        const float weight = n == 0 ? p[m].x : n == 1 ? p[m].y : n == 2 ? p[m].z : p[m].w;
                        o[i][m][0] = fmaf(weight, value.x, o[i][m][0]);
                        o[i][m][1] = fmaf(weight, value.y, o[i][m][1]);
                        o[i][m][2] = fmaf(weight, value.z, o[i][m][2]);
                        o[i][m][3] = fmaf(weight, value.w, o[i][m][3]);
                    }
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
        float sum = sums[m].sum;
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        const int row = job.first + top + 16 * m;
        if (row >= job.lq) continue;
        const float factor = job.bias == nullptr ? job.template factor<false>(row, sum) : job.template factor<true>(row, sum);
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int col = i * 64 + left * 4 + c;
                if (col < d) job.y[row * job.y_stride + col] = o[i][m][c] * factor;
            }
    }
}

}  // namespace

#define ATTENTION_KERNELS(T, dtype)                                                                                    \
    KERNEL_RESIDENT(THREADS, 3, attention_64_##dtype, PARAMETERS(T)) { attend<T, 64, 2, false, false>(ARGUMENTS); }    \
    KERNEL_RESIDENT(THREADS, 2, attention_128_##dtype, PARAMETERS(T)) { attend<T, 128, 2, false, false>(ARGUMENTS); }  \
    KERNEL_RESIDENT(THREADS, 2, attention_wide_##dtype, PARAMETERS(T)) { attend<T, 128, 1, true, false>(ARGUMENTS); }  \
    KERNEL_RESIDENT(THREADS, 3, attention_biased_##dtype, PARAMETERS(T)) { attend<T, 64, 1, true, true>(ARGUMENTS); }
ATTENTION_KERNELS(f16, f16)
ATTENTION_KERNELS(bf16, bf16)

KERNEL_RESIDENT(F32_THREADS, 2, attention_narrow_f32, PARAMETERS(float)) { attend_f32<128, 64>(ARGUMENTS); }
KERNEL_RESIDENT(F32_THREADS, 1, attention_deep_f32, PARAMETERS(float)) { attend_f32<512, 32>(ARGUMENTS); }
