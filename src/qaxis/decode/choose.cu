// From scores to the output of a decode step: cut, candidates, choice, attention; one cluster of programs a row.
//
// A row is one query head. Every sum that reaches the output has the order of qaxis/arithmetic, so the bits are those of the
// Triton kernels and of the PyTorch reference. What only decides how much is looked at may round as it likes: bins are
// monotone in the score. Too little room, or too many scores in one bin, and a slower way that needs neither is taken.
//
// compiler.py puts hardware.cuh and canonical.cuh before this and defines, besides what is said there: DIM_V, GROUP, SUB,
// CLUSTER, RANKS, LEVELS, THREADS, CODED (keys were scored by their 8-bit codes), STORED (keys and values are an 8-bit
// cache), PROFILE, SHARED (bytes).

constexpr int WARPS = THREADS / 32, LANES = DIM / E, BLOCK = 512, BINS = 1024, NEAR = 112;
static_assert(!STORED || ELEM == 2);

// Keys or values: a tensor, or codes, scales, and first and newest tokens in full. Strides in units of E numbers.
struct Side {
    const void *rows, *scales, *head, *tail;
    int rows_b, rows_h, rows_n, scales_b, scales_h, scales_n, head_b, head_h, head_n, tail_b, tail_h, tail_n;
};
#define SIDE(p)                                                                                              \
    const void *p##_rows, const void *p##_scales, const void *p##_head, const void *p##_tail, int p##_rows_b, \
        int p##_rows_h, int p##_rows_n, int p##_scales_b, int p##_scales_h, int p##_scales_n, int p##_head_b, \
        int p##_head_h, int p##_head_n, int p##_tail_b, int p##_tail_h, int p##_tail_n
