// From a row of logits to a token, with what a request asks for, so that no logits leave the device.
//
// The definition is that of sample.rs, and every number that decides is computed as there, bit for bit: distances from
// the largest logit in whole steps of 2^-27 nats, weights as integers, sums of integers. So the order of a sum does not
// matter, atomics are deterministic, and the same random number gives the same token on every device.
//
//   adjust:    scratch row = logits, then biases, then the penalties of the listed tokens, then minus infinity for tokens that the
//              row's mask forbids; one block per row that has either
//   sample:    one block per row: the largest logit; top-k and top-p as bounds on the rank (steps, then id), found by
//              histograms of 11 bits; the drawn token by sums per warp, in order of id
//
// Bytes moved: a row of 128k 16-bit logits is 256 KiB, read once for argmax, twice more for a plain draw, at most five
// times more for each of top-k and top-p (three unless many tokens tie); all but the first from L2. A block of 1024
// threads with 16 bytes each keeps 16 KiB under way, so a row is expected to take some microseconds, beside the
// milliseconds of the step that made it; rows run side by side. Spreading a row over blocks would not pay.
// Histograms: bins are linear in nats (64 per nat), so that 128k tokens spread over about a thousand of them and lanes
// seldom meet in one.
#include "common.cuh"

// Compiled once and called: it is long, and every dtype needs it for penalised rows in f32.
#ifdef __CUDACC__
#define SEPARATE __noinline__
#else
#define SEPARATE
#endif

namespace {

using u64 = unsigned long long;

constexpr int THREADS = 1024;
constexpr int MAX_WARPS = THREADS / WARP_SIZE;
constexpr int BINS = 2048;
constexpr unsigned NOTHING = 0xffffffffu;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
/// Tokens further below the most likely one are never drawn, and the steps in which distances count.
constexpr float MAX_NATS = 27.0f;
constexpr float STEPS_PER_NAT = 134217728.0f;
/// Of every candidate, and of no other token.
constexpr u64 EVERY_RANK = ~0ull;

/// What a request asks for; as `Row::words` in sample/launch.rs.
struct Parameters {
    float temperature, top_p;
    unsigned top_k, adjusted_row;
    u64 min_weight, random;

    __device__ explicit Parameters(const unsigned* words)
        : temperature(__uint_as_float(words[0])), top_p(__uint_as_float(words[1])), top_k(words[2]),
          adjusted_row(words[3]), min_weight(words[4] | static_cast<u64>(words[5]) << 32),
          random(words[6] | static_cast<u64>(words[7]) << 32) {}
};

/// Steps below the largest logit, rounded up so that only its equals have 0; NOTHING if the token is no candidate.
__device__ unsigned steps_below(float logit, float largest, float temperature) {
    if (logit != logit) return NOTHING;
    const float distance = __fdiv_rn(__fsub_rn(largest, fminf(logit, LARGEST_FLOAT)), temperature);
    return distance <= MAX_NATS ? static_cast<unsigned>(ceilf(__fmul_rn(distance, STEPS_PER_NAT))) : NOTHING;
}

/// 2^40 exp(-steps / 2^27), computed in operations that round the same everywhere: `weight` in sample.rs.
__device__ u64 weight(unsigned steps) {
    const float x = -__fmul_rn(static_cast<float>(steps), 1.0f / STEPS_PER_NAT);  // both exact powers of two
    const int n = static_cast<int>(__fsub_rn(__fmul_rn(x, 1.44269504f), 0.5f));
    const float powers = static_cast<float>(n);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(powers, 0.693359375f)), __fmul_rn(powers, -2.12194440e-4f));
    const float factors[6] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
    float power = 1.0f / 720.0f;
#pragma unroll
    for (int i = 0; i < 6; ++i) power = __fadd_rn(__fmul_rn(power, r), factors[i]);
    return static_cast<u64>(__fmul_rn(power, 16777216.0f)) << 16 >> -n;
}

/// A row of logits.
template <typename S>
struct Row {
    static constexpr int LEN = Pack<S>::LEN;
    const S* logits;
    long vocab;

    /// Those of ids `start .. start + LEN`, NaN past the end.
    __device__ void load(long start, float (&values)[LEN]) const {
        if (start + LEN <= vocab && reinterpret_cast<std::uintptr_t>(logits + start) % 16 == 0) {
            const Pack<S> pack = Pack<S>::load(logits + start);
#pragma unroll
            for (int i = 0; i < LEN; ++i) values[i] = pack[i];
        } else {
#pragma unroll
            for (int i = 0; i < LEN; ++i) values[i] = start + i < vocab ? to_float(logits[start + i]) : NAN;
        }
    }

