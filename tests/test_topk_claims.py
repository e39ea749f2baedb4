"""What measures ``qaxis.topk``: rows, layouts, what is right, what a GPU repeats, times and their table."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

import qaxis
from paper import numbers
from qaxis.cuda import emulator
from qaxis.ranking import cuda as kernels
from selfcheck.checks import topk as claim
from selfcheck.checks import topk_speed
from selfcheck.harness import timing
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.inputs import score_rows
from selfcheck.inputs.score_rows import bits, hard_rows, stable
from selfcheck.rivals import selecting

INF, NAN = math.inf, math.nan
needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")


def test_torch_and_numpy_have_one_stable_sort():
    rows = hard_rows(700, each=2)
    assert torch.equal(stable(rows), score_rows.stable_by_numpy(rows))
    row = torch.tensor([0.0, NAN, -0.0, INF, -NAN, -INF, INF])
    assert stable(row).tolist() == score_rows.stable_by_numpy(row).tolist() == [3, 6, 0, 2, 5, 1, 4]


@pytest.mark.parametrize("layout", score_rows.LAYOUTS)
def test_layouts_keep_the_rows_where_nothing_else_is_said(layout):
    rows = hard_rows(91)
    laid = score_rows.LAYOUTS[layout](rows)
    assert laid.shape[-1] == 91 and laid.dtype == torch.float32
    if layout not in ("permuted", "rows overlap", "one row for all", "one score for a row"):
        assert torch.equal(bits(laid), bits(rows))
    assert layout == "contiguous" or not laid.is_contiguous()


@needs_compiler
def test_the_claim_sees_a_position_a_bit_and_a_call_that_fails(monkeypatch):
    rows, real = hard_rows(40), qaxis.topk
    expected = stable(rows)[:, :6]

    def wrong_of(change):
        tally = claim._Tally()
        monkeypatch.setattr(claim.qaxis, "topk", lambda *args, **options: change(real(*args, **options)))
        tally.compare("rows", rows, 6, expected)
        assert tally.rows == 4 * len(rows) and len(tally.names) == 4
        return tally.wrong

    def failing(_):
        raise RuntimeError

    def one_position(got):
        indices = got.indices.clone()
        indices[3, 0] += 1
        return got._replace(indices=indices)

    assert wrong_of(lambda got: got) == 0
    # The sign of zero, in the two kinds that have both.
    assert wrong_of(lambda got: got._replace(values=got.values + 0.0)) >= 4
    assert wrong_of(one_position) == 4
    for change in (
        failing,
        lambda got: got._replace(indices=got.indices.int()),
        lambda got: got._replace(values=got.values.double()),
        lambda got: got._replace(values=got.values[:, 1:]),
    ):
        assert wrong_of(change) == 4 * len(rows)


def test_what_a_machine_lacks_is_said(monkeypatch):
    monkeypatch.setattr(emulator, "available", lambda: False)
    with pytest.raises(NotRunError, match=r"g\+\+"):
        claim.agreement(Context())
    with pytest.raises(NotRunError, match="GPU"):
        topk_speed.selection(Context())


@needs_compiler
def test_what_a_gpu_repeats_is_compared(monkeypatch):
    """Graphs and streams, for which here stand calls."""

    class Again:
        def __init__(self, call):
            self.replay = call
            call()

    def captured_and_never_replayed(call):
        call()
        return Again(lambda: None)

    monkeypatch.setattr(timing, "capture", Again)
    monkeypatch.setattr(claim, "REPLAYED", ((5, 300, 40),))
    monkeypatch.setattr(claim, "STREAMED", ((5, 300, 40), (4, 70, 3)))
    for name, stand_in in (("Stream", lambda _: None), ("stream", nullcontext), ("synchronize", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    context, tally = Context(quick=True), claim._Tally()
    claim._replayed(context, tally)
    assert (tally.rows, tally.wrong, len(tally.names)) == (2 * 3 * 2 * 5, 0, 2)
    claim._streamed(context, tally)
    assert (tally.rows, tally.wrong, len(tally.names)) == (60 + 2 * 10 * 9, 0, 6)
    monkeypatch.setattr(timing, "capture", captured_and_never_replayed)
    claim._replayed(context, tally)
    assert tally.wrong == 60


def test_a_gpu_compares_rows_enough_by_every_plan():
    plan, kinds = claim._plan(Context(device="cuda")), len(score_rows.KINDS)
    # Rows by themselves: each is compared for two backends and two orders.
    assert sum(kinds * part.each * len(part.ks) for part in plan) >= 20000
    for multiprocessors in (114, 132):
        found = set()
        for part in plan:
            for k in part.ks:
                made = kernels.plan_of(part.at_once or kinds * part.each, part.n, k, multiprocessors)
                found |= {("programs", made.cluster), ("how", made.how)}
        assert found == {("programs", x) for x in (1, 2, 4, 8)} | {("how", x) for x in (0, 1, 2)}
    assert max(part.n for part in plan) == 1 << 20 and min(part.n for part in plan) == 1


def called(call):
    """As a graph is captured, but nothing is replayed."""
    call()
    return call


def test_times_of_one_round_are_paired(monkeypatch):
    def microseconds(calls, repeats, label, seed):
        times = {name: [(i + 2.0) * (j + 10) for j in range(repeats)] for i, name in enumerate(calls)}
        return {topk_speed.WRITTEN: times}

    monkeypatch.setattr(topk_speed, "capture", called)
    monkeypatch.setattr(topk_speed, "microseconds", microseconds)
    found = {}
    for kind in topk_speed.KINDS:
        rows, left_out = topk_speed._timed(3, 500, 20, kind, 11, 1e12, 1, "cpu")
        found[kind] = {row["way"]: row for row in rows}
        assert left_out == {}
    names = {"qaxis", "qaxis by rank", "torch.topk", "torch.topk unsorted", "torch.sort stable"}
    assert found["tied"].keys() == names and found["tied"]["qaxis"]["ratio"] == 1.0
    by_rank = found["normal"]["qaxis by rank"]
    # Of eleven, the second to the tenth.
    assert (by_rank["took"], by_rank["low"], by_rank["high"]) == (45.0, 33.0, 57.0)
    assert by_rank["ratio"] == by_rank["ratio_low"] == by_rank["ratio_high"] == 1.5 and by_rank["wrong"] == 0
    assert by_rank["floor"] == pytest.approx(1e6 * 3 * (500 * 4 + 20 * 12) / 1e12)
    assert {row["judged"] for row in found["tied"].values() if row["way"].startswith("qaxis")} == {"stable"}
    values = topk_speed._values(list(found["tied"].values()), 11)
    assert values["r3_n500_k20_tied_torch"]["value"] == 2.0 and values["r3_n500_k20_tied_rank_us"]["unit"] == "us"


def test_rows_that_are_wrong_while_timed_are_counted(monkeypatch):
    scores = hard_rows(50)
    right = stable(scores)[:, :9]
    assert topk_speed._wrong(scores, 9, right, "rank") == topk_speed._wrong(scores, 9, right, "position") == 0
    real = qaxis.topk
    monkeypatch.setattr(topk_speed.qaxis, "topk", lambda x, k, **options: real(x.abs(), k, **options))
    assert topk_speed._wrong(scores, 9, right, "position") > 5


def test_what_replays_leave_is_looked_at(monkeypatch):
    def wiped(call):
        called(call)
        call.args[0][-1].zero_()
        return call

    monkeypatch.setattr(topk_speed, "capture", wiped)
    times = {topk_speed.WRITTEN: dict.fromkeys(("qaxis", "qaxis by rank"), [1.0] * 11)}
    monkeypatch.setattr(topk_speed, "microseconds", lambda *args, **options: times)
    rows, _ = topk_speed._timed(3, 500, 20, "normal", 11, 1e12, 1, "cpu")
    assert [row["wrong"] for row in rows] == [3, 3]


def test_ways_are_judged_by_their_sets_and_by_repeating():
    scores = torch.zeros(2, 9)
    best = stable(scores)[:, :3]
    calls = iter(range(100))
    assert selecting.judged(lambda x: best, scores, best) == "stable"
    assert selecting.judged(lambda x: best.flip(-1), scores, best) == "stable"
    assert selecting.judged(lambda x: best + 1, scores, best) == "other ties"
    assert selecting.judged(lambda x: best + next(calls), scores, best) == "stable, varies"


def test_a_table_of_selections_has_what_was_timed():
    shape = {"rows": 32, "n": 131072, "k": 2048, "kind": "tied", "floor": 4.25}
    took = {"qaxis": 74.6, "qaxis by rank": 95.0, "torch.topk": 125.0, "flashinfer": 50.0}
    took["flashinfer deterministic"] = 60.2
    rows = [{**shape, "way": way, "took": t} for way, t in took.items()]
    (line,) = numbers._topk({"topk-speed": {"data": {"rows": rows}}})
    assert line == r"32 & 131\,072 & 2\,048 & tied & 75 & 95 & 125 & -- & -- & 60 & -- & 4.2"
