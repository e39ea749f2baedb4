// Which keys every query of a prefill selects, from 15-bit scores: one warp a row, whose scores stay in shared memory.
//
// A row is one query of one head. If at least k scores reach `found`, the k-th canonical score is at most one error below
// it, and a key more than two errors below is out. If at most k reach `behind`, a key two errors above it is in. The few
// between are listed; their own k-th score tells which of them, the band, have to be put in their canonical order. A list
// that does not fit is left to prefill_wide_band_kernel.
//
// Loops are rolled: unrolled over scores in registers, this was held by the instruction cache.
//
// cuda/compiler.py puts canonical.cuh before this and defines, besides what is said there: GROUP (query heads of a key head),
// CAPACITY (of the list), SLACK (scores between the two sides that are few enough to list), WARPS.

constexpr int LANES = DIM / E, COLUMNS = 32 / LANES, DEEP = 4, EACH = CAPACITY / 32;
constexpr int TOP = 32768, ZERO = 16384;  // behind every score, which are from 34 to 32734; the score 0. 0 is none.
static_assert(CAPACITY <= 128);

// What is known of the place between the k-th score and the next: at_least scores reach `found`, `beyond` reach `behind`.
struct Cut {
    int found, behind, at_least, beyond;
    __device__ void take(int trial, int reached, int wanted) {
        if (reached >= wanted && trial > found) found = trial, at_least = reached;
        if (reached <= wanted && trial < behind) behind = trial, beyond = reached;
    }
    __device__ bool two_sided() const { return found > 0 && behind < TOP; }
    __device__ float steps_a_key() const { return __fdividef(behind - found, max(at_least - beyond, 1)); }
};

// Added to the scores in both halves of a word it leaves more than 0 where the score reaches t, of 1 .. TOP.
__device__ __forceinline__ u32 minus(int t) { return (u32)((1 - t) & 0xffff) * 0x10001u; }
__device__ __forceinline__ u32 reached(u32 scores, u32 minus_t) { return __viaddmin_s16x2_relu(scores, minus_t, 0x10001u); }

extern "C" __global__ void __launch_bounds__(32 * WARPS) select_rows(
    const void* q, const void* k, const float* norm, const u16* fast, const int* budget, const float* quantile,
    const float* slope, u32* bits, int* band_count, int* missing_count, int* low_score, int* high_score, int* top,
    int heads, int start, int chunk, int first, int n, int padded, int error, int causal, int room,
    int q_b, int q_h, int q_m, int k_b, int k_h, int k_n) {
    DYNAMIC_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * WARPS + warp, part = lane % LANES;
    if (i >= chunk) return;
    const int head = blockIdx.y, b = head / heads, h = head % heads, row = head * chunk + i;
    // Of room times 1024 keys: two bytes and a bit each. Positions of the list; the band's scores take the place of all scores.
    uint4* score = (uint4*)(memory + warp * (room * 2176 + CAPACITY * 4 + 16));
    u32* selected = (u32*)(score + room * 128);
    int *position = (int*)(selected + room * 32), *value = (int*)score, *listed = position + CAPACITY;

    const int seen = causal ? min(first + i + 1, n) : n, chunks = (seen + 255) / 256, groups = (seen + 1023) / 1024;
    const int wanted = min(budget[seen], seen);
    const float normal = quantile[seen], key = slope[seen];
    const uint4* from = (const uint4*)(fast + (i64)row * padded) + lane;
    const i64 policy = read_once();
    uint4* to = score + lane;
    int asked = 0;
#pragma unroll 1
    for (; asked + 4 <= chunks; asked += 4, from += 128, to += 128)
#pragma unroll
        for (int u = 0; u < 4; u++) request16(to + u * 32, from + u * 32, policy);
#pragma unroll 1
    for (; asked < groups * 4; asked++, from += 32, to += 32)
        if (asked < chunks) request16(to, from, policy);
        else *to = make_uint4(0, 0, 0, 0);
    end_request();
    float query[E];
    load_query(q, ((i64)b * q_b + (i64)h * q_h + (i64)(start + i) * q_m) * E, part, query);
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) square += query[e] * query[e];
#pragma unroll
    for (int m = 1; m < LANES; m *= 2) square += __shfl_xor_sync(ALL, square, m);
    // A little narrower than for the scores: where these are not usable, neither may be taken to be here.
    const float largest = sqrtf(square) * norm[head / GROUP] * 1.001f;
    const bool usable = largest > SMALLEST * 1.01f && largest < LARGEST / 1.01f, everything = wanted >= seen;

    // A lane reads nothing but what it asked for; the last scores are of keys that are not seen.
    await<0>();
    if (!usable)
        for (int c = 0; c < chunks; c++) score[c * 32 + lane] = make_uint4(ZERO * 0x10001, ZERO * 0x10001, ZERO * 0x10001, ZERO * 0x10001);
    const int left = seen - (chunks - 1) * 256 - lane * 8;
    u32* last = (u32*)&score[(chunks - 1) * 32 + lane];
