// The k best of every row of float32 scores, ties to the lower position: as sets, in the order of positions (select_rows), and
// put into the order of ranks (rank_rows).
//
// A row belongs to a cluster of programs, each with a stretch of it. A sample tells where the best may begin; what reaches that
// is listed while the row is read, once. If the lists hold k scores and nothing was left out, the k best are among them, whatever
// the sample was. If not, or where they would not fit (READ), the row is read again for every look. What is short is listed whole
// (ALL_LISTED). A look counts scores by 11 bits of their words and goes on inside the bin that holds the last of the best; the
// first by position of those in it are taken. So nothing depends on which thread came first: lists are in any order, but
// places in the output are counted from bits that stand for positions.
//
// cuda/compiler.py puts hardware.cuh and canonical.cuh before this and defines CLUSTER, THREADS and SHARED (bytes).

constexpr int WARPS = THREADS / 32, BIN_BITS = 11, BINS = 1 << BIN_BITS, EACH = BINS / THREADS;
// Programs on a multiprocessor, and loads of a thread that are in flight: a cluster of eight is for rows so few that each program
// has a multiprocessor to itself.
constexpr int PROGRAMS_AT_ONCE = CLUSTER == 8 ? 1 : 1024 / THREADS, DEEP = CLUSTER == 8 ? 8 : 4;
constexpr int SAMPLED = 2;     // loads of a thread that make the sample
constexpr int A_GROUP = 8;     // words of the bitmap that are counted together
constexpr u32 NOTHING = 0xff800000u;  // the bits of minus infinity, where there is no score
constexpr u32 LEAST = 0x007fffffu;    // its word
enum { ALL_LISTED, BEST_LISTED, READ };
static_assert(EACH % 2 == 0 && WARPS <= 32);

// Of a score's bits: unsigned, in the order of the scores (rule 4). What is no number is the lowest.
__device__ __forceinline__ bool is_number(u32 bits) { return (bits & 0x7fffffffu) <= 0x7f800000u; }
__device__ __forceinline__ u32 ordered(u32 bits) {
    return is_number(bits) ? (u32)word_of(__uint_as_float(bits)) ^ 0x80000000u : 0u;
}

struct Shared {
    int counts[BINS];
    int scratch[WARPS + 4];
    // Of this program: scores that reach what is listed and those above it, the highest, whether one is no number; what is taken.
    int listed, over, top, missing, chosen, tied;
};

static_assert(sizeof(Shared) == SHARED, "cuda.py counts other bytes");

// What a program reads, by 16 bytes: loads `first` to `last`, of which load 0 begins up to three scores before the row.
struct Stretch {
    const u32* base;
    int before, n, first, last;
    __device__ __forceinline__ u32 position(int j) const { return (u32)j * 4 - before; }
    __device__ __forceinline__ bool whole(int j) const {
        const int at = (int)position(j);
        return j < last && at >= 0 && at <= n - 4;
    }
    // Where a load is not whole: what there is, and a bit for each.
    __device__ __forceinline__ u32 edge(int j, u32* bits) const {
        u32 there = 0;
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (j < last && position(j) + e < (u32)n) bits[e] = base[(i64)j * 4 + e], there |= 1u << e;
        return there;
    }
    // Loads j, j + THREADS and so on, all of them asked for before one is waited for; of each a bit for every score of the row.
    template <int LOADS> __device__ __forceinline__ void load(int j, u32 (&bits)[LOADS][4], u32 (&there)[LOADS]) const {
        uint4 four[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            four[u] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
            if (whole(j + u * THREADS)) four[u] = load16(base + (i64)(j + u * THREADS) * 4);
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            bits[u][0] = four[u].x, bits[u][1] = four[u].y, bits[u][2] = four[u].z, bits[u][3] = four[u].w;
            there[u] = whole(j + u * THREADS) ? 15 : edge(j + u * THREADS, bits[u]);
        }
    }
    // f(bits, whether there is a score, its place in the stretch) for every score, by whole warps.
    template <class F> __device__ __forceinline__ void each(const F& f) const {
#pragma unroll 1
        for (int start = first; start < last; start += DEEP * THREADS) {
            u32 bits[DEEP][4], there[DEEP];
            load(start + threadIdx.x, bits, there);
#pragma unroll
            for (int u = 0; u < DEEP; u++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(bits[u][e], there[u] >> e & 1, (start - first + u * THREADS + (int)threadIdx.x) * 4 + e);
        }
    }
};

// ---- sums over lanes, warps and programs ----------------------------------------------------------------------------

template <int PROGRAMS> __device__ __forceinline__ void together() {
    if (PROGRAMS == 1) __syncthreads();
    else cluster_sync();
}

// Of x over the threads before this one, and over all. Before the next, the program has to come together.
struct Sums { int before, all; };
__device__ __forceinline__ Sums over_threads(int x, int* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, upto = sum_upto(x, lane);
    if (lane == 31) scratch[warp] = upto;
    __syncthreads();
    const int mine = lane < WARPS ? scratch[lane] : 0, warps = sum_upto(mine, lane);
    return {__shfl_sync(ALL, warps - mine, warp) + upto - x, __shfl_sync(ALL, warps, 31)};
}

// Of what every program has in x: over those before this one, and over all.
__device__ __forceinline__ Sums over_programs(const int* x) {
    Sums sums = {0, 0};
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) {
        const int theirs = pull(x, r);
        sums.before += r < cluster_rank() ? theirs : 0, sums.all += theirs;
    }
    return sums;
}

