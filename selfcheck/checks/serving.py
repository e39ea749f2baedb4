"""The cache formats in use on a GPU: memory while generating, seconds a step, and the tokens that come out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

import qaxis
from qaxis.storage.formats import FORMATS

from ..harness.claim import Context, Result, value
from . import ways

FULL = "bfloat16"
CACHES = (FULL, *FORMATS)


def _cache(model: Any, name: str) -> Any:
    return DynamicCache(config=model.config) if name == FULL else qaxis.Int8Cache(model.config, format=name)


def _memory(model: Any, ids: torch.Tensor, name: str, new: int) -> dict[str, Any]:
    """Bytes of the device after each of ``new`` greedy steps, at the peaks, and those that go with the cache.

    ``kept`` is what was asked of the allocator, ``blocks`` what it set aside: it hands out large blocks whole.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache, token, trace, peaks = _cache(model, name), ids, [], []
    for _ in range(new):
        torch.cuda.reset_peak_memory_stats()
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        trace.append(torch.cuda.memory_allocated() - before)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    stored = cache.stored_bytes() + cache.shared.clock.tensor.nbytes if name != FULL else None
    asked, held = _asked(), torch.cuda.memory_allocated()
    del cache
    kept, blocks = asked - _asked(), held - torch.cuda.memory_allocated()
    return {"trace": trace, "peaks": peaks, "kept": kept, "blocks": blocks, "stored": stored}


def _asked() -> int:
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@torch.inference_mode()
def memory(context: Context) -> Result:
    """A 64-token generation after a long prompt: what each cache keeps, and what the steps need on top."""
    tokens, new = (256, 8) if context.quick else (8192 - 64, 64)
    model = copy.deepcopy(context.subjects.model).to(torch.bfloat16)
    (ids,) = context.texts(1, tokens)
    found = {name: _memory(model, ids, name, new) for name in context.progress(CACHES, "caches")}
    values = {}
    for name, one in found.items():
        values[f"{name}_kept"] = value(one["kept"], "bytes")
        values[f"{name}_blocks"] = value(one["blocks"], "bytes")
        values[f"{name}_prompt"] = value(one["peaks"][0], "bytes")
        values[f"{name}_steps"] = value(max(one["peaks"][1:]), "bytes")
        if name != FULL:
            values[f"{name}_stored"] = value(one["stored"], "bytes")
            values[f"{name}_share"] = value(one["kept"] / found[FULL]["kept"], "of bfloat16's")
    counted = all(one["stored"] == one["kept"] for name, one in found.items() if name != FULL)
    lean = all(values[f"{name}_steps"]["value"] < values[f"{FULL}_steps"]["value"] for name in FORMATS)
    said = "the device's count is the cache's own; " if counted else "the counts disagree; "
    return Result(
        passed=counted and lean,
        verdict=said + ("steps peak lower" if lean else "steps peak no lower"),
        headline=", ".join(f"{name} {one['kept'] / 2**20:.1f} MiB" for name, one in found.items()),
        values=values,
        cases=len(found) * new,
        data={name: {k: one[k] for k in ("trace", "peaks")} for name, one in found.items()},
        checks=list(found),
    )


def _agreed(model: Any, batch: torch.Tensor, new: int) -> dict[str, float]:
    """Of ``new`` greedy tokens a prompt, the share with each cache before the first that is not the full cache's."""
    plain = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    greedy = {n: model.generate(batch, past_key_values=_cache(model, n), **plain)[:, batch.shape[1] :] for n in CACHES}
    # After the first that differs the two texts are different prompts.
    return {n: 100 * float((greedy[n] == greedy[FULL]).cumprod(1).float().mean()) for n in CACHES}


#: what holds keys and values: (the way to decode densely with it, the way with the default budget)
WAYS = {FULL: ("dynamic", "codes-0.1"), **{name: (f"plain-{name}", f"{name}-0.1") for name in FORMATS}}


@torch.no_grad()
def speed(context: Context) -> Result:
    """Tokens a second of ``generate`` with each cache, stock and qaxis, beside dense ways under a CUDA graph that read
    bfloat16 and 8 bits; and tokens that agree when greedy."""
    cuda = context.device != "cpu"
    tokens, rounds, new, prompts, agreeing = (256, 2, 3, 2, 4) if context.quick else (8000, 3, 20, 16, 64)
    model = copy.deepcopy(context.subjects.model).to(torch.bfloat16)
    best = (*ways.IDEAL, ways.CODED) if cuda else ("graph-triton", ways.CODED)
    names = [*dict.fromkeys(name for pair in WAYS.values() for name in pair), *best]
    timed = ways.measured(model, names, tokens, rounds=rounds, new=new, seed=context.seed, progress=context.progress)
    length = min(tokens, 2048)
    agreed = _agreed(model, torch.cat([x[:, :length] for x in context.texts(prompts, length)]), agreeing)
    return spoken({r["way"]: r for r in timed}, agreed, rounds * new, prompts, agreeing)


def spoken(timed: dict[str, dict[str, Any]], agreed: dict[str, float], steps: int, prompts: int, new: int) -> Result:
    """The table of caches: ``timed`` as :func:`ways.measured` gives it, by way."""
    rates = {name: 1000 / r["ms"] for name, r in timed.items()}
    ideal = {FULL: max(x for name, x in rates.items() if name in ways.IDEAL), "int8": rates[ways.CODED]}
    values: dict[str, Any] = {"steps": value(steps, "tokens"), "prompts": value(prompts, "prompts")}
    rows: list[dict[str, Any]] = []
    for name, (dense, sparse) in WAYS.items():
        row = {"cache": name, "dense": rates[dense], "qaxis": rates[sparse], "ideal": ideal.get(name)}
        rows.append({**row, "agreed": agreed[name]})
        values[f"{name}_dense"] = value(rates[dense], "tokens/s", n=steps)
        values[f"{name}_qaxis"] = value(rates[sparse], "tokens/s", n=steps)
        values[f"{name}_agreed"] = value(agreed[name], "% of tokens", n=prompts * new)
        if name in ideal:
            values[f"{name}_ideal"] = value(ideal[name], "tokens/s", n=steps)
    return Result(
        passed=all(r["dense"] > 0 and r["qaxis"] > 0 for r in rows),
        verdict="measured",
        headline="; ".join(
            f"{r['cache']} {r['dense']:.1f} dense, {r['qaxis']:.1f} qaxis tokens/s, {r['agreed']:.0f} % agree"
            for r in rows
        ),
        values=values,
        cases=len(timed),
        data={"rows": rows, "timed": list(timed.values())},
    )
