// Which keys every query of a prefill selects, from 15-bit scores: one warp a row, or a team of several, whose scores stay in
// shared memory; where they do not fit there (GLOBAL) they are read anew with every look.
//
// A row is one query of one head. It sees the keys [begin, end), of which those outside [lo, hi) are always kept and the others
// are ranked. If at least k_eff scores reach `found`, the last of the k_eff best canonical scores is at most one error below it,
// and a key more than two errors below is out. If at most k_eff reach `behind`, a key two errors above it is in. The few between
// are listed; their own cut tells which of them, the band, have to be put in their canonical order. A list that does not fit is
// left to prefill_wide_band_kernel. An error is how far a score may be from a growing function of the canonical score.
//
// Loops are rolled: unrolled over scores in registers, this was held by the instruction cache.
//
// cuda/compiler.py puts canonical.cuh before this and defines, besides what is said there: GROUP (query heads of a key head),
// CAPACITY (of the list), SLACK (scores between the two sides that are few enough to list), WARPS, TEAM (of them, warps of a
// row), GLOBAL.

constexpr int LANES = DIM / E, COLUMNS = 32 / LANES, DEEP = 4, EACH = CAPACITY / 32;
constexpr int TOP = 32768, ZERO = 16384;  // behind every score, which are from 34 to 32734; the score 0. 0 is none.
static_assert(TEAM == 1 || TEAM == WARPS);

// ---- a row in shared memory -----------------------------------------------------------------------------------------

// Of room times 1024 keys: two bytes and a bit each. Then the list with its canonical scores, and what the team tells each other.
struct Row {
    uint4* score;
    u32* selected;
    int *value, *position, *listed;
    int2* told;
    int lane, member, skip, end, seen, blocks, spans;  // ranked keys begin and end there; blocks of 256 and spans of 1024
    mutable int turn = 0;
    __device__ Row(char* memory, const u16* fast, int warp, int lane, int room, int skip, int end)
        : lane(lane), member(TEAM > 1 ? warp : 0), skip(skip), end(end), seen(end - skip) {
        blocks = (end + 255) / 256, spans = (end + 1023) / 1024;
        char* mine = memory + (TEAM > 1 ? 0 : warp) * (room * (GLOBAL ? 128 : 2176) + CAPACITY * 8 + 16 + TEAM * 16);
        score = GLOBAL ? (uint4*)fast : (uint4*)mine;
        selected = (u32*)(mine + (GLOBAL ? 0 : room * 2048));
        value = (int*)(selected + room * 32), position = value + CAPACITY, listed = position + CAPACITY;
        told = (int2*)(listed + 4);
    }
    __device__ __forceinline__ void together() const {
        if (TEAM > 1) __syncthreads();
        else __syncwarp();
    }
    // What every warp brings along, added up; or, of the second, the largest.
    template <bool LARGEST_Y = false> __device__ __forceinline__ int2 sums(int x, int y) const {
        x = __reduce_add_sync(ALL, x), y = LARGEST_Y ? __reduce_max_sync(ALL, y) : __reduce_add_sync(ALL, y);
        if (TEAM == 1) return make_int2(x, y);
        // Two places in turn: nobody is two sums ahead.
        int2* here = told + (turn ^= 1) * TEAM;
        if (lane == 0) here[member] = make_int2(x, y);
        __syncthreads();
        x = 0, y = 0;
#pragma unroll
        for (int w = 0; w < TEAM; w++) x += here[w].x, y = LARGEST_Y ? max(y, here[w].y) : y + here[w].y;
        return make_int2(x, y);
    }
    __device__ __forceinline__ float sum(float x) const {
#pragma unroll
        for (int m = 1; m < 32; m *= 2) x += __shfl_xor_sync(ALL, x, m);
        if (TEAM == 1) return x;
        int2* here = told + (turn ^= 1) * TEAM;
        if (lane == 0) here[member].x = __float_as_int(x);
        __syncthreads();
        x = 0.0f;
#pragma unroll
        for (int w = 0; w < TEAM; w++) x += __int_as_float(here[w].x);
        return x;
    }
    // The keys of a lane in block c, of which those that are not ranked have the score 0.
    __device__ __forceinline__ uint4 ranked(uint4 four, int c) const {
        const int hidden = skip - c * 256 - lane * 8, left = end - c * 256 - lane * 8;
        u32* word = (u32*)&four;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            word[p] &= left >= 2 * p + 2 ? ~0u : left == 2 * p + 1 ? 0xffffu : 0u;
            word[p] &= hidden >= 2 * p + 2 ? 0u : hidden == 2 * p + 1 ? 0xffff0000u : ~0u;
        }
        return four;
    }
    __device__ __forceinline__ uint4 at(int c, bool usable = true) const {
        if (!GLOBAL) return score[c * 32 + lane];
        if (c >= blocks) return make_uint4(0, 0, 0, 0);
        const u32 tie = ZERO * 0x10001;
        uint4 four = usable ? score[c * 32 + lane] : make_uint4(tie, tie, tie, tie);
        return c == 0 || c == blocks - 1 ? ranked(four, c) : four;
    }
};

