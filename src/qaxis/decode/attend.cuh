// Stage 5, attention. cuda.py puts it before choose.cu.
//
// Of ranks [span rank, span (rank + 1)), within one tree over all ranks (rule 2): a team of LANES_V lanes takes
// RANKS times `turns` neighbouring ones; then the teams of a warp, warps and programs are added, of each a power of two.
// Ranks beyond the last weigh +0.0, as padding does, so how many turns there are changes no bit. The highest score is known
// by now, so no sum is ever rescaled (rule 5).

constexpr int SUMS = E + 1;  // numerators of a lane, and the denominator

// x is the u-th of 1 << DEPTH neighbours: pairs are added when their second comes, as carries are in a counter. After
// the last, x is the sum of all. A sum that is not complete can wait at a level, but is overwritten before it is read.
template <int DEPTH> __device__ __forceinline__ void add_up(float (&level)[DEPTH + 1][SUMS], float (&x)[SUMS], int u) {
#pragma unroll
    for (int l = 0; l < DEPTH; l++)
#pragma unroll
        for (int e = 0; e < SUMS; e++) {
            if (u >> l & 1) x[e] = __fadd_rn(level[l][e], x[e]);
            else level[l][e] = x[e];
        }
}

// The indices of this program's ranks, and -1 up to `most`.
__device__ __forceinline__ void write_indices(const Program& p, int live, int most, i64* indices) {
    indices += (i64)p.row * most;
#pragma unroll 1
    for (int i = p.tid; i < live; i += THREADS) indices[p.span() * p.rank + i] = p.base + p.chosen_position[i];
#pragma unroll 1
    for (int i = p.k_eff + p.rank * THREADS + p.tid; i < most; i += CLUSTER * THREADS) indices[i] = -1;
}

// Over words their logits; returns the highest of all. A product with the scale is monotone, so its highest is that of the
// highest score; nothing proves that of a rounded cap.
__device__ __forceinline__ float to_logits(const Program& p, const Logits& logits, int live, int highest) {
    if constexpr (LOGITS == 2) {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        highest = NONE;
    }
#pragma unroll 1
    for (int i = p.tid; i < live; i += THREADS) {
        const float logit = logits.of(score_of(p.chosen[i]));
        p.chosen[i] = __float_as_int(logit);
        if (LOGITS == 2) highest = max(highest, word_of(logit));
    }
    float top = LOGITS == 2 ? 0.0f : logits.of(score_of(highest));
    if constexpr (LOGITS == 2) {
        tell_highest(p, highest);
        cluster_sync();
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
        top = score_of(highest);
    }
    return logits.has_sink ? fmaxf(top, logits.sink) : top;
}

// Over words their weights (rules 3 and 5); returns the highest logit.
__device__ __forceinline__ float weigh(const Program& p, const Logits& logits, int live, int highest) {
    float top = score_of(highest);
    if (LOGITS > 0) top = to_logits(p, logits, live, highest);
#pragma unroll 1
    for (int i = p.tid; i < p.span(); i += THREADS) {
        const float logit = LOGITS > 0 ? __int_as_float(p.chosen[i]) : score_of(p.chosen[i]);
        p.chosen[i] = __float_as_int(i < live ? logits.power(logit, top) : 0.0f);
    }
    return top;
}

// The sum of RANKS weighted values, from the i-th on. PLAIN: all are coded.
template <bool PLAIN>
__device__ __forceinline__ void sum_ranks(
    const Program& p, const Rows& values, int i, int live, int part, float (&x)[SUMS]) {
    constexpr int DEPTH = log2i(RANKS);
    const int *position = p.chosen_position + i, *weights = p.chosen + i;
    const int last = live - 1 - i;
    float level[DEPTH + 1][SUMS];
    uint4 raw[RANKS];
#pragma unroll
    for (int u = 0; u < RANKS; u++) raw[u] = values.load<PLAIN>(position[min(u, last)], part);
#pragma unroll
    for (int u = 0; u < RANKS; u++) {
        values.numbers<PLAIN>(position[min(u, last)], raw[u], x);
        const float weight = __int_as_float(weights[u]);
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = __fmul_rn(weight, x[e]);
        x[E] = weight;
        add_up<DEPTH>(level, x, u);
    }
}

