// Attention over a paged KV cache, and the writing of new keys and values into it.
//
//   write_kv:  cache[slots[i]] = row i, for keys and values in one launch
//   paged:     o = softmax(scale · q kᵀ) v for every query row over the keys that it sees: row i of a sequence with n new
//              rows sees keys 0 .. context_len - n + i; keys and values lie in blocks that a table names in order
//
// Rows are packed: the query heads that share a key head are rows of one tile (row r of a sequence is position r / group,
// head r % group), so keys and values are read once for all of them. A block computes one tile for one key head and one
// share ("split") of the keys.
//
//   few_*    16 rows: decode. Four warps take a quarter of each tile of 64 keys, with tensor cores: at a group of 8 the
//            scalar units of an A100 would need as long as the memory. Their results meet in shared memory, those of the
//            splits in `merge`. Grid (splits, key heads, sequences).
//   many_*   64 rows: chunks of prompts. Each of four warps takes 16 rows and all keys of the split.
//   exact_*  16 rows, f32 sums of f32 products: caches in f32, and head sizes other than 64 and 128 up to 256.
//
// A cache may hold numbers of 8 bits, integers or floats, with a scale for each head of each key and value (cache.rs). They come
// through registers, where they are multiplied and rounded to the dtype of the queries, and lie in shared memory as those of 16
// bits do: half of the bytes from memory, under way while the last tile is computed; 2 · 64 · d bytes of a stage are d bytes of each thread.
//
// Bytes moved by decode: each key and value once, 2 · context · d · 2 bytes per sequence and key head; queries, results
// and what splits hand over (d + 1 floats per row and split, at least 128 keys each) are under 2 % of that.
// Latency: a block of few_* has the next 32 KiB (d 128) under way by cp.async while it computes on the last, and two such
// blocks fit into the shared memory of an SM of an A100 (three on Hopper): 64 KiB under way, where 2 TB/s · 600 ns / 108
// SMs ask for 11 KiB (25 KiB on an H200). The work on a tile is some 400 instructions per warp against about 2000 cycles
// that its bytes take to come, so memory is the bound. The host chooses as many splits as make six blocks per SM, so
// that the last wave is short; batch 16 with 8 key heads and 4096 keys gives 896 blocks of 640 keys.
#include "mma.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP_SIZE;
/// Keys of a tile: what one stage of the pipeline holds.
constexpr int KEYS = 64;
/// Rows of a tensor core's tile.
constexpr int WARP_ROWS = 16;
/// Marks a task or a slot that is only there to fill a bucket.
constexpr unsigned NOTHING = 0xffffffffu;

/// What the blocks of one launch share. The cache holds values of C.
template <typename T_, typename C_ = T_>
struct Step {
    using T = T_;
    using C = C_;
    /// Whether the cache holds numbers of 8 bits, which have scales.
    static constexpr bool SCALED = sizeof(C) == 1;
    const T* q;        // [l, heads, d]
    const C* k_cache;  // [num_blocks, block_size, kv_heads, d]
    const C* v_cache;
    const float* k_scales;  // [num_blocks, block_size, kv_heads], or null
    const float* v_scales;
    T* out;          // [l, heads, d]
    float* partial;  // [tasks, kv_heads, splits, task_rows, d], or null where there is one split
    float* lse;      // [tasks, kv_heads, splits, task_rows]: log2 of the sum of exponentials
    const unsigned* cu_seqlens;    // [sequences + 1]
    const unsigned* context_lens;  // [sequences]
    const unsigned* tables;        // [sequences, table_len]
    const unsigned* tasks;         // [tasks, 2]: a sequence, and the first of its packed rows
    long table_len;
    int heads, kv_heads, d, block_size, task_rows;
    float scale;  // times log2(e): exponentials are powers of two

    /// What the outputs of a row are multiplied with whose exponentials have this sum, the largest of which is 1. A sum of
    /// zero adds nothing where there are other splits. Where there are none, no score was above minus infinity, although
    /// every row sees a key: the outputs are zero times infinity then, NaN.
    __device__ float share_of(float sum) const { return sum == 0 && partial != nullptr ? 0.0f : 1.0f / sum; }
};