// A lane reads nothing but what it asked for, span by span in turn with its team.
__device__ __forceinline__ void request_scores(const Row& row, const u16* fast) {
    if (GLOBAL) return;
    const i64 policy = read_once();
#pragma unroll 1
    for (int g = row.member; g < row.spans; g += TEAM) {
        const uint4* from = (const uint4*)fast + g * 128 + row.lane;
        uint4* to = row.score + g * 128 + row.lane;
        if (g * 4 + 4 <= row.blocks) {
#pragma unroll
            for (int u = 0; u < 4; u++) request16(to + u * 32, from + u * 32, policy);
        } else {
#pragma unroll 1
            for (int u = 0; u < 4; u++, from += 32, to += 32)
                if (g * 4 + u < row.blocks) request16(to, from, policy);
                else *to = make_uint4(0, 0, 0, 0);
        }
    }
    end_request();
}

// Where scores are not usable all keys tie.
__device__ __forceinline__ void await_scores(const Row& row, bool usable) {
    if (GLOBAL) return;
    await<0>();
    const u32 tie = ZERO * 0x10001;
    if (!usable)
        for (int g = row.member; g < row.spans; g += TEAM)
            for (int c = g * 4; c < min(g * 4 + 4, row.blocks); c++)
                row.score[c * 32 + row.lane] = make_uint4(tie, tie, tie, tie);
    const int last = row.blocks - 1;
    if (row.member == 0) row.score[row.lane] = row.ranked(row.score[row.lane], 0);
    if (last > 0 && last / 4 % TEAM == row.member)
        row.score[last * 32 + row.lane] = row.ranked(row.score[last * 32 + row.lane], last);
}

__device__ __forceinline__ float squared_length(const float* query) {
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) square += query[e] * query[e];
#pragma unroll
    for (int m = 1; m < LANES; m *= 2) square += __shfl_xor_sync(ALL, square, m);
    return square;
}

// ---- the cut --------------------------------------------------------------------------------------------------------

// What is known of the place between the last score kept and the next: at_least scores reach `found`, `beyond` reach `behind`.
struct Cut {
    int found, behind, at_least, beyond;
    __device__ void take(int trial, int reached, int k_eff) {
        if (reached >= k_eff && trial > found) found = trial, at_least = reached;
        if (reached <= k_eff && trial < behind) behind = trial, beyond = reached;
    }
    __device__ bool two_sided() const { return found > 0 && behind < TOP; }
    __device__ float per_key() const { return __fdividef(behind - found, max(at_least - beyond, 1)); }
};

// Where the cut is looked for: `half` to both sides of `centre`; one key more moves it by `per_key`.
struct Guess { float centre, half, per_key; };

