// Stage 3, the edge. cuda.py puts it before choose.cu.
//
// Keys that are no candidates are canonically below the base of the bins. So if enough candidates are not, the best are among
// them (the certificate), and the k_eff-th of them is in the bin at the edge.

struct Edge {
    Found at;
    int found;  // candidates of this program
    bool sure;
};

// Where nothing is to be chosen, as all keys are kept or all but those that are kept in any case are not.
__device__ __forceinline__ bool takes_all(const Program& p) { return p.ranked() >= p.last - p.first; }

template <class Sync>
__device__ __forceinline__ Edge find_edge(
    const Program& p, const Scorer& scorer, const float* off_of, const Cut& cut, int* count, Sync sync) {
    Shared& s = p.s;
    clear(p);
    __syncthreads();
    const int found = list_candidates(p, off_of, cut, count);
    mark(p, 2);
    score_candidates(p, scorer, cut.bins(), found);
    mark(p, 3);
    sync(found);
    mark(p, 4);
    bool sure = true;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) sure &= pull(&s.full, r) == 0;
    Found at = find_bin<BINS, CLUSTER>(s.counts, p.ranked(), s.scratch);
    if (FORCED && p.ranked() == 0) at.bin = BINS, at.above = at.inside = 0;
    else if (takes_all(p)) at.bin = -1, at.above = p.ranked(), at.inside = 0;
    else sure &= at.bin >= 0 && at.inside <= NEAR;
    mark(p, 5);
    return {at, found, sure};
}

// The cut that the counts of the score kernels lead to. 0: all are candidates; -1: too few were counted.
__device__ __forceinline__ float counted_cut(const Program& p, const int* tally) {
    Shared& s = p.s;
    if (takes_all(p) || p.stop <= p.start) return 0.0f;
#pragma unroll 1
    for (int i = p.tid * 4; i < TALLY; i += THREADS * 4) *(int4*)(s.counts + i) = *(const int4*)(tally + (i64)p.row * TALLY + i);
    __syncthreads();
    const int needed = p.ranked();
    const Sample sample(needed, p.stop - p.start);
    const Found at = find_bin<TALLY, 1>(s.counts, sample.wanted(needed), s.scratch);
    if (at.bin > 0) return (float)(at.bin * EACH_TALLY);
    // The lowest place: where all keys were counted and some are needed that have no fast score.
    return sample.share >= 1.0f ? 1.0f : CODED ? -1.0f : 0.0f;
}

// Counts, over the cluster, own keys [start, stop) by a byte of the least place that they surely have, of those that have `above`
// as upper bytes.
__device__ __forceinline__ Found find_byte(const Program& p, const float* off_of, int needed, int shift, int above) {
    Shared& s = p.s;
    cluster_sync();
#pragma unroll 1
    for (int i = p.tid; i < 256; i += THREADS) s.counts[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
        const int j = p.dealt<BLOCK>(i);
        const int w = j >= p.start && j < p.stop ? (int)floorf(p.fast[j] - off_of[j / 128]) : 0;
        if (w > 0 && w >> (shift + 8) == above) atomicAdd(&s.counts[w >> shift & 255], 1);
    }
    cluster_sync();
    return find_bin<256, CLUSTER>(s.counts, needed, s.scratch);
}

// Where that failed: a place that k_eff keys surely reach.
__device__ __forceinline__ Cut find_cut(const Program& p, const float* off_of, float units) {
    const Found upper = find_byte(p, off_of, p.ranked(), 8, 0);
    const Found lower = find_byte(p, off_of, p.ranked() - upper.above, 0, max(upper.bin, 0));
    cluster_sync();
    const bool found = upper.bin >= 0 && lower.bin >= 0;
    return {found ? (float)(upper.bin << 8 | lower.bin) - 1.0f : 0.0f, units};
}
