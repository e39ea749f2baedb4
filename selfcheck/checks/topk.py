"""``qaxis.topk`` against a stable sort: hard rows of any length and layout; on a GPU also graphs and streams."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import qaxis
from qaxis.cuda import emulator

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs.score_rows import LAYOUTS, bits, hard_rows, stable, stable_by_numpy

BACKENDS = ("reference", "cuda")
ORDERS = ("position", "rank")
#: numbers that a drawn row repeats, so that most of them tie
REPEATED = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149))


class TopKDiffersError(Exception):
    """Another selection than the stable sort's; no ``assert``, which Python may leave out."""


class Part(NamedTuple):
    """Hard rows of one length: so many of each kind, given to ``topk`` so many at once (0: all), for each of ``ks``."""

    n: int
    ks: tuple[int, ...]
    each: int = 1
    at_once: int = 0


def _plan(context: Context) -> list[Part]:
    """Rows that one program has, in lists of all and of the best, and that programs share in twos, fours and eights."""
    if context.device == "cpu":
        # Of the emulator, 12 programs are at work at once.
        if context.quick:
            return [
                Part(1, (1,)),
                Part(33, (1, 7, 33)),
                Part(1000, (300,), 2),
                Part(16400, (500,)),
                Part(33000, (900,), 1, 1),
            ]
        return [
            Part(1, (1,), 3), Part(2, (1, 2)), Part(3, (2,), 2), Part(33, (1, 7, 32, 33), 2),
            Part(257, (1, 64, 257), 2), Part(1000, (1, 300, 1000)), Part(4097, (100, 4096)), Part(8192, (512,), 1, 6),
            Part(16384, (1, 2048)), Part(17001, (300, 17001)), Part(20001, (700,), 1, 3), Part(33000, (900,), 1, 1),
        ]  # fmt: skip
    # Of 114 to 132 multiprocessors: 16 rows at once have eight programs each, 40 four, 80 two.
    short = [
        Part(n, ks, 40)
        for n, ks in (
            (1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (31, (1, 16, 31)), (500, (1, 64, 499)), (1000, (1, 300, 1000)),
            (4095, (256,)), (4096, (1, 512, 4096)), (4097, (512, 4000)), (8192, (1, 512, 8192)), (16383, (2048,)),
        )
    ]  # fmt: skip
    long = [
        Part(16384, (1, 512, 2048, 16384), 4, 80), Part(32769, (64, 2048), 4, 40), Part(70001, (600, 20000), 2, 80),
        Part(131072, (1, 256, 2048, 65536), 2, 16), Part(131072, (2048,), 8), Part(262147, (256, 2048), 1, 40),
        Part(1 << 20, (1, 2048, 16384, 1 << 19), 1, 16),
    ]  # fmt: skip
    return short[::3] + long[::3] if context.quick else short + long


@dataclass
class _Tally:
    """What was compared with the stable sort, in rows."""

    rows: int = 0
    wrong: int = 0
    said: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def add(self, label: str, rows: int, wrong: int, why: str = "") -> None:
        self.names.add(label)
        self.rows, self.wrong = self.rows + rows, self.wrong + wrong
        if wrong:
            self.said.append(f"{label}: {wrong} of {rows} rows{why}")

    def compare(self, label: str, scores: torch.Tensor, k: int, expected: torch.Tensor, nan: str = "last") -> None:
        """Rows whose positions or bits are not those of ``expected [rows, k]``, by both backends in both orders."""
        right = {"rank": expected, "position": expected.sort(-1).values}
        for backend, order in itertools.product(BACKENDS, ORDERS):
            name = f"{label}, by {order}, {backend}"
            try:
                got = qaxis.topk(scores, k, order=order, nan=nan, backend=backend)
            except Exception as error:
                self.add(name, len(expected), len(expected), f", {type(error).__name__}: {error}"[:200])
                continue
            self.add(name, len(expected), differing(got, scores, k, right[order]))


def differing(got: qaxis.TopK, scores: torch.Tensor, k: int, expected: torch.Tensor) -> int:
    """Rows of ``scores`` whose result is not ``expected [rows, k]``, position by position and bit by bit."""
    values, indices = got
    form = (*scores.shape[:-1], k)
    if values.shape != form or indices.shape != form or values.dtype != torch.float32 or indices.dtype != torch.int64:
        return len(expected)
    chosen = scores.reshape(-1, scores.shape[-1]).gather(-1, expected)
    same = (indices.view(-1, k) == expected) & (bits(values.view(-1, k)) == bits(chosen))
    return int((~same.all(-1)).sum())


def agreement(context: Context) -> Result:
    """Positions and value bits against the first k of a stable sort; what does not fit is refused by name."""
    on_gpu = context.device != "cpu"
    if not on_gpu and not emulator.available():
        raise NotRunError("g++ is not on the PATH; install it (Debian, Ubuntu: apt install g++)")
    tally, unlike = _Tally(), 0
    for part in context.progress(_plan(context), "rows"):
        unlike += _hard(context, part, tally)
    _laid_out(context, tally)
    if on_gpu:
        _replayed(context, tally)
        _streamed(context, tally)
    drawn, failure = _drawn(context)
    tried = list(_entries(context))
    wrong = [f"{name}: {problem}" for name, problem in tried if problem]
    right = len(tried) - len(wrong)
    wrong = tally.said + ([failure] if failure else []) + wrong
    if unlike:
        wrong.append(f"{unlike} rows that the stable sorts of torch and NumPy rank otherwise")
    return Result(
        passed=not wrong,
        verdict=f"{len(wrong)} differ: {wrong[0]}"
        if wrong
        else "the stable sort's first k; what does not fit is refused",
        headline=f"{tally.rows} rows: {tally.wrong} differ from the stable sort; {drawn} drawn rows; "
        f"{right} of {len(tried)} refusals right",
        values={
            "rows": value(tally.rows, "rows"),
            "wrong": value(tally.wrong, "rows", n=tally.rows),
            "drawn": value(drawn, "rows"),
            "entries": value(right, "refusals", n=len(tried)),
        },
        cases=tally.rows + drawn + len(tried),
        data={"wrong": [x[:500] for x in wrong[:50]]},
        checks=[*sorted(tally.names), "drawn rows", *(name for name, _ in tried)],
    )


def _hard(context: Context, part: Part, tally: _Tally) -> int:
    """Every kind of one length; rows of which torch's sort and NumPy's differ (on a GPU, of few rows)."""
    rows = hard_rows(part.n, context.device, part.each, context.seed)
    order = stable(rows)
    some = rows if context.device == "cpu" else rows[:: max(1, rows.numel() >> 21)]
    unlike = int((stable_by_numpy(some) != (order if some is rows else stable(some))).any(-1).sum())
    at_once = part.at_once or len(rows)
    for k, start in itertools.product(part.ks, range(0, len(rows), at_once)):
        stop = start + at_once
        tally.compare(
            f"N={part.n}, k={k}, {min(at_once, len(rows))} at once", rows[start:stop], k, order[start:stop, :k]
        )
    return unlike


def _laid_out(context: Context, tally: _Tally) -> None:
    """The same rows anywhere in memory, surrounded by what would be better."""
    lengths = ((130, 17),) if context.quick else ((70, 70), (130, 17), (16390, 200))
    if context.device != "cpu":
        lengths = (*lengths, (70001, 600))
    for n, k in lengths:
        rows = hard_rows(n, context.device, 1, context.seed)
        for name, layout in LAYOUTS.items():
            scores = layout(rows)
            # What is right is found from a copy.
            order = stable(scores.contiguous().view(-1, n))
            tally.compare(f"{name}, N={n}, k={k}", scores, k, order[:, :k])


def _drawn(context: Context) -> tuple[int, str]:
    """(rows that Hypothesis drew, shrunk failure or "") against Python's stable sort."""
    compared = 0
    floats = st.lists(st.floats(width=32), min_size=1, max_size=40)
    # One byte a score: cheap to draw.
    tied = st.binary(min_size=1, max_size=300).map(lambda raw: [REPEATED[b % len(REPEATED)] for b in raw])

    def holds(row: list[float], share: float) -> None:
        nonlocal compared
        k = max(1, round(share * len(row)))
        best = sorted(range(len(row)), key=lambda j: (math.isnan(row[j]), 0.0 if math.isnan(row[j]) else -row[j]))[:k]
        scores, expected = torch.tensor(row, device=context.device), torch.tensor([best], device=context.device)
        tally = _Tally()
        tally.compare("drawn", scores, k, expected)
        compared += 1
        if tally.wrong:
            raise TopKDiffersError(f"{tally.said[0]}: scores {row}, k = {k}")

    options = settings(
        max_examples=30 if context.quick else 200, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    try:
        seed(context.seed)(options(given(st.one_of(floats, tied), st.floats(0, 1))(holds)))()
    except TopKDiffersError as error:
        return compared, str(error)[:500]
    return compared, "" if compared else "drawn rows: compared nothing"


# ---- what only a GPU has --------------------------------------------------------------------------------------------

#: rows, scores of a row, k
REPLAYED = ((25, 300, 40), (100, 20000, 512), (16, 131072, 2048))
STREAMED = ((100, 16400, 500), (40, 131072, 2048))


def _replayed(context: Context, tally: _Tally) -> None:
    """One graph a shape and order, replayed twice on scores that were put in place of those it was captured with."""
    from ..harness.timing import capture

    for (count, n, k), order in itertools.product(REPLAYED, ORDERS):
        scores = torch.zeros(count, n, device=context.device)
        kept: list[qaxis.TopK] = []
        graph = capture(lambda: kept.append(qaxis.topk(scores, k, order=order, nan="last", backend="cuda")))  # noqa: B023
        for again in range(3 if context.quick else 8):
            rows = hard_rows(n, context.device, 4, context.seed + again)
            scores.copy_(rows[(torch.arange(count, device=context.device) + again) * 7 % len(rows)])
            expected = stable(scores)[:, :k]
            expected = expected if order == "rank" else expected.sort(-1).values
            for _ in range(2):
                for x in kept[-1]:
                    x.zero_()
                graph.replay()
                tally.add(f"replayed, N={n}, k={k}, by {order}", count, differing(kept[-1], scores, k, expected))


def _streamed(context: Context, tally: _Tally) -> None:
    """Two streams that select at once, from rows of their own."""
    streams = [torch.cuda.Stream(context.device) for _ in STREAMED]
    for order in ORDERS:
        given_rows = [hard_rows(n, context.device, 4, context.seed)[:count] for count, n, _ in STREAMED]
        torch.cuda.synchronize(context.device)
        found: list[list[qaxis.TopK]] = [[], []]
        for _ in range(10):
            for stream, scores, (_, _, k), results in zip(streams, given_rows, STREAMED, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(qaxis.topk(scores, k, order=order, nan="last", backend="cuda"))
        torch.cuda.synchronize(context.device)
        for scores, (count, n, k), results in zip(given_rows, STREAMED, found, strict=True):
            expected = stable(scores)[:, :k]
            expected = expected if order == "rank" else expected.sort(-1).values
            for got in results:
                tally.add(f"two streams, N={n}, k={k}, by {order}", count, differing(got, scores, k, expected))


# ---- what does not fit ----------------------------------------------------------------------------------------------


def _entries(context: Context) -> Iterator[tuple[str, str]]:
    """(what was called, what is wrong with how it was met or "")."""
    x = hard_rows(90, context.device, 1, context.seed)[:2]
    calls: dict[str, tuple[str, Callable[[], Any]]] = {
        "no scores in a row": (r"scores\.shape\[-1\]=0", lambda: qaxis.topk(x[:, :0], 1)),
        "no dimension": (r"scores\.shape=", lambda: qaxis.topk(x[0, 0], 1)),
        "no tensor": ("scores=", lambda: qaxis.topk(x.tolist(), 1)),  # type: ignore[arg-type]
        "k of none": ("k=0", lambda: qaxis.topk(x, 0)),
        "k below none": ("k=-1", lambda: qaxis.topk(x, -1)),
        "k beyond the row": ("k=91", lambda: qaxis.topk(x, 91)),
        "k that is no integer": (r"k=2\.0", lambda: qaxis.topk(x, 2.0)),  # type: ignore[arg-type]
        "k that is a bool": ("k=True", lambda: qaxis.topk(x, True)),
        "another order": ("order=", lambda: qaxis.topk(x, 1, order="value")),
        "NaN first": ("nan=", lambda: qaxis.topk(x, 1, nan="first")),
        "another backend": ("backend=", lambda: qaxis.topk(x, 1, backend="triton")),
        "scores without memory": (r"scores\.device", lambda: qaxis.topk(x.to("meta"), 1)),
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32):
        calls[f"{str(dtype)[6:]} scores"] = (r"scores\.dtype=", partial(qaxis.topk, x.to(dtype), 1))
    for name, (said, call) in calls.items():
        yield name, _refusal(call, said)
    for backend in BACKENDS:
        yield from _of_backend(context, backend)


def _of_backend(context: Context, backend: str) -> Iterator[tuple[str, str]]:
    """NaN, refused by its place in rows short and long; NaN beside rows, which is not; no rows, which give none."""
    for n, where in ((90, (0, 2, 88)), (20000, (1, 0, 19999))):
        # Two batches of three rows, the scores around them NaN too.
        rows = hard_rows(n, context.device, 1, context.seed)[:6]
        around = rows.new_full((6, n + 5), math.nan)
        scores = around[:, 2 : n + 2].copy_(rows.nan_to_num(0.0, math.inf, -math.inf)).view(2, 3, n)
        inside = _Tally()
        inside.compare("", scores.flatten(0, 1), 5, stable(scores.flatten(0, 1))[:, :5], nan="raise")
        yield f"{backend}: NaN beside rows of {n}", inside.said[0] if inside.said else ""
        scores[where] = -math.nan
        said = re.escape(f"scores[{where}]=nan")
        yield (
            f"{backend}: a NaN in rows of {n}",
            _refusal(lambda: qaxis.topk(scores, 5, backend=backend), said),  # noqa: B023
        )
    for shape in ((0, 7), (3, 0, 7)):
        got = qaxis.topk(torch.empty(shape, device=context.device), 2, backend=backend)
        fits = got.values.shape == got.indices.shape == (*shape[:-1], 2) and got.indices.dtype == torch.int64
        yield f"{backend}: no rows, {list(shape)}", "" if fits else f"gave {list(got.indices.shape)}"


def _refusal(call: Callable[[], object], said: str) -> str:
    """ "" if the call is refused with a ValueError that begins so and says what is allowed."""
    try:
        call()
    except ValueError as error:
        return (
            ""
            if re.match(said, str(error)) and "allowed is" in str(error)
            else f"refused, but not by name: {error}"[:200]
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "not refused"