// Added to the scores in both halves of a word it leaves more than 0 where the score reaches t, of 1 .. TOP.
__device__ __forceinline__ u32 minus(int t) { return (u32)((1 - t) & 0xffff) * 0x10001u; }
__device__ __forceinline__ u32 reached(u32 scores, u32 minus_t) { return __viaddmin_s16x2_relu(scores, minus_t, 0x10001u); }

// How many scores reach `low`, and how many `high`: of FOUR blocks of every span, or of the first.
template <int FOUR> __device__ __forceinline__ int2 count(const Row& row, int low, int high) {
    const u32 minus_low = minus(low), minus_high = minus(high);
    u32 at_low = 0, at_high = 0;
#pragma unroll 1
    for (int g = row.member; g < row.spans; g += TEAM)
#pragma unroll
        for (int u = 0; u < FOUR; u++) {
            const uint4 four = row.at(g * 4 + u);
            at_low += reached(four.x, minus_low) + reached(four.y, minus_low);
            at_high += reached(four.x, minus_high) + reached(four.y, minus_high);
            at_low += reached(four.z, minus_low) + reached(four.w, minus_low);
            at_high += reached(four.z, minus_high) + reached(four.w, minus_high);
        }
    return row.sums((at_low & 0xffffu) + (at_low >> 16), (at_high & 0xffffu) + (at_high >> 16));
}

// Tries two places at a time until at most `slack` scores are left between.
template <int FOUR> __device__ __forceinline__ void narrow(const Row& row, Cut& cut, int k_eff, Guess guess, int slack) {
#pragma unroll 1
    for (int tries = 0; cut.behind - cut.found > 1 && cut.at_least - cut.beyond > slack; tries++) {
        const int low = min(max((int)(guess.centre - guess.half), cut.found + 1), cut.behind - 1);
        const int high = min(max((int)(guess.centre + guess.half) + 1, low), cut.behind - 1);
        const int2 both = count<FOUR>(row, low, high);
        cut.take(low, both.x, k_eff), cut.take(high, both.y, k_eff);
        // Then between the ends; from the one that is known, by the slope of a normal density; at last by thirds.
        if (tries >= 6) guess.half = (cut.behind - cut.found) * (1 / 6.0f), guess.centre = cut.found + 3.0f * guess.half;
        else if (cut.two_sided()) {
            const float per_key = cut.per_key();
            guess.centre = cut.found + per_key * (cut.at_least - k_eff), guess.half = 0.25f * slack * per_key;
        } else {
            guess.centre = cut.found > 0 ? cut.found + (cut.at_least - k_eff) * guess.per_key
                                         : cut.behind - (k_eff - cut.beyond) * guess.per_key;
            guess.half *= 4.0f;
        }
    }
}

// Where the best would begin if the mean and spread of some scores told all.
__device__ __forceinline__ Guess normal_guess(const Row& row, bool sampled, float quantile, float slope) {
    int sum = 0, many = 0;
    float squares = 0.0f;
#pragma unroll 1
    for (int g = row.member; g < row.spans; g += TEAM)
#pragma unroll 1
        for (int u = 0; u < (sampled ? 1 : 4); u++) {
            const int x = (int)(row.at(g * 4 + u).x & 0xffffu), off = x > 0 ? x - ZERO : 0;
            sum += off, squares += (float)off * (float)off, many += x > 0;
        }
    const int2 both = row.sums(sum, many);
    // None that is ranked may be among those looked at.
    const float each = (float)max(both.y, 1), mean = __fdividef((float)both.x, each);
    const float spread = sqrtf(fmaxf(__fdividef(row.sum(squares), each) - mean * mean, 0.0f));
    const float per_key = slope * spread;
    return {mean + ZERO + quantile * spread, 0.4f * SLACK * per_key, per_key};
}

