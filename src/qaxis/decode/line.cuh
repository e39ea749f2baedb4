// What the score kernels leave of moments for choose.cu. cuda.py puts it before both where outputs are completed.
//
// A row's line is float32 [LINE]: of all keys of complete groups the sum of scores, and of their squares, the largest sum of
// values and of values times scores; then from VALUES on the
// sum of values, then from CROSS on that of values times scores.

constexpr int VALUES = 4, CROSS = VALUES + DIM_V, LINE = CROSS + DIM_V;

// How many keys these are: complete groups of 128 that the row sees. 0: nothing is put back.
struct Whole {
    int from, to;
    __device__ __forceinline__ explicit Whole(const Seen& seen) : from((seen.begin + 127) / 128 * 128), to(seen.end / 128 * 128) {}
    __device__ __forceinline__ int keys() const { return max(0, to - from); }
};
