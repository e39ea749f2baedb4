"""The certified decode step: that it is exact under attack, in any layout, and that it refuses what does not fit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import qaxis
from qaxis.decode import KeyIndex, index_cache, index_keys
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

from ..harness.claim import Context, Result, value
from ..inputs.adversarial import FAST, make
from . import doors

WAYS = ("keys", "codes", "cache")
WIDE, HALF = (torch.bfloat16, torch.float32, torch.float16), (torch.bfloat16,)


class Attack(NamedTuple):
    """One kind of queries and keys; shape = (B, H, Hkv, N, D)."""

    kind: str
    shape: tuple[int, ...]
    k_eff: int
    dtype: torch.dtype


def stored(x: torch.Tensor, sinks: int) -> Stored:
    """``x`` as the 8-bit cache stores it."""
    side = Side(x, Grid(), sinks, room=x.shape[2])
    for part in x.split(1 << 14, dim=2):
        side.prepare(part)()
    return side.stored()


def ways(k: torch.Tensor, v: torch.Tensor, sinks: int = 4) -> Iterator[tuple[str, Any, Any, KeyIndex]]:
    """(name, keys, values, index) of what the step can read: keys, keys beside codes, an 8-bit cache."""
    yield "keys", k, v, index_keys(k)
    yield "codes", k, v, index_keys(k, codes=True)
    if k.dtype != torch.float16:
        keys = stored(k, sinks)
        yield "cache", keys, stored(v, sinks), index_cache(keys)


@dataclass
class Tally:
    """What the attacks found."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(doors.STEPS, 0))
    sets: int = 0
    outputs: int = 0
    rescored: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in WAYS})
    wrong: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def add(self, attack: Attack, way: str, by: str, step: Any, expected: qaxis.TopKAttention) -> None:
        b, h, _, n, d = attack.shape
        differ = int((step.indices != expected.indices).any(-1).sum())
        other = int((step.output != expected.output).flatten(2).any(-1).sum())
        label = f"{attack.kind}, {str(attack.dtype)[6:]}, N={n}, D={d}, {way}, {by}"
        self.names.add(label)
        if differ or other:
            self.wrong.append(f"{label}: {differ} sets, {other} outputs of {b * h}")
        self.rows[by] += b * h
        self.sets, self.outputs = self.sets + differ, self.outputs + other
        self.rescored[way].append(float(step.rescored.float().sum(-1).mean()) / attack.k_eff)


def agreement(context: Context) -> Result:
    """Indices and output bits of the certified steps against the canonical kernels, on random and adversarial rows."""
    if context.device != "cpu":
        # Where every second key or more is a neighbourhood, the cut is as tight as the bound allows. One program of
        # choose.cu a row, clusters of four, of eight; 80 dimensions are left to the Triton kernels.
        shapes = [
            ((16, 16, 4, 777, 64), 400, WIDE), ((16, 16, 4, 2048, 128), 204, HALF),
            ((1, 32, 8, 20000, 128), 1000, HALF), ((1, 9, 3, 4096, 64), 410, HALF), ((32, 8, 2, 1500, 80), 1, HALF),
        ]  # fmt: skip
        kinds: tuple[str, ...] = FAST
        repeats, steps = 1 if context.quick else 2, doors.STEPS
        backends: tuple[str, ...] = ("reference", "triton")
    else:
        # The interpreter's time goes by programs, so rows are few: groups of two heads, of three; a short stretch of
        # keys, one that keeps a third of them.
        shapes = [((1, 4, 2, 300, 32), 20, WIDE), ((1, 3, 1, 270, 32), 90, WIDE)]
        kinds, repeats, steps = FAST[::4] if context.quick else FAST, 1, {"Triton": doors.STEPS["Triton"]}
        # What is no GPU's is kernel-grid's to open.
        backends = ()
    plan = [
        Attack(kind, shape, k_eff, dtype)
        for kind, (shape, k_eff, dtypes) in itertools.product(kinds, shapes)
        for dtype in dtypes * repeats
    ]
    entries = [*doors.decoders(steps, (2, 2, 2, 1, 70, 64), context.device), *doors.topk(backends)]
    return result(attacked(context, plan, steps), doors.tried(entries, context.device, context.seed))


def attacked(context: Context, plan: Sequence[Attack], steps: dict[str, Callable[..., Any]]) -> Tally:
    """Decode steps against the canonical reference."""
    generator = torch.Generator(context.device).manual_seed(context.seed)
    tally, made = Tally(), dict[Any, Any]()
    for attack in context.progress(plan, "attacks"):
        b, h, kv, n, d = attack.shape
        q, k, v = make(attack.kind, (b, h, kv, 1, n, d), attack.dtype, generator)
        exact = qaxis.topk_attention(q, k, v, attack.k_eff, backend="auto")
        for way, keys, values, index in ways(k, v):
            expected = exact
            if isinstance(keys, Stored):
                expected = qaxis.topk_attention(
                    q, keys.dequantized(), values.dequantized(), attack.k_eff, backend="auto"
                )
            for by, maker in steps.items():
                if (by, attack.shape) not in made:
                    made[by, attack.shape] = maker(b, h, n, d, attack.k_eff, context.device)
                decoder = made[by, attack.shape]
                if by == "CUDA" and decoder.cuda_step(q, keys, values, index) is None:
                    continue
                tally.add(attack, way, by, decoder(q, keys, values, index), expected)
    return tally


def result(tally: Tally, opened: doors.Findings) -> Result:
    """Attacks and entries together."""
    total, wrong = sum(tally.rows.values()), tally.wrong + opened.wrong
    tried, right = len(opened.checks), len(opened.checks) - len(opened.wrong)
    return Result(
        passed=not wrong,
        verdict=doors.said(wrong) if wrong else "canonical indices and bits; what does not fit is refused",
        headline=f"{total} queries, {tally.rows['CUDA']} by CUDA C++: {tally.sets} sets and {tally.outputs} outputs "
        f"differ; {right} of {tried} layouts and refusals right",
        values={
            "rows": value(total, "queries"),
            "by_cuda": value(tally.rows["CUDA"], "queries"),
            "sets": value(tally.sets, "queries"),
            "outputs": value(tally.outputs, "queries"),
            "entries": value(right, "layouts and refusals", n=tried),
        },
        cases=total + tried,
        data={
            "rescored": {way: statistics.median(x) for way, x in tally.rescored.items() if x},
            "wrong": wrong,
        },
        checks=[*sorted(tally.names), *opened.checks],
    )
