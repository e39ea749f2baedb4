// What is left out, put back (attention/completion.py). cuda.py puts it behind attend.cuh where outputs are completed.
//
// What scores alone tell comes before the barrier at which ranks are exchanged: every program walks its own blocks, a warp a block,
// a lane a run of 16 keys. Of a run the score kernels left the sums over all its keys; those of the chosen ones, which the bitmap
// names, are taken off, one after the other. Sums of blocks go to every program of the cluster, which adds them by the block's
// absolute number: zeros stand for blocks before `base`. So behind the barrier the weights of chosen keys are known, less what the
// moments have of them, and values are summed as ever.

// Scores as they are known: canonical words, or over codes places, where a key has one.
struct Known {
    const Program& p;
    const int* words;
    int start, stop;  // keys of which there is a place, or a word that is ranked
    float unit, half;  // score of a place, and half of it, negative

    __device__ __forceinline__ Known(const Program& p, const int* words, float units)
        : p(p), words(words), start(p.start), stop(p.stop), unit(0.0f), half(0.0f) {
        if constexpr (CODED) {
            if (units > 0.0f) unit = __fdiv_rn(1.0f, units), half = -0.5f * unit;
            else start = stop = p.end;  // all keys were scored canonically
        }
    }
    __device__ __forceinline__ float of_place(u32 place) const { return ::of_place(place, unit, half); }
    __device__ __forceinline__ bool placed(int j) const { return CODED && j >= start && j < stop; }
    // Whether the score kernels summed this run.
    __device__ __forceinline__ bool is_summed(int key) const { return SUMMED && key >= start && key + SUB <= stop; }
    __device__ __forceinline__ float best_of_summed(int key) const {
        const Fast best = p.best[key / SUB];
        return CODED ? of_place(best) : score_of(best);
    }
    // Four neighbours of any run, whether they are seen or not.
    __device__ __forceinline__ void four(int key, float (&s)[4]) const {
        const uint4 w = *(const uint4*)(words + key);
        s[0] = score_of(w.x), s[1] = score_of(w.y), s[2] = score_of(w.z), s[3] = score_of(w.w);
        if constexpr (CODED) {
            float placed_at[4];
            ::of_places(*(const uint2*)(p.fast + key), unit, half, placed_at);
#pragma unroll
            for (int e = 0; e < 4; e++) s[e] = placed(key + e) ? placed_at[e] : s[e];
        }
    }
    __device__ __forceinline__ float best_of(int key, u32 seen) const {
        float best = -__int_as_float(0x7f800000);
#pragma unroll
        for (int u = 0; u < SUB / 4; u++) {
            float s[4];
            four(key + 4 * u, s);
#pragma unroll
            for (int e = 0; e < 4; e++) best = fmaxf(best, seen >> (4 * u + e) & 1 ? s[e] : best);
        }
        return best;
    }
};

// Weights relative to the logit of the highest chosen score.
struct Weighing {
    const Logits& logits;
    float per, mean, top;
    // Of a score lower by `away` than its run's best.
    __device__ __forceinline__ float in_run(float score, float away, float highest) const {
        if constexpr (LOGITS == 2) return logits.power(logits.of(score), highest);
        else return plain_power(score, away, highest, logits.scale, per);
    }
    // What a run adds to mass and excess of all, of its own.
    __device__ __forceinline__ Sums2 of(const Sums2& run, float best, float highest) const {
        const float mass = fmaxf(run.mass, 0.0f), weight = power_below(__fsub_rn(fminf(highest, top), top), per);
        return {__fmul_rn(weight, mass), __fmul_rn(weight, __fadd_rn(run.excess, __fmul_rn(mass, __fsub_rn(best, mean))))};
    }
};

