"""Bitwise equality: Triton against the reference, and the INT8 cache against its bfloat16 twin."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig

import qaxis
from qaxis.attention.logits import Logits
from qaxis.attention.selection import causal_mask
from qaxis.storage.formats import FORMATS

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs.adversarial import ARITHMETIC, make
from ..inputs.seeded import DTYPES
from . import doors

#: (batch, heads, kv heads, queries, keys, head_dim); few rows, as the interpreter takes its time for each
SHAPES = (
    (1, 1, 1, 1, 1, 64), (1, 4, 2, 1, 257, 64), (2, 3, 1, 1, 1000, 128), (1, 8, 1, 1, 300, 80),
    (1, 7, 1, 1, 129, 96), (1, 2, 2, 5, 5, 32), (1, 2, 1, 3, 65, 256),
)  # fmt: skip
#: of a model's heads: what a quantised cache is asked to hold
TWIN_KINDS = ("normal", "wide range", "one dominates", "sink")
TWIN_DIMS = (32, 64, 128)


@dataclass
class _Tally:
    """Triton against the reference, over many cases."""

    gap: float = 0.0
    differ: int = 0
    total: int = 0
    checks: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: qaxis.Budget) -> None:
        a = qaxis.topk_attention(q, k, v, budget, backend="reference")
        b = qaxis.topk_attention(q, k, v, budget, backend="triton")
        self.checks.append(name)
        self.digest.update(a.output.float().cpu().numpy().tobytes() + a.indices.cpu().numpy().tobytes())
        self.total += a.indices.numel()
        if not torch.isfinite(b.output).all():
            self.gap, self.differ = float("inf"), self.differ + a.indices.numel()
            return
        # A bit comparison, so that -0.0 against +0.0 counts.
        same = torch.equal(a.output.float().view(torch.int32), b.output.float().view(torch.int32))
        gap = float((a.output.double() - b.output.double()).abs().max())
        self.gap = max(self.gap, gap if same or gap > 0 else 1e-45)
        self.differ += int((a.indices != b.indices).sum())

    def result(self, opened: doors.Findings) -> Result:
        cases, equal = len(self.checks), self.gap == 0 and self.differ == 0
        agreement = 1 - self.differ / self.total
        values = {
            "max_difference": value(self.gap, "", n=cases), "agreement": value(agreement, "", n=self.total),
            "cases": value(cases, "cases", n=cases),
        }  # fmt: skip
        headline = f"max|dO| = {self.gap:g}, agreement {agreement:g} in {cases} cases"
        if opened.checks:
            tried, right = len(opened.checks), len(opened.checks) - len(opened.wrong)
            values["entries"] = value(right, "layouts and refusals", n=tried)
            headline += f"; {right} of {tried} layouts and refusals right"
        return Result(
            passed=equal and not opened.wrong,
            verdict="bits differ" if not equal else doors.said(opened.wrong) or "bitwise equal",
            headline=headline,
            values=values,
            cases=cases,
            data={"sha256": self.digest.hexdigest(), "wrong": opened.wrong},
            checks=self.checks + opened.checks,
        )


def _need_triton() -> None:
    if find_spec("triton") is None:
        raise NotRunError("triton is not installed (it exists for Linux only): this claim cannot be run here")


def kernel_grid(context: Context) -> Result:
    """Every shape, dtype and kind of data; then every layout, and calls that are to be refused."""
    _need_triton()
    shapes, tally = SHAPES[:3] if context.quick else SHAPES, _Tally()
    plan = list(enumerate(itertools.product(shapes, DTYPES, ARITHMETIC)))
    for i, (s, dtype, kind) in context.progress(plan, "grid"):
        q, k, v = (x.to(context.device) for x in make(kind, s, dtype, context.seed + i))
        # Strided input must give the bits of contiguous input.
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        name = f"{str(dtype)[6:]} B{s[0]} H{s[1]}/{s[2]} M{s[3]} N{s[4]} D{s[5]} {kind}"
        tally.add(name, q, k, v, qaxis.Budget(0.1, 5))
    return tally.result(doors.tried(doors.topk(("reference", "triton")), context.device, context.seed))


def kernel_real(context: Context) -> Result:
    """Queries, keys and values that the model itself computed."""
    _need_triton()
    tally = _Tally()
    plan = list(itertools.product(context.runs.captured, DTYPES, (1, 2)))
    for (layer, q, k, v), dtype, m in context.progress(plan, "layers x dtypes"):
        name = f"layer {layer}, {str(dtype)[6:]}, M={m}"
        tally.add(name, q[:, :, -m:].to(dtype), k.to(dtype), v.to(dtype), qaxis.Budget())
    return tally.result(doors.Findings([], []))


def int8_twin(context: Context) -> Result:
    """Attention on the numbers of a quantised cache, and on the same held in bfloat16: the same bits."""
    _need_triton()
    plan = list(itertools.product(TWIN_DIMS, TWIN_KINDS, FORMATS, ("reference", "triton")))
    wrong: list[str] = []
    checks: list[str] = []
    for i, (dim, kind, format, backend) in enumerate(context.progress(plan, "twins")):
        checks.append(f"{format}, D{dim} {kind}, {backend}")
        problem = _twins_differ(context, dim, kind, format, backend, context.seed + i)
        wrong += [f"{checks[-1]}: {problem}"] if problem else []
    for i, (dim, kind) in enumerate(itertools.product(TWIN_DIMS, TWIN_KINDS)):
        checks.append(f"int8, D{dim} {kind}, codes")
        q, k, v = make(kind, (1, 4, 2, 2, 300, dim), torch.bfloat16, context.seed + 1000 + i)
        if not _codes_give_the_same(q, k, v):
            wrong.append(f"{checks[-1]}: kernels that read the codes differ")
    n = len(checks)
    return Result(
        passed=not wrong,
        verdict=doors.said(wrong) or "bitwise equal",
        headline=f"{n - len(wrong)} of {n} equal",
        values={"differing": value(len(wrong), "cases", n=n), "cases": value(n, "cases", n=n)},
        cases=n,
        checks=checks,
    )


def _twins_differ(context: Context, dim: int, kind: str, format: str, backend: str, seed: int) -> str:
    """What differs between a cache's numbers and their bfloat16 twins, or ""."""
    q, k, v = make(kind, (1, 4, 2, 1, 300, dim), torch.float32, seed)
    q = q.bfloat16()
    k, v = qaxis.Int8Cache(LlamaConfig(num_hidden_layers=1), format=format).update(k, v, 0)
    # The first tokens and those of the open group are not quantised; in bfloat16 they would round.
    first = FORMATS[format].sinks
    k, v = k[:, :, first:256], v[:, :, first:256]
    wide, q, k, v, twin_k, twin_v = (x.to(context.device) for x in (q.float(), q, k, v, k.bfloat16(), v.bfloat16()))
    if not (torch.equal(twin_k.float(), k) and torch.equal(twin_v.float(), v)):
        return "a dequantised number is not exact in bfloat16"
    a = qaxis.topk_attention(wide, k, v, qaxis.Budget(0.1, 20), backend=backend)
    b = qaxis.topk_attention(q, twin_k, twin_v, qaxis.Budget(0.1, 20), backend=backend)
    same = torch.equal(a.indices, b.indices) and torch.equal(a.output.bfloat16(), b.output)
    return "" if same else "output or indices differ"


def _codes_give_the_same(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Kernels on the stored codes, sinks and open group included, against kernels on the dequantised tensors."""
    # Triton exists for Linux only.
    from qaxis.attention import triton as kernels

    cache = qaxis.Int8Cache(LlamaConfig(num_hidden_layers=1))
    cache.update(k, v, 0)
    keys, values = (side.stored() for side in cache.layers[0].sides)  # type: ignore[union-attr]
    allowed, logits = causal_mask(q.shape[2], k.shape[2], q.device), Logits(q.shape[3] ** -0.5)
    k_eff = qaxis.Budget(0.1, 20).of(allowed)
    indices = kernels.choose(q, keys, allowed, k_eff)
    out = kernels.attend(q, keys, values, indices, logits)
    k, v = keys.dequantized(), values.dequantized()
    same = torch.equal(indices, kernels.choose(q, k, allowed, k_eff))
    return same and torch.equal(out, kernels.attend(q, k, v, indices, logits))
