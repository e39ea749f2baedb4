// What a batch row sees and keeps (decode/rows.py), read from device memory, so that one captured graph serves a cache that
// grows.

constexpr int BLOCK = 512;  // keys whose chosen ones are counted together
__device__ __forceinline__ int whole_blocks(int n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// The sizes that a step was made for, and what a row always keeps.
struct Room {
    int n, k_eff;       // places of keys; keys kept: a row that claims more is cut, never written beyond its space
    int in_full;        // first tokens of a cache that are stored in full and have no code
    int sinks, recent;  // first and newest keys that are always kept
};

struct Seen {
    int begin, end, k_eff;  // keys [begin, end), of which so many are kept
    int first, last;        // those before `first` and from `last` on are always kept
    int start, stop;        // those that have a fast score and are ranked by it
    int base;               // the first key of the first block

    // CODES: fast scores are made from codes, which stop at the last whole group of 128.
    template <bool CODES> static __device__ __forceinline__ Seen of(const int* rows, int b, const Room& room) {
        Seen s;
        s.end = max(0, min(rows[4 * b + 1], room.n)), s.begin = max(0, min(rows[4 * b], s.end));
        s.first = min(s.begin + room.sinks, s.end), s.last = max(s.end - room.recent, s.first);
        s.k_eff = max(min(rows[4 * b + 2], min(room.k_eff, s.end - s.begin)), s.first - s.begin + s.end - s.last);
        s.start = s.first, s.stop = s.last;
        if (CODES) {
            s.start = max(s.start, min(room.in_full, s.end));
            s.stop = max(s.start, min(s.stop, s.end / 128 * 128));
        }
        s.base = s.begin / BLOCK * BLOCK;
        return s;
    }
};