// ---- the cut --------------------------------------------------------------------------------------------------------

// Words above low + 2^bits are among the best, and the first `needed`, by position, of those from low on; `all`: these are all.
struct Cut {
    u32 low;
    int bits, needed;
    bool all;
    __device__ __forceinline__ bool ties(u32 word) const { return bits >= 32 || (word - low) >> bits == 0; }
    __device__ __forceinline__ bool above(u32 word) const { return word >= low && !ties(word); }
};

// One atomic addition where a warp is of one mind: ties would queue.
__device__ __forceinline__ void count(int* counts, int bin, bool is) {
    const int first = __shfl_sync(ALL, bin, 0);
    if (__all_sync(ALL, is && bin == first)) {
        if (threadIdx.x % 32 == 0) atomicAdd(counts + bin, 32);
    } else if (is) {
        atomicAdd(counts + bin, 1);
    }
}

// The bin of the one that is `needed` from the top, how many are above it and inside.
struct Found { int bin, above, inside; };
template <int PROGRAMS> __device__ __forceinline__ Found find_bin(Shared& s, int needed) {
    const int* from = s.counts + BINS - EACH - threadIdx.x * EACH;
    int c[EACH] = {}, sum = 0;
#pragma unroll
    for (int r = 0; r < PROGRAMS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i += 2) {
            const int2 two = PROGRAMS == 1 ? make_int2(from[i], from[i + 1]) : pull2(from + i, r);
            c[i] += two.x, c[i + 1] += two.y;
        }
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += c[i];
    int above = over_threads(sum, s.scratch).before, bin = -1, inside = 0;
    if (above < needed && needed <= above + sum) {
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) {
            if (bin < 0 && above + c[i] >= needed) bin = BINS - EACH - threadIdx.x * EACH + i, inside = c[i];
            if (bin < 0) above += c[i];
        }
        s.scratch[WARPS] = bin, s.scratch[WARPS + 1] = above, s.scratch[WARPS + 2] = inside;
    }
    __syncthreads();
    return {s.scratch[WARPS], s.scratch[WARPS + 1], s.scratch[WARPS + 2]};
}

// each(f) calls f(word, whether there is one) by whole warps. All words that count are in [low, low + 2^bits).
template <int PROGRAMS, class Each> __device__ __forceinline__ Cut find_cut(Shared& s, u32 low, int bits, int needed, const Each& each) {
    Cut cut = {low, bits, needed, false};
#pragma unroll 1
    while (true) {
        const int shift = max(0, cut.bits - BIN_BITS);
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0;
        __syncthreads();
        each([&](u32 word, bool is) {
            const bool inside = is && cut.ties(word);
            count(s.counts, inside ? (int)((word - cut.low) >> shift) : -1, inside);
        });
        together<PROGRAMS>();
        const Found found = find_bin<PROGRAMS>(s, cut.needed);
        cut.low += (u32)found.bin << shift, cut.bits = shift, cut.needed -= found.above;
        cut.all = cut.needed == found.inside;
        together<PROGRAMS>();
        if (shift == 0 || cut.all) return cut;
    }
}

// ---- lists ----------------------------------------------------------------------------------------------------------

struct Lists {
    u32* bitmap;  // of the places of a stretch
    int* before;  // bits before every A_GROUP of its words
    u32* bits;
    int* place;   // -1 where there is none
    int words, capacity;

