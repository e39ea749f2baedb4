"""Model families, small and with random weights: off is stock, on is the model's own ranking."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

import qaxis

from ..harness.claim import Context, Result, value

TOKENS = 60
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
WINDOW: dict[str, Any] = {"sliding_window": 24}
LOCAL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
#: family: (configuration, what is particular about its attention)
FAMILIES = {
    "Llama": (tf.LlamaConfig(**GQA), "GQA"),
    "Qwen2": (tf.Qwen2Config(**GQA), "biased projections"),
    "Qwen3": (tf.Qwen3Config(**GQA, head_dim=16), "normalised queries and keys"),
    "Mistral": (tf.MistralConfig(**GQA, **WINDOW), "sliding window"),
    "Gemma 2": (
        tf.Gemma2Config(**GQA, **LOCAL, head_dim=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        "soft cap, local and global layers",
    ),
    "Gemma 3": (tf.Gemma3TextConfig(**GQA, **LOCAL, head_dim=16, query_pre_attn_scalar=16), "local and global layers"),
    "Phi-3": (tf.Phi3Config(**GQA), "fused projections"),
    "GPT-NeoX": (tf.GPTNeoXConfig(**SMALL), "partial rotary, no GQA"),
    "OLMo 2": (tf.Olmo2Config(**GQA), "normalised queries and keys"),
    "gpt-oss": (
        tf.GptOssConfig(**GQA, **LOCAL, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
        "sink logits",
    ),
}


def prompt(device: str = "cpu") -> torch.Tensor:
    """Fixed token ids ``[1, TOKENS]``."""
    return torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)


def build(family: str, implementation: str = "eager", device: str = "cpu") -> Any:
    """A two-layer model of the family, random weights."""
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family][0], attn_implementation=implementation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                # Weights of the usual size give nearly flat attention; larger ones give it something to rank.
                weight.mul_(4.0)
            if name.endswith("sinks"):
                weight.copy_(torch.linspace(-1, 2, weight.numel()))
    return model.eval().to(device)


def implementations(family: str) -> list[str]:
    """The stock implementations that compute the same model: SDPA knows neither soft caps nor sinks."""
    return ["eager"] if family in ("Gemma 2", "gpt-oss") else ["eager", "sdpa"]


def off_difference(family: str, device: str = "cpu") -> float:
    """max|dlogit| of stock against: after the context, after an exception in it, after enable and disable."""
    worst, ids = 0.0, prompt(device)
    for implementation in implementations(family):
        for dtype in (torch.float32, torch.bfloat16):
            model = build(family, implementation, device).to(dtype)
            stock = model(ids).logits
            with qaxis.sparse(model, 8):
                if torch.equal(stock, model(ids).logits):
                    return float("inf")
            worst = max(worst, float((stock - model(ids).logits).abs().max()))
            try:
                with qaxis.sparse(model, 8):
                    raise KeyError("raised on purpose")
            except KeyError:
                worst = max(worst, float((stock - model(ids).logits).abs().max()))
            qaxis.disable(qaxis.enable(model, {0: 5, "default": "dense"}, strict=True))
            worst = max(worst, float((stock - model(ids).logits).abs().max()))
    return worst


def whole_budget(family: str, device: str = "cpu") -> tuple[float, float]:
    """(max|dlogit| between ways to keep every key, relative distance from eager attention)."""
    model, ids = build(family, device=device), prompt(device)
    dense, results = model(ids).logits, []
    for budget in (qaxis.Budget(1.0, 1), TOKENS, 10 * TOKENS):
        with qaxis.sparse(model, budget), qaxis.record(model) as recording:
            results.append(model(ids).logits)
        if not all(r.everything_calls == r.sparse_calls == 1 for r in recording.layers.values()):
            return float("inf"), float("inf")
    between = max(float((results[0] - r).abs().max()) for r in results)
    return between, float((results[0] - dense).abs().max() / dense.abs().max())


def decode_difference(family: str, device: str = "cpu") -> float:
    """Relative max|dlogit| of prefill, then a chunk, then single tokens, against one prefill."""
    model, ids = build(family, device=device), prompt(device)
    with qaxis.sparse(model, qaxis.Budget(0.2, 6)):
        whole = model(ids).logits
        cache = model(ids[:, :40], use_cache=True).past_key_values
        steps = [model(ids[:, 40:45], past_key_values=cache).logits]
        steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(45, TOKENS)]
    return float((whole[:, 40:] - torch.cat(steps, 1)).abs().max() / whole.abs().max())


def wrong_rows(family: str, exactness: str = "bitwise", device: str = "cpu") -> tuple[int, int]:
    """(rows whose kept keys are not the best by the model's own eager weights, rows).

    Layers are tried one at a time, the others dense, so that the model's own weights are those of the same input.
    The model rounds its weights: keys whose weights are equal to five digits may change places.
    """
    model, ids = build(family, device=device), prompt(device)
    weights = model(ids, output_attentions=True).attentions
    budget = qaxis.Budget(0.2, 6)
    wrong = rows = 0
    for layer in range(2):
        plan: Any = {layer: budget, "default": "dense"}
        with qaxis.sparse(model, plan, exactness=exactness), qaxis.record(model, masks=True) as recording:
            model(ids)
        (kept,) = recording.layers[layer].masks
        for i in range(TOKENS):
            row, mask = weights[layer][0, :, i], kept[0, :, i]
            inside = torch.where(mask, row, torch.inf).amin(-1)
            outside = torch.where(mask, 0.0, row).amax(-1)
            right = (inside >= outside * (1 - 1e-5)) & (mask.sum(-1) == budget.k_eff(int((row[0] > 0).sum())))
            wrong += int((~right).sum())
            rows += right.numel()
    return wrong, rows


@torch.inference_mode()
def families(context: Context) -> Result:
    """The table of families."""
    table: list[dict[str, Any]] = []
    failures, checks = [], []
    for family, (_, particular) in context.progress(list(FAMILIES.items()), "families"):
        off = off_difference(family, context.device)
        between, dense = whole_budget(family, context.device)
        decode = decode_difference(family, context.device)
        counted = [wrong_rows(family, exactness, context.device) for exactness in ("bitwise", "selection")]
        wrong, rows = (sum(x) for x in zip(*counted, strict=True))
        table.append(
            {"family": family, "particular": particular, "off": off, "every_key": between, "dense": dense,
             "decode": decode, "wrong": wrong, "rows": rows}
        )  # fmt: skip
        checks += [f"{family}, {what}" for what in ("off", "every key", "decode", "ranking")]
        if off != 0 or between != 0 or dense > 1e-4 or decode > 1e-4 or wrong:
            failures.append(
                f"{family}: off {off:g}, every key {between:g} and {dense:g}, decode {decode:g}, {wrong} rows"
            )
    values = {
        "families": value(len(table), "families", n=len(table)),
        "off": value(max(r["off"] for r in table), "logits", n=len(table)),
        "every_key": value(max(r["every_key"] for r in table), "logits", n=len(table)),
        "dense": value(max(r["dense"] for r in table), "of the largest logit", n=len(table)),
        "decode": value(max(r["decode"] for r in table), "of the largest logit", n=len(table)),
        "wrong": value(sum(r["wrong"] for r in table), "rows", n=sum(r["rows"] for r in table)),
    }
    headline = f"{len(table)} families: off max|dlogit| = {values['off']['value']:g}, {values['wrong']['value']:g} of "
    headline += f"{values['wrong']['n']} rows ranked otherwise than by the model"
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else "stock when off, the model's ranking when on",
        headline=headline,
        values=values,
        cases=len(checks),
        data={"rows": table},
        checks=checks,
    )
