// Stage 2, canonical scores. cuda.py puts it before choose.cu.
//
// Of the candidates (rules 1 to 4): LANES lanes a key, DEEP keys at a time so that many loads are in flight. They are
// counted in bins as they come. Nothing else is scored: what is among the best is a candidate. Fast scores that are
// canonical are only counted.

constexpr int LANES = DIM / E;

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
