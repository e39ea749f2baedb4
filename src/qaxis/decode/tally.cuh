// Counts of a row's keys by their score, which lead edge.cuh to the score that the k_eff-th best key has.
//
// Only what may lie near it is counted, as a warp's first keys tell. Whether enough were is seen from the counts, and whatever
// they say the choice is exact. Fast scores are 16-bit places; canonical ones are turned into such.

constexpr int SUB = 16;  // neighbours whose best fast score is kept, as candidates.cuh looks at it first
constexpr int PLACES = 65536, TALLY = 2048, EACH_TALLY = PLACES / TALLY;

// Steps of a place in one unit of score; 0 where the range is not usable (as in arithmetic/triton.py).
__device__ __forceinline__ float units_per_score(float norm_q, float norm_k) {
    const float largest = norm_q * norm_k * 1.001f;
    return largest > SMALLEST && largest < LARGEST && norm_q > SHORTEST ? UNITS / largest : 0.0f;
}

// A normal number is above it with probability `share`, to 5e-4.
__device__ __forceinline__ float normal_tail(float share) {
    const float t = sqrtf(-2.0f * logf(fminf(share, 1.0f - share)));
    const float z = t - (2.515517f + t * (0.802853f + t * 0.010328f)) / (1.0f + t * (1.432788f + t * (0.189269f + t * 0.001308f)));
    return share < 0.5f ? z : -z;
}

// What is counted: as many keys of a sample cost less than all would, and an atomic addition costs more than reading a key. The
// sample are runs of 16 keys, one of so many by turns, so that some are near every key.
struct Sample {
    int mask;     // of runs by turns
    float share;  // of the sample, from the highest on: more than are needed, as these do not lie evenly, or all of it
    __device__ __forceinline__ Sample(int needed, int keys) {
        mask = needed >= 4096 ? 7 : needed >= 2048 ? 3 : needed >= 1024 ? 1 : 0;
        share = fmaxf(4.0f * needed / max(keys, 1), 0.03125f);
    }
    __device__ __forceinline__ bool holds(int key) const { return ((key / 16 ^ key / 128) & mask) == 0; }
    // How many of the sample should reach the cut, if `needed` keys are to: somewhat more, for what fast scores are off by, and
    // three deviations.
    __device__ __forceinline__ int wanted(int needed) const {
        const float mean = (float)needed / (mask + 1), deviation = sqrtf(mean * mask / (mask + 1));
        return (int)ceilf(1.03f * mean + 3.0f * deviation) + 4;
    }
};

// Of a warp's first keys, the sums of places less 32768, of their squares, and how many there are.
struct Moments {
    float sum = 0.0f, square = 0.0f, many = 0.0f;
    __device__ __forceinline__ void add(float x) { sum += x, square += x * x, many += 1.0f; }
    __device__ __forceinline__ void add(const Moments& more) { sum += more.sum, square += more.square, many += more.many; }
    // Of the lanes whose numbers differ by multiples of `from`.
    __device__ __forceinline__ void gather(int from) {
#pragma unroll
        for (int m = 1; m < 32; m *= 2)
            if (m >= from) {
                sum += __shfl_xor_sync(ALL, sum, m);
                square += __shfl_xor_sync(ALL, square, m);
                many += __shfl_xor_sync(ALL, many, m);
            }
    }
    // The place above which that share lies.
    __device__ __forceinline__ float above(float share) const {
        if (share >= 1.0f) return 0.0f;
        const float mean = sum / fmaxf(many, 1.0f), variance = square / fmaxf(many, 1.0f) - mean * mean;
        return mean + normal_tail(share) * sqrtf(fmaxf(variance, 0.0f)) + 32768.0f;
    }
};
