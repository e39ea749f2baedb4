"""Formats of the KV cache: bytes against perplexity, the package's own and the usual others, on one set of texts."""

from __future__ import annotations

from typing import Any

import torch

import qaxis
from qaxis.storage.formats import FORMATS, Format
from qaxis.storage.grid import Grid

from ..harness.claim import Context, Result, value
from ..rivals.schemes import Scheme, before_rope, hadamard, of_format, per_channel, per_token
from ..rivals.streaming import streaming

#: (upper end of the interval of the perplexity change in per cent, ratio of bytes) that a format has to meet
TARGETS = {"int8": (0.05, 0.5078125), "int6": (0.3, 0.40), "int4": (1.0, 0.29)}
CANARY = "2 bits, per token"
#: tokens whose logits are compared with those of the dense model, at the end of each text
COMPARED = 256
#: texts for the rows of others; those of the package are measured on all
OTHERS = 8


def schemes(model: Any, tokens: int, dim: int) -> dict[str, Scheme]:
    """Every row of the table but the package's whole-window ones."""
    place = torch.arange(tokens, device=model.device)[None]
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, 1, device=model.device), place)
    g8, g128 = per_token(8, dim), per_channel(8, 128)
    bits = 16 / dim
    return {
        **{name: of_format(format, dim) for name, format in FORMATS.items()},
        "8 bits, per channel, no sinks": of_format(Format(sinks=0), dim),
        "8 bits, values per token": of_format(Format(values=Grid(8, "token", 64)), dim),
        "8 bits, float16 scale per token": Scheme(g8, g8, 1, 1, 8 + bits, 8 + bits),
        "8 bits, keys per channel, float16": Scheme(g128, g8, 128, 1, 8.125, 8 + bits),
        "8-bit keys, 4-bit values, per token": Scheme(g8, per_token(4, dim), 1, 1, 8 + bits, 4 + bits),
        "8-bit keys, 4-bit values, own grids": of_format(Format(Grid(8), Grid(4, zero=True), sinks=4), dim),
        "4 bits, per token": Scheme(per_token(4, dim), per_token(4, dim), 1, 1, 4 + bits, 4 + bits),
        "4 bits, per token, rotated": Scheme(
            hadamard(per_token(4, dim)), hadamard(per_token(4, dim)), 1, 1, 4 + bits, 4 + bits
        ),
        "4 bits, keys per channel, asymmetric": Scheme(
            per_channel(4, 128, True), per_token(4, dim, True), 128, 1, 4.25, 4 + 2 * bits
        ),
        "4 bits, keys per channel before RoPE": Scheme(
            before_rope(per_channel(4, 128, True), cos, sin), per_token(4, dim, True), 128, 1, 4.25, 4 + 2 * bits
        ),
        "KIVI, 4 bits, groups of 32": Scheme(per_channel(4, 32, True), per_token(4, 32, True), 128, 1, 5.0, 5.0),
        "KIVI, 2 bits, groups of 32": Scheme(per_channel(2, 32, True), per_token(2, 32, True), 128, 1, 3.0, 3.0),
        CANARY: Scheme(per_token(2, dim), per_token(2, dim), 1, 1, 2 + bits, 2 + bits),
    }


