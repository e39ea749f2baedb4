"""What the layers of our caches have in common, whichever way they hold keys and values."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DynamicLayer

from ..storage.shared import Holder, Shared
from ..validation import check_form, require

#: of the tensors that a layer returns: what holds them
HOLDER = "qaxis_key_values"
#: arguments of ``update``
STATES = ("key_states", "value_states")
#: of an empty layer of transformers: what ours say for themselves
_REPLACED = ("keys", "values", "cumulative_length")

SomeLayer = TypeVar("SomeLayer", bound="HoldingLayer")


def holds_nothing(layer: Any) -> bool:
    """Whether a layer of a cache stands for one that attends to nothing, or to what another layer holds."""
    return type(layer).__name__ == "DummyLayer"  # not in every version of transformers that we support


def tokens_left(length: int, tokens_to_remove: int | torch.Tensor) -> int:
    """Tokens of ``length`` that a crop leaves; transformers passes how many to remove as a negative number.

    Raises:
        ValueError: for a positive number, or more tokens than are stored.
    """
    # Assisted decoding passes a tensor.
    tokens_to_remove = int(tokens_to_remove)
    require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, "0 or a negative number of tokens")
    require(length + tokens_to_remove >= 0, "tokens_to_remove", tokens_to_remove, f"at most the {length} stored")
    return length + tokens_to_remove


class HoldingLayer(DynamicLayer):
    """A layer whose keys and values lie in a :class:`~qaxis.storage.shared.Holder`, made for the first states.

    Attributes:
        shared: what the layers of the cache share.
        room: tokens to make room for at once.
        told: whether what is returned tells attention what holds it: not if that is elsewhere by then.
        kv: what holds keys and values; None before anything was written.
        savable: whether keys and values are all there is to it.
    """

    shared: Shared
    room: int
    told: bool
    kv: Holder | None = None
    savable = True

    @classmethod
    def in_place_of(
        cls: type[SomeLayer], layer: DynamicLayer, shared: Shared, room: int, *, told: bool = True, **own: Any
    ) -> SomeLayer:
        """One with what the empty ``layer`` has, but for its keys and values; ``own`` are attributes of its kind."""
        new = cls.__new__(cls)
        vars(new).update({name: x for name, x in vars(layer).items() if name not in _REPLACED})
        vars(new).update(shared=shared, room=room, told=told, **own)
        return new

    @abstractmethod
    def _new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Holder:
        """An empty holder of such states ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._hold(self._new(key_states, value_states))

    def _hold(self, kv: Holder) -> None:
        if self.kv is not kv and self.kv is not None:
            self.kv.leave()
        self.kv, self.is_initialized = kv, True
        self.dtype, self.device = kv.dtypes[0], kv.device

    def _place_for(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Any:
        """What these states go into: what is here, or a new one while nothing is stored."""
        if self.kv is not None and self.kv.length:
            self.kv.check(key_states, value_states, STATES)
            return self.kv
        _check_anew(key_states, value_states)
        if self.kv is not None and self.kv.takes(key_states, value_states):
            return self.kv
        return self._new(key_states, value_states)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Append to what is here, or anew while nothing is stored; if that fails the layer is unchanged."""
        kv = self._place_for(key_states, value_states)
        try:
            kv.append(key_states, value_states)
        except ValueError:
            if kv is not self.kv:
                kv.leave()
            raise
        self._hold(kv)

    def _tell(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same tensors, which tell attention what holds them."""
        if self.told:
            for x in (keys, values):
                setattr(x, HOLDER, self.kv)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.kv is None else self.kv.length

    def reset(self) -> None:
        if self.kv is not None:
            self.kv.leave()
        self.kv, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Raises:
            ValueError: for a positive number, or more tokens than are stored.
        """
        if self.kv is not None:
            self.kv.crop(tokens_left(self.get_seq_length(), tokens_to_remove))

    def _select(self, indices: torch.Tensor) -> None:
        if self.kv is not None:
            self.kv.select(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self._select(torch.arange(self.kv.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    def offload(self) -> None:
        if self.kv is not None:
            self.kv.move("cpu")

    def prefetch(self) -> None:
        if self.kv is not None:
            self.kv.move(self.device)


def _check_anew(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Check the form of the first states of a layer."""
    check_form("key_states", key_states, 4)
    # Latent attention may keep all it needs in the keys, and values of no width beside them (GLM 5 Next).
    bare = isinstance(value_states, torch.Tensor) and value_states.ndim == 4 and value_states.shape[3] == 0
    check_form("value_states", key_states if bare else value_states, 4)
    same = key_states.shape[:3] == value_states.shape[:3]
    require(same, "value_states.shape", tuple(value_states.shape), f"that of key_states {tuple(key_states.shape)}")
    here = value_states.device == key_states.device
    require(here, "value_states.device", str(value_states.device), f"that of key_states, {key_states.device}")
