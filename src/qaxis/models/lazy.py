"""A stored side of the cache that passes for its dequantised tensor.

The cache hands it to the model; attention that knows it reads the codes, and any other operation sees ordinary
numbers, which are made when it asks for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..attention import backend
from ..storage.side import Stored


class LazyTensor(torch.Tensor):
    """``[B, Hkv, N, D]`` in the model's dtype; ``stored`` is what it stands for."""

    stored: Stored

    @staticmethod
    def __new__(cls, stored: Stored) -> LazyTensor:
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.codes.device)

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, {self.stored.grid})"

    def dequantized(self) -> torch.Tensor:
        """The numbers, as an ordinary tensor; on a GPU 8 bits take one kernel, which gives the same bits."""
        return backend.dequantized(self.stored)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, lambda x: x.dequantized(), (args, kwargs or {}))
        return func(*args, **kwargs)
