// From scores to the output of a decode step, in five stages: candidates, canonical scores, edge, choice, attention.
//
// A row is one query head; a cluster of programs works on it. Every sum that reaches the output has the order of
// qaxis/arithmetic, so the bits are those of the Triton kernels and of the PyTorch reference. What only decides how
// much is looked at may round as it likes: bins are monotone in the score. Where the cut that the counts lead to was too high,
// or there is too little room, or too many scores are in one bin, a slower way that needs none of that is taken.
//
// compiler.py puts hardware.cuh, canonical.cuh, seen.cuh and tally.cuh before this and defines, besides what is said there:
// DIM_V, GROUP, CLUSTER, RANKS, LEVELS, THREADS, CODED (keys were scored by their 8-bit codes), STORED (keys and values are an
// 8-bit cache), FORCED (some keys are always kept), LOGITS (0: scaled scores; 1: with a sink; 2: capped, perhaps with a sink),
// PROFILE, SHARED (bytes).
//
// A row sees keys [begin, end). Only blocks that hold some of them are looked at: positions count from the first of these
// blocks, `base`, up to where indices are written.

constexpr int WARPS = THREADS / 32, LANES = DIM / E, LANES_V = DIM_V / E, BINS = 1024, NEAR = 112, MARKS = 13;
constexpr int WORDS = BLOCK / 32;  // of a bitmap, a block
static_assert(!STORED || ELEM == 2);

// ---- keys and values ------------------------------------------------------------------------------------------------

// A tensor, or codes, scales, and first and newest tokens in full (storage/side.py). Strides in units of E numbers.
struct Side {
    const void *rows, *scales, *first, *newest;
    int rows_b, rows_h, rows_n, scales_b, scales_h, scales_n, first_b, first_h, first_n, newest_b, newest_h, newest_n;
};
#define SIDE(p)                                                                                                 \
    const void *p##_rows, const void *p##_scales, const void *p##_first, const void *p##_newest, int p##_rows_b, \
        int p##_rows_h, int p##_rows_n, int p##_scales_b, int p##_scales_h, int p##_scales_n, int p##_first_b,   \
        int p##_first_h, int p##_first_n, int p##_newest_b, int p##_newest_h, int p##_newest_n
#define AS_SIDE(p)                                                                                                  \
    Side{p##_rows, p##_scales, p##_first, p##_newest, p##_rows_b, p##_rows_h, p##_rows_n, p##_scales_b, p##_scales_h, \
         p##_scales_n, p##_first_b, p##_first_h, p##_first_n, p##_newest_b, p##_newest_h, p##_newest_n}

// E codes, and the exponents of their scales, as numbers.
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

struct Rows {  // one KV head of a side
    const char *rows, *scales, *first, *newest;
    int rows_n, scales_n, first_n, newest_n, whole, sinks;

    // Tokens count from `base`, and before `whole` have codes.
    __device__ Rows(const Side& s, int b, int g, int base, int whole, int in_full) : whole(whole), sinks(in_full - base) {
        const int item = STORED ? E : 16;
        rows_n = s.rows_n, scales_n = s.scales_n, first_n = s.first_n, newest_n = s.newest_n;
        rows = (const char*)s.rows + ((i64)b * s.rows_b + (i64)g * s.rows_h + (i64)base * rows_n) * item;
        scales = (const char*)s.scales + ((i64)b * s.scales_b + (i64)g * s.scales_h + (i64)(base / 128) * scales_n) * E;
        first = (const char*)s.first + ((i64)b * s.first_b + (i64)g * s.first_h + (i64)base * first_n) * 16;
        newest = (const char*)s.newest + ((i64)b * s.newest_b + (i64)g * s.newest_h) * 16;
    }
    __device__ __forceinline__ bool coded(int j) const { return STORED && j >= sinks && j < whole; }
    // Numbers E * part and following of token j, as they are stored. PLAIN: the token is known to be coded.
    template <bool PLAIN> __device__ __forceinline__ uint4 load(int j, int part) const {
        if constexpr (!STORED) return load16(rows + ((i64)j * rows_n + part) * 16);
        const char* lower = rows + ((i64)j * rows_n + part) * E;
        const char* upper = scales + ((i64)(j >> 7) * scales_n + part) * E;
        if (!PLAIN && !coded(j)) {
            // The two halves of 16 bytes instead of codes and exponents: no other loads, so that many are in flight.
            lower = (j < sinks ? first + (i64)j * first_n * 16 : newest + (i64)(j - whole) * newest_n * 16) + part * 16;
            upper = lower + 8;
        }
        const uint2 a = load8(lower), b = load8(upper);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    // As numbers (rule 1).
    template <bool PLAIN> __device__ __forceinline__ void numbers(int j, uint4 w, float* x) const {
        if (STORED && (PLAIN || coded(j))) dequantize(w, x);
        else widen(w, x);
    }
};

// ---- sums over lanes, warps and counts ------------------------------------------------------------------------------

// Of x over the lanes up to this one.
__device__ __forceinline__ int sum_upto(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_up_sync(ALL, x, o);
        if (lane >= o) x += more;
    }
    return x;
}

// Of x over the lanes from this one on.
__device__ __forceinline__ int sum_from(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_down_sync(ALL, x, o);
        if (lane + o < 32) x += more;
    }
    return x;
}

// Of a value of every warp: the sum over the warps before this one, and over all.
struct Sums { int before, all; };
__device__ __forceinline__ Sums over_warps(const int* values, int lane, int warp) {
    const int mine = lane < WARPS ? values[lane] : 0, upto = sum_upto(mine, lane);
    return {__shfl_sync(ALL, upto - mine, warp), __shfl_sync(ALL, upto, 31)};
}

// Places in a list for so many of this lane, in the order of the lanes: one atomic addition a warp.
__device__ __forceinline__ int reserve(int* length, int mine, int lane) {
    const int upto = sum_upto(mine, lane);
    int at = 0;
    if (lane == 31) at = atomicAdd(length, upto);
    return __shfl_sync(ALL, at, 31) + upto - mine;
}