#define AS_SIDE(p)                                                                                              \
    Side{p##_rows, p##_scales, p##_head, p##_tail, p##_rows_b, p##_rows_h, p##_rows_n, p##_scales_b, p##_scales_h, \
         p##_scales_n, p##_head_b, p##_head_h, p##_head_n, p##_tail_b, p##_tail_h, p##_tail_n}

// E codes, and the exponents of their steps, as numbers.
__device__ __forceinline__ void dequantize(uint4 w, float* x) {
    const u32 code[2] = {w.x ^ 0x80808080u, w.y ^ 0x80808080u}, exponent[2] = {w.z ^ 0x80808080u, w.w ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < E; i++) {
        // A code and a power of two, each moved into the bits of a float; the product is exact.
        const float c = __uint_as_float(__byte_perm(code[i / 4], 0x4b000000u, 0x7650 + i % 4));
        const u32 e = __byte_perm(exponent[i / 4], 0, 0x0444 + ((i % 4) << 12)) >> 1;
        x[i] = __fmul_rn(__fsub_rn(c, 8388736.0f), __uint_as_float(e - (1u << 23)));
    }
}

struct Rows {  // one head of a side
    const char *rows, *scales, *head, *tail;
    int rows_n, scales_n, head_n, tail_n, whole, sinks;

    __device__ Rows(const Side& s, int b, int g, int whole, int sinks) : whole(whole), sinks(sinks) {
        const int item = STORED ? E : 16;
        rows = (const char*)s.rows + ((i64)b * s.rows_b + (i64)g * s.rows_h) * item;
        scales = (const char*)s.scales + ((i64)b * s.scales_b + (i64)g * s.scales_h) * E;
        head = (const char*)s.head + ((i64)b * s.head_b + (i64)g * s.head_h) * 16;
        tail = (const char*)s.tail + ((i64)b * s.tail_b + (i64)g * s.tail_h) * 16;
        rows_n = s.rows_n, scales_n = s.scales_n, head_n = s.head_n, tail_n = s.tail_n;
    }
    __device__ __forceinline__ bool coded(int j) const { return STORED && j >= sinks && j < whole; }
    // Numbers E * part and following of token j, as they are stored. PLAIN: the token is known to be coded.
    template <bool PLAIN> __device__ __forceinline__ uint4 load(int j, int part) const {
        if constexpr (!STORED) return load16(rows + ((i64)j * rows_n + part) * 16);
        const char *first = rows + ((i64)j * rows_n + part) * E, *second = scales + ((i64)(j >> 7) * scales_n + part) * E;
        if (!PLAIN && !coded(j)) {
            // The two halves of 16 bytes instead of codes and exponents: no other loads, so that many are in flight.
            first = (j < sinks ? head + (i64)j * head_n * 16 : tail + (i64)(j - whole) * tail_n * 16) + part * 16;
            second = first + 8;
        }
        const uint2 a = load8(first), b = load8(second);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    template <bool PLAIN> __device__ __forceinline__ void numbers(int j, uint4 w, float* x) const {
        if (STORED && (PLAIN || coded(j))) dequantize(w, x);
        else widen(w, x);
    }
};


// Of x over the lanes up to this one.
__device__ __forceinline__ int sum_upto(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_up_sync(ALL, x, o);
        if (lane >= o) x += more;
    }
    return x;
}

// Of a value of every warp: the sum over the warps before this one, and over all.
struct Sums { int before, all; };
__device__ __forceinline__ Sums over_warps(const int* values, int lane, int warp) {
    const int mine = lane < WARPS ? values[lane] : 0, upto = sum_upto(mine, lane);
    return {__shfl_sync(ALL, upto - mine, warp), __shfl_sync(ALL, upto, 31)};
}

struct Found { int bin, above, inside; };

// Of counts, summed over the PROGRAMS of a cluster: the highest bin at or above which there are `wanted`, and how many are above it.
template <int COUNT, int PROGRAMS> __device__ Found find_bin(const int* counts, int wanted, int* scratch) {
    constexpr int EACH = COUNT / THREADS > 0 ? COUNT / THREADS : 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c[EACH] = {}, sum = 0;
    if constexpr (EACH % 2 == 0) {
#pragma unroll
        for (int r = 0; r < PROGRAMS; r++)
#pragma unroll
            for (int i = 0; i < EACH; i += 2) {
                const int* from = counts + threadIdx.x * EACH + i;
                const int2 two = PROGRAMS == 1 ? make_int2(from[0], from[1]) : pull2(from, r);
                c[i] += two.x, c[i + 1] += two.y;
            }
    } else if (threadIdx.x < COUNT) {
        for (int r = 0; r < PROGRAMS; r++) c[0] += pull(counts + threadIdx.x, r);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += c[i];
    int upto = sum;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_down_sync(ALL, upto, o);
        if (lane + o < 32) upto += more;
    }
    if (lane == 0) scratch[warp] = upto;
    if (threadIdx.x == 0) scratch[WARPS] = -1, scratch[WARPS + 1] = 0, scratch[WARPS + 2] = 0;
    __syncthreads();
    const Sums sums = over_warps(scratch, lane, warp);
    upto += sums.all - sums.before - scratch[warp];
    int above = upto - sum;
    if (above < wanted && wanted <= upto) {
        int bin = -1, inside = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) {
            if (bin < 0 && above + c[i] >= wanted) bin = threadIdx.x * EACH + i, inside = c[i];
            if (bin < 0) above += c[i];
        }
        scratch[WARPS] = bin, scratch[WARPS + 1] = above, scratch[WARPS + 2] = inside;
    }
    __syncthreads();
    const Found found = {scratch[WARPS], scratch[WARPS + 1], scratch[WARPS + 2]};
    __syncthreads();
    return found;
}

// In place: from the counts of all blocks to the sums of those before each. `counts` is this program's copy.
__device__ void sums_before(int* counts, int blocks, int* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
#pragma unroll 1
    for (int offset = 0; offset < blocks; offset += THREADS) {
        const int i = offset + threadIdx.x, mine = i < blocks ? counts[i] : 0;
        int upto = sum_upto(mine, lane);
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
        const Sums sums = over_warps(scratch, lane, warp);
        if (i < blocks) counts[i] = before + sums.before + upto - mine;
        before += sums.all;
        __syncthreads();
    }
}

// Which of BINS bins between two scores; monotone in the score, whatever the two are.
struct Bins {
    float low, per;
    __device__ Bins(float from, float to) : low(from) {
        per = (float)(BINS - 1) / (to - from);
        if (!(per > 0.0f && per < 3e38f)) per = 0.0f;
    }
    __device__ __forceinline__ int of(float score) const {
        return (int)fminf(fmaxf((score - low) * per, 0.0f), (float)(BINS - 1));
    }
    __device__ __forceinline__ float start(int bin) const { return per > 0.0f ? low + bin / per : low; }
};

#if CODED
typedef u16 Fast;
#else
typedef int Fast;
#endif
constexpr int PACK = 16 / (int)sizeof(Fast), WIDE = SUB < PACK ? SUB : PACK;  // in 16 bytes; fast scores a lane reads at once
constexpr int SHARE = SUB / WIDE, A_BLOCK = BLOCK / SUB;                      // lanes a neighbourhood, those of a block

