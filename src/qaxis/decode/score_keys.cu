// Canonical scores of all keys that a row sees, at the speed at which they can be read.
//
// cuda.py lists what compiler.py puts before this, seen.cuh and tally.cuh, and what is defined besides: GROUP (query heads of a
// key head), FORCED (some keys are always kept: they have a word, but are not counted), COMPLETED (the last program of a key head
// is that of fit.cuh).

constexpr int HEADS = pow2(GROUP), LANES = DIM / E, COLUMNS = 32 / LANES;
constexpr int LOADS = HEADS >= 8 ? 2 : HEADS == 4 ? 4 : 8, SUMS = HEADS * LOADS;
// Keys at once; of a tile, all of whose chunks are asked for before the first is done with.
constexpr int CHUNK = LOADS * COLUMNS, STAGES = 16 / LOADS, TILE = CHUNK * STAGES;
constexpr int LEFT = SUMS > LANES ? SUMS / LANES : 1;

__device__ __forceinline__ float place_of(int word, float units) {
    return fminf(fmaxf(floorf(score_of(word) * units), -32768.0f), 32767.0f) + 32768.0f;
}

// Words [rows, padded], the best of every SUB neighbours that are ranked, and counts of those. A warp takes a tile of keys at a
// time, CHUNK of them at once, for all heads of a group; what of the others counts it learns from its first tile. What of a
// tile a row does not see gets NONE. The loop is not unrolled: its instructions would not fit into the cache that holds them.
extern "C" __global__ void __launch_bounds__(128, 3) score_keys(
    const void* q, const void* k, const float* norm, const int* rows, int* word, int* best,
    float* units_of, int* tally, int heads, int kv_heads, int padded, int n, int k_eff, int sinks, int recent,
    int q_b, int q_h, int k_b, int k_h, int k_n
#if COMPLETED
    , const float* products, const float* sums, float* line, int linear, float* run_sums, double factor, double scale
#endif
) {
    let_next_begin();
    const int lane = threadIdx.x % 32, part = lane % LANES, column = lane / LANES;
    const int kv = blockIdx.y, b = kv / kv_heads, g = kv % kv_heads, first_row = b * heads + g * GROUP;
    const float longest = norm[kv];
    const Seen seen = Seen::of<false>(rows, b, Room{n, k_eff, 0, sinks, recent});
    __shared__ uint4 ring[4][STAGES][LOADS][32];
#if COMPLETED
    static_assert(sizeof(FitSpace) <= sizeof(ring));
    if (blockIdx.x == gridDim.x - 1) {
        const i64 q_of = (i64)b * q_b + (i64)(g * GROUP) * q_h;
        return fit(q, q_of, q_h, products, sums, kv, line, first_row, Whole(seen).keys(), linear, *(FitSpace*)ring);
    }
#endif
    const int tiles = (seen.end - seen.base + TILE - 1) / TILE, warps = (gridDim.x - COMPLETED) * (blockDim.x / 32);
    int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (seen.k_eff == 0 || tile >= tiles) return;
    // Heads lie in the slots where tree_over_lanes wants them; loads do not, so that the lanes of a key read one row.
    const int first = first_sum<SUMS, LANES>(lane), first_head = first / LOADS;
    const bool mine = writes_sum<SUMS, LANES>(lane);
    float query[HEADS][E];
#pragma unroll
    for (int slot = 0; slot < HEADS; slot++) {
#pragma unroll
        for (int e = 0; e < E; e++) query[slot][e] = 0.0f;
        const int h = slot ^ first_head;
        if (h < GROUP) load_query(q, (i64)b * q_b + (i64)(g * GROUP + h) * q_h, part, query[slot]);
    }
    const char* rows_of = (const char*)k + (((i64)b * k_b + (i64)g * k_h) + part) * 16;
    const int bytes = k_n * 16;
    const i64 policy = read_once();
    auto& mine_of = ring[threadIdx.x / 32];
    auto fetch = [&](int from, int stage) {
        const int j = from + column;
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            request16(&mine_of[stage][u][lane], rows_of + (i64)min(j + u * COLUMNS, seen.end - 1) * bytes, policy);
        end_request();
    };
    // Of this lane's sums: units, and the word from which on keys are counted; before that is known, none are.
    float units[LEFT], square[SUMS];
    int counted[LEFT];
#pragma unroll
    for (int slot = 0; slot < HEADS; slot++) {
        float all = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) all += query[slot][e] * query[slot][e];
#pragma unroll
        for (int u = 0; u < LOADS; u++) square[slot * LOADS + u] = all;
    }
    tree_over_lanes<SUMS, LANES, log2i(HEADS)>(square, lane);
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
        const int h = (first + i) / LOADS;
        units[i] = units_per_score(sqrtf(square[i]), longest), counted[i] = 0x7fffffff;
        if (tile == 0 && mine && h < GROUP) units_of[first_row + h] = units[i];
    }
    const int needed = seen.k_eff - (seen.first - seen.begin) - (seen.end - seen.last);
    const Sample sample(needed, seen.stop - seen.start);
    Moments moments[LEFT];
    // Of key j + c, its own place among the sums.
    auto count = [&](int i, int key, int w) {
        const int h = (first + i) / LOADS;
        const bool ranked = (u32)(key - seen.start) < (u32)(seen.stop - seen.start);
        if (mine && h < GROUP && ranked && w >= counted[i] && sample.holds(key))
            atomicAdd(tally + (i64)(first_row + h) * TALLY + (int)place_of(w, units[i]) / EACH_TALLY, 1);
    };
    // Once a tile is done with: what of it counts.
    auto count_first = [&](int from) {
        constexpr int SPAN = LEFT < LOADS ? LEFT : LOADS;  // sums of one head
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            if (i % SPAN == 0) {
#pragma unroll
                for (int o = 1; o < SPAN; o++) moments[i].add(moments[i + o]);
                moments[i].gather(HEADS < LANES ? HEADS : LANES);
            }
            const float least = moments[i / SPAN * SPAN].above(sample.share) - 32768.0f;
            counted[i] = sample.share >= 1.0f || units[i] == 0.0f ? NONE + 1 : word_of(least / units[i]);
        }