/// The rows and keys of one block.
struct Tile {
    const unsigned* table;
    long start;  // of the sequence's rows in q
    int group, kv_head;
    int first, rows;        // packed rows
    int seen_by_all;        // keys before the sequence's first new one
    int key_begin, key_end; // of this split

    template <typename S>
    __device__ Tile(const S& step, unsigned sequence, unsigned first_row, int tile_rows, int tile_keys) {
        start = step.cu_seqlens[sequence];
        const int positions = step.cu_seqlens[sequence + 1] - static_cast<int>(start);
        table = step.tables + sequence * step.table_len;
        group = step.heads / step.kv_heads;
        kv_head = blockIdx.y;
        first = first_row;
        rows = min(tile_rows, positions * group - first);
        seen_by_all = static_cast<int>(step.context_lens[sequence]) - positions;
        const int end = visible(rows - 1), splits = gridDim.x;
        const int tiles = (end + tile_keys - 1) / tile_keys, share = (tiles + splits - 1) / splits * tile_keys;
        key_begin = min(end, static_cast<int>(blockIdx.x) * share);
        key_end = min(end, key_begin + share);
    }

    /// A row sees keys `0 .. visible(row)`.
    __device__ int visible(int row) const { return seen_by_all + (first + row) / group + 1; }

    /// Where the values of a row lie in q and out.
    template <typename S>
    __device__ long place(const S& step, int row) const {
        const int packed = first + row;
        return ((start + packed / group) * step.heads + kv_head * group + packed % group) * static_cast<long>(step.d);
    }
};

/// Which row of `partial` and `lse` belongs to a row of a split of this block's task.
template <typename S>
__device__ long partial_row(const S& step, int split, int splits, int row) {
    return ((blockIdx.z * static_cast<long>(step.kv_heads) + blockIdx.y) * splits + split) * step.task_rows + row;
}

/// The factor that moves sums from one largest score to a larger one; nothing was summed below minus infinity.
__device__ float correction(float from, float to) { return from == -INFINITY ? 0.0f : exp2f(from - to); }

/// Rows of 16-bit values in shared memory, D values each, pieces of 16 bytes swapped around so that the eight rows of an
/// 8x8 matrix lie in different banks.
template <typename T, int D>
__device__ T* piece(T* rows, int row, int piece) {
    return rows + row * D + (piece ^ (row % 8)) * 8;
}

template <typename S, int D, int ROW_WARPS>
struct TensorTile {
    using T = typename S::T;
    using C = typename S::C;
    static constexpr int KEY_WARPS = WARPS / ROW_WARPS;
    static constexpr int ROWS = WARP_ROWS * ROW_WARPS;
    static constexpr int WARP_KEYS = KEYS / KEY_WARPS;
    static constexpr int PIECES = D / 8;
    /// Distance between rows of results in shared memory: no two lanes of a half warp in one bank.
    static constexpr int STRIDE = D + 8;
    /// Pieces of 16 numbers of 8 bits of a tile's keys, or of its values, for each thread.
    static constexpr int HELD = S::SCALED ? KEYS * D / 16 / THREADS : 1;

    const S& step;
    const Tile& tile;
    T* q_rows;  // [ROWS, D]
    T* stages;  // [2, keys and values, KEYS, D]
    int lane, row_warp, key_warp;
    int limit[2];  // keys that this lane's rows g and g + 8 see in this split
    unsigned q[D / 16][4];
    float o[D / 8][4], largest[2], sum[2];
    /// Numbers of 8 bits on their way to shared memory: keys, then values.
    Pack<C> held[2][HELD];
    float held_scales[2][HELD];

    __device__ TensorTile(const S& step, const Tile& tile, unsigned char* shared)
        : step(step), tile(tile), q_rows(reinterpret_cast<T*>(shared)), stages(q_rows + ROWS * D) {
        lane = threadIdx.x % WARP_SIZE;
        row_warp = threadIdx.x / WARP_SIZE % ROW_WARPS;
        key_warp = threadIdx.x / WARP_SIZE / ROW_WARPS;
        for (int half = 0; half < 2; ++half) {
            // Rows past the last are copies of it that nobody writes.
            const int row = min(row_warp * WARP_ROWS + lane / 4 + 8 * half, tile.rows - 1);
            limit[half] = min(tile.visible(row), tile.key_end);
            largest[half] = -INFINITY;
            sum[half] = 0;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
    }

    __device__ T* keys(int stage) const { return stages + stage * 2 * KEYS * D; }
    __device__ T* values(int stage) const { return keys(stage) + KEYS * D; }

    __device__ void load_queries() {
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            const int row = i / PIECES, place = i % PIECES;
            const T* from = step.q + tile.place(step, min(row, tile.rows - 1)) + place * 8;
            copy_async_16(piece<T, D>(q_rows, row, place), from, true);
        }
    }

