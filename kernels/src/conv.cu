// Convolutions of pictures and clips, as an implicit matrix product: y = W x with W [out, in · taps] and x the values that
// every tap sees, which are never written anywhere but into shared memory.
//
//   y[b, o, f, r, c] = bias[o] + sum over i, dt, dy, dx of
//                      weight[dt, dy, dx, o, i] * x[b, i, f s_t + dt - lead, r s + dy - top, c s + dx - left]
//
// Frames before the first of x come from `past`, a tensor of its own; what lies before that, and around a frame, is zero or
// the nearest value. With upsampling, rows and columns of x are halved as they are looked up. All of this stands in a
// table `places` of the tile's neighbourhood, made once per block.
//
// Mapping. A block of 4 warps computes CHANNELS results (128, 96 or 32) at 8 x 16 positions of a frame; blocks of the
// same positions follow one another, so that they find x in L2. It goes through x in slabs: 64 bytes of input channels (32
// of 16 bits) at all positions that the tile sees of a frame, transposed on their way into shared memory so that a
// position's channels lie side by side. A tap is then no more than an offset of positions, and one slab serves the taps of
// a frame (of all frames, if the kernel has one row and column). Each step multiplies one tap: 2 warps x 2 warps of
// CHANNELS / 2 x 64 results on tensor cores (mma.m16n8k16; f32 by multiply-adds in the same layout). Weights of the
// next two steps arrive meanwhile by cp.async, and a tap's share of the next slab through registers: its loads are issued
// before the products of the step and stored after them.
//
// Bytes and operations. Per step and warp of the 128-channel tile 16 ldmatrix for 64 mma: half of the shared memory's rate
// at the full rate of an A100's tensor cores. Device memory: x about 1.4 times per slab of a frame and once from L2 per
// block of output channels, y once; weights from L2, 8 KB per step. Two blocks fit on an SM (48 KB of shared memory each,
// 128 accumulators in at most 255 registers per thread), so that one computes while the other waits at a barrier. Shared
// memory is swizzled: eight neighbours of 64 bytes are read in one go.
#include "mma.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int TILE_ROWS = 8, TILE_COLUMNS = 16;
/// Bytes of a position in a slab and of an output channel in a step's weights, in four pieces.
constexpr int LINE = 64, PIECE = 16, PIECES = 4;
constexpr int STAGES = 3;
/// Pieces of the next slab that a thread holds during a step.
constexpr int HELD = 4;
/// Tiles of 8 positions that a warp computes: four rows of two.
constexpr int COLUMN_TILES = 8;

/// All in values; see `Shape` in conv.rs.
struct Geometry {
    int inner, out, t, past, h, w, frames_out, h_out, w_out, kt, kh, kw, stride_t, stride, lead, top, left, upsample;
    /// Whether the first frame stands before itself, and edge values beyond the edges.
    int repeat_frame, repeat_edge;
    /// From one output channel's weights to the next.
    int pitch;

    __device__ int frames_per_slab() const { return kh * kw == 1 ? kt : 1; }
    __device__ int slab_columns() const { return (TILE_COLUMNS - 1) * stride + kw; }
    /// Positions of one frame in a slab.
    __device__ int plane() const { return ((TILE_ROWS - 1) * stride + kh) * slab_columns(); }
    __device__ int positions() const { return frames_per_slab() * plane(); }

    /// Where padded row (or column) `padded` lies in a picture of `len`; -1 among zeros.
    __device__ int place(int padded, int before, int len) const {
        int place = padded - before;
        if (place < 0 || place >= len * upsample) {
            if (!repeat_edge) return -1;
            place = place < 0 ? 0 : len * upsample - 1;
        }
        return place / upsample;
    }
};

/// The results of a block.
struct Tile {
    int batch, frame, row, column, out;

    template <int CHANNELS>
    static __device__ Tile of_block(const Geometry& g) {
        unsigned block = blockIdx.x;
        auto next = [&](int count) {
            const unsigned index = block % static_cast<unsigned>(count);
            block /= static_cast<unsigned>(count);
            return static_cast<int>(index);
        };
        Tile tile;
        tile.out = next((g.out + CHANNELS - 1) / CHANNELS) * CHANNELS;
        tile.column = next((g.w_out + TILE_COLUMNS - 1) / TILE_COLUMNS) * TILE_COLUMNS;
        tile.row = next((g.h_out + TILE_ROWS - 1) / TILE_ROWS) * TILE_ROWS;
        tile.frame = next(g.frames_out);
        tile.batch = static_cast<int>(block);
        return tile;
    }
};

