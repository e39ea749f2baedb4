"""Argument checks shared by every public function.

*Form* is what can be told without looking at the numbers: type, layout, dtype, device, shape. Every public door checks
it. *Finiteness* looks at every number, which on a GPU waits for the device: the fast doors leave it to the caller, and
say so. Each message names the argument, the value it had and what is allowed, because the person who reads it is
usually three calls away from the tensor that caused it.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: positions are 32-bit integers in the kernels
MOST_KEYS = (1 << 31) - 1
#: softmax scales that are normal float32 numbers, also times log2(e): others would round differently between backends
LEAST_SCALE, MOST_SCALE = 2.0**-125, 2.0**127


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming ``argument``, its ``value`` and what is ``allowed``."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: allowed is {allowed}")


def is_integer(x: object) -> bool:
    """Whether ``x`` is an int that is not a bool."""
    return isinstance(x, int) and not isinstance(x, bool)


def check_flag(name: str, x: object) -> None:
    """Refuse anything but True and False."""
    require(isinstance(x, bool), name, x, "True or False")


def has_memory(x: torch.Tensor) -> bool:
    """Whether the numbers of ``x``, which has some, lie where kernels can read them.

    A tensor of a tracer, of vmap or of a subclass that makes its numbers when they are asked for has no such place.
    """
    try:
        return x.data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def check_memory(name: str, x: torch.Tensor) -> None:
    """Check that ``x`` is a dense tensor whose memory holds its numbers as they are: kernels read nothing else.

    Raises:
        ValueError: naming what is not allowed.
    """
    require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
    require(not x.is_nested, f"{name}.is_nested", True, "a dense tensor: pad it, or call once for each part")
    require(x.layout == torch.strided, f"{name}.layout", x.layout, "torch.strided")
    require(x.device.type != "meta", f"{name}.device", str(x.device), "a device that holds numbers")
    require(not x.is_neg(), f"{name}.is_neg()", True, "numbers as they lie in memory: call resolve_neg()")
    require(not x.is_conj(), f"{name}.is_conj()", True, "numbers as they lie in memory: call resolve_conj()")
    if x.numel():
        require(has_memory(x), name, type(x).__name__, "a tensor with memory, not one of a tracer or of a transform")


def check_form(name: str, x: torch.Tensor, ndim: int | None = None) -> None:
    """Check type, layout, dtype, shape and memory of one tensor; any strides are allowed.

    Raises:
        ValueError: naming what is not allowed.
    """
    check_memory(name, x)
    require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
    if ndim is not None:
        require(x.ndim == ndim, f"{name}.shape", tuple(x.shape), f"{ndim} dimensions")
    require(x.numel() > 0, f"{name}.shape", tuple(x.shape), "every dimension at least 1")


def check_finite(**tensors: Any) -> None:
    """Refuse NaN and Inf, naming the first; ``check_finite(q=q, v=None)`` looks at ``q`` alone.

    What is no tensor but stands for one, as a side of a cache does, looks at itself.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            x.check_finite(name)
            continue
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            where = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name}[{where}]={x[where].item()!r}: allowed is finite values (no NaN, no Inf)")


def check_no_gradient(*tensors: Any) -> None:
    """Refuse tensors that ask for gradients: those of queries and keys through a selection would be missing.

    What is no tensor but stands for one, as a side of a cache does, takes no part in gradients.
    """
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
        raise ValueError("requires_grad=True: allowed is inference under torch.no_grad(); selection has no gradient")


def check_like(name: str, x: Any, q: torch.Tensor) -> None:
    """Check that ``x`` has q's dtype and device."""
    require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's dtype {q.dtype}")
    require(x.device == q.device, f"{name}.device", str(x.device), f"q's device {q.device}")


def check_shapes(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, *, causal: bool = False
) -> None:
    """Check shapes ``q [B,H,M,D]``, ``k [B,Hkv,N,D]`` and, if given, ``v [B,Hkv,N,Dv]`` against each other."""
    check_flag("causal", causal)
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


def check_qkv_form(q: torch.Tensor, k: Any, v: Any = None, *, causal: bool = False) -> None:
    """Check the form of ``q [B,H,M,D]``, ``k [B,Hkv,N,D]`` and, if given, ``v [B,Hkv,N,Dv]``, not their numbers.

    k and v may also be sides of a cache, which check themselves.

    Raises:
        ValueError: naming the argument, on another type, layout, dtype, device or shape.
    """
    check_form("q", q, 4)
    for name, x in (("k", k), ("v", v)):
        if x is not None and hasattr(x, "check_form"):
            x.check_form(name)
        elif x is not None:
            check_form(name, x, 4)
    check_shapes(tuple(q.shape), tuple(k.shape), None if v is None else tuple(v.shape), causal=causal)
    check_like("k", k, q)
    if v is not None:
        check_like("v", v, q)


def check_qkv(q: torch.Tensor, k: Any, v: Any = None, *, causal: bool = False) -> None:
    """Check form, as :func:`check_qkv_form`, and that every number is finite."""
    check_qkv_form(q, k, v, causal=causal)
    check_finite(v=v, q=q, k=k)


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale: ``1/sqrt(head_dim)`` for ``None``, else ``scale``, a real number in [2^-125, 2^127].

    A negative scale would reverse the ranking, a zero scale would erase it.

    Raises:
        ValueError: for anything else.
    """
    if scale is None:
        return head_dim**-0.5
    real = isinstance(scale, Real) and not isinstance(scale, bool)
    allowed = "a real number in [2^-125, 2^127] (a negative one reverses the ranking)"
    require(real and LEAST_SCALE <= scale <= MOST_SCALE, "scale", scale, allowed)
    return float(scale)
