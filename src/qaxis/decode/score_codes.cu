// Fast scores from 8-bit codes, with a proven error (arithmetic/fast_scores.py).
//
// compiler.py puts hardware.cuh, canonical.cuh and seen.cuh before this and defines, besides what is said there: GROUP (query
// heads of a key head), SUB (neighbours whose best is kept).

// Steps of the 16-bit score in one unit of score; 0 where the range is not usable (as in arithmetic/triton.py).
__device__ __forceinline__ float units_per_score(float norm_q, float norm_k) {
    const float largest = norm_q * norm_k * 1.001f;
    return largest > SMALLEST && largest < LARGEST ? UNITS / largest : 0.0f;
}

constexpr int QUARTER = DIM / 4, WORDS = DIM / 16, PARTS = GROUP > 4 ? 2 : 1;

// 16-bit scores [rows, padded] and the best of every SUB neighbours, of groups of 128 tokens that share their steps; one
// warp a group. The query, times the steps, is split into two 8-bit parts, which are the columns of an exact product. Whole
// blocks are written: what of them a row does not see, or has no code, gets 0.
extern "C" __global__ void __launch_bounds__(128, 4) score_codes(
    const void* q, const char* codes, const char* scales, const float* norm, const float* residual, const float* steps,
    const int* rows, u16* fast, u16* best, float* limits,
    int heads, int kv_heads, int padded, int n, int k_eff, int in_full, int sinks, int recent, int q_b, int q_h,
    int codes_b, int codes_h, int codes_n, int scales_b, int scales_h, int scales_n, double relative, double split) {
    const int lane = threadIdx.x % 32, t = lane % 4, row = lane / 4;
    const int kv = blockIdx.y, b = kv / kv_heads, g = kv % kv_heads;
    const Seen seen = Seen::of<true>(rows, b, Room{n, k_eff, in_full, sinks, recent});
    const int begin = seen.base / 128 + blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int end = whole_blocks(seen.stop) / 128;
    if (seen.k_eff == 0 || seen.start >= seen.stop || begin >= end) return;
    codes += ((i64)b * codes_b + (i64)g * codes_h) * E + t * 16;
    scales += ((i64)b * scales_b + (i64)g * scales_h) * E + t * 16;
    const i64 policy = read_once();
    const int stride = gridDim.x * (blockDim.x / 32);
    // Row r of product m is token 16 m + r.
    __shared__ __align__(16) u16 turn[4][PARTS * 4][128 + 8];
    constexpr int AHEAD = 4;  // products whose codes are asked for
    __shared__ uint4 ring[4][AHEAD][2][DIM / 64][32];
    auto& code = ring[threadIdx.x / 32];
    uint4 next_exponents[DIM / 64];
    auto fetch = [&](int group, int m) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < DIM / 64; i++) {
                const void* p = codes + (i64)(group * 128 + 16 * m + 8 * half + row) * codes_n * E + i * 64;
                request16(&code[m % AHEAD][half][i][lane], p, policy);
            }
        end_request();
    };
    auto fetch_exponents = [&](int group) {
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) next_exponents[i] = load16(scales + (i64)group * scales_n * E + i * 64);
    };
    const int last = (seen.stop - 1) / 128;  // the last group that can be read
    fetch_exponents(min(begin, last));
