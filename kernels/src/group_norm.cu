// Norms of planes: over groups of channels, and over all channels of a position; each with SiLU after it if asked.
//
//   group_stats + group_norm:  y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var of a group of channels
//   group_stats + spatial_norm: the same times a factor plus a term of boxes of values, then SiLU
//   rms_norm_channels:         y = x / max(sqrt(sum of x² over channels), 1e-12) * sqrt(channels) * weight
//
// Group norm. A VAE at full size has 32 groups of up to 10^8 values, so every group is cut into `parts` and two launches
// go over it. group_stats: a block reduces one part to its count, mean and sum of squared differences from that mean.
// Threads take the mean of the values that they hold in registers before they square differences, and all merging is by
// Chan's formula in a fixed order: no cancellation whatever the offset, no atomics, the same bits every time.
// group_norm: the blocks merge the parts of their group (at most one per thread) and normalise their own part, the last
// part of the tensor first, since that is what the L2 cache still holds. Bytes moved: x twice, y once.
//
// spatial_norm: as group_norm; a value finds its factor and term by its frame, row and column. Those lie at the size of
// latents, at most a 64th of x in a VAE, so that the caches hold what boxes share. Bytes moved: x twice, y once.
//
// Channel norm. A block takes one 128-byte line of positions: 8 threads wide, 32 channels at a time; up to REGISTER_PACKS
// packs per thread (256 channels) stay in registers between sum and result. Bytes moved: x once (channels past those in
// registers twice, which the levels of a VAE with so many have small enough for the L2 cache), y once. At most 128
// registers per thread let two blocks share an SM, with up to 64 KB of loads under way.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
/// Of group_stats: 32 values of 16 bits per thread at a time.
constexpr int STATS_PACKS = 4;
/// Of rms_norm_channels.
constexpr int REGISTER_PACKS = 8;
constexpr int LINE_THREADS = 8, LINE_CHANNELS = THREADS / LINE_THREADS;

__device__ __forceinline__ float activated(float x, int silu) { return silu ? x / (1.0f + __expf(-x)) : x; }

/// The first `left` values of a pack, zeros after them.
template <typename T>
__device__ __forceinline__ Pack<T> load(const T* from, long left, int vector) {
    if (vector && left >= Pack<T>::LEN) return Pack<T>::load(from);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::LEN; ++i) {
        pack.set(i, 0.0f);
        if (i < left) pack.values[i] = from[i];
    }
    return pack;
}

template <typename T>
__device__ __forceinline__ void store(T* to, long left, int vector, const Pack<T>& pack) {
    if (vector && left >= Pack<T>::LEN) return pack.store(to);
#pragma unroll
    for (int i = 0; i < Pack<T>::LEN; ++i)
        if (i < left) to[i] = pack.values[i];
}

/// Of some values: how many, their mean, the sum of their squared differences from it.
struct Stats {
    float count = 0, mean = 0, squares = 0;

    __device__ __forceinline__ void merge(const Stats& other) {
        const float total = count + other.count;
        if (other.count == 0) return;
        const float share = other.count / total, distance = other.mean - mean;
        mean += distance * share;
        squares += other.squares + distance * distance * count * share;
        count = total;
    }
};

/// Those of all threads of the block, known to each of them.
__device__ __forceinline__ Stats block_merge(Stats stats) {
    __shared__ Stats of_warps[THREADS / WARP_SIZE];
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        Stats other;
        other.count = __shfl_down_sync(ALL_LANES, stats.count, distance);
        other.mean = __shfl_down_sync(ALL_LANES, stats.mean, distance);
        other.squares = __shfl_down_sync(ALL_LANES, stats.squares, distance);
        // Lanes whose partner does not exist hold what nobody asks for.
        stats.merge(other);
    }
    if (threadIdx.x % WARP_SIZE == 0) of_warps[threadIdx.x / WARP_SIZE] = stats;
    __syncthreads();
    Stats all = of_warps[0];
    for (int warp = 1; warp < THREADS / WARP_SIZE; ++warp) all.merge(of_warps[warp]);
    return all;
}

/// x [groups, len] in parts of `span` values; partials [groups, parts, 3]. `vector` if every group starts aligned.
template <typename T>
__device__ void group_stats(const T* x, float* partials, long len, long span, long parts, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long group = blockIdx.x / parts, part = blockIdx.x % parts;
    const T* from = x + group * len;
    const long end = min(len, (part + 1) * span);
    Stats stats;
    for (long tile = part * span; tile < end; tile += THREADS * STATS_PACKS * LEN) {
        Pack<T> packs[STATS_PACKS];
        float sum = 0, squares = 0, count = 0;
#pragma unroll
        for (int pack = 0; pack < STATS_PACKS; ++pack) {
            const long start = tile + (static_cast<long>(pack) * THREADS + threadIdx.x) * LEN;
            const long left = min(max(end - start, 0L), static_cast<long>(LEN));
            packs[pack] = load(from + start, left, vector);
            count += static_cast<float>(left);
#pragma unroll
            for (int i = 0; i < LEN; ++i) sum += packs[pack][i];
        }
        const float mean = sum / fmaxf(count, 1.0f);
#pragma unroll
        for (int pack = 0; pack < STATS_PACKS; ++pack) {
            const long left = end - tile - (static_cast<long>(pack) * THREADS + threadIdx.x) * LEN;
#pragma unroll
            for (int i = 0; i < LEN; ++i)
                if (i < left) squares += (packs[pack][i] - mean) * (packs[pack][i] - mean);
        }
        Stats found;
        found.count = count;
        found.mean = mean;
        found.squares = squares;
        stats.merge(found);
    }
    const Stats all = block_merge(stats);
    if (threadIdx.x == 0) {
        float* to = partials + 3L * blockIdx.x;
        to[0] = all.count;
        to[1] = all.mean;
        to[2] = all.squares;
    }
}

