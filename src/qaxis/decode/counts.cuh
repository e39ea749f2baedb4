// Sums over lanes, warps and programs; bins of scores, and the cut from which on keys are candidates. cuda.py puts it before choose.cu.

constexpr int WARPS = THREADS / 32, BINS = 1024;

// Of x over the lanes from this one on.
__device__ __forceinline__ int sum_from(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int more = __shfl_down_sync(ALL, x, o);
        if (lane + o < 32) x += more;
    }
    return x;
}

// Of a value of every warp: the sum over the warps before this one, and over all.
struct Sums { int before, all; };
__device__ __forceinline__ Sums over_warps(const int* values, int lane, int warp) {
    const int mine = lane < WARPS ? values[lane] : 0, upto = sum_upto(mine, lane);
    return {__shfl_sync(ALL, upto - mine, warp), __shfl_sync(ALL, upto, 31)};
}

// Places in a list for so many of this lane, in the order of the lanes: one atomic addition a warp.
__device__ __forceinline__ int reserve(int* length, int mine, int lane) {
    const int upto = sum_upto(mine, lane);
    int at = 0;
    if (lane == 31) at = atomicAdd(length, upto);
    return __shfl_sync(ALL, at, 31) + upto - mine;
}

// In place: from the counts of all blocks to the sums of those before each. `counts` is this program's copy.
__device__ __forceinline__ void sums_before(int* counts, int blocks, int* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
#pragma unroll 1
    for (int offset = 0; offset < blocks; offset += THREADS) {
        const int i = offset + threadIdx.x, mine = i < blocks ? counts[i] : 0;
        int upto = sum_upto(mine, lane);
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
        const Sums sums = over_warps(scratch, lane, warp);
        if (i < blocks) counts[i] = before + sums.before + upto - mine;
        before += sums.all;
        __syncthreads();
    }
}

// This thread's EACH neighbouring counts of COUNT, summed over PROGRAMS of the cluster: its own alone if that is one.
template <int COUNT, int PROGRAMS, int EACH>
__device__ __forceinline__ void sum_counts(const int* counts, int (&c)[EACH]) {
    constexpr int AT_ONCE = EACH % 2 == 0 ? 2 : 1;
    if (threadIdx.x >= COUNT) return;
#pragma unroll
    for (int r = 0; r < PROGRAMS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i += AT_ONCE) {
            const int* from = counts + threadIdx.x * EACH + i;
            if constexpr (AT_ONCE == 2) {
                const int2 two = PROGRAMS == 1 ? make_int2(from[0], from[1]) : pull2(from, r);
                c[i] += two.x, c[i + 1] += two.y;
            } else {
                c[i] += PROGRAMS == 1 ? from[0] : pull(from, r);
            }
        }
}

// The highest bin at or above which there are so many as are needed (-1: there is none), how many are above it and
// inside.
struct Found { int bin, above, inside; };
template <int COUNT, int PROGRAMS>
__device__ __forceinline__ Found find_bin(const int* counts, int needed, int* scratch) {
    constexpr int EACH = COUNT / THREADS > 0 ? COUNT / THREADS : 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c[EACH] = {}, sum = 0;
    sum_counts<COUNT, PROGRAMS>(counts, c);
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += c[i];
    int from_here = sum_from(sum, lane);
    if (lane == 0) scratch[warp] = from_here;
    if (threadIdx.x == 0) scratch[WARPS] = -1, scratch[WARPS + 1] = 0, scratch[WARPS + 2] = 0;
    __syncthreads();
    const Sums sums = over_warps(scratch, lane, warp);
    from_here += sums.all - sums.before - scratch[warp];
    int above = from_here - sum;
    if (above < needed && needed <= from_here) {
        int bin = -1, inside = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--) {
            if (bin < 0 && above + c[i] >= needed) bin = threadIdx.x * EACH + i, inside = c[i];
            if (bin < 0) above += c[i];
        }
        scratch[WARPS] = bin, scratch[WARPS + 1] = above, scratch[WARPS + 2] = inside;
    }
    __syncthreads();
    const Found found = {scratch[WARPS], scratch[WARPS + 1], scratch[WARPS + 2]};
    __syncthreads();
    return found;
}

// Which of BINS bins above the score `base`, finer the nearer they are to it: the k_eff-th best key is near. Monotone.
struct Bins {
    static constexpr int FINE = 6;  // bits of bins in an octave
    float base, per;                // `per` of a score is the whole range, or 0: all are in one bin
    __device__ __forceinline__ bool counts(float score) const { return per == 0.0f || score >= base; }
    __device__ __forceinline__ int of(float score) const {
        if (per == 0.0f) return 0;
        const int octaves = BINS >> FINE, x = __float_as_int((score - base) * per) >> (23 - FINE);
        return min(max(x - ((127 - octaves) << FINE), 0), BINS - 1);
    }
};

// Fast scores are 16-bit places with a proven error, made from codes, or canonical words.
#if CODED
typedef u16 Fast;
#else
typedef int Fast;
#endif

// The place from which on canonical scores are of interest: a key that is no candidate is canonically below it.
struct Cut {
    float place, units;
    __device__ __forceinline__ bool usable() const { return place > 0.0f && units > 0.0f; }
    // The least fast score of a candidate, where places are off by so much: who is below it is canonically a whole place below.
    __device__ __forceinline__ int least(float off) const {
        if (!usable()) return CODED ? 0 : NONE + 1;
        return CODED ? max((int)floorf(place - off), 0) : word_of(bins().base);
    }
    __device__ __forceinline__ Bins bins() const {
        return {usable() ? (place - 32768.0f) / units : 0.0f, usable() ? units / PLACES : 0.0f};
    }
};
