"""The attention function that transformers calls by the name ``"qaxis"``, registered through its own interface."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from ..attention import backend
from ..attention.always import NONE
from ..attention.logits import Logits
from ..attention.selection import indices_to_mask, select_mask
from ..storage.lazy import dequantized, stored_or_tensor
from ..storage.side import Stored
from ..validation import DTYPES, check_scale, require
from . import compiled, decoding, prompts
from .holding import HOLDER
from .layers import HARMLESS
from .masks import Shown, shown_by, visible_keys
from .settings import NAME, Settings, count_call, settings_of

log = logging.getLogger(__name__)
#: queries that the masked mode handles at once; bounds memory at M * N * H booleans
_QUERIES = 1024
#: of engines, why they ran and not a faster one: what the log was told
_told: set[tuple[str, str]] = set()


@dataclass
class Call:
    """One attention call, as recorders see it."""

    module: nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor
    logits: Logits
    #: bool ``[B, H, M, N]``; None where every allowed key takes part
    kept: torch.Tensor | None
    #: what computed it, and why nothing faster did: empty where nothing is
    engine: str
    reason: str


class _Thread(threading.local):
    """Whether this thread captures a step."""

    capturing = False


_thread = _Thread()


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, attention that a captured step could not repeat for the next token raises RuntimeError."""
    _thread.capturing = True
    try:
        yield
    finally:
        _thread.capturing = False


class Attended(NamedTuple):
    """What one call gave."""

    #: ``[B, H, M, Dv]``
    output: torch.Tensor
    #: how to get the mask of kept keys, bool ``[B, H, M, N]``; None where every key was kept
    kept: Callable[[], torch.Tensor] | None
    #: ``"cuda"``, ``"triton"`` (the decode step), ``"prefill"``, ``"canonical"``, ``"masked"`` or ``"dense"``
    engine: str
    #: why nothing faster computed it
    reason: str


#: called with every attention call, in order
recorders: list[Callable[[Call], None]] = []


def _check_supported(kwargs: Mapping[str, Any], dropout: float, *tensors: torch.Tensor) -> None:
    """Refuse what qaxis would have to ignore: arguments that may select keys or change scores, and training."""
    for name, value in kwargs.items():
        require(
            value is None or name in HARMLESS, name, type(value).__name__,
            "None; qaxis does not know this argument, which may select keys or change scores (a bias that differs "
            "between keys breaks Theorem 1)",
        )  # fmt: skip
    require(dropout == 0.0, "dropout", dropout, "0: qaxis is for inference")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("requires_grad=True: allowed is inference under torch.no_grad(); selection has no gradient")


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
    if compiled.tracing and torch.compiler.is_compiling():
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
    watching = tuple(recorders)

    def allowed() -> torch.Tensor:
        return visible_keys(module, attention_mask, query, key, is_causal)

    # Inside autocast a product of float32 tensors would be one of 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        done = attend(query, key, value, shown, allowed, logits, settings, bool(watching))
    _tell(module, done, query.device, settings.strict)
    if watching:
        layer = int(getattr(module, "layer_idx", -1))
        kept = None if done.kept is None else done.kept()
        call = Call(module, layer, query, key, allowed(), logits, kept, done.engine, done.reason)
        for recorder in watching:
            recorder(call)
    if settings.strict or watching:
        count_call(module)
    return done.output.transpose(1, 2).contiguous(), None


