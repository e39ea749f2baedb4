"""Formats of the KV cache: bytes against perplexity, the package's own and the usual others, on one set of texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import qaxis
from qaxis.attention.selection import indices_to_mask
from qaxis.measures.perplexity import PerplexityChange
from qaxis.storage.formats import FORMATS, Format
from qaxis.storage.grid import Grid

from ..harness.claim import Context, Result, value
from ..inputs.capture import Captured, capture, first_middle_last
from ..inputs.passes import bytes_in_bfloat16
from ..rivals.schemes import Scheme, before_rope, hadamard, of_format, per_channel, per_token
from ..rivals.streaming import streaming
from .changes import as_row, as_value, in_words

#: (upper end of the interval of the perplexity change in per cent, ratio of bytes) that a format has to meet
TARGETS = {"int8": (0.05, 0.5078125), "int6": (0.3, 0.40), "int4": (1.0, 0.29)}
CANARY = "2 bits, per token"
#: tokens whose logits are compared with those of the dense model, at the end of each text
COMPARED = 256
#: texts for the rows of others; those of the package are measured on all
OTHERS = 8
#: texts that go through the model together: attention in blocks of queries is many small launches on a GPU
TOGETHER = 4


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


@dataclass
class _Lost:
    """What the passes of one way gave."""

    #: of every text
    losses: list[torch.Tensor] = field(default_factory=list)
    #: largest distance of a logit from the dense model's, and how often both had the same best token
    gap: float = 0.0
    agree: int = 0
    compared: int = 0
    ratio: float = 1.0

    def add(self, losses: torch.Tensor, logits: torch.Tensor, stock: torch.Tensor) -> None:
        self.losses += list(losses)
        self.gap = max(self.gap, float((logits - stock).abs().max()))
        self.agree += int((logits.argmax(-1) == stock.argmax(-1)).sum())
        self.compared += logits.shape[0] * logits.shape[1]


@torch.inference_mode()
def _run(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses ``[texts, N - 1]``, logits of the last tokens) of ``ids [texts, N]``, one pass."""
    hidden = model.get_decoder()(
        input_ids=ids, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state  # fmt: skip
    head, losses = model.get_output_embeddings(), []
    for start in range(0, ids.shape[1] - 1, 512):
        stop = min(start + 512, ids.shape[1] - 1)
        logits = head(hidden[:, start:stop]).float().transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses, 1).double().cpu(), head(hidden[:, -COMPARED:]).float()


def _same_keys(captured: list[Captured], scheme: Scheme) -> float:
    """Share of the default budget's keys that are the same when the keys are quantised."""
    shares = []
    for _, q, k, _ in captured:
        true, other = (
            qaxis.topk_indices(q, x.to(q.dtype), qaxis.Budget(), backend="reference") for x in (k, scheme.keys(k))
        )
        one, two = (indices_to_mask(i, k.shape[2]) for i in (true, other))
        shares.append(float((one & two).sum() / one.sum()))
    return sum(shares) / len(shares)


def _measured(
    context: Context, ways: dict[str, Scheme | Format], texts: list[torch.Tensor], others: int
) -> tuple[list[torch.Tensor], dict[str, _Lost]]:
    """(dense losses, what each way gave): formats of the package on all texts, the others on the first ``others``."""
    model, base = context.subjects.model, _Lost()
    lost = {name: _Lost() for name in ways}
    parts = [torch.cat(texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)]
    for i, ids in enumerate(context.progress(parts, "texts")):
        losses, stock = _run(model, ids)
        base.add(losses, stock, stock)
        for name, how in ways.items():
            some = ids if name in FORMATS else ids[: max(0, others - i * TOGETHER)]
            if not len(some):
                continue
            if isinstance(how, Scheme):
                with streaming(model, how):
                    lost[name].add(*_run(model, some), stock[: len(some)])
                lost[name].ratio = how.ratio
            else:
                cache = qaxis.Int8Cache(model.config, format=how)
                lost[name].add(*_run(model, some, cache), stock[: len(some)])
                held, numbers = bytes_in_bfloat16(model.config, cache)
                lost[name].ratio = held / (2 * numbers)
    return base.losses, lost


def _by_length(base: list[torch.Tensor], lost: dict[str, _Lost], tokens: int, seed: int) -> list[dict[str, Any]]:
    """Change of each format of the package over the first n tokens."""
    rows: list[dict[str, Any]] = []
    for n in (512, 1024, 2048, 4096, 8192):
        for name in FORMATS if n <= tokens else ():
            before, after = ([x[: n - 1] for x in side] for side in (base, lost[name].losses))
            rows.append({"tokens": n, "format": name, **as_row(qaxis.paired_change(before, after, seed=seed))})
    return rows