/// Of a whole group, from its parts.
__device__ __forceinline__ Stats merged(const float* partials, long group, long parts) {
    Stats mine;
    if (threadIdx.x < parts) {
        const float* from = partials + 3 * (group * parts + threadIdx.x);
        mine.count = from[0];
        mine.mean = from[1];
        mine.squares = from[2];
    }
    return block_merge(mine);
}

/// x, y [groups, channels of a group, positions]; weight, bias [num_groups, channels of a group].
template <typename T>
__device__ void group_norm(const T* x, const float* partials, const T* weight, const T* bias, T* y, long len, long span,
                           long parts, long positions, long num_groups, float eps, int silu, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long block = gridDim.x - 1 - static_cast<long>(blockIdx.x);
    const long group = block / parts, start = block % parts * span;
    const Stats stats = merged(partials, group, parts);
    const float mean = stats.mean, factor = rsqrtf(stats.squares / stats.count + eps);
    // Places within the part are divided as 32-bit numbers.
    const long channels = len / positions, channel = group % num_groups * channels + start / positions;
    const unsigned remainder = static_cast<unsigned>(start % positions), plane = static_cast<unsigned>(positions);
    const long count = min(len, start + span) - start;
    for (long place = static_cast<long>(threadIdx.x) * LEN; place < count; place += static_cast<long>(THREADS) * LEN) {
        Pack<T> pack = load(x + group * len + start + place, count - place, vector);
        unsigned position = remainder + static_cast<unsigned>(place);
        long at = channel + position / plane;
        position %= plane;
        float scale = factor * to_float(weight[at]), shift = to_float(bias[at]);
#pragma unroll
        for (int i = 0; i < LEN; ++i) {
            if (position == plane && place + i < count) {
                ++at;
                position = 0;
                scale = factor * to_float(weight[at]);
                shift = to_float(bias[at]);
            }
            pack.set(i, activated((pack[i] - mean) * scale + shift, silu));
            ++position;
        }
        store(y + group * len + start + place, count - place, vector, pack);
    }
}

/// x, y [groups, channels of a group, frames, rows, columns]; weight, bias [num_groups, channels of a group]; factor, term
/// [groups, channels of a group, small_frames, small_rows, small_columns]. The first `lead` frames have one of their own, of
/// the others `box_frames` share one.
template <typename T>
__device__ void spatial_norm(const T* x, const float* partials, const T* weight, const T* bias, const T* factor,
                             const T* term, T* y, long len, long span, long parts, long positions, long num_groups,
                             int rows, int columns, int lead, int small_frames, int small_rows, int small_columns,
                             int box_frames, float eps, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    const long block = gridDim.x - 1 - static_cast<long>(blockIdx.x);
    const long group = block / parts, start = block % parts * span;
    const Stats stats = merged(partials, group, parts);
    const float mean = stats.mean, deviation = rsqrtf(stats.squares / stats.count + eps);
    const long channels = len / positions, first_channel = start / positions;
    const unsigned remainder = static_cast<unsigned>(start % positions), plane = static_cast<unsigned>(positions);
    const unsigned area = static_cast<unsigned>(rows * columns);
    const int box_rows = rows / small_rows, box_columns = columns / small_columns;
    const long count = min(len, start + span) - start;
    for (long place = static_cast<long>(threadIdx.x) * LEN; place < count; place += static_cast<long>(THREADS) * LEN) {
        Pack<T> pack = load(x + group * len + start + place, count - place, vector);
        unsigned position = remainder + static_cast<unsigned>(place);
        long channel = first_channel + position / plane;
        position %= plane;
        int frame = position / area, row = position % area / columns, column = position % columns;
#pragma unroll
        for (int i = 0; i < LEN; ++i) {
            if (place + i < count) {
                const long at = group % num_groups * channels + channel;
                const int small_frame = frame < lead ? frame : lead + (frame - lead) / box_frames;
                const long small = (((group * channels + channel) * small_frames + small_frame) * small_rows +
                                    row / box_rows) * small_columns + column / box_columns;
                const float normed = (pack[i] - mean) * (deviation * to_float(weight[at])) + to_float(bias[at]);
                pack.set(i, activated(normed * to_float(factor[small]) + to_float(term[small]), 1));
            }
            if (++column == columns) {
                column = 0;
                if (++row == rows) {
                    row = 0;
                    if (static_cast<unsigned>(++frame) * area == plane) {
                        frame = 0;
                        ++channel;
                    }
                }
            }
        }
        store(y + group * len + start + place, count - place, vector, pack);
    }
}

