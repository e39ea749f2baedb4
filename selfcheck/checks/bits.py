"""Bitwise equality: Triton against the reference, and the model with qaxis off against the stock model."""

from __future__ import annotations

import hashlib
import itertools
from importlib.util import find_spec

import torch

import qaxis

from ..claim import Context, NotRunError, Result, value

#: (batch, heads, kv heads, queries, keys, head_dim)
SHAPES = (
    (1, 1, 1, 1, 1, 64), (1, 4, 2, 1, 257, 64), (2, 3, 1, 1, 1000, 128), (1, 8, 1, 2, 300, 80),
    (1, 7, 1, 3, 129, 96), (2, 2, 2, 17, 17, 32), (1, 4, 1, 9, 65, 256),
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "equal keys", "near ties", "signed zeros", "wide range")


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """Seeded q, k, v of one adversarial kind, generated on the CPU."""
    batch, heads, kv_heads, m, n, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, m, dim, generator=g)
    k, v = torch.randn(2, batch, kv_heads, n, dim, generator=g)
    if kind == "equal keys":
        k = k[:, :, :1].expand(-1, -1, n, -1)
    elif kind == "near ties":
        k = k[:, :, :1] * (1 + torch.randint(-2, 3, (1, 1, n, 1), generator=g) * 2.0**-23)
    elif kind == "signed zeros":
        k = k * torch.randint(-1, 2, (1, 1, n, 1), generator=g) * 0.0
    elif kind == "wide range":
        k = k * torch.exp2(torch.randint(-12, 4, (1, 1, n, 1), generator=g).float())
    return q.to(dtype), k.to(dtype), v.to(dtype)


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


def _result(gap: float, differ: int, total: int, cases: int, digest: str) -> Result:
    values = {
        "max_difference": value(gap, "", n=cases),
        "agreement": value(1 - differ / total, "", n=total),
        "cases": value(cases, "cases", n=cases),
    }
    headline = f"max|dO| = {gap:g}, agreement {1 - differ / total:g} in {cases} cases"
    data = {"sha256": digest}
    return Result(
        gap == 0 and differ == 0, "bitwise equal" if gap == 0 else "bits differ", headline, values, cases, data
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
    return _result(gap, differ, total, len(plan), digest.hexdigest())


def kernel_real(context: Context) -> Result:
    """Queries, keys and values that the model itself computed."""
    _need_triton()
    gap, differ, total, cases, digest = 0.0, 0, 0, 0, hashlib.sha256()
    plan = list(itertools.product(context.runs.captured, DTYPES, (1, 2)))
    for (_, q, k, v), dtype, m in context.progress(plan, "layers x dtypes"):
        q, k, v = (x.to(dtype) for x in (q[:, :, -m:], k, v))
        g, d, t = _compare(q, k, v, qaxis.Budget(), digest)
        gap, differ, total, cases = max(gap, g), differ + d, total + t, cases + 1
    return _result(gap, differ, total, cases, digest.hexdigest())


def flag_off(context: Context) -> Result:
    """Logits before qaxis, after enable and disable, and after an exception inside the context manager."""
    model, texts = context.subjects.model, context.subjects.texts
    window = 128 if context.quick else 512
    worst, on, cases = 0.0, 0.0, 0
    for ids in context.progress(texts[:2], "texts"):
        ids = ids[:, :window]
        with torch.inference_mode():
            stock = model(ids).logits
            with qaxis.sparse(model, qaxis.Budget(0.05, 8), exactness="selection"):
                on = max(on, float((model(ids).logits - stock).abs().max()))
            try:
                with qaxis.sparse(model, 16, exactness="selection"):
                    model(ids[:, :8])
                    raise KeyError("raised on purpose")
            except KeyError:
                pass
            qaxis.disable(qaxis.enable(model, 32))
            off = model(ids).logits
        same = torch.equal(stock.view(torch.int32), off.view(torch.int32))
        worst = max(worst, float((stock - off).abs().max()), 0.0 if same else 1e-45)
        cases += stock.numel()
    # "On" must differ: otherwise "off" proves nothing.
    values = {
        "max_difference": value(worst, "logits", n=cases),
        "on_difference": value(on, "logits", n=cases),
    }
    headline = f"max|dlogit| = {worst:g} over {cases} logits (on: {on:.2f})"
    return Result(worst == 0 and on > 1e-3, "identical when off, different when on", headline, values, cases)