// In place: from the counts of all blocks to the sums of those before each. `counts` is this program's copy.
__device__ __forceinline__ void sums_before(int* counts, int blocks, int* scratch) {
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

// This thread's EACH neighbouring counts of COUNT, summed over PROGRAMS of the cluster: its own alone if that is one.
template <int COUNT, int PROGRAMS, int EACH>
__device__ __forceinline__ void sum_counts(const int* counts, int (&c)[EACH]) {
    constexpr int AT_ONCE = EACH % 2 == 0 ? 2 : 1;
    if (threadIdx.x >= COUNT) return;
#pragma unroll
    for (int r = 0; r < PROGRAMS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i += AT_ONCE) {
            const int* from = counts + threadIdx.x * EACH + i;
            if constexpr (AT_ONCE == 2) {
                const int2 two = PROGRAMS == 1 ? make_int2(from[0], from[1]) : pull2(from, r);
                c[i] += two.x, c[i + 1] += two.y;
            } else {
                c[i] += PROGRAMS == 1 ? from[0] : pull(from, r);
            }
        }
}

// The highest bin at or above which there are so many as are needed (-1: there is none), how many are above it and
// inside.
struct Found { int bin, above, inside; };
template <int COUNT, int PROGRAMS>
__device__ __forceinline__ Found find_bin(const int* counts, int needed, int* scratch) {
    constexpr int EACH = COUNT / THREADS > 0 ? COUNT / THREADS : 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c[EACH] = {}, sum = 0;
    sum_counts<COUNT, PROGRAMS>(counts, c);
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += c[i];
    int from_here = sum_from(sum, lane);
    if (lane == 0) scratch[warp] = from_here;
    if (threadIdx.x == 0) scratch[WARPS] = -1, scratch[WARPS + 1] = 0, scratch[WARPS + 2] = 0;
    __syncthreads();
    const Sums sums = over_warps(scratch, lane, warp);
    from_here += sums.all - sums.before - scratch[warp];
    int above = from_here - sum;
    if (above < needed && needed <= from_here) {
        int bin = -1, inside = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) {
            if (bin < 0 && above + c[i] >= needed) bin = threadIdx.x * EACH + i, inside = c[i];
            if (bin < 0) above += c[i];
        }
        scratch[WARPS] = bin, scratch[WARPS + 1] = above, scratch[WARPS + 2] = inside;
    }
    __syncthreads();
    const Found found = {scratch[WARPS], scratch[WARPS + 1], scratch[WARPS + 2]};
    __syncthreads();
    return found;
}

// ---- bins and fast scores -------------------------------------------------------------------------------------------

// Which of BINS bins above the score `base`, finer the nearer they are to it: the k_eff-th best key is near. Monotone.
struct Bins {
    static constexpr int FINE = 6;  // bits of bins in an octave
    float base, per;                // `per` of a score is the whole range, or 0: all are in one bin
    __device__ __forceinline__ bool counts(float score) const { return per == 0.0f || score >= base; }
    __device__ __forceinline__ int of(float score) const {
        if (per == 0.0f) return 0;
        const int octaves = BINS >> FINE, x = __float_as_int((score - base) * per) >> (23 - FINE);
        return min(max(x - ((127 - octaves) << FINE), 0), BINS - 1);
    }
};

// Fast scores are 16-bit places with a proven error, made from codes, or canonical words.
#if CODED
typedef u16 Fast;
#else
typedef int Fast;
#endif

// The place from which on canonical scores are of interest: a key that is no candidate is canonically below it.
struct Cut {
    float place, units;
    __device__ __forceinline__ bool usable() const { return place > 0.0f && units > 0.0f; }
    // The least fast score of a candidate, where places are off by so much: who is below it is canonically a whole place below.
    __device__ __forceinline__ int least(float off) const {
        if (!usable()) return CODED ? 0 : NONE + 1;
        return CODED ? max((int)floorf(place - off), 0) : word_of(bins().base);
    }
    __device__ __forceinline__ Bins bins() const {
        return {usable() ? (place - 32768.0f) / units : 0.0f, usable() ? units / PLACES : 0.0f};
    }
};

// ---- what the stages share ------------------------------------------------------------------------------------------

struct Shared {
    int counts[TALLY];  // of keys, by their fast scores, by bytes of these; of candidates, by bins of canonical scores
    // Candidates near the edge, of every program; those of them that are chosen.
    int near_word[CLUSTER * NEAR], near_position[CLUSTER * NEAR], winner_word[NEAR], winner[NEAR];
    int near[CLUSTER];  // how many of every program
    int scratch[WARPS + 4];
    int highest;         // canonical word
    int runs, found, nears, winners;  // lengths of lists
    int full;            // whether candidates were left out for lack of room
    float warp_numerators[WARPS][DIM_V], warp_denominators[WARPS];  // stage 5: of a warp, of a program
    float numerators[CLUSTER][DIM_V], denominators[CLUSTER];
};

static_assert(sizeof(Shared) == SHARED, "cuda.py counts other bytes");

// As the kernel gets them: what the step was made for.
struct Sizes {
    int padded;             // places of keys, rounded up to blocks
    int k_eff, room, span;  // keys to choose, candidates and ranks that a program has room for, at most
};

constexpr int TURN = THREADS / LANES_V * RANKS;  // ranks that a program attends to in one turn

// One program of the cluster: its row, its part of it, and where things lie in its shared memory.
struct Program {
    Shared& s;
    int *position, *value;           // candidates, and their canonical words
    int *own_count, *before;         // chosen keys: of own blocks; of all blocks, then the sums before each
    u32* bitmap;                     // chosen keys, WORDS an own block
    int *chosen_position, *chosen;   // of ranks [span rank, span (rank + 1))
    const Fast *fast, *best;         // of the row, from `base` on
    i64* marks;
    int rank, tid, lane, warp;       // of the program in its cluster, of the thread
    int row, b, h, g;                // one row is head h of batch b; its KV head
    int base, begin, end;            // the row sees [begin, end), from `base` on as all positions
    int start, stop;                 // keys that have a fast score
    int first, last;                 // those before `first` and from `last` on are always kept
    int k_eff, turns;                // keys to choose; a power of two of turns of ranks, as few as do
    int room, blocks, own;           // of candidates; blocks of keys, own ones

