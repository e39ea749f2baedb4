// What is left out, put back (attention/completion.py). cuda.py puts it behind attend.cuh where outputs are completed.
//
// First what scores alone tell: sums over the chosen keys, by ranks, and over those that are left, by runs. For the latter every
// program walks its own blocks, a warp a block, a lane a run of 16 keys; the bitmap says which of them are left. All sums go to
// every program of the cluster, which adds those of blocks by their absolute number: zeros stand for blocks before `base`. Then the
// weights of chosen keys are known, less what the moments have of them, and values are summed as ever.
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

// This warp's blocks, each told to all programs: they have room for two numbers of all blocks, where their candidates were.
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
        if (p.lane < 2)
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) push(p.position + 2 * block + p.lane, r, __float_as_int(sum[0]));
    }
}

struct Rest { float mass, excess; };

// Of all blocks, once the cluster has waited: 32 blocks or sums a warp, level by level.
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

// Sums over chosen keys: of weights; of those in complete groups, how many they are, of their scores and the squares.
struct Picked {
    float weight, total, second;
    int many;
};

// Over the lanes of a warp, by neighbours.
__device__ __forceinline__ void sum_lanes(float (&x)[3]) {
#pragma unroll
    for (int m = 1; m < 32; m *= 2)
#pragma unroll
        for (int e = 0; e < 3; e++) x[e] = __fadd_rn(x[e], __shfl_xor_sync(ALL, x[e], m));
}

// Those of this program, told to all: in near_word, which nobody reads any more, 4 numbers a program. A warp takes neighbouring
// ranks, 32 a turn, no more than 32 turns.
__device__ __forceinline__ void sum_picked(const Program& p, const Logits& logits, const Whole& whole, int live, float top) {
    const int turns = max(1, p.span() / (32 * WARPS));
    float sum[3] = {};
    int many = 0;
#pragma unroll 1
    for (int u = 0; u < turns; u++) {
        const int i = (p.warp * turns + u) * 32 + p.lane;
        float x[3] = {};
        bool counted = false;
        if (i < live) {
            const float score = score_of(p.chosen[i]);
            const int j = p.base + p.chosen_position[i];
            counted = j >= whole.from && j < whole.to;
            x[0] = logits.power(logits.of(score), top);
            if (counted) x[1] = score, x[2] = __fmul_rn(score, score);
        }
        sum_lanes(x);
        many += __popc(__ballot_sync(ALL, counted));
#pragma unroll
        for (int e = 0; e < 3; e++) sum[e] = p.lane == u ? x[e] : sum[e];
    }
    sum_lanes(sum);
    int* const sums = p.s.counts;
    if (p.lane == 0) {
#pragma unroll
        for (int e = 0; e < 3; e++) sums[4 * p.warp + e] = __float_as_int(sum[e]);
        sums[4 * p.warp + 3] = many;
    }
    __syncthreads();
    if (p.warp > 0) return;
#pragma unroll
    for (int e = 0; e < 3; e++) sum[e] = p.lane < WARPS ? __int_as_float(sums[4 * p.lane + e]) : 0.0f;
    many = __reduce_add_sync(ALL, p.lane < WARPS ? sums[4 * p.lane + 3] : 0);
    sum_lanes(sum);
    const int told[4] = {__float_as_int(sum[0]), __float_as_int(sum[1]), __float_as_int(sum[2]), many};
    if (p.lane < CLUSTER)
#pragma unroll
        for (int e = 0; e < 4; e++) push(p.s.near_word + 4 * p.rank + e, p.lane, told[e]);
}

// Those of the cluster, once it has waited.
__device__ __forceinline__ Picked picked_of(const Program& p) {
    float x[3][CLUSTER];
    int many = 0;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) {
#pragma unroll
        for (int e = 0; e < 3; e++) x[e][r] = __int_as_float(p.s.near_word[4 * r + e]);
        many += p.s.near_word[4 * r + 3];
    }
    tree<CLUSTER>(x[0]), tree<CLUSTER>(x[1]), tree<CLUSTER>(x[2]);
    return {x[0][0], __fadd_rn(x[1][0], 0.0f), __fadd_rn(x[2][0], 0.0f), many};
}

