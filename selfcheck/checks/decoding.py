"""End to end on a GPU: decoding steps through transformers, beside dense attention."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import qaxis

from ..harness.claim import Context, Result, value

STEPS = 25
#: layers, hidden size, head_dim, intermediate size: Llama shapes with random weights, 32 query and 8 KV heads
SHAPES = {"16 layers, D = 64": (16, 2048, 64, 8192), "32 layers, D = 128": (32, 4096, 128, 14336)}


def _skip(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """No attention at all: what is left of a step is everything else."""
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


AttentionInterface.register("selfcheck_skip", _skip)
AttentionMaskInterface.register("selfcheck_skip", sdpa_mask)


@contextmanager
def _way(model: Any, name: str) -> Iterator[None]:
    if name == "qaxis":
        with qaxis.sparse(model, qaxis.Budget(), strict=True):
            yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation({"dense": "sdpa", "skip": "selfcheck_skip"}[name])
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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


@torch.inference_mode()
def decode_speed(context: Context) -> Result:
    """Tokens per second of a decoding step, dense and qaxis in the same run, with the attention share."""
    steps = 3 if context.quick else STEPS
    rows: list[list[Any]] = []
    smol = copy.deepcopy(context.subjects.model).to(torch.bfloat16)
    plan: list[tuple[str, Any, tuple[int, ...]]] = [("SmolLM2-135M", smol, (1024, 4096, 8000))]
    shapes = {} if context.quick else SHAPES
    for name, (layers, hidden, dim, inner) in shapes.items():
        config = LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, head_dim=dim,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=1 << 18,
        )  # fmt: skip
        plan.append((name, config, (8192, 32768, 131072)))
    for name, model, lengths in context.progress(plan, "models"):
        if isinstance(model, LlamaConfig):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device(context.device):
                    model = LlamaForCausalLM(model).eval()
            finally:
                torch.set_default_dtype(before)
        for tokens in lengths:
            t = _step_times(model, tokens, steps, context.seed)
            share = [max(0.0, 1 - t["skip"] / t[way]) for way in ("dense", "qaxis")]
            rows.append([name, tokens, 1 / t["dense"], 1 / t["qaxis"], t["dense"] / t["qaxis"], *share])
            torch.cuda.empty_cache()
    values: dict[str, Any] = {
        "best": value(max(r[4] for r in rows), "times dense", n=len(rows)),
        "worst": value(min(r[4] for r in rows), "times dense", n=len(rows)),
        "steps": value(steps, "steps"),
    }
    headline = "; ".join(f"{r[0]} N={r[1]}: {r[2]:.1f} dense, {r[3]:.1f} qaxis tokens/s" for r in rows)
    sane = all(r[2] > 0 and r[3] > 0 and 0 <= r[5] <= 1 for r in rows)
    checks = [f"{r[0]}, N={r[1]}" for r in rows]
    return Result(sane, "measured", headline, values, len(rows), {"rows": rows}, checks)
