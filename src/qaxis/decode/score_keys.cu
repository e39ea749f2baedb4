// Canonical scores of all keys that a row sees, at the speed at which they can be read.
//
// compiler.py puts hardware.cuh, canonical.cuh and seen.cuh before this and defines, besides what is said there: GROUP (query
// heads of a key head), SUB (neighbours whose best is kept), FORCED (some keys are always kept: they have a word, but are no
// neighbourhood's best).

constexpr int HEADS = pow2(GROUP), LANES = DIM / E, COLUMNS = 32 / LANES;
constexpr int LOADS = HEADS >= 8 ? 2 : HEADS == 4 ? 4 : 8, SUMS = HEADS * LOADS;
constexpr int CHUNK = LOADS * COLUMNS, TILE = CHUNK > 32 ? CHUNK : 32;  // keys at a time
constexpr int STAGES = 16 / LOADS, LEFT = SUMS > LANES ? SUMS / LANES : 1;

// Words [rows, padded] and the best of every SUB neighbours. A warp takes TILE keys, CHUNK at a time, for all heads of a
// group. Whole blocks are written: what of them a row does not see gets NONE. The loop is not unrolled: its instructions would
// not fit into the cache that holds them.
extern "C" __global__ void __launch_bounds__(128, 3) score_keys(
    const void* q, const void* k, const int* rows, int* word, int* best, int heads, int kv_heads, int padded,
    int n, int k_eff, int sinks, int recent, int q_b, int q_h, int k_b, int k_h, int k_n) {
    const int lane = threadIdx.x % 32, part = lane % LANES, column = lane / LANES;
    const int b = blockIdx.y / kv_heads, g = blockIdx.y % kv_heads;
    const Seen seen = Seen::of<false>(rows, b, Room{n, k_eff, 0, sinks, recent});
    const int end = whole_blocks(seen.end);
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
    const char* keys = (const char*)k + (((i64)b * k_b + (i64)g * k_h) + part) * 16;
    const int bytes = k_n * 16, warps = gridDim.x * (blockDim.x / 32);
    const i64 policy = read_once();
    __shared__ uint4 ring[4][STAGES][LOADS][32];
    auto& mine_of = ring[threadIdx.x / 32];
    auto key_of = [&](int chunk) {  // the first of a chunk: those of a tile follow each other
        const int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 + chunk / (TILE / CHUNK) * warps;
        return seen.base + tile * TILE + chunk % (TILE / CHUNK) * CHUNK;
    };
    if (seen.k_eff == 0 || key_of(0) >= end) return;
    auto fetch = [&](int chunk) {
        const int j = key_of(chunk) + column;
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            request16(&mine_of[chunk % STAGES][u][lane], keys + (i64)min(j + u * COLUMNS, seen.end - 1) * bytes, policy);
        end_request();
    };
    int j = key_of(0), highest[LEFT];
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++) fetch(chunk);
#pragma unroll 1
    for (int chunk = 0; j < end; chunk++) {
        fetch(chunk + STAGES - 1);
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
        const bool opens = SUB <= CHUNK || j % SUB == 0, closes = SUB <= CHUNK || (j + CHUNK) % SUB == 0;
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
            const int h = (first + i) / LOADS, c = (first + i) % LOADS * COLUMNS + column;
            const bool ranked = (u32)(j + c - seen.start) < (u32)(seen.stop - seen.start);
            const bool sees = FORCED ? j + c >= seen.begin && j + c < seen.end : ranked;
            const int any = word_of(sum[i]), w = ranked ? any : NONE;
            if (mine && h < GROUP) word[((i64)b * heads + g * GROUP + h) * padded + j + c] = sees ? any : NONE;
            highest[i] = opens ? w : max(highest[i], w);
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
                if (mine && h < GROUP && c % SUB == 0)
                    best[(((i64)b * heads + g * GROUP + h) * padded + j + c) / SUB] = highest[i];
            }
        }
        j = key_of(chunk + 1);
    }
}