    /// Calls `visit(id, logit)` for this thread's share of the ids.
    template <typename Visit>
    __device__ void for_each(Visit visit) const {
        for (long start = threadIdx.x * static_cast<long>(LEN); start < vocab; start += blockDim.x * static_cast<long>(LEN)) {
            float values[LEN];
            load(start, values);
#pragma unroll
            for (int i = 0; i < LEN; ++i)
                if (start + i < vocab) visit(static_cast<unsigned>(start + i), values[i]);
        }
    }
};

/// The largest over the block, known to each thread. `scratch` holds one per warp.
__device__ u64 block_max(u64 x, u64* scratch) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, distance);
        x = other > x ? other : x;
    }
    __syncthreads();  // of an earlier call nobody reads any more
    if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    u64 largest = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP_SIZE; ++warp)
        largest = scratch[warp] > largest ? scratch[warp] : largest;
    return largest;
}

/// Floats as numbers of the same order; both zeros are one.
__device__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float from_ordered(unsigned bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

/// What one look at a row says.
struct Scan {
    u64 best;  // the largest logit in the upper half, the complement of its first id in the lower; 0 if none is above -inf
    bool finite;
};

template <typename S>
__device__ Scan scan(const Row<S>& row, u64* scratch) {
    u64 best = 0, problems = 0;
    row.for_each([&](unsigned id, float logit) {
        problems |= !isfinite(logit);
        if (!(logit > -INFINITY)) return;
        const u64 found = static_cast<u64>(ordered(logit)) << 32 | ~id;
        best = found > best ? found : best;
    });
    best = block_max(best, scratch);
    return Scan{best, block_max(problems, scratch) == 0};
}

/// What warp 0 finds in a histogram.
struct Found {
    u64 total, wanted, before, content;
    unsigned bin;
};

/// What the threads of a block share.
struct Shared {
    u64 bins[BINS];
    u64 scratch[MAX_WARPS];
    Found found;
    unsigned token;
    int warp;
    u64 left;
};

/// A row with its scale, and which of its tokens are left: those of rank `(steps, id)` up to `bound`.
template <typename S>
struct Selection {
    Row<S> row;
    float largest, temperature;
    u64 bound;
    Shared& shared;

    __device__ unsigned steps(float logit) const { return steps_below(logit, largest, temperature); }

    /// Lowers the bound so that what is left just reaches what is wanted: a number of tokens (top-k), or of all weights
    /// that are left a share (top-p).
    __device__ void select(bool by_weight, u64 wanted, float share) {
        unsigned prefix = 0;
        for (int level = 0; level < 3; ++level) {
            const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
            count([&](unsigned, unsigned steps) {
                const bool inside = level == 0 || steps >> (shift + bits) == prefix;
                if (inside) add(steps >> shift & ((1u << bits) - 1), by_weight ? weight(steps) : 1);
            });
            const Found found = find(wanted, by_weight && level == 0 ? share : 0);
            if (level == 0 && found.total <= found.wanted) return;
            wanted = found.wanted - found.before;
            prefix = prefix << bits | found.bin;
            if (found.content == wanted) return lower(static_cast<u64>((prefix + 1) << shift) - 1, NOTHING);
            if (level == 2) select_id(prefix, found.content, wanted, by_weight ? weight(prefix) : 1);
        }
    }

    /// Of the tokens at one distance, `content` together and `each` alone, the first ones that reach `wanted`.
    __device__ void select_id(unsigned distance, u64 content, u64 wanted, u64 each) {
        u64 ties = (wanted + each - 1) / each;
        if (ties * each == content) return lower(distance, NOTHING);
        unsigned prefix = 0;
        for (int shift = 11; shift >= 0; shift -= 11) {
            count([&](unsigned id, unsigned steps) {
                if (steps == distance && (shift == 11 || id >> 11 == prefix)) add(id >> shift & (BINS - 1), 1);
            });
            const Found found = find(ties, 0);
            ties -= found.before;
            prefix = prefix << 11 | found.bin;
        }
        lower(distance, prefix);
    }

    __device__ void lower(u64 steps, unsigned id) {
        const u64 rank = steps << 32 | id;
        bound = rank < bound ? rank : bound;
    }

    /// Fills the histogram: `visit` sees what is left.
    template <typename Visit>
    __device__ void count(Visit visit) {
        for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) shared.bins[bin] = 0;
        __syncthreads();
        row.for_each([&](unsigned id, float logit) {
            const unsigned steps = this->steps(logit);
            if (steps != NOTHING && (static_cast<u64>(steps) << 32 | id) <= bound) visit(id, steps);
        });
        __syncthreads();
    }

    __device__ void add(unsigned bin, u64 value) { atomicAdd(&shared.bins[bin], value); }

    /// The bin in which the sum reaches `wanted`, or if there is a `share`, that share of the whole.
    __device__ Found find(u64 wanted, float share) {
        constexpr int LANE_BINS = BINS / WARP_SIZE;
        if (threadIdx.x < WARP_SIZE) {
            const u64* mine = shared.bins + threadIdx.x * LANE_BINS;
            u64 sum = 0;
            for (int i = 0; i < LANE_BINS; ++i) sum += mine[i];
            const u64 reached = inclusive_sum(sum), total = __shfl_sync(ALL_LANES, reached, WARP_SIZE - 1);
            if (share > 0) wanted = static_cast<u64>(ceil(static_cast<double>(share) * static_cast<double>(total)));
            wanted = wanted > 0 ? wanted : 1;
            if (threadIdx.x == 0) shared.found = Found{total, wanted, 0, 0, 0};
            __syncwarp();
            u64 before = reached - sum;
            if (before < wanted && wanted <= reached) {
                int bin = 0;
                for (; before + mine[bin] < wanted; ++bin) before += mine[bin];
                shared.found = Found{total, wanted, before, mine[bin], threadIdx.x * LANE_BINS + bin};
            }
        }
        __syncthreads();
        return shared.found;
    }

    static __device__ u64 inclusive_sum(u64 x) {
        const int lane = threadIdx.x % WARP_SIZE;
        for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
            const u64 other = __shfl_up_sync(ALL_LANES, x, distance);
            if (lane >= distance) x += other;
        }
        return x;
    }

    /// One token with a chance proportional to its weight, of those that weigh at least `min_weight`; `otherwise` if
    /// there is none. Each warp sums a piece of the vocabulary; the one whose piece holds the drawn number walks it.
    __device__ unsigned draw(u64 min_weight, u64 random, unsigned otherwise) {
        constexpr long TILE = WARP_SIZE * Row<S>::LEN;
        const int warps = blockDim.x / WARP_SIZE, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
        const long piece = ((row.vocab + warps - 1) / warps + TILE - 1) / TILE * TILE;
        const long begin = warp * piece, end = begin + piece < row.vocab ? begin + piece : row.vocab;
        u64 sum = 0;
        for (long tile = begin; tile < end; tile += TILE) {
            u64 weights[Row<S>::LEN];
            sum += weigh(tile + lane * Row<S>::LEN, min_weight, weights);
        }
        sum = __shfl_sync(ALL_LANES, inclusive_sum(sum), WARP_SIZE - 1);
        if (lane == 0) shared.scratch[warp] = sum;
        if (threadIdx.x == 0) shared.token = otherwise;
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 total = 0;
            for (int i = 0; i < warps; ++i) total += shared.scratch[i];
            u64 left = __umul64hi(random, total);
            int at = 0;
            for (; at < warps && left >= shared.scratch[at]; ++at) left -= shared.scratch[at];
            shared.warp = at;
            shared.left = left;
        }
        __syncthreads();
        if (shared.warp == warp) walk(begin, end, min_weight, shared.left);
        __syncthreads();
        return shared.token;
    }

    /// Weights of the ids from `start`, 0 for those that may not be drawn, and their sum.
    __device__ u64 weigh(long start, u64 min_weight, u64 (&weights)[Row<S>::LEN]) const {
        float values[Row<S>::LEN];
        row.load(start, values);
        u64 sum = 0;
#pragma unroll
        for (int i = 0; i < Row<S>::LEN; ++i) {
            const unsigned steps = this->steps(values[i]);
            const bool left = steps != NOTHING && (static_cast<u64>(steps) << 32 | (start + i)) <= bound;
            const u64 found = left ? weight(steps) : 0;
            weights[i] = found >= min_weight ? found : 0;
            sum += weights[i];
        }
        return sum;
    }

    /// By one warp: the token at which the sum of weights from `begin` on exceeds `left`.
    __device__ void walk(long begin, long end, u64 min_weight, u64 left) {
        constexpr long TILE = WARP_SIZE * Row<S>::LEN;
        for (long tile = begin; tile < end; tile += TILE) {
            const long start = tile + threadIdx.x % WARP_SIZE * Row<S>::LEN;
            u64 weights[Row<S>::LEN];
            const u64 sum = weigh(start, min_weight, weights), reached = inclusive_sum(sum);
            const unsigned lanes = __ballot_sync(ALL_LANES, reached > left);
            if (lanes == 0) {
                left -= __shfl_sync(ALL_LANES, reached, WARP_SIZE - 1);
                continue;
            }
            if (static_cast<int>(threadIdx.x % WARP_SIZE) == __ffs(static_cast<int>(lanes)) - 1) {
                left -= reached - sum;
                int i = 0;
                for (; left >= weights[i]; ++i) left -= weights[i];
                shared.token = static_cast<unsigned>(start + i);
            }
            return;
        }
    }
};