/// x, y [batch, channels, positions]; weight [channels]; grid (lines, batch). `vector` if every channel starts aligned.
template <typename T>
__device__ void rms_norm_channels(const T* x, const T* weight, T* y, long channels, long positions, int silu, int vector) {
    constexpr int LEN = Pack<T>::LEN;
    __shared__ float sums[THREADS / WARP_SIZE][LINE_THREADS][LEN];
    const int column = threadIdx.x % LINE_THREADS, first = threadIdx.x / LINE_THREADS;
    const long position = (static_cast<long>(blockIdx.x) * LINE_THREADS + column) * LEN;
    const long left = positions - position;
    const long start = blockIdx.y * channels * positions + position;
    Pack<T> cache[REGISTER_PACKS];
    float squares[LEN] = {};
    auto add = [&](const Pack<T>& pack) {
#pragma unroll
        for (int i = 0; i < LEN; ++i) squares[i] += pack[i] * pack[i];
    };
#pragma unroll
    for (int i = 0; i < REGISTER_PACKS; ++i) {
        const long channel = first + i * LINE_CHANNELS;
        cache[i] = load(x + start + channel * positions, channel < channels ? left : 0, vector);
    }
#pragma unroll
    for (int i = 0; i < REGISTER_PACKS; ++i) add(cache[i]);
    for (long channel = first + REGISTER_PACKS * LINE_CHANNELS; channel < channels; channel += LINE_CHANNELS)
        add(load(x + start + channel * positions, left, vector));
    // A warp holds four channels of the line.
#pragma unroll
    for (int i = 0; i < LEN; ++i) {
        squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], LINE_THREADS);
        squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], 2 * LINE_THREADS);
        if (threadIdx.x % WARP_SIZE < LINE_THREADS) sums[threadIdx.x / WARP_SIZE][column][i] = squares[i];
    }
    __syncthreads();
    float factors[LEN];
#pragma unroll
    for (int i = 0; i < LEN; ++i) {
        float sum = 0;
        for (int warp = 0; warp < THREADS / WARP_SIZE; ++warp) sum += sums[warp][column][i];
        const float length = sqrtf(sum);
        // Not fmaxf, which takes a number rather than NaN.
        factors[i] = sqrtf(static_cast<float>(channels)) / (length < 1e-12f ? 1e-12f : length);
    }
    auto write = [&](long channel, Pack<T> pack) {
        const float scale = to_float(weight[channel]);
#pragma unroll
        for (int i = 0; i < LEN; ++i) pack.set(i, activated(pack[i] * factors[i] * scale, silu));
        store(y + start + channel * positions, left, vector, pack);
    };
#pragma unroll
    for (int i = 0; i < REGISTER_PACKS; ++i) {
        const long channel = first + i * LINE_CHANNELS;
        if (channel < channels) write(channel, cache[i]);
    }
    for (long channel = first + REGISTER_PACKS * LINE_CHANNELS; channel < channels; channel += LINE_CHANNELS)
        write(channel, load(x + start + channel * positions, left, vector));
}

}  // namespace

#define GROUP_NORM_KERNELS(T, dtype)                                                                                   \
    KERNEL(THREADS, group_stats_##dtype, const T* x, float* partials, long len, long span, long parts, int vector) {  \
        group_stats<T>(x, partials, len, span, parts, vector);                                                         \
    }                                                                                                                  \
    KERNEL(THREADS, group_norm_##dtype, const T* x, const float* partials, const T* weight, const T* bias, T* y,      \
           long len, long span, long parts, long positions, long num_groups, float eps, int silu, int vector) {       \
        group_norm<T>(x, partials, weight, bias, y, len, span, parts, positions, num_groups, eps, silu, vector);      \
    }                                                                                                                  \
    KERNEL(THREADS, spatial_norm_##dtype, const T* x, const float* partials, const T* weight, const T* bias,           \
           const T* factor, const T* term, T* y, long len, long span, long parts, long positions, long num_groups,     \
           int rows, int columns, int lead, int small_frames, int small_rows, int small_columns, int box_frames,       \
           float eps, int vector) {                                                                                    \
        spatial_norm<T>(x, partials, weight, bias, factor, term, y, len, span, parts, positions, num_groups, rows,     \
                        columns, lead, small_frames, small_rows, small_columns, box_frames, eps, vector);              \
    }                                                                                                                  \
    KERNEL(THREADS, rms_norm_channels_##dtype, const T* x, const T* weight, T* y, long channels, long positions,      \
           int silu, int vector) {                                                                                     \
        rms_norm_channels<T>(x, weight, y, channels, positions, silu, vector);                                         \
    }
FOR_EACH_DTYPE(GROUP_NORM_KERNELS)
