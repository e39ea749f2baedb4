"""With qaxis off the model is the stock model: every dtype, implementation and way to use it."""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress
from typing import Any

import torch

import qaxis

from ..harness import children
from ..harness.claim import Context, Result, value
from ..rivals.attending import attending

USES = ("prompt", "padded batch", "generate", "static cache", "assisted")
OPTIONS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "assisted": {"prompt_lookup_num_tokens": 3},
}
STATES = ("enabled, disabled", "exception in the context")
#: a small model in a fresh process, with or without `import qaxis`: the digest of its logits
IMPORT_ONLY = """
import hashlib, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
if sys.argv[1] == "with": import qaxis
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2)).eval()
with torch.inference_mode(): logits = model(torch.arange(60)[None]).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


def use(model: Any, name: str, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of one way to use the model; the logits of every generated token included."""
    if name == "prompt":
        return model(ids).logits[0]
    if name == "padded batch":
        pad = ids.shape[1] // 4
        both = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :pad]), ids[:, pad:]], 1)])
        mask = torch.ones_like(both)
        mask[1, :pad] = 0
        return model(both, attention_mask=mask).logits.flatten(0, 1)
    options = OPTIONS.get(name, {})
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return torch.cat(out.logits)


def into(model: Any, state: str, ids: torch.Tensor) -> None:
    """Turn qaxis on and off again, one way or the other."""
    if state == "enabled, disabled":
        qaxis.enable(model, qaxis.Budget(0.1, 8), strict=True)
        model(ids[:, :8])
        qaxis.disable(model)
    else:
        with suppress(KeyError), qaxis.sparse(model, 8, exactness="selection"):
            model(ids[:, :8])
            raise KeyError("raised on purpose")


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b|, 0 only if every bit is equal."""
    if a.shape != b.shape:
        return float("inf")
    gap = float((a - b).abs().max())
    return gap if gap > 0 or torch.equal(a, b) else 1e-45


def _cells(model: Any, ids: torch.Tensor, new: int) -> tuple[dict[str, float], float, int]:
    """(max|dlogit| of every use after every state, max|dlogit| while on, logits compared) of one model."""
    stock = {name: use(model, name, ids, new) for name in USES}
    gaps, logits = dict.fromkeys(USES, 0.0), 0
    with qaxis.sparse(model, qaxis.Budget(0.05, 8), exactness="selection"):
        on = float((model(ids).logits[0] - stock["prompt"]).abs().max())
    for state in STATES:
        into(model, state, ids)
        for name in USES:
            got = use(model, name, ids, new)
            gaps[name] = max(gaps[name], _gap(got, stock[name]))
            logits += got.numel()
    return gaps, on, logits


def _import_changes_nothing() -> bool:
    """Whether a model in a fresh process has the same logits with and without ``import qaxis``."""
    digests = {children.run(IMPORT_ONLY, how).stdout.strip() for how in ("with", "without")}
    return len(digests) == 1 and len(next(iter(digests))) == 64


@torch.inference_mode()
def flag_table(context: Context) -> Result:
    """max|dlogit| for every dtype, implementation and use."""
    # Many CPUs have no bfloat16 of their own, so that it takes them three times as long.
    window, new = (512, 64) if context.device != "cpu" else (16, 2) if context.quick else (48, 4)
    base, ids = context.subjects.model, context.subjects.texts[0][:, :window]
    rows: list[dict[str, Any]] = []
    checks, logits, on = ["imported, never enabled"], 0, float("inf")
    plan = list(itertools.product((torch.float32, torch.bfloat16), ("eager", "sdpa")))
    for dtype, implementation in context.progress(plan, "dtypes x implementations"):
        model = base if dtype == torch.float32 else copy.deepcopy(base).to(dtype)
        with attending(model, implementation):
            gaps, changed, compared = _cells(model, ids, new)
        on, logits = min(on, changed), logits + compared
        rows.append({"dtype": str(dtype)[6:], "implementation": implementation, "gaps": gaps})
        checks += [f"{str(dtype)[6:]}, {implementation}, {state}, {name}" for state in STATES for name in USES]
    imported = _import_changes_nothing()
    worst, cells = max(gap for row in rows for gap in row["gaps"].values()), len(rows) * len(USES)
    values = {
        "max_difference": value(worst, "logits", n=logits), "cells": value(cells, "cells"),
        "generated": value(new, "tokens"), "on_difference": value(on, "logits"),
        "imported": value(0.0 if imported else 1.0, "digests"),
    }  # fmt: skip
    return Result(
        passed=worst == 0 and imported and on > 1e-3,
        verdict="identical when off, different when on" if imported else "importing qaxis changes a model",
        headline=f"max|dlogit| = {worst:g} in {cells} cells x {len(STATES)} states, {new} tokens generated",
        values=values,
        cases=len(checks),
        data={"rows": rows, "uses": list(USES)},
        checks=checks,
    )
