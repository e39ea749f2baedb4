"""A quantised cache in a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors

from ..storage.grid import Grid
from ..validation import require

SIDES = ("keys", "values")


def save(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write an :class:`~qaxis.Int8Cache` to one safetensors file: whole, or not at all.

    Raises:
        ValueError: if there is nothing to save, or a layer slides.
    """
    tensors, dtypes = {}, []
    for i, layer in enumerate(cache.layers):
        quantised = hasattr(layer, "sides")
        require(quantised, f"layer {i}", type(layer).__name__, "a cache without sliding-window layers")
        require(layer.is_initialized, f"layer {i}", "empty", "a cache that was written to")
        dtypes.append(str(layer.dtype)[6:])
        for side, name in zip(layer.sides, SIDES, strict=True):
            for part, growing in side.parts.items():
                tensors[f"{i}.{name}.{part}"] = growing.view().contiguous()
            tensors[f"{i}.{name}.dim"] = torch.tensor([side.dim])
    grids = {name: getattr(cache.format, name).__dict__ for name in SIDES}
    data = safetensors.save(
        tensors, {"qaxis": json.dumps({"format": grids, "dtypes": dtypes, "sinks": cache.format.sinks})}
    )
    target = Path(path)
    staging = target.with_name(target.name + ".staging")
    try:
        staging.write_bytes(data)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def _wrong(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"path={str(path)!r}: allowed is a whole file that Int8Cache.save wrote for this model ({error})")


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(format and dtypes, tensors) of a file.

    Raises:
        ValueError: naming the file, if it is truncated or something else.
    """
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
    make: Callable[..., Any],
) -> Any:
    """The cache that ``make(keys=, values=, sinks=)`` gives, filled.

    Raises:
        ValueError: naming the file, if it does not fit.
    """
    try:
        cache = make(**{name: Grid(**about["format"][name]) for name in SIDES}, sinks=about["sinks"])
        require(len(about["dtypes"]) == len(cache.layers), "layers", len(about["dtypes"]), f"{len(cache.layers)}")
        for i, (layer, dtype) in enumerate(zip(cache.layers, about["dtypes"], strict=True)):
            _fill(layer, i, tensors, getattr(torch, dtype))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _wrong(path, error) from error
    return cache


def _fill(layer: Any, i: int, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    states = []
    for name in SIDES:
        codes, dim = tensors[f"{i}.{name}.codes"], int(tensors[f"{i}.{name}.dim"])
        states.append(torch.zeros(*codes.shape[:2], 1, dim, dtype=dtype, device=codes.device))
    layer.lazy_initialization(*states)
    for side, name in zip(layer.sides, SIDES, strict=True):
        for part, growing in side.parts.items():
            stored = tensors[f"{i}.{name}.{part}"]
            same = stored.dtype == growing.buffer.dtype and stored.shape[3:] == growing.buffer.shape[3:]
            require(same, f"{i}.{name}.{part}", f"{stored.dtype} {tuple(stored.shape)}", "what this format stores")
            growing.append(stored)
