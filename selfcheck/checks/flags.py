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


@torch.inference_mode()
def flag_table(context: Context) -> Result:
    """max|dlogit| for every dtype, implementation and use."""
    on_gpu = context.device != "cpu"
    window, new = (512, 64) if on_gpu else (48, 4)
    base = context.subjects.model
    ids = context.subjects.texts[0][:, :window]
    rows, checks, worst, logits, on = [], [], 0.0, 0, float("inf")
    plan = list(itertools.product((torch.float32, torch.bfloat16), ("eager", "sdpa")))
    for dtype, implementation in context.progress(plan, "dtypes x implementations"):
        model = base if dtype == torch.float32 else copy.deepcopy(base).to(dtype)
        before = model.config._attn_implementation
        model.set_attn_implementation(implementation)
        row: list[Any] = [str(dtype)[6:], implementation]
        stock = {name: use(model, name, ids, new) for name in USES}
        gaps = dict.fromkeys(USES, 0.0)
        with qaxis.sparse(model, qaxis.Budget(0.05, 8), exactness="selection"):
            on = min(on, float((model(ids).logits[0] - stock["prompt"]).abs().max()))
        for state in STATES:
            into(model, state, ids)
            for name in USES:
                got = use(model, name, ids, new)
                same = got.shape == stock[name].shape and torch.equal(got, stock[name])
                gap = float((got - stock[name]).abs().max()) if got.shape == stock[name].shape else float("inf")
                gaps[name] = max(gaps[name], gap if same or gap > 0 else 1e-45)
                checks.append(f"{row[0]}, {implementation}, {state}, {name}")
                logits += got.numel()
        model.set_attn_implementation(before)
        rows.append([*row, *gaps.values()])
        worst = max(worst, *gaps.values())
    digests = {children.run(IMPORT_ONLY, how).stdout.strip() for how in ("with", "without")}
    imported = len(digests) == 1 and len(next(iter(digests))) == 64
    checks.append("imported, never enabled")
    values = {
        "max_difference": value(worst, "logits", n=logits), "cells": value(len(rows) * len(USES), "cells"),
        "generated": value(new, "tokens"), "on_difference": value(on, "logits"),
        "imported": value(0.0 if imported else 1.0, "digests"),
    }  # fmt: skip
    headline = (
        f"max|dlogit| = {worst:g} in {len(rows) * len(USES)} cells x {len(STATES)} states, {new} tokens generated"
    )
    return Result(
        worst == 0 and imported and on > 1e-3,
        "identical when off, different when on" if imported else "importing qaxis changes a model", headline, values,
        len(checks), {"rows": rows, "uses": list(USES)}, checks,
    )  # fmt: skip
