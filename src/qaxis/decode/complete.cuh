// What is left out, put back (attention/completion.py). cuda.py puts it behind attend.cuh where outputs are completed.
//
// First what scores alone tell: sums over the chosen keys, by ranks, and over those that are left, by runs. For the latter every
// program walks its own blocks, a warp a block, a lane a run of 16 keys; the bitmap says which of them are left. All sums go to
// every program of the cluster, which adds those of blocks by their absolute number: zeros stand for blocks before `base`. Then the
// weights of chosen keys are known, less what the moments have of them, and values are summed as ever.
// Instructions count: each of a row's keys comes by. So a run's best score is the one that the score kernels kept, and what
// differs between keys is a mask, no branch.

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
    __device__ __forceinline__ float of_place(u32 place) const { return ::of_place(place, unit, half); }
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
        return best_of(key);
    }
    __device__ __forceinline__ float best_of(int key) const {
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

// What a run of `left` keys adds to the masses and excesses of all, of its own.
struct Weighing {
    float per, mean, top;
    __device__ __forceinline__ Sums2 of(const Sums2& run, float best, float highest) const {
        const float weight = power_below(__fsub_rn(fminf(highest, top), top), per);
        return {__fmul_rn(weight, run.mass), __fmul_rn(weight, __fadd_rn(run.excess, __fmul_rn(run.mass, __fsub_rn(best, mean))))};
    }
};

__device__ __forceinline__ Sums2 sum_run(
    const Logits& logits, const float (&s)[SUB], float best, u32 left, const Weighing& weighing) {
    const float highest = logits.of(best);
    // A rounded cap is not monotone: a key may be above the best.
    const Sums2 run = sums_of_run([&](int e) { return s[e]; }, best, left, [&](float score, float away) {
        if constexpr (LOGITS == 2) return logits.power(logits.of(score), highest);
        else return plain_power(score, away, highest, logits.scale, weighing.per);
    });
    return left ? weighing.of(run, best, highest) : Sums2{0.0f, 0.0f};
}

// Winners at the edge get their bits too, once all chosen keys were sent to their ranks.
__device__ __forceinline__ void mark_winners(const Program& p) {
#pragma unroll 1
    for (int i = p.tid; i < p.s.winners; i += THREADS) {
        const int j = p.s.winner[i];
        if (p.owns(j)) atomicOr(p.bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
    }
}

// Sums of own runs, each block's told to all programs. Runs that the score kernels have no sums of, or that have a chosen key, are
// summed first, a thread each; they are listed so that no thread has none. `sums` are of the row, mass and excess of a run; of the
// listed ones they get what these add.
struct Left {
    const Program& p;
    const Known& known;
    float* sums;
    int* told;  // of all blocks
    u16* list;  // of own runs, from the first of some blocks on
    int each;   // blocks of which it has room for all runs

    __device__ __forceinline__ int key_of(int run) const {
        return ((run / 32) * CLUSTER + p.rank) * BLOCK + run % 32 * SUB;
    }
    __device__ __forceinline__ u32 taken(int run) const { return ((const u16*)p.bitmap)[run]; }
    __device__ __forceinline__ bool is_listed(int run) const {
        const int key = key_of(run);
        return !(SUMMED && known.whole(key) && taken(run) == 0) && key < p.end && key + SUB > p.begin;
    }
    __device__ __forceinline__ void make_list(int first, int runs) const {
        constexpr int DEEP = 4;
#pragma unroll 1
        for (int from = p.warp * 32; from < runs; from += THREADS * DEEP) {
            u32 listed[DEEP];
            int many = 0;
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                const int i = from + u * THREADS + p.lane;
                listed[u] = __ballot_sync(ALL, i < runs && is_listed(first * 32 + i));
                many += __popc(listed[u]);
            }
            int at = 0;
            if (p.lane == 0 && many > 0) at = atomicAdd(&p.s.runs, many);
            at = __shfl_sync(ALL, at, 0);
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                if (listed[u] >> p.lane & 1)
                    list[at + __popc(listed[u] & ((1u << p.lane) - 1))] = (u16)(from + u * THREADS + p.lane);
                at += __popc(listed[u]);
            }
        }
    }
    __device__ __forceinline__ void sum_listed(const Logits& logits, int run, const Weighing& weighing) const {
        const int key = key_of(run);
        u32 visible = 0xffff;
        float s[SUB], best;
        if (known.whole(key)) best = known.read(key, s);
        else visible = between(key, p.begin, p.end), best = known.read_any(key, visible, s);
        const Sums2 sum = sum_run(logits, s, best, visible & ~taken(run), weighing);
        float* const to = sums + key / SUB * 2;
        to[0] = sum.mass, to[1] = sum.excess;
    }
    // DEEP blocks of a warp at a time: of each two sums, which its lanes share out.
    __device__ __forceinline__ void tell_blocks(const Logits& logits, int first, int count, const Weighing& weighing) const {
        constexpr int DEEP = 4;
        const int mine = first_sum<2 * DEEP, 32>(p.lane);
        const bool writes = writes_sum<2 * DEEP, 32>(p.lane);
#pragma unroll 1
        for (int from = p.warp; from < count; from += WARPS * DEEP) {
            float sum[2 * DEEP], best[DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                const int i = from + u * WARPS, key = key_of((first + i) * 32 + p.lane);
                sum[2 * u] = sum[2 * u + 1] = best[u] = 0.0f;
                if (i < count && key < p.end && key + SUB > p.begin) {
                    const uint2 two = *(const uint2*)(sums + key / SUB * 2);
                    sum[2 * u] = __uint_as_float(two.x), sum[2 * u + 1] = __uint_as_float(two.y);
                    if constexpr (SUMMED) best[u] = known.best_of(key);
                }
            }
            if constexpr (SUMMED)
#pragma unroll
                for (int u = 0; u < DEEP; u++) {
                    const int i = from + u * WARPS, run = (first + i) * 32 + p.lane;
                    const Sums2 all = weighing.of({sum[2 * u], sum[2 * u + 1]}, best[u], logits.of(best[u]));
                    if (i < count && known.whole(key_of(run)) && taken(run) == 0) sum[2 * u] = all.mass, sum[2 * u + 1] = all.excess;
                }
            tree_over_lanes<2 * DEEP, 32>(sum, p.lane);
            const int i = from + mine / 2 * WARPS, block = (first + i) * CLUSTER + p.rank;
            if (writes && i < count && block < p.blocks)
#pragma unroll
                for (int r = 0; r < CLUSTER; r++) push(told + 2 * block + mine % 2, r, __float_as_int(sum[0]));
        }
    }
    // Runs of own keys that were chosen at the edge.
    __device__ __forceinline__ void list_winners() const {
#pragma unroll 1
        for (int i = p.tid; i < p.s.winners; i += THREADS) {
            const int j = p.s.winner[i];
            if (p.owns(j)) list[atomicAdd(&p.s.runs, 1)] = (u16)(p.own_block(j) * 32 + j % BLOCK / SUB);
        }
    }
    // Once all threads have listed.
    __device__ __forceinline__ void sum_list(const Logits& logits, int first, const Weighing& weighing) const {
        const int listed = p.s.runs;
#pragma unroll 1
        for (int i = p.tid; i < listed; i += THREADS) sum_listed(logits, first * 32 + list[i], weighing);
    }
    // p.s.runs is 0 before. But for winners: the others were listed, and summed.
    __device__ __forceinline__ void sum(const Logits& logits, const Weighing& weighing, bool but_for_winners) const {
#pragma unroll 1
        for (int first = 0; first < p.own; first += each) {
            const int count = min(each, p.own - first);
            if (first > 0) {
                __syncthreads();
                if (p.tid == 0) p.s.runs = 0;
                __syncthreads();
            }
            if (but_for_winners) list_winners();
            else make_list(first, count * 32);
            __syncthreads();
            sum_list(logits, first, weighing);
            __syncthreads();
            tell_blocks(logits, first, count, weighing);
        }
    }
};

