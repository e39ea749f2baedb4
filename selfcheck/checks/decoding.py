"""End to end on a GPU: decoding steps through transformers, beside dense attention."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

import qaxis

from ..harness.claim import Context, Result, value
from ..inputs import random_llama
from ..rivals.attending import attending, register

STEPS = 25
#: Llama shapes
SHAPES = {
    "16 layers, D = 64": {"layers": 16, "hidden": 2048, "head_dim": 64, "intermediate": 8192},
    "32 layers, D = 128": {"layers": 32, "hidden": 4096, "head_dim": 128, "intermediate": 14336},
}


def _skip(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """No attention at all: what is left of a step is everything else."""
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


register("selfcheck_skip", _skip)


def _way(model: Any, name: str) -> AbstractContextManager[Any]:
    if name == "qaxis":
        return qaxis.sparse(model, qaxis.Budget(), strict=True)
    return attending(model, {"dense": "sdpa", "skip": "selfcheck_skip"}[name])


def _filled(model: Any, tokens: int) -> DynamicCache:
    """A cache of random keys and values, as long as a prompt of ``tokens``."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, tokens, dim)
        k, v = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(k, v, layer)
    return cache


def _step_times(model: Any, tokens: int, steps: int, seed: int) -> dict[str, float]:
    """Median seconds of one decoding step after ``tokens`` tokens, for each way, interleaved in random order."""
    cache, ids = _filled(model, tokens), torch.ones(1, 1, dtype=torch.long, device=model.device)
    times: dict[str, list[float]] = {"dense": [], "qaxis": [], "skip": []}
    order = random.Random(seed)
    for step in range(steps + 2):
        for name in order.sample(list(times), len(times)):
            with _way(model, name):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                model(ids, past_key_values=cache, use_cache=True)
                torch.cuda.synchronize()
                if step >= 2:
                    times[name].append(time.perf_counter() - begun)
                # The same length for every step: cuDNN makes a new plan for every shape it has not seen, which
                # would be counted against dense attention.
                cache.crop(tokens - cache.get_seq_length())
    return {name: statistics.median(x) for name, x in times.items()}


def _row(name: str, tokens: int, took: dict[str, float]) -> dict[str, Any]:
    """Tokens a second dense and with qaxis, their ratio, and the share of attention in either step."""
    share = {way: max(0.0, 1 - took["skip"] / took[way]) for way in ("dense", "qaxis")}
    return {
        "model": name, "tokens": tokens, "dense": 1 / took["dense"], "qaxis": 1 / took["qaxis"],
        "ratio": took["dense"] / took["qaxis"], "dense_share": share["dense"], "qaxis_share": share["qaxis"],
    }  # fmt: skip


@torch.inference_mode()
def decode_speed(context: Context) -> Result:
    """Tokens per second of a decoding step, dense and qaxis in the same run, with the attention share."""
    steps = 3 if context.quick else STEPS
    rows: list[dict[str, Any]] = []
    smol = copy.deepcopy(context.subjects.model).to(torch.bfloat16)
    plan: list[tuple[str, Callable[[], Any], tuple[int, ...]]] = [("SmolLM2-135M", lambda: smol, (1024, 4096, 8000))]
    for name, shape in {} if context.quick else SHAPES.items():
        plan.append((name, partial(random_llama.build, context.device, **shape), (8192, 32768, 131072)))
    for name, make, lengths in context.progress(plan, "models"):
        model = make()
        for tokens in lengths:
            rows.append(_row(name, tokens, _step_times(model, tokens, steps, context.seed)))
            torch.cuda.empty_cache()
    ratios = [r["ratio"] for r in rows]
    return Result(
        passed=all(r["dense"] > 0 and r["qaxis"] > 0 and 0 <= r["dense_share"] <= 1 for r in rows),
        verdict="measured",
        headline="; ".join(
            f"{r['model']} N={r['tokens']}: {r['dense']:.1f} dense, {r['qaxis']:.1f} qaxis tokens/s" for r in rows
        ),
        values={
            "best": value(max(ratios), "times dense", n=len(rows)),
            "worst": value(min(ratios), "times dense", n=len(rows)),
            "steps": value(steps, "steps"),
        },
        cases=len(rows),
        data={"rows": rows},
        checks=[f"{r['model']}, N={r['tokens']}" for r in rows],
    )
