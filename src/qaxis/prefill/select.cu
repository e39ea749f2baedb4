// Which keys every query of a prefill selects, from 16-bit scores: one warp a row, whose scores stay in registers.
//
// A row is one query of one head. If at least k scores reach `found`, the k-th canonical score is at most one error below
// it, and a key more than two errors below is out. If at most k reach `behind`, a key two errors above it is in. The few
// between, the band, are put in their canonical order. A band that does not fit is left to prefill_wide_band_kernel.
//
// native/compiler.py puts common.cuh before this and defines, besides what is said there: CHUNKS (of 256 keys), CAPACITY.

constexpr int LANES = DIM / E, COLUMNS = 32 / LANES, SLACK = 16, WARPS = 4, DEEP = 4;

extern "C" __global__ void __launch_bounds__(32 * WARPS, CHUNKS > 16 ? 3 : 4) select_rows(
    const void* q, const void* k, const float* norm, const u16* fast, const int* budget, const float* quantile,
    const float* slope, u32* bits, int* band_count, int* missing_count, int* low_score, int* high_score, int* top,
    int heads, int group, int start, int chunk, int first, int n, int padded, int rows, int error, int causal,
    int q_b, int q_h, int q_m, int k_b, int k_h, int k_n) {
    __shared__ u32 selected[WARPS][CHUNKS * 8];
    __shared__ int position[WARPS][CAPACITY], value[WARPS][CAPACITY], listed[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * WARPS + warp;
    if (row >= rows) return;
    const int i = row % chunk, b = row / chunk / heads, h = row / chunk % heads, part = lane % LANES;
    const int seen = causal ? min(first + i + 1, n) : n, wanted = min(budget[seen], seen), chunks = (seen + 255) / 256;

    // Scores in 15 bits, two in a word, with the highest bit of each set: subtracting t leaves it set where score >= t.
    uint4 score[CHUNKS];
    const uint4* from = (const uint4*)(fast + (i64)row * padded) + lane;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) score[c] = c < chunks ? from[c * 32] : make_uint4(0, 0, 0, 0);
    float query[E];
    load_query(q, ((i64)b * q_b + (i64)h * q_h + (i64)(start + i) * q_m) * E, part, query);
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) square += query[e] * query[e];
#pragma unroll
    for (int m = 1; m < LANES; m *= 2) square += __shfl_xor_sync(ALL, square, m);
    // A little narrower than for the scores: where these are not usable, neither may be taken to be here.
    const float largest = sqrtf(square) * norm[b * (heads / group) + h / group] * 1.001f;
    const bool usable = largest > SMALLEST * 1.01f && largest < LARGEST / 1.01f, everything = wanted >= seen;
    u32 most = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        u32* word = (u32*)&score[c];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const int left = seen - (c * 256 + lane * 8 + 2 * p);  // of these two, how many are seen
            u32 w = (word[p] >> 1) & 0x7fff7fffu;
            if ((c + 1) * 256 > seen) w &= left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u;
            most = max(most, max(w & 0xffffu, w >> 16));
            word[p] = w | 0x80008000u;
        }
    }
    auto reach = [&](int t) {  // how many scores do
        const u32 both = (u32)t * 0x10001u;
        u32 count = 0;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (c < chunks) {
                const u32* word = (const u32*)&score[c];
#pragma unroll
                for (int p = 0; p < 4; p++) count += (word[p] - both) >> 15 & 0x10001u;
            }
        return __reduce_add_sync(ALL, (int)((count & 0xffff) + (count >> 16)));
    };

    int found = 0, behind = 32768, at_least = seen, beyond = 0;
    if (!everything && usable) {
        // Start where the k best would begin if the mean and spread of every eighth score told all.
        float sum = 0.0f, squares = 0.0f, many = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            if (c * 256 + lane * 8 < seen) {
                const float x = (float)(int)(score[c].x & 0x7fff) - 16384.0f;
                sum += x, squares += x * x, many += 1.0f;
            }
#pragma unroll
        for (int m = 1; m < 32; m *= 2) {
            sum += __shfl_xor_sync(ALL, sum, m);
            squares += __shfl_xor_sync(ALL, squares, m);
            many += __shfl_xor_sync(ALL, many, m);
        }
        const float mean = sum / many, spread = sqrtf(fmaxf(squares / many - mean * mean, 0.0f));
        float guess = mean + 16384.0f + quantile[seen] * spread;
        const float step = slope[seen] * spread;
        for (int tries = 0; behind - found > 1 && at_least - beyond > SLACK; tries++) {
            const int trial = min(max((int)fminf(fmaxf(guess, 0.0f), 32767.0f), found + 1), behind - 1);
            const int enough = reach(trial);
            if (enough >= wanted) at_least = enough, found = trial;
            if (enough <= wanted) beyond = enough, behind = trial;
            // Now at the other side of the k-th, a quarter of the slack away: by the slope of a normal density, then
            // between the two ends, at last by halving.
            const float aim = wanted + (enough >= wanted ? -SLACK / 4 : SLACK / 4);
            if (tries < 3 || (tries < 8 && (found == 0 || behind == 32768))) guess = trial + (enough - aim) * step;
            else if (tries < 8) guess = found + (behind - found) * ((at_least - aim) / (float)(at_least - beyond));
            else guess = (found + behind) / 2;
        }
    }
    const int low = usable ? max(found - (error + 1) / 2, 0) : 0, high = usable ? min(behind + (error + 1) / 2, 32768) : 32768;

    if (lane == 0) listed[warp] = 0;
    __syncwarp();
    int sure = 0;
    const u32 lows = (u32)low * 0x10001u, highs = (u32)high * 0x10001u;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const u32* word = (const u32*)&score[c];
        u32 in = 0, near = 0;
        const int left = seen - (c * 256 + lane * 8);
        const u32 here = left >= 8 ? 255u : left > 0 ? (1u << left) - 1 : 0u;
        if (c < chunks) {
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const u32 above = word[p] - highs, between = (word[p] - lows) & ~above;
                in |= ((above >> 15 & 1) | (above >> 30 & 2)) << (2 * p);
                near |= ((between >> 15 & 1) | (between >> 30 & 2)) << (2 * p);
            }
            in = everything ? here : in & here, near = everything ? 0 : near & here;
        }
        ((unsigned char*)selected[warp])[c * 32 + lane] = (unsigned char)in;
        sure += __popc(in);
        while (near) {
            const int at = atomicAdd(&listed[warp], 1), j = c * 256 + lane * 8 + __ffs(near) - 1;
            near &= near - 1;
            if (at < CAPACITY) position[warp][at] = j;
        }
    }
    sure = __reduce_add_sync(ALL, sure);
    most = __reduce_max_sync(ALL, most);
    __syncwarp();
    const int band = listed[warp], missing = wanted - sure;
    if (missing > 0 && band <= CAPACITY) {
        const char* keys = (const char*)k + (((i64)b * k_b + (i64)(h / group) * k_h) + part) * 16;
        const int mine = first_sum<DEEP, LANES>(lane);
        for (int at = lane / LANES * DEEP; at - lane / LANES * DEEP < band; at += COLUMNS * DEEP) {
            float total[DEEP];
            uint4 raw[DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) raw[u] = load16(keys + (i64)position[warp][min(at + u, band - 1)] * k_n * 16);
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                float x[E];
                widen(raw[u], x);
#pragma unroll
                for (int e = 0; e < E; e++) x[e] = __fmul_rn(query[e], x[e]);
                tree<E>(x);
                total[u] = x[0];
            }
            tree_over_lanes<DEEP, LANES>(total, lane);
#pragma unroll
            for (int u = 0; u < (DEEP > LANES ? DEEP / LANES : 1); u++)
                if (writes_sum<DEEP, LANES>(lane) && at + mine + u < band) value[warp][at + mine + u] = word_of(total[u]);
        }
        __syncwarp();
        for (int at = lane; at < band; at += 32) {
            const int w = value[warp][at], j = position[warp][at];
            int better = 0;
            for (int other = 0; other < band; other++)
                better += value[warp][other] > w || (value[warp][other] == w && position[warp][other] < j);
            if (better < missing) atomicOr(&selected[warp][j / 32], 1u << (j % 32));
        }
        __syncwarp();
    }
    for (int w = lane; w < CHUNKS * 8; w += 32) bits[(i64)row * (CHUNKS * 8) + w] = selected[warp][w];
    if (lane == 0) {
        band_count[row] = band, missing_count[row] = missing, low_score[row] = 2 * low, high_score[row] = 2 * high;
        top[row] = 2 * (int)most + 1;
    }
}
