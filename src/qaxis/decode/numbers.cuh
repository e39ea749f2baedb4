// Keys and values as they lie: in full, or as an 8-bit cache. cuda.py puts it before choose.cu.

static_assert(!STORED || ELEM == 2);

// A tensor, or codes, scales, and first and newest tokens in full (storage/side.py). Strides in units of E numbers.
struct Side {
    const void *rows, *scales, *first, *newest;
    int rows_b, rows_h, rows_n, scales_b, scales_h, scales_n, first_b, first_h, first_n, newest_b, newest_h, newest_n;
};
#define SIDE(p)                                                                                                 \
    const void *p##_rows, const void *p##_scales, const void *p##_first, const void *p##_newest, int p##_rows_b, \
        int p##_rows_h, int p##_rows_n, int p##_scales_b, int p##_scales_h, int p##_scales_n, int p##_first_b,   \
        int p##_first_h, int p##_first_n, int p##_newest_b, int p##_newest_h, int p##_newest_n
#define AS_SIDE(p)                                                                                                  \
    Side{p##_rows, p##_scales, p##_first, p##_newest, p##_rows_b, p##_rows_h, p##_rows_n, p##_scales_b, p##_scales_h, \
         p##_scales_n, p##_first_b, p##_first_h, p##_first_n, p##_newest_b, p##_newest_h, p##_newest_n}

// E codes, and the exponents of their scales, as numbers.
__device__ __forceinline__ void dequantize(uint4 w, float* x) {
    const u32 code[2] = {w.x ^ 0x80808080u, w.y ^ 0x80808080u}, exponent[2] = {w.z ^ 0x80808080u, w.w ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < E; i++) {
        // A code and a power of two, each moved into the bits of a float; the product is exact.
        const float c = __uint_as_float(__byte_perm(code[i / 4], 0x4b000000u, 0x7650 + i % 4));
        const u32 e = __byte_perm(exponent[i / 4], 0, 0x0444 + ((i % 4) << 12)) >> 1;
        x[i] = __fmul_rn(__fsub_rn(c, 8388736.0f), __uint_as_float(e - (1u << 23)));
    }
}

struct Rows {  // one KV head of a side
    const char *rows, *scales, *first, *newest;
    int rows_n, scales_n, first_n, newest_n, whole, sinks;

    // Tokens count from `base`, and before `whole` have codes.
    __device__ Rows(const Side& s, int b, int g, int base, int whole, int in_full) : whole(whole), sinks(in_full - base) {
        const int item = STORED ? E : 16;
        rows_n = s.rows_n, scales_n = s.scales_n, first_n = s.first_n, newest_n = s.newest_n;
        rows = (const char*)s.rows + ((i64)b * s.rows_b + (i64)g * s.rows_h + (i64)base * rows_n) * item;
        scales = (const char*)s.scales + ((i64)b * s.scales_b + (i64)g * s.scales_h + (i64)(base / 128) * scales_n) * E;
        first = (const char*)s.first + ((i64)b * s.first_b + (i64)g * s.first_h + (i64)base * first_n) * 16;
        newest = (const char*)s.newest + ((i64)b * s.newest_b + (i64)g * s.newest_h) * 16;
    }
    __device__ __forceinline__ bool coded(int j) const { return STORED && j >= sinks && j < whole; }
    // Numbers E * part and following of token j, as they are stored. PLAIN: the token is known to be coded.
    template <bool PLAIN> __device__ __forceinline__ uint4 load(int j, int part) const {
        if constexpr (!STORED) return load16(rows + ((i64)j * rows_n + part) * 16);
        const char* lower = rows + ((i64)j * rows_n + part) * E;
        const char* upper = scales + ((i64)(j >> 7) * scales_n + part) * E;
        if (!PLAIN && !coded(j)) {
            // The two halves of 16 bytes instead of codes and exponents: no other loads, so that many are in flight.
            lower = (j < sinks ? first + (i64)j * first_n * 16 : newest + (i64)(j - whole) * newest_n * 16) + part * 16;
            upper = lower + 8;
        }
        const uint2 a = load8(lower), b = load8(upper);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    // As numbers (rule 1).
    template <bool PLAIN> __device__ __forceinline__ void numbers(int j, uint4 w, float* x) const {
        if (STORED && (PLAIN || coded(j))) dequantize(w, x);
        else widen(w, x);
    }
#if COMPLETED
    // Token j will be read: DIM_V numbers, unless it is one of a cache's few in full.
    __device__ __forceinline__ void ask_for(int j) const {
        if constexpr (!STORED) {
            want(rows + (i64)j * rows_n * 16, DIM_V / E * 16);
        } else if (coded(j)) {
            want(rows + (i64)j * rows_n * E, DIM_V);
            want(scales + (i64)(j >> 7) * scales_n * E, DIM_V);
        }
    }
#endif
};
