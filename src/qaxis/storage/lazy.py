"""A stored side of the cache that passes for its dequantised tensor.

The cache hands it to the model; attention that knows it reads the codes, and any other operation sees ordinary
numbers, which are made when it asks for them. They are made anew each time, so what is written to them would be lost:
in-place operations are refused, on views too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..validation import check_form, require
from .side import Stored


def dequantized(x: Stored) -> torch.Tensor:
    """All tokens ``[B, Hkv, N, D]`` in the model's dtype; on a GPU 8 bits take one kernel, of the same bits."""
    if x.device.type == "cuda":
        # Triton exists for Linux only: without a GPU nothing here needs it.
        from . import triton as kernels

        if kernels.readable(x):
            return kernels.dequantized(x)
    return x.dequantized()


class ReadOnlyTensor(torch.Tensor):
    """Passes for a tensor whose numbers :meth:`dequantized` gives; nothing can be written to it."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> ReadOnlyTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            device=like.device,
        )  # fmt: skip

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.numbers = like

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    def dequantized(self) -> torch.Tensor:
        """The numbers, as an ordinary tensor."""
        return self.numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(ReadOnlyTensor, lambda x: x.dequantized(), (args, kwargs))
        out = func(*args, **kwargs)
        is_view = not func._schema.is_mutable and any(x.alias_info is not None for x in func._schema.returns)
        return tree_map_only(torch.Tensor, ReadOnlyTensor, out) if is_view else out


class LazyTensor(ReadOnlyTensor):
    """``[B, Hkv, N, D]`` in the model's dtype; ``stored`` is what it stands for."""

    stored: Stored

    @staticmethod
    def __new__(cls, stored: Stored) -> LazyTensor:  # type: ignore[override]
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.device)

    def __init__(self, stored: Stored) -> None:
        torch.Tensor.__init__(self)
        self.stored = stored

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, {self.stored.grid})"

    def dequantized(self) -> torch.Tensor:
        """The numbers, as an ordinary tensor; on a GPU 8 bits take one kernel, which gives the same bits."""
        return dequantized(self.stored)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operation that would write to a :class:`ReadOnlyTensor`."""
    if not func._schema.is_mutable:
        return
    given = {**dict(zip((x.name for x in func._schema.arguments), args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(given.get(argument.name), ReadOnlyTensor):
            raise ValueError(
                f"{argument.name}=<what a cache returned>: allowed is reading it, as {func} would be lost; "
                "write to x.clone() instead"
            )


def stored_or_tensor(x: Any) -> Any:
    """What ``x`` stands for where codes can be read: the :class:`Stored` of a cache, else ``x`` as a tensor."""
    if isinstance(x, LazyTensor):
        return x.stored
    return x.dequantized() if isinstance(x, ReadOnlyTensor) else x


def tensor_of(name: str, x: Any) -> Any:
    """What ``x`` stands for as an ordinary tensor: what a cache returned is dequantised, anything else is ``x``.

    Raises:
        ValueError: for a :class:`Stored`, which only some doors read.
    """
    require(not isinstance(x, Stored), name, type(x).__name__, "a torch.Tensor: dequantise it first")
    return x.dequantized() if isinstance(x, ReadOnlyTensor) else x


def checked_tensor(name: str, x: Any, ndim: int | None = None) -> torch.Tensor:
    """:func:`tensor_of`, its form checked."""
    x = tensor_of(name, x)
    check_form(name, x, ndim)
    return x  # type: ignore[no-any-return]
