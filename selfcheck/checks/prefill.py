"""Selection-exact prefill: that every query selects its canonical set under attack."""

from __future__ import annotations

import itertools

import torch

import qaxis
from qaxis.cuda import emulator
from qaxis.prefill import prefill_attention, selected_positions

from ..harness.claim import Context, Result, value
from .certified import KINDS, attack

#: largest difference from canonical outputs, over the largest value, that the tensor cores' sums are allowed
ALLOWED = {torch.float32: 2.0**-10, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-5}


def agreement(context: Context) -> Result:
    """Selected sets against ``qaxis.topk_indices``, and outputs against the canonical ones within what is allowed."""
    gpu = context.device != "cpu"
    wide = (torch.bfloat16, torch.float32, torch.float16)
    if gpu:
        shapes = [
            ((1, 8, 2, 3072, 128), 512, qaxis.Budget(), wide),
            ((1, 4, 4, 1024, 128), 1024, qaxis.Budget(0, 100), wide[:1]),
            ((1, 4, 2, 1504, 64), 304, qaxis.Budget(0.05, 16), wide[:1]),
            ((1, 2, 1, 9000, 128), 96, qaxis.Budget(), wide[:1]),
        ]  # fmt: skip
    else:
        shapes = [
            ((1, 2, 1, 300, 32), 24, qaxis.Budget(0.1, 16), wide), ((1, 2, 2, 200, 64), 20, qaxis.Budget(0, 40), wide)
        ]  # fmt: skip
    # The selection in CUDA C++ as well: on a GPU, or emulated.
    backends: tuple[str, ...] = ("triton", "cuda") if gpu or emulator.available() else ("triton",)
    generator = torch.Generator(context.device).manual_seed(context.seed)
    kinds = (*KINDS[::4], "near ties", "ties at the edge") if context.quick else KINDS
    plan = [
        (kind, shape, m, budget, dtype)
        for (i, kind), (shape, m, budget, dtypes) in itertools.product(enumerate(kinds), shapes)
        # The interpreter takes seconds for each: there one dtype a kind.
        for dtype in (dtypes if gpu else dtypes[i % 3 : i % 3 + 1])
    ]
    rows = sets = 0
    worst = 0.0
    wrong: list[str] = []
    names: set[str] = set()
    for kind, shape, m, budget, dtype in context.progress(plan, "attacks"):
        b, h, _, n, d = shape
        q, k, v = attack(kind, shape, dtype, generator)
        if kind in ("zero query", "tiny"):
            q = q.expand(-1, -1, m, -1).contiguous()
        else:
            q = torch.randn(b, h, m, d, generator=generator, device=context.device).to(dtype)
        exact = qaxis.topk_attention(q, k, v, budget, backend="auto")
        for backend in backends if not gpu or (dtype, n) == (torch.bfloat16, 3072) else backends[1:]:
            out = prefill_attention(q, k, v, budget, selection=True, backend=backend)
            assert out.bits is not None
            found = selected_positions(out.bits)
            differ = b * h * m
            if found.shape == exact.indices.shape:
                differ = int((found != exact.indices).any(-1).sum())
            off = float((out.output.float() - exact.output.float()).abs().max() / v.float().abs().max())
            worst = max(worst, off / ALLOWED[dtype])
            label = f"{kind}, {str(dtype)[6:]}, N={n}, D={d}, {backend}"
            if differ or not off <= ALLOWED[dtype]:
                wrong.append(label)
            names.add(label)
            rows, sets = rows + b * h * m, sets + differ
    headline = f"{rows} queries: {sets} sets differ; outputs off by at most {worst:.2f} of what is allowed"
    return Result(
        not wrong, headline + (f"; first: {wrong[0]}" if wrong else ""), headline,
        {"rows": value(rows, "queries"), "sets": value(sets, "queries"), "worst": value(worst, "of what is allowed")},
        rows, {}, sorted(names),
    )  # fmt: skip
