"""The certified decode step: that it is exact under attack, what it reads of real keys, and how long it takes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import qaxis
from qaxis.certified import Decoder, KeyIndex, index_cache, index_keys
from qaxis.quantization import Grid
from qaxis.rounding import product_error_bound
from qaxis.sides import Side, Stored

from .. import approximate_decoding
from ..claim import Context, NotRunError, Result, value

if torch.cuda.is_available():
    from .. import dense_decoding
    from ..graph_timing import capture, microseconds

WAYS = ("keys", "codes", "cache")
KINDS = (
    "normal", "equal keys", "near ties", "ties at the edge", "wide range", "outlier channel", "outlier key",
    "coarse steps", "half steps", "one direction", "zero query", "tiny",
)  # fmt: skip


def attack(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    """q, k, v of one kind; shape = (B, H, Hkv, N, D)."""
    b, h, kv, n, d = shape

    def bell(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, device=generator.device).float()

    q, k, v = bell(b, h, 1, d), bell(b, kv, n, d), bell(b, kv, n, d)
    if kind == "equal keys":
        k = k[:, :, :1].expand(-1, -1, n, -1)
    elif kind == "near ties":
        # Keys of one direction whose lengths differ by few units in the last place of the dtype.
        step = torch.finfo(dtype).eps
        k = k[:, :, :1] * (1 + step * whole(-3, 4, b, kv, n, 1))
    elif kind == "ties at the edge":
        k = k[:, :, : max(1, n // 16)].repeat(1, 1, 17, 1)[:, :, :n]
    elif kind == "wide range":
        k = k * torch.exp2(whole(-8, 9, b, kv, n, 1))
    elif kind == "outlier channel":
        k[..., :1] *= 200
    elif kind == "outlier key":
        k[:, :, n // 3] *= 500
    elif kind == "coarse steps":
        # One token widens every channel's step of its group: the codes of the others are nearly zero.
        k[:, :, ::128] *= 100
    elif kind == "half steps":
        # Largest 127 steps, all others midway between two codes: the worst that rounding can do.
        k = (whole(-20, 20, b, kv, n, d) + 0.5) / 64
        k[:, :, ::128] = 127 / 64
    elif kind == "one direction":
        # Everything that tells the keys apart is small beside what they share.
        k = 30 * bell(b, kv, 1, d) + 0.02 * k
    elif kind == "zero query":
        q = q * 0
    elif kind == "tiny":
        q, k = q * 2.0**-6, k * 2.0**-9
    return [x.to(dtype).contiguous() for x in (q, k, v)]


def stored(x: torch.Tensor, sinks: int) -> Stored:
    """``x`` as the 8-bit cache stores it."""
    side = Side(x, Grid(), sinks, room=x.shape[2])
    for part in x.split(1 << 14, dim=2):
        side.prepare(part)()
    return side.stored()


def ways(k: torch.Tensor, v: torch.Tensor, sinks: int = 4) -> Iterator[tuple[str, Any, Any, KeyIndex]]:
    """(name, keys, values, index) of what the step can read: keys, keys beside codes, an 8-bit cache."""
    yield "keys", k, v, index_keys(k)
    yield "codes", k, v, index_keys(k, codes=True)
    if k.dtype != torch.float16:
        keys = stored(k, sinks)
        yield "cache", keys, stored(v, sinks), index_cache(keys)


def agreement(context: Context) -> Result:
    """Indices and output bits of the certified step against the canonical kernels, on random and adversarial rows."""
    gpu = context.device != "cpu"
    if gpu:
        # Where every second key or more is a neighbourhood, the cut is as tight as the bound allows.
        shapes = [((16, 16, 4, 777, 64), 400), ((16, 16, 4, 2048, 128), 204), ((32, 8, 2, 1500, 80), 1)]
        kinds: tuple[str, ...] = KINDS
        repeats = 1 if context.quick else 6
    else:
        shapes = [((1, 4, 2, 300, 32), 20), ((1, 8, 2, 500, 32), 200)]
        kinds, repeats = KINDS[::4] if context.quick else KINDS, 1
    generator = torch.Generator(context.device).manual_seed(context.seed)
    plan = list(itertools.product(kinds, shapes, (torch.float32, torch.float16, torch.bfloat16), range(repeats)))
    rows = indices = bits = 0
    rescored: dict[str, list[float]] = {name: [] for name in WAYS}
    decoders: dict[Any, Decoder] = {}
    wrong: list[str] = []
    names: set[str] = set()
    for kind, (shape, wanted), dtype, _ in context.progress(plan, "attacks"):
        b, h, _, n, d = shape
        q, k, v = attack(kind, shape, dtype, generator)
        decoder = decoders.setdefault(shape, Decoder(b, h, n, d, wanted, context.device))
        exact = qaxis.topk_attention(q, k, v, wanted, backend="auto")
        for name, keys, values, index in ways(k, v):
            expected = exact
            if isinstance(keys, Stored):
                expected = qaxis.topk_attention(q, keys.dequantized(), values.dequantized(), wanted, backend="auto")
            step = decoder(q, keys, values, index)
            differ = int((step.indices != expected.indices).any(-1).sum())
            other = int((step.output != expected.output).flatten(2).any(-1).sum())
            label = f"{kind}, {str(dtype)[6:]}, N={n}, D={d}, {name}"
            if differ or other:
                wrong.append(label)
            names.add(label)
            rows, indices, bits = rows + b * h, indices + differ, bits + other
            rescored[name].append(float(step.rescored.float().sum(-1).mean()) / wanted)
    headline = f"{rows} queries: {indices} sets differ, {bits} outputs differ"
    return Result(
        not wrong, headline, headline + ("" if not wrong else f"; first: {wrong[0]}"),
        {"rows": value(rows, "queries"), "sets": value(indices, "queries"), "outputs": value(bits, "queries")},
        rows, {"rescored": {k: statistics.median(x) for k, x in rescored.items() if x}}, sorted(names),
    )  # fmt: skip


def _survivors(q: torch.Tensor, k: torch.Tensor, wanted: int, bits: int) -> float:
    """Share of the keys that codes of so many bits cannot rule out, steps per channel over 128 tokens, float64."""
    n = k.shape[2] // 128 * 128
    x = k[:, :, :n].double().unflatten(2, (-1, 128))
    largest = 2 ** (bits - 1) - 1
    step = torch.exp2(torch.ceil(torch.log2(x.abs().amax(3, keepdim=True).clamp(min=1e-30) / largest)))
    near = (torch.round(x / step).clamp(-largest - 1, largest) * step).flatten(2, 3)
    left_out = (k[:, :, :n].double() - near).norm(dim=-1)
    group = q.shape[1] // k.shape[1]
    near, left_out = near.repeat_interleave(group, 1), left_out.repeat_interleave(group, 1)
    fast = (q.double() @ near.transpose(-1, -2))[:, :, 0]
    # Each key by its own residual: tighter than what the kernels keep, so this flatters the codes if anything.
    error = q.double().norm(dim=-1) * left_out + product_error_bound(q, k)[:, :, 0].double()
    kth = (fast - error).topk(min(wanted, n), dim=-1).values[..., -1:]
    return float((fast + error >= kth).float().mean())


@torch.inference_mode()
def survivors(context: Context) -> Result:
    """What the step scores canonically of a model's own keys, and what codes of fewer bits could rule out."""
    full = 512 if context.quick else 8192
    lengths = [n for n in (512, 1024, 2048, 4096, 8192) if n <= full]
    model = context.subjects.model
    (ids,) = context.texts(1, full)
    layers = [0, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1]
    captured: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> None:
        captured[layer] = (q.clone(), k.clone(), v.clone())

    with qaxis.observe_attention(model, observe):
        model(ids, logits_to_keep=1)
    rows: list[list[Any]] = []
    wrong = 0
    approximate: dict[str, list[float]] = {}
    for n in context.progress(lengths, "lengths"):
        shares: dict[str, list[float]] = {"keys": [], "codes": [], "4 bits": [], "8 bits": []}
        wanted = qaxis.Budget().k_eff(n)
        for layer in range(model.config.num_hidden_layers):
            q, k, v = (x.to(torch.bfloat16) for x in captured[layer])
            q, k, v = q[:, :, n - 1 : n].contiguous(), k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
            exact = qaxis.topk_attention(q, k, v, wanted)
            for name, keys, values, index in itertools.islice(ways(k, v), 2):
                decoder = Decoder(1, q.shape[1], n, q.shape[3], wanted, q.device)
                step = decoder(q, keys, values, index)
                wrong += int((step.indices != exact.indices).any(-1).sum())
                shares[name].append(float(step.rescored.float().sum(-1).mean()) / n)
            for bits in (4, 8):
                shares[f"{bits} bits"].append(_survivors(q, k, wanted, bits))
            if n == full:
                for way in approximate_decoding.ways(k, wanted):
                    approximate.setdefault(way.name, []).append(
                        approximate_decoding.recall(way.choose(q), exact.indices)
                    )
        rows.append([n, wanted, *(100 * statistics.mean(x) for x in shares.values())])
    values = {"wrong": value(wrong, "sets"), "layers": value(model.config.num_hidden_layers, "layers"),
              "sets": value(2 * len(lengths) * model.config.num_hidden_layers * model.config.num_attention_heads,
                            "sets"),
              "codes_share": value(rows[-1][3], "% of the keys"), "four_share": value(rows[-1][4], "% of the keys"),
              "keys_share": value(rows[-1][2], "% of the keys")}  # fmt: skip
    recalls = {name: statistics.mean(x) for name, x in approximate.items()}
    headline = f"N = {full}: {rows[-1][3]:.1f} % rescored behind 8-bit codes; 4 bits leave {rows[-1][4]:.1f} %"
    return Result(wrong == 0, f"{wrong} sets differ", headline, values, values["sets"]["value"],
                  {"rows": rows, "recall": recalls, "layers": layers},
                  [f"N={n}, {name}" for n in lengths for name in ("keys", "codes")])  # fmt: skip


