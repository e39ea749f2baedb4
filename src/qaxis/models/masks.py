"""Which keys a query may see: the mask that transformers makes for qaxis, and reading any mask that arrives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import get_default_nowrap_functions
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from ..attention.selection import causal_mask
from ..validation import require
from . import compiled
from .settings import NAME
from .switching import original_of


@dataclass(frozen=True)
class Shown:
    """What M causal queries, the last of N positions, see of the keys: two numbers a batch row instead of a mask.

    Attributes:
        pads: int32 ``[B]``, so many first keys are padding; None: none is.
        window: a query sees the last so many keys at most, itself included; None: all before it.
        offset: so many tokens came before the first of these keys, which a window dropped.
        lasts: whether these numbers describe later tokens too.
    """

    pads: torch.Tensor | None = None
    window: int | None = None
    offset: int = 0
    lasts: bool = True


class ToldMask(torch.Tensor):
    """A mask ``[..., N]`` that tells how many tokens a window dropped before the first of its N keys.

    So does what operations make of it, as long as it is a bool tensor of as many keys: models copy their masks, move
    them to other devices and cut queries off.
    """

    dropped: int

    @staticmethod
    def of(mask: torch.Tensor, dropped: int) -> ToldMask:
        """The same memory."""
        told = mask.as_subclass(ToldMask)
        told.dropped = dropped
        return told

    def __deepcopy__(self, memo: dict[int, Any]) -> ToldMask:
        return ToldMask.of(copy.deepcopy(self.as_subclass(torch.Tensor), memo), self.dropped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            # What the memory is a view of is no mask of its own: asked for its view in turn, it would never end.
            return out if func in get_default_nowrap_functions() else _telling(out, (args, kwargs))


torch.serialization.add_safe_globals([ToldMask])


def _telling(out: Any, given: Any) -> Any:
    """What an operation made of its arguments, telling what was dropped where all masks among those tell the same."""
    if type(out) in (tuple, list):
        return type(out)(_telling(x, given) for x in out)
    told = [x for x in tree_leaves(given) if isinstance(x, ToldMask | ShownMask)]
    mask = isinstance(out, torch.Tensor) and not isinstance(out, ToldMask | ShownMask)
    mask = mask and out.dtype == torch.bool and out.layout == torch.strided
    same = mask and out.shape[-1:] == told[0].shape[-1:] and all(x.dropped == told[0].dropped for x in told)
    return ToldMask.of(out, told[0].dropped) if same else out


class ShownMask(torch.Tensor):
    """A causal mask, bool ``[B, 1, M, N]``, that is made only if an operation other than qaxis's attention reads it.

    ``shown`` describes it in a few numbers, as M * N booleans would outgrow memory with long prompts. What may have
    been written to is described no more; the last of its queries alone are.
    """

    @staticmethod
    def __new__(
        cls, layout: torch.Tensor, device: torch.device, shown: Shown, make: Callable[[], torch.Tensor],
        of: ShownMask | None = None,
    ) -> ShownMask:  # fmt: skip
        return torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, layout.stride(), layout.storage_offset(), dtype=torch.bool, device=device
        )

    def __init__(
        self, layout: torch.Tensor, device: torch.device, shown: Shown, make: Callable[[], torch.Tensor],
        of: ShownMask | None = None,
    ) -> None:  # fmt: skip
        """A mask laid out in memory as ``layout`` on the meta device, or the last queries ``of`` another."""
        super().__init__()
        self.layout_in_memory, self.described, self.make = layout, shown, make
        self.made: torch.Tensor | None = None
        #: not empty once this memory may have been written to; of a mask and its last queries the same list
        self.written: list[bool] = [] if of is None else of.written

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShownMask({tuple(self.shape)}, {self.shown})"

    @property
    def shown(self) -> Shown | None:
        """What it is, in a few numbers; None once it may have been written to."""
        return None if self.written else self.described

    @property
    def dropped(self) -> int:
        """How many tokens a window dropped before the first key."""
        return self.described.offset

    def whole(self) -> torch.Tensor:
        """The mask as an ordinary tensor, the same at every call."""
        if self.made is None:
            self.made = self.make()
        return self.made

    @torch.compiler.disable(reason="a compiler cannot make tensors of a kind of our own")
    def last(self, m: int) -> ShownMask:
        """A view of the last ``m`` queries."""
        layout = self.layout_in_memory[:, :, -m:]
        return ShownMask(layout, self.device, self.described, lambda: self.whole()[:, :, -m:], self)

    def copied(self) -> ToldMask:
        """An ordinary tensor of its own that tells the same."""
        return ToldMask.of(self.whole().clone(), self.dropped)

    def shared(self) -> torch.Tensor:
        """The mask as an ordinary tensor, for whoever may write to its memory."""
        self.written.append(True)
        return self.whole()

    # What reads memory, or takes other memory, and is no operation:

    @property
    def data(self) -> torch.Tensor:
        return self.shared().data

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        self.shared().data = values

    def __deepcopy__(self, memo: dict[int, Any]) -> ToldMask:
        return self.copied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.copied().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.whole().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.shared().numpy(force=force)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.shared().__dlpack__(**kwargs)

    def share_memory_(self) -> ShownMask:
        self.shared().share_memory_()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if (m := _last_queries(func, args, kwargs)) is not None:
            return args[0].last(m)
        shares = func._schema.is_mutable or any(x.alias_info is not None for x in func._schema.returns)

        def plain(x: ShownMask | ToldMask) -> torch.Tensor:
            if isinstance(x, ToldMask):
                return x.as_subclass(torch.Tensor)
            # Through a view, too, the mask may be written to.
            return x.shared() if shares else x.whole()

        plains, named = tree_map_only((ShownMask, ToldMask), plain, (args, kwargs))
        return _telling(func(*plains, **named), (args, kwargs))


def _last_queries(func: Any, args: Any, kwargs: Any) -> int | None:
    """How many last queries of a mask a slice takes; None if this is anything else."""
    if func is not torch.ops.aten.slice.Tensor or kwargs or len(args) != 4 or args[1] not in (2, -2):
        return None
    queries, (start, end) = args[0].shape[2], args[2:]
    if not isinstance(start, int) or not isinstance(end, int) or end < queries:
        return None
    m = -start if start < 0 else queries - start
    return m if 0 < m <= queries else None


def _is_function(f: Any, g: Any) -> bool:
    """Whether two functions have the same code and hold the same things."""
    if not isinstance(f, FunctionType) or not isinstance(g, FunctionType):
        if isinstance(f, tuple) and isinstance(g, tuple):
            return len(f) == len(g) and all(map(_is_function, f, g))
        return type(f) is type(g) and isinstance(f, (int, str, bool, type(None))) and bool(f == g)
    held, other = (tuple(c.cell_contents for c in x.__closure__ or ()) for x in (f, g))
    return f.__code__ is g.__code__ and _is_function(held, other)


def left_pads(mask: torch.Tensor | None, start: int, n: int) -> torch.Tensor | bool | None:
    """How many of the keys ``[start, start + n)`` are padding, int32 ``[B]``; None if none is, False if not the first.

    Looking waits for the device.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] < start + n:
        return False
    real = mask[:, start : start + n] != 0
    pads = n - real.sum(1)
    first = real == (torch.arange(n, device=mask.device) >= pads[:, None])
    padded, contiguous = torch.stack([pads.any(), first.all()]).tolist()
    if not contiguous:
        return False
    return pads.int() if padded else None