    __device__ __forceinline__ Program(
        char* memory, const Sizes& most, const Seen& seen, const Fast* all_fast, const Fast* all_best, i64* marks,
        int heads)
        : s(*(Shared*)memory), marks(marks), base(seen.base), k_eff(seen.k_eff), room(most.room) {
        rank = cluster_rank(), tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
        row = blockIdx.y, b = row / heads, h = row % heads, g = h / GROUP;
        begin = seen.begin - base, end = seen.end - base, start = seen.start - base, stop = seen.stop - base;
        first = seen.first - base, last = seen.last - base;
        blocks = whole_blocks(end) / BLOCK, own = (blocks + CLUSTER - 1) / CLUSTER;
        const int rounds = (k_eff - 1) / (TURN * CLUSTER);  // full ones, before the last
        turns = rounds > 0 ? 1 << (32 - __clz(rounds)) : 1;
        // Where things lie does not depend on the row.
        const int most_blocks = most.padded / BLOCK, most_own = (most_blocks + CLUSTER - 1) / CLUSTER;
        position = (int*)(memory + (sizeof(Shared) + 15) / 16 * 16), value = position + room;
        own_count = value + room, before = own_count + most_own;
        bitmap = (u32*)(before + most_blocks);
        chosen_position = (int*)(bitmap + most_own * WORDS), chosen = chosen_position + most.span;
        fast = all_fast + (i64)row * most.padded + base, best = all_best + ((i64)row * most.padded + base) / SUB;
    }
    __device__ __forceinline__ int span() const { return turns * TURN; }
    __device__ __forceinline__ bool forced(int j) const { return FORCED && (j < first || j >= last); }
    // How many of the others are chosen.
    __device__ __forceinline__ int ranked() const { return FORCED ? k_eff - (first - begin) - (end - last) : k_eff; }
    // Whether a key can be the highest of the chosen ones, if no other is higher.
    __device__ __forceinline__ bool may_be_highest(int j) const { return !FORCED || forced(j) || ranked() > 0; }
    __device__ __forceinline__ int live() const { return max(0, min(span(), k_eff - span() * rank)); }

    // Blocks of keys go round the programs, so that neighbours that score alike do not fall to one of them. With EACH
    // things a block: which of all is the i-th own.
    template <int EACH>
    __device__ __forceinline__ int dealt(int i) const { return (i / EACH * CLUSTER + rank) * EACH + i % EACH; }
    __device__ __forceinline__ bool owns(int j) const { return j / BLOCK % CLUSTER == rank; }
    // Of an own key: its block among the own ones, the bitmap's words of that, whether its bit is set.
    __device__ __forceinline__ int own_block(int j) const { return j / BLOCK / CLUSTER; }
    __device__ __forceinline__ u32* bits_of(int j) const { return bitmap + own_block(j) * WORDS; }
    __device__ __forceinline__ bool is_taken(int j) const { return bits_of(j)[j % BLOCK / 32] >> (j % 32) & 1; }
};

// The time, for figures of the stages.
__device__ __forceinline__ void mark(const Program& p, int i) {
    if constexpr (PROFILE) {
        __syncthreads();
        if (p.tid == 0) p.marks[((i64)p.row * CLUSTER + p.rank) * MARKS + i] = nanoseconds();
    }
}

// ---- 1. candidates --------------------------------------------------------------------------------------------------
//
// Keys of own blocks that may be among the best, in any order. Keys without a fast score are always candidates; so are those
// that are kept in any case, whatever they score.

__device__ __forceinline__ void clear(const Program& p) {
    Shared& s = p.s;
#pragma unroll 1
    for (int i = p.tid; i < BINS; i += THREADS) s.counts[i] = 0;
#pragma unroll 1
    for (int i = p.tid; i < p.own * WORDS; i += THREADS) p.bitmap[i] = 0;
#pragma unroll 1
    for (int i = p.tid; i < p.own; i += THREADS) p.own_count[i] = 0;
    if (p.tid == 0) s.highest = NONE, s.runs = 0, s.found = 0, s.nears = 0, s.winners = 0, s.full = 0;
}

// Of 16 keys from j on, those in [from, to).
__device__ __forceinline__ u32 between(int j, int from, int to) {
    const int low = max(from - j, 0), high = min(to - j, 16);
    return low < high ? (ALL >> (32 - (high - low))) << low : 0;
}

// From the lower bits to every second.
__device__ __forceinline__ u32 spread(u32 x) {
    x = (x | x << 4) & 0x0f0f0f0fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
}

static_assert(SUB == 16 && 32 * SUB == BLOCK);
constexpr int PACKS = SUB * (int)sizeof(Fast) / 16;  // 16 bytes each

// Which of 16 fast scores are at least that, a bit each.
__device__ __forceinline__ u32 reaching(const uint4 (&raw)[PACKS], int least) {
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const u32 part[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            // Two at a time: those below, of even places in the lower half, of odd ones in the upper.
            const u32 both = (u32)least * 0x10001u;
            if (CODED) bits |= __vminu2(__vminu2(part[e], both) ^ both, 0x10001u) << (4 * i + e);
            else bits |= (int)part[e] >= least ? 1u << (4 * i + e) : 0u;
        }
    }
    return CODED ? ~(spread(bits & 0xffu) | spread(bits >> 16) << 1) : bits;
}

// A lane's 16 bytes of bests, each of a run of SUB neighbours; `i` counts them in own blocks.
struct Glance {
    static constexpr int RUNS = 16 / (int)sizeof(Fast), KEYS = RUNS * SUB, A_BLOCK = BLOCK / KEYS;
    int key;  // the first
    uint4 raw;
    float off;
    __device__ __forceinline__ Glance(const Program& p, const float* off_of, int i)
        : key(i < p.own * A_BLOCK ? p.dealt<A_BLOCK>(i) * KEYS : p.end), raw(make_uint4(0, 0, 0, 0)), off(0.0f) {
        if (key >= p.stop || key + KEYS <= p.start) return;
        raw = *(const uint4*)(p.best + key / SUB);
        if (CODED) off = off_of[key / 128];
    }
    // Which runs may hold a candidate, a bit each. Then they do hold one: as many are listed as there are candidates, at most.
    __device__ __forceinline__ u32 may(const Program& p, const Cut& cut) const {
        const u32 word[4] = {raw.x, raw.y, raw.z, raw.w};
        const int least = cut.least(off);
        u32 bits = 0;
        if (key >= p.end) return 0;
#pragma unroll
        for (int e = 0; e < RUNS; e++) {
            const int best = CODED ? (int)(word[e / 2 % 4] >> (16 * (e % 2)) & 65535) : (int)word[e % 4];
            if (best >= least) bits |= 1u << e;
        }
        if (key >= p.start && key + KEYS <= p.stop) return bits;
#pragma unroll 1
        for (int e = 0; e < RUNS; e++) {
            const int j = key + e * SUB;
            if (between(j, p.start, p.stop) == 0) bits &= ~(1u << e);
            if (between(j, p.begin, p.start) | between(j, p.stop, p.end)) bits |= 1u << e;
        }
        return bits;
    }
};

