// What scores alone tell of what is left out (attention/completion.py). cuda.py puts it before choice.cuh; where outputs are not
// completed nothing of it is.
//
// Sums over all keys, by the runs that the score kernels summed, less those over the chosen ones, are counted in parts of 2^-40:
// integers, whose sums have no order. So every thread counts what it comes by, and the barriers that a choice needs anyway serve:
// at the one at which chosen keys are counted, programs tell each other what they have; keys at the edge are found by all of them.

#if COMPLETED

constexpr float PARTS = 0x1p40f, MOST = 0x1p20f, HIGHEST = 12.0f;

__device__ __forceinline__ i64 parts_of(float x) { return __float2ll_rn(__fmul_rn(fminf(fmaxf(x, -MOST), MOST), PARTS)); }
__device__ __forceinline__ float of_parts(i64 x) { return __fmul_rn(__ll2float_rn(x), 1.0f / PARTS); }

// Of the tail mass and excess; of chosen keys of complete groups scores, squares, and how many they are.
struct Parts {
    static constexpr int NUMBERS = 5;
    i64 mass = 0, excess = 0, total = 0, second = 0;
    int many = 0;
};

// Of a row's keys of complete groups; sums of scores as fit.cuh left them, asked for before they are needed.
struct Grouped {
    int count, from, to;
    float total, second;
    float mean, unit, per_unit;  // of scores; what sums of them are parts of, and its reciprocal

    __device__ __forceinline__ Grouped(const Whole& whole, int base, const float* line)
        : count(whole.keys()), from(whole.from - base), to(whole.to - base), total(line[0]), second(line[1]), mean(0.0f),
          unit(1.0f), per_unit(1.0f) {}
    __device__ __forceinline__ void settle() {
        if (count > 0) mean = __fdiv_rn(total, (float)count);
        const int exponent = max((int)(__float_as_uint(second) >> 23 & 255) - 127, -100) >> 1;
        unit = __int_as_float((127 + exponent) << 23), per_unit = __int_as_float((127 - exponent) << 23);
    }
};

struct Rest {
    float mass, excess, total, second;
    int many;
};

struct Tail {
    static constexpr int DEEP = 4;  // runs of a thread that are asked for at once
    const Program& p;
    const Logits& logits;
    Grouped all;
    const int* words;   // canonical, of the row: of keys that have no place
    const float* runs;  // of the row's runs, all their keys: mass, excess
    int start, stop;    // keys of which there is a place, or a word that is ranked
    float unit, half;   // score of a place, and half of it, negative
    float per;          // as power_below has it
    float top;          // the logit of the highest chosen score, or the sink's
    uint2 sums[DEEP];   // of the first of this thread's runs, and their bests
    Fast bests[DEEP];

    __device__ __forceinline__ Tail(
        const Program& p, const Logits& logits, const Grouped& all, const int* words, const float* runs, float units)
        : p(p), logits(logits), all(all), words(words), runs(runs), start(p.start), stop(p.stop), unit(0.0f), half(0.0f),
          per(logits.factor * (-1.0f / 256.0f)), top(0.0f) {
        if constexpr (CODED) {
            if (units > 0.0f) unit = __fdiv_rn(1.0f, units), half = -0.5f * unit;
            else start = stop = p.end;  // all keys were scored canonically
        }
    }
    __device__ __forceinline__ void begin(int highest) {
        top = logits.of(score_of(highest));
        if (LOGITS > 0 && logits.has_sink) top = fmaxf(top, logits.sink);
        all.settle();
    }
    __device__ __forceinline__ bool is_placed(int j) const { return CODED && j >= start && j < stop; }
    __device__ __forceinline__ u32 place_of(int j) const { return CODED ? p.fast[j] : 0; }
    // What is known of a score may be above the highest chosen one.
    __device__ __forceinline__ float weight(float logit) const {
        return exp2_canonical(fminf(__fmul_rn(__fsub_rn(logit, top), logits.factor), HIGHEST));
    }

    // A chosen key, its canonical word and its place.
    __device__ __forceinline__ void take(Parts& parts, int j, int word, u32 place) const {
        if (all.count == 0) return;
        const float canonical = score_of(word), score = is_placed(j) ? of_place(place, unit, half) : canonical;
        const float mass = weight(logits.of(score)), apart = __fmul_rn(canonical, all.per_unit);
        parts.mass -= parts_of(mass);
        parts.excess -= parts_of(__fmul_rn(__fmul_rn(mass, __fsub_rn(score, all.mean)), all.per_unit));
        if (j < all.from || j >= all.to) return;
        parts.total += parts_of(apart), parts.second += parts_of(__fmul_rn(apart, apart)), parts.many++;
    }