__device__ __forceinline__ void unpack(uint4 w, int* x) {
    const u32 part[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < PACK; i++)
        x[i] = sizeof(Fast) == 4 ? (int)part[i] : (int)((part[i / 2] >> (16 * (i % 2))) & 65535);
}
// WIDE fast scores, packed.
__device__ __forceinline__ uint4 load_fast(const Fast* p) {
    constexpr int BYTES = WIDE * (int)sizeof(Fast);
    uint4 w = {0, 0, 0, 0};
    if constexpr (BYTES == 16) {
        w = *(const uint4*)p;
    } else if constexpr (BYTES == 8) {
        const uint2 two = *(const uint2*)p;
        w.x = two.x, w.y = two.y;
    } else if constexpr (BYTES == 4) {
        w.x = *(const u32*)p;
    } else {
        w.x = *(const u16*)p;
    }
    return w;
}

struct Shared {
    int counts[BINS], candidates[BINS];
    int near_word[CLUSTER * NEAR], near_position[CLUSTER * NEAR], winner_word[NEAR], winner[NEAR];
    int scratch[WARPS + 4];
    int low, high, highest, listed, found, nears, winners, full;
    float part[WARPS][DIM_V], weight[WARPS], numerators[CLUSTER][DIM_V], denominators[CLUSTER];
};

static_assert(sizeof(Shared) == SHARED, "cuda.py counts other bytes");

#if PROFILE
#define MARK(i)                                                                                       \
    do {                                                                                              \
        __syncthreads();                                                                              \
        if (threadIdx.x == 0) marks[((i64)blockIdx.y * CLUSTER + rank) * 16 + i] = nanoseconds();     \
    } while (0)