/// Where piece `piece` of line `line` lies: eight lines that follow one another have it in eight different banks.
__device__ __forceinline__ int swizzled(int line, int piece) { return line * LINE + (piece ^ (line / 2 % 4)) * PIECE; }

/// One frame as the slab reads it; zeros if `from` is null.
template <typename T>
struct Source {
    const T* from;
    long channel_stride;

    __device__ Source(const T* x, const T* past, const Geometry& g, const Tile& tile, int dt) {
        const long size = static_cast<long>(g.h) * g.w, planes = static_cast<long>(tile.batch) * g.inner;
        const int of_x = tile.frame * g.stride_t + dt - g.lead;
        int of_past = of_x + g.past;
        channel_stride = size * g.t;
        from = x + planes * channel_stride + max(of_x, 0) * size;
        if (of_x >= 0) return;
        if (of_past < 0 && !g.repeat_frame) {
            from = nullptr;
        } else if (g.past > 0) {
            channel_stride = size * g.past;
            from = past + planes * channel_stride + max(of_past, 0) * size;
        }
    }
};

/// A thread's way through the pieces of one slab after the other: positions `threadIdx.x`, `+ THREADS`, ... of each piece
/// of channels.
template <typename T>
struct Filling {
    static constexpr int LEN = Pack<T>::LEN;
    const T *x, *past;
    const Geometry& g;
    const Tile& tile;
    const int* places;
    const int plane, positions;
    /// The slab's first tap of time and first channel.
    int first_dt = 0, first_channel = 0;
    int position, piece;
    Source<T> source;
    int source_dt = 0;

    __device__ Filling(const T* x, const T* past, const Geometry& g, const Tile& tile, const int* places)
        : x(x), past(past), g(g), tile(tile), places(places), plane(g.plane()), positions(g.positions()),
          source(x, past, g, tile, 0) {
        begin();
    }
    __device__ void begin() {
        position = threadIdx.x;
        piece = 0;
        settle();
    }
    __device__ void next_slab() {
        first_dt += g.frames_per_slab();
        if (first_dt == g.kt) {
            first_dt = 0;
            first_channel += PIECES * LEN;
        }
        begin();
    }
    __device__ void next() {
        position += THREADS;
        settle();
    }
    __device__ void settle() {
        while (position >= positions && piece < PIECES) {
            position -= positions;
            ++piece;
        }
    }
    /// Whether every piece of the slab is filled, or there is no such slab.
    __device__ bool done() const { return piece >= PIECES || first_channel >= g.inner; }
    __device__ int place_in_slab() const { return swizzled(position, piece); }

    __device__ Pack<T> fetch() {
        int dt = first_dt, of_frame = position;
        for (; of_frame >= plane; of_frame -= plane) ++dt;
        if (dt != source_dt) source = Source<T>(x, past, g, tile, source_dt = dt);
        const int channel = first_channel + piece * LEN, place = places[of_frame];
        Pack<T> pack;
        if (source.from == nullptr || place < 0) {
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.set(i, 0.0f);
            return pack;
        }
        const T* from = source.from + channel * source.channel_stride + place;
        if (channel + LEN <= g.inner) {
#pragma unroll
            for (int i = 0; i < LEN; ++i) pack.values[i] = from[i * source.channel_stride];
        } else {
#pragma unroll
            for (int i = 0; i < LEN; ++i) {
                pack.set(i, 0.0f);
                if (channel + i < g.inner) pack.values[i] = from[i * source.channel_stride];
            }
        }
        return pack;
    }
};

/// The way of the weights into their stages: every tap of the first slab's channels, then of the next.
template <typename T, int CHANNELS>
struct Weights {
    static constexpr int LEN = Pack<T>::LEN, LINES_AT_ONCE = THREADS / PIECES;
    const T* weight;
    const Geometry& g;
    /// The thread's first output channel and its piece of every line.
    const int out, piece;
    int tap = 0, first_channel = 0, stage = 0;

    __device__ Weights(const T* weight, const Geometry& g, const Tile& tile)
        : weight(weight), g(g), out(tile.out + threadIdx.x / PIECES), piece(threadIdx.x % PIECES) {}