    /// Where a key of this split lies in the cache, and its scale with the scales.
    __device__ long head(int key) const {
        const int shift = __ffs(step.block_size) - 1;
        const long slot = (static_cast<long>(tile.table[key >> shift]) << shift) + (key & (step.block_size - 1));
        return slot * step.kv_heads + tile.kv_head;
    }

    /// Begins to load the tile that begins at key `begin`; keys that this split does not have become zeros.
    __device__ void load_keys(int begin, int stage) {
        if constexpr (S::SCALED) {
            hold_keys(begin);
        } else {
#pragma unroll
            for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
                const int row = i / PIECES, place = i % PIECES, key = begin + row;
                const bool valid = key < tile.key_end;
                const long from = (valid ? head(key) * D : 0) + place * 8;
                copy_async_16(piece<T, D>(keys(stage), row, place), step.k_cache + from, valid);
                copy_async_16(piece<T, D>(values(stage), row, place), step.v_cache + from, valid);
            }
        }
    }

    __device__ void hold_keys(int begin) {
#pragma unroll
        for (int n = 0; n < HELD; ++n) {
            const int i = threadIdx.x + n * THREADS, key = begin + i / (D / 16);
            held[0][n] = held[1][n] = Pack<C>{};
            held_scales[0][n] = held_scales[1][n] = 0;
            if (key >= tile.key_end) continue;
            const long from = head(key), column = i % (D / 16) * 16;
            held[0][n] = Pack<C>::load(step.k_cache + from * D + column);
            held[1][n] = Pack<C>::load(step.v_cache + from * D + column);
            held_scales[0][n] = step.k_scales[from];
            held_scales[1][n] = step.v_scales[from];
        }
    }

    /// What was held, to the stage that nobody reads.
    __device__ void place_keys(int stage) {
        if constexpr (S::SCALED) {
            T* const stages[2] = {keys(stage), values(stage)};
#pragma unroll
            for (int n = 0; n < HELD; ++n) {
                const int i = threadIdx.x + n * THREADS, row = i / (D / 16), place = i % (D / 16) * 2;
#pragma unroll
                for (int half = 0; half < 4; ++half) {
                    const int kind = half / 2, first = half % 2 * 8;
                    Pack<T> out;
                    for (int j = 0; j < 8; ++j) out.set(j, held[kind][n][first + j] * held_scales[kind][n]);
                    out.store(piece<T, D>(stages[kind], row, place + half % 2));
                }
            }
        }
    }

    __device__ void run() {
        load_queries();
        load_keys(tile.key_begin, 0);
        copy_async_commit();
        place_keys(0);
        int stage = 0;
        for (int begin = tile.key_begin; begin < tile.key_end; begin += KEYS, stage ^= 1) {
            const bool has_next = begin + KEYS < tile.key_end;
            if (has_next) load_keys(begin + KEYS, stage ^ 1);
            copy_async_commit();
            copy_async_wait<1>();
            __syncthreads();
            if (begin == tile.key_begin) keep_queries();
            compute(begin + key_warp * WARP_KEYS, keys(stage), values(stage));
            if (has_next) place_keys(stage ^ 1);
            __syncthreads();
        }
        copy_async_wait<0>();
        finish();
    }

    __device__ void keep_queries() {
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            ldmatrix_x4(q[k], piece<T, D>(q_rows, row_warp * WARP_ROWS + lane % 16, 2 * k + lane / 16));
    }

    /// This warp's keys of a tile, the first of which is key `begin`.
    __device__ void compute(int begin, T* keys, T* values) {
        float scores[WARP_KEYS / 8][4];
        multiply_queries(scores, keys);
        weigh(scores, begin);
#pragma unroll
        for (int k = 0; k < WARP_KEYS / 16; ++k) {
            const unsigned p[4] = {
                pack2<T>(scores[2 * k][0], scores[2 * k][1]), pack2<T>(scores[2 * k][2], scores[2 * k][3]),
                pack2<T>(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack2<T>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
            const int row = key_warp * WARP_KEYS + 16 * k + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                unsigned v[4];
                ldmatrix_x4_transposed(v, piece<T, D>(values, row, 2 * n + lane / 16));
                const unsigned left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
                mma_m16n8k16<T>(o[2 * n], p, left);
                mma_m16n8k16<T>(o[2 * n + 1], p, right);
            }
        }
    }

    __device__ void multiply_queries(float (&scores)[WARP_KEYS / 8][4], T* keys) {
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 16; ++n) {
            for (int i = 0; i < 4; ++i) scores[2 * n][i] = scores[2 * n + 1][i] = 0;
            const int row = key_warp * WARP_KEYS + 16 * n + lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                unsigned found[4];
                ldmatrix_x4(found, piece<T, D>(keys, row, 2 * k + lane / 8 % 2));
                const unsigned upper[2] = {found[0], found[1]}, lower[2] = {found[2], found[3]};
                mma_m16n8k16<T>(scores[2 * n], q[k], upper);
                mma_m16n8k16<T>(scores[2 * n + 1], q[k], lower);
            }
        }
    }

    /// Scores to exponentials; what was summed before is scaled to the new largest score.
    __device__ void weigh(float (&scores)[WARP_KEYS / 8][4], int begin) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = largest[half];
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n)
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][2 * half + i];
                    const int key = begin + 8 * n + lane % 4 * 2 + i;
                    score = key < limit[half] ? score * step.scale : -INFINITY;
                    top = fmaxf(top, score);
                }
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            const float factor = correction(largest[half], top);
            largest[half] = top;
            sum[half] *= factor;
            const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n)
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][2 * half + i];
                    score = exp2f(score - base);
                    sum[half] += score;
                }
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                o[n][2 * half] *= factor;
                o[n][2 * half + 1] *= factor;
            }
        }
    }

    /// Brings together what the warps have summed over their keys, and writes it.
    __device__ void finish() {
        __shared__ float largests[KEY_WARPS][ROWS], sums[KEY_WARPS][ROWS];
        float* parts = reinterpret_cast<float*>(stages);  // [KEY_WARPS, ROWS, STRIDE]
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_warp * WARP_ROWS + lane / 4 + 8 * half;
            float total = sum[half];
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            total += __shfl_xor_sync(ALL_LANES, total, 2);
            if (lane % 4 == 0) {
                largests[key_warp][row] = largest[half];
                sums[key_warp][row] = total;
            }
            float* to = parts + (key_warp * ROWS + row) * STRIDE + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                to[8 * n] = o[n][2 * half];
                to[8 * n + 1] = o[n][2 * half + 1];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tile.rows * PIECES; i += THREADS) {
            const int row = i / PIECES, column = i % PIECES * 8;
            float top = -INFINITY, total = 0, found[8] = {};
            for (int part = 0; part < KEY_WARPS; ++part) top = fmaxf(top, largests[part][row]);
            for (int part = 0; part < KEY_WARPS; ++part) {
                const float factor = correction(largests[part][row], top);
                const float* from = parts + (part * ROWS + row) * STRIDE + column;
                total += factor * sums[part][row];
                for (int j = 0; j < 8; ++j) found[j] += factor * from[j];
            }
            const float share = step.share_of(total);
            for (int j = 0; j < 8; ++j) found[j] *= share;
            write(row, column, found, top + log2f(total));
        }
    }

    __device__ void write(int row, int column, const float (&found)[8], float lse) {
        if (step.partial == nullptr) {
            Pack<T> out;
            for (int j = 0; j < 8; ++j) out.set(j, found[j]);
            out.store(step.out + tile.place(step, row) + column);
        } else {
            const long place = partial_row(step, blockIdx.x, gridDim.x, row);
            for (int j = 0; j < 8; ++j) step.partial[place * D + column + j] = found[j];
            if (column == 0) step.lse[place] = lse;
        }
    }
};