def _shown(q_length: int, kv_length: int, kwargs: dict[str, Any]) -> Shown | None:
    """What the arguments of a mask describe, if a :class:`Shown` does."""
    q_offset, kv_offset = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    function, window = kwargs.get("mask_function", causal_mask_function), kwargs.get("local_size")
    expected = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    places = isinstance(q_offset, int) and isinstance(kv_offset, int)
    if not places or q_offset + q_length != kv_offset + kv_length or not _is_function(function, expected):
        return None
    pads = left_pads(kwargs.get("attention_mask"), kv_offset, kv_length)
    return None if isinstance(pads, bool) else Shown(pads, window, kv_offset)


def make_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """transformers' boolean mask ``[B, 1, M, N]``; left out only where its absence cannot be misread.

    SDPA reads no mask as causal from the *first* key on, which is how transformers uses it with a static cache;
    here no mask means that the queries are the last positions. Both agree for one query, or as many as keys, in
    modules that are causal and get every query. A mask of causal queries at the end, left-padded or in a sliding
    window or neither, is a :class:`ShownMask`. It tells of a window that hides nothing yet as well: a step that is
    captured then is repeated for tokens from which the window hides some.

    A bidirectional mask is for modules that stay what they are (cross attention): it is made as they expect it.
    """
    return None if compiled.is_tracing() else _made(batch_size, q_length, kv_length, kwargs)


@torch.compiler.disable(reason="a compiler cannot make tensors of kinds of our own; attention is not compiled either")
def _made(batch_size: int, q_length: int, kv_length: int, kwargs: dict[str, Any]) -> Any:
    """What :func:`make_mask` gives where code runs that is not traced whole."""
    before, causal = original_of(kwargs.get("config")) or (None, False)
    if "allow_is_bidirectional_skip" in kwargs and before not in (None, NAME):
        known = AttentionMaskInterface()[before]
        return known(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    whole = causal and q_length == kv_length and not _cuts_queries(kwargs.get("config"))
    skip = kwargs.pop("allow_is_causal_skip", True) and (q_length == 1 or whole)
    kwargs["allow_is_bidirectional_skip"] = False
    shown, local = _shown(q_length, kv_length, kwargs), kwargs.get("local_size")
    # Only a token's step is repeated.
    told = local is not None and q_length == 1
    if shown is None:
        dropped = kwargs.get("kv_offset", 0)
        known = sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=skip, **kwargs)
        if known is not None or not told:
            return None if known is None else ToldMask.of(known, dropped)
        # A chunk, say, that began with the first of these keys: later tokens see none of them.
        shown = Shown(offset=dropped, lasts=False)
    elif skip and shown.pads is None and (local is None or (kv_length <= local and not told)):
        return None

    # All rows of a batch are the same but for their padding; memory holds them once then, as transformers has it.
    rows, size = 1 if shown.pads is None else batch_size, (batch_size, 1, q_length, kv_length)

    def make() -> torch.Tensor:
        mask: Any = sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=False, **kwargs)
        return mask[:rows].contiguous().expand(size)

    layout = torch.empty(rows, *size[1:], dtype=torch.bool, device="meta").expand(size)
    return ShownMask(layout, torch.device(kwargs.get("device", "cpu")), shown, make)