#else
#define MARK(i)
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1024 / THREADS) choose_and_attend(
    const void* q, SIDE(k), SIDE(v), const Fast* fast, const Fast* best, int* word,
    const float* limits, void* out, i64* indices, int* count, i64* marks,
    int heads, int n, int padded, int start, int end, int whole, int sinks, int wanted, int room, int span,
    int q_b, int q_h, double factor) {
    const int rank = cluster_rank(), tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int row = blockIdx.y, b = row / heads, h = row % heads, g = h / GROUP;
    const int blocks = padded / BLOCK, own = (blocks + CLUSTER - 1) / CLUSTER;
    DYNAMIC_SHARED(memory);
    Shared& s = *(Shared*)memory;
    int* position = (int*)(memory + (sizeof(Shared) + 15) / 16 * 16);
    int* value = position + room;          // canonical words of the candidates
    int* own_count = value + room;         // chosen keys, by own block
    int* before = own_count + own;         // and of all blocks
    u32* bitmap = (u32*)(before + blocks); // chosen keys, 16 words an own block
    u16* staged = (u16*)(bitmap + own * (BLOCK / 32));
    int* chosen_position = (int*)staged;   // of ranks [span rank, span (rank + 1)), when nothing is staged any more
    int* chosen = chosen_position + span;
    const Fast* my_fast = fast + (i64)row * padded;
    const Fast* my_best = best + (i64)row * padded / SUB;
    const int many = (CODED ? end : padded) / SUB;
    MARK(0);

    // 1. The cut: the wanted-th largest of the best of neighbours, to the precision of a bin.
    constexpr int FIRST = CODED ? 2 : 4;  // 16 bytes of bests a thread keeps from the first look to the second
    uint4 kept_best[FIRST];
    const int packs = padded / SUB / PACK;
#pragma unroll
    for (int u = 0; u < FIRST; u++) kept_best[u] = ((const uint4*)my_best)[min(tid + u * THREADS, packs - 1)];
#pragma unroll 1
    for (int i = tid; i < BINS; i += THREADS) s.counts[i] = 0, s.candidates[i] = 0;
#pragma unroll 1
    for (int i = tid; i < own * (BLOCK / 32); i += THREADS) bitmap[i] = 0;
#pragma unroll 1
    for (int i = tid; i < own; i += THREADS) own_count[i] = 0;
    if (tid == 0) {
        s.low = 0x7fffffff, s.high = NONE, s.highest = NONE;
        s.listed = 0, s.found = 0, s.nears = 0, s.winners = 0, s.full = 0;
    }
    __syncthreads();
    // Every program finds the cut for itself: that costs less than asking the others. First the range, about: bins are
    // clamped. The highest canonical score is exact.
#if CODED
    u32 low2 = ALL, high2 = 0;
    auto extend = [&](uint4 w) {
        low2 = __vminu2(low2, __vminu2(__vminu2(w.x, w.y), __vminu2(w.z, w.w)));
        high2 = __vmaxu2(high2, __vmaxu2(__vmaxu2(w.x, w.y), __vmaxu2(w.z, w.w)));
    };
    const int full = max(1, many / PACK);
#else
    // NONE, less its successor, is the largest.
    u32 lowest = ALL;
    int high = NONE;
    auto extend = [&](uint4 w) {
        const u32 part[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int e = 0; e < 4; e++) lowest = min(lowest, part[e] - (u32)(NONE + 1)), high = max(high, (int)part[e]);
    };
    const int full = packs;
#endif
#pragma unroll
    for (int u = 0; u < FIRST; u++)
        if (tid + u * THREADS < full) extend(kept_best[u]);
#pragma unroll 1
    for (int i = tid + FIRST * THREADS; i < full; i += THREADS) extend(((const uint4*)my_best)[i]);
#if CODED
    int low = min(low2 & 0xffff, low2 >> 16), high = max(high2 & 0xffff, high2 >> 16);
#else
    int low = lowest == ALL ? 0x7fffffff : (int)(lowest + (u32)(NONE + 1));
#endif
    low = __reduce_min_sync(ALL, low), high = __reduce_max_sync(ALL, high);
    if (lane == 0) atomicMin(&s.low, low), atomicMax(&s.high, high);
    __syncthreads();
    low = s.low, high = s.high;
#if CODED
    const int shift = low <= high ? max(0, 32 - __clz(high - low) - log2i(BINS)) : 0;
    auto bin_of = [&](int w) { return min(max((w - low) >> shift, 0), BINS - 1); };
#else
    const Bins bins(score_of(low), score_of(high));
    auto bin_of = [&](int w) { return bins.of(score_of(w)); };
#endif
    MARK(1);
    auto count_bests = [&](int i, uint4 raw) {
        int w[PACK];
        unpack(raw, w);
        const int left = many - i * PACK;
#pragma unroll
        for (int e = 0; e < PACK; e++)
            if (e < left && w[e] != (CODED ? 0 : NONE)) atomicAdd(&s.counts[bin_of(w[e])], 1);
    };
#pragma unroll
    for (int u = 0; u < FIRST; u++)
        if (tid + u * THREADS < packs) count_bests(tid + u * THREADS, kept_best[u]);
#pragma unroll 1
    for (int i = tid + FIRST * THREADS; i < packs; i += THREADS) count_bests(i, ((const uint4*)my_best)[i]);
    __syncthreads();
    MARK(2);
    const Found cut_bin = find_bin<BINS, 1>(s.counts, wanted, s.scratch);
#if CODED
    // The wanted-th canonical score is at most one error below that fast score, so a key more than two below cannot be
    // among the best.
    const float margin = limits[row * 2], units = limits[row * 2 + 1];
    const int found = cut_bin.bin <= 0 ? 0 : low + (cut_bin.bin << shift);
    const int cut = units > 0.0f && found > 0 ? (int)ceilf((float)found - margin) : -1;
    auto passes = [&](int w) { return w >= cut; };
    const float unit = units > 0.0f ? 1.0f / units : 0.0f;
    const Bins fine(((float)found - 32768.0f - margin) * unit, ((float)high - 32768.0f + margin) * unit);
#else
    // The first score of the cut's bin, and a little less for what the bins round.
    const int cut = cut_bin.bin <= 0 ? NONE + 1 : word_of(bins.start(cut_bin.bin) - (score_of(high) - score_of(low)) * 1e-5f) - 2;
    auto passes = [&](int w) { return w >= cut; };
    const Bins fine(score_of(max(cut, low)), score_of(high));
#endif
    MARK(3);

    // 2. Candidates: keys that reach the cut, in any order. Blocks of keys go round the programs, so that neighbours that
    // score alike do not fall to one of them.
    auto reserve = [&](int* counter, int mine) {  // places for so many of a lane
        const int upto = sum_upto(mine, lane);
        int at = 0;
        if (lane == 31) at = atomicAdd(counter, upto);
        return __shfl_sync(ALL, at, 31) + upto - mine;
    };
    {
        constexpr int PACKS = A_BLOCK / PACK, DEEP = 2;
        const int stretch = (own + WARPS - 1) / WARPS * PACKS;  // packs that a warp looks at
#pragma unroll 1
        for (int i = 0; i < stretch; i += 32 * DEEP) {
            uint4 raw[DEEP];
            int at[DEEP];
            bool is[DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                at[u] = warp * stretch + i + u * 32 + lane;
                const int global = (at[u] / PACKS * CLUSTER + rank) * PACKS + at[u] % PACKS;
                is[u] = i + u * 32 + lane < stretch && at[u] < own * PACKS && global < packs;
                raw[u] = ((const uint4*)my_best)[is[u] ? global : 0];
            }
            u32 pass = 0;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                int w[PACK];
                unpack(raw[u], w);
#pragma unroll
                for (int e = 0; e < PACK; e++) pass |= is[u] && passes(w[e]) ? 1u << (u * PACK + e) : 0u;
            }
            int to = reserve(&s.listed, __popc(pass));
            for (; pass; pass &= pass - 1) {
                const int bit = __ffs(pass) - 1;
                staged[to++] = (u16)((at[0] + bit / PACK * 32) * PACK + bit % PACK);
            }
        }
        __syncthreads();
        MARK(4);
        const int kept = s.listed;
        constexpr int AT_ONCE = THREADS / SHARE, MORE = 3;
#pragma unroll 1
        for (int i = 0; i < kept; i += AT_ONCE * MORE) {
            auto first_of = [&](int u) {
                const int at = staged[min(i + u * AT_ONCE + tid / SHARE, kept - 1)];
                return ((at / A_BLOCK * CLUSTER + rank) * A_BLOCK + at % A_BLOCK) * SUB + lane % SHARE * WIDE;
            };
            uint4 raw[MORE];
#pragma unroll
            for (int u = 0; u < MORE; u++) raw[u] = load_fast(my_fast + first_of(u));
            u64 takes = 0;
#pragma unroll
            for (int u = 0; u < MORE; u++) {
                int x[PACK];
                unpack(raw[u], x);
                const int j = first_of(u);
                u64 pass = 0;
#pragma unroll
                for (int w = 0; w < WIDE; w++) pass |= (u64)passes(x[w]) << w;
                const bool is = i + u * AT_ONCE + tid / SHARE < kept && j < many * SUB;
                const u32 upto = (1u << min(max(end - j, 0), WIDE)) - 1, before = (1u << min(max(start - j, 0), WIDE)) - 1;
                if (is) takes |= (pass & upto & ~before) << (u * WIDE);
            }
            int at = reserve(&s.found, __popcll(takes));
            for (; takes; takes &= takes - 1, at++) {
                const int bit = __ffsll(takes) - 1, j = first_of(bit / WIDE) + bit % WIDE;
                if (at < room) {
                    position[at] = j;
#if !CODED
                    value[at] = my_fast[j];
#endif
                }
            }
        }
    }