#pragma unroll
    for (int p = 0; p < 4; p++) last[p] &= left >= 2 * p + 2 ? ~0u : left == 2 * p + 1 ? 0xffffu : 0u;

    Cut cut = {0, TOP, seen, 0};
    // Counts the scores that reach two places about `centre`, in ALL_FOUR chunks of every group or the first alone, until
    // few are left between.
    auto narrow = [&](auto all_four, Cut& cut, int wanted, int slack, float centre, float half, float step) {
#pragma unroll 1
        for (int tries = 0; cut.behind - cut.found > 1 && cut.at_least - cut.beyond > slack; tries++) {
            const int low = min(max((int)(centre - half), cut.found + 1), cut.behind - 1);
            const int high = min(max((int)(centre + half) + 1, low), cut.behind - 1);
            const u32 minus_low = minus(low), minus_high = minus(high);
            u32 at_low = 0, at_high = 0;
#pragma unroll 1
            for (int g = 0; g < groups; g++)
#pragma unroll
                for (int u = 0; u < (decltype(all_four)::value ? 4 : 1); u++) {
                    const uint4 four = score[g * 128 + u * 32 + lane];
                    at_low += reached(four.x, minus_low) + reached(four.y, minus_low);
                    at_high += reached(four.x, minus_high) + reached(four.y, minus_high);
                    at_low += reached(four.z, minus_low) + reached(four.w, minus_low);
                    at_high += reached(four.z, minus_high) + reached(four.w, minus_high);
                }
            const u32 each = (at_low & 0xffffu) + (at_low >> 16) + (at_high << 16) + (at_high & 0xffff0000u);
            const u32 both = __reduce_add_sync(ALL, each);
            cut.take(low, both & 0xffffu, wanted), cut.take(high, both >> 16, wanted);
            // Then between the ends; from the one that is known, by the slope of a normal density; at last by thirds.
            if (tries >= 6) half = (cut.behind - cut.found) * (1 / 6.0f), centre = cut.found + 3.0f * half;
            else if (cut.two_sided()) {
                const float steps = cut.steps_a_key();
                centre = cut.found + steps * (cut.at_least - wanted), half = 0.25f * slack * steps;
            } else {
                centre = cut.found > 0 ? cut.found + (cut.at_least - wanted) * step : cut.behind - (wanted - cut.beyond) * step;
                half *= 4.0f;
            }
        }
    };
    if (!everything && usable) {
        // Start where the k best would begin if the mean and spread of some told all.
        const bool sampled = groups > 2;
        int sum = 0, many = 0;
        float squares = 0.0f;
#pragma unroll 1
        for (int c = 0; c < chunks; c += sampled ? 4 : 1) {
            const int x = (int)(score[c * 32 + lane].x & 0xffffu), off = x > 0 ? x - ZERO : 0;
            sum += off, squares += (float)off * (float)off, many += x > 0;
        }
        sum = __reduce_add_sync(ALL, sum), many = __reduce_add_sync(ALL, many);
#pragma unroll
        for (int m = 1; m < 32; m *= 2) squares += __shfl_xor_sync(ALL, squares, m);
        const float mean = __fdividef(sum, many), spread = sqrtf(fmaxf(__fdividef(squares, many) - mean * mean, 0.0f));
        float centre = mean + ZERO + normal * spread, step = key * spread, half = 0.4f * SLACK * step;
        if (sampled) {
            const int here = groups * 256 - max(0, (groups - 1) * 1024 + 256 - seen);
            const float times = __fdividef(seen, here);
            const int some = (int)__fdividef(wanted, times);
            // Twice the deviation of how many of the k best are in a sample.
            const float deviation = sqrtf((float)min(some, here - some) + 1.0f);
            Cut sample = {0, TOP, here, 0};
            narrow(Bool<false>{}, sample, some, SLACK, centre, 2.0f * deviation * step * times, step * times);
            if (sample.two_sided()) {
                // A few keys tell little of the density.
                const float steps = sample.steps_a_key(), wide = fmaxf(steps, 0.5f * step * times);
                centre = sample.found + steps * (sample.at_least - some), step = __fdividef(wide, times), half = 0.8f * deviation * wide;
            }
        }
        narrow(Bool<true>{}, cut, wanted, SLACK, centre, half, step);
    }
    // All scores reach 1.
    const int low = usable ? max(cut.found - error, 1) : 1;
    const int high = everything ? 1 : usable ? min(cut.behind + error, TOP) : TOP;

    if (lane == 0) *listed = 0;
    __syncwarp();
    int sure = 0;
    u32 most = 0;
    const u32 minus_low = minus(low), minus_high = minus(high);
    unsigned char* byte = (unsigned char*)selected + lane;