    // Own runs, SUB keys each.
    __device__ __forceinline__ int key_of(int run) const { return p.dealt<32>(run) * SUB; }
    // Whether the score kernels summed it.
    __device__ __forceinline__ bool is_summed(int key) const { return SUMMED && key >= start && key + SUB <= stop; }
    __device__ __forceinline__ void add(Parts& parts, const Sums2& run, float best, float highest) const {
        const float relative = weight(highest);
        parts.mass += parts_of(__fmul_rn(relative, run.mass));
        const float excess = __fmul_rn(relative, __fadd_rn(run.excess, __fmul_rn(run.mass, __fsub_rn(best, all.mean))));
        parts.excess += parts_of(__fmul_rn(excess, all.per_unit));
    }
    __device__ __forceinline__ bool has_sums(int i) const { return SUMMED && i < p.own * 32 && is_summed(key_of(i)); }
    __device__ __forceinline__ void ask_from(int i) {
#pragma unroll
        for (int u = 0; u < DEEP; u++)
            if (has_sums(i + u * THREADS)) {
                const int key = key_of(i + u * THREADS);
                sums[u] = *(const uint2*)(runs + key / SUB * 2), bests[u] = p.best[key / SUB];
            }
    }
    // While others come to the barrier.
    __device__ __forceinline__ void ask() { ask_from(p.tid); }
    __device__ __forceinline__ void sync_asking() {
        cluster_arrive();
        ask();
        cluster_wait();
    }
    // What was asked for, in a loop: more instructions take longer to come than to be done.
    __device__ __forceinline__ void add_summed(Parts& parts) {
#pragma unroll 1
        for (int i = p.tid;;) {
#pragma unroll 1
            for (int u = 0; u < DEEP; u++, i += THREADS) {
                const float score = CODED ? of_place(bests[0], unit, half) : score_of(bests[0]);
                if (has_sums(i)) add(parts, {__uint_as_float(sums[0].x), __uint_as_float(sums[0].y)}, score, logits.of(score));
#pragma unroll
                for (int v = 1; v < DEEP; v++) sums[v - 1] = sums[v], bests[v - 1] = bests[v];
            }
            if (i >= p.own * 32) return;
            ask_from(i);
        }
    }
    // Four neighbours, whether they are seen or not.
    __device__ __forceinline__ void four(int key, float (&s)[4]) const {
        const uint4 w = *(const uint4*)(words + key);
        s[0] = score_of(w.x), s[1] = score_of(w.y), s[2] = score_of(w.z), s[3] = score_of(w.w);
        if constexpr (CODED) {
            float placed[4];
            of_places(*(const uint2*)(p.fast + key), unit, half, placed);
#pragma unroll
            for (int e = 0; e < 4; e++) s[e] = is_placed(key + e) ? placed[e] : s[e];
        }
    }
    __device__ __forceinline__ void add_other(Parts& parts) const {
#pragma unroll 1
        for (int i = p.tid; i < p.own * 32; i += THREADS) {
            const int key = key_of(i);
            const u32 seen = between(key, p.begin, p.end);
            if (is_summed(key) || seen == 0) continue;
            float best = -__int_as_float(0x7f800000);
#pragma unroll
            for (int u = 0; u < SUB / 4; u++) {
                float s[4];
                four(key + 4 * u, s);
#pragma unroll
                for (int e = 0; e < 4; e++) best = fmaxf(best, seen >> (4 * u + e) & 1 ? s[e] : best);
            }
            const float highest = logits.of(best);
            const Sums2 run = sums_of_run(
                [&](int u, float (&s)[4]) {
                    four(key + 4 * u, s);
#pragma unroll
                    for (int e = 0; e < 4; e++) s[e] = seen >> (4 * u + e) & 1 ? s[e] : best;
                }, best, seen, [&](float score, float away) {
                    if constexpr (LOGITS == 2) return logits.power(logits.of(score), highest);
                    else return plain_power(score, away, highest, logits.scale, per);
                });
            add(parts, run, best, highest);
        }
    }
    __device__ __forceinline__ void add_runs(Parts& parts) {
        if (all.count == 0) return;
        if (SUMMED) add_summed(parts);
        if (!SUMMED || start > p.begin || stop < p.end || p.begin % SUB > 0 || p.end % SUB > 0) add_other(parts);
    }