template <typename S>
SEPARATE __device__ unsigned choose(const Row<S>& row, u64 best, const Parameters& parameters, Shared& shared) {
    if (best == 0) return 0;
    const unsigned best_id = ~static_cast<unsigned>(best);
    if (parameters.temperature == 0) return best_id;
    const float largest = fminf(from_ordered(static_cast<unsigned>(best >> 32)), LARGEST_FLOAT);
    Selection<S> selection{row, largest, parameters.temperature, EVERY_RANK, shared};
    // One copy of the code for both, which nvcc takes its time for.
#pragma unroll 1
    for (int cut = 0; cut < 2; ++cut) {
        const bool by_weight = cut == 1;
        if (by_weight ? parameters.top_p < 1 : parameters.top_k > 0)
            selection.select(by_weight, parameters.top_k, parameters.top_p);
    }
    return selection.draw(parameters.min_weight, parameters.random, best_id);
}

/// logits [rows, vocab]; adjusted [_, vocab]; parameters [rows, 8]; chosen [2, rows]: tokens, and whether the logits
/// of each row are finite.
template <typename T>
__device__ void sample(const T* logits, const float* adjusted, const unsigned* parameters, unsigned* chosen, long vocab) {
    __shared__ Shared shared;
    const Parameters mine(parameters + 8 * blockIdx.x);
    const Row<T> row{logits + blockIdx.x * vocab, vocab};
    const Scan found = scan(row, shared.scratch);
    unsigned token;
    if (mine.adjusted_row == NOTHING) {
        token = choose(row, found.best, mine, shared);
    } else {
        const Row<float> changed{adjusted + mine.adjusted_row * vocab, vocab};
        token = choose(changed, scan(changed, shared.scratch).best, mine, shared);
    }
    if (threadIdx.x == 0) {
        chosen[blockIdx.x] = token;
        chosen[gridDim.x + blockIdx.x] = found.finite;
    }
}

