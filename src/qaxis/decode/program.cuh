// What the stages share: a program of a row's cluster, its part of the row, its shared memory. cuda.py puts it before choose.cu.
//
// A row sees keys [begin, end). Only blocks that hold some of them are looked at: positions count from the first of these
// blocks, `base`, up to where indices are written.

// Marks of a profile end: 0 the start, 1 the cut, 2 the list of candidates, 3 their scores, 4 a barrier, 5 the edge, 6 what is
// above it, 7 a barrier, 8 what is at it, 9 keys sent to their ranks, 10 a barrier, 11 sums of programs, 12 the output.
constexpr int LANES_V = DIM_V / E, NEAR = 112, MARKS = 13;
constexpr int WORDS = BLOCK / 32;  // of a bitmap, a block

struct Shared {
    int counts[TALLY];  // of keys, by their fast scores, by bytes of these; of candidates, by bins of canonical scores
    // Candidates near the edge, of every program; those of them that are chosen.
    int near_word[CLUSTER * NEAR], near_position[CLUSTER * NEAR], winner_word[NEAR], winner[NEAR];
    int near[CLUSTER];  // how many of every program
    int scratch[WARPS + 4];
    int highest;         // canonical word
    int runs, found, nears, winners;  // lengths of lists
    int full;            // whether candidates were left out for lack of room
    float warp_numerators[WARPS][DIM_V], warp_denominators[WARPS];  // stage 5: of a warp, of a program
    float numerators[CLUSTER][DIM_V], denominators[CLUSTER];
};

static_assert(sizeof(Shared) == SHARED, "cuda.py counts other bytes");

// As the kernel gets them: what the step was made for.
struct Sizes {
    int padded;             // places of keys, rounded up to blocks
    int k_eff, room, span;  // keys to choose, candidates and ranks that a program has room for, at most
};

constexpr int TURN = THREADS / LANES_V * RANKS;  // ranks that a program attends to in one turn

// One program of the cluster: its row, its part of it, and where things lie in its shared memory.
struct Program {
    Shared& s;
    int *position, *value;           // candidates, and their canonical words
    int *own_count, *before;         // chosen keys: of own blocks; of all blocks, then the sums before each
    u32* bitmap;                     // chosen keys, WORDS an own block
    int *chosen_position, *chosen;   // of ranks [span rank, span (rank + 1))
    const Fast *fast, *best;         // of the row, from `base` on
    i64* marks;
    int rank, tid, lane, warp;       // of the program in its cluster, of the thread
    int row, b, h, g;                // one row is head h of batch b; its KV head
    int base, begin, end;            // the row sees [begin, end), from `base` on as all positions
    int start, stop;                 // keys that have a fast score
    int first, last;                 // those before `first` and from `last` on are always kept
    int k_eff, turns;                // keys to choose; a power of two of turns of ranks, as few as do
    int room, blocks, own;           // of candidates; blocks of keys, own ones

    __device__ __forceinline__ Program(
        char* memory, const Sizes& most, const Seen& seen, const Fast* all_fast, const Fast* all_best, i64* marks,
        int heads)
        : s(*(Shared*)memory), marks(marks), base(seen.base), k_eff(seen.k_eff), room(most.room) {
        rank = cluster_rank(), tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
        row = blockIdx.y, b = row / heads, h = row % heads, g = h / GROUP;
        begin = seen.begin - base, end = seen.end - base, start = seen.start - base, stop = seen.stop - base;
        first = seen.first - base, last = seen.last - base;
        blocks = whole_blocks(end) / BLOCK, own = (blocks + CLUSTER - 1) / CLUSTER;
        const int rounds = (k_eff - 1) / (TURN * CLUSTER);  // full ones, before the last
        turns = rounds > 0 ? 1 << (32 - __clz(rounds)) : 1;
        // Where things lie does not depend on the row.
        const int most_blocks = most.padded / BLOCK, most_own = (most_blocks + CLUSTER - 1) / CLUSTER;
        position = (int*)(memory + (sizeof(Shared) + 15) / 16 * 16), value = position + room;
        own_count = value + room, before = own_count + most_own;
        bitmap = (u32*)(before + most_blocks);
        chosen_position = (int*)(bitmap + most_own * WORDS), chosen = chosen_position + most.span;
        fast = all_fast + (i64)row * most.padded + base, best = all_best + ((i64)row * most.padded + base) / SUB;
    }
    __device__ __forceinline__ int span() const { return turns * TURN; }
    __device__ __forceinline__ bool forced(int j) const { return FORCED && (j < first || j >= last); }
    // How many of the others are chosen.
    __device__ __forceinline__ int ranked() const { return FORCED ? k_eff - (first - begin) - (end - last) : k_eff; }
    // Whether a key can be the highest of the chosen ones, if no other is higher.
    __device__ __forceinline__ bool may_be_highest(int j) const { return !FORCED || forced(j) || ranked() > 0; }
    __device__ __forceinline__ int live() const { return max(0, min(span(), k_eff - span() * rank)); }

    // Blocks of keys go round the programs, so that neighbours that score alike do not fall to one of them. With EACH
    // things a block: which of all is the i-th own.
    template <int EACH>
    __device__ __forceinline__ int dealt(int i) const { return (i / EACH * CLUSTER + rank) * EACH + i % EACH; }
    __device__ __forceinline__ bool owns(int j) const { return j / BLOCK % CLUSTER == rank; }
    // Of an own key: its block among the own ones, the bitmap's words of that, whether its bit is set.
    __device__ __forceinline__ int own_block(int j) const { return j / BLOCK / CLUSTER; }
    __device__ __forceinline__ u32* bits_of(int j) const { return bitmap + own_block(j) * WORDS; }
    __device__ __forceinline__ bool is_taken(int j) const { return bits_of(j)[j % BLOCK / 32] >> (j % 32) & 1; }
};

// The time, for figures of the stages.
__device__ __forceinline__ void mark(const Program& p, int i) {
    if constexpr (PROFILE) {
        __syncthreads();
        if (p.tid == 0) p.marks[((i64)p.row * CLUSTER + p.rank) * MARKS + i] = nanoseconds();
    }
}
