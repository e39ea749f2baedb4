"""How long an exact decode step and a selection-exact prefill take, beside dense attention of the same run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
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
from ..harness.timing import CLEAN, WRITTEN, bandwidth, capture, fastest, microseconds, ratio
from ..inputs.heads import INDEPENDENT, KINDS, drawn
from ..rivals import approximate_decoding
from .certified import ways as certified_ways

if torch.cuda.is_available():
    from ..rivals import dense_8bit, dense_decoding

HEADS, KV_HEADS, DIM = 32, 8, 128
Shape = tuple[int, int, int]
#: batch, N, k_eff; bfloat16
SHAPES: tuple[Shape, ...] = (
    (1, 131072, 2048), (4, 32768, 2048), (1, 32768, 2048), (1, 1048576, 2048), (1, 131072, 13108),
)  # fmt: skip
#: those at which keys of other kinds are timed too
OF_ALL_KINDS = SHAPES[:2]
#: the marks, as program.cuh lists them, after which the stages of the second kernel end
MARKS = {"cut": 1, "compact": 2, "rescore": 3, "choose": 10, "attend": 12}
#: queries of a prompt, and how often it is replayed
PREFILLS = ((8192, 41), (16384, 15), (32768, 7))


def planned(quick: bool) -> list[tuple[Shape, str]]:
    """Shapes and kinds of keys, in the order in which they are timed."""
    shapes, wide = (SHAPES[2:3], SHAPES[2:3]) if quick else (SHAPES, OF_ALL_KINDS)
    return [(x, INDEPENDENT) for x in shapes] + [(x, kind) for kind in KINDS if kind != INDEPENDENT for x in wide]


@torch.inference_mode()
def decode(context: Context) -> Result:
    """One decode step of attention, certified against the fastest dense one of the same run, under CUDA graphs."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    repeats = 5 if context.quick else 41
    generator = torch.Generator("cuda").manual_seed(context.seed)
    speed = bandwidth(repeats)
    found: list[Found] = []
    for shape, kind in context.progress(planned(context.quick), "shapes"):
        # FlexAttention takes long to compile and is far behind: in the first shape only, as are the peers.
        first = not found
        timed = _Timed(shape, kind, generator)
        found.append(timed.measure(repeats, flex=first and not context.quick, peers=first))
        del timed
        torch.cuda.empty_cache()
    return result(found, speed, repeats)


@dataclass
class Way:
    """One way to read the keys, and what it gave."""

    name: str
    rescored: float
    #: bytes that one step has to read
    read: float
    exact: bool
    #: microseconds of the stages of choose.cu, by its own clock
    inside: dict[str, float] = field(default_factory=dict)


@dataclass
class Found:
    """What was measured of one shape and one kind of keys."""

    shape: Shape
    keys: str
    #: by what was in the cache before and by "group/name", microseconds of every round. Groups: dense; coded, dense
    #: steps that read an 8-bit cache; peer; and the ways, whose names are whole steps and stages
    times: dict[str, dict[str, list[float]]]
    ways: list[Way]
    #: name, recall and share of the keys' bytes
    peers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def where(self) -> dict[str, Any]:
        return {**dict(zip(("batch", "n", "k_eff"), self.shape, strict=True)), "keys": self.keys}

    def of(self, group: str, flush: str) -> dict[str, list[float]]:
        return {x.partition("/")[2]: t for x, t in self.times[flush].items() if x.startswith(f"{group}/")}

    def medians(self, group: str, flush: str) -> dict[str, float]:
        return {name: statistics.median(t) for name, t in self.of(group, flush).items()}

    def compared(self, way: str, flush: str) -> dict[str, Any]:
        """A way with the fastest dense steps, round by round: of bfloat16, and of an 8-bit cache."""
        own, dense, coded = self.of(way, flush)["all"], self.of("dense", flush), self.of("coded", flush)
        best, best_8bit = fastest(dense), fastest(coded)
        over, over_8bit = ratio(dense[best], own), ratio(coded[best_8bit], own)
        return {
            "best": best, "dense": statistics.median(dense[best]), "took": statistics.median(own),
            "ratio": over.value, "low": over.low, "high": over.high,
            "dense_8bit": statistics.median(coded[best_8bit]),
            "ratio_8bit": over_8bit.value, "low_8bit": over_8bit.low, "high_8bit": over_8bit.high,
        }  # fmt: skip

    def row(self, way: Way, speed: float) -> dict[str, Any]:
        stages = self.medians(way.name, WRITTEN)
        if way.inside:
            # The kernels hand counts to each other, so none can be repeated by itself.
            stages |= {"score": stages["all"] - sum(way.inside.values()), **way.inside}
        compared, floor = self.compared(way.name, WRITTEN), 1e6 * way.read / speed
        return {
            **self.where, "way": way.name, **compared, "floor": floor, "over_floor": compared["took"] / floor,
            "rescored": way.rescored, "triton": stages.get("triton", stages["all"]), "stages": stages,
            CLEAN: self.compared(way.name, CLEAN),
        }  # fmt: skip


