"""Selection-exact prefill: that every query selects its canonical set under attack and in any layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch

import qaxis
from qaxis.cuda import emulator
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

from ..harness.claim import Context, Result, value
from ..inputs.adversarial import FAST, make
from . import doors
from .certified import HALF, WIDE

#: largest difference from canonical outputs, over the largest value, that the tensor cores' sums are allowed
ALLOWED = {torch.float32: 2.0**-10, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-5}
#: what is attacked with a query of its own, the same for all: normal queries would undo it
SAME_QUERY = ("zero query", "tiny")
#: few programs for rows whose lists overflow: in the interpreter each takes its time, whether it finds any or not
INTERPRETED = PrefillTuning(wide_programs=4)


class Attack(NamedTuple):
    """One kind of queries and keys; shape = (B, H, Hkv, M, N, D)."""

    kind: str
    shape: tuple[int, ...]
    budget: qaxis.Budget
    dtype: torch.dtype
    backends: tuple[str, ...]


def _plan(context: Context) -> list[Attack]:
    """Kinds, shapes, dtypes, and what selects: Triton, and select.cu on a GPU, or emulated."""
    kinds = (*FAST[::4], "near ties in the type", "ties at the edge") if context.quick else FAST
    if context.device == "cpu":
        shapes = (((1, 2, 1, 5, 300, 32), qaxis.Budget(0.1, 16)), ((1, 2, 2, 4, 200, 64), qaxis.Budget(0, 40)))
        backends = ("triton", "cuda") if emulator.available() else ("triton",)
        # One dtype a kind and shape, each in turn.
        return [
            Attack(kind, shape, budget, WIDE[(i + j) % 3], backends)
            for (i, kind), (j, (shape, budget)) in itertools.product(enumerate(kinds), enumerate(shapes))
        ]
    on_gpu = (
        ((1, 8, 2, 256, 3072, 128), qaxis.Budget(), WIDE), ((1, 4, 4, 512, 1024, 128), qaxis.Budget(0, 100), HALF),
        ((1, 4, 2, 304, 1504, 64), qaxis.Budget(0.05, 16), HALF), ((1, 2, 1, 96, 9000, 128), qaxis.Budget(), HALF),
    )  # fmt: skip
    return [
        # The Triton selection has to be compiled for every shape and dtype: for one of them.
        Attack(kind, shape, budget, dtype, ("triton", "cuda") if (dtype, shape[4]) == (WIDE[0], 3072) else ("cuda",))
        for kind, (shape, budget, dtypes) in itertools.product(kinds, on_gpu)
        for dtype in dtypes
    ]


@dataclass
class _Tally:
    rows: int = 0
    sets: int = 0
    #: largest distance of an output, of what is allowed
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def add(self, context: Context, attack: Attack, generator: torch.Generator) -> None:
        b, h, _, m, n, d = attack.shape
        q, k, v = make(attack.kind, attack.shape, attack.dtype, generator)
        if attack.kind not in SAME_QUERY:
            q = torch.randn(b, h, m, d, generator=generator, device=context.device).to(attack.dtype)
        exact = qaxis.topk_attention(q, k, v, attack.budget, backend="auto")
        tuning = INTERPRETED if context.device == "cpu" else PrefillTuning()
        for backend in attack.backends:
            out = prefill_attention(q, k, v, attack.budget, selection=True, backend=backend, tuning=tuning)
            found = selected_positions(cast(torch.Tensor, out.bits))
            same = found.shape == exact.indices.shape
            differ = int((found != exact.indices).any(-1).sum()) if same else b * h * m
            off = float((out.output.float() - exact.output.float()).abs().max() / v.float().abs().max())
            off /= ALLOWED[attack.dtype]
            label = f"{attack.kind}, {str(attack.dtype)[6:]}, N={n}, D={d}, {backend}"
            self.names.add(label)
            if differ or not off <= 1:
                self.wrong.append(f"{label}: {differ} sets differ, output off by {off:.2f} of what is allowed")
            self.rows, self.sets, self.worst = self.rows + b * h * m, self.sets + differ, max(self.worst, off)


def agreement(context: Context) -> Result:
    """Selected sets against ``qaxis.topk_indices``, and outputs against the canonical ones within what is allowed."""
    generator, tally = torch.Generator(context.device).manual_seed(context.seed), _Tally()
    for attack in context.progress(_plan(context), "attacks"):
        tally.add(context, attack, generator)
    backends = ("triton", "cuda") if context.device != "cpu" or emulator.available() else ("triton",)
    opened = doors.tried(doors.prefills(backends, context.device), context.device, context.seed)
    wrong, tried, right = tally.wrong + opened.wrong, len(opened.checks), len(opened.checks) - len(opened.wrong)
    return Result(
        passed=not wrong,
        verdict=doors.said(wrong) if wrong else "canonical sets; what does not fit is refused",
        headline=f"{tally.rows} queries: {tally.sets} sets differ; outputs off by at most {tally.worst:.2f} of what is "
        f"allowed; {right} of {tried} layouts and refusals right",
        values={
            "rows": value(tally.rows, "queries"),
            "sets": value(tally.sets, "queries"),
            "worst": value(tally.worst, "of what is allowed"),
            "entries": value(right, "layouts and refusals", n=tried),
        },
        cases=tally.rows + tried,
        data={"wrong": wrong},
        checks=[*sorted(tally.names), *opened.checks],
    )