@torch.inference_mode()
def _run(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, logits of the last tokens), one pass."""
    hidden = model.get_decoder()(
        input_ids=ids, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state  # fmt: skip
    head, losses = model.get_output_embeddings(), []
    for start in range(0, ids.shape[1] - 1, 512):
        stop = min(start + 512, ids.shape[1] - 1)
        logits = head(hidden[:, start:stop])[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses).double().cpu(), head(hidden[:, -COMPARED:])[0].float()


def _captured(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(last 64 queries, keys, values) of the first, a middle and the last layer."""
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    layers = model.config.num_hidden_layers
    keep = {0, layers // 2, layers - 1}

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        if layer in keep:
            found.append((q[:, :, -64:].clone(), k.clone(), v.clone()))

    with torch.inference_mode(), qaxis.observe_attention(model, observe):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return found


def _same_keys(captured: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], scheme: Scheme) -> float:
    """Share of the default budget's keys that are the same when the keys are quantised."""
    shares = []
    for q, k, _ in captured:
        true, other = (
            qaxis.topk_indices(q, x.to(q.dtype), qaxis.Budget(), backend="reference") for x in (k, scheme.keys(k))
        )
        kept = (torch.zeros(*q.shape[:3], k.shape[2] + 1, dtype=torch.bool, device=q.device) for _ in range(2))
        one, two = (
            mask.scatter_(-1, i.where(i >= 0, k.shape[2]), True)[..., :-1]
            for mask, i in zip(kept, (true, other), strict=True)
        )
        shares.append(float((one & two).sum() / one.sum()))
    return sum(shares) / len(shares)


def _ratio(config: Any, cache: qaxis.Int8Cache) -> float:
    """Bytes stored over those of a bfloat16 cache, as a bfloat16 model would count them: whatever the type the
    model runs in, tokens kept in full take two bytes a number."""
    twin, numbers = qaxis.Int8Cache(config, format=cache.format), 0
    for i, layer in enumerate(cache.layers):
        keys, values = layer.dequantized()  # type: ignore[union-attr]
        twin.update(keys.bfloat16(), values.bfloat16(), i)
        numbers += keys.numel() + values.numel()
    return twin.stored_bytes() / (2 * numbers)


def table(context: Context) -> Result:
    """Bytes, perplexity change, logits, top-1 and top-k set agreement of every format."""
    tokens, count, others = (256, 3, 2) if context.quick else (8192, 40, OTHERS)
    model, texts = context.subjects.model, context.texts(count, tokens)
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ways: dict[str, Any] = dict(schemes(model, tokens, dim))
    captured = _captured(model, texts[0])
    same = {name: _same_keys(captured, scheme) for name, scheme in ways.items()}
    ways.update({f"{name}, whole window": format for name, format in FORMATS.items()})
    base: list[torch.Tensor] = []
    lost: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    gap, agree, ratios = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0), {}
    for t, ids in enumerate(context.progress(texts, "texts")):
        losses, stock = _run(model, ids)
        base.append(losses)
        for name, how in ways.items():
            if t >= others and name not in FORMATS:
                continue
            if isinstance(how, Scheme):
                with streaming(model, how):
                    losses, logits = _run(model, ids)
                ratios[name] = how.ratio
            else:
                cache = qaxis.Int8Cache(config, format=how)
                losses, logits = _run(model, ids, cache)
                ratios[name] = _ratio(config, cache)
                del cache
            lost[name].append(losses)
            gap[name] = max(gap[name], float((logits - stock).abs().max()))
            agree[name] += int((logits.argmax(-1) == stock.argmax(-1)).sum())
    rows: list[list[Any]] = []
    failures: list[str] = []
    values: dict[str, Any] = {
        "texts": value(count, "texts"),
        "others": value(others, "texts"),
        "tokens": value(tokens, "tokens"),
    }
    for name, how in ways.items():
        n = len(lost[name])
        change = qaxis.paired_change(base[:n], lost[name], seed=context.seed)
        share = 100 * agree[name] / (n * min(COMPARED, tokens))
        protocol = "decoding" if isinstance(how, Scheme) else "whole window"
        rows.append(
            [name.removesuffix(", whole window"), protocol, n, ratios[name], change.percent, change.low, change.high,
             gap[name], share, 100 * same[name] if name in same else None]
        )  # fmt: skip
        if name in FORMATS:
            limit, most = TARGETS[name]
            stored = ratios[f"{name}, whole window"]
            values[name] = value(change.percent, "%", n=n, low=change.low, high=change.high)
            values[f"{name}_ratio"] = value(stored, "of bf16 bytes")
            met = change.high <= limit and stored <= most
            values[f"{name}_met"] = value(int(met), "1 if the target is met")
            if not met and not context.quick:
                failures.append(f"{name}: {change.high:+.3f} % at {stored:.4f}, allowed {limit} % at {most}")
        elif name == CANARY:
            values["canary"] = value(change.percent, "%", n=n, low=change.low, high=change.high)
    by_length = []
    for n in (512, 1024, 2048, 4096, 8192):
        for name in FORMATS if n <= tokens else ():
            before, after = ([x[: n - 1] for x in side] for side in (base, lost[name]))
            part = qaxis.paired_change(before, after, seed=context.seed)
            by_length.append([n, name, part.percent, part.low, part.high])
    if values["canary"]["value"] < 10:
        failures.append(f"canary {values['canary']['value']:+.1f} %: stored values are not read")
    headline = "; ".join(
        f"{name} {values[f'{name}_ratio']['value']:.4f}, {values[name]['value']:+.3f} % "
        f"[{values[name]['low']:+.3f}, {values[name]['high']:+.3f}]"
        for name in FORMATS
    )
    verdict = failures[0] if failures else f"targets met; canary {values['canary']['value']:+.0f} %"
    return Result(
        not failures, verdict, headline, values, sum(r[2] for r in rows), {"rows": rows, "lengths": by_length},
        [f"{r[0]}, {r[1]}" for r in rows],
    )  # fmt: skip