// A better guess, from the cut of a fourth of the scores.
__device__ __forceinline__ Guess sampled_guess(const Row& row, int k_eff, Guess guess) {
    const int here = row.spans * 256 - max(0, (row.spans - 1) * 1024 + 256 - row.end) - row.skip;
    const float times = __fdividef(row.seen, here);
    const int some = (int)__fdividef(k_eff, times);
    // Twice the deviation of how many of the best are in a sample.
    const float deviation = sqrtf((float)min(some, here - some) + 1.0f);
    Cut sample = {0, TOP, here, 0};
    narrow<1>(row, sample, some, {guess.centre, 2.0f * deviation * guess.per_key * times, guess.per_key * times}, SLACK);
    if (!sample.two_sided()) return guess;
    // A few keys tell little of the density.
    const float per_key = sample.per_key(), wide = fmaxf(per_key, 0.5f * guess.per_key * times);
    return {sample.found + per_key * (sample.at_least - some), 0.8f * deviation * wide, __fdividef(wide, times)};
}

__device__ __forceinline__ Cut cut_row(const Row& row, int k_eff, float quantile, float slope, int error) {
    const bool sampled = row.spans > 2;
    Guess guess = normal_guess(row, sampled, quantile, slope);
    if (sampled) guess = sampled_guess(row, k_eff, guess);
    // Room in the list for what is within an error of the two sides.
    const int near = (int)fminf(__fdividef(2.5f * error, guess.per_key), (float)CAPACITY);
    Cut cut = {0, TOP, row.seen, 0};
    narrow<4>(row, cut, k_eff, guess, max(min(SLACK, CAPACITY - CAPACITY / 16 - near), CAPACITY / 8));
    return cut;
}

// ---- the bits and the list ------------------------------------------------------------------------------------------

// Of the 32 keys of a lane in a span: which reach `high`, and which `low`.
struct Reach { u32 in, low; };

__device__ __forceinline__ Reach reach_of(const uint4* four, u32 minus_low, u32 minus_high, u32& most, unsigned char* byte) {
    // Of eight keys, which reach `high`, in bits 0 to 7, and `low`, in bits 8 to 15.
    u32 reach[4];
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
    return {__byte_perm(two, more, 0x5410), __byte_perm(two, more, 0x7632)};
}

// How many bits are set, and the highest score.
struct Marked { int sure, best; };

// Sets the bits of the scores that reach `high` and lists the keys of the others that reach `low`.
__device__ __forceinline__ Marked mark_and_list(const Row& row, int low, int high, bool usable) {
    if (row.lane == 0 && row.member == 0) *row.listed = 0;
    row.together();
    int sure = 0;
    u32 most = 0;
    const u32 minus_low = minus(low), minus_high = minus(high);
#pragma unroll 1
    for (int g = row.member; g < row.spans; g += TEAM) {
        uint4 four[4];
#pragma unroll
        for (int u = 0; u < 4; u++) four[u] = row.at(g * 4 + u, usable);
        const Reach reach = reach_of(four, minus_low, minus_high, most, (unsigned char*)row.selected + g * 128 + row.lane);
        u32 near = reach.low & ~reach.in;
        sure += __popc(reach.in);
        while (near) {
            const int at = atomicAdd(row.listed, 1), bit = __ffs(near) - 1;
            near &= near - 1;
            if (at < CAPACITY) row.position[at] = (g * 1024 + row.lane * 8) | (bit >> 3 << 8) | (bit & 7);
        }
    }
    const int2 both = row.sums<true>(sure, (int)max(most & 0xffffu, most >> 16));
    row.together();
    return {both.x, both.y};
}

// How many keys are listed, or left of them as the band, and how many of them the selection misses.
struct Open { int band, missing; };

