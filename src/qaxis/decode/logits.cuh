// From scores to logits and weights. cuda.py puts it before choose.cu.

// Number `at` of sink logits: float32, float16, bfloat16, float64.
__device__ __forceinline__ float sink_at(const void* sinks, int kind, i64 at) {
    if (kind == 3) return (float)((const double*)sinks)[at];
    if (kind == 0) return ((const float*)sinks)[at];
    const u32 bits = ((const u16*)sinks)[at];
    float half, none;
    halves_to_floats(bits, half, none);
    return kind == 1 ? half : __uint_as_float(bits << 16);
}

// From scores to logits, as attention/reference.py has it. `factor` turns what the softmax takes into powers of two.
struct Logits {
    float factor, scale, cap, sink;
    bool has_sink;
    __device__ __forceinline__ float of(float score) const {
        if constexpr (LOGITS == 0) return score;
        const float x = __fmul_rn(score, scale);
        if constexpr (LOGITS < 2) return x;
        const float y = __fdiv_rn(x, cap);
        const float e = exp2_canonical(__fmul_rn(__int_as_float(__float_as_int(y) & 0x7fffffff), -2.0f * factor));
        const float tanh = __fdiv_rn(__fsub_rn(1.0f, e), __fadd_rn(1.0f, e));
        return __fmul_rn(__int_as_float(__float_as_int(tanh) | (__float_as_int(y) & 0x80000000)), cap);
    }
    __device__ __forceinline__ float power(float logit, float top) const {
        return exp2_canonical(__fmul_rn(__fsub_rn(logit, top), factor));
    }
};
