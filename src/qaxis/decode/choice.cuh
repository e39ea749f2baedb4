// Stage 4, the choice. cuda.py puts it before choose.cu.
//
// A candidate in a bin above the edge, the bin of the k_eff-th, is among the best, as bins are monotone; one below it
// is not. Those at the edge are few and compared with each other (rule 4). Keys that are kept in any case are like those
// above. The rank of a chosen key is the number of chosen keys at lower positions: those of earlier blocks are counted, those
// of its own block have bits.

// Of every program, the chosen keys of its blocks.
__device__ __forceinline__ void gather_counts(const Program& p) {
#pragma unroll 1
    for (int i = p.tid; i < p.blocks; i += THREADS) p.before[i] = pull(p.own_count + i / CLUSTER, i % CLUSTER);
}
// The same, told instead of asked for: there once the cluster has waited.
__device__ __forceinline__ void tell_counts(const Program& p) {
    __syncthreads();
#pragma unroll 1
    for (int i = p.tid; i < p.own; i += THREADS) {
        const int block = i * CLUSTER + p.rank;
        if (block >= p.blocks) continue;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) push(p.before + block, r, p.own_count[i]);
    }
    if (p.tid < CLUSTER) push(p.s.near + p.rank, p.tid, p.s.nears);
}

// A chosen key, once `before` has the sums before each block, to its rank. Winners have no bit.
__device__ __forceinline__ void send(const Program& p, int j, int w, int winners) {
    const int at = j % BLOCK / 32;
    const u32* bits = p.bits_of(j);
    int place = p.before[j / BLOCK] + __popc(bits[at] & ((1u << (j % 32)) - 1));
#pragma unroll
    for (int i = 0; i < WORDS; i++) place += i < at ? __popc(bits[i]) : 0;
#pragma unroll 1
    for (int i = 0; i < winners; i++) place += p.s.winner[i] < j;
    // The span is a power of two.
    const int at_program = place & (p.span() - 1), program = place >> (31 - __clz(p.span()));
    push(p.chosen_position + at_program, program, j);
    push(p.chosen + at_program, program, w);
}

// Bits for candidates above the edge; those near it are told to every program.
__device__ __forceinline__ void sort_out(const Program& p, const Bins& bins, int found, int edge) {
    Shared& s = p.s;
#pragma unroll 1
    for (int i = p.tid; i < found; i += THREADS) {
        const int j = p.position[i];
        const float score = score_of(p.value[i]);
        const int bin = p.forced(j) ? BINS + 1 : bins.counts(score) ? bins.of(score) : -1;
        if (bin > edge) {
            atomicOr(p.bits_of(j) + j % BLOCK / 32, 1u << (j % 32));
            atomicAdd(&p.own_count[p.own_block(j)], 1);
        }
        if (bin == edge) {
            const int at = atomicAdd(&s.nears, 1);
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                push(s.near_word + p.rank * NEAR + at, r, p.value[i]);
                push(s.near_position + p.rank * NEAR + at, r, j);
            }
        }
    }
}

// The `missing` best of the near ones (rule 4); every program finds them all.
__device__ __forceinline__ void find_winners(const Program& p, int missing) {
    Shared& s = p.s;
    const int* near = s.near;
#pragma unroll 1
    for (int i = p.tid; i < CLUSTER * NEAR; i += THREADS) {
        if (i % NEAR >= near[i / NEAR]) continue;
        const int w = s.near_word[i], j = s.near_position[i];
        int better = 0;
#pragma unroll 1
        for (int r = 0; r < CLUSTER; r++)
#pragma unroll 1
            for (int o = r * NEAR; o < r * NEAR + near[r]; o++)
                better += s.near_word[o] > w || (s.near_word[o] == w && s.near_position[o] < j);
        if (better < missing) {
            const int at = atomicAdd(&s.winners, 1);
            s.winner[at] = j, s.winner_word[at] = w;
        }
    }
}