// Of the list, sets the bits of the keys that are surely in and leaves the band: by one warp.
__device__ __forceinline__ Open settle(const Row& row, Open open, int low, int high, int error) {
    // The score that so many of the listed reach as are missing, by halving.
    int j[EACH], place[EACH], found = low, behind = high;
#pragma unroll
    for (int u = 0; u < EACH; u++) {
        const bool is = u * 32 + row.lane < open.band;
        j[u] = is ? row.position[u * 32 + row.lane] : 0;
        place[u] = is ? ((const u16*)row.score)[j[u]] : 0;
    }
#pragma unroll 1
    while (behind - found > 1) {
        const int trial = (found + behind) / 2;
        int enough = 0;
#pragma unroll
        for (int u = 0; u < EACH; u++) enough += place[u] >= trial;
        if (__reduce_add_sync(ALL, enough) >= open.missing) found = trial;
        else behind = trial;
    }
    // If all are missing there is nothing to order.
    const int total = open.band, in_from = total <= open.missing ? 1 : found + error + 1, near_from = max(found - error, 1);
    open.band = 0;
    __syncwarp();
#pragma unroll
    for (int u = 0; u < EACH; u++) {
        if (u * 32 >= total) break;
        const bool in = place[u] >= in_from, near = !in && place[u] >= near_from;
        if (in) atomicOr(&row.selected[j[u] / 32], 1u << (j[u] % 32));
        const u32 all_near = __ballot_sync(ALL, near);
        if (near) row.position[open.band + __popc(all_near & ((1u << row.lane) - 1))] = j[u];
        open.band += __popc(all_near), open.missing -= __popc(__ballot_sync(ALL, in));
    }
    __syncwarp();
    return open;
}

// ---- the band's canonical order -------------------------------------------------------------------------------------

// The same for all of the team.
__device__ __forceinline__ Open settle_together(const Row& row, Open open, int low, int high, int error) {
    if (TEAM == 1) return settle(row, open, low, high, error);
    if (row.member == 0) {
        open = settle(row, open, low, high, error);
        if (row.lane == 0) row.listed[1] = open.band, row.listed[2] = open.missing;
    }
    row.together();
    return {row.listed[1], row.listed[2]};
}

// Writes the canonical score of every key of the band.
__device__ __forceinline__ void rescore(const Row& row, const float* query, const char* keys, int k_n, int band) {
    const int lane = row.lane, mine = first_sum<DEEP, LANES>(lane), column = lane / LANES * DEEP;
#pragma unroll 1
    for (int first = row.member * COLUMNS * DEEP; first < band; first += TEAM * COLUMNS * DEEP) {
        const int at = first + column;
        float total[DEEP];
        uint4 raw[DEEP];
#pragma unroll
        for (int u = 0; u < DEEP; u++) raw[u] = load16(keys + (i64)row.position[min(at + u, band - 1)] * k_n * 16);
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
            if (writes_sum<DEEP, LANES>(lane) && at + mine + u < band) row.value[at + mine + u] = word_of(total[u]);
    }
    row.together();
}

// Sets the bits of the `missing` best of the band; of equals the lower position is better.
__device__ __forceinline__ void order(const Row& row, int band, int missing) {
    const int *value = row.value, *position = row.position;
#pragma unroll 1
    for (int at = row.member * 32 + row.lane; at < band; at += TEAM * 32) {
        const int w = value[at], j = position[at];
        int better = 0;
#pragma unroll 1
        for (int other = 0; other < band; other++)
            better += value[other] > w || (value[other] == w && position[other] < j);
        if (better < missing) atomicOr(&row.selected[j / 32], 1u << (j % 32));
    }
    row.together();
}

// ---- what is always kept ---------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 first_bits(int many) { return many <= 0 ? 0u : many >= 32 ? ~0u : (1u << many) - 1; }
// The keys [from, to) as bits of word w.
__device__ __forceinline__ u32 bits_between(int from, int to, int w) {
    return first_bits(to - w * 32) & ~first_bits(from - w * 32);
}

