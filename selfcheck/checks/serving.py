"""The cache formats in use on a GPU: memory while generating, seconds a step, and the tokens that come out."""

from __future__ import annotations

import copy
import random
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import qaxis
from qaxis.storage.formats import FORMATS

from ..harness.claim import Context, Result, value

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
    stored = cache.stored_bytes() if name != FULL else None
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


def _step_times(model: Any, ids: torch.Tensor, steps: int, context: Context) -> dict[tuple[str, str], list[float]]:
    """Seconds of single steps after ``ids``, by (cache, way), interleaved in random order."""
    caches = {name: _cache(model, name) for name in CACHES}
    for cache in caches.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in CACHES for way in ("dense", "qaxis")}
    order, one = random.Random(context.seed), ids[:, -1:]
    for step in context.progress(range(steps + 2), "steps"):
        for name, way in order.sample(list(times), len(times)):
            with qaxis.sparse(model, qaxis.Budget()) if way == "qaxis" else nullcontext():
                torch.cuda.synchronize()
                begun = time.perf_counter()
                model(one, past_key_values=caches[name])
                torch.cuda.synchronize()
                if step >= 2:
                    times[name, way].append(time.perf_counter() - begun)
            caches[name].crop(-1)
    return times


def _agreed(model: Any, batch: torch.Tensor, new: int) -> dict[str, float]:
    """Of ``new`` greedy tokens a prompt, the share with each cache before the first that is not the full cache's."""
    plain = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    greedy = {n: model.generate(batch, past_key_values=_cache(model, n), **plain)[:, batch.shape[1] :] for n in CACHES}
    # After the first that differs the two texts are different prompts.
    return {n: 100 * float((greedy[n] == greedy[FULL]).cumprod(1).float().mean()) for n in CACHES}


@torch.inference_mode()
def speed(context: Context) -> Result:
    """Seconds of a decoding step with each cache, dense and qaxis, interleaved; and tokens that agree when greedy."""
    tokens, steps, prompts, new = (256, 3, 2, 4) if context.quick else (8000, 25, 16, 64)
    model = copy.deepcopy(context.subjects.model).to(torch.bfloat16)
    times = _step_times(model, context.texts(1, tokens)[0], steps, context)
    length = min(tokens, 2048)
    agreed = _agreed(model, torch.cat([x[:, :length] for x in context.texts(prompts, length)]), new)
    values: dict[str, Any] = {"steps": value(steps, "steps"), "prompts": value(prompts, "prompts")}
    rows: list[dict[str, Any]] = []
    for name in CACHES:
        dense, sparse = (1 / statistics.median(times[name, way]) for way in ("dense", "qaxis"))
        rows.append({"cache": name, "dense": dense, "qaxis": sparse, "agreed": agreed[name]})
        values[f"{name}_dense"] = value(dense, "tokens/s", n=steps)
        values[f"{name}_qaxis"] = value(sparse, "tokens/s", n=steps)
        values[f"{name}_agreed"] = value(agreed[name], "% of tokens", n=prompts * new)
    return Result(
        passed=all(r["dense"] > 0 and r["qaxis"] > 0 for r in rows),
        verdict="measured",
        headline="; ".join(
            f"{r['cache']} {r['dense']:.1f} dense, {r['qaxis']:.1f} qaxis tokens/s, {r['agreed']:.0f} % agree"
            for r in rows
        ),
        values=values,
        cases=len(rows),
        data={"rows": rows},
    )
