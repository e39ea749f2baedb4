// What the score kernels leave of a fit for choose.cu. cuda.py puts it before both where outputs are completed.
//
// A row's line is float32 [LINE]: the mean score, then from VALUE on the mean value, then from SLOPE on the slope.

constexpr int VALUE = 4, SLOPE = VALUE + DIM_V, LINE = SLOPE + DIM_V;

// How many keys a row's line is fitted to: complete groups of 128 that it sees. 0: nothing is put back.
__device__ __forceinline__ int fitted_keys(const Seen& seen) { return max(0, seen.end / 128 - (seen.begin + 127) / 128) * 128; }