__device__ __forceinline__ int highest_of(const u16* fast, int from, int to, int thread) {
    int most = 0;
#pragma unroll 1
    for (int j = from + thread; j < to; j += 32 * TEAM) most = max(most, (int)fast[j]);
    return most;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) select_rows(
    const void* q, const void* k, const float* norm, const u16* fast, const int* k_eff_of, const float* quantile_of,
    const float* slope_of, const int* pads, u32* bits, int* band_count, int* missing_count, int* low_score, int* high_score,
    int* top, int heads, int start, int chunk, int first, int n, int is_padded, int origin, int window, int sinks, int recent,
    int bit_rows, int bit_start, int padded, int words, int error, int causal, int room,
    int q_b, int q_h, int q_m, int k_b, int k_h, int k_n) {
    DYNAMIC_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES;
    const int i = TEAM > 1 ? blockIdx.x : blockIdx.x * WARPS + warp, thread = (TEAM > 1 ? warp * 32 : 0) + lane;
    if (i >= chunk) return;
    const int head = blockIdx.y, b = head / heads, h = head % heads, at = head * chunk + i;
    const int end = causal ? min(first + i + 1, n) : n;
    const int begin = min(max(max(end - window, 0), is_padded ? pads[b] - origin : 0), end);
    const int lo = min(begin + sinks, end), hi = max(end - recent, lo), base = lo / 256 * 256;
    const int k_eff = min(k_eff_of[end - begin], hi - lo);
    const float quantile = quantile_of[end - begin], slope = slope_of[end - begin];
    const u16* mine = fast + (i64)at * padded;
    // Where nothing is ranked there are no blocks.
    const Row row(memory, mine + base, warp, lane, room, lo - base, hi > lo ? hi - base : 0);
    request_scores(row, mine + base);
    float query[E];
    load_query(q, ((i64)b * q_b + (i64)h * q_h + (i64)(start + i) * q_m) * E, part, query);
    // A little narrower than for the scores: where these are not usable, neither may be taken to be here. Those of a query too
    // short to have a length all tie: its band has every key.
    const float largest = sqrtf(squared_length(query)) * norm[head / GROUP] * 1.001f;
    const bool usable = largest > SMALLEST * 1.01f && largest < LARGEST / 1.01f, everything = k_eff >= hi - lo;
    if (row.blocks > 0) await_scores(row, usable);

    Cut cut = {0, TOP, hi - lo, 0};
    if (!everything && usable && k_eff > 0) cut = cut_row(row, k_eff, quantile, slope, error);
    // All scores reach 1, none TOP.
    const bool nothing = k_eff == 0;
    const int low = nothing ? TOP : usable ? max(cut.found - error, 1) : 1;
    const int high = nothing ? TOP : everything ? 1 : usable ? min(cut.behind + error, TOP) : TOP;
    const Marked marked = mark_and_list(row, low, high, usable);
    Open open = {*row.listed, k_eff - marked.sure};
    if (open.missing > 0 && open.band <= CAPACITY) {
        open = usable ? settle_together(row, open, low, high, error) : open;
        const char* keys = (const char*)k + (((i64)b * k_b + (i64)(h / GROUP) * k_h) + part) * 16 + (i64)base * k_n * 16;
        rescore(row, query, keys, k_n, open.band);
        order(row, open.band, open.missing);
    }
    const bool some_always = lo > begin || hi < end;
    u32* out = bits + ((i64)head * bit_rows + bit_start + i) * words;
#pragma unroll 4
    for (int w = thread; w < words; w += 32 * TEAM) {
        const int there = w - base / 32;
        u32 chosen = there >= 0 && there < row.spans * 32 ? row.selected[there] : 0u;
        if (some_always) chosen |= bits_between(begin, lo, w) | bits_between(hi, end, w);
        out[w] = chosen;
    }
    int best = nothing ? 0 : marked.best;
    if (some_always) {
        const int kept = max(highest_of(mine, begin, lo, thread), highest_of(mine, hi, end, thread));
        best = max(best, row.sums<true>(0, kept).y);
    }
    if (thread == 0) {
        band_count[at] = open.band, missing_count[at] = open.missing;
        low_score[at] = usable ? low : 0, high_score[at] = usable ? high : 65536;
        top[(i64)head * bit_rows + bit_start + i] = best;
    }
}
