"""Argument checks shared by every public function.

*Form* is what can be told without looking at the numbers: type, layout, dtype, device, shape. Every public door checks
it. *Finiteness* looks at every number, which on a GPU waits for the device: the fast doors leave it to the caller, and
say so. Each message names the argument, the value it had and what is allowed, because the person who reads it is
usually three calls away from the tensor that caused it.
"""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: positions are 32-bit integers in the kernels
MOST_KEYS = (1 << 31) - 1


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming ``argument``, its ``value`` and what is ``allowed``."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: allowed is {allowed}")


def is_integer(x: object) -> bool:
    """Whether ``x`` is an int that is not a bool."""
    return isinstance(x, int) and not isinstance(x, bool)


def check_form(name: str, x: torch.Tensor, ndim: int | None = None) -> None:
    """Check type, layout, dtype and shape of one tensor; any strides are allowed.

    Raises:
        ValueError: naming what is not allowed.
    """
    require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
    require(x.layout == torch.strided, f"{name}.layout", x.layout, "torch.strided")
    require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
    if ndim is not None:
        require(x.ndim == ndim, f"{name}.shape", tuple(x.shape), f"{ndim} dimensions")
    require(x.numel() > 0, f"{name}.shape", tuple(x.shape), "every dimension at least 1")


def check_finite(**tensors: torch.Tensor | None) -> None:
    """Refuse NaN and Inf, naming the first; ``check_finite(q=q, v=None)`` looks at ``q`` alone."""
    for name, x in tensors.items():
        if x is None:
            continue
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            where = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name}[{where}]={x[where].item()!r}: allowed is finite values (no NaN, no Inf)")


def check_like(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """Check that ``x`` has q's dtype and device."""
    require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's dtype {q.dtype}")
    require(x.device == q.device, f"{name}.device", str(x.device), f"q's device {q.device}")


def check_shapes(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, *, causal: bool = False
) -> None:
    """Check shapes ``q [B,H,M,D]``, ``k [B,Hkv,N,D]`` and, if given, ``v [B,Hkv,N,Dv]`` against each other."""
    require(k[0] == q[0], "k.shape[0]", k[0], f"q's batch size {q[0]}")
    require(k[3] == q[3], "k.shape[3]", k[3], f"q's head_dim {q[3]}")
    require(q[1] % k[1] == 0, "q.shape[1]", q[1], f"a multiple of k's {k[1]} heads (GQA)")
    require(k[2] <= MOST_KEYS, "k.shape[2]", k[2], f"at most {MOST_KEYS} keys")
    if causal:
        require(
            q[2] <= k[2], "q.shape[2]", q[2],
            f"at most the {k[2]} keys: with causal=True the queries are the last positions",
        )  # fmt: skip
    if v is not None:
        require(v[:3] == k[:3], "v.shape[:3]", v[:3], f"k's {k[:3]}")


def check_qkv_form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, *, causal: bool = False) -> None:
    """Check the form of ``q [B,H,M,D]``, ``k [B,Hkv,N,D]`` and, if given, ``v [B,Hkv,N,Dv]``, not their numbers.

    Raises:
        ValueError: naming the argument, on another type, layout, dtype, device or shape.
    """
    check_form("q", q, 4)
    check_form("k", k, 4)
    if v is not None:
        check_form("v", v, 4)
    check_shapes(tuple(q.shape), tuple(k.shape), None if v is None else tuple(v.shape), causal=causal)
    check_like("k", k, q)
    if v is not None:
        check_like("v", v, q)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, *, causal: bool = False) -> None:
    """Check form, as :func:`check_qkv_form`, and that every number is finite."""
    check_qkv_form(q, k, v, causal=causal)
    check_finite(v=v, q=q, k=k)


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
