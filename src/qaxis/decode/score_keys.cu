// Canonical scores of all keys that a row sees, at the speed at which they can be read.
//
// compiler.py puts hardware.cuh, canonical.cuh, seen.cuh and tally.cuh before this and defines, besides what is said there:
// GROUP (query heads of a key head), FORCED (some keys are always kept: they have a word, but are not counted).

constexpr int HEADS = pow2(GROUP), LANES = DIM / E, COLUMNS = 32 / LANES;
constexpr int LOADS = HEADS >= 8 ? 2 : HEADS == 4 ? 4 : 8, SUMS = HEADS * LOADS;
constexpr int CHUNK = LOADS * COLUMNS, TILE = 128, CHUNKS = TILE / CHUNK;  // keys at a time
constexpr int STAGES = 16 / LOADS, LEFT = SUMS > LANES ? SUMS / LANES : 1;

__device__ __forceinline__ float place_of(int word, float units) {
    return fminf(fmaxf(floorf(score_of(word) * units), -32768.0f), 32767.0f) + 32768.0f;
}

// Words [rows, padded], and counts of ranked keys. A warp takes a tile of keys at a time, CHUNK of them at once, for all heads
// of a group; what of the others counts it learns from its first tile. What of a tile a row does not see gets NONE. The loop is
// not unrolled: its instructions would not fit into the cache that holds them.
extern "C" __global__ void __launch_bounds__(128, 3) score_keys(
    const void* q, const void* k, const float* norm, const int* rows, int* word, float* units_of, int* tally,
    int* taken, int heads, int kv_heads, int padded, int n, int k_eff, int sinks, int recent, int q_b, int q_h, int k_b, int k_h, int k_n) {
    const int lane = threadIdx.x % 32, part = lane % LANES, column = lane / LANES;
    const int kv = blockIdx.y, b = kv / kv_heads, g = kv % kv_heads, first_row = b * heads + g * GROUP;
    const float longest = norm[kv];
    const Seen seen = Seen::of<false>(rows, b, Room{n, k_eff, 0, sinks, recent});
    const int tiles = (seen.end - seen.base + TILE - 1) / TILE, warps = gridDim.x * (blockDim.x / 32);
    // The first two tiles of a warp; the others it takes as it comes to them, as not all are equally fast.
    int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (seen.k_eff == 0 || tile >= tiles) return;
    int next = tile + warps;
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
    __shared__ uint4 ring[4][STAGES][LOADS][32];
    auto& mine_of = ring[threadIdx.x / 32];
    auto fetch = [&](int tile, int chunk) {  // chunks of tiles follow each other in the ring, as STAGES divides CHUNKS
        const int j = seen.base + tile * TILE + chunk * CHUNK + column;
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            request16(&mine_of[chunk % STAGES][u][lane], rows_of + (i64)min(j + u * COLUMNS, seen.end - 1) * bytes, policy);
        end_request();
    };
    static_assert(CHUNKS % STAGES == 0 && STAGES > 1);
    // Of this lane's sums: units, and the word from which on keys are counted; before that is known, none are.
    float units[LEFT];
    int counted[LEFT];
#pragma unroll
    for (int i = 0; i < LEFT; i++) units[i] = 0.0f, counted[i] = 0x7fffffff;
    const int needed = seen.k_eff - (seen.first - seen.begin) - (seen.end - seen.last);
    const Sample sample(needed, seen.stop - seen.start);
    auto count_first = [&]() {
        __syncwarp();
#pragma unroll 1
        for (int h = 0; h < GROUP; h++) {
            float x[E], square = 0.0f;
            load_query(q, (i64)b * q_b + (i64)(g * GROUP + h) * q_h, part, x);
#pragma unroll
            for (int e = 0; e < E; e++) square += x[e] * x[e];
#pragma unroll
            for (int m = 1; m < LANES; m *= 2) square += __shfl_xor_sync(ALL, square, m);
            const float per = units_per_score(sqrtf(square), longest);
            if (tile == 0 && lane == 0) units_of[first_row + h] = per;
            const int first_key = seen.base + tile * TILE, *own = word + (i64)(first_row + h) * padded + first_key;
            auto ranked = [&](int i) { return first_key + i >= seen.start && first_key + i < seen.stop; };
            Moments moments;
            for (int i = lane; i < TILE; i += 32)
                if (ranked(i)) moments.add(place_of(own[i], per) - 32768.0f);
            moments.gather(1);
            const float from = moments.above(sample.share);
            int* counts = tally + (i64)(first_row + h) * TALLY;
            for (int i = lane; i < TILE; i += 32)
                if (ranked(i) && sample.holds(first_key + i) && place_of(own[i], per) >= from)
                    atomicAdd(counts + (int)place_of(own[i], per) / EACH_TALLY, 1);
#pragma unroll
            for (int i = 0; i < LEFT; i++)
                if ((first + i) / LOADS == h) {
                    units[i] = per;
                    counted[i] = sample.share >= 1.0f || per == 0.0f ? NONE + 1 : word_of((from - 32768.0f) / per);
                }
        }
    };
    bool first_tile = true;
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++) fetch(tile, chunk);
    int after = 0;
#pragma unroll 1
    for (int chunk = 0; tile < tiles; chunk++) {
        if (chunk == 0) after = lane == 0 && next < tiles ? atomicAdd(taken + kv, 1) : tiles;
        const int j = seen.base + tile * TILE + chunk * CHUNK, ahead = chunk + STAGES - 1;
        fetch(ahead < CHUNKS ? tile : min(next, tiles - 1), ahead % CHUNKS);
        await<STAGES - 1>();
        uint4 now[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) now[u] = mine_of[chunk % STAGES][u][lane];
        float sum[SUMS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            float x[E];
            widen(now[u], x);
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum[h * LOADS + u] = product(query[h], x);
        }
        tree_over_lanes<SUMS, LANES, log2i(HEADS)>(sum, lane);
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            const int h = (first + i) / LOADS, c = (first + i) % LOADS * COLUMNS + column;
            const bool ranked = (u32)(j + c - seen.start) < (u32)(seen.stop - seen.start);
            const bool sees = FORCED ? j + c >= seen.begin && j + c < seen.end : ranked;
            const int w = word_of(sum[i]);
            const i64 at = (i64)(first_row + h) * padded + j + c;
            if (mine && h < GROUP) word[at] = sees ? w : NONE;
            if (mine && h < GROUP && ranked && w >= counted[i] && sample.holds(j + c))
                atomicAdd(tally + (i64)(first_row + h) * TALLY + (int)place_of(w, units[i]) / EACH_TALLY, 1);
        }
        if (chunk == CHUNKS - 1) {
            if (first_tile) count_first();
            first_tile = false, chunk = -1;
            tile = next, next = 2 * warps + __shfl_sync(ALL, after, 0);
        }
    }
}
