"""How long an exact decode step and a selection-exact prefill take, beside dense attention of the same run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import qaxis
from qaxis.decode import Decoder, KeyIndex
from qaxis.decode.cuda import CudaStep, step_for
from qaxis.decode.triton_step import TritonStep
from qaxis.prefill import prefill_attention, selected_positions
from qaxis.storage.side import Stored

from ..harness.claim import Context, NotRunError, Result, value
from ..rivals import approximate_decoding
from .certified import ways

if torch.cuda.is_available():
    from ..harness.timing import capture, microseconds
    from ..rivals import dense_decoding

HEADS, KV_HEADS, DIM = 32, 8, 128
#: batch, N, k; bfloat16
SHAPES = ((1, 131072, 2048), (4, 32768, 2048), (1, 32768, 2048), (1, 1048576, 2048), (1, 131072, 13108))
#: the marks of choose.cu after which its stages end
MARKS = {"cut": 3, "compact": 5, "rescore": 6, "choose": 13, "attend": 15}


@torch.inference_mode()
def decode(context: Context) -> Result:
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
        # FlexAttention takes long to compile and is far behind: in the first shape only, as are the peers.
        first = not data["peers"]
        one = _timed(batch, n, wanted, generator, repeats, flex=first and not context.quick, peers=first)
        tag = f"B={batch}, N={n}, k={wanted}"
        data["dense"][tag], data["peers"] = one["dense"], data["peers"] or one["peers"]
        best = min(one["dense"], key=one["dense"].__getitem__)
        fastest = one["dense"][best]
        for name, (rescored, read, same) in one["ways"].items():
            parts = one["parts"][name]
            took, floor = parts["all"], 1e6 * read / bandwidth
            rows.append([batch, n, wanted, name, best, fastest, took, fastest / took, floor, took / floor, rescored,
                         parts.get("triton", took)])  # fmt: skip
            data["parts"][f"{tag}, {name}"] = parts
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
    out: dict[str, Any] = {"ways": {}, "peers": [], "shares": {}}
    alive: list[Any] = []
    for name, keys, vals, index in ways(k, v):
        exact = expected
        if isinstance(keys, Stored):
            exact = qaxis.topk_attention(q, keys.dequantized(), vals.dequantized(), wanted)
        decoder = Decoder(batch, HEADS, n, DIM, wanted, "cuda")
        other = TritonStep(batch, HEADS, n, DIM, wanted, "cuda")
        step = decoder(q, keys, vals, index)
        same = torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)
        rescored = float(step.rescored.float().sum(-1).mean())
        fast = decoder.cuda_step(q, keys, vals, index)
        # Once all keys or their codes; once more what is rescored (the CUDA kernels score keys canonically at once),
        # and the values of what is kept, by every query head.
        item, again = 1 if name == "cache" else 2, 0.0 if name == "keys" and fast is not None else rescored
        read = batch * DIM * (KV_HEADS * n * (2 if name == "keys" else 1) + HEADS * (again + wanted) * item)
        out["ways"][name] = (rescored, read, same)
        parts, out["shares"][name] = _stages(fast, other, q, keys, vals, index)
        if fast is not None:
            parts |= {"all": partial(decoder, q, keys, vals, index), "triton": partial(other, q, keys, vals, index)}
        graphs.update({f"{name}/{part}": capture(f) for part, f in parts.items()})
        alive.append((decoder, other, keys, vals, index, parts))
    near = approximate_decoding.ways(k, wanted) if peers else []
    for way in near:
        graphs[f"peer/{way.name}"] = capture(partial(_approximate, way, q, k, v))
    label = f"B={batch}, N={n}, k={wanted}"
    times = {name: statistics.median(x) for name, x in microseconds(graphs, repeats, label).items()}
    found = {name: {x.split("/")[1]: t for x, t in times.items() if x.startswith(f"{name}/")} for name in out["ways"]}
    for name, shares in out.pop("shares").items():
        if shares:
            rest = found[name].pop("rest")
            found[name] |= {stage: rest * share for stage, share in shares.items()}
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
    fast: CudaStep | None, slow: TritonStep, q: torch.Tensor, keys: Any, values: Any, index: KeyIndex
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What of a step can be repeated by itself, and of choose.cu ("rest") the share of each stage, by its own clock."""
    batch, heads = q.shape[:2]
    scale = q.shape[3] ** -0.5
    if fast is not None:
        profiled = step_for(q, keys, values, index, fast.shape.k_eff, profile=True)
        assert profiled is not None
        for _ in range(3):
            profiled.score(q, keys, index)
            profiled.choose(q, keys, values, index, scale)
        took = profiled.marks.double().diff(dim=-1).flatten(0, 1).mean(0).tolist()
        ends = itertools.pairwise([0, *MARKS.values()])
        shares = {stage: sum(took[a:b]) / sum(took) for stage, (a, b) in zip(MARKS, ends, strict=True)}
        fast.score(q, keys, index)
        return {
            "score": partial(fast.score, q, keys, index),
            "rest": partial(fast.choose, q, keys, values, index, scale),
        }, shares
    start, end = slow.score(q, keys, index)
    indices, score = slow.select(q, keys, index)
    return {
        "all": lambda: slow(q, keys, values, index)[:2],
        "score": lambda: slow.score(q, keys, index),
        "compact": lambda: slow.compact(q, keys.shape[1], index, start, end),
        "rescore": lambda: slow.rescore(q, keys),
        "choose": lambda: slow.choose(batch, heads),
        "attend": lambda: slow.attend(indices, score, values, scale),
    }, {}