#pragma unroll 1
        for (int chunk = 0; chunk < STAGES; chunk++)
#pragma unroll
            for (int i = 0; i < LEFT; i++) {
                const int h = (first + i) / LOADS, key = from + chunk * CHUNK + (first + i) % LOADS * COLUMNS + column;
                if (mine && h < GROUP) count(i, key, word[(i64)(first_row + h) * padded + key]);
            }
    };
#if COMPLETED
    // Of the run that is being read, this lane's words by chunks; sums of it, once its best is known, a tree over its keys' bits as
    // for the best. Of a run with other keys than ranked ones these are no sums: nobody reads them.
    constexpr int RUN_CHUNKS = SUB > CHUNK ? SUB / CHUNK : 1;
    int held[RUN_CHUNKS][LEFT];
    const float per = (float)factor * (-1.0f / 256.0f);
    auto sum_runs = [&](int j, const int (&highest)[LEFT]) {
        float mass[RUN_CHUNKS][LEFT], excess[RUN_CHUNKS][LEFT];
#pragma unroll
        for (int k = 0; k < RUN_CHUNKS; k++) {
#pragma unroll
            for (int i = 0; i < LEFT; i++) {
                const float best = score_of(highest[i]), score = score_of(held[k][i]), away = __fsub_rn(score, best);
                mass[k][i] = plain_power(score, away, plain_logit(best, (float)scale), (float)scale, per);
                excess[k][i] = __fmul_rn(mass[k][i], away);
            }
#pragma unroll
            for (int bit = 0; (1 << bit) < SUB && (1 << bit) < CHUNK; bit++) {
                const int low = bit - log2i(COLUMNS), s = log2i(SUMS) - 1 - low;
                float other[2][LEFT];
#pragma unroll
                for (int i = 0; i < LEFT; i++) {
                    if (bit >= log2i(COLUMNS) && low < log2i(LEFT)) {
                        other[0][i] = mass[k][i ^ (1 << low)], other[1][i] = excess[k][i ^ (1 << low)];
                    } else {
                        const int m = bit < log2i(COLUMNS) ? LANES << bit : 1 << s;
                        other[0][i] = __shfl_xor_sync(ALL, mass[k][i], m), other[1][i] = __shfl_xor_sync(ALL, excess[k][i], m);
                    }
                }
#pragma unroll
                for (int i = 0; i < LEFT; i++)
                    mass[k][i] = __fadd_rn(mass[k][i], other[0][i]), excess[k][i] = __fadd_rn(excess[k][i], other[1][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            const int h = (first + i) / LOADS, c = (first + i) % LOADS * COLUMNS + column;
            float all[2][RUN_CHUNKS];
#pragma unroll
            for (int k = 0; k < RUN_CHUNKS; k++) all[0][k] = mass[k][i], all[1][k] = excess[k][i];
            tree<RUN_CHUNKS>(all[0]), tree<RUN_CHUNKS>(all[1]);
            if (mine && h < GROUP && c % SUB == 0)
                *(uint2*)(run_sums + ((i64)(first_row + h) * padded + j + c) / SUB * 2) =
                    make_uint2(__float_as_uint(all[0][0]), __float_as_uint(all[1][0]));
        }
    };
#endif
    bool first_tile = true;
    int ahead = seen.base + tile * TILE, highest[LEFT];
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++, ahead += CHUNK) fetch(ahead, chunk);
#pragma unroll 1
    for (int chunk = 0; tile < tiles; chunk++, ahead += CHUNK) {
        if (chunk == 1) ahead = seen.base + min(tile + warps, tiles - 1) * TILE;
        const int j = seen.base + tile * TILE + chunk * CHUNK;
        fetch(ahead, (chunk + STAGES - 1) % STAGES);
        await<STAGES - 1>();
        uint4 now[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) now[u] = mine_of[chunk][u][lane];
        float sum[SUMS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            float x[E];
            widen(now[u], x);
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum[h * LOADS + u] = product(query[h], x);
        }
        tree_over_lanes<SUMS, LANES, log2i(HEADS)>(sum, lane);
        const bool opens = SUB <= CHUNK || j % SUB == 0, closes = SUB <= CHUNK || (j + CHUNK) % SUB == 0;
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            const int h = (first + i) / LOADS, c = (first + i) % LOADS * COLUMNS + column;
            const bool ranked = (u32)(j + c - seen.start) < (u32)(seen.stop - seen.start);
            const bool sees = FORCED ? j + c >= seen.begin && j + c < seen.end : ranked;
            const int any = word_of(sum[i]), w = ranked ? any : NONE;
            if (mine && h < GROUP) word[(i64)(first_row + h) * padded + j + c] = sees ? any : NONE;
            if (w >= counted[i]) count(i, j + c, w);
            if (first_tile && ranked) moments[i].add(sum[i] * units[i]);
            highest[i] = opens ? w : max(highest[i], w);
#if COMPLETED
#pragma unroll
            for (int k = 0; k < RUN_CHUNKS - 1; k++) held[k][i] = held[k + 1][i];
            held[RUN_CHUNKS - 1][i] = any;
#endif
        }
        if (closes) {
            // A key's number is its load's, then its place in the load: bits that lie in the lane or in `first`.
#pragma unroll
            for (int bit = 0; (1 << bit) < SUB && (1 << bit) < CHUNK; bit++) {
                const int low = bit - log2i(COLUMNS), s = log2i(SUMS) - 1 - low;
                int other[LEFT];
#pragma unroll
                for (int i = 0; i < LEFT; i++) {
                    if (bit < log2i(COLUMNS)) other[i] = __shfl_xor_sync(ALL, highest[i], LANES << bit);
                    else if (low < log2i(LEFT)) other[i] = highest[i ^ (1 << low)];
                    else other[i] = __shfl_xor_sync(ALL, highest[i], 1 << s);
                }
#pragma unroll
                for (int i = 0; i < LEFT; i++) highest[i] = max(highest[i], other[i]);
            }
#pragma unroll
            for (int i = 0; i < LEFT; i++) {
                const int h = (first + i) / LOADS, c = (first + i) % LOADS * COLUMNS + column;
                if (mine && h < GROUP && c % SUB == 0) best[((i64)(first_row + h) * padded + j + c) / SUB] = highest[i];
            }
#if COMPLETED
            if constexpr (SUMMED) sum_runs(j, highest);
#endif
        }
        if (chunk == STAGES - 1) {
            if (first_tile) count_first(j - chunk * CHUNK);
            first_tile = false, chunk = -1;
            tile += warps;
        }
    }
}