#if CODED
    // Keys without a fast score always are.
#pragma unroll 1
    for (int i = warp * 32; i < start + n - end; i += THREADS) {
        const int at = i + lane, j = at < start ? at : end + at - start;
        const bool is = at < start + n - end && (j / BLOCK) % CLUSTER == rank;
        const int to = reserve(&s.found, is);
        if (is && to < room) position[to] = j;
    }
#endif
    __syncthreads();
    int mine_found = min(s.found, room);
    if (tid == 0) s.full = s.found > room, count[row * CLUSTER + rank] = s.found;
    MARK(5);

    // 3. Their canonical scores.
    const Rows keys(AS_SIDE(k), b, g, whole, sinks);
    auto score_all = [&](auto which, int total, auto keep) {
#if CODED
        constexpr int DEEP = 4, HAS = DEEP > LANES ? DEEP / LANES : 1;
        if (total == 0) return;
        const int part = lane % LANES, first = first_sum<DEEP, LANES>(lane);
        const bool writes = writes_sum<DEEP, LANES>(lane);
        float query[E];
        load_query(q, (i64)b * q_b + (i64)h * q_h, part, query);
#pragma unroll 1
        for (int i = tid / LANES * DEEP; i - tid / LANES * DEEP < total; i += THREADS / LANES * DEEP) {
            int j[DEEP];
            float sum[DEEP];
            bool coded = true;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                j[u] = which(min(i + u, total - 1));
                coded = coded && keys.coded(j[u]);
            }
            auto products = [&](auto plain) {
                constexpr bool PLAIN = decltype(plain)::value;
                uint4 raw[DEEP];
#pragma unroll
                for (int u = 0; u < DEEP; u++) raw[u] = keys.load<PLAIN>(j[u], part);
#pragma unroll
                for (int u = 0; u < DEEP; u++) {
                    float x[E];
                    keys.numbers<PLAIN>(j[u], raw[u], x);
#pragma unroll
                    for (int e = 0; e < E; e++) x[e] = __fmul_rn(query[e], x[e]);
                    tree<E>(x);
                    sum[u] = x[0];
                }
            };
            if (STORED && __all_sync(ALL, coded)) products(Bool<true>{});
            else products(Bool<false>{});
            tree_over_lanes<DEEP, LANES>(sum, lane);
#pragma unroll
            for (int u = 0; u < HAS; u++)
                if (writes && i + first + u < total) keep(i + first + u, word_of(sum[u]));
        }
