// Stage 1, candidates. cuda.py puts it before choose.cu.
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