    // The number of bits that are set; `before` tells how many before each group.
    __device__ __forceinline__ int count_bits(Shared& s) const {
        int sum = 0;
#pragma unroll 1
        for (int start = 0; start < words; start += THREADS * A_GROUP) {
            const int g = start / A_GROUP + threadIdx.x;
            int mine = 0;
#pragma unroll
            for (int w = 0; w < A_GROUP; w++) mine += g * A_GROUP + w < words ? __popc(bitmap[g * A_GROUP + w]) : 0;
            const Sums sums = over_threads(mine, s.scratch);
            if (g * A_GROUP < words) before[g] = sum + sums.before;
            sum += sums.all;
            __syncthreads();
        }
        return sum;
    }
    __device__ __forceinline__ void clear() const {
        for (int i = threadIdx.x; i < words; i += THREADS) bitmap[i] = 0;
    }
    __device__ __forceinline__ void set(int at) const { atomicOr(bitmap + at / 32, 1u << at % 32); }
    __device__ __forceinline__ int rank(int at) const {
        int sum = before[at / 32 / A_GROUP];
        for (int w = at / 32 / A_GROUP * A_GROUP; w < at / 32; w++) sum += __popc(bitmap[w]);
        return sum + __popc(bitmap[at / 32] & ((1u << at % 32) - 1));
    }
};

// Where the `rank` best of a sample begin, as bits; of minus infinity if that is below all numbers.
__device__ __forceinline__ u32 sampled_least(Shared& s, const u32* base, int loads, int rank) {
    u32 word[SAMPLED][4];
    const int apart = (loads - 2) / (SAMPLED * THREADS);
#pragma unroll
    for (int u = 0; u < SAMPLED; u++) {
        // Scores may repeat at a distance: not all from the same place of what each stands for.
        const int i = u * THREADS + threadIdx.x, aside = (int)(((u32)i * 2654435761u >> 12) % (u32)apart);
        // Not at an edge: whole.
        const uint4 four = load16(base + (i64)(1 + i * apart + aside) * 4);
        word[u][0] = ordered(four.x), word[u][1] = ordered(four.y);
        word[u][2] = ordered(four.z), word[u][3] = ordered(four.w);
    }
    const Cut cut = find_cut<1>(s, 0, 32, rank, [&](auto f) {
#pragma unroll
        for (int u = 0; u < SAMPLED; u++)
#pragma unroll
            for (int e = 0; e < 4; e++) f(word[u][e], true);
    });
    return __float_as_uint(score_of((int)(max(cut.low, LEAST) ^ 0x80000000u)));
}

