// The rules in CUDA C++ (qaxis/arithmetic numbers them), and what kernels share: loads, sums over lanes.
//
// Products and additions that reach a result are written as __fmul_rn and __fadd_rn, which are never contracted. compiler.py
// puts this text before theirs and defines: ELEM (0 float32, 1 float16, 2 bfloat16), DIM, MAGIC, C0..C7 (reference.py),
// UNITS, SMALLEST, LARGEST, SHORTEST, LEAST_CODE_SCALE (fast_scores.py).

constexpr int E = ELEM == 0 ? 4 : 8;  // numbers in 16 bytes
constexpr int NONE = -2147483647 - 1;  // the word of no score
constexpr u32 ALL = 0xffffffffu;

constexpr int log2i(int n) { return n <= 1 ? 0 : 1 + log2i(n / 2); }
template <bool B> struct Bool { static constexpr bool value = B; };
constexpr int pow2(int n) { return n <= 1 ? 1 : 2 * pow2((n + 1) / 2); }

// ---- canonical arithmetic -------------------------------------------------------------------------------------------

__device__ __forceinline__ void widen(uint4 w, float* x) {
    const u32 part[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEM == 0
        x[i] = __uint_as_float(part[i]);
#elif ELEM == 2
        x[2 * i] = __uint_as_float(part[i] << 16);
        x[2 * i + 1] = __uint_as_float(part[i] & 0xffff0000u);
#else
        halves_to_floats(part[i], x[2 * i], x[2 * i + 1]);
#endif
    }
}

// Sum of n numbers by adjacent pairs, into x[0] (rule 2).
template <int n> __device__ __forceinline__ void tree(float* x) {
#pragma unroll
    for (int s = 1; s < n; s *= 2)
#pragma unroll
        for (int i = 0; i < n; i += 2 * s) x[i] = __fadd_rn(x[i], x[i + s]);
}

// The sum of E products (rules 2 and 3): a lane's part of a score.
__device__ __forceinline__ float product(const float* a, const float* b) {
    float x[E];
#pragma unroll
    for (int e = 0; e < E; e++) x[e] = __fmul_rn(a[e], b[e]);
    tree<E>(x);
    return x[0];
}

// The upper levels of V trees whose leaves lie in LANES neighbouring lanes. Lanes share the work: a lane gives half of its
// sums away and gets the other half of its neighbour's; at the end it has sums first_sum(lane) and following. In the first
// PLACED halvings the half to give is the second, as the caller put sum i into slot i ^ first_sum(lane) that far.
template <int V, int LANES, int PLACED = 0, int M = 1> __device__ __forceinline__ void tree_over_lanes(float* v, int lane) {
    if constexpr (M < LANES) {
        if constexpr (V > 1) {
            const bool upper = PLACED <= 0 && (lane & M);
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                const float keep = upper ? v[i + V / 2] : v[i], give = upper ? v[i] : v[i + V / 2];
                v[i] = __fadd_rn(keep, __shfl_xor_sync(ALL, give, M));
            }
            tree_over_lanes<V / 2, LANES, PLACED - 1, M * 2>(v, lane);
        } else {
            v[0] = __fadd_rn(v[0], __shfl_xor_sync(ALL, v[0], M));
            tree_over_lanes<1, LANES, 0, M * 2>(v, lane);
        }
    }
}
template <int V, int LANES> __device__ __forceinline__ int first_sum(int lane) {
    int first = 0, half = V / 2;
#pragma unroll
    for (int m = 1; m < LANES && half > 0; m *= 2, half /= 2) first += lane & m ? half : 0;
    return first;
}
// Where lanes outnumber sums, several lanes have the same one: whether this is the lane to write it.
template <int V, int LANES> __device__ __forceinline__ bool writes_sum(int lane) {
    return V >= LANES || (lane % LANES) / V == 0;
}
// An integer in the order of the scores, and back (rule 4).
__device__ __forceinline__ int word_of(float score) {
    const int bits = __float_as_int(__fadd_rn(score, 0.0f));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float score_of(int word) { return __int_as_float(word ^ ((word >> 31) & 0x7fffffff)); }

// 2^t (rule 3).
__device__ __forceinline__ float exp2_canonical(float t) {
    t = fminf(fmaxf(t, -200.0f), 200.0f);
    const float rounded = __fsub_rn(__fadd_rn(t, MAGIC), MAGIC), f = __fsub_rn(t, rounded);
    float p = __fadd_rn(__fmul_rn(f, C7), C6);
    p = __fadd_rn(__fmul_rn(p, f), C5);
    p = __fadd_rn(__fmul_rn(p, f), C4);
    p = __fadd_rn(__fmul_rn(p, f), C3);
    p = __fadd_rn(__fmul_rn(p, f), C2);
    p = __fadd_rn(__fmul_rn(p, f), C1);
    p = __fadd_rn(__fmul_rn(p, f), C0);
    const int n = __float2int_rz(rounded), half = n >> 1;
    p = __fmul_rn(p, __int_as_float((half + 127) << 23));
    return __fmul_rn(p, __int_as_float((n - half + 127) << 23));
}

__device__ __forceinline__ void load_query(const void* q, i64 offset, int part, float* x) {
    widen(load16((const char*)q + (offset + part * E) * (16 / E)), x);
}

// The sum of x over the lanes up to this one.
__device__ __forceinline__ int sum_upto(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_up_sync(ALL, x, o);
        if (lane >= o) x += more;
    }
    return x;
}
