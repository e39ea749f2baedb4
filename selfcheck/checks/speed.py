"""How long an exact decode step and a selection-exact prefill take, beside dense attention of the same run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

import qaxis
from qaxis.attention.logits import Logits
from qaxis.decode import Decoder, KeyIndex
from qaxis.decode.cuda import CudaStep, step_for
from qaxis.decode.triton_step import TritonStep
from qaxis.prefill import prefill_attention, selected_positions
from qaxis.storage.side import Stored

from ..harness.claim import Context, NotRunError, Result, value
from ..rivals import approximate_decoding
from .certified import ways as certified_ways

if torch.cuda.is_available():
    from ..harness.timing import capture, microseconds
    from ..rivals import dense_8bit, dense_decoding

HEADS, KV_HEADS, DIM = 32, 8, 128
#: batch, N, k_eff; bfloat16
SHAPES = ((1, 131072, 2048), (4, 32768, 2048), (1, 32768, 2048), (1, 1048576, 2048), (1, 131072, 13108))
#: the marks of choose.cu after which its stages end
MARKS = {"cut": 1, "compact": 2, "rescore": 3, "choose": 10, "attend": 12}


@torch.inference_mode()
def decode(context: Context) -> Result:
    """One decode step of attention, certified against the fastest dense one of the same run, under CUDA graphs."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    repeats = 5 if context.quick else 41
    generator = torch.Generator("cuda").manual_seed(context.seed)
    bandwidth = _bandwidth(repeats)
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    dense: list[dict[str, Any]] = []
    exact = True
    for batch, n, k_eff in context.progress(SHAPES[2:3] if context.quick else SHAPES, "shapes"):
        # FlexAttention takes long to compile and is far behind: in the first shape only, as are the peers.
        first = not rows
        timed = _Timed(batch, n, k_eff, generator)
        found = timed.measure(repeats, flex=first and not context.quick, peers=first)
        best = min(found.dense, key=found.dense.__getitem__)
        shape = {"batch": batch, "n": n, "k_eff": k_eff}
        dense.append({**shape, "took": found.dense})
        peers += found.peers
        for way in found.ways:
            floor, took = 1e6 * way.read / bandwidth, way.stages["all"]
            rows.append({
                **shape, "way": way.name, "best": best, "dense": found.dense[best], "took": took,
                "ratio": found.dense[best] / took, "floor": floor, "over_floor": took / floor,
                "rescored": way.rescored, "triton": way.stages.get("triton", took), "stages": way.stages,
                # The other dense steps read bfloat16; this one the 8-bit keys and values of the INT8 cache.
                "dense_8bit": found.coded, "ratio_8bit": found.coded / took,
            })  # fmt: skip
            exact &= way.exact
        torch.cuda.empty_cache()
    return Result(
        passed=exact,
        verdict="measured, outputs canonical" if exact else "an output is not canonical",
        headline="; ".join(f"B={r['batch']} N={r['n']} k={r['k_eff']} {r['way']} {r['ratio']:.2f}x" for r in rows),
        values={
            "repeats": value(repeats, "replays"),
            "bandwidth": value(bandwidth / 1e12, "TB/s"),
            **{
                f"{r['way']}_b{r['batch']}_n{r['n']}_k{r['k_eff']}": value(r["ratio"], "x dense", n=repeats)
                for r in rows
            },
            **{
                f"cache_b{r['batch']}_n{r['n']}_k{r['k_eff']}_8bit": value(r["ratio_8bit"], "x dense", n=repeats)
                for r in rows
                if r["way"] == "cache"
            },
        },
        cases=len(rows),
        data={"rows": rows, "peers": peers, "dense": dense},
    )


def _bandwidth(repeats: int) -> float:
    """Bytes a second of the faster of two kernels: one copies 1 GiB, one only reads 2 GiB."""
    x = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    both = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
    graphs = {"copy": capture(lambda: torch.neg(x, out=y)), "read": capture(lambda: both.amax())}
    took = {name: statistics.median(t) for name, t in microseconds(graphs, repeats, "bandwidth").items()}
    return 1e6 * max((x.nbytes + y.nbytes) / took["copy"], both.nbytes / took["read"])


