"""What plugs into the same place of transformers, measured alike: bytes kept, keys read, perplexity, lines to write.

Every way reads a prompt, then takes the next tokens of the text one at a time from its cache, so that what the
cache stored is what attention reads. Peers need different versions of transformers, so each group runs in its own
environment (`nox -s peers`): `measure GROUP` writes one JSON file, `table` makes PEERS.md of them all.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import torch
from scipy import stats
from tqdm import tqdm
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from selfcheck.harness.files import write_atomic
from selfcheck.inputs.subjects import load

HERE = Path(__file__).parent
PROMPT, NEXT, TEXTS = 960, 64, 6

#: name: (what a user writes, what it keeps, what it loses)
Way = tuple[Callable[[Any], tuple[Any, Any]], str, str]


def bytes_of(cache: Any) -> int:
    """Bytes behind a cache, a full-precision number counted as bfloat16 (two bytes), codes as they are stored."""
    if hasattr(cache, "stored_bytes"):
        return cache.stored_bytes()
    seen: dict[int, int] = {}

    def count(x: Any, depth: int = 0) -> None:
        if isinstance(x, torch.Tensor) and type(x) in (torch.Tensor, torch.nn.Parameter):
            size = 2 * x.numel() if x.is_floating_point() and x.dtype == torch.float32 else x.nbytes
            seen[x.untyped_storage().data_ptr() if x.numel() else 0] = size if x.numel() else 0
        elif isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):
            for name in x.__tensor_flatten__()[0]:
                count(getattr(x, name), depth + 1)
        elif isinstance(x, (list, tuple)) and depth < 6:
            for item in x:
                count(item, depth + 1)
        elif isinstance(x, dict) and depth < 6:
            for item in x.values():
                count(item, depth + 1)

    for layer in cache.layers:
        count({k: v for k, v in vars(layer).items() if k not in ("cumulative_length",)})
    return sum(seen.values())


def ours() -> dict[str, Way]:
    import qaxis

    def topk(model: Any) -> tuple[Any, Any]:
        return qaxis.sparse(model, qaxis.Budget(0.1), exactness="selection"), DynamicCache(config=model.config)

    def int8(model: Any) -> tuple[Any, Any]:
        return nullcontext(), qaxis.Int8Cache(model.config)

    def both(model: Any) -> tuple[Any, Any]:
        return qaxis.sparse(model, qaxis.Budget(0.1), exactness="selection"), qaxis.Int8Cache(model.config)

    return {
        "qaxis, top 10 %": (topk, "every key and value", "the tail of each query's own attention, nothing for good"),
        "qaxis.Int8Cache": (int8, "every key and value, 8 bits", "rounding"),
        "qaxis, top 10 %, Int8Cache": (both, "every key and value, 8 bits", "both of the above"),
    }


def of_transformers() -> dict[str, Way]:
    from transformers import QuantizedCache

    def dense(model: Any) -> tuple[Any, Any]:
        return nullcontext(), DynamicCache(config=model.config)

    def window(model: Any) -> tuple[Any, Any]:
        return nullcontext(), Cache(layers=[DynamicSlidingWindowLayer(sliding_window=96) for _ in model.model.layers])

    def quanto4(model: Any) -> tuple[Any, Any]:
        return nullcontext(), QuantizedCache("quanto", model.config, nbits=4)

    def quanto2(model: Any) -> tuple[Any, Any]:
        return nullcontext(), QuantizedCache("quanto", model.config, nbits=2)

    def hqq8(model: Any) -> tuple[Any, Any]:
        return nullcontext(), QuantizedCache("hqq", model.config, nbits=8, axis_key=1, axis_value=1)

    def hqq4(model: Any) -> tuple[Any, Any]:
        return nullcontext(), QuantizedCache("hqq", model.config, nbits=4, axis_key=1, axis_value=1)

    quantised = "every key and value, quantised; newest 128 in full"
    return {
        "transformers DynamicCache (dense)": (dense, "every key and value", "nothing"),
        "transformers sliding window, 96": (window, "the newest 96 tokens", "everything older"),
        "transformers QuantizedCache, quanto, 4 bits": (quanto4, quantised, "rounding"),
        "transformers QuantizedCache, quanto, 2 bits": (quanto2, quantised, "rounding"),
        "transformers QuantizedCache, hqq, 8 bits": (hqq8, quantised, "rounding"),
        "transformers QuantizedCache, hqq, 4 bits": (hqq4, quantised, "rounding"),
    }


def of_kvpress() -> dict[str, Way]:
    import kvpress

    def dense(model: Any) -> tuple[Any, Any]:
        return nullcontext(), DynamicCache()

    def knorm(model: Any) -> tuple[Any, Any]:
        return kvpress.KnormPress(compression_ratio=0.9)(model), DynamicCache()

    def snapkv(model: Any) -> tuple[Any, Any]:
        return kvpress.SnapKVPress(compression_ratio=0.9)(model), DynamicCache()

    def expected(model: Any) -> tuple[Any, Any]:
        return kvpress.ExpectedAttentionPress(compression_ratio=0.9)(model), DynamicCache()

    def tova(model: Any) -> tuple[Any, Any]:
        return kvpress.TOVAPress(compression_ratio=0.9)(model), DynamicCache()

    def streaming(model: Any) -> tuple[Any, Any]:
        return kvpress.StreamingLLMPress(compression_ratio=0.9)(model), DynamicCache()

    kept = "a tenth of the prompt's keys and values"
    lost = "the other nine tenths, for good, before the question is known"
    return {
        "dense, beside kvpress": (dense, "every key and value", "nothing"),
        "kvpress KnormPress": (knorm, kept, lost),
        "kvpress SnapKVPress": (snapkv, kept, lost),
        "kvpress ExpectedAttentionPress": (expected, kept, lost),
        "kvpress TOVAPress": (tova, kept, lost),
        "kvpress StreamingLLMPress": (streaming, "4 sinks and the newest, a tenth in all", lost),
    }


GROUPS = {"qaxis": ours, "transformers": of_transformers, "kvpress": of_kvpress}
NEEDED = {"qaxis": ("qaxis",), "transformers": ("optimum-quanto", "hqq"), "kvpress": ("kvpress",)}


@torch.inference_mode()
def losses(model: Any, ids: torch.Tensor, make: Callable[[Any], tuple[Any, Any]]) -> tuple[np.ndarray, float]:
    """(loss in nats of each of the next tokens, bytes of the cache after the prompt over those of bfloat16)."""
    context, cache = make(model)
    found = []
    with context:
        out = model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits
        config = model.config
        full = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PROMPT
        share = bytes_of(cache) / full
        for i in range(PROMPT, PROMPT + NEXT):
            found.append(float(torch.nn.functional.cross_entropy(out[0].float(), ids[0, i : i + 1])))
            # A press drops tokens from the cache: positions must be told.
            place = torch.tensor([[i]])
            out = model(ids[:, i : i + 1], past_key_values=cache, position_ids=place).logits
    return np.array(found), share


@click.group()
def main() -> None:
    """Peers, measured and in a table."""


@main.command()
@click.argument("group", type=click.Choice(list(GROUPS)))
@click.option("--texts", default=TEXTS, show_default=True)
def measure(group: str, texts: int) -> None:
    """Measure one group of ways in this environment and write peers-GROUP.json."""
    subjects = load(None, None, "cpu", texts, PROMPT + NEXT)
    rows = {}
    ways = GROUPS[group]()
    for name, (make, keeps, loses) in tqdm(ways.items(), desc=group):
        code = [x.strip() for x in inspect.getsource(make).splitlines()[1:] if x.strip()]
        try:
            found = [losses(subjects.model, ids, make) for ids in tqdm(subjects.texts, desc=name, leave=False)]
        except Exception as error:
            rows[name] = {"keeps": keeps, "loses": loses, "error": f"{type(error).__name__}: {error}"[:300]}
            continue
        rows[name] = {
            "keeps": keeps, "loses": loses, "code": code, "losses": [x.tolist() for x, _ in found],
            "bytes": float(np.mean([share for _, share in found])),
        }  # fmt: skip
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", *NEEDED[group])}
    document = {"group": group, "prompt": PROMPT, "next": NEXT, "versions": versions, "rows": rows}
    write_atomic(HERE / f"peers-{group}.json", (json.dumps(document, indent=1) + "\n").encode())


def change(base: list[list[float]], other: list[list[float]]) -> tuple[float, float, float]:
    """Perplexity change in per cent, paired per token, with a 95 % bootstrap interval over texts."""
    delta = (np.array(other) - np.array(base)).mean(1)
    interval = stats.bootstrap(
        (delta,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    low, middle, high = 100 * np.expm1([interval.low, delta.mean(), interval.high])
    return float(middle), float(low), float(high)


@main.command()
def table() -> None:
    """Write PEERS.md from the measurements."""
    lines = [
        "# Beside peers that plug into the same place of transformers", "",
        "Written by `nox -s peers`. SmolLM2-135M, float32, CPU; a prompt of "
        f"{PROMPT} tokens, then {NEXT} tokens of the same article, one at a time; perplexity against dense attention "
        f"on the same tokens, {TEXTS} articles, 95 % bootstrap over articles. Bytes after the prompt, over those of a "
        "bfloat16 cache. A press evicts keys to save memory; qaxis keeps them and reads fewer: they answer different "
        "needs, and combine.", "",
        "| way | keeps | loses | bytes | perplexity change, % |", "|---|---|---|---|---|",
    ]  # fmt: skip
    footer = []
    for group in GROUPS:
        document = json.loads((HERE / f"peers-{group}.json").read_text("utf-8"))
        footer.append(f"{group}: " + ", ".join(f"{k} {v}" for k, v in document["versions"].items()))
        rows = document["rows"]
        source = "transformers" if group == "qaxis" else group
        reference = json.loads((HERE / f"peers-{source}.json").read_text("utf-8"))["rows"]
        base = next(r["losses"] for name, r in reference.items() if "dense" in name)
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"| {name} | {row['keeps']} | {row['loses']} | | did not run: {row['error']} |")
                continue
            middle, low, high = change(base, row["losses"])
            lines.append(
                f"| {name} | {row['keeps']} | {row['loses']} | {row['bytes']:.3f} | "
                f"{middle:+.2f} [{low:+.2f}, {high:+.2f}] |"
            )
    lines += ["", "What a user writes, beside loading the model:", "", *WRITES, "", "Versions:", ""]
    lines += [f"- {x}" for x in footer]
    write_atomic(HERE / "PEERS.md", ("\n".join(lines) + "\n").encode())


WRITES = (
    "| way | lines | |",
    "|---|---|---|",
    '| qaxis, top k | 1 | `qaxis.enable(model, qaxis.Budget(0.1))` or `from_pretrained(..., attn_implementation="qaxis")` |',
    "| qaxis.Int8Cache | 1 | `model.generate(ids, past_key_values=qaxis.Int8Cache(model.config))` |",
    '| QuantizedCache | 1 | `model.generate(ids, cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4})` |',
    "| sliding window | 2 | `cache = Cache(layers=[DynamicSlidingWindowLayer(96) for _ in model.model.layers])`, then `past_key_values=cache` |",
    "| kvpress | 2 | `with SnapKVPress(compression_ratio=0.9)(model):` around the prefill, decoding with explicit positions; or its pipeline |",
)

if __name__ == "__main__":
    main()