    // Numbers lie as two words each: of warps where values are summed later, of programs where those of the cluster are.
    __device__ __forceinline__ int* of_warp(int warp, int i) const {
        return (int*)p.s.warp_numerators + (warp * Parts::NUMBERS + i) * 2;
    }
    __device__ __forceinline__ int* of_program(int rank, int i) const {
        return (int*)p.s.numerators + (rank * Parts::NUMBERS + i) * 2;
    }
    __device__ __forceinline__ int* of_row(int i) const { return (int*)p.s.warp_denominators + i * 2; }
    __device__ __forceinline__ static void put(int* to, i64 x) { to[0] = (int)x, to[1] = (int)(x >> 32); }
    __device__ __forceinline__ static i64 get(const int* from) { return (i64)(u32)from[0] | (i64)from[1] << 32; }
    __device__ __forceinline__ static i64 over_lanes(i64 x, int m) {
        const u32 low = __shfl_xor_sync(ALL, (u32)x, m), high = __shfl_xor_sync(ALL, (u32)(x >> 32), m);
        return (i64)((u64)high << 32 | low);
    }
    // Over a warp; lanes share the four sums out, as tree_over_lanes does.
    __device__ __forceinline__ void keep(const Parts& parts) const {
        if (all.count == 0) return;
        const bool first = p.lane & 1, second = p.lane & 2;
        const i64 a = (first ? parts.total : parts.mass) + over_lanes(first ? parts.mass : parts.total, 1);
        const i64 b = (first ? parts.second : parts.excess) + over_lanes(first ? parts.excess : parts.second, 1);
        i64 x = (second ? b : a) + over_lanes(second ? a : b, 2);
#pragma unroll
        for (int m = 4; m < 32; m *= 2) x += over_lanes(x, m);
        const int many = __reduce_add_sync(ALL, parts.many);
        // Mass, excess, total, second are at lanes 0, 2, 1, 3.
        if (p.lane < 4) put(of_warp(p.warp, (p.lane & 1) * 2 + (p.lane >> 1)), x);
        if (p.lane == 4) put(of_warp(p.warp, 4), many);
    }
    // A warp a number: of this program, told to all, once its warps have kept theirs and waited.
    __device__ __forceinline__ void tell() const {
        if (all.count == 0 || p.warp >= Parts::NUMBERS) return;
        i64 x = p.lane < WARPS ? get(of_warp(p.lane, p.warp)) : 0;
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x += over_lanes(x, m);
        if (p.lane >= CLUSTER) return;
        int* const to = of_program(p.rank, p.warp);
        push(to, p.lane, (int)x), push(to + 1, p.lane, (int)(x >> 32));
    }
    // Of the row, once the cluster and the program have waited; with what warps have kept since, which is the same everywhere.
    __device__ __forceinline__ void add_up(bool more) const {
        if (all.count == 0 || p.warp >= Parts::NUMBERS) return;
        i64 x = p.lane < CLUSTER ? get(of_program(p.lane, p.warp)) : 0;
        if (more && p.lane < WARPS) x += get(of_warp(p.lane, p.warp));
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x += over_lanes(x, m);
        if (p.lane == 0) put(of_row(p.warp), x);
    }
    // All of this where the bitmap names the chosen keys.
    __device__ __forceinline__ void of_bits(const int* words) {
        Parts parts;
        __syncthreads();
        add_runs(parts);
#pragma unroll 1
        for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
            const int j = p.dealt<BLOCK>(i);
            if (p.is_taken(j)) take(parts, j, words[j], place_of(j));
        }
        keep(parts);
        __syncthreads();
        tell();
    }
    // Once the program has waited.
    __device__ __forceinline__ Rest rest() const {
        const float unit = all.unit;
        return {fmaxf(of_parts(get(of_row(0))), 0.0f), __fmul_rn(of_parts(get(of_row(1))), unit),
                __fmul_rn(of_parts(get(of_row(2))), unit), __fmul_rn(__fmul_rn(of_parts(get(of_row(3))), unit), unit),
                of_row(4)[0]};
    }
};

static_assert(Parts::NUMBERS <= WARPS && 2 * Parts::NUMBERS <= DIM_V && 2 * Parts::NUMBERS <= WARPS && CLUSTER <= 32);

#else

struct Parts {};

struct Tail {
    __device__ __forceinline__ void begin(int) const {}
    __device__ __forceinline__ void ask() const {}
    __device__ __forceinline__ void sync_asking() const { cluster_sync(); }
    __device__ __forceinline__ u32 place_of(int) const { return 0; }
    __device__ __forceinline__ void take(Parts&, int, int, u32) const {}
    __device__ __forceinline__ void add_runs(Parts&) const {}
    __device__ __forceinline__ void keep(const Parts&) const {}
    __device__ __forceinline__ void tell() const {}
    __device__ __forceinline__ void add_up(bool) const {}
    __device__ __forceinline__ void of_bits(const int*) const {}
};

#endif