__device__ __forceinline__ void choose_by_bins(const Program& p, const Bins& bins, const Edge& edge, Tail& tail, Parts& parts) {
    Shared& s = p.s;
    const int found = edge.found;
    sort_out(p, bins, found, edge.at.bin);
    tell_counts(p);
    mark(p, 6);
    tail.sync_taking(parts, edge);
    mark(p, 7);
    find_winners(p, p.ranked() - edge.at.above);
    sums_before(p.before, p.blocks, s.scratch);
    mark(p, 8);
    const int winners = s.winners;
#pragma unroll 1
    for (int i = p.tid; i < found; i += THREADS)
        if (p.is_taken(p.position[i])) send(p, p.position[i], p.value[i], winners);
#pragma unroll 1
    for (int i = p.tid; i < winners; i += THREADS)
        if (p.owns(s.winner[i])) {
            send(p, s.winner[i], s.winner_word[i], winners);
            tail.take_winner(parts, s.winner[i], s.winner_word[i]);
        }
}

// Too many candidates, or too many near the edge, or a cut too high: the k_eff-th word is found byte by byte, over all keys,
// which needs no room. Of ties the first are taken (rule 4). Words are unsigned numbers here, 0 for keys that do not reach the
// cut.
struct WordSearch {
    const Program& p;
    int* words;  // of the row
    u32* equal;  // as the bitmap, of keys that have the last word to be chosen; where the candidates were
    u32 word;    // that, as far as it is known
    int needed;  // how many of those that have it

    __device__ __forceinline__ WordSearch(const Program& p, int* words)
        : p(p), words(words), equal((u32*)p.position), word(0), needed(p.ranked()) {}
    __device__ __forceinline__ int key(int i) const { return p.dealt<BLOCK>(i); }
    __device__ __forceinline__ u32 at(int j) const {
        return j < p.end && !p.forced(j) ? (u32)words[j] ^ 0x80000000u : 0;
    }

    // Own keys that the row sees.
    __device__ __forceinline__ int seen() const {
        int many = 0;
#pragma unroll 1
        for (int i = 0; i < p.own; i++) {
            const int j = key(i * BLOCK);
            many += max(0, min(j + BLOCK, p.end) - max(j, p.begin));
        }
        return many;
    }
    // Canonical words, where there are none yet.
    __device__ __forceinline__ void score(const Scorer& scorer, const float* off_of, const Cut& cut) const {
        if (p.tid == 0) p.s.highest = NONE;
        __syncthreads();
        int highest = NONE;
        scorer.score(p, p.own * BLOCK, [&](int i) { return min(key(i), p.end - 1); }, [&](int i, int w) {
            const int j = key(i);
            const bool is = j >= p.begin && j < p.end && (j < p.start || j >= p.stop || p.fast[j] >= cut.least(off_of[j / 128]));
            if (j < p.end) words[j] = is ? w : NONE;
            if (is && p.may_be_highest(j)) highest = max(highest, w);
        });
        tell_highest(p, highest);
        cluster_sync();
    }
    __device__ __forceinline__ void find_byte(int shift) {
        Shared& s = p.s;
#pragma unroll 1
        for (int i = p.tid; i < 256; i += THREADS) s.counts[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
            const u32 w = at(key(i));
            if (w != 0 && (shift == 24 || w >> (shift + 8) == word >> (shift + 8)))
                atomicAdd(&s.counts[w >> shift & 255], 1);
        }
        cluster_sync();
        const Found byte = find_bin<256, CLUSTER>(s.counts, needed, s.scratch);
        word |= (u32)max(byte.bin, 0) << shift, needed -= byte.above;
        cluster_sync();
    }
    // Bits of the keys above the word, and of those that have it; own_count is of the latter.
    __device__ __forceinline__ void compare() const {
#pragma unroll 1
        for (int i = p.tid; i < p.own; i += THREADS) p.own_count[i] = 0;
        __syncthreads();
        int highest = NONE;
#pragma unroll 1
        for (int i = p.warp * 32; i < p.own * BLOCK; i += THREADS) {
            const int j = key(i + p.lane);
            const u32 w = at(j);
            const bool kept = FORCED && j >= p.begin && j < p.end && p.forced(j);
            const u32 above = __ballot_sync(ALL, w > word || kept), same = __ballot_sync(ALL, w == word && w != 0);
            if (p.lane == 0) {
                p.bitmap[i / 32] = above, equal[i / 32] = same;
                if (same) atomicAdd(&p.own_count[i / BLOCK], __popc(same));
            }
            // Of fast scores that are canonical the list had room for some.
            if (kept || (!CODED && w != 0 && p.ranked() > 0)) highest = max(highest, words[j]);
        }
        if (FORCED || !CODED) tell_highest(p, highest);
    }
    // The first of those that have the word, as many as are needed; own_count is of all chosen keys then.
    __device__ __forceinline__ void take_ties() const {
#pragma unroll 1
        for (int i = p.tid; i < p.own; i += THREADS) {
            const int block = i * CLUSTER + p.rank;
            int left = block < p.blocks ? needed - p.before[block] : 0, has = 0;
            for (int w = i * WORDS; w < (i + 1) * WORDS; w++) {
                u32 ties = equal[w];
                while (ties && left > 0) {
                    p.bitmap[w] |= ties & (0u - ties);
                    ties &= ties - 1, left--;
                }
                has += __popc(p.bitmap[w]);
            }
            p.own_count[i] = has;
        }
    }
    __device__ __forceinline__ void count_before() const {
        cluster_sync();
        gather_counts(p);
        __syncthreads();
        sums_before(p.before, p.blocks, p.s.scratch);
    }
};