struct Rest { float mass, excess; };

// Of all blocks, once the cluster has waited: 32 blocks or sums a warp, level by level.
__device__ __forceinline__ Rest sum_blocks(const Program& p, int* from, int* to) {
    int first = p.base / BLOCK, count = p.blocks;
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
};

// Those of this program, told to all: in near_word, which nobody reads any more, 4 numbers a program. A warp takes neighbouring
// ranks, 32 a turn, no more than 32 turns. Returns this thread's last rank: if there is one turn, that of its number.
__device__ __forceinline__ Rank sum_picked(const Program& p, const Logits& logits, const Whole& whole, int live, float top) {
    const int turns = max(1, p.span() / (32 * WARPS));
    float sum[3] = {};
    int many = 0, u = 0;
    Rank rank(p, logits, whole, live, top, p.warp * turns * 32 + p.lane);
#pragma unroll 1
    while (true) {
        float x[3] = {rank.weight, rank.counted ? rank.score : 0.0f, rank.counted ? __fmul_rn(rank.score, rank.score) : 0.0f};
        sum_lanes(x);
        many += __popc(__ballot_sync(ALL, rank.counted));
#pragma unroll
        for (int e = 0; e < 3; e++) sum[e] = p.lane == u ? x[e] : sum[e];
        if (++u == turns) break;
        rank = Rank(p, logits, whole, live, top, (p.warp * turns + u) * 32 + p.lane);
    }
    if (turns > 1) sum_lanes(sum);
    int* const sums = (int*)&p.s.warp_numerators[0][0];
    if (p.lane == 0) {
#pragma unroll
        for (int e = 0; e < 3; e++) sums[4 * p.warp + e] = __float_as_int(sum[e]);
        sums[4 * p.warp + 3] = many;
    }
    __syncthreads();
    if (p.warp > 0) return rank;
#pragma unroll
    for (int e = 0; e < 3; e++) sum[e] = p.lane < WARPS ? __int_as_float(sums[4 * p.lane + e]) : 0.0f;
    many = __reduce_add_sync(ALL, p.lane < WARPS ? sums[4 * p.lane + 3] : 0);
    sum_lanes(sum);
    const int told[4] = {__float_as_int(sum[0]), __float_as_int(sum[1]), __float_as_int(sum[2]), many};
    if (p.lane < CLUSTER)
#pragma unroll
        for (int e = 0; e < 4; e++) push(p.s.near_word + 4 * p.rank + e, p.lane, told[e]);
    return rank;
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

// As weigh in attend.cuh, less what the affine weights have of a key of complete groups. Given this thread's rank, if it has one.
__device__ __forceinline__ void weigh_less(
    const Program& p, const Logits& logits, const Whole& whole, const Affine& rest, int live, float top, const Rank& own) {
    auto weigh = [&](const Rank& rank, int i) {
        const float less = __fsub_rn(rank.weight, __fadd_rn(rest.alpha, __fmul_rn(rest.beta, rank.score)));
        p.chosen[i] = __float_as_int(rank.counted ? less : rank.weight);
    };
    if (p.span() <= THREADS) {
        if (p.tid < p.span()) weigh(own, p.tid);
        return;
    }
#pragma unroll 1
    for (int i = p.tid; i < p.span(); i += THREADS) weigh(Rank(p, logits, whole, live, top, i), i);
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

// A completed row. What is left is summed while other programs come to a barrier, where the highest logit is known and there is room
// for the sums in what nobody reads any more.
struct Completion {
    const Program& p;
    const Logits& logits;
    const Known known;
    const Whole whole;
    const float* line;
    int linear;
    float* sums;
    bool early, begun;

    __device__ __forceinline__ Completion(
        const Program& p, const Logits& logits, const Known& known, const Whole& whole, const float* line, int linear, float* sums)
        : p(p), logits(logits), known(known), whole(whole), line(line), linear(linear), sums(sums),
          early(LOGITS < 2 && 2 * p.blocks <= TALLY), begun(false) {}
    __device__ __forceinline__ float mean() const {
        return whole.keys() > 0 ? __fdiv_rn(line[0], (float)whole.keys()) : 0.0f;
    }
    __device__ __forceinline__ Weighing weighing(float top) const { return {logits.factor * (-1.0f / 256.0f), mean(), top}; }
    // All but those at the edge have their bits. Others may be ahead, and send what they chose, so the list has room where sums of
    // warps will be, which nobody else writes.
    __device__ __forceinline__ void begin(int highest) {
        if constexpr (LOGITS < 2) {
            begun = early && whole.keys() > 0 && p.own * 32 <= 2 * WARPS * DIM_V;
            if (!begun) return;
            if (p.tid == 0) p.s.runs = 0;
            __syncthreads();
            const Left left{p, known, sums, nullptr, (u16*)&p.s.warp_numerators[0][0], p.own};
            left.make_list(0, p.own * 32);
            __syncthreads();
            left.sum_list(logits, 0, weighing(highest_logit(p, logits, 0, highest)));
        }
    }
    // As attend in attend.cuh, from the barrier on at which this program has arrived.
    __device__ __forceinline__ void attend(const Rows& values, int highest, int most, i64* indices, void* out) const {
        Shared& s = p.s;
        const int live = p.live(), count = whole.keys();
        __syncthreads();
        mark_winners(p);
        if (p.tid == 0) s.runs = 0;
        if (!early) cluster_wait();
        const float top = highest_logit(p, logits, live, highest);
        __syncthreads();
        // Room for own runs, 2 bytes each, is where candidates were; there is some for those of 128 blocks where counts were.
        int *const told = early ? s.counts : p.position, *const other = early ? p.position : s.counts;
        if (count > 0) {
            const Left left{p, known, sums, told, (u16*)other, early ? p.own : TALLY * 2 / 32};
            left.sum(logits, weighing(top), begun);
        }
        if (early) cluster_wait();
        mark(p, 10);
        const Rank own = sum_picked(p, logits, whole, live, top);
        cluster_sync();
        const Picked picked = picked_of(p);
        Affine rest = {0.0f, 0.0f, 0.0f};
        if (count > 0) rest = weights_of_rest(sum_blocks(p, told, other), picked, count, line, mean(), linear);
        weigh_less(p, logits, whole, rest, live, top, own);
        // Not before: a barrier waits for what was written.
        write_indices(p, live, most, indices);
        __syncthreads();
        sum_warp(p, values, live);
        __syncthreads();
        mark(p, 11);
        sum_program(p);
        cluster_sync();
        if (p.rank == 0) write_completed(p, logits, top, rest, picked.weight, line, out);
    }
};
