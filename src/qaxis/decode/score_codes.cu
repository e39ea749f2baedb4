// Fast scores from 8-bit codes, with a proven error (arithmetic/fast_scores.py).
//
// cuda.py lists what compiler.py puts before this, seen.cuh and tally.cuh, and what is defined besides: GROUP (query heads of a
// key head), AHEAD (products of 16 keys whose codes a warp has asked for), COMPLETED (the last program of a key head is that of
// fit.cuh).

constexpr int QUARTER = DIM / 4, WORDS = DIM / 16, PARTS = GROUP > 4 ? 2 : 1;

// A lane's 16 of the 128 places of a head that a warp holds, packed; 0 stands for no score.
__device__ __forceinline__ void unpack(const uint4& lower, const uint4& upper, int (&place)[16]) {
    const u32 packed[8] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
#pragma unroll
    for (int i = 0; i < 16; i++) place[i] = (packed[i / 2] >> (16 * (i % 2))) & 65535;
}

// 16-bit scores [rows, padded] of groups of 128 tokens that share their steps, by how many places they may be off, the best of
// every SUB neighbours, and counts; a warp takes one group at a time. The query, times the steps, is split into two 8-bit
// parts, which are the columns of an exact product. Whole groups are written: what of them a row does not see, or has no code,
// gets the score 0. `left_out` is a length for every group: scaled, of what codes leave out over the roots of their steps, so
// that channels whose steps are large do not widen the error of the others.
extern "C" __global__ void __launch_bounds__(128, DIM > 128 ? 2 : 4) score_codes(
    const void* q, const char* codes, const char* scales, const float* norm, const float* left_out, const float* steps,
    const int* rows, u16* fast, u16* best, float* units_of, float* off, int* tally, int heads, int kv_heads, int padded,
    int n, int k_eff, int in_full, int sinks, int recent, int q_b, int q_h, int codes_b, int codes_h, int codes_n,
    int scales_b, int scales_h, int scales_n, int left_out_b, int left_out_h, int left_out_n, int scaled,
    double relative, double split
#if COMPLETED
    , const float* products, const float* sums, float* line, int linear, float* run_sums, double factor, double scale
#endif
) {
    let_next_begin();
    const int lane = threadIdx.x % 32, t = lane % 4, row = lane / 4;
    const int kv = blockIdx.y, b = kv / kv_heads, g = kv % kv_heads, first_row = b * heads + g * GROUP;
#if COMPLETED
    if (blockIdx.x == gridDim.x - 1) {
        DYNAMIC_SHARED(space);
        const i64 q_of = (i64)b * q_b + (i64)(g * GROUP) * q_h;
        const int count = Whole(Seen::of<true>(rows, b, Room{n, k_eff, in_full, sinks, recent})).keys();
        return fit(q, q_of, q_h, products, sums, kv, line, first_row, count, linear, *(FitSpace*)space);
    }
#endif
    // What every group needs is asked for first: behind the codes it would wait for them. Many warps want the same, so it goes
    // through the L1 cache. The numbers of a lane are 16 of every 64, those at 16 t; of head row / 2 of each part.
    uint4 raw_query[PARTS][QUARTER / E], raw_step[QUARTER / 4];
#pragma unroll
    for (int i = 0; i < QUARTER; i += 4) {
        const int d = i / 16 * 64 + t * 16 + i % 16;
        raw_step[i / 4] = *(const uint4*)(steps + (i64)kv * DIM + d);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            if (i % E == 0)
                raw_query[p][i / E] = *(const uint4*)(
                    (const char*)q + ((i64)b * q_b + (i64)(g * GROUP + min(p * 4 + row / 2, GROUP - 1)) * q_h + d) * (16 / E));
    }
    const float longest = norm[kv];
    const Seen seen = Seen::of<true>(rows, b, Room{n, k_eff, in_full, sinks, recent});
    const int from = seen.start / 128, end = (seen.stop + 127) / 128 - from, warps = (gridDim.x - COMPLETED) * (blockDim.x / 32);
    int group = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (seen.k_eff == 0 || seen.start >= seen.stop || group >= end) return;
    codes += ((i64)b * codes_b + (i64)g * codes_h + (i64)from * 128 * codes_n) * E + t * 16;
    scales += ((i64)b * scales_b + (i64)g * scales_h + (i64)from * scales_n) * E + t * 16;
    left_out += (i64)b * left_out_b + (i64)g * left_out_h + (i64)from * left_out_n;
    const i64 policy = read_once();
    // Row r of product m is token 16 m + r.
    __shared__ __align__(16) u16 turn[4][PARTS * 4][128 + 8];
    DYNAMIC_SHARED(memory);
    typedef uint4 Ring[AHEAD][2][DIM / 64][32];
    Ring& code = ((Ring*)memory)[threadIdx.x / 32];
    uint4 next_exponents[DIM / 64];
    auto fetch = [&](int group, int m, int slot) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < DIM / 64; i++) {
                const void* p = codes + (i64)(group * 128 + 16 * m + 8 * half + row) * codes_n * E + i * 64;
                request16(&code[slot][half][i][lane], p, policy);
            }
        end_request();
    };
    auto fetch_exponents = [&](int group) {
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) next_exponents[i] = load16(scales + (i64)group * scales_n * E + i * 64);
    };
    fetch_exponents(group);
