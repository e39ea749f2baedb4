// What is left out, put back (attention/completion.py, tail and completed). cuda.py puts it behind attend.cuh where outputs are
// completed.
//
// Every program walks its own blocks, a warp a block, a lane a run of 16 keys; the bitmap says which of them are left. Sums of
// blocks go to the first program of the cluster, which adds them by their absolute number: zeros stand for blocks before `base`.
// Instructions count: each of a row's keys comes by. So a run's best score is the one that the score kernels kept, and what
// differs between keys is a mask, no branch.

constexpr float UP = 0x1p126f, DOWN = 0x1p-126f;

// 2^t of t = x factor, no more than 0, given -factor / 256: the bits of exp2_canonical. The bounds of t and of the result come
// with a product; what is rounded stays in the bits of `shifted`, to be moved into the exponent. That is 126 higher than it
// should be until the end, so that the last product alone rounds into the subnormals; far below them it is no number or
// negative, and becomes 0.
__device__ __forceinline__ float power_below(float x, float per) {
    const float u = product_in_unit(x, per);
    const float shifted = __fsub_rn(MAGIC / 256.0f, u), rounded = __fmaf_rn(shifted, -256.0f, MAGIC);
    const float f = __fmaf_rn(u, -256.0f, rounded);
    float p = __fadd_rn(__fmul_rn(f, C7 * UP), C6 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C5 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C4 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C3 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C2 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C1 * UP);
    p = __fadd_rn(__fmul_rn(p, f), C0 * UP);
    return product_in_unit(__uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23)), DOWN);
}

// Scores of a run as they are known: canonical words, or over codes places, where a key has one.
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
    // (place - 32767.5) unit, in one rounding: the first difference is exact, and so is what is added to its product.
    __device__ __forceinline__ float of_place(u32 place) const {
        return __fmaf_rn(__fsub_rn(__uint_as_float(0x4b000000u | place), 8421375.0f), unit, half);
    }
    // Of two packed ones, the lower and the upper.
    __device__ __forceinline__ void of_places(u32 two, float* s) const {
        s[0] = __fmaf_rn(__fsub_rn(__uint_as_float(__byte_perm(two, 0x4b000000u, 0x7610)), 8421375.0f), unit, half);
        s[1] = __fmaf_rn(__fsub_rn(__uint_as_float(__byte_perm(two, 0x4b000000u, 0x7632)), 8421375.0f), unit, half);
    }
    __device__ __forceinline__ bool whole(int key) const { return key >= start && key + SUB <= stop; }
    // Of a run that is whole; returns the best.
    __device__ __forceinline__ float read(int key, float (&s)[SUB]) const {
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            const uint4 raw = *(const uint4*)(p.fast + key + i * (SUB / PACKS));
            const u32 part[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if constexpr (CODED) of_places(part[e], s + 8 * i + 2 * e);
                else s[4 * i + e] = score_of((int)part[e]);
            }
        }
        const Fast best = p.best[key / SUB];
        return CODED ? of_place(best) : score_of(best);
    }
    // Of any run, whose keys are `visible`; those that cannot be left get the best score, so that they differ from it by 0.
    __device__ __forceinline__ float read_any(int key, u32 visible, float (&s)[SUB]) const {
        float best = -__int_as_float(0x7f800000);
#pragma unroll
        for (int e = 0; e < SUB; e++) {
            s[e] = 0.0f;
            if (visible >> e & 1) {
                const int j = key + e;
                s[e] = CODED && j >= start && j < stop ? of_place(p.fast[j]) : score_of(words[j]);
                best = fmaxf(best, s[e]);
            }
        }
        const u32 ranked = between(key, p.first, p.last);
#pragma unroll
        for (int e = 0; e < SUB; e++) s[e] = ranked >> e & 1 ? s[e] : best;
        return visible ? best : 0.0f;
    }
};

// The u-th of 1 << DEPTH neighbours of two trees, of mass and excess, as add_up in attend.cuh adds them; the sums of all are at
// the last level.
template <int DEPTH> __device__ __forceinline__ void pair_up(float (&level)[DEPTH + 1][2], float mass, float excess, int u) {
#pragma unroll
    for (int l = 0; l < DEPTH; l++) {
        if (!(u >> l & 1)) {
            level[l][0] = mass, level[l][1] = excess;
            return;
        }
        mass = __fadd_rn(level[l][0], mass), excess = __fadd_rn(level[l][1], excess);
    }
    level[DEPTH][0] = mass, level[DEPTH][1] = excess;
}

// What a run of `left` keys adds to mass and excess.
__device__ __forceinline__ void sum_run(
    const Logits& logits, const float (&s)[SUB], float best, u32 left, float per, float mean, float top, float (&sum)[2]) {
    constexpr int DEPTH = log2i(SUB);
    const float highest = logits.of(best);
    float level[DEPTH + 1][2];
#pragma unroll
    for (int e = 0; e < SUB; e++) {
        const float away = __fsub_rn(s[e], best);
        float p;
        // A rounded cap is not monotone: a key may be above the best.
        if constexpr (LOGITS == 0) p = power_below(away, per);
        else if constexpr (LOGITS == 1) p = power_below(__fsub_rn(logits.of(s[e]), highest), per);
        else p = logits.power(logits.of(s[e]), highest);
        p = left >> e & 1 ? p : 0.0f;
        pair_up<DEPTH>(level, p, __fmul_rn(p, away), e);
    }
    const float mass = level[DEPTH][0], excess = level[DEPTH][1];
    const float weight = left ? power_below(__fsub_rn(fminf(highest, top), top), per) : 0.0f;
    sum[0] = __fmul_rn(weight, mass);
    sum[1] = left ? __fmul_rn(weight, __fadd_rn(excess, __fmul_rn(mass, __fsub_rn(best, mean)))) : 0.0f;
}

