"""The one door between what attention means and what computes it: selection and attention, on any backend.

Every backend gives the same bits. Keys and values are tensors or caches; what a backend cannot read as it is stored is
dequantised first.
"""

from __future__ import annotations

from functools import partial

import torch

from ..budget import Budget
from ..storage.lazy import dequantized
from ..storage.side import Stored
from ..validation import require
from . import completed, reference, selection, tolerance
from .always import NONE, Always, choose_beside
from .completion import Seen
from .logits import Logits

BACKENDS = ("auto", "reference", "triton")


def check_backend(backend: str) -> None:
    """Refuse a name that is no backend's."""
    require(backend in BACKENDS, "backend", backend, "'auto', 'reference' or 'triton'")


def runs_on_triton(backend: str, device: torch.device) -> bool:
    """Whether kernels compute it: ``"auto"`` is Triton for tensors on a GPU, the reference elsewhere."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _as_tensor(x: torch.Tensor | Stored) -> torch.Tensor:
    return dequantized(x) if isinstance(x, Stored) else x


def keys_of(
    budget: Budget, q: torch.Tensor, keys: torch.Tensor | Stored, allowed: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """How many of the ``allowed`` keys ``budget`` gives every query, int64, broadcastable to ``[B, H, M]``."""
    if budget.tolerance is None:
        return budget.of(allowed)
    return tolerance.keys_of(budget, q, _as_tensor(keys), allowed, logits)


def select(
    q: torch.Tensor, keys: torch.Tensor | Stored, allowed: torch.Tensor, k_eff: torch.Tensor,
    *, backend: str = "auto", always: Always = NONE,
) -> torch.Tensor:  # fmt: skip
    """Positions of the ``k_eff`` best of the ``allowed`` keys of every query, int64 ``[B, H, M, width]``.

    Args:
        q: ``[B, H, M, D]``. keys: ``[B, Hkv, N, D]``.
        allowed: bool, ``[B|1, H|1, M|1, N]``; keys a query may see.
        k_eff: int64, broadcastable to ``[B, H, M]``; how many of them it keeps.
        always: keys that are kept in any case; they count towards k_eff.

    Returns:
        ascending positions, padded with -1.
    """
    if runs_on_triton(backend, q.device):
        # Triton, for Linux only, is loaded when it is needed.
        from ..storage.triton import readable
        from . import triton as kernels

        choose = partial(kernels.choose, keys=keys if readable(keys) else _as_tensor(keys))
    else:
        choose = partial(selection.choose, k=_as_tensor(keys))
    if always == NONE:
        return choose(q, allowed=allowed, k_eff=k_eff)
    return choose_beside(lambda q, allowed, k_eff: choose(q, allowed=allowed, k_eff=k_eff), q, allowed, k_eff, always)


def attend(
    q: torch.Tensor, keys: torch.Tensor | Stored, values: torch.Tensor | Stored, indices: torch.Tensor, logits: Logits,
    *, backend: str = "auto", completion: str = "none", seen: Seen | None = None, kept: completed.Kept | None = None,
) -> torch.Tensor:  # fmt: skip
    """Canonical attention over given ``indices``, ``[B, H, M, Dv]`` in q's dtype.

    Args:
        completion: a kind of :data:`~qaxis.attention.completion.KINDS`; sums that are completed are PyTorch's on every
            backend.
        seen: the keys that each query sees; needed for a completion alone.
        kept: for a completion, moments that a cache keeps.
    """
    if completion != "none":
        assert seen is not None
        return completed.attend(q, _as_tensor(keys), _as_tensor(values), indices, logits, completion, seen, kept)
    if runs_on_triton(backend, q.device):
        # Triton, for Linux only, is loaded when it is needed.
        from ..storage.triton import readable
        from . import triton as kernels

        if not readable(keys, values):
            keys, values = _as_tensor(keys), _as_tensor(values)
        return kernels.attend(q, keys, values, indices, logits)
    return reference.attend(q, _as_tensor(keys), _as_tensor(values), indices, logits)