#pragma unroll
    for (int m = 0; m < AHEAD; m++) fetch(group, m, m);
    float query[PARTS][QUARTER], coarse[PARTS], fine[PARTS];
    // Of this lane's head: places for a unit of what codes leave out times the query, the query's length, what else is off.
    float each_off[PARTS], length[PARTS], others[PARTS];
#if COMPLETED
    float unit[PARTS];  // score of a place, of head t of each part
    const float per = (float)factor * (-1.0f / 256.0f);
#endif
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int h = p * 4 + row / 2;
        float square = 0.0f, most = 0.0f;
#pragma unroll
        for (int i = 0; i < QUARTER; i += 4) {
            const float step[4] = {__uint_as_float(raw_step[i / 4].x), __uint_as_float(raw_step[i / 4].y),
                                   __uint_as_float(raw_step[i / 4].z), __uint_as_float(raw_step[i / 4].w)};
            if (i % E == 0) widen(raw_query[p][i / E], query[p] + i);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (h >= GROUP) query[p][i + e] = 0.0f;
                const float x = query[p][i + e];
                square += x * x;
                most = fmaxf(most, fabsf(x) * fmaxf(step[e], LEAST_CODE_SCALE));
            }
        }
#pragma unroll
        for (int m = 1; m < 4; m *= 2) {
            square += __shfl_xor_sync(ALL, square, m);
            most = fmaxf(most, __shfl_xor_sync(ALL, most, m));
        }
        most = fmaxf(most, 1e-30f);
        const float units = units_per_score(sqrtf(square), longest), to = 127.0f / most;
        // A thousandth for lengths, which are summed in another order elsewhere, and a hundredth for all else; floor takes one.
        each_off[p] = units * 1.011f, length[p] = sqrtf(square);
        others[p] = each_off[p] * (length[p] * (float)relative * longest + most * (float)split) + 1.0f;
        if (blockIdx.x == 0 && threadIdx.x < 32 && lane % 8 == 0 && h < GROUP) units_of[first_row + h] = units;
        if (scaled) each_off[p] *= most / 127.0f;
#pragma unroll
        for (int i = 0; i < QUARTER; i++) query[p][i] *= to;
        // The results of a lane are those of head t of each part: its factors are at the lanes of rows 2 t.
        coarse[p] = __shfl_sync(ALL, units * (most / 127.0f), t * 8);
        fine[p] = __shfl_sync(ALL, units * (most / (127.0f * 254.0f)), t * 8);
#if COMPLETED
        unit[p] = __shfl_sync(ALL, __fdiv_rn(1.0f, units), t * 8);
#endif
    }
    const int needed = seen.k_eff - (seen.first - seen.begin) - (seen.end - seen.last);
    const Sample sample(needed, seen.stop - seen.start);
    float counted[PARTS];
    bool first = true;
    int slot = 0;  // of the ring: where the next product's codes are
