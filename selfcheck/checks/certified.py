"""The certified decode step: that it is exact under attack, and what it reads of real keys."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import qaxis
from qaxis import decode
from qaxis.arithmetic.rounding import product_error_bound
from qaxis.decode import KeyIndex, index_cache, index_keys
from qaxis.decode.triton_step import TritonStep
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

from ..harness.claim import Context, Result, value
from ..rivals import approximate_decoding

WAYS = ("keys", "codes", "cache")
#: the two implementations of the step
BOTH: dict[str, Callable[..., Any]] = {"Triton": TritonStep, "CUDA": decode.Decoder}
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
    """Indices and output bits of the certified steps against the canonical kernels, on random and adversarial rows."""
    wide, half = (torch.bfloat16, torch.float32, torch.float16), (torch.bfloat16,)
    if context.device != "cpu":
        # Where every second key or more is a neighbourhood, the cut is as tight as the bound allows. One program of
        # choose.cu a row, clusters of four, of eight; 80 dimensions are left to the Triton kernels.
        shapes = [
            ((16, 16, 4, 777, 64), 400, wide), ((16, 16, 4, 2048, 128), 204, half),
            ((1, 32, 8, 20000, 128), 1000, half), ((1, 9, 3, 4096, 64), 410, half), ((32, 8, 2, 1500, 80), 1, half),
        ]  # fmt: skip
        kinds: tuple[str, ...] = KINDS
        repeats = 1 if context.quick else 3
        decoders = BOTH
    else:
        shapes = [((1, 4, 2, 300, 32), 20, wide), ((1, 8, 2, 500, 32), 200, wide)]
        kinds, repeats = KINDS[::4] if context.quick else KINDS, 1
        decoders = {"Triton": TritonStep}
    plan = [
        (kind, shape, wanted, dtype)
        for kind, (shape, wanted, dtypes) in itertools.product(kinds, shapes)
        for dtype in dtypes * repeats
    ]
    return attacked(context, plan, decoders)


def attacked(
    context: Context,
    plan: Sequence[tuple[str, tuple[int, ...], int, torch.dtype]],
    decoders: dict[str, Callable[..., Any]],
) -> Result:
    """Steps of ``decoders`` against the canonical reference; plan: kinds, shapes, k, dtypes."""
    generator = torch.Generator(context.device).manual_seed(context.seed)
    rows = dict.fromkeys(BOTH, 0)
    sets = bits = 0
    rescored: dict[str, list[float]] = {name: [] for name in WAYS}
    made: dict[Any, Any] = {}
    wrong: list[str] = []
    names: set[str] = set()
    for kind, shape, wanted, dtype in context.progress(plan, "attacks"):
        b, h, _, n, d = shape
        q, k, v = attack(kind, shape, dtype, generator)
        exact = qaxis.topk_attention(q, k, v, wanted, backend="auto")
        for name, keys, values, index in ways(k, v):
            expected = exact
            if isinstance(keys, Stored):
                expected = qaxis.topk_attention(q, keys.dequantized(), values.dequantized(), wanted, backend="auto")
            for by, make in decoders.items():
                if (by, shape) not in made:
                    made[by, shape] = make(b, h, n, d, wanted, context.device)
                decoder = made[by, shape]
                if by == "CUDA" and decoder.cuda_step(q, keys, values, index) is None:
                    continue
                step = decoder(q, keys, values, index)
                differ = int((step.indices != expected.indices).any(-1).sum())
                other = int((step.output != expected.output).flatten(2).any(-1).sum())
                label = f"{kind}, {str(dtype)[6:]}, N={n}, D={d}, {name}, {by}"
                if differ or other:
                    wrong.append(label)
                names.add(label)
                rows[by], sets, bits = rows[by] + b * h, sets + differ, bits + other
                rescored[name].append(float(step.rescored.float().sum(-1).mean()) / wanted)
    total = sum(rows.values())
    headline = f"{total} queries, {rows['CUDA']} by CUDA C++: {sets} sets differ, {bits} outputs differ"
    return Result(
        not wrong, headline, headline + (f"; first: {wrong[0]}" if wrong else ""),
        {"rows": value(total, "queries"), "by_cuda": value(rows["CUDA"], "queries"), "sets": value(sets, "queries"),
         "outputs": value(bits, "queries")},
        total, {"rescored": {k: statistics.median(x) for k, x in rescored.items() if x}}, sorted(names),
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
    wrong = compared = by_cuda = 0
    approximate: dict[str, list[float]] = {}
    for n in context.progress(lengths, "lengths"):
        shares: dict[str, list[float]] = {"keys": [], "codes": [], "4 bits": [], "8 bits": []}
        wanted = qaxis.Budget().k_eff(n)
        for layer in range(model.config.num_hidden_layers):
            q, k, v = (x.to(torch.bfloat16) for x in captured[layer])
            q, k, v = q[:, :, n - 1 : n].contiguous(), k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
            exact = qaxis.topk_attention(q, k, v, wanted)
            for name, keys, values, index in itertools.islice(ways(k, v), 2):
                for by, make in BOTH.items():
                    decoder = make(1, q.shape[1], n, q.shape[3], wanted, q.device)
                    if by == "CUDA" and decoder.cuda_step(q, keys, values, index) is None:
                        continue
                    step = decoder(q, keys, values, index)
                    wrong += int((step.indices != exact.indices).any(-1).sum())
                    compared, by_cuda = compared + q.shape[1], by_cuda + (q.shape[1] if by == "CUDA" else 0)
                    if by == "Triton":
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
              "sets": value(compared, "sets"), "by_cuda": value(by_cuda, "sets"),
              "codes_share": value(rows[-1][3], "% of the keys"), "four_share": value(rows[-1][4], "% of the keys"),
              "keys_share": value(rows[-1][2], "% of the keys")}  # fmt: skip
    recalls = {name: statistics.mean(x) for name, x in approximate.items()}
    headline = f"N = {full}: {rows[-1][3]:.1f} % rescored behind 8-bit codes; 4 bits leave {rows[-1][4]:.1f} %"
    return Result(wrong == 0, f"{wrong} sets differ", headline, values, values["sets"]["value"],
                  {"rows": rows, "recall": recalls, "layers": layers},
                  [f"N={n}, {name}" for n in lengths for name in ("keys", "codes")])  # fmt: skip
