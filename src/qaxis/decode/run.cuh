// A run of SUB neighbouring keys that are left out: its mass and excess (attention/completion.py), which need no other key. The
// score kernels have sums of runs of which all keys are left, choose.cu makes the others. cuda.py puts it before both where outputs
// are completed.

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

// (place - 32767.5) unit, given `half` of it, negative, in one rounding: the first difference is exact, and so is what is added to
// its product.
__device__ __forceinline__ float of_place(u32 place, float unit, float half) {
    return __fmaf_rn(__fsub_rn(__uint_as_float(0x4b000000u | place), 8421375.0f), unit, half);
}

// The number of a tree's leaves, 2 a time: mass and excess. As add_up in attend.cuh, with u known to the compiler.
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

struct Sums2 { float mass, excess; };

// Of the `left` ones of scores `s(0)`, ..., with the weights power(score), in a sum by pairs.
template <class Score, class Power>
__device__ __forceinline__ Sums2 sums_of_run(Score s, float best, u32 left, Power power) {
    constexpr int DEPTH = log2i(SUB);
    float level[DEPTH + 1][2];
#pragma unroll
    for (int e = 0; e < SUB; e++) {
        const float score = s(e), away = __fsub_rn(score, best), all = power(score, away), p = left >> e & 1 ? all : 0.0f;
        pair_up<DEPTH>(level, p, __fmul_rn(p, away), e);
    }
    return {level[DEPTH][0], level[DEPTH][1]};
}

// The logit of a score without a cap, and so the highest of the highest.
__device__ __forceinline__ float plain_logit(float score, float scale) {
    return LOGITS == 0 ? score : __fmul_rn(score, scale);
}
// Of a run's key, with that logit, as against its best: a score lower by `away`.
__device__ __forceinline__ float plain_power(float score, float away, float highest, float scale, float per) {
    return power_below(LOGITS == 0 ? away : __fsub_rn(plain_logit(score, scale), highest), per);
}
// Where the score kernels have sums: not of capped logits, which are dear.
constexpr bool SUMMED = COMPLETED && LOGITS < 2;
