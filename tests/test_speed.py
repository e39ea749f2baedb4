"""What the claims about speed do with times: flushes, intervals, kinds of keys, rivals of packages, tables."""

from __future__ import annotations

import itertools
import json
import math
import types
from collections.abc import Callable

import pytest
import torch

from figures import stages
from paper import numbers
from selfcheck.checks import speed
from selfcheck.checks.certified import ways
from selfcheck.harness import timing
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.inputs import heads
from selfcheck.rivals import dense_decoding, dense_packages

from . import speeds

sdpa = torch.nn.functional.scaled_dot_product_attention


class Machine:
    """A GPU whose graphs take 10 microseconds, and 5 more after the cache was written."""

    def __init__(self) -> None:
        self.now, self.dirty, self.done = 0.0, False, list[str]()

    def graph(self, name: str) -> types.SimpleNamespace:
        def replay() -> None:
            self.now += 0.010 + 0.005 * self.dirty
            self.done.append(name)

        return types.SimpleNamespace(replay=replay)

    def flush(self, kind: str) -> Callable[[], None]:
        def run() -> None:
            self.now, self.dirty = self.now + 1.0, kind == timing.WRITTEN
            self.done.append(kind)

        return run

    def event(self, enable_timing: bool) -> types.SimpleNamespace:
        event = types.SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_every_graph_is_replayed_once_a_round_after_each_flush_that_it_asks_for(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing, "flushes", lambda: {x: machine.flush(x) for x in (timing.WRITTEN, timing.CLEAN)})
    monkeypatch.setattr(timing.torch.cuda, "Event", machine.event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    graphs = {name: machine.graph(name) for name in "abc"}
    times = timing.microseconds(graphs, 4, "", clean={"a", "c"})
    assert {kind: set(x) for kind, x in times.items()} == {timing.WRITTEN: set("abc"), timing.CLEAN: set("ac")}
    for kind, right in ((timing.WRITTEN, 15.0), (timing.CLEAN, 10.0)):
        assert all(len(t) == 4 and t == pytest.approx([right] * 4) for t in times[kind].values())
    pairs = list(zip(machine.done[::2], machine.done[1::2], strict=True))
    per_round = [pairs[i : i + 5] for i in range(0, len(pairs), 5)]
    assert len(per_round) == 4 and all(sorted(x) == sorted(per_round[0]) for x in per_round)
    assert len({tuple(x) for x in per_round}) > 1


def test_one_flush_writes_and_the_other_only_reads(monkeypatch):
    before = timing.flushes("cpu", 1 << 12)
    seen: list[tuple[str, str, int]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append((str(f), args[0].numel() * args[0].element_size(), args[0].data_ptr()))
            return f(*args, **(kwargs or {}))

    with Watch():
        for f in (before[timing.WRITTEN], before[timing.CLEAN]):
            f()
    assert [(name.split(".")[1], size) for name, size, _ in seen] == [("zero_", 1 << 12), ("amax", 1 << 12)]
    assert seen[0][2] != seen[1][2], "what is read was just written"


def test_a_ratio_has_the_interval_of_rounds_that_are_resampled_together():
    # Half of the rounds are slow for both: apart, the ratio would lie anywhere between a half and four.
    slow = [1.0 + i % 2 + 0.01 * (i // 2) for i in range(20)]
    found = timing.ratio([2 * x for x in slow], slow)
    assert found == (2.0, 2.0, 2.0)
    noisy = timing.ratio(speeds.rounds(200.0, 41, 1), speeds.rounds(100.0, 41, 2))
    assert noisy.value == pytest.approx(2.0) and 1.95 < noisy.low < 2.0 < noisy.high < 2.05
    assert noisy == timing.ratio(speeds.rounds(200.0, 41, 1), speeds.rounds(100.0, 41, 2))
    assert timing.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    for above, below in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match=f"below={len(below)} times: allowed"):
            timing.ratio(above, below)
    # Of a mean, the slow round would count.
    assert timing.fastest({"steady": [3.0, 3.0, 3.0], "mostly": [2.0, 2.0, 90.0]}) == "mostly"


def test_kinds_of_keys_are_what_they_are_called():
    shape = (2, 32, 8, 300, 128)
    made = {kind: heads.drawn(kind, shape, torch.Generator().manual_seed(1)) for kind in heads.KINDS}
    cosines, spreads = {}, {}
    for kind, (q, k, v) in made.items():
        assert (q.shape, k.shape, v.shape) == ((2, 32, 1, 128), (2, 8, 300, 128), (2, 8, 300, 128))
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
        unit = torch.nn.functional.normalize(q.float().unflatten(1, (8, 4))[:, :, :, 0], dim=-1)
        of = unit @ unit.transpose(-1, -2)
        cosines[kind] = float((of.sum() - of.diagonal(dim1=-2, dim2=-1).sum()) / (of.numel() * 3 / 4))
        size = k.float().std(2)
        spreads[kind] = float((size.amax(-1) / size.amin(-1)).mean())
    assert cosines["correlated"] == pytest.approx(heads.COSINE, abs=0.03)
    assert abs(cosines["independent"]) < 0.03 and abs(cosines["uneven"]) < 0.05
    assert spreads["independent"] < 2 and 70 < spreads["uneven"] < 150
    q, k, v = made["uneven"]
    # One order of sizes a head, not ascending; scores as of independent keys, but for rounding.
    sizes = k.float().std(2)
    assert torch.equal(sizes[0, 0].argsort()[-8:].sort().values, sizes[1, 0].argsort()[-8:].sort().values)
    assert not torch.equal(sizes[0, 0].argsort(), sizes[0, 1].argsort()) and (sizes[0, 0].diff() < 0).any()
    plain = made["independent"]
    scores = [
        x.float().unflatten(1, (8, 4))[:, :, :, 0] @ y.float().transpose(-1, -2) for x, y, _ in (made["uneven"], plain)
    ]
    assert float((scores[0] - scores[1]).abs().max()) < 0.02 * float(scores[1].abs().max())
    with pytest.raises(ValueError, match="kind='other': allowed is one of"):
        heads.drawn("other", shape, torch.Generator())


@pytest.mark.parametrize("kind", heads.KINDS)
def test_the_step_is_canonical_over_every_kind_of_keys(kind):
    import qaxis
    from qaxis.decode import Decoder

    q, k, v = heads.drawn(kind, (1, 2, 1, 140, 64), torch.Generator().manual_seed(3))
    decoder = Decoder(1, 2, 140, 64, 12, "cpu")
    for _, keys, values, index in itertools.islice(ways(k, v), 2):
        step, exact = decoder(q, keys, values, index), qaxis.topk_attention(q, k, v, 12)
        assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


def test_shapes_and_kinds_are_planned():
    plan = speed.planned(quick=False)
    assert [shape for shape, kind in plan if kind == "independent"] == list(speed.SHAPES)
    for kind in ("correlated", "uneven"):
        assert [shape for shape, x in plan if x == kind] == [(1, 131072, 2048), (4, 32768, 2048)]
    assert {kind for _, kind in speed.planned(quick=True)} == set(heads.KINDS)
    for claim in (speed.decode, speed.prefill):
        with pytest.raises(NotRunError, match="needs a GPU"):
            claim(Context())


def test_ratios_are_to_the_fastest_dense_step_after_the_same_flush():
    found = speeds.decode()
    assert found.passed and found.cases == len(found.data["rows"]) == 27
    of = (131072, 13108, "codes", "independent")
    (row,) = [r for r in found.data["rows"] if (r["n"], r["k_eff"], r["way"], r["keys"]) == of]
    clean = row["clean"]
    assert (row["best"], clean["best"]) == ("cuDNN", "Triton")
    assert [round(x["dense"]) for x in (row, clean)] == [200, 170]
    assert [x["ratio"] for x in (row, clean)] == pytest.approx([2.0, 2.125])
    assert [round(x["dense_8bit"]) for x in (row, clean)] == [120, 110]
    for x in (row, clean):
        assert x["low"] < x["ratio"] < x["high"] < x["low"] * 1.1 and x["low_8bit"] < x["ratio_8bit"] < x["high_8bit"]
    assert row["stages"]["score"] == pytest.approx(60.0) and row["triton"] == pytest.approx(150.0)
    values = found.values
    assert values["codes_b1_n131072_k13108"]["value"] == row["ratio"]
    of_clean = values["codes_b1_n131072_k13108_clean"]
    assert [of_clean[x] for x in ("value", "low", "high")] == [clean[x] for x in ("ratio", "low", "high")]
    assert values["cache_b1_n131072_k2048_8bit"]["value"] == pytest.approx(1.2)
    assert values["cache_b1_n131072_k2048_8bit_clean"]["value"] == pytest.approx(1.1)
    assert values["cache_uneven_b4_n32768_k2048"]["low"] < 2 and "codes_b1_n131072_k2048_8bit" not in values
    other = next(r for r in found.data["rows"] if r["keys"] == "uneven")
    assert set(other["stages"]) == {"all"} and other["triton"] == other["took"]
    assert [(p["name"], round(p["took"]), round(p["clean"])) for p in found.data["peers"]] == [
        ("Quest-style, pages of 16", 500, 490)
    ]
    assert all(round(d["took"]["cuDNN"]) == 200 and round(d["clean"]["cuDNN"]) == 180 for d in found.data["dense"])
    json.dumps(vars(found))
    wrong = speeds.found((1, 8, 2), "uneven")
    wrong.ways[1].exact = False
    failed = speed.result([speeds.found((1, 8, 2), "independent"), wrong], 3e12, 41)
    assert not failed.passed and "not canonical" in failed.verdict


def test_a_prefill_is_compared_at_every_length():
    found = speeds.prefill()
    assert found.passed and [r["n"] for r in found.data["rows"]] == [8192, 16384, 32768]
    values = found.values
    assert values["tenth_ratio"]["value"] == values["tenth_16384_ratio"]["value"] == pytest.approx(2.0)
    assert [values[x]["n"] for x in ("fixed_ratio", "fixed_16384_ratio", "fixed_32768_ratio")] == [41, 15, 7]
    assert values["flash"]["value"] == pytest.approx(2.0)
    assert values["tenth_ratio"]["low"] < 2 < values["tenth_ratio"]["high"] and values["compared"]["value"] == 3 * 8192
    assert values["n"]["value"] == 8192 and values["repeats"]["value"] == 41
    json.dumps(vars(found))
    wrong = [speed.Prefill(8, {x: [1.0] for x in ("flash", "cudnn", "tenth", "fixed")}, 4, i) for i in (0, 2)]
    assert not speed.prefilled(wrong, {}).passed


def test_the_paper_has_intervals_flushes_and_kinds():
    records = speeds.records()
    plain, wide, prefill = (numbers.TABLES[name](records) for name in ("certified", "flushes", "prefill"))
    assert len(plain) == 15 and len(wide) == 27 and len(prefill) == 3
    cells = plain[1].split(" & ")
    assert cells[:5] == ["1", r"131\,072", r"2\,048", "codes", "cuDNN"] and cells[5:9] == ["200", "120", "150", "100"]
    assert cells[9].startswith("2.00 [1.9") and cells[9].endswith("]") and len(cells) == 12
    assert wide[2].split(" & ")[3:5] == ["independent", "INT8 cache"] and wide[-1].split(" & ")[3] == "uneven"
    over, clean, coded, coded_clean = wide[2].split(" & ")[5:9]
    assert [x.split(" [")[0] for x in (over, clean, coded, coded_clean)] == ["2.00", "1.70", "1.20", "1.10"]
    assert wide[1].split(" & ")[7:9] == ["--", "--"]
    assert prefill[1].startswith(r"16\,384 & 2.00 & 1.00 & 4.00 & 5.00 & 2.00 [") and prefill[1].endswith(" & 15")
    for name, short in (("cuDNN SDPA, GQA", "cuDNN"), ("FlashAttention-3 (fa3-fwd 0.0.3)", "FlashAttention-3"),
                        ("FlashInfer 0.7.2, batch, tensor cores", "FlashInfer 0.7.2")):  # fmt: skip
        records["certified-speed"]["data"]["rows"][0]["best"] = name
        assert numbers.TABLES["certified"](records)[0].split(" & ")[4] == short
    # The figure is of independent keys: five shapes, three ways each.
    figure = stages.draw(records)
    assert len(figure.axes) == 5 and all(len(axis.get_yticks()) == 3 for axis in figure.axes)


def test_a_dense_step_is_off_by_a_share_of_what_is_right():
    right = torch.full((1, 2, 1, 4), 0.004)
    assert dense_decoding.off(right.flatten(), right) == 0
    # An output of nothing is no rounding, however small what is right.
    assert dense_decoding.off(torch.zeros(8), right) == 1 > dense_decoding.TOLERANCE
    assert dense_decoding.off(torch.full((8,), math.nan), right) == math.inf


class Packages:
    """Modules of FlashAttention-3 and FlashInfer as their callers see them, computing by SDPA."""

    def __init__(self) -> None:
        self.flash_attn_interface = types.SimpleNamespace(flash_attn_with_kvcache=self.with_kvcache)
        self.flashinfer = types.SimpleNamespace(
            single_decode_with_kv_cache=self.single, BatchDecodeWithPagedKVCacheWrapper=Wrapper
        )

    def found(self, module: str):
        return getattr(self, module, None)

    @staticmethod
    def with_kvcache(q, k, v):
        out = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        return out.transpose(1, 2).contiguous(), "lse"

    @staticmethod
    def single(q, k, v, kv_layout, use_tensor_cores):
        assert kv_layout == "HND" and q.dim() == 2
        return sdpa(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]


class Wrapper:
    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert workspace.numel() == dense_packages.WORKSPACE and not workspace.any() and kv_layout == "HND"

    def plan(self, indptr, indices, last, heads, kv, dim, page, q_data_type, kv_data_type):
        self.starts, self.indices, self.page = indptr.tolist(), indices.long(), page
        assert last.tolist() == [page] * (len(indptr) - 1) and q_data_type == kv_data_type == torch.bfloat16

    def run(self, q, cache):
        out = []
        for i, (a, b) in enumerate(itertools.pairwise(self.starts)):
            k, v = (x[self.indices[a:b]].transpose(0, 1).flatten(1, 2)[None] for x in cache)
            out.append(sdpa(q[i][None, :, None], k, v, enable_gqa=True)[0, :, 0])
        return torch.stack(out)


@pytest.fixture
def packages(monkeypatch):
    there = Packages()
    monkeypatch.setattr(dense_packages, "found", there.found)
    monkeypatch.setattr(dense_packages, "WORKSPACE", 1 << 10)
    monkeypatch.setattr(dense_packages, "version", lambda package: "1.2")
    monkeypatch.setattr(dense_decoding, "BACKENDS", {})
    monkeypatch.setattr(dense_decoding, "split_k", lambda q, k, v, splits: sdpa(q, k, v, enable_gqa=True))
    return there


def qkv(batch: int):
    return heads.drawn("independent", (batch, 4, 2, 64, 32), torch.Generator().manual_seed(5))


def test_steps_of_packages_are_compared_and_carry_their_version(packages):
    names = {batch: [x for x in dense_decoding.variants(*qkv(batch)) if "split-K" not in x] for batch in (1, 2)}
    batched = [f"FlashInfer 1.2, batch, {by} cores" for by in ("tensor", "CUDA")]
    assert names[2] == ["FlashAttention-3 (flash_attn_3 1.2)", *batched]
    assert set(names[1]) == {*names[2], *(f"FlashInfer 1.2, single, {by} cores" for by in ("tensor", "CUDA"))}


def test_a_package_that_fails_or_is_wrong_is_left_out_and_said(packages, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel image\nat all")

    packages.flash_attn_interface.flash_attn_with_kvcache = lambda q, k, v: torch.zeros_like(q)
    packages.flashinfer.single_decode_with_kv_cache = fail
    packages.flashinfer.BatchDecodeWithPagedKVCacheWrapper = fail
    assert [x for x in dense_decoding.variants(*qkv(1)) if "split-K" not in x] == []
    said = capsys.readouterr().out
    assert "FlashAttention-3 (flash_attn_3 1.2): is not timed, as it is off by 1 of the largest" in said
    for name in ("single, tensor", "batch, CUDA"):
        assert f"FlashInfer 1.2, {name} cores: does not run here (no kernel image)" in said
    # A step of ours that is wrong is no machine's fault.
    dense_decoding.split_k = lambda q, k, v, splits: torch.zeros_like(q)
    with pytest.raises(AssertionError, match="Triton split-K, 16: off by 1 of"):
        dense_decoding.variants(*qkv(1))


def test_what_cannot_be_captured_is_left_out_and_something_has_to_be_left(capsys):
    def capture(f):
        return f()

    def fail():
        raise RuntimeError("not permitted when stream is capturing")

    assert dense_decoding.captured({"a": lambda: 1, "b": fail}, capture) == {"a": 1}
    assert "b: cannot be captured (not permitted" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="nothing to compare with"):
        dense_decoding.captured({"b": fail}, capture)


def test_packages_that_are_not_there_or_broken_are_no_error(monkeypatch, capsys):
    monkeypatch.setattr(
        dense_packages.importlib, "import_module", lambda name: (_ for _ in ()).throw(OSError("libcudart"))
    )
    assert list(dense_packages.steps(*qkv(1))) == []
    assert "flashinfer: cannot be imported (libcudart)" in capsys.readouterr().out
    monkeypatch.undo()
    assert dense_packages.found("no_such_module_here") is None and dense_packages.version("no-such") == "unknown"
    assert dense_packages.first_line(ValueError()) == "ValueError"


def test_real_keys_are_counted_by_the_step_that_runs(monkeypatch):
    from qaxis.decode.triton_step import TritonStep
    from selfcheck.checks import survivors

    class Counting:
        """A step that runs on one layer of two, and rescores 14 keys of the first head and 28 of the second."""

        def __init__(self, *made_for):
            self.plain, self.runs = TritonStep(*made_for), 0

        def cuda_step(self, *_):
            self.runs += 1
            return self if self.runs <= 2 else None

        def __call__(self, *args):
            step = self.plain(*args)
            return types.SimpleNamespace(
                output=step.output, indices=step.indices, rescored=torch.tensor([[[10, 4], [20, 8]]])
            )

    monkeypatch.setattr(survivors.doors, "STEPS", {"Triton": TritonStep, "CUDA": Counting})
    captured = [(i, *heads.drawn("independent", (1, 2, 1, 140, 64), torch.Generator().manual_seed(i))) for i in (1, 2)]
    captured = [(i, q.expand(1, 2, 140, 64), k, v) for i, q, k, v in captured]
    found = survivors._Found()
    row = found.row(captured, 140, longest=False)
    assert found.wrong == 0 and found.by_cuda == 4 and row["codes"] > 20
    triton = [float(x) for x in ran_by_triton(captured)]
    assert row["codes_step"] == pytest.approx(100 * (14 + 28 + sum(triton)) / 4 / 140, rel=1e-4)
    assert row["codes_step"] != pytest.approx(row["codes"]) and row["codes_step_p95"] > row["codes_step"]


def ran_by_triton(captured):
    """Keys that the Triton step rescored of the second layer, a head each, behind codes."""
    import qaxis
    from qaxis.decode.triton_step import TritonStep

    _, q, k, v = captured[1]
    step = TritonStep(1, 2, 140, 64, qaxis.Budget().k_eff(140), "cpu")
    _, (_, keys, values, index), *_ = ways(k, v)
    return step(q[:, :, -1:].contiguous(), keys, values, index).rescored.sum(-1).flatten()
