// What scores alone tell of what is left out (attention/completion.py). cuda.py puts it before choice.cuh; where outputs are not
// completed nothing of it is.
//
// Sums over all keys, by the runs that the score kernels summed, less those over the chosen ones, are counted in parts of 2^-40:
// integers, whose sums have no order. So every thread counts what it comes by, much of it while programs wait for each other, and
// the barrier at which ranks are exchanged serves for these too.

#if COMPLETED

constexpr float PARTS = 0x1p40f, MOST = 0x1p20f, HIGHEST = 12.0f;

__device__ __forceinline__ i64 parts_of(float x) { return __float2ll_rn(__fmul_rn(fminf(fmaxf(x, -MOST), MOST), PARTS)); }
__device__ __forceinline__ float of_parts(i64 x) { return __fmul_rn(__ll2float_rn(x), 1.0f / PARTS); }

// Of the tail mass and excess; of chosen keys of complete groups scores, squares, and how many they are. `wide`: an excess was too
// large to be counted.
struct Parts {
    static constexpr int NUMBERS = 5;
    i64 mass = 0, excess = 0, total = 0, second = 0;
    int many = 0;
    bool wide = false;
    __device__ __forceinline__ i64 excess_of(float x) {
        wide |= !(x > -MOST && x < MOST);
        return parts_of(x);
    }
};

// Of a row's keys of complete groups; sums of scores as fit.cuh left them.
struct Grouped {
    const float* line;
    int count, from, to;
    float total, second, most, most_cross;  // the latter two of values and of values times scores, the largest sums
    float mean, unit, per_unit;             // of scores; what sums of them are parts of, and its reciprocal

    __device__ __forceinline__ Grouped(const Whole& whole, int base, const float* line)
        : line(line), count(whole.keys()), from(whole.from - base), to(whole.to - base) {}
    __device__ __forceinline__ void ask() { total = line[0], second = line[1], most = line[2], most_cross = line[3]; }
    __device__ __forceinline__ void settle() {
        mean = 0.0f;
        if (count > 0) mean = __fdiv_rn(total, (float)count);
        const int exponent = max((int)(__float_as_uint(second) >> 23 & 255) - 127, -100) >> 1;
        unit = __int_as_float((127 + exponent) << 23), per_unit = __int_as_float((127 - exponent) << 23);
    }
};

struct Rest {
    float mass, excess, total, second;
    int many;
};

// How scores are known: canonical words, or over codes places, where a key has one.
struct Known {
    const int* words;
    const Fast* fast;
    int start, stop;   // keys of which there is a place
    float unit, half;  // score of a place, and half of it, negative
    __device__ __forceinline__ bool is_placed(int j) const { return CODED && j >= start && j < stop; }
    __device__ __forceinline__ float of(u32 place) const { return of_place(place, unit, half); }
    // Four neighbours, whether they are seen or not.
    __device__ __forceinline__ void four(int key, float (&s)[4]) const {
        const uint4 w = *(const uint4*)(words + key);
        s[0] = score_of(w.x), s[1] = score_of(w.y), s[2] = score_of(w.z), s[3] = score_of(w.w);
        if constexpr (CODED) {
            float placed[4];
            of_places(*(const uint2*)(fast + key), unit, half, placed);
#pragma unroll
            for (int e = 0; e < 4; e++) s[e] = is_placed(key + e) ? placed[e] : s[e];
        }
    }
};

struct Run {
    Sums2 sum;
    float best;
};

// A run that the score kernels have not summed. Seldom needed: not inlined.
__device__ __noinline__ Run sum_run(const Known known, const Logits logits, int key, u32 seen) {
    float best = -__int_as_float(0x7f800000);
#pragma unroll
    for (int u = 0; u < SUB / 4; u++) {
        float s[4];
        known.four(key + 4 * u, s);
#pragma unroll
        for (int e = 0; e < 4; e++) best = fmaxf(best, seen >> (4 * u + e) & 1 ? s[e] : best);
    }
    const float highest = logits.of(best);
    const Sums2 sum = sums_of_run(
        [&](int u, float (&s)[4]) {
            known.four(key + 4 * u, s);
#pragma unroll
            for (int e = 0; e < 4; e++) s[e] = seen >> (4 * u + e) & 1 ? s[e] : best;
        }, best, seen, [&](float score, float away) {
            if constexpr (LOGITS == 2) return logits.power(logits.of(score), highest);
            else return plain_power(score, away, highest, logits.scale, logits.factor * (-1.0f / 256.0f));
        });
    return {sum, best};
}