// Lists, in `value`, the runs that may hold a candidate, by their first key.
__device__ __forceinline__ void list_runs(const Program& p, const float* off_of, const Cut& cut) {
    constexpr int EACH = 2;
#pragma unroll 1
    for (int first = p.warp * 32; first < p.own * Glance::A_BLOCK; first += THREADS * EACH) {
        const Glance one(p, off_of, first + p.lane), other(p, off_of, first + p.lane + THREADS);
        u32 may = one.may(p, cut) | other.may(p, cut) << Glance::RUNS;
        int to = reserve(&p.s.runs, __popc(may), p.lane);
        for (; may && to < p.room; may &= may - 1, to++) {
            const int e = __ffs(may) - 1;
            p.value[to] = (e < Glance::RUNS ? one.key : other.key) + e % Glance::RUNS * SUB;
        }
    }
}

// Lists the candidates; returns how many of them are in the list. A key is looked at if the best of its run may be one.
__device__ __forceinline__ int list_candidates(const Program& p, const float* off_of, const Cut& cut, int* count) {
    constexpr int EACH = STORED ? 1 : 2;  // runs in flight
    Shared& s = p.s;
    list_runs(p, off_of, cut);
    __syncthreads();
    const int runs = min(s.runs, p.room);
#pragma unroll 1
    for (int first = p.warp * 32; first < runs; first += THREADS * EACH) {
        u32 may[EACH], scored[EACH];
        int key[EACH], least[EACH], mine = 0;
        uint4 raw[EACH][PACKS];
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const int i = first + p.lane + u * THREADS;
            key[u] = i < runs ? p.value[i] : p.end;
            scored[u] = between(key[u], p.start, p.stop), may[u] = between(key[u], p.begin, p.end) & ~scored[u];
            least[u] = cut.least(CODED && scored[u] ? off_of[key[u] / 128] : 0.0f);
#pragma unroll
            for (int i = 0; i < PACKS; i++)
                if (scored[u]) raw[u][i] = ((const uint4*)(p.fast + key[u]))[i];
        }
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            if (scored[u]) may[u] |= reaching(raw[u], least[u]) & scored[u];
            mine += __popc(may[u]);
        }
        int to = reserve(&s.found, mine, p.lane);
#pragma unroll
        for (int u = 0; u < EACH; u++)
            for (; may[u] && to < p.room; may[u] &= may[u] - 1, to++) p.position[to] = key[u] + __ffs(may[u]) - 1;
    }
    __syncthreads();
    const int found = max(s.found, s.runs);
    if (p.tid == 0) s.full = found > p.room, count[p.row * CLUSTER + p.rank] = found;
    return min(s.found, p.room);
}

// ---- 2. canonical scores --------------------------------------------------------------------------------------------
//
// Of the candidates (rules 1 to 4): LANES lanes a key, DEEP keys at a time so that many loads are in flight. They are
// counted in bins as they come. Nothing else is scored: what is among the best is a candidate. Fast scores that are
// canonical are only counted.

struct Scorer {
    static constexpr int DEEP = 4;
    Rows keys;
    const char* query;

    // Of every key, this lane's part of the score. PLAIN: all are coded.
    template <bool PLAIN>
    __device__ __forceinline__ void products(
        const float (&x)[E], const int (&j)[DEEP], int part, float (&sum)[DEEP]) const {
        uint4 raw[DEEP];
#pragma unroll
        for (int u = 0; u < DEEP; u++) raw[u] = keys.load<PLAIN>(j[u], part);
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            float y[E];
            keys.numbers<PLAIN>(j[u], raw[u], y);
            sum[u] = product(x, y);
        }
    }

    // The words of keys which(0), ..., which(total - 1): keep(i, word).
    template <class Which, class Keep>
    __device__ __forceinline__ void score(const Program& p, int total, Which which, Keep keep) const {
        constexpr int HAS = DEEP > LANES ? DEEP / LANES : 1;
        if (total == 0) return;
        const int lane = p.lane, part = lane % LANES, first = first_sum<DEEP, LANES>(lane), team = p.tid / LANES * DEEP;
        const bool writes = writes_sum<DEEP, LANES>(lane);
        float x[E];
        load_query(query, 0, part, x);
#pragma unroll 1
        for (int i = team; i - team < total; i += THREADS / LANES * DEEP) {
            int j[DEEP];
            float sum[DEEP];
            bool coded = true;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                j[u] = which(min(i + u, total - 1));
                coded = coded && keys.coded(j[u]);
            }
            if (STORED && __all_sync(ALL, coded)) products<true>(x, j, part, sum);
            else products<false>(x, j, part, sum);
            tree_over_lanes<DEEP, LANES>(sum, lane);
#pragma unroll
            for (int u = 0; u < HAS; u++)
                if (writes && i + first + u < total) keep(i + first + u, word_of(sum[u]));
        }
    }
};

// To s.highest, of what every thread saw.
__device__ __forceinline__ void tell_highest(const Program& p, int highest) {
    highest = __reduce_max_sync(ALL, highest);
    if (p.lane == 0) atomicMax(&p.s.highest, highest);
}

__device__ __forceinline__ void score_candidates(const Program& p, const Scorer& scorer, const Bins& bins, int found) {
    int highest = NONE;
    auto count = [&](int i, int w) {
        const int j = p.position[i];
        if (p.may_be_highest(j)) highest = max(highest, w);
        if (!p.forced(j) && bins.counts(score_of(w))) atomicAdd(&p.s.counts[bins.of(score_of(w))], 1);
    };
    if (CODED) {
        scorer.score(p, found, [&](int i) { return p.position[i]; }, [&](int i, int w) { p.value[i] = w, count(i, w); });
    } else {
#pragma unroll 1
        for (int i = p.tid; i < found; i += THREADS) count(i, p.value[i] = p.fast[p.position[i]]);
    }
    tell_highest(p, highest);
}

// ---- 3. the edge ----------------------------------------------------------------------------------------------------
//
// Keys that are no candidates are canonically below the base of the bins. So if enough candidates are not, the best are among
// them (the certificate), and the k_eff-th of them is in the bin at the edge.

struct Edge {
    Found at;
    int found;  // candidates of this program
    bool sure;
};

// Where nothing is to be chosen, as all keys are kept or all but those that are kept in any case are not.
__device__ __forceinline__ bool takes_all(const Program& p) { return p.ranked() >= p.last - p.first; }