@dataclass
class _Way:
    """One way to read the keys: what it gave, and the microseconds of the whole step and of its stages."""

    name: str
    rescored: float
    #: bytes that one step has to read
    read: float
    exact: bool
    stages: dict[str, float] = field(default_factory=dict)
    #: of choose.cu, by its own clock
    inside: dict[str, float] = field(default_factory=dict)


@dataclass
class _Found:
    dense: dict[str, float]
    #: the fastest dense step that reads an 8-bit cache
    coded: float
    ways: list[_Way]
    peers: list[dict[str, Any]]


class _Timed:
    """Everything of one shape that is timed together, in random order."""

    def __init__(self, batch: int, n: int, k_eff: int, generator: torch.Generator) -> None:
        def bell(heads: int, m: int) -> torch.Tensor:
            return torch.randn(batch, heads, m, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)

        self.batch, self.n, self.k_eff = batch, n, k_eff
        self.q, self.k, self.v = bell(HEADS, 1), bell(KV_HEADS, n), bell(KV_HEADS, n)
        self.exact = qaxis.topk_attention(self.q, self.k, self.v, k_eff)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        #: what the graphs read
        self.alive: list[Any] = []

    def measure(self, repeats: int, *, flex: bool, peers: bool) -> _Found:
        """Median microseconds of every dense step, every certified one, its stages, and peers."""
        for name, f in dense_decoding.variants(self.q, self.k, self.v, flex).items():
            self.graphs[f"dense/{name}"] = capture(f)
        ways = [self._way(*way) for way in certified_ways(self.k, self.v)]
        near = approximate_decoding.ways(self.k, self.k_eff) if peers else []
        for rival in near:
            self.graphs[f"peer/{rival.name}"] = capture(partial(_approximate, rival, self.q, self.k, self.v))
        label = f"B={self.batch}, N={self.n}, k={self.k_eff}"
        times = {name: statistics.median(x) for name, x in microseconds(self.graphs, repeats, label).items()}

        def of(group: str) -> dict[str, float]:
            return {x.split("/")[1]: t for x, t in times.items() if x.startswith(f"{group}/")}

        for way in ways:
            way.stages = of(way.name)
            if way.inside:
                # The kernels hand counts to each other, so none can be repeated by itself.
                way.stages |= {"score": way.stages["all"] - sum(way.inside.values()), **way.inside}
        rows = [
            {"name": rival.name, "recall": approximate_decoding.recall(rival.choose(self.q), self.exact.indices),
             "share": rival.share, "took": of("peer")[rival.name]}
            for rival in near
        ]  # fmt: skip
        return _Found(of("dense"), min(of("coded").values()), ways, rows)

    def _way(self, name: str, keys: Any, values: Any, index: KeyIndex) -> _Way:
        """Run one way, compare it, and add what of it is timed to the graphs."""
        q, exact = self.q, self.exact
        if isinstance(keys, Stored):
            exact = qaxis.topk_attention(q, keys.dequantized(), values.dequantized(), self.k_eff)
            self._coded(keys, values)
        decoder = Decoder(self.batch, HEADS, self.n, DIM, self.k_eff, "cuda")
        other = TritonStep(self.batch, HEADS, self.n, DIM, self.k_eff, "cuda")
        step = decoder(q, keys, values, index)
        same = torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)
        rescored = float(step.rescored.float().sum(-1).mean())
        fast = decoder.cuda_step(q, keys, values, index)
        # Once all keys or their codes; once more what is rescored (the CUDA kernels score keys canonically at once),
        # and the values of what is kept, by every query head.
        item, again = 1 if name == "cache" else 2, 0.0 if name == "keys" and fast is not None else rescored
        read = KV_HEADS * self.n * (2 if name == "keys" else 1) + HEADS * (again + self.k_eff) * item
        parts, inside = _stages(fast, other, q, keys, values, index)
        if fast is not None:
            parts |= {"all": partial(decoder, q, keys, values, index), "triton": partial(other, q, keys, values, index)}
        self.graphs.update({f"{name}/{part}": capture(f) for part, f in parts.items()})
        self.alive.append((decoder, other, keys, values, index, parts))
        return _Way(name, rescored, self.batch * DIM * read, same, inside=inside)

    def _coded(self, keys: Stored, values: Stored) -> None:
        """Dense steps over the 8-bit cache, compared with attention over what it stands for."""
        right = torch.nn.functional.scaled_dot_product_attention(
            self.q, keys.dequantized(), values.dequantized(), enable_gqa=True
        )
        for splits in (15, 31, 63):
            step = partial(dense_8bit.attend, self.q, keys, values, splits)
            error = float((step().float() - right.float()).abs().max())
            if error > 2e-2:
                raise AssertionError(f"dense step over 8 bits, {splits} splits: off by {error}")
            self.graphs[f"coded/{splits}"] = capture(step)


