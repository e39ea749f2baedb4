"""The claim of perplexity against bytes, and its figure: every way is run, paired and priced by its formula."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import figures.completion
import qaxis
from paper import numbers
from selfcheck.checks import completion_curve
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.rivals.bytes_read import Shape

from . import speeds

N = 300
SHAPE = Shape(9, 3, 64, 64)


@pytest.fixture(scope="module")
def texts():
    return [torch.randint(3, 97, (1, N), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


@pytest.fixture
def sharp(llama):
    """A model whose keys matter: one with random weights attends to all alike."""
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.v_proj.weight.mul_(10)
        llama.get_output_embeddings().weight.mul_(10)
    return llama


def test_every_way_has_a_name_and_a_run_is_short():
    every = completion_curve.plans()
    names = [completion_curve.name_of(plan) for plan in every]
    assert len(set(names)) == len({plan.name for plan in every}) == len(every) == 56
    assert {"c10_linear", "int8_c02_linear", "t02_linear", "double_sparsity_equal_linear", "sparq_c05_own"} < {*names}
    assert {"int8_dense", "int8_sparq_equal_own", "loki_by_groups_equal_none"} < {*names}


def test_every_way_is_measured_and_priced(sharp, texts):
    result = completion_curve.measured(sharp, texts, Context())
    rows = {row["way"]: row for row in result.data["rows"]}
    assert len(rows) == 56 and result.cases == 114 and len(result.checks) == 57
    assert all(row["low"] <= row["change"] <= row["high"] for row in rows.values())
    # Dense numbers of two bytes, 2 KV heads of 16 + 16 numbers, at 150.5 keys on average.
    assert result.values["dense_bytes"]["value"] == round(150.5 * 32 * 2)
    for row in rows.values():
        assert row["share"] == pytest.approx(row["bytes"] / (150.5 * 32 * 2))
        assert result.values[row["way"] + "_share"]["value"] == row["share"]
    line = 4 * 32 * 17
    assert rows["c10_linear"]["bytes"] == pytest.approx(rows["c10_none"]["bytes"] + line)
    k = qaxis.Budget(0.05, 64).table(N)[1:].double().mean().item()
    assert rows["quest_c05_none"]["kept"] == rows["c05_none"]["kept"] == pytest.approx(k)
    # Three heads of a group read 32 numbers of each kept key, and an eighth of all keys is scanned.
    assert rows["quest_c05_none"]["bytes"] == pytest.approx(150.5 * 16 * 2 / 8 + 3 * k * 32 * 2)
    # Heads of a group that share their keys read them once, and a quarter of all keys is scanned.
    assert rows["sparq_c05_none"]["bytes"] == pytest.approx(150.5 * 16 * 2 / 4 + k * 32 * 2)
    for name, row in rows.items():
        if "_equal_" in name:
            assert row["share"] <= rows["int8_c10_linear" if row["stored"] else "c10_linear"]["share"]
        assert row["stored"] == name.startswith("int8")
    assert rows["int8_dense"]["bytes"] == pytest.approx(150.5 * 32 * (1 + 1 / 128)) and rows["int8_dense"]["change"]
    assert 1 <= rows["t10_linear"]["kept"] < rows["t02_linear"]["kept"] < 150
    # Up to 320 keys every coverage keeps the same 64.
    apart = {(row["selection"], row["completion"], row["stored"], row["kept"]) for row in rows.values()}
    assert len({row["change"] for row in rows.values()}) == len(apart) == 40


def test_what_it_measures_of_exact_keys_is_what_the_package_costs(sharp, texts):
    result = completion_curve.measured(sharp, texts, Context())
    dense = [qaxis.token_losses(sharp, ids) for ids in texts]
    for name, budget, completion in (
        ("c10_none", qaxis.Budget(0.1, 64), "none"), ("c05_linear", qaxis.Budget(0.05, 64), "linear"),
        ("c05_mean", qaxis.Budget(0.05, 64), "mean"), ("t10_linear", qaxis.Budget(0, 1, 0.1), "linear"),
    ):  # fmt: skip
        with qaxis.sparse(sharp, budget, exactness="selection", completion=completion):
            right = qaxis.paired_change(dense, [qaxis.token_losses(sharp, ids) for ids in texts])
        assert result.values[name]["value"] == pytest.approx(right.percent, abs=2e-3)
        assert abs(right.percent) > 0.01


def test_a_cost_that_the_line_does_not_lower_is_said():
    def change(percent):
        return qaxis.PerplexityChange(percent, percent - 1, percent + 1, 10, 10, 2, 20)

    changes = {"c05_none": change(3.0), "c05_linear": change(1.0), "c20_none": change(0.5)}
    assert completion_curve._worse(changes) == []
    assert completion_curve._worse({**changes, "c05_linear": change(3.0)})[0].startswith("coverage 0.05: +3.000 %")
    assert completion_curve._worse({"c20_none": change(-0.1)})[0].startswith(
        "coverage 0.2: top-k attention costs nothing"
    )


def test_the_curve_needs_a_gpu():
    with pytest.raises(NotRunError, match="needs a GPU"):
        completion_curve.curve(Context())


@pytest.fixture
def record():
    """Every way at some cost: as a run would write it."""
    return {"completion-curve": speeds.curve()}


def test_every_way_is_a_point_of_the_figure_with_its_interval(record):
    figure = figures.completion.draw(record)
    left, right = figure.axes
    assert [len(axis.containers) for axis in figure.axes] == [13, 17]
    found = {}
    for axis in (left, right):
        for line, _, (bars,) in (container.lines for container in axis.containers):
            assert bool((np.diff(line.get_xdata()) >= 0).all())
            for (x, y), bar in zip(line.get_xydata(), bars.get_segments(), strict=True):
                found[x, y] = (axis, bar[0, 1], bar[1, 1])
    for row in record["completion-curve"]["data"]["rows"]:
        axis, low, high = found.pop((row["share"], row["change"]))
        assert axis is (left if row["completion"] == "none" else right)
        assert (low, high) == pytest.approx((row["low"], row["high"]))
    assert not found
    # A line of the legend for every way, whatever is drawn of it; colour, line and mark tell ways apart, white 8 bits.
    (legend,) = figure.legends
    marks = [(x.get_color(), x.get_linestyle(), x.get_marker()) for x in legend.get_lines()]
    assert len(set(marks)) == len(marks) == 12 and legend.get_texts()[-1].get_text() == "dense; white: 8 bits"
    white = [
        c.lines[0] for axis in (left, right) for c in axis.containers if c.lines[0].get_markerfacecolor() == "white"
    ]
    assert sum(len(x.get_xdata()) for x in white) == sum(
        r["stored"] for r in record["completion-curve"]["data"]["rows"]
    )
    plt.close(figure)


def test_the_table_has_a_line_a_way_at_every_budget(record):
    lines = numbers._curve(record)
    assert len(lines) == 17 and all(line.count("&") == 7 for line in lines)
    (mean,) = (line for line in lines if line.startswith("exact & mean & "))
    assert mean.startswith(r"exact & mean & 0.58 & +1.45 [+1.40, +1.70] & 412 & 0.65 & +1.75")
    assert {line.split("&")[5].strip() for line in lines if not line.startswith("exact")} == {"0.68"}
    (shared,) = (line for line in lines if line.startswith("Loki by groups & --"))
    assert [bool(cell.strip()) for cell in shared.split("&")] == [True] * 2 + [False] * 2 + [True] * 3 + [False]
    (own,) = (line for line in lines if line.startswith("SparQ & its own"))
    assert own.split("&")[4].strip() == r"2\,279" and own.split("&")[7].startswith(" +16.")
