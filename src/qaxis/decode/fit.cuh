// Moments along a row's query (attention/completion.py, along), by one program of 128 threads for all heads of a group. It is a
// program of the score kernels, which wait for memory: cuda.py puts it before them where outputs are completed.
//
// Sums along the query have the order of a score: a lane's neighbouring numbers, then neighbouring lanes (rule 2). A warp asks
// for DEEP rows of products a lane, and for the next ones once these are in numbers of every head.

constexpr int NUMBERS = DIM > 128 ? DIM / 32 : 4;  // of a row of products, a lane's
constexpr int LANES_FIT = DIM / NUMBERS, ROWS_FIT = 32 / LANES_FIT, DEEP_FIT = 64 / NUMBERS;
constexpr int AT_ONCE = DEEP_FIT * ROWS_FIT, WIDTH = DIM_V + DIM;  // rows of products: a warp's at once, all

// In memory that the score kernels have for keys on their way.
struct FitSpace {
    float query[GROUP][DIM], cross[GROUP][WIDTH];
};

// The sum over all numbers of a row, from a lane's.
__device__ __forceinline__ float sum_of_row(float (&x)[NUMBERS]) {
    tree<NUMBERS>(x);
#pragma unroll
    for (int m = 1; m < LANES_FIT; m *= 2) x[0] = __fadd_rn(x[0], __shfl_xor_sync(ALL, x[0], m));
    return __fadd_rn(x[0], 0.0f);
}

// Sums of products with the queries: of every row of `products`, that for every head.
__device__ __forceinline__ void cross_products(const float* products, const void* q, i64 q_of, int q_h, FitSpace& s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES_FIT, warps = blockDim.x / 32;
    constexpr int HAS = DEEP_FIT > LANES_FIT ? DEEP_FIT / LANES_FIT : 1;
    const int first = first_sum<DEEP_FIT, LANES_FIT>(lane);
    const bool writes = writes_sum<DEEP_FIT, LANES_FIT>(lane);
    uint4 raw[DEEP_FIT][NUMBERS / 4];
    auto row_of = [&](int from, int u) { return from + u * ROWS_FIT + lane / LANES_FIT; };
    auto fetch = [&](int from) {
#pragma unroll
        for (int u = 0; u < DEEP_FIT; u++)
#pragma unroll
            for (int i = 0; i < NUMBERS / 4; i++)
                raw[u][i] = load16(products + (i64)min(row_of(from, u), WIDTH - 1) * DIM + part * NUMBERS + 4 * i);
    };
    int from = warp * AT_ONCE;
    if (from < WIDTH) fetch(from);
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * DIM / E; i += blockDim.x)
        load_query(q, q_of + (i64)(i / (DIM / E)) * q_h, i % (DIM / E), &s.query[0][0] + i * E);
    __syncthreads();
#pragma unroll 1
    for (; from < WIDTH; from += warps * AT_ONCE) {
#pragma unroll 1
        for (int h = 0; h < GROUP; h++) {
            float x[NUMBERS], sum[DEEP_FIT];
#pragma unroll
            for (int e = 0; e < NUMBERS; e++) x[e] = s.query[h][part * NUMBERS + e];
#pragma unroll
            for (int u = 0; u < DEEP_FIT; u++) {
                float y[NUMBERS];
#pragma unroll
                for (int i = 0; i < NUMBERS / 4; i++) {
                    y[4 * i] = __fmul_rn(x[4 * i], __uint_as_float(raw[u][i].x));
                    y[4 * i + 1] = __fmul_rn(x[4 * i + 1], __uint_as_float(raw[u][i].y));
                    y[4 * i + 2] = __fmul_rn(x[4 * i + 2], __uint_as_float(raw[u][i].z));
                    y[4 * i + 3] = __fmul_rn(x[4 * i + 3], __uint_as_float(raw[u][i].w));
                }
                tree<NUMBERS>(y);
                sum[u] = y[0];
            }
            tree_over_lanes<DEEP_FIT, LANES_FIT>(sum, lane);
#pragma unroll
            for (int i = 0; i < HAS; i++) {
                const int row = row_of(from, first + i);
                if (writes && row < WIDTH) s.cross[h][row] = __fadd_rn(sum[i], 0.0f);
            }
        }
        if (from + warps * AT_ONCE < WIDTH) fetch(from + warps * AT_ONCE);
    }
}

// Lines of the GROUP rows from first_row on, which share `products [kv, WIDTH, DIM]` and `sums [kv, WIDTH]` of `count` keys. Not
// linear: products are not read, and what comes of them is 0, as there is no slope then.
__device__ __forceinline__ void fit(
    const void* q, i64 q_of, int q_h, const float* products, const float* sums, int kv, float* line, int first_row, int count,
    int linear, FitSpace& s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES_FIT, warps = blockDim.x / 32;
    products += (i64)kv * WIDTH * DIM, sums += (i64)kv * WIDTH, line += (i64)first_row * LINE;
    if (count == 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP * LINE; i += blockDim.x) line[i] = 0.0f;
        return;
    }
    if (linear) {
        cross_products(products, q, q_of, q_h, s);
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP * DIM / E; i += blockDim.x)
            load_query(q, q_of + (i64)(i / (DIM / E)) * q_h, i % (DIM / E), &s.query[0][0] + i * E);
    }
    __syncthreads();
#pragma unroll 1
    for (int h = warp; h < GROUP; h += warps) {
        float x[NUMBERS], y[NUMBERS];
#pragma unroll
        for (int e = 0; e < NUMBERS; e++) {
            const int d = part * NUMBERS + e;
            x[e] = __fmul_rn(s.query[h][d], sums[DIM_V + d]);
            y[e] = linear ? __fmul_rn(s.query[h][d], s.cross[h][DIM_V + d]) : 0.0f;
        }
        const float total = sum_of_row(x), second = sum_of_row(y);
        u32 most = 0, most_cross = 0;
        for (int d = lane; d < DIM_V; d += 32) {
            most = max(most, __float_as_uint(sums[d]) & 0x7fffffffu);
            if (linear) most_cross = max(most_cross, __float_as_uint(s.cross[h][d]) & 0x7fffffffu);
        }
        // As integers, of which no number is the largest.
        most = __reduce_max_sync(ALL, most), most_cross = __reduce_max_sync(ALL, most_cross);
        if (lane == 0) {
            line[h * LINE] = total, line[h * LINE + 1] = second;
            line[h * LINE + 2] = __uint_as_float(most), line[h * LINE + 3] = __uint_as_float(most_cross);
        }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * DIM_V; i += blockDim.x) {
        const int h = i / DIM_V, d = i % DIM_V;
        line[h * LINE + VALUES + d] = sums[d];
        line[h * LINE + CROSS + d] = linear ? s.cross[h][d] : 0.0f;
    }
}
