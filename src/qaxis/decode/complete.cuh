// Values, with those of what is left put back (attention/completion.py). cuda.py puts it behind attend.cuh where outputs are
// completed.
//
// By now tail.cuh has summed what scores tell. The weights of chosen keys are known, less what the moments have of them, and values
// are summed as ever.

// The highest logit of the chosen keys, whose words stay, or the sink's; as to_logits in attend.cuh. `top` is that of the highest
// score, which only a cap can make another one.
__device__ __forceinline__ float highest_logit(const Program& p, const Logits& logits, int live, float top) {
    if constexpr (LOGITS == 2) {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        int highest = NONE;
#pragma unroll 1
        for (int i = p.tid; i < live; i += THREADS) highest = max(highest, word_of(logits.of(score_of(p.chosen[i]))));
        tell_highest(p, highest);
        cluster_sync();
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
        top = logits.has_sink ? fmaxf(score_of(highest), logits.sink) : score_of(highest);
    }
    return top;
}

struct Affine { float alpha, beta, mass; };  // weights of what is left, of complete groups; and the mass of all that is left

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) < 0x7f800000u; }
__device__ __forceinline__ float size_of(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }

// Nothing is put back where no key of complete groups is left, or where that would leave float32's range.
__device__ __forceinline__ Affine weights_of_rest(const Rest& rest, const Grouped& all, int linear) {
    const int many = all.count > 0 ? all.count - rest.many : 0;
    if (many <= 0) return {0.0f, 0.0f, 0.0f};
    const float n = (float)many, total = __fsub_rn(all.total, rest.total), second = __fsub_rn(all.second, rest.second);
    const float mean = __fdiv_rn(total, n), spread = __fsub_rn(second, __fmul_rn(total, mean)), level = __fdiv_rn(rest.mass, n);
    float beta = 0.0f;
    // A share below 2^-12 is rounding.
    if (linear && spread > __fmul_rn(all.second, 0x1p-12f) && spread > 0.0f)
        beta = __fdiv_rn(__fadd_rn(rest.excess, __fmul_rn(rest.mass, __fsub_rn(all.mean, mean))), spread);
    const float alpha = __fsub_rn(level, __fmul_rn(beta, mean));
    const float most = __fadd_rn(__fmul_rn(size_of(alpha), all.most), __fmul_rn(size_of(beta), all.most_cross));
    if (finite(most)) return {alpha, beta, rest.mass};
    return finite(__fmul_rn(level, all.most)) ? Affine{level, 0.0f, rest.mass} : Affine{0.0f, 0.0f, 0.0f};
}

// A rank's weight, 0 beyond the last; the score of its key, and whether that is of a complete group.
struct Rank {
    float weight, score;
    bool counted;
    __device__ __forceinline__ Rank(const Program& p, const Logits& logits, const Grouped& all, int live, float top, int i)
        : weight(0.0f), score(0.0f), counted(false) {
        if (i >= live) return;
        score = score_of(p.chosen[i]);
        const int j = p.chosen_position[i];
        counted = j >= all.from && j < all.to;
        weight = logits.power(logits.of(score), top);
    }
    // Less what the affine weights have of it.
    __device__ __forceinline__ float less(const Affine& rest) const {
        return counted ? __fsub_rn(weight, __fadd_rn(rest.alpha, __fmul_rn(rest.beta, score))) : weight;
    }
};

// As weigh in attend.cuh, by a warp's neighbouring ranks, 32 a turn, no more than 32 turns. Returns the sum of the warp's weights,
// of which nothing is taken off.
struct Weights {
    const Program& p;
    const Logits& logits;
    const Grouped& all;
    int live, turns;
    float top;

    __device__ __forceinline__ int at(int u) const { return (p.warp * turns + u) * 32 + p.lane; }
    __device__ __forceinline__ static float sum_lanes(float x) {
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, m));
        return x;
    }
    __device__ __forceinline__ float weigh(const Affine& rest) const {
        float sum = 0.0f;
#pragma unroll 1
        for (int u = 0; u < turns; u++) {
            const Rank rank(p, logits, all, live, top, at(u));
            if (at(u) < p.span()) p.chosen[at(u)] = __float_as_int(rank.less(rest));
            const float of_lanes = sum_lanes(rank.weight);
            sum = p.lane == u ? of_lanes : sum;
        }
        return turns > 1 ? sum_lanes(sum) : sum;
    }
};

// What moments have of one value, asked for before it is needed.
struct Moment {
    float value, cross;
    __device__ __forceinline__ Moment(const Program& p, const float* line) : value(0.0f), cross(0.0f) {
        if (p.rank == 0 && p.tid < DIM_V) value = line[VALUES + p.tid], cross = line[CROSS + p.tid];
    }
};

// As write_output, with the values that the affine weights have of all keys of complete groups.
__device__ __forceinline__ void write_completed(
    const Program& p, const Logits& logits, float top, const Affine& rest, const Moment& moment, void* out) {
    Shared& s = p.s;
    const bool sinks = LOGITS > 0 && logits.has_sink;
    const int d = p.tid;
    if (d >= DIM_V) return;
    float x[CLUSTER], w[CLUSTER];
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) x[r] = s.numerators[r][d], w[r] = s.denominators[r];
    tree<CLUSTER>(x), tree<CLUSTER>(w);
    if (sinks) w[0] = __fadd_rn(w[0], logits.power(logits.sink, top));
    // Where a weight is 0 what it would be multiplied with need not be a number.
    const float value = rest.alpha == 0.0f ? 0.0f : __fmul_rn(rest.alpha, moment.value);
    const float added = __fadd_rn(value, rest.beta == 0.0f ? 0.0f : __fmul_rn(rest.beta, moment.cross));
    const float y = __fdiv_rn(__fadd_rn(__fadd_rn(x[0], 0.0f), added), __fadd_rn(w[0], rest.mass));
    store(out, (i64)p.row * DIM_V + d, sinks && !(logits.sink < __int_as_float(0x7f800000)) ? 0.0f : y);
}

static_assert(DIM_V <= THREADS && CLUSTER <= 32 && WARPS <= 32);

// As attend in attend.cuh, once all ranks were exchanged.
__device__ __forceinline__ void attend_completed(
    const Program& p, const Rows& values, const Logits& logits, const Tail& tail, const Affine& rest, int most, i64* indices,
    void* out) {
    const int live = p.live();
    const float top = highest_logit(p, logits, live, tail.top);
    const Weights weights{p, logits, tail.all, live, max(1, p.span() / (32 * WARPS)), top};
    const float sum = weights.weigh(rest);
    write_indices(p, live, most, indices);
    __syncthreads();
    sum_warp(p, values, live);
    const Moment moment(p, tail.all.line);
    if (p.lane == 0) p.s.warp_denominators[p.warp] = sum;
    __syncthreads();
    mark(p, 11);
    sum_program(p);
    cluster_sync();
    if (p.rank == 0) write_completed(p, logits, top, rest, moment, out);
}