// The sum of a warp's ranks.
__device__ __forceinline__ void sum_warp(const Program& p, const Rows& values, int live) {
    const int part = p.lane % LANES_V, team = p.tid / LANES_V;
    float level[LEVELS + 1][SUMS], sum[SUMS];
#pragma unroll 1
    for (int c = 0; c < p.turns; c++) {
        const int i = (team * p.turns + c) * RANKS;
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = 0.0f;
        if (i < live) {
            bool coded = true;
#pragma unroll
            for (int u = 0; u < RANKS; u++) coded = coded && values.coded(p.chosen_position[min(i + u, live - 1)]);
            if (STORED && coded) sum_ranks<true>(p, values, i, live, part, sum);
            else sum_ranks<false>(p, values, i, live, part, sum);
        }
        add_up<LEVELS>(level, sum, c);
    }
#pragma unroll
    for (int m = LANES_V; m < 32; m *= 2)
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = __fadd_rn(sum[e], __shfl_xor_sync(ALL, sum[e], m));
    if (p.lane < LANES_V) {
#pragma unroll
        for (int e = 0; e < E; e++) p.s.warp_numerators[p.warp][part * E + e] = sum[e];
        if (p.lane == 0) p.s.warp_denominators[p.warp] = sum[E];
    }
}

// The sum of this program, told to the first of the cluster.
__device__ __forceinline__ void sum_program(const Program& p) {
    Shared& s = p.s;
#pragma unroll 1
    for (int d = p.tid; d <= DIM_V; d += THREADS) {
        float x[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[w] = d < DIM_V ? s.warp_numerators[w][d] : s.warp_denominators[w];
        tree<WARPS>(x);
        push((int*)(d < DIM_V ? &s.numerators[p.rank][d] : &s.denominators[p.rank]), 0, __float_as_int(x[0]));
    }
}

__device__ __forceinline__ void store(void* out, i64 at, float y) {
#if ELEM == 0
    ((float*)out)[at] = y;
#elif ELEM == 2
    const u32 bits = __float_as_uint(y);
    ((u16*)out)[at] = (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    ((u16*)out)[at] = half_of(y);
#endif
}

// The sum of the cluster, divided (rule 3) and rounded to the dtype of the output.
__device__ __forceinline__ void write_output(const Program& p, const Logits& logits, float top, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    const float sink = sinks ? logits.power(logits.sink, top) : 0.0f;
#pragma unroll 1
    for (int d = p.tid; d < DIM_V; d += THREADS) {
        float x[CLUSTER], w[CLUSTER];
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
        tree<CLUSTER>(x), tree<CLUSTER>(w);
        if (sinks) w[0] = __fadd_rn(w[0], sink);
        const float y = __fdiv_rn(__fadd_rn(x[0], 0.0f), w[0]);
        // Where a sink is no number there is no denominator, and where it is infinite it has all the weight.
        store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
    }
}

__device__ __forceinline__ void attend(
    const Program& p, const Rows& values, const Logits& logits, int highest, int most, i64* indices, void* out) {
    const int live = p.live();
    write_indices(p, live, most, indices);
    const float top = weigh(p, logits, live, highest);
    __syncthreads();
    sum_warp(p, values, live);
    __syncthreads();
    mark(p, 11);
    sum_program(p);
    cluster_sync();
    if (p.rank == 0) write_output(p, logits, top, out);
}

// A row that keeps nothing.
__device__ __forceinline__ void write_nothing(const Program& p, int most, void* out, i64* indices, int* count) {
    write_indices(p, 0, most, indices);
    if (p.tid == 0) count[p.row * CLUSTER + p.rank] = 0;
    if (p.rank == 0)
        for (int d = p.tid; d < DIM_V; d += THREADS) store(out, (i64)p.row * DIM_V + d, 0.0f);
}