// Lists what reaches `least`.
__device__ __forceinline__ void list_best(Shared& s, const Stretch& row, const Lists& lists, u32 least_bits) {
    const int lane = threadIdx.x % 32;
    const float least = __uint_as_float(least_bits);
    int top = NONE, over = 0;
    bool missing = false;
#pragma unroll 1
    for (int start = row.first; start < row.last; start += DEEP * THREADS) {
        u32 bits[DEEP][4], there[DEEP], reach = 0;
        row.load(start + threadIdx.x, bits, there);
#pragma unroll
        for (int u = 0; u < DEEP; u++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float x = __uint_as_float(bits[u][e]);
                missing |= x != x;
                reach |= x >= least ? (there[u] >> e & 1) << (4 * u + e) : 0u;
            }
        if (__all_sync(ALL, reach == 0)) continue;
        const int mine = __popc(reach), upto = sum_upto(mine, lane);
        int at = 0;
        if (lane == 31) at = atomicAdd(&s.listed, upto);
        at = __shfl_sync(ALL, at, 31) + upto - mine;
#pragma unroll
        for (int u = 0; u < DEEP; u++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (reach >> (4 * u + e) & 1) {
                    if (at < lists.capacity) {
                        lists.bits[at] = bits[u][e];
                        lists.place[at] = (start - row.first + u * THREADS + (int)threadIdx.x) * 4 + e;
                    }
                    over += __uint_as_float(bits[u][e]) > least, at++;
                    top = max(top, (int)(ordered(bits[u][e]) ^ 0x80000000u));
                }
    }
    top = __reduce_max_sync(ALL, top), over = __reduce_add_sync(ALL, over);
    if (lane == 0) atomicMax(&s.top, top), atomicAdd(&s.over, over);
    if (missing) s.missing = 1;
}

__device__ __forceinline__ void list_all(Shared& s, const Stretch& row, const Lists& lists) {
    row.each([&](u32 bits, bool is, int place) {
        if (place >= (row.last - row.first) * 4) return;
        lists.bits[place] = bits, lists.place[place] = is ? place : -1;
        if (is && !is_number(bits)) s.missing = 1;
    });
    if (threadIdx.x == 0) s.listed = (row.last - row.first) * 4;
}

// ---- the output -----------------------------------------------------------------------------------------------------

struct Output {
    u32* values;
    i64* indices;
    int k;
    // Scores that somebody changes meanwhile lead nowhere else.
    __device__ __forceinline__ void write(int at, u32 bits, u32 position) const {
        if ((u32)at < (u32)k) values[at] = bits, indices[at] = position;
    }
};

// How many of this program's ties are taken: those of the programs before it come first.
__device__ __forceinline__ int ties_taken(Shared& s, const Cut& cut, int tied) {
    if (threadIdx.x == 0) s.tied = tied;
    cluster_sync();
    return min(max(cut.needed - over_programs(&s.tied).before, 0), tied);
}
// How many are chosen before this program's.
__device__ __forceinline__ int chosen_before(Shared& s, int chosen) {
    if (threadIdx.x == 0) s.chosen = chosen;
    cluster_sync();
    return over_programs(&s.chosen).before;
}

__device__ __forceinline__ void write_listed(Shared& s, const Stretch& row, const Lists& lists, const Cut& cut, const Output& out) {
    const int listed = min(s.listed, lists.capacity);
    lists.clear();
    __syncthreads();
    if (!cut.all) {
        for (int i = threadIdx.x; i < listed; i += THREADS)
            if (lists.place[i] >= 0 && cut.ties(ordered(lists.bits[i]))) lists.set(lists.place[i]);
        __syncthreads();
        const int taken = ties_taken(s, cut, lists.count_bits(s));
        for (int i = threadIdx.x; i < listed; i += THREADS)
            if (lists.place[i] >= 0 && cut.ties(ordered(lists.bits[i])) && lists.rank(lists.place[i]) >= taken)
                lists.place[i] = -1;
        __syncthreads();
        lists.clear();
        __syncthreads();
    }
    for (int i = threadIdx.x; i < listed; i += THREADS) {
        const u32 word = ordered(lists.bits[i]);
        if (lists.place[i] < 0 || !(cut.above(word) || cut.ties(word))) lists.place[i] = -1;
        else lists.set(lists.place[i]);
    }
    __syncthreads();
    const int before = chosen_before(s, lists.count_bits(s));
    for (int i = threadIdx.x; i < listed; i += THREADS)
        if (const int at = lists.place[i]; at >= 0)
            out.write(before + lists.rank(at), lists.bits[i], row.position(row.first) + at);
}

// The same where nothing is listed.
__device__ __forceinline__ void write_read(Shared& s, const Stretch& row, const Cut& cut, const Output& out) {
    int above = 0, tied = 0;
    row.each([&](u32 bits, bool is, int) {
        above += is && cut.above(ordered(bits)), tied += is && cut.ties(ordered(bits));
    });
    above = over_threads(above, s.scratch).all;
    __syncthreads();
    tied = over_threads(tied, s.scratch).all;
    const int taken = ties_taken(s, cut, tied);
    int at = chosen_before(s, above + taken), ties_before = 0;
#pragma unroll 1
    for (int start = row.first; start < row.last; start += THREADS) {
        const int j = start + threadIdx.x;
        u32 bits[1][4], there[1], over = 0, equal = 0;
        row.load(j, bits, there);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const u32 word = ordered(bits[0][e]), is = there[0] >> e & 1;
            over |= cut.above(word) ? is << e : 0u, equal |= cut.ties(word) ? is << e : 0u;
        }
        // Both numbers, of at most 4 THREADS, in one sum.
        const Sums sums = over_threads(__popc(over) | __popc(equal) << 16, s.scratch);
        int rank = ties_before + (sums.before >> 16);
        int to = at + (sums.before & 0xffff) + min(rank, taken) - min(ties_before, taken);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool tie = equal >> e & 1;
            if (over >> e & 1 || (tie && rank < taken)) out.write(to++, bits[0][e], row.position(j) + e);
            rank += tie;
        }
        const int ties_after = ties_before + (sums.all >> 16);
        at += (sums.all & 0xffff) + min(ties_after, taken) - min(ties_before, taken);
        ties_before = ties_after;
        __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Of row r: scores[r * stride + i]. A program has `span` loads. `missing[r]` becomes whether something in it is no number.
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, PROGRAMS_AT_ONCE) select_rows(
    const u32* scores, u32* values, i64* indices, int* missing, int n, int k, int stride, int span, int how, int capacity, int rank) {
    DYNAMIC_SHARED(memory);
    Shared& s = *(Shared*)memory;
    const i64 r = blockIdx.x / CLUSTER;
    const u32* from = scores + r * stride;
    const int before = (int)((u64)from / 4 % 4), loads = (int)(((u32)n + before + 3) / 4);
    const int first = min(cluster_rank() * span, loads);
    const Stretch row = {from - before, before, n, first, min(first + span, loads)};
    Lists lists;
    lists.words = span / 8, lists.capacity = capacity;
    lists.bitmap = (u32*)(memory + (sizeof(Shared) + 15) / 16 * 16), lists.before = (int*)(lists.bitmap + lists.words);
    lists.bits = (u32*)(lists.before + (lists.words + A_GROUP - 1) / A_GROUP), lists.place = (int*)(lists.bits + capacity);
    if (threadIdx.x == 0) s.listed = 0, s.over = 0, s.top = NONE, s.missing = 0;
    __syncthreads();

    u32 least = 0;
    if (how == BEST_LISTED) {
        least = sampled_least(s, row.base, loads, rank);
        list_best(s, row, lists, least);
    } else if (how == ALL_LISTED) {
        list_all(s, row, lists);
    } else {
        row.each([&](u32 bits, bool is, int) {
            if (is && !is_number(bits)) s.missing = 1;
        });
    }
    cluster_sync();
    bool fits = true;
    int reach = 0, over = 0, top = NONE, any_missing = 0;
#pragma unroll
    for (int p = 0; p < CLUSTER; p++) {
        const int theirs = pull(&s.listed, p);
        fits = fits && theirs <= capacity, reach += theirs, over += pull(&s.over, p);
        top = max(top, pull(&s.top, p)), any_missing |= pull(&s.missing, p);
    }
    if (cluster_rank() == 0 && threadIdx.x == 0) missing[r] = any_missing;

    const Output out = {values + r * k, indices + r * k, k};
    const bool enough = how == BEST_LISTED && reach >= k;
    if (how == ALL_LISTED || (enough && fits)) {
        const u32 low = how == ALL_LISTED ? 0u : ordered(least);
        const int bits = how == ALL_LISTED ? 32 : 32 - __clz((int)(((u32)top ^ 0x80000000u) - low));
        const int listed = min(s.listed, capacity);
        const Cut cut = find_cut<CLUSTER>(s, low, bits, k, [&](auto f) {
#pragma unroll 1
            for (int start = 0; start < listed; start += THREADS) {
                const int i = start + threadIdx.x;
                const bool is = i < listed && lists.place[i] >= 0;
                f(is ? ordered(lists.bits[i]) : 0u, is);
            }
        });
        write_listed(s, row, lists, cut, out);
    } else {
        // Where many tie, the last of the best is often what the sample led to.
        Cut cut = {ordered(least), 0, k - over, reach == k};
        if (!enough || over >= k)
            cut = find_cut<CLUSTER>(s, 0, 32, k, [&](auto f) {
                row.each([&](u32 bits, bool is, int) { f(ordered(bits), is); });
            });
        write_read(s, row, cut, out);
    }
    // Others may still read this program's numbers.
    cluster_sync();
}