#endif
    };
    int highest = CODED ? NONE : high;
    if (!CODED) {
#pragma unroll 1
        for (int i = tid; i < mine_found; i += THREADS) atomicAdd(&s.candidates[fine.of(score_of(value[i]))], 1);
    } else {
        score_all([&](int i) { return position[i]; }, mine_found, [&](int i, int w) {
            value[i] = w, highest = max(highest, w);
            atomicAdd(&s.candidates[fine.of(score_of(w))], 1);
        });
        highest = __reduce_max_sync(ALL, highest);
        if (lane == 0) atomicMax(&s.highest, highest);
    }
    MARK(6);
    cluster_sync();
    MARK(7);

    // 4. The choice.
    bool slow = false;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) {
        slow |= pull(&s.full, r) != 0;
        if (CODED) highest = max(highest, pull(&s.highest, r));
    }
    Found edge = find_bin<BINS, CLUSTER>(s.candidates, wanted, s.scratch);
    slow |= edge.bin < 0 || edge.inside > NEAR;
    auto bits_of = [&](int j) { return bitmap + j / BLOCK / CLUSTER * (BLOCK / 32); };  // of the block of an own key
    // A chosen key, once `before` has the sums before each block, to its rank. Winners near the edge have no bit.
    auto send = [&](int j, int w, int winners) {
        const int at = j % BLOCK / 32;
        const u32* bits = bits_of(j);
        int place = before[j / BLOCK] + __popc(bits[at] & ((1u << (j % 32)) - 1));
#pragma unroll
        for (int i = 0; i < BLOCK / 32; i++) place += i < at ? __popc(bits[i]) : 0;
#pragma unroll 1
        for (int i = 0; i < winners; i++) place += s.winner[i] < j;
        push(chosen_position + place % span, place / span, j);
        push(chosen + place % span, place / span, w);
    };
    MARK(8);
    if (!slow) {
        auto take = [&](int j) {
            atomicOr(bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
            atomicAdd(&own_count[j / BLOCK / CLUSTER], 1);
        };
#pragma unroll 1
        for (int i = tid; i < mine_found; i += THREADS) {
            const int bin = fine.of(score_of(value[i]));
            if (bin > edge.bin) take(position[i]);
            if (bin == edge.bin) {
                const int at = atomicAdd(&s.nears, 1);
#pragma unroll
                for (int r = 0; r < CLUSTER; r++)
                    push(s.near_word + rank * NEAR + at, r, value[i]), push(s.near_position + rank * NEAR + at, r, position[i]);
            }
        }
        MARK(9);
        cluster_sync();
        MARK(10);
#pragma unroll 1
        for (int i = tid; i < blocks; i += THREADS) before[i] = pull(own_count + i / CLUSTER, i % CLUSTER);
        int has[CLUSTER];
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) has[r] = pull(&s.nears, r);
        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < CLUSTER * NEAR; i += THREADS) {
            const int w = s.near_word[i], j = s.near_position[i];
            bool is = false;
            int better = 0;
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                is = is || (r == i / NEAR && i % NEAR < has[r]);
#pragma unroll 1
                for (int o = 0; o < has[r]; o++) {
                    const int other = s.near_word[r * NEAR + o];
                    better += other > w || (other == w && s.near_position[r * NEAR + o] < j);
                }
            }
            if (is && better < wanted - edge.above) {
                const int at = atomicAdd(&s.winners, 1);
                s.winner[at] = j, s.winner_word[at] = w;
            }
        }
        sums_before(before, blocks, s.scratch);
        MARK(11);
        const int winners = s.winners;
#pragma unroll 1
        for (int i = tid; i < mine_found; i += THREADS) {
            const int j = position[i];
            if (bits_of(j)[j % BLOCK / 32] >> (j % 32) & 1) send(j, value[i], winners);
        }