def _cuts_queries(config: Any) -> bool:
    """Whether layers get the last queries alone, and of a mask their rows: those that share the keys of others."""
    return bool(getattr(config, "num_kv_shared_layers", 0))


def shown_by(
    module: nn.Module, mask: Any, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> Shown | None:
    """What a mask shows, in a few numbers, or None if only the mask itself tells; arguments as for visible keys."""
    m, n = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if mask is None:
        return Shown() if m == 1 or (causal and m == n) else None
    if isinstance(mask, ShownMask) and (m == 1 or causal) and tuple(mask.shape[2:]) == (m, n):
        return mask.shown
    return None


def dropped_before(mask: Any, window: int | None, m: int, n: int) -> int:
    """How many tokens came before the first of N keys that M queries meet, which a window dropped.

    Args:
        mask: of the call, as :func:`visible_keys` takes it.
        window: of the layer, None if it has none.

    Raises:
        ValueError: if nothing tells: the window is full, and the mask is not one that is made here.
    """
    if isinstance(mask, ShownMask | ToldMask):
        return mask.dropped
    # Queries that are all of the keys are all of the text; of a window that is not full nothing was dropped.
    whole = window is None or n < window or m == n
    told = "the model's own mask, which tells how many tokens a full window dropped: completion counts from the first"
    require(whole, "attention_mask", type(mask).__name__, told)
    return 0


def visible_keys(
    module: nn.Module, mask: Any, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> torch.Tensor:
    """The keys that each query may see, bool ``[B or 1, H or 1, M or 1, N]``.

    Args:
        mask: as attention functions of transformers get it: bool or additive (0, or the dtype's lowest number or -inf)
            ``[B, 1, M, N]`` with N at least that of the keys; ``[B, N]``, of padding; or None.
        is_causal: of the call; None: the module decides.

    Raises:
        ValueError: for an additive mask with other numbers, which is a bias, or a mask that does not fit.
    """
    m, n = query.shape[2], key.shape[2]
    mask = mask.whole() if isinstance(mask, ShownMask) else mask
    mask = mask.as_subclass(torch.Tensor) if isinstance(mask, ToldMask) else mask
    causal = m > 1 and (is_causal if is_causal is not None else bool(getattr(module, "is_causal", True)))
    if mask is None:
        require(not causal or m == n, "attention_mask", None, f"a mask for {m} queries that meet {n} keys")
        return _everything(m, n, causal, query.device)
    require(isinstance(mask, torch.Tensor), "attention_mask", type(mask).__name__, "a tensor or None")
    if mask.ndim == 2:
        return (mask[:, None, None, -n:] != 0) & _everything(m, n, causal, query.device)
    fits = mask.ndim == 4 and mask.shape[0] in (1, query.shape[0]) and mask.shape[1] in (1, query.shape[1])
    fits = fits and mask.shape[2] in (1, m) and mask.shape[3] >= n
    require(fits, "attention_mask.shape", tuple(mask.shape), f"broadcastable to {(*query.shape[:3], n)}")
    mask = mask[..., :n]
    return mask if mask.dtype == torch.bool else _without_bias(mask)


def _everything(m: int, n: int, causal: bool, device: torch.device) -> torch.Tensor:
    return causal_mask(m, n, device) if causal else torch.ones(1, 1, 1, n, dtype=torch.bool, device=device)


def _without_bias(mask: torch.Tensor) -> torch.Tensor:
    """The keys that an additive mask shows, which must add nothing to their scores."""
    require(mask.is_floating_point(), "attention_mask.dtype", mask.dtype, "bool, or an additive floating mask")
    shown = mask == 0
    # Masks are added to one another: the lowest number twice is -inf.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    clear = bool((shown | hidden).all())
    if not clear:
        value = mask[~(shown | hidden)][0].item()
        require(
            clear, "attention_mask", value,
            "0 for visible keys and the lowest number or -inf for others; a bias that differs between keys breaks "
            "Theorem 1",
        )  # fmt: skip
    return shown


AttentionMaskInterface.register(NAME, make_mask)
