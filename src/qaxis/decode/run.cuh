// A run of SUB neighbouring keys: its mass and excess (attention/completion.py), which need no other key. Where that is SUMMED, the
// score kernels make them for runs of which they score all keys, and choose.cu for the others; else it makes all. cuda.py puts it
// before both where outputs are completed.

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

// Of four packed ones.
__device__ __forceinline__ void of_places(uint2 packed, float unit, float half, float (&s)[4]) {
    const u32 two[2] = {packed.x, packed.y};
#pragma unroll
    for (int i = 0; i < 2; i++) s[2 * i] = of_place(two[i] & 65535, unit, half), s[2 * i + 1] = of_place(two[i] >> 16, unit, half);
}

struct Sums2 { float mass, excess; };

// Of the `seen` ones of SUB scores, with the weights power(score, away), in a sum by pairs. Four scores at a time, four(u, s): run
// once, more instructions take longer to come than to be done.
template <class Four, class Power>
__device__ __forceinline__ Sums2 sums_of_run(Four four, float best, u32 seen, Power power) {
    float before[2] = {}, half[2] = {};
#pragma unroll 1
    for (int u = 0; u < SUB / 4; u++, seen >>= 4) {
        float s[4], sum[2][4];
        four(u, s);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float away = __fsub_rn(s[e], best), all = power(s[e], away);
            sum[0][e] = seen >> e & 1 ? all : 0.0f, sum[1][e] = __fmul_rn(sum[0][e], away);
        }
#pragma unroll
        for (int x = 0; x < 2; x++) {
            tree<4>(sum[x]);
            const float two = __fadd_rn(before[x], sum[x][0]);
            if (u == 1) half[x] = two;
            before[x] = u % 2 ? two : sum[x][0];
        }
    }
    return {__fadd_rn(half[0], before[0]), __fadd_rn(half[1], before[1])};
}

// The logit of a score without a cap, and so the highest of the highest.
__device__ __forceinline__ float plain_logit(float score, float scale) {
    return LOGITS == 0 ? score : __fmul_rn(score, scale);
}
// Of a run's key, with that logit, as against its best: a score lower by `away`.
__device__ __forceinline__ float plain_power(float score, float away, float highest, float scale, float per) {
    return power_below(LOGITS == 0 ? away : __fsub_rn(plain_logit(score, scale), highest), per);
}