// Winners at the edge get their bits too, once all chosen keys were sent to their ranks.
__device__ __forceinline__ void mark_winners(const Program& p) {
#pragma unroll 1
    for (int i = p.tid; i < p.s.winners; i += THREADS) {
        const int j = p.s.winner[i];
        if (p.owns(j)) atomicOr(p.bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
    }
}

// This warp's blocks, each told to the first program: it has room for two numbers of all blocks, where its candidates were.
__device__ __forceinline__ void sum_left(const Program& p, const Logits& logits, const Known& known, float mean, float top) {
    const float per = logits.factor * (-1.0f / 256.0f);
#pragma unroll 1
    for (int i = p.warp; i < p.own; i += WARPS) {
        const int block = i * CLUSTER + p.rank, key = block * BLOCK + p.lane * SUB;
        if (block >= p.blocks) break;
        const u32 taken = p.bitmap[i * WORDS + p.lane / 2] >> (p.lane % 2 * SUB);
        u32 visible = 0xffff;
        float s[SUB], best, sum[2];
        if (__all_sync(ALL, known.whole(key))) best = known.read(key, s);
        else visible = between(key, p.begin, p.end), best = known.read_any(key, visible, s);
        sum_run(logits, s, best, visible & ~taken, per, mean, top, sum);
        tree_over_lanes<2, 32>(sum, p.lane);
        if (p.lane < 2) push(p.position + 2 * block + p.lane, 0, __float_as_int(sum[0]));
    }
}

struct Rest { float mass, excess; };

// Of all blocks, by the first program, once the cluster has waited: 32 blocks or sums a warp, level by level.
__device__ __forceinline__ Rest sum_blocks(const Program& p) {
    int *from = p.position, *to = p.s.counts, first = p.base / BLOCK, count = p.blocks;
    auto sum_32 = [&](int i) {
        i += p.lane - first % 32;
        const bool is = i >= 0 && i < count;
        float sum[2] = {is ? __int_as_float(from[2 * i]) : 0.0f, is ? __int_as_float(from[2 * i + 1]) : 0.0f};
        tree_over_lanes<2, 32>(sum, p.lane);
        return sum[0];
    };
#pragma unroll 1
    while (first % 32 + count > 32) {
        const int sums = (first % 32 + count + 31) / 32;
#pragma unroll 1
        for (int c = p.warp; c < sums; c += WARPS) {
            const float sum = sum_32(32 * c);
            if (p.lane < 2) to[2 * c + p.lane] = __float_as_int(sum);
        }
        __syncthreads();
        int* const next = from;
        from = to, to = next, first /= 32, count = sums;
    }
    const float sum = sum_32(0);
    return {__fadd_rn(__shfl_sync(ALL, sum, 0), 0.0f), __fadd_rn(__shfl_sync(ALL, sum, 1), 0.0f)};
}

// x where it is a number that is not infinite, else 0.
__device__ __forceinline__ float if_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) < 0x7f800000u ? x : 0.0f;
}

// As write_output, with what `line` has for the rest.
__device__ __forceinline__ void write_completed(
    const Program& p, const Logits& logits, float top, const Rest& rest, float mean, float slope, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    const float sink = sinks ? logits.power(logits.sink, top) : 0.0f;
    const int d = p.tid;
    if (d >= DIM_V) return;
    float x[CLUSTER], w[CLUSTER];
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
    tree<CLUSTER>(x), tree<CLUSTER>(w);
    if (sinks) w[0] = __fadd_rn(w[0], sink);
    const float added = __fadd_rn(if_finite(__fmul_rn(rest.mass, mean)), if_finite(__fmul_rn(rest.excess, slope)));
    const float y = __fdiv_rn(__fadd_rn(__fadd_rn(x[0], 0.0f), added), __fadd_rn(w[0], rest.mass));
    store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
}

static_assert(DIM_V <= THREADS);

// As attend; without a line, as the row sees no complete group, nothing is put back.
__device__ __forceinline__ void attend_completed(
    const Program& p, const Rows& values, const Logits& logits, int highest, int most, i64* indices, void* out,
    const Known& known, const float* line) {
    const int live = p.live();
    const float mean = line ? line[0] : 0.0f;
    mark_winners(p);
    write_indices(p, live, most, indices);
    const float top = weigh(p, logits, live, highest);
    __syncthreads();
    // Values are waited for, weights are computed: of the warps that share a scheduler half do the one while the others do the
    // other.
#pragma unroll 1
    for (int phase = 0; phase < 2; phase++) {
        if ((phase ^ p.warp / 4) & 1) sum_warp(p, values, live);
        else if (line) sum_left(p, logits, known, mean, top);
    }
    float mean_value = 0.0f, slope = 0.0f;
    if (line && p.rank == 0 && p.tid < DIM_V) mean_value = line[VALUE + p.tid], slope = line[SLOPE + p.tid];
    __syncthreads();
    mark(p, 11);
    sum_program(p);
    cluster_sync();
    if (p.rank != 0) return;
    Rest rest = {0.0f, 0.0f};
    if (line) rest = sum_blocks(p);
    write_completed(p, logits, top, rest, mean_value, slope, out);
}
