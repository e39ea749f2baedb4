"""The attention function that transformers calls by the name ``"qaxis"``, registered through its own interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..attention.logits import Logits
from ..validation import DTYPES, check_no_gradient, check_scale, require
from . import compiled, recorders, routing
from .attended import Attended
from .layers import HARMLESS
from .masks import dropped_before, shown_by, visible_keys
from .recorders import Call
from .settings import NAME, Settings, count_call, settings_of

log = logging.getLogger(__name__)
#: of engines, why they ran and not a faster one: what was logged
_logged: set[tuple[str, str]] = set()


def _check_supported(kwargs: Mapping[str, Any], dropout: float, *tensors: torch.Tensor) -> None:
    """Refuse what qaxis would have to ignore: arguments that may select keys or change scores, and training."""
    for name, value in kwargs.items():
        require(
            value is None or name in HARMLESS, name, type(value).__name__,
            "None; qaxis does not know this argument, which may select keys or change scores (a bias that differs "
            "between keys breaks Theorem 1)",
        )  # fmt: skip
    require(dropout == 0.0, "dropout", dropout, "0: qaxis is for inference")
    check_no_gradient(*tensors)


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value, in the dtype that autocast would multiply them in if theirs differ.

    Raises:
        ValueError: for a dtype that the kernels do not know, or different ones without autocast.
    """
    device, first = tensors[0].device.type, tensors[0].dtype
    if any(x.dtype != first for x in tensors) and torch.is_autocast_enabled(device):
        tensors = tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
        require(x.dtype == tensors[0].dtype, f"{name}.dtype", x.dtype, f"the query's {tensors[0].dtype}")
    return tensors


def _settings(module: nn.Module) -> Settings:
    """What was set; in a model loaded with this implementation the default, and for modules of another kind dense."""
    decoder = getattr(module, "is_causal", True) and isinstance(getattr(module, "layer_idx", None), int)
    return settings_of(module) or (Settings() if decoder else Settings(budget=None))


def qaxis_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: ``[B,H,M,D], [B,Hkv,N,D] -> [B,M,H,D]``.

    Args:
        softcap: soft cap of the logits (Gemma 2); it keeps their order.
        s_aux: ``[H]`` sink logits that take part in the denominator (gpt-oss); they keep the order.

    Raises:
        ValueError: for training, dropout, float64, a bias that differs between keys, or an argument that qaxis does
            not know.
    """
    if compiled.is_tracing():
        return compiled.traced_attention(module, query, key, value, scaling, softcap, s_aux)
    logits = (scaling, softcap, s_aux)
    return _attention(module, query, key, value, attention_mask, logits, dropout, is_causal, kwargs)


@torch.compiler.disable(reason="a compiler may contract or reorder canonical arithmetic; the kernels stay as they are")
def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, of_logits: tuple[float | None, float | None, torch.Tensor | None],
    dropout: float, is_causal: bool | None, kwargs: Mapping[str, Any],
) -> tuple[torch.Tensor, None]:  # fmt: skip
    settings = _settings(module)
    _check_supported(kwargs, dropout, query, key, value)
    query, key, value = _in_one_dtype(query, key, value)
    logits = Logits(check_scale(of_logits[0], query.shape[-1]), *of_logits[1:])
    shown = shown_by(module, attention_mask, query, key, is_causal)
    # As they were when the call began: another thread may begin or end a recording meanwhile.
    watching = recorders.current()

    def allowed() -> torch.Tensor:
        return visible_keys(module, attention_mask, query, key, is_causal)

    def dropped() -> int:
        return dropped_before(attention_mask, kwargs.get("sliding_window"), query.shape[2], key.shape[2])

    # Inside autocast a product of float32 tensors would be one of 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        done = routing.attend(query, key, value, shown, allowed, logits, settings, bool(watching), dropped)
    if query.is_cuda:
        _check_strict(module, done, settings)
        _log_once(done)
    if watching:
        layer = int(getattr(module, "layer_idx", -1))
        kept = None if done.kept is None else done.kept()
        call = Call(module, layer, query, key, allowed(), logits, kept, done.engine, done.reason)
        for recorder in watching:
            recorder(call)
    if settings.strict or watching:
        count_call(module)
    return done.output.transpose(1, 2).contiguous(), None


def _check_strict(module: nn.Module, done: Attended, settings: Settings) -> None:
    """Refuse, in strict mode, what was computed by neither the decode step nor prefill, unless it was asked for.

    Raises:
        RuntimeError: with the layer, what computed it and why.
    """
    if settings.strict and done.engine in ("canonical", "masked") and done.reason and not done.asked:
        layer = getattr(module, "layer_idx", "?")
        raise RuntimeError(f"layer {layer}: {done.engine} attention, as {done.reason} (strict=True)")


def _log_once(done: Attended) -> None:
    """Say once why something slower than the fastest computes attention."""
    what = (done.engine, done.reason)
    if done.reason and what not in _logged:
        _logged.add(what)
        log.warning("qaxis: %s attention, as %s", *what)


AttentionInterface.register(NAME, qaxis_attention_forward)