def combined(context: Context) -> Result:
    """Top-k selection and quantisation together, against the sum of their costs; whole windows."""
    tokens, count = (256, 3) if context.quick else (8192, 8)
    model, texts = context.subjects.model, context.texts(count, tokens)
    lost: dict[str, list[torch.Tensor]] = {"dense": [], "sparse": []}
    lost.update({f"{name}{both}": [] for name in FORMATS for both in ("", " sparse")})
    budget = qaxis.Budget(minimum=16) if context.quick else qaxis.Budget()
    for ids in context.progress(texts, "texts"):
        for way, losses in lost.items():
            name = way.removesuffix("sparse").strip()
            cache = qaxis.Int8Cache(model.config, format=name) if name in FORMATS else None
            if way.endswith("sparse"):
                with qaxis.sparse(model, budget, exactness="selection"):
                    losses.append(qaxis.token_losses(model, ids, cache=cache))
            else:
                losses.append(qaxis.token_losses(model, ids, cache=cache))
            del cache
    values: dict[str, Any] = {"texts": value(count, "texts")}
    rows: list[list[Any]] = []

    def measured(key: str, base: list[torch.Tensor], changed: list[torch.Tensor]) -> list[float]:
        change = qaxis.paired_change(base, changed, seed=context.seed)
        values[key] = value(change.percent, "%", n=count, low=change.low, high=change.high)
        return [change.percent, change.low, change.high]

    sparse = measured("sparse", lost["dense"], lost["sparse"])
    inside = []
    for name in FORMATS:
        alone = measured(name, lost["dense"], lost[name])
        both = measured(f"{name}_both", lost["dense"], lost[f"{name} sparse"])
        # What the two cost one after another, if neither knew of the other: in nats, their sum.
        added = [a + b - c for a, b, c in zip(lost[name], lost["sparse"], lost["dense"], strict=True)]
        total = measured(f"{name}_sum", lost["dense"], added)
        beyond = measured(f"{name}_beyond", added, lost[f"{name} sparse"])
        if both[1] <= total[0] <= both[2]:
            inside.append(name)
        rows.append([name, sparse, alone, total, both, beyond])
    headline = "; ".join(f"{r[0]}: sum {r[3][0]:+.2f} %, measured {r[4][0]:+.2f} %" for r in rows)
    values["inside"] = value(len(inside), "formats", n=len(rows))
    verdict = f"the sum lies in the interval of the measured cost for {', '.join(inside) or 'none'}"
    return Result(
        sparse[0] != 0 and all(r[2][0] != 0 for r in rows),
        verdict,
        headline,
        values,
        count * len(lost),
        {"rows": rows},
        [r[0] for r in rows],
    )
