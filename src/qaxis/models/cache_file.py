"""A cache in a safetensors file.

Layers are quantised, in place or a sliding window; of an empty one (it shares another's keys, or was never reached) the
file says only that. Its metadata name the format if there is one, each layer's dtypes, and how many tokens each window
has seen. The index of keys in place is not in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..storage.formats import Format
from ..storage.grid import Grid
from ..validation import require
from .holding import holds_nothing
from .in_place import InPlaceLayer

SIDES = ("keys", "values")


def _length(i: int, layer: Any) -> int:
    """Tokens that a layer has seen; 0 for one that holds nothing.

    Raises:
        ValueError: for a layer of a kind that files do not know.
    """
    if holds_nothing(layer):
        return 0
    known = getattr(layer, "savable", False) or type(layer) is DynamicSlidingWindowLayer
    require(known, f"layer {i}", type(layer).__name__, "a cache of layers that hold keys and values alone")
    return layer.get_seq_length() if layer.is_initialized else 0


def save(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a :class:`~qaxis.Cache` or :class:`~qaxis.Int8Cache` to one safetensors file: whole, or not at all.

    Raises:
        ValueError: if there is nothing to save, or a layer holds more than keys and values.
    """
    lengths = [_length(i, layer) for i, layer in enumerate(cache.layers)]
    require(any(lengths), "cache", "empty", "a cache that was written to")
    tensors: dict[str, torch.Tensor] = {}
    dtypes: list[list[str] | None] = []
    seen: dict[int, int] = {}
    for i, (layer, length) in enumerate(zip(cache.layers, lengths, strict=True)):
        dtypes.append(_collect(layer, i, tensors) if length else None)
        if length and isinstance(layer, DynamicSlidingWindowLayer):
            seen[i] = length
    about: dict[str, Any] = {"dtypes": dtypes, "seen": seen}
    if (form := getattr(cache, "format", None)) is not None:
        about |= {"format": {name: getattr(form, name).__dict__ for name in SIDES}, "sinks": form.sinks}
    data = safetensors.save(tensors, {"qaxis": json.dumps(about)})
    target = Path(path)
    staging = target.with_name(target.name + ".staging")
    try:
        staging.write_bytes(data)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def _collect(layer: Any, i: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Add the tensors of one layer; the dtypes of its keys and values."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        for name, x in zip(SIDES, (layer.keys, layer.values), strict=True):
            assert x is not None
            held = x[:, :, x.shape[2] - _held(layer, layer.get_seq_length()) :]
            tensors[f"{i}.{name}"] = held.clone(memory_format=torch.contiguous_format)
        return [str(tensors[f"{i}.{name}"].dtype)[6:] for name in SIDES]
    if isinstance(layer, InPlaceLayer):
        assert layer.kv is not None
        for name, x in zip(SIDES, layer.kv.views(), strict=True):
            tensors[f"{i}.{name}"] = x.clone(memory_format=torch.contiguous_format)
        return [str(dtype)[6:] for dtype in layer.kv.dtypes]
    for side, name in zip(layer.sides, SIDES, strict=True):
        for part, growing in side.parts.items():
            tensors[f"{i}.{name}.{part}"] = growing.view().contiguous()
        tensors[f"{i}.{name}.dim"] = torch.tensor([side.dim])
    return [str(side.dtype)[6:] for side in layer.sides]


def _held(layer: DynamicSlidingWindowLayer, seen: int) -> int:
    """Tokens of a window that a next one looks back to."""
    return min(seen, layer.sliding_window - 1)


def _wrong(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"path={str(path)!r}: allowed is a whole file that save wrote for this cache and model ({error})")


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(format and dtypes, tensors) of a file.

    Raises:
        ValueError: naming the file, if it is truncated or something else; naming a device that is not there.
    """
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r}: allowed is a device that torch finds here ({first})") from error
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["qaxis"])
            return about, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise _wrong(path, error) from error


def restored(
    path: str | os.PathLike[str],
    about: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    make: Callable[[dict[str, Any]], Any],
) -> Any:
    """The cache that ``make(about)`` gives, filled.

    Raises:
        ValueError: naming the file, if it does not fit.
    """
    try:
        cache = make(about)
        require(hasattr(cache, "format") == ("format" in about), "format", about.get("format"), "one if quantised")
        require(len(about["dtypes"]) == len(cache.layers), "layers", len(about["dtypes"]), f"{len(cache.layers)}")
        for i, (layer, dtypes) in enumerate(zip(cache.layers, about["dtypes"], strict=True)):
            if dtypes is not None and str(i) in about.get("seen", {}):
                _fill_window(layer, i, tensors, about["seen"][str(i)])
            elif dtypes is not None and isinstance(layer, InPlaceLayer):
                layer.update(*(tensors[f"{i}.{name}"] for name in SIDES))
            elif dtypes is not None:
                # One name for both sides is what files of earlier versions have.
                _fill(layer, i, tensors, dtypes if isinstance(dtypes, list) else [dtypes] * 2)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _wrong(path, error) from error
    return cache


def format_of(about: dict[str, Any]) -> Format:
    """The format that a file of a quantised cache names."""
    return Format(**{name: Grid(**about["format"][name]) for name in SIDES}, sinks=about["sinks"])


def _fill(layer: Any, i: int, tensors: dict[str, torch.Tensor], dtypes: list[str]) -> None:
    states = []
    for name, dtype in zip(SIDES, dtypes, strict=True):
        codes, dim = tensors[f"{i}.{name}.codes"], int(tensors[f"{i}.{name}.dim"])
        states.append(torch.zeros(*codes.shape[:2], 1, dim, dtype=getattr(torch, dtype), device=codes.device))
    layer.lazy_initialization(*states)
    newest = tensors.get(f"{i}.values.newest")
    layer.kv.reserve(tensors[f"{i}.values.codes"].shape[2] + (0 if newest is None else newest.shape[2]))
    for side, name in zip(layer.sides, SIDES, strict=True):
        for part, growing in side.parts.items():
            stored = tensors[f"{i}.{name}.{part}"]
            same = stored.dtype == growing.buffer.dtype and stored.shape[3:] == growing.buffer.shape[3:]
            require(same, f"{i}.{name}.{part}", f"{stored.dtype} {tuple(stored.shape)}", "what this format stores")
            growing.append(stored)


def _fill_window(layer: Any, i: int, tensors: dict[str, torch.Tensor], seen: int) -> None:
    keys, values = (tensors[f"{i}.{name}"] for name in SIDES)
    held = _held(layer, seen)
    for name, x in zip(SIDES, (keys, values), strict=True):
        require(x.shape[2] == held, f"{i}.{name}", tuple(x.shape), f"the last {held} of {seen} tokens")
    layer.lazy_initialization(keys, values)
    if isinstance(layer, InPlaceLayer):
        assert layer.kv is not None
        layer.kv.refill(keys, values, seen)
    else:
        layer.keys, layer.values, layer.cumulative_length = keys, values, seen