def _against_targets(
    changes: dict[str, PerplexityChange], lost: dict[str, _Lost]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(values of the package's formats, those that miss their target in words)."""
    values, missed = {}, []
    for name, (limit, most) in TARGETS.items():
        change, stored = changes[name], lost[f"{name}, whole window"].ratio
        met = change.high <= limit and stored <= most
        values[name] = as_value(change)
        values[f"{name}_whole"] = as_value(changes[f"{name}, whole window"])
        values[f"{name}_ratio"] = value(stored, "of bf16 bytes")
        values[f"{name}_met"] = value(int(met), "1 if the target is met")
        if not met:
            missed.append(f"{name}: {change.high:+.3f} % at {stored:.4f}, allowed {limit} % at {most}")
    return values, missed


def table(context: Context) -> Result:
    """Bytes, perplexity change, logits, top-1 and top-k set agreement of every format."""
    tokens, count, others = (256, 3, 2) if context.quick else (8192, 40, OTHERS)
    model, texts = context.subjects.model, context.texts(count, tokens)
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    streamed = schemes(model, tokens, dim)
    captured = capture(model, texts[0], first_middle_last(model), queries=64)
    ways: dict[str, Scheme | Format] = {**streamed, **{f"{name}, whole window": f for name, f in FORMATS.items()}}
    base, lost = _measured(context, ways, texts, others)
    changes = {
        name: qaxis.paired_change(base[: len(one.losses)], one.losses, seed=context.seed) for name, one in lost.items()
    }
    rows: list[dict[str, Any]] = [
        {"format": name.removesuffix(", whole window"), "protocol": "decoding" if name in streamed else "whole window",
         "texts": changes[name].texts, "ratio": one.ratio, **as_row(changes[name]), "gap": one.gap,
         "top1": 100 * one.agree / one.compared,
         "same": 100 * _same_keys(captured, streamed[name]) if name in streamed else None}
        for name, one in lost.items()
    ]  # fmt: skip
    own, missed = _against_targets(changes, lost)
    values = {"texts": value(count, "texts"), "others": value(others, "texts"), "tokens": value(tokens, "tokens"),
              **own, "canary": as_value(changes[CANARY])}  # fmt: skip
    failures = [] if context.quick else missed
    if changes[CANARY].percent < 10:
        failures.append(f"canary {changes[CANARY].percent:+.1f} %: stored values are not read")
    return Result(
        passed=not failures,
        verdict=failures[0] if failures else f"targets met; canary {changes[CANARY].percent:+.0f} %",
        headline="; ".join(
            f"{name} {own[f'{name}_ratio']['value']:.4f}, {in_words(changes[name])}" for name in FORMATS
        ),
        values=values,
        cases=sum(r["texts"] for r in rows),
        data={"rows": rows, "lengths": _by_length(base, lost, tokens, context.seed)},
        checks=[f"{r['format']}, {r['protocol']}" for r in rows],
    )


def _combinations(context: Context, texts: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Losses dense, sparse, and of each format without and with selection, whole windows."""
    model = context.subjects.model
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
    return lost


def combined(context: Context) -> Result:
    """Top-k selection and quantisation together, and what they cost beyond the sum of the two; whole windows.

    Whether the two interact is asked of the paired difference between measured and added losses, text by text: that the
    sum lies inside the wide interval of the measured cost would say nothing.
    """
    tokens, count = (256, 3) if context.quick else (8192, 8)
    lost = _combinations(context, context.texts(count, tokens))
    change = partial(qaxis.paired_change, seed=context.seed)
    sparse = change(lost["dense"], lost["sparse"])
    values: dict[str, Any] = {"texts": value(count, "texts"), "sparse": as_value(sparse)}
    rows: list[dict[str, Any]] = []
    apart: list[str] = []
    for name in FORMATS:
        # What the two cost one after another, if neither knew of the other: in nats, their sum.
        added = [a + b - c for a, b, c in zip(lost[name], lost["sparse"], lost["dense"], strict=True)]
        alone, both = change(lost["dense"], lost[name]), change(lost["dense"], lost[f"{name} sparse"])
        total, beyond = change(lost["dense"], added), change(added, lost[f"{name} sparse"])
        if not beyond.low <= 0 <= beyond.high:
            apart.append(name)
        values |= {name: as_value(alone), f"{name}_both": as_value(both), f"{name}_sum": as_value(total),
                   f"{name}_beyond": as_value(beyond)}  # fmt: skip
        rows.append({"format": name, "sparse": as_row(sparse), "alone": as_row(alone), "sum": as_row(total),
                     "both": as_row(both), "beyond": as_row(beyond)})  # fmt: skip
    values["apart"] = value(len(apart), "formats whose interaction excludes zero", n=len(rows))
    return Result(
        passed=sparse.percent != 0 and all(r["alone"]["change"] != 0 for r in rows),
        verdict=f"the measured cost differs from the sum for {', '.join(apart) or 'none'}",
        headline="; ".join(
            f"{r['format']}: sum {r['sum']['change']:+.2f} %, beyond it {r['beyond']['change']:+.2f} % "
            f"[{r['beyond']['low']:+.2f}, {r['beyond']['high']:+.2f}]"
            for r in rows
        ),
        values=values,
        cases=count * len(lost),
        data={"rows": rows},
        checks=[r["format"] for r in rows],
    )