#pragma unroll
    for (int m = 0; m < AHEAD; m++) fetch(min(begin, last), m);
    // The numbers of a lane: 16 of every 64, those at 16 t.
    float query[PARTS][QUARTER], coarse[PARTS], fine[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int h = p * 4 + row / 2;
        float square = 0.0f, most = 0.0f;
#pragma unroll
        for (int i = 0; i < QUARTER; i += E) {
            const int d = i / 16 * 64 + t * 16 + i % 16;
            if (h < GROUP) load_query(q, (i64)b * q_b + (i64)(g * GROUP + h) * q_h + d, 0, query[p] + i);
            float step[E];
#pragma unroll
            for (int e = 0; e < E; e += 4) *(float4*)(step + e) = *(const float4*)(steps + (i64)kv * DIM + d + e);
#pragma unroll
            for (int e = 0; e < E; e++) {
                if (h >= GROUP) query[p][i + e] = 0.0f;
                const float x = query[p][i + e];
                square += x * x;
                most = fmaxf(most, fabsf(x) * step[e]);
            }
        }
#pragma unroll
        for (int m = 1; m < 4; m *= 2) {
            square += __shfl_xor_sync(ALL, square, m);
            most = fmaxf(most, __shfl_xor_sync(ALL, most, m));
        }
        most = fmaxf(most, 1e-30f);
        const float units = units_per_score(sqrtf(square), norm[kv]), to = 127.0f / most;
        if (blockIdx.x == 0 && threadIdx.x < 32 && lane % 8 == 0 && h < GROUP) {
            // As _cut in triton.py: how far below the cut a key may be that is among the best, and one unit of score.
            const float norm_q = sqrtf(square) * 1.001f, coarser = units_per_score(norm_q, norm[kv]);
            const float error = norm_q * (residual[kv] + (float)relative * norm[kv]) + most * (float)split;
            float* to_row = limits + ((i64)b * heads + g * GROUP + h) * 2;
            to_row[0] = 2.0f * (error * coarser * 1.01f + 1.0f) + 1.0f, to_row[1] = coarser;
        }
#pragma unroll
        for (int i = 0; i < QUARTER; i++) query[p][i] *= to;
        // The results of a lane are those of head t of each part: its factors are at the lanes of rows 2 t.
        coarse[p] = __shfl_sync(ALL, units * (most / 127.0f), t * 8);
        fine[p] = __shfl_sync(ALL, units * (most / (127.0f * 254.0f)), t * 8);
    }
    for (int group = begin; group < end; group += stride) {
        const int first = group * 128 + row - seen.start;
        uint4 exponents[DIM / 64];
#pragma unroll
        for (int i = 0; i < DIM / 64; i++) exponents[i] = next_exponents[i];
        u32 part[PARTS][WORDS];
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
                    part[p][w] |= ((u32)(int)(row % 2 ? low : high) & 255) << (8 * i);
                }
            }
        }
        fetch_exponents(min(group + stride, last));
#pragma unroll
        for (int m = 0; m < 8; m++) {
            await<AHEAD - 1>();
            u32 a[2][WORDS];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < DIM / 64; i++) {
                    const uint4 w = code[m % AHEAD][half][i][lane];
                    a[half][4 * i] = w.x, a[half][4 * i + 1] = w.y, a[half][4 * i + 2] = w.z, a[half][4 * i + 3] = w.w;
                }
            fetch(min(m + AHEAD < 8 ? group : group + stride, last), (m + AHEAD) % 8);
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
                    if ((u32)(first + 16 * m + 8 * half) >= (u32)(seen.stop - seen.start)) place = 0;
                    turn[threadIdx.x / 32][p * 4 + t][16 * m + 8 * half + row] = (u16)place;
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const int h = p * 4 + t;
            const bool writes = h < GROUP;
            const i64 place = ((i64)b * heads + g * GROUP + h) * padded + group * 128 + 16 * row;
            const uint4* from = (const uint4*)&turn[threadIdx.x / 32][h][16 * row];
            const uint4 lower = from[0], upper = from[1];
            if (writes) {
                uint4* to = (uint4*)(fast + place);
                to[0] = lower, to[1] = upper;
            }
            const u32 packed[8] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
            u32 value[16];
#pragma unroll
            for (int i = 0; i < 16; i++) value[i] = (packed[i / 2] >> (16 * (i % 2))) & 65535;
#pragma unroll
            for (int s = 1; s < SUB && s < 16; s *= 2)
#pragma unroll
                for (int i = 0; i < 16; i += 2 * s) value[i] = max(value[i], value[i + s]);
            if (SUB > 16) value[0] = max(value[0], __shfl_xor_sync(ALL, value[0], 4));
            if (writes && (SUB <= 16 || row % 2 == 0))
#pragma unroll
                for (int i = 0; i < 16; i += SUB) best[place / SUB + i / SUB] = (u16)value[i];
        }
        __syncwarp();
    }
}