struct Affine { float alpha, beta, mass; };  // weights of what is left, of complete groups; and the mass of all that is left

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) < 0x7f800000u; }

// Nothing is put back where no key of complete groups is left.
__device__ __forceinline__ Affine weights_of_rest(
    const Rest& rest, const Picked& picked, int count, const float* line, float mean_of_all, int linear) {
    const int many = count - picked.many;
    if (many <= 0) return {0.0f, 0.0f, 0.0f};
    const float n = (float)many, total = __fsub_rn(line[0], picked.total), second = __fsub_rn(line[1], picked.second);
    const float mean = __fdiv_rn(total, n), spread = __fsub_rn(second, __fmul_rn(total, mean)), level = __fdiv_rn(rest.mass, n);
    float beta = 0.0f;
    // A share below 2^-12 is rounding.
    if (linear && spread > __fmul_rn(line[1], 0x1p-12f) && spread > 0.0f)
        beta = __fdiv_rn(__fadd_rn(rest.excess, __fmul_rn(rest.mass, __fsub_rn(mean_of_all, mean))), spread);
    const float alpha = __fsub_rn(level, __fmul_rn(beta, mean));
    return finite(alpha) && finite(beta) ? Affine{alpha, beta, rest.mass} : Affine{level, 0.0f, rest.mass};
}

// As weigh in attend.cuh, less what the affine weights have of a key of complete groups.
__device__ __forceinline__ void weigh_less(
    const Program& p, const Logits& logits, const Whole& whole, const Affine& rest, int live, float top) {
#pragma unroll 1
    for (int i = p.tid; i < p.span(); i += THREADS) {
        float weight = 0.0f;
        if (i < live) {
            const float score = score_of(p.chosen[i]);
            const int j = p.base + p.chosen_position[i];
            weight = logits.power(logits.of(score), top);
            if (j >= whole.from && j < whole.to)
                weight = __fsub_rn(weight, __fadd_rn(rest.alpha, __fmul_rn(rest.beta, score)));
        }
        p.chosen[i] = __float_as_int(weight);
    }
}

// As write_output, with the values that the affine weights have of all keys of complete groups.
__device__ __forceinline__ void write_completed(
    const Program& p, const Logits& logits, float top, const Affine& rest, float weight, const float* line, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    if (sinks) weight = __fadd_rn(weight, logits.power(logits.sink, top));
    const int d = p.tid;
    if (d >= DIM_V) return;
    float x[CLUSTER];
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d];
    tree<CLUSTER>(x);
    const float added = __fadd_rn(__fmul_rn(rest.alpha, line[VALUES + d]), __fmul_rn(rest.beta, line[CROSS + d]));
    const float y = __fdiv_rn(__fadd_rn(__fadd_rn(x[0], 0.0f), finite(added) ? added : 0.0f), __fadd_rn(weight, rest.mass));
    store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
}

static_assert(DIM_V <= THREADS && CLUSTER <= 32 && WARPS <= 32);

// As attend.
__device__ __forceinline__ void attend_completed(
    const Program& p, const Rows& values, const Logits& logits, int highest, int most, i64* indices, void* out,
    const Known& known, const Whole& whole, const float* line, int linear) {
    const int live = p.live(), count = whole.keys();
    mark_winners(p);
    write_indices(p, live, most, indices);
    const float top = highest_logit(p, logits, live, highest);
    const float mean = count > 0 ? __fdiv_rn(line[0], (float)count) : 0.0f;
    __syncthreads();
    sum_picked(p, logits, whole, live, top);
    if (count > 0) sum_left(p, logits, known, mean, top);
    cluster_sync();
    const Picked picked = picked_of(p);
    Affine rest = {0.0f, 0.0f, 0.0f};
    if (count > 0) rest = weights_of_rest(sum_blocks(p), picked, count, line, mean, linear);
    weigh_less(p, logits, whole, rest, live, top);
    __syncthreads();
    sum_warp(p, values, live);
    __syncthreads();
    mark(p, 11);
    sum_program(p);
    cluster_sync();
    if (p.rank == 0) write_completed(p, logits, top, rest, picked.weight, line, out);
}