/// adjustments [rows, 10]: a row of logits, the begin and end of its entries, repetition, presence and frequency penalty,
/// where its mask begins (NOTHING if it has none) and of how many words it is, the begin and end of its biases; entries [_, 2]:
/// a token, each once, and how often it is in the answer; biases [_, 2]: a token, each once, and what is added; masks [_]: a bit for each token, 1 where it is allowed.
template <typename T>
__device__ void adjust(const T* logits, float* adjusted, const unsigned* adjustments, const unsigned* entries,
                       const unsigned* biases, const unsigned* masks, long vocab) {
    const unsigned* mine = adjustments + 10 * blockIdx.x;
    const Row<T> row{logits + mine[0] * vocab, vocab};
    float* to = adjusted + blockIdx.x * vocab;
    row.for_each([&](unsigned id, float logit) { to[id] = logit; });
    __syncthreads();
    for (unsigned entry = mine[8] + threadIdx.x; entry < mine[9]; entry += blockDim.x) {
        const unsigned id = biases[2 * entry];
        if (id < vocab) to[id] = __fadd_rn(to[id], __uint_as_float(biases[2 * entry + 1]));
    }
    __syncthreads();
    const float repetition = __uint_as_float(mine[3]), presence = __uint_as_float(mine[4]), frequency = __uint_as_float(mine[5]);
    for (unsigned entry = mine[1] + threadIdx.x; entry < mine[2]; entry += blockDim.x) {
        const unsigned id = entries[2 * entry], count = entries[2 * entry + 1];
        if (id >= vocab) continue;
        float logit = to[id];
        logit = logit > 0 ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
        if (count > 0) logit = __fsub_rn(logit, __fadd_rn(__fmul_rn(frequency, static_cast<float>(count)), presence));
        to[id] = logit;
    }
    if (mine[6] == NOTHING) return;
    __syncthreads();
    const unsigned* mask = masks + mine[6];
    for (long id = threadIdx.x; id < vocab; id += blockDim.x) {
        const bool allowed = id / 32 < mine[7] && (mask[id / 32] >> (id % 32) & 1);
        if (!allowed) to[id] = -INFINITY;
    }
}

}  // namespace

#define SAMPLE_KERNELS(T, dtype)                                                                                       \
    KERNEL(THREADS, sample_##dtype, const T* logits, const float* adjusted, const unsigned* parameters,                \
           unsigned* chosen, long vocab) {                                                                             \
        sample<T>(logits, adjusted, parameters, chosen, vocab);                                                        \
    }                                                                                                                  \
    KERNEL(THREADS, adjust_##dtype, const T* logits, float* adjusted, const unsigned* adjustments,                     \
           const unsigned* entries, const unsigned* biases, const unsigned* masks, long vocab) {                       \
        adjust<T>(logits, adjusted, adjustments, entries, biases, masks, vocab);                                       \
    }
FOR_EACH_DTYPE(SAMPLE_KERNELS)