/// Keys of a tile of the exact path: one per lane.
constexpr int EXACT_KEYS = WARP_SIZE;
/// Rows of a warp there, and columns of a lane at the largest head.
constexpr int EXACT_ROWS = WARP_ROWS / WARPS;
constexpr int EXACT_COLUMNS = 256 / WARP_SIZE;

/// Rows of f32 in shared memory, `width` apart, which is d filled up with zeros to a multiple of 4, and 4 more for keys
/// so that lanes reading 16 bytes of neighbouring keys meet no bank twice.
template <typename S>
struct ExactTile {
    using T = typename S::T;
    using C = typename S::C;
    const S& step;
    const Tile& tile;
    int padded, width;
    float *q, *k, *v, *p;  // [16, padded] [32, width] [32, width] [16, 32]
    int lane, warp;
    float o[EXACT_ROWS][EXACT_COLUMNS] = {}, largest[EXACT_ROWS], sum[EXACT_ROWS] = {};

    __device__ ExactTile(const S& step, const Tile& tile, unsigned char* shared) : step(step), tile(tile) {
        padded = (step.d + 3) / 4 * 4;
        width = padded + 4;
        q = reinterpret_cast<float*>(shared);
        k = q + WARP_ROWS * padded;
        v = k + EXACT_KEYS * width;
        p = v + EXACT_KEYS * width;
        lane = threadIdx.x % WARP_SIZE;
        warp = threadIdx.x / WARP_SIZE;
        for (int i = 0; i < EXACT_ROWS; ++i) largest[i] = -INFINITY;
    }