@torch.inference_mode()
def prefill(context: Context) -> Result:
    """Causal prefill of 8192 queries against FlashAttention-2 and cuDNN through SDPA, under CUDA graphs."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    n, repeats = 8192, 3 if context.quick else 41
    generator = torch.Generator("cuda").manual_seed(context.seed)
    q, k, v = (
        torch.randn(1, heads, n, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def dense(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    budgets = {"tenth": qaxis.Budget(), "fixed": qaxis.Budget(0, 2048)}
    wrong = compared = 0
    for budget in budgets.values():
        bits = prefill_attention(q, k, v, budget, selection=True).bits
        assert bits is not None
        # The canonical sets of all queries would take long: those of a few stretches.
        for start in (0, 2000, 4096, n - 64):
            some = slice(start, start + 64)
            exact = qaxis.topk_indices(q[:, :, some].contiguous(), k[:, :, : some.stop], budget)
            found = selected_positions(bits[:, :, some])
            compared += HEADS * 64
            same = found.shape == exact.shape
            wrong += int((found != exact).any(-1).sum()) if same else HEADS * 64
    parts: dict[str, Callable[[], object]] = {
        "flash": partial(dense, SDPBackend.FLASH_ATTENTION), "cudnn": partial(dense, SDPBackend.CUDNN_ATTENTION),
        **{name: partial(prefill_attention, q, k, v, budget) for name, budget in budgets.items()},
    }  # fmt: skip
    graphs = {name: capture(f) for name, f in parts.items()}
    took = {name: statistics.median(t) / 1000 for name, t in microseconds(graphs, repeats, "prefill").items()}
    values: dict[str, Any] = {
        "repeats": value(repeats, "replays"), "n": value(n, "queries"), "wrong": value(wrong, "sets"),
        "compared": value(compared, "sets"), **{name: value(t, "ms") for name, t in took.items()},
        **{f"{name}_ratio": value(took[name] / took["flash"], "x FlashAttention-2", n=repeats) for name in budgets},
    }  # fmt: skip
    headline = (
        f"{took['tenth']:.2f} ms for a tenth of the keys, {took['fixed']:.2f} for 2048: "
        f"{took['tenth'] / took['flash']:.2f} and {took['fixed'] / took['flash']:.2f} times FlashAttention-2"
    )
    return Result(wrong == 0, f"measured, {wrong} sets differ", headline, values, len(took),
                  {"kernels": _kernels(parts["tenth"])})  # fmt: skip


def _kernels(f: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        f()
        torch.cuda.synchronize()
    return {event.key[:60]: float(event.self_device_time_total) for event in seen.key_averages()}