#pragma unroll 1
    for (int g = 0; g < groups; g++, byte += 128) {
        // Of eight keys, which reach `high`, in bits 0 to 7, and `low`, in bits 8 to 15.
        u32 reach[4];
        uint4 four[4];
#pragma unroll
        for (int u = 0; u < 4; u++) four[u] = score[g * 128 + u * 32 + lane];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const u32* word = (const u32*)&four[u];
            // First bits 0, 2, 4, 6 for the lower halves, 16, 18, 20, 22 for the higher.
            u32 r[4];
#pragma unroll
            for (int p = 0; p < 4; p++) r[p] = reached(word[p], minus_high) + reached(word[p], minus_low) * 256;
            const u32 both = (r[0] + r[1] * 4) + (r[2] + r[3] * 4) * 16;
            most = __vmaxs2(__vmaxs2(most, word[0]), __vmaxs2(__vmaxs2(word[1], word[2]), word[3]));
            reach[u] = both | both >> 15;
        }
#pragma unroll
        for (int u = 0; u < 4; u++) byte[u * 32] = (unsigned char)reach[u];
        const u32 two = __byte_perm(reach[0], reach[1], 0x5140), more = __byte_perm(reach[2], reach[3], 0x5140);
        const u32 in = __byte_perm(two, more, 0x5410);
        u32 near = __byte_perm(two, more, 0x7632) & ~in;
        sure += __popc(in);
        while (near) {
            const int at = atomicAdd(listed, 1), bit = __ffs(near) - 1;
            near &= near - 1;
            if (at < CAPACITY) position[at] = (g * 1024 + lane * 8) | (bit >> 3 << 8) | (bit & 7);
        }
    }
    sure = __reduce_add_sync(ALL, sure);
    const int best = __reduce_max_sync(ALL, (int)max(most & 0xffffu, most >> 16));
    __syncwarp();
    int band = *listed, missing = wanted - sure;
    if (missing > 0 && band <= CAPACITY) {
        // The score that so many of the listed reach as are missing, by halving.
        int j[EACH], place[EACH], found = low, behind = high;
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const bool is = u * 32 + lane < band;
            j[u] = is ? position[u * 32 + lane] : 0;
            place[u] = is ? ((const u16*)score)[j[u]] : 0;
        }
#pragma unroll 1
        while (behind - found > 1) {
            const int trial = (found + behind) / 2;
            int enough = 0;
#pragma unroll
            for (int u = 0; u < EACH; u++) enough += place[u] >= trial;
            if (__reduce_add_sync(ALL, enough) >= missing) found = trial;
            else behind = trial;
        }
        // If all are missing there is nothing to order.
        const int total = band, in_from = total <= missing ? 1 : found + error + 1, near_from = max(found - error, 1);
        band = 0;
        __syncwarp();
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            if (u * 32 >= total) break;
            const bool in = place[u] >= in_from, near = !in && place[u] >= near_from;
            if (in) atomicOr(&selected[j[u] / 32], 1u << (j[u] % 32));
            const u32 all_near = __ballot_sync(ALL, near);
            if (near) position[band + __popc(all_near & ((1u << lane) - 1))] = j[u];
            band += __popc(all_near), missing -= __popc(__ballot_sync(ALL, in));
        }
        __syncwarp();
        const char* keys = (const char*)k + (((i64)b * k_b + (i64)(h / GROUP) * k_h) + part) * 16;
        const int mine = first_sum<DEEP, LANES>(lane);
#pragma unroll 1
        for (int at = lane / LANES * DEEP; at - lane / LANES * DEEP < band; at += COLUMNS * DEEP) {
            float total[DEEP];
            uint4 raw[DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) raw[u] = load16(keys + (i64)position[min(at + u, band - 1)] * k_n * 16);
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
                if (writes_sum<DEEP, LANES>(lane) && at + mine + u < band) value[at + mine + u] = word_of(total[u]);
        }
        __syncwarp();
#pragma unroll 1
        for (int at = lane; at < band; at += 32) {
            const int w = value[at], j = position[at];
            int better = 0;
#pragma unroll 1
            for (int other = 0; other < band; other++)
                better += value[other] > w || (value[other] == w && position[other] < j);
            if (better < missing) atomicOr(&selected[j / 32], 1u << (j % 32));
        }
        __syncwarp();
    }
    u32* out = bits + (i64)row * (room * 32) + lane;
#pragma unroll 4
    for (int g = 0; g < room; g++) out[g * 32] = g < groups ? selected[g * 32 + lane] : 0u;
    if (lane == 0) {
        band_count[row] = band, missing_count[row] = missing;
        low_score[row] = usable ? low : 0, high_score[row] = usable ? high : 65536;
        top[row] = best;
    }
}
