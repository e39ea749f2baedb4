"""The public calls on tensors: the query axis, its scores, the exact top-k along it, attention over them.

Keys and values may be what the ``update`` of a quantised cache returns: codes are read where a backend can, else
dequantised, with the bits of the dequantised tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..arithmetic import reference as canonical
from ..budget import Budget, as_budget
from ..storage.lazy import checked_tensor, stored_or_tensor, tensor_of
from ..validation import check_finite, check_no_gradient, check_qkv, check_scale, require
from . import backend as door
from .completion import kind_of, seen_of
from .logits import Logits
from .selection import allowed_keys


class TopKAttention(NamedTuple):
    """Result of :func:`topk_attention`."""

    #: ``[B, H, M, Dv]`` in the dtype of the queries
    output: torch.Tensor
    #: int64 ``[B, H, M, k_eff]``, ascending positions, padded with -1
    indices: torch.Tensor


def unit_query(q: torch.Tensor) -> torch.Tensor:
    """The query axis ``u_Q = q / |q|`` of Theorem 1, over the last dimension.

    Args:
        q: float32, float16 or bfloat16 ``[..., D]``.

    Returns:
        float32 ``[..., D]``, each row of unit length up to rounding.

    Raises:
        ValueError: if a row is zero (it has no axis), or on NaN, Inf, another dtype or no dimension.
    """
    q = checked_tensor("q", q)
    require(q.ndim > 0, "q.shape", tuple(q.shape), "at least 1 dimension")
    check_finite(q=q)
    wide = q.float()
    # Dividing by the largest magnitude first keeps the squares from over- and underflowing.
    largest = wide.abs().amax(dim=-1, keepdim=True)
    zero = largest[..., 0] == 0
    if bool(zero.any()):
        where = tuple(zero.nonzero()[0].tolist())
        raise ValueError(f"q[{where}]=0: allowed is a non-zero query, a zero vector has no axis")
    wide = wide / largest
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)


def canonical_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Raw scores <q, k> in canonical arithmetic (``qaxis.arithmetic``, rules 1 and 2).

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA).

    Returns:
        float32 ``[B, H, M, N]``, no softmax scale applied.

    Raises:
        ValueError: on mismatched shapes, dtypes or devices, NaN or Inf, or scores that overflow.
    """
    q, k = tensor_of("q", q), tensor_of("k", k)
    check_qkv(q, k)
    out = canonical.scores(q, k)
    canonical.check_scores(out)
    return out


def topk_indices(
    q: torch.Tensor, k: torch.Tensor, budget: Budget | int, *, scale: float | None = None, causal: bool = True,
    backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Positions of the k_eff keys that score highest along each query's axis (Theorem 1).

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16. A zero query ties all keys: lowest positions win.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA).
        budget: a :class:`~qaxis.Budget`, or an int in 1..N.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``. Only a budget's tolerance depends on it.
        causal: if True the queries are the last M of the N positions and see no later key.
        backend: ``"reference"`` (PyTorch, any device), ``"triton"`` or ``"auto"``.

    Returns:
        int64 ``[B, H, M, k_eff]``, ascending; rows with a smaller budget end in -1. The set is that of
        the canonical scores, ties going to the lower position, whichever backend computed it.

    Raises:
        ValueError: naming the argument, on anything outside the above.
    """
    q, k = tensor_of("q", q), stored_or_tensor(k)
    check_qkv(q, k, causal=causal)
    door.check_backend(backend)
    logits = Logits(check_scale(scale, q.shape[-1]))
    allowed = allowed_keys(q, k, causal)
    k_eff = door.keys_of(as_budget(budget, k.shape[2]), q, k, allowed, logits)
    return door.select(q, k, allowed, k_eff, backend=backend)


def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    budget: Budget | int,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
    completion: str = "none",
) -> TopKAttention:
    """Softmax attention over the k_eff keys that score highest along each query's axis.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. Same dtype and device; H a multiple of Hkv (GQA).
        budget: a :class:`~qaxis.Budget`, or an int in 1..N.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``. It cannot change the selection.
        causal: if True the queries are the last M of the N positions and see no later key.
        backend: ``"reference"``, ``"triton"`` or ``"auto"``. All return the same bits.
        completion: ``"none"`` is the published method. ``"mean"`` and ``"linear"`` put back what is left out: the exact
            softmax mass of the unselected keys times the mean value, or a line fitted to the values along the query
            (paper, "What top-k leaves out"), of the complete groups of 128 keys that a query sees; where there is none
            nothing is put back, nor where that would leave float32's range, in which a slope is left out first.
            ``"block"`` is ``"linear"``. The indices are the same.

    Raises:
        ValueError: naming the argument, on anything outside the above; for tensors that ask for gradients.
    """
    q, k, v = tensor_of("q", q), stored_or_tensor(k), stored_or_tensor(v)
    check_no_gradient(q, k, v)
    check_qkv(q, k, v, causal=causal)
    door.check_backend(backend)
    logits = Logits(check_scale(scale, q.shape[-1]))
    kind = kind_of(completion)
    allowed = allowed_keys(q, k, causal)
    k_eff = door.keys_of(as_budget(budget, k.shape[2]), q, k, allowed, logits)
    indices = door.select(q, k, allowed, k_eff, backend=backend)
    seen = None if kind == "none" else seen_of(allowed)
    return TopKAttention(door.attend(q, k, v, indices, logits, backend=backend, completion=kind, seen=seen), indices)