def _approximate(
    way: approximate_decoding.Approximate, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return approximate_decoding.attend(q, k, v, way.choose(q))


def _stages(
    fast: CudaStep | None, slow: TritonStep, q: torch.Tensor, keys: Any, values: Any, index: KeyIndex
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What of a step can be repeated by itself, and of choose.cu the microseconds of each stage, by its own clock."""
    batch, heads = q.shape[:2]
    rows, logits = slow.full, Logits(q.shape[3] ** -0.5)
    if fast is not None:
        profiled = cast(CudaStep, step_for(q, keys, values, index, fast.shape.k_eff, profile=True))
        for _ in range(3):
            profiled.run(q, keys, values, index, rows, logits)
        took = (profiled.marks.double().diff(dim=-1).flatten(0, 1).mean(0) / 1000).tolist()
        ends = itertools.pairwise([0, *MARKS.values()])
        return {}, {stage: sum(took[a:b]) for stage, (a, b) in zip(MARKS, ends, strict=True)}
    indices, logit = slow.select(q, keys, index, rows, logits)
    return {
        "all": lambda: slow(q, keys, values, index)[:2],
        "score": lambda: slow.score(q, keys, index, rows),
        "compact": lambda: slow.compact(q, keys.shape[1], index, rows),
        "rescore": lambda: slow.rescore(q, keys, rows),
        "choose": lambda: slow.choose(batch, heads, rows, logits),
        "attend": lambda: slow.attend(indices, logit, values, rows, logits),
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
    compared, wrong = (sum(x) for x in zip(*(_sets_differ(q, k, v, b) for b in budgets.values()), strict=True))
    parts: dict[str, Callable[[], object]] = {
        "flash": partial(dense, SDPBackend.FLASH_ATTENTION), "cudnn": partial(dense, SDPBackend.CUDNN_ATTENTION),
        **{name: partial(prefill_attention, q, k, v, budget) for name, budget in budgets.items()},
    }  # fmt: skip
    graphs = {name: capture(f) for name, f in parts.items()}
    took = {name: statistics.median(t) / 1000 for name, t in microseconds(graphs, repeats, "prefill").items()}
    ratio = {name: took[name] / took["flash"] for name in budgets}
    return Result(
        passed=wrong == 0,
        verdict=f"measured, {wrong} sets differ",
        headline=f"{took['tenth']:.2f} ms for a tenth of the keys, {took['fixed']:.2f} for 2048: "
        f"{ratio['tenth']:.2f} and {ratio['fixed']:.2f} times FlashAttention-2",
        values={
            "repeats": value(repeats, "replays"),
            "n": value(n, "queries"),
            "wrong": value(wrong, "sets"),
            "compared": value(compared, "sets"),
            **{name: value(t, "ms") for name, t in took.items()},
            **{f"{name}_ratio": value(x, "x FlashAttention-2", n=repeats) for name, x in ratio.items()},
        },
        cases=len(took),
        data={"kernels": _kernels(parts["tenth"])},
    )


def _sets_differ(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: qaxis.Budget) -> tuple[int, int]:
    """(sets compared, sets that differ): of all queries it would take long, so of a few stretches."""
    bits = cast(torch.Tensor, prefill_attention(q, k, v, budget, selection=True).bits)
    compared = wrong = 0
    for start in (0, 2000, 4096, q.shape[2] - 64):
        some = slice(start, start + 64)
        exact = qaxis.topk_indices(q[:, :, some].contiguous(), k[:, :, : some.stop], budget)
        found = selected_positions(bits[:, :, some])
        sets = q.shape[0] * q.shape[1] * 64
        same = found.shape == exact.shape
        compared, wrong = compared + sets, wrong + (int((found != exact).any(-1).sum()) if same else sets)
    return compared, wrong


def _kernels(f: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        f()
        torch.cuda.synchronize()
    return {event.key[:60]: float(event.self_device_time_total) for event in seen.key_averages()}