def result(found: Sequence[Found], speed: float, repeats: int) -> Result:
    """Every shape, kind of keys and way, on memory of so many bytes a second."""
    rows = [x.row(way, speed) for x in found for way in x.ways]
    exact = all(way.exact for x in found for way in x.ways)
    values = {"repeats": value(repeats, "replays"), "bandwidth": value(speed / 1e12, "TB/s")}
    for r in rows:
        kind = "" if r["keys"] == INDEPENDENT else f"{r['keys']}_"
        name = f"{r['way']}_{kind}b{r['batch']}_n{r['n']}_k{r['k_eff']}"
        for suffix, x in (("", r), ("_clean", r[CLEAN])):
            values[name + suffix] = value(x["ratio"], "x dense", n=repeats, low=x["low"], high=x["high"])
            if r["way"] == "cache":
                values[f"{name}_8bit{suffix}"] = value(
                    x["ratio_8bit"], "x dense", n=repeats, low=x["low_8bit"], high=x["high_8bit"]
                )
    return Result(
        passed=exact,
        verdict="measured, outputs canonical" if exact else "an output is not canonical",
        headline="; ".join(
            f"B={r['batch']} N={r['n']} k={r['k_eff']} {r['way']} {r['ratio']:.2f}x, {r[CLEAN]['ratio']:.2f}x clean"
            for r in rows
            if r["keys"] == INDEPENDENT
        ),
        values=values,
        cases=len(rows),
        data={
            "rows": rows,
            "peers": [
                {**peer, "took": x.medians("peer", WRITTEN)[peer["name"]],
                 CLEAN: x.medians("peer", CLEAN)[peer["name"]]}
                for x in found for peer in x.peers
            ],
            "dense": [
                {**x.where, "took": x.medians("dense", WRITTEN), CLEAN: x.medians("dense", CLEAN)} for x in found
            ],
        },
    )  # fmt: skip


class _Timed:
    """Everything of one shape and kind of keys that is timed together, in random order."""

    def __init__(self, shape: Shape, kind: str, generator: torch.Generator) -> None:
        self.shape, self.kind = shape, kind
        self.batch, self.n, self.k_eff = shape
        self.q, self.k, self.v = drawn(kind, (self.batch, HEADS, KV_HEADS, self.n, DIM), generator)
        self.exact = qaxis.topk_attention(self.q, self.k, self.v, self.k_eff)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        #: of every way what each call of it gave, of which the last was captured, and what is right
        self.replayed: dict[str, tuple[list[Any], Any]] = {}
        #: what the graphs read
        self.alive: list[Any] = []

    def measure(self, repeats: int, *, flex: bool, peers: bool) -> Found:
        """Every dense step, every certified one, peers; of independent keys the stages too, and the Triton step."""
        dense = dense_decoding.variants(self.q, self.k, self.v, flex)
        self.graphs |= {f"dense/{name}": x for name, x in dense_decoding.captured(dense, capture).items()}
        self.alive.append(dense)
        ways = [self._way(*way) for way in certified_ways(self.k, self.v)]
        near = approximate_decoding.ways(self.k, self.k_eff) if peers else []
        for rival in near:
            self.graphs[f"peer/{rival.name}"] = capture(partial(_approximate, rival, self.q, self.k, self.v))
        stages = {f"{way.name}/{x}" for way in ways for x in (*MARKS, "score")}
        times = microseconds(
            self.graphs, repeats, f"B={self.batch}, N={self.n}, k={self.k_eff}, {self.kind}",
            clean=self.graphs.keys() - stages,
        )  # fmt: skip
        for way in ways:
            # What the last replay wrote, where the captured call left it.
            (output, indices, *_), exact = self.replayed[way.name][0][-1], self.replayed[way.name][1]
            way.exact &= torch.equal(indices, exact.indices) and torch.equal(output, exact.output)
        rows = [
            {"name": rival.name, "recall": approximate_decoding.recall(rival.choose(self.q), self.exact.indices),
             "share": rival.share}
            for rival in near
        ]  # fmt: skip
        return Found(self.shape, self.kind, times, ways, rows)

    def _way(self, name: str, keys: Any, values: Any, index: KeyIndex) -> Way:
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
        whole: dict[str, Callable[[], object]] = {"all": partial(decoder, q, keys, values, index)}
        inside: dict[str, float] = {}
        if self.kind == INDEPENDENT:
            parts, inside = _stages(fast, other, q, keys, values, index)
            if fast is not None:
                parts |= {**whole, "triton": partial(other, q, keys, values, index)}
        else:
            parts = whole
        self.graphs.update({f"{name}/{part}": capture(f) for part, f in parts.items() if part != "all"})
        kept: list[Any] = []
        self.graphs[f"{name}/all"] = capture(partial(_keep, kept, parts["all"]))
        self.replayed[name] = (kept, exact)
        self.alive.append((decoder, other, keys, values, index, parts))
        return Way(name, rescored, self.batch * DIM * read, same, inside=inside)

    def _coded(self, keys: Stored, values: Stored) -> None:
        """Dense steps over the 8-bit cache, compared with attention over what it stands for."""
        right = torch.nn.functional.scaled_dot_product_attention(
            self.q, keys.dequantized(), values.dequantized(), enable_gqa=True
        )
        for splits in (15, 31, 63):
            step = partial(dense_8bit.attend, self.q, keys, values, splits)
            error = dense_decoding.off(step(), right)
            if error > dense_decoding.TOLERANCE:
                raise AssertionError(f"dense step over 8 bits, {splits} splits: off by {error:.2g} of the largest")
            self.graphs[f"coded/{splits}"] = capture(step)


