"""Argument checks shared by every public function.

Each message names the argument, the value it had and what is allowed, because the
person who reads it is usually three calls away from the tensor that caused it.
"""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming ``argument``, its ``value`` and what is ``allowed``."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: allowed is {allowed}")


def check_tensor(name: str, x: torch.Tensor, ndim: int | None = None) -> None:
    """Check that ``x`` is a finite, non-empty floating tensor of a supported dtype."""
    check_form(name, x, ndim)
    check_finite(name, x)


def check_form(name: str, x: torch.Tensor, ndim: int | None = None) -> None:
    """Check type, dtype and shape, which needs no look at the numbers."""
    require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
    require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
    if ndim is not None:
        require(x.ndim == ndim, f"{name}.shape", tuple(x.shape), f"{ndim} dimensions")
    require(x.numel() > 0, f"{name}.shape", tuple(x.shape), "every dimension at least 1")


def check_finite(name: str, x: torch.Tensor) -> None:
    """Refuse NaN and Inf, naming the first."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{name}[{where}]={x[where].item()!r}: allowed is finite values (no NaN, no Inf)")


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, *, causal: bool = False) -> None:
    """Check ``q [B,H,M,D]``, ``k [B,Hkv,N,D]`` and, if given, ``v [B,Hkv,N,Dv]`` against each other."""
    check_form("q", q, 4)
    check_form("k", k, 4)
    require(k.shape[0] == q.shape[0], "k.shape[0]", k.shape[0], f"q's batch size {q.shape[0]}")
    require(k.shape[3] == q.shape[3], "k.shape[3]", k.shape[3], f"q's head_dim {q.shape[3]}")
    require(q.shape[1] % k.shape[1] == 0, "q.shape[1]", q.shape[1], f"a multiple of k's {k.shape[1]} heads (GQA)")
    require(k.dtype == q.dtype, "k.dtype", k.dtype, f"q's dtype {q.dtype}")
    require(k.device == q.device, "k.device", str(k.device), f"q's device {q.device}")
    if causal:
        require(
            q.shape[2] <= k.shape[2],
            "q.shape[2]",
            q.shape[2],
            f"at most the {k.shape[2]} keys: with causal=True the queries are the last positions",
        )
    if v is not None:
        check_form("v", v, 4)
        require(v.shape[:3] == k.shape[:3], "v.shape[:3]", tuple(v.shape[:3]), f"k's {tuple(k.shape[:3])}")
        require(v.dtype == q.dtype, "v.dtype", v.dtype, f"q's dtype {q.dtype}")
        require(v.device == q.device, "v.device", str(v.device), f"q's device {q.device}")
        check_finite("v", v)
    check_finite("q", q)
    check_finite("k", k)


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale: ``1/sqrt(head_dim)`` for ``None``, else ``scale``, which must be positive.

    A negative scale would reverse the ranking, a zero scale would erase it.
    """
    if scale is None:
        return head_dim**-0.5
    require(
        isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0,
        "scale",
        scale,
        "a positive finite number (a negative one reverses the ranking)",
    )
    return float(scale)