#pragma unroll 1
        for (int i = tid; i < winners; i += THREADS)
            if (s.winner[i] / BLOCK % CLUSTER == rank) send(s.winner[i], s.winner_word[i], winners);
    } else {
        // Too many candidates, or too many near the edge: halving by bytes over all words, which needs no room.
        int* words = word + (i64)row * padded;
        u32* equal = (u32*)position;
        auto gather_before = [&] {
            cluster_sync();
#pragma unroll 1
            for (int i = tid; i < blocks; i += THREADS) before[i] = pull(own_count + i / CLUSTER, i % CLUSTER);
            __syncthreads();
            sums_before(before, blocks, s.scratch);
        };
        auto key_of = [&](int i) { return (i / BLOCK * CLUSTER + rank) * BLOCK + i % BLOCK; };
        cluster_sync();
        if (CODED) {
            if (tid == 0) s.highest = NONE;
            __syncthreads();
            highest = NONE;
            score_all(
                [&](int i) { return min(key_of(i), n - 1); },
                own * BLOCK,
                [&](int i, int w) {
                    const int j = key_of(i);
                    const bool is = j < n && (j < start || j >= end || passes(my_fast[j]));
                    if (j < padded) words[j] = is ? w : NONE;
                    if (is) highest = max(highest, w);
                });
            highest = __reduce_max_sync(ALL, highest);
            if (lane == 0) atomicMax(&s.highest, highest);
            cluster_sync();
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&s.highest, r));
        }
        u32 prefix = 0;
        int needed = wanted;
#pragma unroll 1
        for (int shift = 24; shift >= 0; shift -= 8) {
#pragma unroll 1
            for (int i = tid; i < 256; i += THREADS) s.counts[i] = 0;
            __syncthreads();
#pragma unroll 1
            for (int i = tid; i < own * BLOCK; i += THREADS) {
                const int j = key_of(i);
                const u32 w = j < padded ? (u32)words[j] ^ 0x80000000u : 0;
                if (w != 0 && (shift == 24 || w >> (shift + 8) == prefix >> (shift + 8)))
                    atomicAdd(&s.counts[w >> shift & 255], 1);
            }
            cluster_sync();
            const Found digit = find_bin<256, CLUSTER>(s.counts, needed, s.scratch);
            prefix |= (u32)max(digit.bin, 0) << shift, needed -= digit.above;
            cluster_sync();
        }
#pragma unroll 1
        for (int i = tid; i < own; i += THREADS) own_count[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = warp * 32; i < own * BLOCK; i += THREADS) {
            const int j = key_of(i + lane);
            const u32 w = j < padded ? (u32)words[j] ^ 0x80000000u : 0;
            const u32 above = __ballot_sync(ALL, w > prefix), same = __ballot_sync(ALL, w == prefix && w != 0);
            if (lane == 0) {
                bitmap[i / 32] = above, equal[i / 32] = same;
                if (same) atomicAdd(&own_count[i / BLOCK], __popc(same));
            }
        }
        gather_before();
        cluster_sync();
#pragma unroll 1
        for (int i = tid; i < own; i += THREADS) {
            const int block = i * CLUSTER + rank;
            int left = block < blocks ? needed - before[block] : 0, has = 0;
            for (int w = i * (BLOCK / 32); w < (i + 1) * (BLOCK / 32); w++) {
                u32 ties = equal[w];
                while (ties && left > 0) {
                    bitmap[w] |= ties & (0u - ties);
                    ties &= ties - 1, left--;
                }
                has += __popc(bitmap[w]);
            }
            own_count[i] = has;
        }
        gather_before();
#pragma unroll 1
        for (int i = tid; i < own * BLOCK; i += THREADS) {
            const int j = key_of(i);
            if (bits_of(j)[j % BLOCK / 32] >> (j % 32) & 1) send(j, words[j], 0);
        }
    }
    MARK(12);
    cluster_sync();
    MARK(13);

    // 5. Attention over ranks [span rank, span (rank + 1)): a team of lanes takes RANKS << LEVELS neighbouring ones.
    const int live = max(0, min(span, wanted - span * rank));
    const float top = score_of(highest);
#pragma unroll 1
    for (int i = tid; i < live; i += THREADS) indices[(i64)row * wanted + span * rank + i] = chosen_position[i];