// A row of values and positions, ascending, by rank. `room` is a power of two of at least k.
extern "C" __global__ void __launch_bounds__(THREADS) rank_rows(
    const u32* values, const i64* positions, u32* out_values, i64* out_positions, int k, int room) {
    DYNAMIC_SHARED(memory);
    u64* word = (u64*)memory;
    const i64 r = blockIdx.x;
    values += r * k, positions += r * k, out_values += r * k, out_positions += r * k;
    // The best first; below the score its place, so that no two are equal.
    for (int i = threadIdx.x; i < room; i += THREADS)
        word[i] = i < k ? (u64)~ordered(values[i]) << 32 | (u32)i : ~0ull;
    __syncthreads();
#pragma unroll 1
    for (int size = 2; size <= room; size *= 2)
#pragma unroll 1
        for (int apart = size / 2; apart > 0; apart /= 2) {
#pragma unroll 1
            for (int i = threadIdx.x; i < room / 2; i += THREADS) {
                const int low = 2 * i - (i & (apart - 1)), high = low + apart;
                const u64 a = word[low], b = word[high];
                if ((a > b) == ((low & size) == 0)) word[low] = b, word[high] = a;
            }
            __syncthreads();
        }
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const int from = (int)(u32)word[i];
        out_values[i] = values[from], out_positions[i] = positions[from];
    }
}