// Winners at the edge get their bits too, once all chosen keys were sent to their ranks.
__device__ __forceinline__ void mark_winners(const Program& p) {
#pragma unroll 1
    for (int i = p.tid; i < p.s.winners; i += THREADS) {
        const int j = p.s.winner[i];
        if (p.owns(j)) atomicOr(p.bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
    }
}

// What programs tell each other: of blocks mass and excess, then of chosen keys of complete groups the sums of scores and of their
// squares; and how many these are, of every warp. It lies where counts were, or behind everything else.
struct Told {
    static constexpr int NUMBERS = 4;
    float* sums;
    int* many;
    __device__ __forceinline__ Told(const Program& p, int most_blocks)
        : sums(NUMBERS * most_blocks + CLUSTER * WARPS <= TALLY ? (float*)p.s.counts : p.behind), many((int*)sums + NUMBERS * most_blocks) {}
};

// Sums of own runs.
struct Left {
    static constexpr int DEEP = 2, EACH = Told::NUMBERS;  // blocks of a warp at a time
    const Program& p;
    const Known& known;
    const Weighing& weighing;
    const float* sums;  // of the row's runs, all their keys: mass, excess
    Told told;
    int from, to;       // keys of complete groups

    struct Run {
        int key;
        u32 seen, taken;
        float best, highest;  // score and logit
        Sums2 sum;
        float total, second;
    };

    __device__ __forceinline__ Run load(int block, bool is) const {
        Run run = {(block * CLUSTER + p.rank) * BLOCK + p.lane * SUB, 0, 0, 0.0f, 0.0f, {0.0f, 0.0f}, 0.0f, 0.0f};
        if (is) run.seen = between(run.key, p.begin, p.end);
        if (run.seen == 0) return run;
        run.taken = ((const u16*)p.bitmap)[block * 32 + p.lane];
        if (known.is_summed(run.key)) {
            const uint2 two = *(const uint2*)(sums + run.key / SUB * 2);
            run.sum = {__uint_as_float(two.x), __uint_as_float(two.y)}, run.best = known.best_of_summed(run.key);
        }
        return run;
    }
    // Of a run that the score kernels have not summed.
    __device__ __forceinline__ void sum_all(Run& run) const {
        if (run.seen == 0 || known.is_summed(run.key)) return;
        const float best = known.best_of(run.key, run.seen), highest = weighing.logits.of(best);
        run.best = best;
        run.sum = sums_of_run(
            [&](int u, float (&s)[4]) {
                known.four(run.key + 4 * u, s);
#pragma unroll
                for (int e = 0; e < 4; e++) s[e] = run.seen >> (4 * u + e) & 1 ? s[e] : best;
            }, best, run.seen, [&](float score, float away) { return weighing.in_run(score, away, highest); });
    }
    // A chosen key: how it is weighed, and its canonical score.
    struct Taken {
        int key, which;
        u32 place;
        int word;
    };
    __device__ __forceinline__ Taken next(const Run (&run)[DEEP], u32 bits) const {
        const int at = __ffs(bits) - 1, which = at / SUB, key = (which ? run[1].key : run[0].key) + at % SUB;
        return {key, which, CODED ? (u32)p.fast[key] : 0, known.words[key]};
    }
    __device__ __forceinline__ void take_off(Run (&run)[DEEP]) const {
        static_assert(DEEP == 2 && SUB == 16);
        u32 bits = run[0].taken | run[1].taken << 16;
        if (bits == 0) return;
        Taken one = next(run, bits);
#pragma unroll 1
        while (true) {
            const Taken now = one;
            bits &= bits - 1;
            if (bits) one = next(run, bits);
            const float canonical = score_of(now.word), score = known.placed(now.key) ? known.of_place(now.place) : canonical;
            const float away = __fsub_rn(score, now.which ? run[1].best : run[0].best);
            const float weight = weighing.in_run(score, away, now.which ? run[1].highest : run[0].highest);
            const float excess = __fmul_rn(weight, away), square = __fmul_rn(canonical, canonical);
            const bool counted = now.key >= from && now.key < to;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                if (u != now.which) continue;
                run[u].sum.mass = __fsub_rn(run[u].sum.mass, weight), run[u].sum.excess = __fsub_rn(run[u].sum.excess, excess);
                if (counted) run[u].total = __fadd_rn(run[u].total, canonical), run[u].second = __fadd_rn(run[u].second, square);
            }
            if (bits == 0) return;
        }
    }
    __device__ __forceinline__ int counted(const Run& run) const {
        return run.key >= from && run.key < to ? __popc(run.taken) : 0;
    }
    __device__ __forceinline__ void tell(float (&sum)[EACH * DEEP], int first) const {
        tree_over_lanes<EACH * DEEP, 32>(sum, p.lane);
        const int mine = first_sum<EACH * DEEP, 32>(p.lane), i = first + mine / EACH * WARPS, block = i * CLUSTER + p.rank;
        if (writes_sum<EACH * DEEP, 32>(p.lane) && i < p.own && block < p.blocks)
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) push((int*)told.sums + EACH * block + mine % EACH, r, __float_as_int(sum[0]));
    }
    __device__ __forceinline__ void sum_up() const {
        int many = 0;
#pragma unroll 1
        for (int first = p.warp; first < p.own; first += WARPS * DEEP) {
            Run run[DEEP];
            float sum[EACH * DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) run[u] = load(first + u * WARPS, first + u * WARPS < p.own);
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                sum_all(run[u]);
                run[u].highest = weighing.logits.of(run[u].best), many += counted(run[u]);
            }
            take_off(run);
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                const bool left = (run[u].seen & ~run[u].taken) != 0;
                const Sums2 all = weighing.of(run[u].sum, run[u].best, run[u].highest);
                sum[EACH * u] = left ? all.mass : 0.0f, sum[EACH * u + 1] = left ? all.excess : 0.0f;
                sum[EACH * u + 2] = run[u].total, sum[EACH * u + 3] = run[u].second;
            }
            tell(sum, first);
        }
        many = __reduce_add_sync(ALL, many);
        if (p.lane < CLUSTER) push(told.many + p.rank * WARPS + p.warp, p.lane, many);
    }
};