def _tell(module: nn.Module, done: Attended, device: torch.device, strict: bool) -> None:
    """Say once, on a GPU, why something slower than the fastest computes attention.

    Raises:
        RuntimeError: in strict mode, where that was not asked for and is neither the decode step nor prefill.
    """
    what = (done.engine, done.reason)
    if device.type != "cuda" or not done.reason:
        return
    if strict and done.engine in ("canonical", "masked") and not done.reason.startswith(("exactness=", "backend=")):
        layer = getattr(module, "layer_idx", "?")
        raise RuntimeError(f"layer {layer}: {done.engine} attention, as {done.reason} (strict=True)")
    if what not in _told:
        _told.add(what)
        log.warning("qaxis: %s attention, as %s", *what)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shown: Shown | None,
    allowed: Callable[[], torch.Tensor],
    logits: Logits,
    settings: Settings,
    watched: bool = False,
) -> Attended:
    """Attention by the fastest of what may compute it.

    Args:
        shown: what the queries see, in a few numbers; None: only ``allowed()`` tells, bool ``[B|1, H|1, M|1, N]``.
        watched: whether the mask of kept keys will be asked for.
    """
    no_step = decoding.refusal(q, k, shown, settings)
    if _thread.capturing and (no_step or not hasattr(k, HOLDER)):
        why = no_step or "its keys do not lie in a qaxis.Cache"
        raise RuntimeError(f"attention of a layer is no step that can be repeated: {why}")
    if not no_step:
        assert shown is not None
        step = decoding.attend(q, k, v, shown, logits, settings)
        n = k.shape[2]

        def kept_keys() -> torch.Tensor:
            return indices_to_mask(torch.where(step.indices < 0, -1, step.indices - step.first), n)

        return Attended(step.output, kept_keys, step.engine, step.reason)
    keys, values = stored_or_tensor(k), stored_or_tensor(v)
    no_prompt = prompts.refusal(q, shown, settings)
    if not no_prompt:
        assert shown is not None
        keys, values = (dequantized(x) if isinstance(x, Stored) else x for x in (keys, values))
        done = prompts.attend(q, keys, values, shown, logits, settings, watched)
        return Attended(*done, "prefill", no_step if q.shape[2] == 1 else "")
    reason = no_step if q.shape[2] == 1 else no_prompt
    if settings.budget is None or settings.exactness == "selection":
        keys, values = (dequantized(x) if isinstance(x, Stored) else x for x in (keys, values))
        if settings.budget is None and _is_plain(q, shown, logits):
            return Attended(_all_before(q, keys, values, logits.scale), None, "dense", "")
        out, kept = masked(q, keys, values, allowed(), logits, settings, watched)
        dense = settings.budget is None
        return Attended(out, kept, "dense" if dense else "masked", "" if dense else reason)
    mask = allowed()
    k_eff, name = settings.budget.of(mask), "auto" if settings.backend == "cuda" else settings.backend
    indices = backend.select(q, keys, mask, k_eff, backend=name, always=settings.always)
    out = backend.attend(q, keys, values, indices, logits, backend=name)
    return Attended(out, lambda: indices_to_mask(indices, k.shape[2]), "canonical", reason)


def _is_plain(q: torch.Tensor, shown: Shown | None, logits: Logits) -> bool:
    """Whether a GPU's dense kernels know these queries: all keys before them, in 16 bits, nothing done to a logit."""
    narrow = q.is_cuda and q.dtype != torch.float32
    return narrow and logits.plain and shown is not None and shown.pads is None and shown.window is None


def _all_before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Dense attention of queries that are the last of the keys: neither a mask nor copies of the keys are made."""
    m, n = q.shape[2], k.shape[2]
    sdpa = partial(nn.functional.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=True)
    if m in (1, n):
        return sdpa(is_causal=m > 1)
    return sdpa(attn_mask=causal_lower_right(m, n))


def masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    logits: Logits,
    settings: Settings,
    watched: bool = False,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """Identical selection, output by a masked dense product: fast for prefill, not bitwise canonical."""
    m, n, group, budget = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], settings.budget
    allowed = allowed.expand(-1, -1, m, -1)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    masks: list[torch.Tensor] = []
    for start in range(0, m, _QUERIES):
        rows = slice(start, start + _QUERIES)
        mask = allowed[:, :, rows]
        if budget is not None and settings.always != NONE:
            indices = backend.select(
                q[:, :, rows], k, mask, budget.of(mask), backend="reference", always=settings.always
            )
            mask = indices_to_mask(indices, n)
        elif budget is not None:
            mask = select_mask(q[:, :, rows], k, mask, budget.of(mask))
        if watched and budget is not None:
            masks.append(mask)
        out[:, :, rows] = _dense(q[:, :, rows], keys, values, mask, logits)
    # A row that may see no key has no defined softmax; canonical attention gives 0.
    out = torch.where(allowed.any(-1)[..., None], out, 0.0)
    return out, None if budget is None else lambda: torch.cat(masks, 2)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Dense attention under a bool mask, with the modifications that SDPA does not know."""
    if logits.plain:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=logits.scale)
    weights = logits.softmax(q.float() @ k.float().transpose(-1, -2), mask)
    return (weights @ v.float()).to(q.dtype)


AttentionInterface.register(NAME, qaxis_attention_forward)