struct Tail {
    static constexpr int DEEP = 4;  // runs of a thread that are asked for at once
    const Program& p;
    const Logits& logits;
    Grouped all;
    int* words;         // canonical, of the row: of keys that have no place; where the bitmap names the chosen ones, of all
    const float* runs;  // of the row's runs, all their keys: mass, excess
    const float* units_of;
    Known known;        // its keys are, without codes, those that are ranked
    float top;          // the logit of the highest chosen score, or the sink's
    uint2 sums[DEEP];   // of this thread's first runs mass and excess, as bits
    int bests[DEEP];    // and their bests: places or words, or of runs that were summed here words

    __device__ __forceinline__ Tail(
        const Program& p, const Logits& logits, const Grouped& all, int* words, const float* runs, const float* units)
        : p(p), logits(logits), all(all), words(words), runs(runs), units_of(units) {}
    // What is not needed before: a register that waits for it would have to be kept elsewhere.
    __device__ __forceinline__ void settle() {
        all.ask();
        known = {words, p.fast, p.start, p.stop, 0.0f, 0.0f};
        if constexpr (CODED) {
            const float units = *units_of;
            if (units > 0.0f) known.unit = __fdiv_rn(1.0f, units), known.half = -0.5f * known.unit;
            else known.start = known.stop = p.end;  // all keys were scored canonically
        }
    }
    __device__ __forceinline__ void begin(int highest) {
        top = logits.of(score_of(highest));
        if (LOGITS > 0 && logits.has_sink) top = fmaxf(top, logits.sink);
        all.settle();
    }
    __device__ __forceinline__ u32 place_of(int j) const { return CODED ? p.fast[j] : 0; }
    // What is known of a score may be above the highest chosen one.
    __device__ __forceinline__ float weight(float logit) const {
        return exp2_canonical(fminf(__fmul_rn(__fsub_rn(logit, top), logits.factor), HIGHEST));
    }

    // A chosen key, its canonical word and its place.
    __device__ __forceinline__ void take(Parts& parts, int j, int word, u32 place) const {
        const float canonical = score_of(word), score = known.is_placed(j) ? known.of(place) : canonical;
        const float mass = weight(logits.of(score)), apart = __fmul_rn(canonical, all.per_unit);
        parts.mass -= parts_of(mass);
        parts.excess -= parts.excess_of(__fmul_rn(__fmul_rn(mass, __fsub_rn(score, all.mean)), all.per_unit));
        if (j < all.from || j >= all.to) return;
        parts.total += parts_of(apart), parts.second += parts_of(__fmul_rn(apart, apart)), parts.many++;
    }