    /// Whether row `i` of this warp exists.
    __device__ bool has(int i) const { return warp * EXACT_ROWS + i < tile.rows; }

    __device__ void run() {
        for (int i = threadIdx.x; i < WARP_ROWS * padded; i += THREADS) {
            const int row = i / padded, column = i % padded;
            const bool inside = row < tile.rows && column < step.d;
            q[i] = inside ? to_float(step.q[tile.place(step, row) + column]) : 0.0f;
        }
        for (int begin = tile.key_begin; begin < tile.key_end; begin += EXACT_KEYS) {
            __syncthreads();
            load_keys(begin);
            __syncthreads();
            if (has(0)) {
                weigh(begin);
                __syncwarp();
                sum_values();
            }
        }
        finish();
    }

    __device__ void load_keys(int begin) {
        const bool aligned = step.d % Pack<C>::LEN == 0 && reinterpret_cast<std::uintptr_t>(step.k_cache) % 16 == 0 &&
                             reinterpret_cast<std::uintptr_t>(step.v_cache) % 16 == 0;
        for (int row = warp; row < EXACT_KEYS; row += WARPS) {
            const int key = begin + row;
            float *k_row = k + row * width, *v_row = v + row * width;
            if (key >= tile.key_end) {
                for (int c = lane; c < padded; c += WARP_SIZE) k_row[c] = v_row[c] = 0;
                continue;
            }
            const long slot = static_cast<long>(tile.table[key / step.block_size]) * step.block_size + key % step.block_size;
            const long head = slot * step.kv_heads + tile.kv_head, from = head * step.d;
            float k_scale = 1, v_scale = 1;
            if constexpr (S::SCALED) {
                k_scale = step.k_scales[head];
                v_scale = step.v_scales[head];
            }
            if (aligned) {
                for (int c = lane * Pack<C>::LEN; c < step.d; c += WARP_SIZE * Pack<C>::LEN) {
                    const Pack<C> ks = Pack<C>::load(step.k_cache + from + c), vs = Pack<C>::load(step.v_cache + from + c);
                    for (int i = 0; i < Pack<C>::LEN; ++i) {
                        k_row[c + i] = ks[i] * k_scale;
                        v_row[c + i] = vs[i] * v_scale;
                    }
                }
            } else {
                for (int c = lane; c < padded; c += WARP_SIZE) {
                    k_row[c] = c < step.d ? to_float(step.k_cache[from + c]) * k_scale : 0.0f;
                    v_row[c] = c < step.d ? to_float(step.v_cache[from + c]) * v_scale : 0.0f;
                }
            }
        }
    }