// The highest canonical word of the row.
__device__ __forceinline__ int highest_of_row(const Program& p) {
    int highest = NONE;
#pragma unroll
    for (int r = 0; r < CLUSTER; r++) highest = max(highest, pull(&p.s.highest, r));
    return highest;
}

__device__ __forceinline__ void choose_by_words(
    const Program& p, const Scorer& scorer, const float* off_of, const Cut& cut, int* words, int* count, Tail& tail, Parts& parts) {
    WordSearch search(p, words);
    cluster_sync();
    if (CODED) {
        search.score(scorer, off_of, cut);
        if (p.tid == 0) count[p.row * CLUSTER + p.rank] = search.seen();
    }
    if (FORCED && search.needed == 0) search.word = ALL;
    else
#pragma unroll 1
        for (int shift = 24; shift >= 0; shift -= 8) search.find_byte(shift);
    search.compare();
    search.count_before();
    tail.begin(highest_of_row(p));
    cluster_sync();
    search.take_ties();
    search.count_before();
#pragma unroll 1
    for (int i = p.tid; i < p.own * BLOCK; i += THREADS) {
        const int j = search.key(i);
        if (p.is_taken(j)) send(p, j, words[j], 0);
    }
    sum_bits(tail, parts);
}

struct Look {
    Cut cut;
    Edge edge;
};

// A second look, seldom needed: not inlined, so that it takes no registers from the first.
__device__ __noinline__ Look look_again(
    const Program p, const Scorer scorer, const float* off_of, const float* units, int* count) {
    const Cut cut = find_cut(p, off_of, *units);
    return {cut, find_edge(p, scorer, off_of, cut, count, [](int) { cluster_sync(); })};
}

// Sends every chosen key and its word to its rank; returns the highest word.
__device__ __forceinline__ int choose(
    const Program& p, const Scorer& scorer, const float* off_of, const float* units, int* tally, int* words, int* count,
    Tail& tail, Parts& parts) {
    Look look = {{counted_cut(p, tally), *units}, {}};
    mark(p, 1);
    __syncthreads();
    if (look.cut.place >= 0.0f) {
        auto sync = [&](int found) { tail.sync_asking(found); };
        look.edge = find_edge(p, scorer, off_of, look.cut, count, sync);
    }
    if (CODED && !look.edge.sure) {
        look = look_again(p, scorer, off_of, units, count);
        tail.ask_of_candidates(look.edge.found);
    }
    if (look.edge.sure) {
        const int highest = highest_of_row(p);
        tail.begin(highest);
        choose_by_bins(p, look.cut.bins(), look.edge, tail, parts);
        return highest;
    }
    choose_by_words(p, scorer, off_of, look.cut, words, count, tail, parts);
    return highest_of_row(p);
}

// The counts as they were before a step.
__device__ __forceinline__ void forget(const Program& p, int* tally) {
#pragma unroll 1
    for (int i = p.rank * THREADS + p.tid; i < TALLY; i += CLUSTER * THREADS) tally[(i64)p.row * TALLY + i] = 0;
}