struct Rest {
    float mass, excess, total, second;
    int many;
};

// Of all blocks, once the cluster has waited. Nodes of a level of the tree are 32 of the one below; a node's sums lie where those of
// its first block did.
__device__ __forceinline__ Rest sum_blocks(const Program& p, const Told& told) {
    constexpr int EACH = Told::NUMBERS;
    const int base = p.base / BLOCK, last = base + p.blocks - 1;
    auto at = [&](int node, int shift) { return EACH * max((node << shift) - base, 0); };
    auto sum_32 = [&](int node, int shift) {
        const int child = 32 * node + p.lane;
        float sum[EACH] = {};
        if (child >= base >> shift && child <= last >> shift) {
            const uint4 four = *(const uint4*)(told.sums + at(child, shift));
            sum[0] = __uint_as_float(four.x), sum[1] = __uint_as_float(four.y);
            sum[2] = __uint_as_float(four.z), sum[3] = __uint_as_float(four.w);
        }
        tree_over_lanes<EACH, 32>(sum, p.lane);
        return sum[0];
    };
    const int mine = first_sum<EACH, 32>(p.lane);
    int shift = 0;
#pragma unroll 1
    for (; base >> (shift + 5) != last >> (shift + 5); shift += 5) {
#pragma unroll 1
        for (int node = (base >> (shift + 5)) + p.warp; node <= last >> (shift + 5); node += WARPS) {
            const float sum = sum_32(node, shift);
            if (writes_sum<EACH, 32>(p.lane)) told.sums[at(node, shift + 5) + mine] = sum;
        }
        __syncthreads();
    }
    const float sum = sum_32(last >> (shift + 5), shift);
    int many = 0;
#pragma unroll
    for (int i = 0; i < CLUSTER * WARPS; i += 32) many += told.many[i + p.lane];
    Rest rest;
    rest.many = __reduce_add_sync(ALL, many);
    auto of = [&](int i) { return __fadd_rn(__shfl_sync(ALL, sum, (i >> 1) | (i & 1) << 1), 0.0f); };
    rest.mass = of(0), rest.excess = of(1), rest.total = of(2), rest.second = of(3);
    return rest;
}

// The highest logit of the chosen keys, whose words stay; as to_logits in attend.cuh.
__device__ __forceinline__ float highest_logit(const Program& p, const Logits& logits, int live, int highest) {
    float top = LOGITS == 2 ? 0.0f : logits.of(score_of(highest));
    if constexpr (LOGITS == 2) {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        highest = NONE;
#pragma unroll 1
        for (int i = p.tid; i < live; i += THREADS) highest = max(highest, word_of(logits.of(score_of(p.chosen[i]))));
        tell_highest(p, highest);
        cluster_sync();
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
        top = score_of(highest);
    }
    return LOGITS > 0 && logits.has_sink ? fmaxf(top, logits.sink) : top;
}

struct Affine { float alpha, beta, mass; };  // weights of what is left, of complete groups; and the mass of all that is left

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) < 0x7f800000u; }

// Nothing is put back where no key of complete groups is left.
__device__ __forceinline__ Affine weights_of_rest(const Rest& rest, int count, const float* line, float mean_of_all, int linear) {
    const int many = count - rest.many;
    if (many <= 0) return {0.0f, 0.0f, 0.0f};
    const float n = (float)many, total = __fsub_rn(line[0], rest.total), second = __fsub_rn(line[1], rest.second);
    const float mean = __fdiv_rn(total, n), spread = __fsub_rn(second, __fmul_rn(total, mean)), level = __fdiv_rn(rest.mass, n);
    float beta = 0.0f;
    // A share below 2^-12 is rounding.
    if (linear && spread > __fmul_rn(line[1], 0x1p-12f) && spread > 0.0f)
        beta = __fdiv_rn(__fadd_rn(rest.excess, __fmul_rn(rest.mass, __fsub_rn(mean_of_all, mean))), spread);
    const float alpha = __fsub_rn(level, __fmul_rn(beta, mean));
    return finite(alpha) && finite(beta) ? Affine{alpha, beta, rest.mass} : Affine{level, 0.0f, rest.mass};
}