def _keep(kept: list[Any], f: Callable[[], object]) -> None:
    kept.append(f())


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
    """Causal prefill against FlashAttention-2 and cuDNN through SDPA, by length, under CUDA graphs."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    found: list[Prefill] = []
    kernels: dict[str, float] = {}
    for n, repeats in context.progress(PREFILLS, "lengths"):
        generator = torch.Generator("cuda").manual_seed(context.seed)
        q, k, v = (
            torch.randn(1, heads, n, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        found.append(_prefill(q, k, v, min(repeats, 3) if context.quick else repeats))
        if not kernels:
            kernels = _kernels(partial(prefill_attention, q, k, v, BUDGETS["tenth"]))
        del q, k, v
        torch.cuda.empty_cache()
    return prefilled(found, kernels)


#: keys that a prefill keeps, by the name in its values
BUDGETS = {"tenth": qaxis.Budget(), "fixed": qaxis.Budget(0, 2048)}


@dataclass
class Prefill:
    """What was measured of one length; microseconds of every round."""

    n: int
    times: dict[str, list[float]]
    compared: int
    wrong: int


def _prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeats: int) -> Prefill:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def dense(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    compared, wrong = (sum(x) for x in zip(*(_sets_differ(q, k, v, b) for b in BUDGETS.values()), strict=True))
    parts: dict[str, Callable[[], object]] = {
        "flash": partial(dense, SDPBackend.FLASH_ATTENTION), "cudnn": partial(dense, SDPBackend.CUDNN_ATTENTION),
        **{name: partial(prefill_attention, q, k, v, budget) for name, budget in BUDGETS.items()},
    }  # fmt: skip
    graphs = {name: capture(f) for name, f in parts.items()}
    times = microseconds(graphs, repeats, f"prefill of {q.shape[2]}")[WRITTEN]
    return Prefill(q.shape[2], times, compared, wrong)


def prefilled(found: Sequence[Prefill], kernels: dict[str, float]) -> Result:
    """Every length; values of the first one have no length in their names."""
    rows: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    compared, wrong = sum(x.compared for x in found), sum(x.wrong for x in found)
    for x in found:
        took = {name: statistics.median(t) / 1000 for name, t in x.times.items()}
        ratios = {name: ratio(x.times[name], x.times["flash"]) for name in BUDGETS}
        repeats, of = len(x.times["flash"]), "" if x is found[0] else f"_{x.n}"
        rows.append({
            "n": x.n, "repeats": repeats, "compared": x.compared, "wrong": x.wrong, "took": took,
            "ratios": {name: r._asdict() for name, r in ratios.items()},
        })  # fmt: skip
        values |= {f"repeats{of}": value(repeats, "replays"), f"n{of}": value(x.n, "queries")}
        values |= {f"{name}{of}": value(t, "ms") for name, t in took.items()}
        values |= {
            f"{name}{of}_ratio": value(r.value, "x FlashAttention-2", n=repeats, low=r.low, high=r.high)
            for name, r in ratios.items()
        }
    return Result(
        passed=wrong == 0,
        verdict=f"measured, {wrong} sets differ",
        headline="; ".join(
            f"N={r['n']}: {r['took']['tenth']:.2f} ms for a tenth of the keys, {r['took']['fixed']:.2f} for 2048: "
            f"{r['ratios']['tenth']['value']:.2f} and {r['ratios']['fixed']['value']:.2f} times FlashAttention-2"
            for r in rows
        ),
        values={**values, "wrong": value(wrong, "sets"), "compared": value(compared, "sets")},
        cases=sum(len(x.times) for x in found),
        data={"rows": rows, "kernels": kernels},
    )


def _sets_differ(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: qaxis.Budget) -> tuple[int, int]:
    """(sets compared, sets that differ): of all queries it would take long, so of a few stretches."""
    bits = cast(torch.Tensor, prefill_attention(q, k, v, budget, selection=True).bits)
    compared = wrong = 0
    for start in (0, 2000, q.shape[2] // 2, q.shape[2] - 64):
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