    /// Scores of this warp's rows, one key per lane, and their exponentials into `p`.
    __device__ void weigh(int begin) {
        float scores[EXACT_ROWS] = {};
        for (int c = 0; c < padded; c += 4) {
            const float4 key = *reinterpret_cast<const float4*>(k + lane * width + c);
#pragma unroll
            for (int i = 0; i < EXACT_ROWS; ++i) {
                const float4 x = *reinterpret_cast<const float4*>(q + (warp * EXACT_ROWS + i) * padded + c);
                scores[i] += x.x * key.x + x.y * key.y + x.z * key.z + x.w * key.w;
            }
        }
#pragma unroll
        for (int i = 0; i < EXACT_ROWS; ++i) {
            const int row = warp * EXACT_ROWS + i, limit = has(i) ? min(tile.visible(row), tile.key_end) : 0;
            const float score = begin + lane < limit ? scores[i] * step.scale : -INFINITY;
            const float top = fmaxf(largest[i], warp_max(score));
            const float factor = correction(largest[i], top);
            const float weight = correction(score, top);
            largest[i] = top;
            sum[i] = sum[i] * factor + warp_sum(weight);
            p[row * EXACT_KEYS + lane] = weight;
#pragma unroll
            for (int j = 0; j < EXACT_COLUMNS; ++j) o[i][j] *= factor;
        }
    }

    /// A lane takes every 32nd column.
    __device__ void sum_values() {
        for (int key = 0; key < EXACT_KEYS; ++key) {
            float weights[EXACT_ROWS];
#pragma unroll
            for (int i = 0; i < EXACT_ROWS; ++i) weights[i] = p[(warp * EXACT_ROWS + i) * EXACT_KEYS + key];
#pragma unroll
            for (int j = 0; j < EXACT_COLUMNS; ++j) {
                const int column = lane + j * WARP_SIZE;
                if (column >= step.d) break;
                const float value = v[key * width + column];
#pragma unroll
                for (int i = 0; i < EXACT_ROWS; ++i) o[i][j] += weights[i] * value;
            }
        }
    }

    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < EXACT_ROWS; ++i) {
            if (!has(i)) continue;
            const int row = warp * EXACT_ROWS + i;
            const long place = step.partial == nullptr ? tile.place(step, row)
                                                       : partial_row(step, blockIdx.x, gridDim.x, row) * step.d;
            const float share = step.share_of(sum[i]);
#pragma unroll
            for (int j = 0; j < EXACT_COLUMNS; ++j) {
                const int column = lane + j * WARP_SIZE;
                if (column >= step.d) break;
                if (step.partial == nullptr) step.out[place + column] = rounded<T>(o[i][j] * share);
                else step.partial[place + column] = o[i][j] * share;
            }
            if (step.partial != nullptr && lane == 0) step.lse[place / step.d] = largest[i] + log2f(sum[i]);
        }
    }
};

/// Runs this block's tile, if it has one.
template <typename Compute, typename S>
__device__ void run_tile(const S& step, int tile_rows, int tile_keys) {
    DYNAMIC_SHARED(shared);
    const unsigned sequence = step.tasks[2 * blockIdx.z], first = step.tasks[2 * blockIdx.z + 1];
    if (sequence == NOTHING) return;
    const Tile tile(step, sequence, first, tile_rows, tile_keys);
    if (tile.key_begin < tile.key_end) {
        Compute(step, tile, shared).run();
    } else if (static_cast<int>(threadIdx.x) < tile.rows) {
        // Fewer tiles of keys than splits; only splits of few rows come here.
        step.lse[partial_row(step, blockIdx.x, gridDim.x, threadIdx.x)] = -INFINITY;
    }
}

/// The results of all splits of a task, each weighed by its sum of exponentials. One warp per row; grid (1, kv_heads,
/// tasks).
template <typename T>
__device__ void merge(const Step<T>& step, int splits) {
    const unsigned sequence = step.tasks[2 * blockIdx.z], first = step.tasks[2 * blockIdx.z + 1];
    if (sequence == NOTHING) return;
    const Tile tile(step, sequence, first, WARP_ROWS, KEYS);
    const int lane = threadIdx.x % WARP_SIZE;
    for (int row = threadIdx.x / WARP_SIZE; row < tile.rows; row += WARPS) {
        float top = -INFINITY, total = 0;
        for (int split = 0; split < splits; ++split) top = fmaxf(top, step.lse[partial_row(step, split, splits, row)]);
        for (int split = 0; split < splits; ++split)
            total += correction(step.lse[partial_row(step, split, splits, row)], top);
        for (int column = lane; column < step.d; column += WARP_SIZE) {
            float found = 0;
            for (int split = 0; split < splits; ++split) {
                const long place = partial_row(step, split, splits, row);
                const float factor = correction(step.lse[place], top);
                // A split without keys has written no values.
                if (factor > 0) found += factor * step.partial[place * step.d + column];
            }
            step.out[tile.place(step, row) + column] = rounded<T>(found / total);
        }
    }
}