// A rank's weight, 0 beyond the last; the score of its key, and whether that is of a complete group.
struct Rank {
    float weight, score;
    bool counted;
    __device__ __forceinline__ Rank(const Program& p, const Logits& logits, const Whole& whole, int live, float top, int i)
        : weight(0.0f), score(0.0f), counted(false) {
        if (i >= live) return;
        score = score_of(p.chosen[i]);
        const int j = p.base + p.chosen_position[i];
        counted = j >= whole.from && j < whole.to;
        weight = logits.power(logits.of(score), top);
    }
    // Less what the affine weights have of it.
    __device__ __forceinline__ float less(const Affine& rest) const {
        return counted ? __fsub_rn(weight, __fadd_rn(rest.alpha, __fmul_rn(rest.beta, score))) : weight;
    }
};

// As weigh in attend.cuh, by a warp's neighbouring ranks, 32 a turn, no more than 32 turns, of which `rank` is this thread's first.
// Returns the sum of the warp's weights, of which nothing is taken off.
struct Weights {
    const Program& p;
    const Logits& logits;
    const Whole& whole;
    int live, turns;
    float top;

    __device__ __forceinline__ int at(int u) const { return (p.warp * turns + u) * 32 + p.lane; }
    __device__ __forceinline__ Rank rank(int u) const { return Rank(p, logits, whole, live, top, at(u)); }
    __device__ __forceinline__ static float sum_lanes(float x) {
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, m));
        return x;
    }
    __device__ __forceinline__ float weigh(Rank rank, const Affine& rest) const {
        float sum = 0.0f;
#pragma unroll 1
        for (int u = 0;; rank = this->rank(u)) {
            if (at(u) < p.span()) p.chosen[at(u)] = __float_as_int(rank.less(rest));
            const float all = sum_lanes(rank.weight);
            sum = p.lane == u ? all : sum;
            if (++u == turns) break;
        }
        return turns > 1 ? sum_lanes(sum) : sum;
    }
};

// As write_output, with the values that the affine weights have of all keys of complete groups.
__device__ __forceinline__ void write_completed(
    const Program& p, const Logits& logits, float top, const Affine& rest, const float* line, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    const int d = p.tid;
    if (d >= DIM_V) return;
    float x[CLUSTER], w[CLUSTER];
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
    tree<CLUSTER>(x), tree<CLUSTER>(w);
    if (sinks) w[0] = __fadd_rn(w[0], logits.power(logits.sink, top));
    const float added = __fadd_rn(__fmul_rn(rest.alpha, line[VALUES + d]), __fmul_rn(rest.beta, line[CROSS + d]));
    const float y = __fdiv_rn(__fadd_rn(__fadd_rn(x[0], 0.0f), finite(added) ? added : 0.0f), __fadd_rn(w[0], rest.mass));
    store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
}

static_assert(DIM_V <= THREADS && CLUSTER <= 32 && WARPS <= 32 && CLUSTER * WARPS % 32 == 0);

// A completed row.
struct Completion {
    const Program& p;
    const Logits& logits;
    const Known known;
    const Whole whole;
    const float* line;
    int linear;
    const float* sums;

    __device__ __forceinline__ float mean() const {
        return whole.keys() > 0 ? __fdiv_rn(line[0], (float)whole.keys()) : 0.0f;
    }
    // Once chosen keys were sent to their ranks.
    __device__ __forceinline__ void sum_up(const Told& told, int highest) const {
        float top = logits.of(score_of(highest));
        if (LOGITS > 0 && logits.has_sink) top = fmaxf(top, logits.sink);
        const Weighing weighing{logits, logits.factor * (-1.0f / 256.0f), mean(), top};
        Left{p, known, weighing, sums, told, whole.from - p.base, whole.to - p.base}.sum_up();
    }
    // As attend in attend.cuh, once all ranks were exchanged.
    __device__ __forceinline__ void attend(
        const Rows& values, const Told& told, int highest, int most, i64* indices, void* out) const {
        const int live = p.live(), count = whole.keys();
        const float top = highest_logit(p, logits, live, highest);
        const Weights weights{p, logits, whole, live, max(1, p.span() / (32 * WARPS)), top};
        const Rank first = weights.rank(0);
        Affine rest = {0.0f, 0.0f, 0.0f};
        if (count > 0) rest = weights_of_rest(sum_blocks(p, told), count, line, mean(), linear);
        const float sum = weights.weigh(first, rest);
        write_indices(p, live, most, indices);
        __syncthreads();
        sum_warp(p, values, live);
        if (p.lane == 0) p.s.warp_denominators[p.warp] = sum;
        __syncthreads();
        mark(p, 11);
        sum_program(p);
        cluster_sync();
        if (p.rank == 0) write_completed(p, logits, top, rest, line, out);
    }
};
