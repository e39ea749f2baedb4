// What CUDA C++ has no words for: loads that say how they are to be cached, a matrix product, clusters, the clock.
//
// emulated.hpp has the same functions for a CPU. Put before canonical.cuh by compiler.py.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

__device__ __forceinline__ void halves_to_floats(u32 two, float& low, float& high) {
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
        : "=f"(low), "=f"(high) : "r"(two));
}
__device__ __forceinline__ u16 half_of(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 w;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(p));
    return w;
}
__device__ __forceinline__ uint2 load8(const void* p) {
    uint2 w;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(p));
    return w;
}

// For what is read once: half of it is the first to leave the L2 cache, where the scores are to stay. If all of it is, reading
// is slower where there is much more than fits.
__device__ __forceinline__ i64 read_once() {
    i64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 0.5;" : "=l"(policy));
    return policy;
}
// Asked for now, in shared memory some time after; a lane reads only what it asked for itself. Memory gives 128 bytes at once:
// where two requests are halves of them, the second finds its own in the L2 cache.
__device__ __forceinline__ void request16(uint4* to, const void* p, i64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(p), "l"(policy) : "memory");
}
__device__ __forceinline__ void end_request() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest `left` requests are there.
template <int left> __device__ __forceinline__ void await() { asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory"); }

// c += a b with signed bytes: a [16, 32] by rows, b [32, 8] by columns, as the lanes of a warp hold them.
__device__ __forceinline__ void multiply(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if COMPLETED
// A product, rounded, then brought into 0..1; what is no number becomes 0.
__device__ __forceinline__ float product_in_unit(float a, float b) {
    float x;
    asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}
#endif

#if defined(CLUSTER)
__device__ __forceinline__ int cluster_rank() {
    if (CLUSTER == 1) return 0;
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync() {
    if (CLUSTER == 1) __syncthreads();
    else asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Shared memory of the program `rank` of the cluster, at the address that p is here.
__device__ __forceinline__ u32 remote(const void* p, int rank) {
    u32 a = (u32)__cvta_generic_to_shared(p);
    if (CLUSTER > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(a) : "r"(rank));
    return a;
}
__device__ __forceinline__ int pull(const int* p, int rank) {
    if (CLUSTER == 1) return *(volatile const int*)p;
    int x;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(remote(p, rank)) : "memory");
    return x;
}
__device__ __forceinline__ int2 pull2(const int* p, int rank) {
    if (CLUSTER == 1) return make_int2(((volatile const int*)p)[0], ((volatile const int*)p)[1]);
    int2 x;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(remote(p, rank)) : "memory");
    return x;
}
__device__ __forceinline__ void push(int* p, int rank, int x) {
    if (CLUSTER == 1) *p = x;
    else asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(remote(p, rank)), "r"(x) : "memory");
}
#if COMPLETED
// As cluster_sync in two: what lies between waits for nobody.
__device__ __forceinline__ void cluster_arrive() {
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    if (CLUSTER == 1) __syncthreads();
    else asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Bytes, 16 or a multiple, that are to be in the L2 cache soon.
__device__ __forceinline__ void want(const void* p, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "r"(bytes));
}
#endif
#endif

// Until all that was launched before has ended, and what it wrote can be read; at once, if this one was not launched early.
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may begin as far as it need not wait, if it is launched early.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ i64 nanoseconds() {
    i64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