    // Own runs, SUB keys each.
    __device__ __forceinline__ int key_of(int run) const { return p.dealt<32>(run) * SUB; }
    // Whether the score kernels summed it.
    __device__ __forceinline__ bool is_summed(int key) const { return SUMMED && key >= known.start && key + SUB <= known.stop; }
    static constexpr int STEP = THREADS / 32 * CLUSTER * BLOCK;  // from a thread's run to its next one
    __device__ __forceinline__ void ask_from(int key) {
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const int k = key + u * STEP;
            sums[u] = make_uint2(0, 0), bests[u] = 0;
            if (is_summed(k)) sums[u] = *(const uint2*)(runs + k / SUB * 2), bests[u] = p.best[k / SUB];
        }
        if (SUMMED && known.start <= p.begin && known.stop >= p.end && p.begin % SUB == 0 && p.end % SUB == 0) return;
#pragma unroll 1
        for (int u = 0; u < DEEP; u++) {
            const int k = key + u * STEP;
            const u32 seen = between(k, p.begin, p.end);
            if (is_summed(k) || seen == 0) continue;
            const Run run = sum_run(known, logits, k, seen);
#pragma unroll
            for (int v = 0; v < DEEP; v++)
                if (u == v) {
                    sums[v] = make_uint2(__float_as_uint(run.sum.mass), __float_as_uint(run.sum.excess));
                    bests[v] = word_of(run.best);
                }
        }
    }
    // Keys that have no place are candidates, whose words are needed if they are not chosen.
    __device__ __forceinline__ void ask_of_candidates(int found) {
        settle();
        if (CODED && all.count > 0 && (known.start > p.begin || known.stop < p.end)) {
            __syncthreads();
#pragma unroll 1
            for (int i = p.tid; i < found; i += THREADS)
                if (!known.is_placed(p.position[i])) words[p.position[i]] = p.value[i];
            __syncthreads();
        }
        if (all.count > 0) ask_from(key_of(p.tid));
    }
    // While others come to the barrier.
    __device__ __forceinline__ void sync_asking(int found) {
        cluster_arrive();
        ask_of_candidates(found);
        cluster_wait();
    }
    // What was asked for, in a loop: more instructions take longer to come than to be done.
    __device__ __forceinline__ void add_runs(Parts& parts) {
#pragma unroll 1
        for (int key = key_of(p.tid);;) {
#pragma unroll 1
            for (int u = 0; u < DEEP; u++, key += STEP) {
                const float best = CODED && is_summed(key) ? known.of(bests[0]) : score_of(bests[0]);
                const float mass = __uint_as_float(sums[0].x), relative = weight(logits.of(best));
                parts.mass += parts_of(__fmul_rn(relative, mass));
                const float excess = __fadd_rn(__uint_as_float(sums[0].y), __fmul_rn(mass, __fsub_rn(best, all.mean)));
                parts.excess += parts.excess_of(__fmul_rn(__fmul_rn(relative, excess), all.per_unit));
#pragma unroll
                for (int v = 1; v < DEEP; v++) sums[v - 1] = sums[v], bests[v - 1] = bests[v];
            }
            if (key >= p.end) return;
            ask_from(key);
        }
    }

    // While others come to the barrier at which chosen keys are counted: own ones above the edge.
    template <class Edge> __device__ __forceinline__ void sync_taking(Parts& parts, const Edge& edge) {
        cluster_arrive();
        if (all.count > 0) {
            add_runs(parts);
#pragma unroll 1
            for (int i = p.tid; i < edge.found; i += THREADS) {
                const int j = p.position[i];
                if (p.is_taken(j)) take(parts, j, p.value[i], place_of(j));
            }
        }
        cluster_wait();
    }
    __device__ __forceinline__ void take_winner(Parts& parts, int j, int word) const {
        if (all.count > 0) take(parts, j, word, place_of(j));
    }

    // Numbers lie as two words each where counts were: of programs, then of own warps.
    __device__ __forceinline__ int* of_program(int rank, int i) const {
        return p.s.counts + (rank * Parts::NUMBERS + i) * 2;
    }
    __device__ __forceinline__ int* of_warp(int warp, int i) const { return of_program(CLUSTER + warp, i); }
    __device__ __forceinline__ static void put(int* to, i64 x) { to[0] = (int)x, to[1] = (int)(x >> 32); }
    __device__ __forceinline__ static i64 get(const int* from) { return (i64)(u32)from[0] | (i64)from[1] << 32; }
    __device__ __forceinline__ static i64 over_lanes(i64 x, int m) {
        const u32 low = __shfl_xor_sync(ALL, (u32)x, m), high = __shfl_xor_sync(ALL, (u32)(x >> 32), m);
        return (i64)((u64)high << 32 | low);
    }
    // Over a warp; lanes share the four sums out, as tree_over_lanes does.
    __device__ __forceinline__ void keep(const Parts& parts) const {
        const bool first = p.lane & 1, second = p.lane & 2;
        const i64 a = (first ? parts.total : parts.mass) + over_lanes(first ? parts.mass : parts.total, 1);
        const i64 b = (first ? parts.second : parts.excess) + over_lanes(first ? parts.excess : parts.second, 1);
        i64 x = (second ? b : a) + over_lanes(second ? a : b, 2);
#pragma unroll
        for (int m = 4; m < 32; m *= 2) x += over_lanes(x, m);
        const int many = __reduce_add_sync(ALL, parts.many);
        const bool wide = __ballot_sync(ALL, parts.wide) != 0;
        // Mass, excess, total, second are at lanes 0, 2, 1, 3.
        if (p.lane < 4) put(of_warp(p.warp, (p.lane & 1) * 2 + (p.lane >> 1)), x);
        if (p.lane == 4) put(of_warp(p.warp, 4), (i64)many | (i64)wide << 32);
    }
    // A warp a number: of this program, told to all.
    __device__ __forceinline__ void tell(const Parts& parts) const {
        if (all.count == 0) return;
        keep(parts);
        __syncthreads();
        if (p.warp >= Parts::NUMBERS) return;
        i64 x = p.lane < WARPS ? get(of_warp(p.lane, p.warp)) : 0;
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x += over_lanes(x, m);
        if (p.lane >= CLUSTER) return;
        int* const to = of_program(p.rank, p.warp);
        push(to, p.lane, (int)x), push(to + 1, p.lane, (int)(x >> 32));
    }
    // Chosen keys, as the bitmap names them, where all have words.
    __device__ __forceinline__ void take_bits(Parts& parts) const {
#pragma unroll 1
        for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
            const int j = p.dealt<BLOCK>(i);
            if (p.is_taken(j)) take(parts, j, words[j], place_of(j));
        }
    }
    // Of the row, once the cluster has waited.
    __device__ __forceinline__ i64 of_row(int i) const {
        i64 x = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) x += get(of_program(r, i));
        return x;
    }
    __device__ __forceinline__ Rest rest() const {
        const float unit = all.unit;
        const i64 many = of_row(4);
        const float excess = many >> 32 ? __int_as_float(0x7fc00000) : __fmul_rn(of_parts(of_row(1)), unit);
        return {fmaxf(of_parts(of_row(0)), 0.0f), excess, __fmul_rn(of_parts(of_row(2)), unit),
                __fmul_rn(__fmul_rn(of_parts(of_row(3)), unit), unit), (int)many};
    }
};