    /// Sends the next tap's weights on their way, if there is one, and closes the group of copies.
    __device__ void send(unsigned char* stages) {
        const int channel = first_channel + piece * LEN;
        const int bytes = min(max(g.inner - channel, 0), LEN) * static_cast<int>(sizeof(T));
        const T* from = weight + (static_cast<long>(tap) * g.out + out) * g.pitch + channel;
        unsigned char* to = stages + stage * CHANNELS * LINE + swizzled(threadIdx.x / PIECES, piece);
        if (first_channel < g.inner) {
#pragma unroll
            for (int i = 0; i < CHANNELS / LINES_AT_ONCE; ++i) {
                const bool valid = bytes > 0 && out + i * LINES_AT_ONCE < g.out;
                const T* line = valid ? from + static_cast<long>(i) * LINES_AT_ONCE * g.pitch : weight;
                copy_async_part(to + i * LINES_AT_ONCE * LINE, line, valid ? bytes : 0);
            }
        }
        copy_async_commit();
        if (++stage == STAGES) stage = 0;
        if (++tap == g.kt * g.kh * g.kw) {
            tap = 0;
            first_channel += PIECES * LEN;
        }
    }
};

/// Results of a warp in the layout of mma.m16n8k16: [16 channels][8 positions] each.
template <int ROW_TILES>
using Sums = float[ROW_TILES][COLUMN_TILES][4];

/// The products of one tap. `weights` are the warp's first line, `position` that of the warp's first position at this tap,
/// `row_step` the distance of the tile's rows in the slab.
template <typename T, int ROW_TILES>
__device__ __forceinline__ void multiply(Sums<ROW_TILES>& sums, const unsigned char* weights, int line,
                                         const unsigned char* slab, int position, int row_step, int stride) {
    const int lane = threadIdx.x % WARP_SIZE;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            unsigned a[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i)
                ldmatrix_x4(a[i], weights + swizzled(line + i * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int row = 0; row < COLUMN_TILES / 2; ++row) {
                // Both tiles of a row of 16 positions, both halves of k.
                unsigned b[4];
                const int at = position + row * row_step + (lane / 16 * 8 + lane % 8) * stride;
                ldmatrix_x4(b, slab + swizzled(at, 2 * k + lane / 8 % 2));
                const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    mma_m16n8k16<T>(sums[i][2 * row], a[i], first);
                    mma_m16n8k16<T>(sums[i][2 * row + 1], a[i], second);
                }
            }
        }
    } else {
        const int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            Pack<T> a[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; ++i) {
                const int at = swizzled(line + i * 8 + group, piece);
                a[i / 2][i % 2] = Pack<T>::load(reinterpret_cast<const T*>(weights + at));
            }
#pragma unroll
            for (int j = 0; j < COLUMN_TILES * 2; ++j) {
                const int at = position + j / 4 * row_step + (j / 2 % 2 * 8 + pair + j % 2) * stride;
                const Pack<T> b = Pack<T>::load(reinterpret_cast<const T*>(slab + swizzled(at, piece)));
#pragma unroll
                for (int i = 0; i < 2 * ROW_TILES; ++i)
#pragma unroll
                    for (int k = 0; k < Pack<T>::LEN; ++k)
                        sums[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i / 2][i % 2][k] * b[k];
            }
        }
    }
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T first, second;
};

/// Writes what of a warp's results lies inside of y, plus the bias.
template <typename T, int ROW_TILES>
__device__ __forceinline__ void write(const Sums<ROW_TILES>& sums, const T* bias, T* y, const Geometry& g,
                                      const Tile& tile, int line, int first_row) {
    const int lane = threadIdx.x % WARP_SIZE;
    const long frame = static_cast<long>(g.h_out) * g.w_out;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int out = tile.out + line + i * 8 + lane / 4;
        if (out >= g.out) continue;
        const float term = bias == nullptr ? 0.0f : to_float(bias[out]);
        T* to = y + ((static_cast<long>(tile.batch) * g.out + out) * g.frames_out + tile.frame) * frame;
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            const int row = tile.row + first_row + j / 2, column = tile.column + j % 2 * 8 + lane % 4 * 2;
            if (row >= g.h_out || column >= g.w_out) continue;
            const float* found = sums[i / 2][j] + i % 2 * 2;
            const Pair<T> pair = {rounded<T>(found[0] + term), rounded<T>(found[1] + term)};
            const long place = static_cast<long>(row) * g.w_out + column;
            if (g.w_out % 2 == 0) {
                *reinterpret_cast<Pair<T>*>(to + place) = pair;
            } else {
                to[place] = pair.first;
                if (column + 1 < g.w_out) to[place + 1] = pair.second;
            }
        }
    }
}