HEADS, KV_HEADS, DIM = 32, 8, 128
#: batch, N, k; bfloat16
SHAPES = ((1, 131072, 2048), (4, 32768, 2048), (1, 32768, 2048), (1, 1048576, 2048), (1, 131072, 13108))


@torch.inference_mode()
def speed(context: Context) -> Result:
    """One decode step of attention, certified against the fastest dense one of the same run, under CUDA graphs."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    repeats = 5 if context.quick else 41
    generator = torch.Generator("cuda").manual_seed(context.seed)
    bandwidth = _bandwidth(repeats)
    values: dict[str, Any] = {"repeats": value(repeats, "replays"), "bandwidth": value(bandwidth / 1e12, "TB/s")}
    rows: list[list[Any]] = []
    data: dict[str, Any] = {"rows": rows, "parts": {}, "peers": [], "dense": {}}
    exact = True
    for batch, n, wanted in context.progress(SHAPES[2:3] if context.quick else SHAPES, "shapes"):
        one = _timed(batch, n, wanted, generator, repeats, flex=not context.quick, peers=not data["peers"])
        tag = f"B={batch}, N={n}, k={wanted}"
        data["dense"][tag], data["peers"] = one["dense"], data["peers"] or one["peers"]
        best = min(one["dense"], key=one["dense"].__getitem__)
        fastest = one["dense"][best]
        for name, (rescored, read, same) in one["ways"].items():
            took, floor = one["parts"][name]["all"], 1e6 * read / bandwidth
            rows.append([batch, n, wanted, name, best, fastest, took, fastest / took, floor, took / floor, rescored])
            data["parts"][f"{tag}, {name}"] = one["parts"][name]
            values[f"{name}_b{batch}_n{n}_k{wanted}"] = value(fastest / took, "x dense", n=repeats)
            exact &= same
        torch.cuda.empty_cache()
    headline = "; ".join(f"B={r[0]} N={r[1]} k={r[2]} {r[3]} {r[7]:.2f}x" for r in rows)
    verdict = "measured, outputs canonical" if exact else "an output is not canonical"
    return Result(exact, verdict, headline, values, len(rows), data)


def _bandwidth(repeats: int) -> float:
    """Bytes a second of the faster of two kernels: one copies 1 GiB, one only reads 2 GiB."""
    x = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    both = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
    graphs = {"copy": capture(lambda: torch.neg(x, out=y)), "read": capture(lambda: both.amax())}
    took = {name: statistics.median(t) for name, t in microseconds(graphs, repeats, "bandwidth").items()}
    return 1e6 * max((x.nbytes + y.nbytes) / took["copy"], both.nbytes / took["read"])


def _timed(
    batch: int, n: int, wanted: int, generator: torch.Generator, repeats: int, *, flex: bool, peers: bool
) -> dict[str, Any]:
    """Median microseconds of every dense step, every certified one, its stages, and peers, of one shape."""

    def bell(heads: int, m: int) -> torch.Tensor:
        return torch.randn(batch, heads, m, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, k, v = bell(HEADS, 1), bell(KV_HEADS, n), bell(KV_HEADS, n)
    graphs = {f"dense/{name}": capture(f) for name, f in dense_decoding.variants(q, k, v, flex).items()}
    expected = qaxis.topk_attention(q, k, v, wanted)
    out: dict[str, Any] = {"ways": {}, "peers": []}
    alive: list[Any] = []
    for name, keys, vals, index in ways(k, v):
        decoder = Decoder(batch, HEADS, n, DIM, wanted, "cuda")
        step = decoder(q, keys, vals, index)
        same = torch.equal(step.indices, expected.indices) and torch.equal(step.output, expected.output)
        rescored = float(step.rescored.float().sum(-1).mean())
        # Once all keys or their codes; once more what is rescored, and the values of what is kept, by every query head.
        item = 1 if name == "cache" else 2
        read = batch * DIM * (KV_HEADS * n * (2 if name == "keys" else 1) + HEADS * (rescored + wanted) * item)
        out["ways"][name] = (rescored, read, same or name == "cache")
        parts = _stages(decoder, q, keys, vals, index)
        graphs.update({f"{name}/{part}": capture(f) for part, f in parts.items()})
        alive.append((decoder, keys, vals, index, parts))
    near = approximate_decoding.ways(k, wanted) if peers else []
    for way in near:
        graphs[f"peer/{way.name}"] = capture(partial(_approximate, way, q, k, v))
    label = f"B={batch}, N={n}, k={wanted}"
    times = {name: statistics.median(x) for name, x in microseconds(graphs, repeats, label).items()}
    found = {name: {x.split("/")[1]: t for x, t in times.items() if x.startswith(f"{name}/")} for name in out["ways"]}
    for way in near:
        recall = approximate_decoding.recall(way.choose(q), expected.indices)
        out["peers"].append([way.name, recall, way.share, times[f"peer/{way.name}"]])
    dense = {x.split("/")[1]: t for x, t in times.items() if x.startswith("dense/")}
    return {**out, "parts": found, "dense": dense}


def _approximate(
    way: approximate_decoding.Approximate, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return approximate_decoding.attend(q, k, v, way.choose(q))


def _stages(
    decoder: Decoder, q: torch.Tensor, keys: Any, values: Any, index: KeyIndex
) -> dict[str, Callable[[], object]]:
    """The whole step, and the stages of it, each repeatable by itself once all have run."""
    batch, heads = q.shape[:2]
    start, end = decoder.score(q, keys, index)
    indices, score = decoder.select(q, keys, index)
    return {
        "all": lambda: decoder(q, keys, values, index)[:2],
        "score": lambda: decoder.score(q, keys, index),
        "compact": lambda: decoder.compact(q, keys.shape[1], index, start, end),
        "rescore": lambda: decoder.rescore(q, keys),
        "choose": lambda: decoder.choose(batch, heads),
        "attend": lambda: decoder.attend(indices, score, values, q.shape[3] ** -0.5, heads // keys.shape[1]),
    }