// Of all that the bitmap names. Seldom needed: not inlined, as look_again is not.
__device__ __noinline__ Parts parts_of_bits(
    const Program p, const Logits logits, const Grouped all, int* words, const float* runs, const float* units, float top) {
    Tail tail(p, logits, all, words, runs, units);
    Parts parts;
    tail.top = top;
    tail.settle(), tail.all.settle(), tail.ask_from(tail.key_of(p.tid));
    tail.add_runs(parts);
    tail.take_bits(parts);
    return parts;
}
__device__ __forceinline__ void sum_bits(const Tail& tail, Parts& parts) {
    if (tail.all.count > 0)
        parts = parts_of_bits(tail.p, tail.logits, tail.all, tail.words, tail.runs, tail.units_of, tail.top);
}

static_assert(Parts::NUMBERS <= WARPS && 2 * Parts::NUMBERS * (CLUSTER + WARPS) <= TALLY && CLUSTER <= 32);

#else

struct Parts {};

struct Tail {
    __device__ __forceinline__ void begin(int) const {}
    __device__ __forceinline__ void ask_of_candidates(int) const {}
    __device__ __forceinline__ void sync_asking(int) const { cluster_sync(); }
    template <class Edge> __device__ __forceinline__ void sync_taking(Parts&, const Edge&) const { cluster_sync(); }
    __device__ __forceinline__ void take_winner(Parts&, int, int) const {}
};

__device__ __forceinline__ void sum_bits(const Tail&, Parts&) {}

#endif