__device__ __forceinline__ Edge find_edge(
    const Program& p, const Scorer& scorer, const float* off_of, const Cut& cut, int* count) {
    Shared& s = p.s;
    clear(p);
    __syncthreads();
    const int found = list_candidates(p, off_of, cut, count);
    mark(p, 2);
    score_candidates(p, scorer, cut.bins(), found);
    mark(p, 3);
    cluster_sync();
    mark(p, 4);
    bool sure = true;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) sure &= pull(&s.full, r) == 0;
    Found at = find_bin<BINS, CLUSTER>(s.counts, p.ranked(), s.scratch);
    if (FORCED && p.ranked() == 0) at.bin = BINS, at.above = at.inside = 0;
    else if (takes_all(p)) at.bin = -1, at.above = p.ranked(), at.inside = 0;
    else sure &= at.bin >= 0 && at.inside <= NEAR;
    mark(p, 5);
    return {at, found, sure};
}

// The cut that the counts of the score kernels lead to. 0: all are candidates; -1: too few were counted.
__device__ __forceinline__ float counted_cut(const Program& p, const int* tally) {
    Shared& s = p.s;
    if (takes_all(p) || p.stop <= p.start) return 0.0f;
#pragma unroll 1
    for (int i = p.tid * 4; i < TALLY; i += THREADS * 4) *(int4*)(s.counts + i) = *(const int4*)(tally + (i64)p.row * TALLY + i);
    __syncthreads();
    const int needed = p.ranked();
    const Sample sample(needed, p.stop - p.start);
    const Found at = find_bin<TALLY, 1>(s.counts, sample.wanted(needed), s.scratch);
    if (at.bin > 0) return (float)(at.bin * EACH_TALLY);
    // The lowest place: where all keys were counted and some are needed that have no fast score.
    return sample.share >= 1.0f ? 1.0f : CODED ? -1.0f : 0.0f;
}

// Counts, over the cluster, own keys [start, stop) by a byte of the least place that they surely have, of those that have `above`
// as upper bytes.
__device__ __forceinline__ Found find_byte(const Program& p, const float* off_of, int needed, int shift, int above) {
    Shared& s = p.s;
    cluster_sync();
#pragma unroll 1
    for (int i = p.tid; i < 256; i += THREADS) s.counts[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
        const int j = p.dealt<BLOCK>(i);
        const int w = j >= p.start && j < p.stop ? (int)floorf(p.fast[j] - off_of[j / 128]) : 0;
        if (w > 0 && w >> (shift + 8) == above) atomicAdd(&s.counts[w >> shift & 255], 1);
    }
    cluster_sync();
    return find_bin<256, CLUSTER>(s.counts, needed, s.scratch);
}

// Where that failed: a place that k_eff keys surely reach.
__device__ __forceinline__ Cut find_cut(const Program& p, const float* off_of, float units) {
    const Found upper = find_byte(p, off_of, p.ranked(), 8, 0);
    const Found lower = find_byte(p, off_of, p.ranked() - upper.above, 0, max(upper.bin, 0));
    cluster_sync();
    const bool found = upper.bin >= 0 && lower.bin >= 0;
    return {found ? (float)(upper.bin << 8 | lower.bin) - 1.0f : 0.0f, units};
}

// ---- 4. the choice --------------------------------------------------------------------------------------------------
//
// A candidate in a bin above the edge, the bin of the k_eff-th, is among the best, as bins are monotone; one below it
// is not. Those at the edge are few and compared with each other (rule 4). Keys that are kept in any case are like those above. The rank of a chosen key is the number of
// chosen keys at lower positions: those of earlier blocks are counted, those of its own block have bits.

// Of every program, the chosen keys of its blocks.
__device__ __forceinline__ void gather_counts(const Program& p) {
#pragma unroll 1
    for (int i = p.tid; i < p.blocks; i += THREADS) p.before[i] = pull(p.own_count + i / CLUSTER, i % CLUSTER);
}
// The same, told instead of asked for: there once the cluster has waited.
__device__ __forceinline__ void tell_counts(const Program& p) {
    __syncthreads();
#pragma unroll 1
    for (int i = p.tid; i < p.own; i += THREADS) {
        const int block = i * CLUSTER + p.rank;
        if (block >= p.blocks) continue;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) push(p.before + block, r, p.own_count[i]);
    }
    if (p.tid < CLUSTER) push(p.s.near + p.rank, p.tid, p.s.nears);
}

// A chosen key, once `before` has the sums before each block, to its rank. Winners have no bit.
__device__ __forceinline__ void send(const Program& p, int j, int w, int winners) {
    const int at = j % BLOCK / 32;
    const u32* bits = p.bits_of(j);
    int place = p.before[j / BLOCK] + __popc(bits[at] & ((1u << (j % 32)) - 1));
#pragma unroll
    for (int i = 0; i < WORDS; i++) place += i < at ? __popc(bits[i]) : 0;
#pragma unroll 1
    for (int i = 0; i < winners; i++) place += p.s.winner[i] < j;
    // The span is a power of two.
    const int at_program = place & (p.span() - 1), program = place >> (31 - __clz(p.span()));
    push(p.chosen_position + at_program, program, j);
    push(p.chosen + at_program, program, w);
}

// Bits for candidates above the edge; those near it are told to every program.
__device__ __forceinline__ void sort_out(const Program& p, const Bins& bins, int found, int edge) {
    Shared& s = p.s;
#pragma unroll 1
    for (int i = p.tid; i < found; i += THREADS) {
        const int j = p.position[i];
        const float score = score_of(p.value[i]);
        const int bin = p.forced(j) ? BINS + 1 : bins.counts(score) ? bins.of(score) : -1;
        if (bin > edge) {
            atomicOr(p.bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
            atomicAdd(&p.own_count[p.own_block(j)], 1);
        }
        if (bin == edge) {
            const int at = atomicAdd(&s.nears, 1);
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                push(s.near_word + p.rank * NEAR + at, r, p.value[i]);
                push(s.near_position + p.rank * NEAR + at, r, j);
            }
        }
    }
}