/// k, v [rows, len] with their distances between rows; caches [slots, len]. Grid (rows, 2): keys, then values.
template <typename T>
__device__ void write_kv(const T* k, const T* v, T* k_cache, T* v_cache, const unsigned* slots, long len, long k_stride,
                         long v_stride) {
    const unsigned slot = slots[blockIdx.x];
    if (slot == NOTHING) return;
    const T* from = blockIdx.y == 0 ? k + blockIdx.x * k_stride : v + blockIdx.x * v_stride;
    T* to = (blockIdx.y == 0 ? k_cache : v_cache) + slot * len;
    const bool aligned = (reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to)) % 16 == 0;
    const long packed = aligned ? len / Pack<T>::LEN * Pack<T>::LEN : 0;
    for (long i = threadIdx.x * static_cast<long>(Pack<T>::LEN); i < packed; i += blockDim.x * Pack<T>::LEN)
        Pack<T>::load(from + i).store(to + i);
    for (long i = packed + threadIdx.x; i < len; i += blockDim.x) to[i] = from[i];
}

/// The largest number of a head: `ByteFormat::largest` of cache.rs.
template <typename C>
struct Largest;
template <>
struct Largest<int8> {
    static constexpr float VALUE = 127;
};
template <>
struct Largest<e4m3> {
    static constexpr float VALUE = 448;
};
/// What a head's values must reach: `SMALLEST` of cache.rs.
constexpr float SMALLEST_HEAD = 1e-30f;

/// k, v [rows, kv_heads, d] with their distances between rows, in 8 bits, and scales; a warp for each head. Grid (rows, 2).
template <typename T, typename C>
__device__ void write_kv_bytes(const T* k, const T* v, C* k_cache, C* v_cache, float* k_scales, float* v_scales,
                               const unsigned* slots, int kv_heads, int d, long k_stride, long v_stride) {
    constexpr float LARGEST = Largest<C>::VALUE;
    const unsigned slot = slots[blockIdx.x];
    if (slot == NOTHING) return;
    const bool is_key = blockIdx.y == 0;
    const T* row = is_key ? k + blockIdx.x * k_stride : v + blockIdx.x * v_stride;
    const int lane = threadIdx.x % WARP_SIZE;
    for (int head = threadIdx.x / WARP_SIZE; head < kv_heads; head += blockDim.x / WARP_SIZE) {
        const T* from = row + static_cast<long>(head) * d;
        const long place = static_cast<long>(slot) * kv_heads + head;
        C* to = (is_key ? k_cache : v_cache) + place * d;
        float largest = 0, spoiled = 0;
        for (int c = lane; c < d; c += WARP_SIZE) {
            const float magnitude = fabsf(to_float(from[c]));
            // Neither infinity nor NaN is below it.
            if (!(magnitude < INFINITY)) spoiled = 1;
            largest = fmaxf(largest, magnitude);
        }
        largest = warp_max(largest);
        spoiled = warp_max(spoiled);
        const bool is_zero = spoiled > 0 || largest < SMALLEST_HEAD;
        const float inverse = is_zero ? 0.0f : LARGEST / largest;
        for (int c = lane; c < d; c += WARP_SIZE) from_float(is_zero ? 0.0f : to_float(from[c]) * inverse, to[c]);
        if (lane == 0) (is_key ? k_scales : v_scales)[place] = spoiled > 0 ? NAN : is_zero ? 0.0f : largest / LARGEST;
    }
}

}  // namespace