#pragma unroll 1
    while (group < end) {
        const int ahead = min(group + warps, end - 1);
        const int first_key = (from + group) * 128 + row - seen.start;
        uint4 exponents[DIM / 64];
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) exponents[i] = next_exponents[i];
        u32 part[PARTS][WORDS];
        // Lengths of what codes leave out and of the query, every channel over, or times, the root of its step (Cauchy-Schwarz).
        float square[PARTS] = {};
        const float rest = left_out[(i64)group * left_out_n];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const uint4 four = exponents[w / 4];
            const u32 e = (w % 4 == 0 ? four.x : w % 4 == 1 ? four.y : w % 4 == 2 ? four.z : four.w) ^ 0x80808080u;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                part[p][w] = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float step = __uint_as_float((((e >> (8 * i)) & 255) << 23) - (1u << 23));
                    const float x = query[p][4 * w + i] * step, high = floorf(x + 0.5f);
                    const float low = fminf(fmaxf(floorf((x - high) * 254.0f + 0.5f), -128.0f), 127.0f);
                    square[p] += query[p][4 * w + i] * x;
                    part[p][w] |= ((u32)(int)(row % 2 ? low : high) & 255) << (8 * i);
                }
            }
        }
        fetch_exponents(ahead);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            square[p] += __shfl_xor_sync(ALL, square[p], 1);
            square[p] += __shfl_xor_sync(ALL, square[p], 2);
            const float places = others[p] + each_off[p] * (scaled ? sqrtf(square[p]) : length[p]) * rest;
            const int h = p * 4 + row / 2;
            if (lane % 8 == 0 && h < GROUP) off[((i64)(first_row + h) * padded) / 128 + from + group] = places;
        }
#pragma unroll 1
        for (int m = 0; m < 8; m++) {
            await<AHEAD - 1>();
            u32 a[2][WORDS];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < DIM / 64; i++) {
                    const uint4 w = code[slot][half][i][lane];
                    a[half][4 * i] = w.x, a[half][4 * i + 1] = w.y, a[half][4 * i + 2] = w.z, a[half][4 * i + 3] = w.w;
                }
            fetch(m + AHEAD < 8 ? group : ahead, (m + AHEAD) % 8, slot);
            slot = slot + 1 < AHEAD ? slot + 1 : 0;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                int c[4] = {0, 0, 0, 0};
#pragma unroll
                for (int s = 0; s < DIM / 32; s++)
                    multiply(c, a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], part[p][2 * s], part[p][2 * s + 1]);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float score = (float)c[2 * half] * coarse[p] + (float)c[2 * half + 1] * fine[p];
                    int place = (int)fminf(fmaxf(floorf(score), -32768.0f), 32767.0f) + 32768;
                    if ((u32)(first_key + 16 * m + 8 * half) >= (u32)(seen.stop - seen.start)) place = 0;
                    turn[threadIdx.x / 32][p * 4 + t][16 * m + 8 * half + row] = (u16)place;
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const int h = min(p * 4 + t, GROUP - 1);
            const bool writes = p * 4 + t < GROUP;
            const uint4* own = (const uint4*)&turn[threadIdx.x / 32][p * 4 + t][16 * row];
            int place[16];
            unpack(own[0], own[1], place);
            if (writes) {
                uint4* to = (uint4*)(fast + (i64)(first_row + h) * padded + (from + group) * 128 + 16 * row);
                to[0] = own[0], to[1] = own[1];
                const u32 lower = __vmaxu2(__vmaxu2(own[0].x, own[0].y), __vmaxu2(own[0].z, own[0].w));
                const u32 both = __vmaxu2(lower, __vmaxu2(__vmaxu2(own[1].x, own[1].y), __vmaxu2(own[1].z, own[1].w)));
                best[(i64)(first_row + h) * padded / SUB + (from + group) * 8 + row] = (u16)max(both & 0xffff, both >> 16);
#if COMPLETED
                if constexpr (SUMMED) {
                    // Of a run with other keys than those that have a place these are no sums: nobody reads them.
                    const float half = -0.5f * unit[p], highest = of_place(max(both & 0xffff, both >> 16), unit[p], half);
                    const float logit = plain_logit(highest, (float)scale);
                    const Sums2 run = sums_of_run(
                        [&](int i) { return of_place(place[i], unit[p], half); }, highest, 0xffff,
                        [&](float score, float away) { return plain_power(score, away, logit, (float)scale, per); });
                    *(uint2*)(run_sums + ((i64)(first_row + h) * padded / SUB + (from + group) * 8 + row) * 2) =
                        make_uint2(__float_as_uint(run.mass), __float_as_uint(run.excess));
                }
#endif
            }
            if (first) {
                Moments moments;
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (place[i] > 0) moments.add(place[i] - 32768.0f);
                moments.gather(4);
                counted[p] = writes ? fmaxf(moments.above(sample.share), 1.0f) : 2.0f * PLACES;
            }
            int* counts = tally + (i64)(first_row + h) * TALLY;
            if (sample.holds((from + group) * 128 + 16 * row))
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (place[i] >= counted[p]) atomicAdd(counts + place[i] / EACH_TALLY, 1);
        }
        __syncwarp();
        first = false, group += warps;
    }
}