// The `missing` best of the near ones (rule 4); every program finds them all.
__device__ __forceinline__ void find_winners(const Program& p, int missing) {
    Shared& s = p.s;
    const int* near = s.near;
#pragma unroll 1
    for (int i = p.tid; i < CLUSTER * NEAR; i += THREADS) {
        if (i % NEAR >= near[i / NEAR]) continue;
        const int w = s.near_word[i], j = s.near_position[i];
        int better = 0;
#pragma unroll 1
        for (int r = 0; r < CLUSTER; r++)
#pragma unroll 1
            for (int o = r * NEAR; o < r * NEAR + near[r]; o++)
                better += s.near_word[o] > w || (s.near_word[o] == w && s.near_position[o] < j);
        if (better < missing) {
            const int at = atomicAdd(&s.winners, 1);
            s.winner[at] = j, s.winner_word[at] = w;
        }
    }
}

__device__ __forceinline__ void choose_by_bins(const Program& p, const Bins& bins, const Edge& edge) {
    Shared& s = p.s;
    const int found = edge.found;
    sort_out(p, bins, found, edge.at.bin);
    tell_counts(p);
    mark(p, 6);
    cluster_sync();
    mark(p, 7);
    find_winners(p, p.ranked() - edge.at.above);
    sums_before(p.before, p.blocks, s.scratch);
    mark(p, 8);
    const int winners = s.winners;
#pragma unroll 1
    for (int i = p.tid; i < found; i += THREADS)
        if (p.is_taken(p.position[i])) send(p, p.position[i], p.value[i], winners);
#pragma unroll 1
    for (int i = p.tid; i < winners; i += THREADS)
        if (p.owns(s.winner[i])) send(p, s.winner[i], s.winner_word[i], winners);
}

// Too many candidates, or too many near the edge, or a cut too high: the k_eff-th word is found byte by byte, over all keys, which needs
// no room. Of ties the first are taken (rule 4). Words are unsigned numbers here, 0 for keys that do not reach the cut.
struct WordSearch {
    const Program& p;
    int* words;  // of the row
    u32* equal;  // as the bitmap, of keys that have the last word to be chosen; where the candidates were
    u32 word;    // that, as far as it is known
    int needed;  // how many of those that have it

    __device__ __forceinline__ WordSearch(const Program& p, int* words)
        : p(p), words(words), equal((u32*)p.position), word(0), needed(p.ranked()) {}
    __device__ __forceinline__ int key(int i) const { return p.dealt<BLOCK>(i); }
    __device__ __forceinline__ u32 at(int j) const {
        return j < p.end && !p.forced(j) ? (u32)words[j] ^ 0x80000000u : 0;
    }

    // Canonical words, where there are none yet.
    __device__ __forceinline__ void score(const Scorer& scorer, const float* off_of, const Cut& cut) const {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        int highest = NONE;
        scorer.score(p, p.own * BLOCK, [&](int i) { return min(key(i), p.end - 1); }, [&](int i, int w) {
            const int j = key(i);
            const bool is = j >= p.begin && j < p.end && (j < p.start || j >= p.stop || p.fast[j] >= cut.least(off_of[j / 128]));
            if (j < p.end) words[j] = is ? w : NONE;
            if (is && p.may_be_highest(j)) highest = max(highest, w);
        });
        tell_highest(p, highest);
        cluster_sync();
    }
    __device__ __forceinline__ void find_byte(int shift) {
        Shared& s = p.s;
#pragma unroll 1
        for (int i = p.tid; i < 256; i += THREADS) s.counts[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
            const u32 w = at(key(i));
            if (w != 0 && (shift == 24 || w >> (shift + 8) == word >> (shift + 8)))
                atomicAdd(&s.counts[w >> shift & 255], 1);
        }
        cluster_sync();
        const Found byte = find_bin<256, CLUSTER>(s.counts, needed, s.scratch);
        word |= (u32)max(byte.bin, 0) << shift, needed -= byte.above;
        cluster_sync();
    }
    // Bits of the keys above the word, and of those that have it; own_count is of the latter.
    __device__ __forceinline__ void compare() const {
#pragma unroll 1
        for (int i = p.tid; i < p.own; i += THREADS) p.own_count[i] = 0;
        __syncthreads();
        int highest = NONE;
#pragma unroll 1
        for (int i = p.warp * 32; i < p.own * BLOCK; i += THREADS) {
            const int j = key(i + p.lane);
            const u32 w = at(j);
            const bool kept = FORCED && j >= p.begin && j < p.end && p.forced(j);
            const u32 above = __ballot_sync(ALL, w > word || kept), same = __ballot_sync(ALL, w == word && w != 0);
            if (p.lane == 0) {
                p.bitmap[i / 32] = above, equal[i / 32] = same;
                if (same) atomicAdd(&p.own_count[i / BLOCK], __popc(same));
            }
            // Of fast scores that are canonical the list had room for some.
            if (kept || (!CODED && w != 0 && p.ranked() > 0)) highest = max(highest, words[j]);
        }
        if (FORCED || !CODED) tell_highest(p, highest);
    }
    // The first of those that have the word, as many as are needed; own_count is of all chosen keys then.
    __device__ __forceinline__ void take_ties() const {
#pragma unroll 1
        for (int i = p.tid; i < p.own; i += THREADS) {
            const int block = i * CLUSTER + p.rank;
            int left = block < p.blocks ? needed - p.before[block] : 0, has = 0;
            for (int w = i * WORDS; w < (i + 1) * WORDS; w++) {
                u32 ties = equal[w];
                while (ties && left > 0) {
                    p.bitmap[w] |= ties & (0u - ties);
                    ties &= ties - 1, left--;
                }
                has += __popc(p.bitmap[w]);
            }
            p.own_count[i] = has;
        }
    }
    __device__ __forceinline__ void count_before() const {
        cluster_sync();
        gather_counts(p);
        __syncthreads();
        sums_before(p.before, p.blocks, p.s.scratch);
    }
};

__device__ __forceinline__ void choose_by_words(
    const Program& p, const Scorer& scorer, const float* off_of, const Cut& cut, int* words) {
    WordSearch search(p, words);
    cluster_sync();
    if (CODED) search.score(scorer, off_of, cut);
    if (FORCED && search.needed == 0) search.word = ALL;
    else
#pragma unroll 1
        for (int shift = 24; shift >= 0; shift -= 8) search.find_byte(shift);
    search.compare();
    search.count_before();
    cluster_sync();
    search.take_ties();
    search.count_before();
#pragma unroll 1
    for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
        const int j = search.key(i);
        if (p.is_taken(j)) send(p, j, words[j], 0);
    }
}

// The highest canonical word of the row.
__device__ __forceinline__ int highest_of_row(const Program& p) {
    int highest = NONE;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
    return highest;
}

