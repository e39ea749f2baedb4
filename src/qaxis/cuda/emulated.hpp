// A CPU in place of hardware.cuh: every thread of a kernel is a fiber, and they take turns wherever they wait for each other.
//
// Slow, and meant for checking what a kernel computes: the same text is compiled for a GPU. Shared memory starts as noise.
// Programs run one after another, those of a cluster together. emulator.py puts this first.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { int x, y, z; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// ---- fibers ---------------------------------------------------------------------------------------------------------

namespace emulated {

struct Fiber;
struct Barrier {
    int size = 0, count = 0;
    std::vector<Fiber*> waiting;
};
struct Warp {
    Barrier barrier;
    u64 slot[2][32];
};
struct Block {
    dim3 index;
    int rank = 0;
    std::vector<uint4> memory;
    Barrier barrier;
    std::vector<Warp> warps;
};
struct Fiber {
    void* stack_pointer = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    dim3 thread;
    int turn = 0;
    bool done = false;
};

inline Fiber* current;
inline std::deque<Fiber*> ready;
inline void* scheduler;
inline std::vector<Block> cluster;
inline Barrier cluster_barrier;
inline dim3 block_size, grid_size;
inline void (*run_kernel)();

#if defined(__x86_64__)
// Saves what a call must keep, changes stacks, and returns there.
asm(R"(
    .text
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "emulated.hpp changes stacks on x86-64 only"
#endif
extern "C" void emulated_switch(void** save, void* load) __attribute__((visibility("hidden")));

inline void yield() { emulated_switch(&current->stack_pointer, scheduler); }

inline void wait(Barrier& b) {
    if (++b.count < b.size) {
        b.waiting.push_back(current);
        yield();
        return;
    }
    b.count = 0;
    ready.insert(ready.end(), b.waiting.begin(), b.waiting.end());
    b.waiting.clear();
}

// What every lane of the warp brought along.
inline const u64* exchange(u64 mine) {
    // Two sets in turn: nobody can be two exchanges ahead.
    u64* slots = current->warp->slot[current->turn ^= 1];
    slots[current->thread.x % 32] = mine;
    wait(current->warp->barrier);
    return slots;
}
template <class T> u64 bits_of(T x) {
    u64 bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return bits;
}
template <class T> T from_bits(u64 bits) {
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

inline void start() {
    run_kernel();
    current->done = true;
    yield();
}

inline void run_cluster(int first, int y, int programs, int dynamic) {
    const int threads = block_size.x;
    constexpr size_t STACK = 1 << 16;
    static std::vector<char*> stacks;
    static std::vector<Fiber> fibers;
    while ((int)stacks.size() < programs * threads) stacks.push_back((char*)std::aligned_alloc(64, STACK));
    fibers.assign(programs * threads, Fiber());
    cluster.assign(programs, Block());
    cluster_barrier = Barrier();
    cluster_barrier.size = programs * threads;
    for (int p = 0; p < programs; p++) {
        Block& block = cluster[p];
        block.index = {first + p, y, 0}, block.rank = p;
        block.memory.assign(dynamic / 16 + 1, uint4{0xcdcdcdcd, 0x7fc0beef, 0x80000001, 0xcdcdcdcd});
        block.barrier.size = threads;
        block.warps.resize(threads / 32);
        for (int t = 0; t < threads; t++) {
            block.warps[t / 32].barrier.size = 32;
            Fiber& f = fibers[p * threads + t];
            f.block = &block, f.warp = &block.warps[t / 32], f.thread = {t, 0, 0};
            void** top = (void**)(stacks[p * threads + t] + STACK);
            top[-1] = nullptr, top[-2] = (void*)start;
            for (int i = 3; i <= 8; i++) top[-i] = nullptr;
            f.stack_pointer = top - 8;
            ready.push_back(&f);
        }
    }
    while (!ready.empty()) {
        current = ready.front();
        ready.pop_front();
        emulated_switch(&scheduler, current->stack_pointer);
    }
    for (const Fiber& f : fibers)
        if (!f.done) {
            std::fprintf(stderr, "emulated.hpp: thread %d of program %d waits for ever\n", f.thread.x, f.block->index.x);
            std::abort();
        }
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block->index)
#define blockDim emulated::block_size
#define gridDim emulated::grid_size
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define CLUSTERED
#define DYNAMIC_SHARED(name) char* name = (char*)emulated::current->block->memory.data()

// ---- what CUDA C++ has ----------------------------------------------------------------------------------------------

inline void __syncthreads() { emulated::wait(emulated::current->block->barrier); }
inline void __syncwarp() { emulated::wait(emulated::current->warp->barrier); }
template <class T> T __shfl_sync(u32, T x, int lane) { return emulated::from_bits<T>(emulated::exchange(emulated::bits_of(x))[lane & 31]); }
template <class T> T __shfl_xor_sync(u32, T x, int m) { return __shfl_sync(0, x, (threadIdx.x ^ m) & 31); }
template <class T> T __shfl_up_sync(u32, T x, int o) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(0, x, lane >= o ? lane - o : lane);
}
template <class T> T __shfl_down_sync(u32, T x, int o) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(0, x, lane + o < 32 ? lane + o : lane);
}
inline u32 __ballot_sync(u32, bool is) {
    const u64* all = emulated::exchange(is);
    u32 bits = 0;
    for (int i = 0; i < 32; i++) bits |= (u32)all[i] << i;
    return bits;
}
inline bool __all_sync(u32, bool is) { return __ballot_sync(0, is) == 0xffffffffu; }
template <class T, class F> T reduced(T x, F f) {
    const u64* all = emulated::exchange(emulated::bits_of(x));
    T y = emulated::from_bits<T>(all[0]);
    for (int i = 1; i < 32; i++) y = f(y, emulated::from_bits<T>(all[i]));
    return y;
}
template <class T> T __reduce_add_sync(u32, T x) { return reduced(x, [](T a, T b) { return a + b; }); }
template <class T> T __reduce_min_sync(u32, T x) { return reduced(x, [](T a, T b) { return a < b ? a : b; }); }
template <class T> T __reduce_max_sync(u32, T x) { return reduced(x, [](T a, T b) { return a > b ? a : b; }); }

template <class T, class F> T changed(T* p, F f) {
    const T old = *p;
    *p = f(old);
    return old;
}
inline int atomicAdd(int* p, int x) { return changed(p, [=](int a) { return a + x; }); }
inline int atomicMin(int* p, int x) { return changed(p, [=](int a) { return a < x ? a : x; }); }
inline int atomicMax(int* p, int x) { return changed(p, [=](int a) { return a > x ? a : x; }); }
inline u32 atomicOr(u32* p, u32 x) { return changed(p, [=](u32 a) { return a | x; }); }

#define EMULATED_EXTREMES(T)                              \
    inline T min(T a, T b) { return a < b ? a : b; }      \
    inline T max(T a, T b) { return a > b ? a : b; }
EMULATED_EXTREMES(int)
EMULATED_EXTREMES(u32)
EMULATED_EXTREMES(i64)

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float_as_int(float x) { return emulated::from_bits<int>(emulated::bits_of(x)); }
inline u32 __float_as_uint(float x) { return emulated::from_bits<u32>(emulated::bits_of(x)); }
inline float __int_as_float(int x) { return emulated::from_bits<float>(emulated::bits_of(x)); }
inline float __uint_as_float(u32 x) { return emulated::from_bits<float>(emulated::bits_of(x)); }
inline int __float2int_rz(float x) { return (int)x; }
inline i64 __float2ll_rn(float x) { return std::llrint(x); }
inline float __ll2float_rn(i64 x) { return (float)x; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(i64 x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((u32)x); }
// Of both halves of a word.
template <class F> u32 halfwise(F f) {
    u32 x = 0;
    for (int shift = 0; shift < 32; shift += 16) x |= (u32)(u16)f(shift) << shift;
    return x;
}
inline u32 __vmaxs2(u32 a, u32 b) {
    return halfwise([=](int s) { return std::max((int16_t)(a >> s), (int16_t)(b >> s)); });
}
inline u32 __vminu2(u32 a, u32 b) {
    return halfwise([=](int s) { return std::min((u16)(a >> s), (u16)(b >> s)); });
}
inline u32 __vmaxu2(u32 a, u32 b) {
    return halfwise([=](int s) { return std::max((u16)(a >> s), (u16)(b >> s)); });
}
inline u32 __viaddmin_u16x2(u32 a, u32 b, u32 c) {
    return halfwise([=](int s) { return std::min((u16)((a >> s) + (b >> s)), (u16)(c >> s)); });
}
inline u32 __viaddmin_s16x2_relu(u32 a, u32 b, u32 c) {
    return halfwise([=](int s) { return std::max(0, (int)std::min((int16_t)((a >> s) + (b >> s)), (int16_t)(c >> s))); });
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = ((u64)b << 32) | a;
    u32 x = 0;
    for (int i = 0; i < 4; i++) x |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return x;
}

// ---- what hardware.cuh has ------------------------------------------------------------------------------------------

inline float float_of_half(u16 bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return (float)x;
}
inline void halves_to_floats(u32 two, float& low, float& high) { low = float_of_half((u16)two), high = float_of_half((u16)(two >> 16)); }
inline u16 half_of(float x) {
    const _Float16 y = (_Float16)x;
    u16 bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
inline uint4 load16(const void* p) { return *(const uint4*)p; }
inline uint2 load8(const void* p) { return *(const uint2*)p; }
inline i64 read_once() { return 0; }
inline void request16(uint4* to, const void* p, i64) { *to = load16(p); }
inline void end_request() {}
template <int left> void await() {}

inline void multiply(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    u64 all[3][32];
    const u64 mine[3] = {a0 | (u64)a1 << 32, a2 | (u64)a3 << 32, b0 | (u64)b1 << 32};
    for (int i = 0; i < 3; i++) std::memcpy(all[i], emulated::exchange(mine[i]), sizeof(all[i]));
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    auto byte = [](u64 w, int shift) { return (int)(signed char)(w >> shift & 255); };
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) {
            const int lane = k % 16 / 4, shift = 8 * (k % 4), upper = i < 2 ? 0 : 32;
            const int a = byte(all[k / 16][row * 4 + lane], shift + upper);
            const int b = byte(all[2][(column + i % 2) * 4 + lane], shift + (k < 16 ? 0 : 32));
            c[i] += a * b;
        }
}

#if COMPLETED
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float product_in_unit(float a, float b) {
    const float x = a * b;
    return x > 0.0f ? std::min(x, 1.0f) : 0.0f;
}
#endif

inline int cluster_rank() { return emulated::current->block->rank; }
inline void cluster_sync() { emulated::wait(emulated::cluster_barrier); }
template <class T> T* elsewhere(T* p, int rank) {
    const char* here = (const char*)emulated::current->block->memory.data();
    return (T*)((char*)emulated::cluster[rank].memory.data() + ((const char*)p - here));
}
inline int pull(const int* p, int rank) { return *elsewhere(p, rank); }
inline int2 pull2(const int* p, int rank) { return {elsewhere(p, rank)[0], elsewhere(p, rank)[1]}; }
inline void push(int* p, int rank, int x) { *elsewhere(p, rank) = x; }
#if COMPLETED
inline void cluster_arrive() {}
inline void cluster_wait() { cluster_sync(); }
#endif
inline void await_previous() {}
inline void let_next_begin() {}
inline i64 nanoseconds() { return 0; }

// ---- launching ------------------------------------------------------------------------------------------------------

namespace emulated {

inline void* kernel;
inline void** arguments;

template <class... A, size_t... I> void call(void (*f)(A...), std::index_sequence<I...>) {
    f(*(std::decay_t<A>*)arguments[I]...);
}
template <class... A> void launch(void (*f)(A...), int x, int y, int threads, int programs, int dynamic, void** args) {
    kernel = (void*)f, arguments = args;
    block_size = {threads, 1, 1}, grid_size = {x, y, 1};
    run_kernel = [] { call((void (*)(A...))kernel, std::index_sequence_for<A...>()); };
    for (int j = 0; j < y; j++)
        for (int i = 0; i < x; i += programs) run_cluster(i, j, programs, dynamic);
}

}  // namespace emulated