#define PAGED_KERNEL(T, C, name, Compute, tile_rows, tile_keys)                                                        \
    KERNEL(THREADS, name, const T* q, const C* k_cache, const C* v_cache, const float* k_scales,                       \
           const float* v_scales, T* out, float* partial, float* lse, const unsigned* cu_seqlens,                      \
           const unsigned* context_lens, const unsigned* tables, const unsigned* tasks, long table_len, int heads,     \
           int kv_heads, int d, int block_size, int task_rows, float scale) {                                          \
        const Step<T, C> step{q,          k_cache,      v_cache, k_scales, v_scales,  out,   partial,  lse,            \
                              cu_seqlens, context_lens, tables,  tasks,    table_len, heads, kv_heads, d,              \
                              block_size, task_rows,    scale};                                                        \
        run_tile<Compute>(step, tile_rows, tile_keys);                                                                 \
    }
#define COMMA ,
#define TENSOR_KERNELS_OVER(T, C, prefix, dtype)                                                                       \
    PAGED_KERNEL(T, C, prefix##_few_64_##dtype, TensorTile<Step<T COMMA C> COMMA 64 COMMA 1>, WARP_ROWS, KEYS)         \
    PAGED_KERNEL(T, C, prefix##_few_128_##dtype, TensorTile<Step<T COMMA C> COMMA 128 COMMA 1>, WARP_ROWS, KEYS)       \
    PAGED_KERNEL(T, C, prefix##_many_64_##dtype, TensorTile<Step<T COMMA C> COMMA 64 COMMA WARPS>, WARPS * WARP_ROWS,  \
                 KEYS)                                                                                                 \
    PAGED_KERNEL(T, C, prefix##_many_128_##dtype, TensorTile<Step<T COMMA C> COMMA 128 COMMA WARPS>,                   \
                 WARPS * WARP_ROWS, KEYS)
#define TENSOR_KERNELS(T, dtype)                    \
    TENSOR_KERNELS_OVER(T, T, paged, dtype)         \
    TENSOR_KERNELS_OVER(T, int8, paged_int8, dtype) \
    TENSOR_KERNELS_OVER(T, e4m3, paged_e4m3, dtype)
TENSOR_KERNELS(f16, f16)
TENSOR_KERNELS(bf16, bf16)

#define BYTE_KERNELS(T, C, name, dtype)                                                                                \
    PAGED_KERNEL(T, C, paged_##name##_exact_##dtype, ExactTile<Step<T COMMA C>>, WARP_ROWS, EXACT_KEYS)                \
    KERNEL(256, write_kv_##name##_##dtype, const T* k, const T* v, C* k_cache, C* v_cache, float* k_scales,            \
           float* v_scales, const unsigned* slots, int kv_heads, int d, long k_stride, long v_stride) {                \
        write_kv_bytes<T, C>(k, v, k_cache, v_cache, k_scales, v_scales, slots, kv_heads, d, k_stride, v_stride);      \
    }

#define COMMON_KERNELS(T, dtype)                                                                                       \
    PAGED_KERNEL(T, T, paged_exact_##dtype, ExactTile<Step<T>>, WARP_ROWS, EXACT_KEYS)                                 \
    BYTE_KERNELS(T, int8, int8, dtype)                                                                                 \
    BYTE_KERNELS(T, e4m3, e4m3, dtype)                                                                                 \
    KERNEL(THREADS, paged_merge_##dtype, T* out, float* partial, float* lse, const unsigned* cu_seqlens,               \
           const unsigned* context_lens, const unsigned* tasks, int heads, int kv_heads, int d, int task_rows,         \
           int splits) {                                                                                               \
        Step<T> step{};                                                                                                \
        step.out = out, step.partial = partial, step.lse = lse;                                                        \
        step.cu_seqlens = cu_seqlens, step.context_lens = context_lens, step.tasks = tasks;                            \
        step.heads = heads, step.kv_heads = kv_heads, step.d = d, step.task_rows = task_rows;                          \
        merge(step, splits);                                                                                           \
    }                                                                                                                  \
    KERNEL(256, write_kv_##dtype, const T* k, const T* v, T* k_cache, T* v_cache, const unsigned* slots, long len,     \
           long k_stride, long v_stride) {                                                                             \
        write_kv<T>(k, v, k_cache, v_cache, slots, len, k_stride, v_stride);                                           \
    }
FOR_EACH_DTYPE(COMMON_KERNELS)