struct Look {
    Cut cut;
    Edge edge;
};

// A second look, seldom needed: not inlined, so that it takes no registers from the first.
__device__ __noinline__ Look look_again(
    const Program p, const Scorer scorer, const float* off_of, const float* units, int* count) {
    const Cut cut = find_cut(p, off_of, *units);
    return {cut, find_edge(p, scorer, off_of, cut, count)};
}

// Sends every chosen key and its word to its rank; returns the highest word.
__device__ __forceinline__ int choose(
    const Program& p, const Scorer& scorer, const float* off_of, const float* units, int* tally, int* words, int* count) {
    Look look = {{counted_cut(p, tally), *units}, {}};
    mark(p, 1);
    __syncthreads();
    if (look.cut.place >= 0.0f) look.edge = find_edge(p, scorer, off_of, look.cut, count);
    if (CODED && !look.edge.sure) look = look_again(p, scorer, off_of, units, count);
    if (look.edge.sure) {
        const int highest = highest_of_row(p);
        choose_by_bins(p, look.cut.bins(), look.edge);
        return highest;
    }
    choose_by_words(p, scorer, off_of, look.cut, words);
    return highest_of_row(p);
}

// The counts as they were before a step.
__device__ __forceinline__ void forget(const Program& p, int* tally) {
#pragma unroll 1
    for (int i = p.rank * THREADS + p.tid; i < TALLY; i += CLUSTER * THREADS) tally[(i64)p.row * TALLY + i] = 0;
}

// ---- 5. attention ---------------------------------------------------------------------------------------------------
//
// Of ranks [span rank, span (rank + 1)), within one tree over all ranks (rule 2): a team of LANES_V lanes takes
// RANKS times `turns` neighbouring ones; then the teams of a warp, warps and programs are added, of each a power of two.
// Ranks beyond the last weigh +0.0, as padding does, so how many turns there are changes no bit. The highest score is known by now, so no sum is ever rescaled
// (rule 5).

constexpr int SUMS = E + 1;  // numerators of a lane, and the denominator

// Number `at` of sink logits: float32, float16, bfloat16, float64.
__device__ __forceinline__ float sink_at(const void* sinks, int kind, i64 at) {
    if (kind == 3) return (float)((const double*)sinks)[at];
    if (kind == 0) return ((const float*)sinks)[at];
    const u32 bits = ((const u16*)sinks)[at];
    float half, none;
    halves_to_floats(bits, half, none);
    return kind == 1 ? half : __uint_as_float(bits << 16);
}

// From scores to logits, as attention/reference.py has it. `factor` turns what the softmax takes into powers of two.
struct Logits {
    float factor, scale, cap, sink;
    bool has_sink;
    __device__ __forceinline__ float of(float score) const {
        if constexpr (LOGITS == 0) return score;
        const float x = __fmul_rn(score, scale);
        if constexpr (LOGITS < 2) return x;
        const float y = __fdiv_rn(x, cap);
        const float e = exp2_canonical(__fmul_rn(__int_as_float(__float_as_int(y) & 0x7fffffff), -2.0f * factor));
        const float tanh = __fdiv_rn(__fsub_rn(1.0f, e), __fadd_rn(1.0f, e));
        return __fmul_rn(__int_as_float(__float_as_int(tanh) | (__float_as_int(y) & 0x80000000)), cap);
    }
    __device__ __forceinline__ float power(float logit, float top) const {
        return exp2_canonical(__fmul_rn(__fsub_rn(logit, top), factor));
    }
};

// x is the u-th of 1 << DEPTH neighbours: pairs are added when their second comes, as carries are in a counter. After
// the last, x is the sum of all. A sum that is not complete can wait at a level, but is overwritten before it is read.
template <int DEPTH> __device__ __forceinline__ void add_up(float (&level)[DEPTH + 1][SUMS], float (&x)[SUMS], int u) {
#pragma unroll
    for (int l = 0; l < DEPTH; l++)
#pragma unroll
        for (int e = 0; e < SUMS; e++) {
            if (u >> l & 1) x[e] = __fadd_rn(level[l][e], x[e]);
            else level[l][e] = x[e];
        }
}

// The indices of this program's ranks, and -1 up to `most`.
__device__ __forceinline__ void write_indices(const Program& p, int live, int most, i64* indices) {
    indices += (i64)p.row * most;
#pragma unroll 1
    for (int i = p.tid; i < live; i += THREADS) indices[p.span() * p.rank + i] = p.base + p.chosen_position[i];
#pragma unroll 1
    for (int i = p.k_eff + p.rank * THREADS + p.tid; i < most; i += CLUSTER * THREADS) indices[i] = -1;
}

// Over words their logits; returns the highest of all. A product with the scale is monotone, so its highest is that of the
// highest score; nothing proves that of a rounded cap.
__device__ __forceinline__ float to_logits(const Program& p, const Logits& logits, int live, int highest) {
    if constexpr (LOGITS == 2) {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        highest = NONE;
    }
#pragma unroll 1
    for (int i = p.tid; i < live; i += THREADS) {
        const float logit = logits.of(score_of(p.chosen[i]));
        p.chosen[i] = __float_as_int(logit);
        if (LOGITS == 2) highest = max(highest, word_of(logit));
    }
    float top = LOGITS == 2 ? 0.0f : logits.of(score_of(highest));
    if constexpr (LOGITS == 2) {
        tell_highest(p, highest);
        cluster_sync();
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
        top = score_of(highest);
    }
    return logits.has_sink ? fmaxf(top, logits.sink) : top;
}

// Over words their weights (rules 3 and 5); returns the highest logit.
__device__ __forceinline__ float weigh(const Program& p, const Logits& logits, int live, int highest) {
    float top = score_of(highest);
    if (LOGITS > 0) top = to_logits(p, logits, live, highest);
#pragma unroll 1
    for (int i = p.tid; i < p.span(); i += THREADS) {
        const float logit = LOGITS > 0 ? __int_as_float(p.chosen[i]) : score_of(p.chosen[i]);
        p.chosen[i] = __float_as_int(i < live ? logits.power(logit, top) : 0.0f);
    }
    return top;
}

