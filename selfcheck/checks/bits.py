"""Bitwise equality: Triton against the reference, and the INT8 cache against its bfloat16 twin."""

from __future__ import annotations

import hashlib
import itertools
from importlib.util import find_spec

import torch
from transformers import LlamaConfig

import qaxis
from qaxis.attention.selection import causal_mask
from qaxis.storage.formats import FORMATS

from ..harness.claim import Context, NotRunError, Result, value
from ..inputs.seeded import DTYPES, KINDS, make

#: (batch, heads, kv heads, queries, keys, head_dim)
SHAPES = (
    (1, 1, 1, 1, 1, 64), (1, 4, 2, 1, 257, 64), (2, 3, 1, 1, 1000, 128), (1, 8, 1, 2, 300, 80),
    (1, 7, 1, 3, 129, 96), (2, 2, 2, 17, 17, 32), (1, 4, 1, 9, 65, 256),
)  # fmt: skip


def _compare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: qaxis.Budget, digest: hashlib._Hash
) -> tuple[float, int, int]:
    """(max|dO|, differing indices, indices) of Triton against the reference."""
    a = qaxis.topk_attention(q, k, v, budget, backend="reference")
    b = qaxis.topk_attention(q, k, v, budget, backend="triton")
    digest.update(a.output.float().cpu().numpy().tobytes() + a.indices.cpu().numpy().tobytes())
    if not torch.isfinite(b.output).all():
        return float("inf"), a.indices.numel(), a.indices.numel()
    # A bit comparison, so that -0.0 against +0.0 counts.
    same = torch.equal(a.output.float().view(torch.int32), b.output.float().view(torch.int32))
    gap = float((a.output.double() - b.output.double()).abs().max())
    return gap if same or gap > 0 else 1e-45, int((a.indices != b.indices).sum()), a.indices.numel()


def _result(gap: float, differ: int, total: int, checks: list[str], digest: str) -> Result:
    cases = len(checks)
    values = {
        "max_difference": value(gap, "", n=cases),
        "agreement": value(1 - differ / total, "", n=total),
        "cases": value(cases, "cases", n=cases),
    }
    headline = f"max|dO| = {gap:g}, agreement {1 - differ / total:g} in {cases} cases"
    data = {"sha256": digest}
    return Result(
        gap == 0 and differ == 0, "bitwise equal" if gap == 0 else "bits differ", headline, values, cases, data, checks
    )


def _need_triton() -> None:
    if find_spec("triton") is None:
        raise NotRunError("triton is not installed (it exists for Linux only): this claim cannot be run here")


def kernel_grid(context: Context) -> Result:
    """Every shape, dtype and kind of data."""
    _need_triton()
    shapes = SHAPES[:3] if context.quick else SHAPES
    plan = list(enumerate(itertools.product(shapes, DTYPES, KINDS)))
    gap, differ, total, digest = 0.0, 0, 0, hashlib.sha256()
    for i, (shape, dtype, kind) in context.progress(plan, "grid"):
        q, k, v = (x.to(context.device) for x in make(kind, shape, dtype, context.seed + i))
        # Strided input must give the bits of contiguous input.
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        g, d, t = _compare(q, k, v, qaxis.Budget(0.1, 5), digest)
        gap, differ, total = max(gap, g), differ + d, total + t
    checks = [f"{str(t)[6:]} B{s[0]} H{s[1]}/{s[2]} M{s[3]} N{s[4]} D{s[5]} {kind}" for _, (s, t, kind) in plan]
    return _result(gap, differ, total, checks, digest.hexdigest())