#pragma unroll 1
    for (int i = tid; i < span; i += THREADS) {
        const float t = i < live ? __fmul_rn(__fsub_rn(score_of(chosen[i]), top), (float)factor) : 0.0f;
        chosen[i] = __float_as_int(i < live ? exp2_canonical(t) : 0.0f);
    }
    __syncthreads();
    constexpr int LANES_V = DIM_V / E;
    const int part = lane % LANES_V, team = tid / LANES_V;
    const Rows values(AS_SIDE(v), b, g, whole, sinks);
    float stack[LEVELS + 1][E + 1];
#pragma unroll
    for (int e = 0; e <= E; e++) stack[LEVELS][e] = 0.0f;
#pragma unroll 1
    for (int c = 0; c < 1 << LEVELS; c++) {
        const int i = ((team << LEVELS) + c) * RANKS;
        float now[E + 1];
#pragma unroll
        for (int e = 0; e <= E; e++) now[e] = 0.0f;
        if (i < live) {
            constexpr int DEPTH = log2i(RANKS);
            float level[DEPTH + 1][E + 1];
            bool coded = true;
#pragma unroll
            for (int u = 0; u < RANKS; u++) coded = coded && values.coded(chosen_position[min(i + u, live - 1)]);
            auto products = [&](auto plain) {
                constexpr bool PLAIN = decltype(plain)::value;
                uint4 raw[RANKS];
#pragma unroll
                for (int u = 0; u < RANKS; u++) raw[u] = values.load<PLAIN>(chosen_position[min(i + u, live - 1)], part);
#pragma unroll
                for (int u = 0; u < RANKS; u++) {
                    // Beyond the last, p is 0.
                    float x[E + 1];
                    const float p = __int_as_float(chosen[i + u]);
                    values.numbers<PLAIN>(chosen_position[min(i + u, live - 1)], raw[u], x);
#pragma unroll
                    for (int e = 0; e < E; e++) x[e] = __fmul_rn(p, x[e]);
                    x[E] = p;
                    // Pairs are added as soon as both are there.
#pragma unroll
                    for (int l = 0; l <= DEPTH; l++) {
                        if (l < DEPTH && (u >> l & 1)) {
#pragma unroll
                            for (int e = 0; e <= E; e++) x[e] = __fadd_rn(level[l][e], x[e]);
                        } else {
#pragma unroll
                            for (int e = 0; e <= E; e++) level[l][e] = x[e];
                            break;
                        }
                    }
                }
            };
            if (STORED && coded) products(Bool<true>{});
            else products(Bool<false>{});
#pragma unroll
            for (int e = 0; e <= E; e++) now[e] = level[DEPTH][e];
        }
#pragma unroll
        for (int l = 0, done = 0; l <= LEVELS; l++) {
            const bool add = l < LEVELS && (c >> l & 1), keep = !add && !done;
#pragma unroll
            for (int e = 0; e <= E; e++) {
                if (keep) stack[l][e] = now[e];
                if (add && !done) now[e] = __fadd_rn(stack[l][e], now[e]);
            }
            done |= keep;
        }
    }
#pragma unroll
    for (int m = LANES_V; m < 32; m *= 2)
#pragma unroll
        for (int e = 0; e <= E; e++) stack[LEVELS][e] = __fadd_rn(stack[LEVELS][e], __shfl_xor_sync(ALL, stack[LEVELS][e], m));
    if (lane < LANES_V) {
#pragma unroll
        for (int e = 0; e < E; e++) s.part[warp][part * E + e] = stack[LEVELS][e];
        if (lane == 0) s.weight[warp] = stack[LEVELS][E];
    }
    __syncthreads();
    MARK(14);
#pragma unroll 1
    for (int d = tid; d <= DIM_V; d += THREADS) {
        float x[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[w] = d < DIM_V ? s.part[w][d] : s.weight[w];
        tree<WARPS>(x);
        push((int*)(d < DIM_V ? &s.numerators[rank][d] : &s.denominators[rank]), 0, __float_as_int(x[0]));
    }
    cluster_sync();
    if (rank == 0)
#pragma unroll 1
        for (int d = tid; d < DIM_V; d += THREADS) {
            float x[CLUSTER], w[CLUSTER];
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
            tree<CLUSTER>(x), tree<CLUSTER>(w);
            const float y = __fdiv_rn(__fadd_rn(x[0], 0.0f), w[0]);
            const i64 at = (i64)row * DIM_V + d;
#if ELEM == 0
            ((float*)out)[at] = y;
#elif ELEM == 2
            const u32 bits = __float_as_uint(y);
            ((u16*)out)[at] = (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
            ((u16*)out)[at] = half_of(y);
#endif
        }
    MARK(15);
}
