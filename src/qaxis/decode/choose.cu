// From scores to the output of a decode step, in five stages: candidates, canonical scores, edge, choice, attention.
//
// A row is one query head; a cluster of programs works on it. Every sum that reaches the output has the order of
// qaxis/arithmetic, so the bits are those of the Triton kernels and of the PyTorch reference. What only decides how
// much is looked at may round as it likes: bins are monotone in the score. Where the cut that the counts lead to was too high,
// or there is too little room, or too many scores are in one bin, a slower way that needs none of that is taken.
//
// The stages are in files of their own, which cuda.py puts before this one: numbers.cuh (keys and values as they lie),
// counts.cuh, program.cuh (what a program knows and keeps), logits.cuh, candidates.cuh, scores.cuh, edge.cuh, tail.cuh (what is
// left out), choice.cuh, attend.cuh.
//
// cuda.py lists these and, before them, seen.cuh and tally.cuh, which compiler.py puts behind its own; and defines: DIM_V, GROUP,
// CLUSTER, RANKS, LEVELS, THREADS, CODED (keys were scored by their 8-bit codes), STORED (keys and
// values are an 8-bit cache), FORCED (some keys are always kept), LOGITS (0: scaled scores; 1: with a sink; 2: capped, perhaps
// with a sink), COMPLETED (what is left out is put back: line.cuh comes first and complete.cuh last), PROFILE, SHARED (bytes).

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1024 / THREADS) choose_and_attend(
    const void* q, SIDE(k), SIDE(v), const int* rows, const Fast* fast, const Fast* best, int* word,
    const float* units_of, const float* off, int* tally, void* out, i64* indices, int* count, i64* marks,
    int heads, int n, int padded, int k_eff, int room, int span, int in_full, int sinks, int recent,
    int q_b, int q_h, double factor, double scale, double cap, const void* sink, int sink_kind, int sink_h
#if COMPLETED
    , const float* line, const float* run_sums, int linear
#endif
) {
    DYNAMIC_SHARED(memory);
    const Seen seen = Seen::of<CODED>(rows, blockIdx.y / heads, Room{n, k_eff, in_full, sinks, recent});
    const Program p(memory, Sizes{padded, k_eff, room, span}, seen, fast, best, marks, heads);
    // The scores. They were launched plainly, so rows were there before the first of them.
    await_previous();
    if (p.k_eff == 0) return write_nothing(p, k_eff, out, indices, count);
    mark(p, 0);
    const char* query = (const char*)q + ((i64)p.b * q_b + (i64)p.h * q_h) * (16 / E);
    const int whole = (p.base + p.end) / 128 * 128 - p.base;
    const Scorer scorer{Rows(AS_SIDE(k), p.b, p.g, p.base, whole, in_full), query};
    // By how many places the fast scores of a group of 128 may be off.
    const float* off_of = off + ((i64)p.row * padded + p.base) / 128;
#if COMPLETED
    Logits logits = {(float)factor, (float)scale, (float)cap, 0.0f, LOGITS > 0 && sink_kind >= 0};
    if (logits.has_sink) logits.sink = sink_at(sink, sink_kind, (i64)p.h * sink_h);
    line += (i64)p.row * LINE;
    int* const words = word + (i64)p.row * padded + p.base;
    const float* const runs = run_sums + ((i64)p.row * padded + p.base) / SUB * 2;
    Tail tail(p, logits, Grouped(Whole(seen), p.base, line), words, runs, units_of + p.row);
    Parts parts;
    choose(p, scorer, off_of, units_of + p.row, tally, words, count, tail, parts);
    tail.tell(parts);
    mark(p, 9);
    cluster_sync();
    mark(p, 10);
    const Affine rest = weights_of_rest(tail.rest(), tail.all, linear);
    forget(p, tally);
    attend_completed(p, Rows(AS_SIDE(v), p.b, p.g, p.base, whole, in_full), logits, tail, rest, k_eff, indices, out);
#else
    Tail tail;
    Parts parts;
    int* const words = word + (i64)p.row * padded + p.base;
    const int highest = choose(p, scorer, off_of, units_of + p.row, tally, words, count, tail, parts);
    mark(p, 9);
    cluster_sync();
    mark(p, 10);
    forget(p, tally);
    Logits logits = {(float)factor, (float)scale, (float)cap, 0.0f, LOGITS > 0 && sink_kind >= 0};
    if (logits.has_sink) logits.sink = sink_at(sink, sink_kind, (i64)p.h * sink_h);
    attend(p, Rows(AS_SIDE(v), p.b, p.g, p.base, whole, in_full), logits, highest, k_eff, indices, out);
#endif
    mark(p, 12);
}