// The sum of RANKS weighted values, from the i-th on. PLAIN: all are coded.
template <bool PLAIN>
__device__ __forceinline__ void sum_ranks(
    const Program& p, const Rows& values, int i, int live, int part, float (&x)[SUMS]) {
    constexpr int DEPTH = log2i(RANKS);
    const int *position = p.chosen_position + i, *weights = p.chosen + i;
    const int last = live - 1 - i;
    float level[DEPTH + 1][SUMS];
    uint4 raw[RANKS];
#pragma unroll
    for (int u = 0; u < RANKS; u++) raw[u] = values.load<PLAIN>(position[min(u, last)], part);
#pragma unroll
    for (int u = 0; u < RANKS; u++) {
        values.numbers<PLAIN>(position[min(u, last)], raw[u], x);
        const float weight = __int_as_float(weights[u]);
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = __fmul_rn(weight, x[e]);
        x[E] = weight;
        add_up<DEPTH>(level, x, u);
    }
}

// The sum of a warp's ranks.
__device__ __forceinline__ void sum_warp(const Program& p, const Rows& values, int live) {
    const int part = p.lane % LANES_V, team = p.tid / LANES_V;
    float level[LEVELS + 1][SUMS], sum[SUMS];
#pragma unroll 1
    for (int c = 0; c < p.turns; c++) {
        const int i = (team * p.turns + c) * RANKS;
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = 0.0f;
        if (i < live) {
            bool coded = true;
#pragma unroll
            for (int u = 0; u < RANKS; u++) coded = coded && values.coded(p.chosen_position[min(i + u, live - 1)]);
            if (STORED && coded) sum_ranks<true>(p, values, i, live, part, sum);
            else sum_ranks<false>(p, values, i, live, part, sum);
        }
        add_up<LEVELS>(level, sum, c);
    }
#pragma unroll
    for (int m = LANES_V; m < 32; m *= 2)
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = __fadd_rn(sum[e], __shfl_xor_sync(ALL, sum[e], m));
    if (p.lane < LANES_V) {
#pragma unroll
        for (int e = 0; e < E; e++) p.s.warp_numerators[p.warp][part * E + e] = sum[e];
        if (p.lane == 0) p.s.warp_denominators[p.warp] = sum[E];
    }
}

// The sum of this program, told to the first of the cluster.
__device__ __forceinline__ void sum_program(const Program& p) {
    Shared& s = p.s;
#pragma unroll 1
    for (int d = p.tid; d <= DIM_V; d += THREADS) {
        float x[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[w] = d < DIM_V ? s.warp_numerators[w][d] : s.warp_denominators[w];
        tree<WARPS>(x);
        push((int*)(d < DIM_V ? &s.numerators[p.rank][d] : &s.denominators[p.rank]), 0, __float_as_int(x[0]));
    }
}

__device__ __forceinline__ void store(void* out, i64 at, float y) {
#if ELEM == 0
    ((float*)out)[at] = y;
#elif ELEM == 2
    const u32 bits = __float_as_uint(y);
    ((u16*)out)[at] = (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    ((u16*)out)[at] = half_of(y);
#endif
}

// The sum of the cluster, divided (rule 3) and rounded to the dtype of the output.
__device__ __forceinline__ void write_output(const Program& p, const Logits& logits, float top, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    const float sink = sinks ? logits.power(logits.sink, top) : 0.0f;
#pragma unroll 1
    for (int d = p.tid; d < DIM_V; d += THREADS) {
        float x[CLUSTER], w[CLUSTER];
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
        tree<CLUSTER>(x), tree<CLUSTER>(w);
        if (sinks) w[0] = __fadd_rn(w[0], sink);
        const float y = __fdiv_rn(__fadd_rn(x[0], 0.0f), w[0]);
        // Where a sink is no number there is no denominator, and where it is infinite it has all the weight.
        store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
    }
}

__device__ __forceinline__ void attend(
    const Program& p, const Rows& values, const Logits& logits, int highest, int most, i64* indices, void* out) {
    const int live = p.live();
    write_indices(p, live, most, indices);
    const float top = weigh(p, logits, live, highest);
    __syncthreads();
    sum_warp(p, values, live);
    __syncthreads();
    mark(p, 11);
    sum_program(p);
    cluster_sync();
    if (p.rank == 0) write_output(p, logits, top, out);
}

// A row that keeps nothing.
__device__ __forceinline__ void write_nothing(const Program& p, int most, void* out, i64* indices, int* count) {
    write_indices(p, 0, most, indices);
    if (p.tid == 0) count[p.row * CLUSTER + p.rank] = 0;
    if (p.rank == 0)
        for (int d = p.tid; d < DIM_V; d += THREADS) store(out, (i64)p.row * DIM_V + d, 0.0f);
}

// ---------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1024 / THREADS) choose_and_attend(
    const void* q, SIDE(k), SIDE(v), const int* rows, const Fast* fast, const Fast* best, int* word,
    const float* units_of, const float* off, int* tally, void* out, i64* indices, int* count, i64* marks,
    int heads, int n, int padded, int k_eff, int room, int span, int in_full, int sinks, int recent,
    int q_b, int q_h, double factor, double scale, double cap, const void* sink, int sink_kind, int sink_h) {
    DYNAMIC_SHARED(memory);
    const Seen seen = Seen::of<CODED>(rows, blockIdx.y / heads, Room{n, k_eff, in_full, sinks, recent});
    const Program p(memory, Sizes{padded, k_eff, room, span}, seen, fast, best, marks, heads);
    await_previous();  // the scores; rows were written before these were begun
    if (p.k_eff == 0) return write_nothing(p, k_eff, out, indices, count);
    mark(p, 0);
    const char* query = (const char*)q + ((i64)p.b * q_b + (i64)p.h * q_h) * (16 / E);
    const int whole = (p.base + p.end) / 128 * 128 - p.base;
    const Scorer scorer{Rows(AS_SIDE(k), p.b, p.g, p.base, whole, in_full), query};
    const float* off_of = off + ((i64)p.row * padded + p.base) / 128;  // by how many places fast scores may be off, a group of 128
    const int highest = choose(p, scorer, off_of, units_of + p.row, tally, word + (i64)p.row * padded + p.base, count);
    mark(p, 9);
    cluster_sync();
    mark(p, 10);
    forget(p, tally);
    Logits logits = {(float)factor, (float)scale, (float)cap, 0.0f, LOGITS > 0 && sink_kind >= 0};
    if (logits.has_sink) logits.sink = sink_at(sink, sink_kind, (i64)p.h * sink_h);
    attend(p, Rows(AS_SIDE(v), p.b, p.g, p.base, whole, in_full), logits, highest, k_eff, indices, out);
    mark(p, 12);
}