template <typename T, int CHANNELS>
__device__ void convolve(const T* x, const T* past, const T* weight, const T* bias, T* y, const Geometry& g) {
    constexpr int ROW_TILES = CHANNELS / 32, STAGE = CHANNELS * LINE;
    DYNAMIC_SHARED(memory);
    unsigned char* const slabs = memory + STAGES * STAGE;
    const int slab_bytes = g.positions() * LINE, columns = g.slab_columns();
    int* const places = reinterpret_cast<int*>(slabs + 2 * slab_bytes);
    const Tile tile = Tile::of_block<CHANNELS>(g);
    for (int i = threadIdx.x; i < g.plane(); i += THREADS) {
        const int row = g.place(tile.row * g.stride + i / columns, g.top, g.h);
        const int column = g.place(tile.column * g.stride + i % columns, g.left, g.w);
        places[i] = row < 0 || column < 0 ? -1 : row * g.w + column;
    }
    __syncthreads();

    const int kernel = g.kh * g.kw, taps = g.frames_per_slab() * kernel;
    const int chunks = (g.inner + PIECES * Pack<T>::LEN - 1) / (PIECES * Pack<T>::LEN), steps = chunks * g.kt * kernel;
    // Pieces of the next slab per step of this one.
    const int share = ((g.positions() * PIECES + THREADS - 1) / THREADS + taps - 1) / taps;
    Weights<T, CHANNELS> weights(weight, g, tile);
    weights.send(memory);
    weights.send(memory);
    Filling<T> filling(x, past, g, tile, places);
    for (; !filling.done(); filling.next()) {
        const int at = filling.place_in_slab();
        filling.fetch().store(reinterpret_cast<T*>(slabs + at));
    }

    const int warp = threadIdx.x / WARP_SIZE, line = warp / 2 * (CHANNELS / 2), first_row = warp % 2 * (TILE_ROWS / 2);
    const int row_step = g.stride * columns;
    unsigned char *slab = slabs, *next_slab = slabs + slab_bytes;
    Sums<ROW_TILES> sums = {};
    int stage = 0, tap = 0, column = 0, row = 0, offset = 0;
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<1>();
        // This step's weights and slab are there for all, and nobody reads the stage and the slab that are filled next.
        __syncthreads();
        weights.send(memory);
        if (tap == 0) filling.next_slab();
        Pack<T> held[HELD];
        int held_at[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            held_at[i] = -1;
            if (i < share && !filling.done()) {
                held_at[i] = filling.place_in_slab();
                held[i] = filling.fetch();
                filling.next();
            }
        }
        __syncwarp();  // lanes may have held different numbers of pieces
        multiply<T, ROW_TILES>(sums, memory + stage * STAGE, line, slab, offset + first_row * row_step, row_step, g.stride);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (held_at[i] >= 0) held[i].store(reinterpret_cast<T*>(next_slab + held_at[i]));
        for (int i = HELD; i < share && !filling.done(); ++i, filling.next()) {
            const int at = filling.place_in_slab();
            filling.fetch().store(reinterpret_cast<T*>(next_slab + at));
        }
        if (++stage == STAGES) stage = 0;
        // On to the next column, row, frame of the slab; to the next slab.
        ++offset;
        if (++column == g.kw) {
            column = 0;
            offset += columns - g.kw;
            if (++row == g.kh) {
                row = 0;
                offset += filling.plane - g.kh * columns;
            }
        }
        if (++tap == taps) {
            tap = 0;
            offset = 0;
            unsigned char* const read = slab;
            slab = next_slab;
            next_slab = read;
        }
    }
    copy_async_wait<0>();
    write<T, ROW_TILES>(sums, bias, y, g, tile, line, first_row);
}

}  // namespace

#define CONVOLUTION(T, dtype, channels)                                                                               \
    KERNEL(THREADS, conv_##channels##_##dtype, const T* x, const T* past, const T* weight, const T* bias, T* y,       \
           int inner, int out, int t, int past_frames, int h, int w, int frames_out, int h_out, int w_out, int kt,    \
           int kh, int kw, int stride_t, int stride, int lead, int top, int left, int upsample, int repeat_frame,     \
           int repeat_edge, int pitch) {                                                                              \
        const Geometry g = {inner, out, t,      past_frames, h,    w,   frames_out, h_out,    w_out,        kt,       \
                            kh,    kw,  stride_t, stride,    lead, top, left,       upsample, repeat_frame, repeat_edge, \
                            pitch};                                                                                   \
        convolve<T, channels>(x, past, weight, bias, y, g);                                                           \
    }
#define CONVOLUTIONS(T, dtype) CONVOLUTION(T, dtype, 96) CONVOLUTION(T, dtype, 32)
FOR_EACH_DTYPE(CONVOLUTIONS)
// 128 accumulators and the operands of f32 are more than a thread has registers for.
CONVOLUTION(f16, f16, 128)
CONVOLUTION(bf16, bf16, 128)