def kernel_real(context: Context) -> Result:
    """Queries, keys and values that the model itself computed."""
    _need_triton()
    gap, differ, total, checks, digest = 0.0, 0, 0, [], hashlib.sha256()
    plan = list(itertools.product(context.runs.captured, DTYPES, (1, 2)))
    for (layer, q, k, v), dtype, m in context.progress(plan, "layers x dtypes"):
        q, k, v = (x.to(dtype) for x in (q[:, :, -m:], k, v))
        g, d, t = _compare(q, k, v, qaxis.Budget(), digest)
        gap, differ, total = max(gap, g), differ + d, total + t
        checks.append(f"layer {layer}, {str(dtype)[6:]}, M={m}")
    return _result(gap, differ, total, checks, digest.hexdigest())


def int8_twin(context: Context) -> Result:
    """Attention on the numbers of a quantised cache, and on the same held in bfloat16: the same bits."""
    _need_triton()
    kinds, config = ("normal", "wide range", "one dominates", "sink"), LlamaConfig(num_hidden_layers=1)
    plan = list(itertools.product((32, 64, 128), kinds, FORMATS, ("reference", "triton")))
    wrong: list[str] = []
    checks: list[str] = []
    for i, (dim, kind, name, backend) in enumerate(context.progress(plan, "twins")):
        shape = (1, 4, 2, 3, 300, dim)
        q, k, v = make(kind, shape, torch.float32, context.seed + i)
        q = q.bfloat16()
        k, v = qaxis.Int8Cache(config, format=name).update(k, v, 0)
        # The first tokens and those of the open group are not quantised; in bfloat16 they would round.
        first = FORMATS[name].sinks
        k, v = k[:, :, first:256], v[:, :, first:256]
        wide, k, v, twin_k, twin_v = (x.to(context.device) for x in (q.float(), k, v, k.bfloat16(), v.bfloat16()))
        a = qaxis.topk_attention(wide, k, v, qaxis.Budget(0.1, 20), backend=backend)
        b = qaxis.topk_attention(q.to(context.device), twin_k, twin_v, qaxis.Budget(0.1, 20), backend=backend)
        name = f"{name}, D{dim} {kind}, {backend}"
        checks.append(name)
        if not (torch.equal(twin_k.float(), k) and torch.equal(twin_v.float(), v)):
            wrong.append(f"{name}: a dequantised number is not exact in bfloat16")
        elif not (torch.equal(a.indices, b.indices) and torch.equal(a.output.bfloat16(), b.output)):
            wrong.append(f"{name}: output or indices differ")
    for i, (dim, kind) in enumerate(itertools.product((32, 64, 128), kinds)):
        name = f"int8, D{dim} {kind}, codes"
        checks.append(name)
        q, k, v = make(kind, (1, 4, 2, 3, 300, dim), torch.bfloat16, context.seed + 1000 + i)
        if not _codes_give_the_same(q, k, v):
            wrong.append(f"{name}: kernels that read the codes differ")
    n = len(checks)
    values = {"differing": value(len(wrong), "cases", n=n), "cases": value(n, "cases", n=n)}
    headline = f"{n - len(wrong)} of {n} equal"
    return Result(not wrong, wrong[0] if wrong else "bitwise equal", headline, values, n, checks=checks)


def _codes_give_the_same(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Kernels on the stored codes, sinks and open group included, against kernels on the dequantised tensors."""
    from qaxis.attention import triton as kernels

    cache = qaxis.Int8Cache(LlamaConfig(num_hidden_layers=1))
    cache.update(k, v, 0)
    keys, values = (side.stored() for side in cache.layers[0].sides)  # type: ignore[union-attr]
    allowed, scale = causal_mask(q.shape[2], k.shape[2], q.device), q.shape[3] ** -0.5
    k_eff = qaxis.Budget(0.1, 20).of(allowed)
    indices = kernels.choose(q, keys, allowed, k_eff)
    out = kernels.attend(q, keys, values, indices, scale)
    k, v = keys.dequantized(), values.dequantized()
    same = torch.equal(indices, kernels.choose(q, k, allowed, k_eff))
    return same and torch.equal(out, kernels.attend(q, k, v, indices, scale))
