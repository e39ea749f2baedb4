"""How long ``qaxis.topk`` takes, beside other ways to take the k best of the same scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from ..harness.timing import WRITTEN, bandwidth, capture, microseconds, ratio
from ..inputs.score_rows import bits, stable, tied_rows
from ..rivals import selecting

#: rows, scores of a row, how many are kept
SHAPES = ((32, 131072, 2048), (1024, 131072, 2048), (64, 8192, 512), (1, 1048576, 2048))
KINDS = ("normal", "tied")
#: a position and a value, written once
RESULT = 12


@torch.inference_mode()
def selection(context: Context) -> Result:
    """Replays of CUDA graphs in random order, L2 overwritten before each; results are the stable sort's while timed."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    # Fewer than six have no interval of 95 %.
    repeats = 11 if context.quick else 41
    speed = bandwidth(repeats)
    found: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for rows, n, k in context.progress(SHAPES[::2] if context.quick else SHAPES, "shapes"):
        for kind in KINDS:
            timed, left_out = _timed(rows, n, k, kind, repeats, speed, context.seed, context.device)
            found += timed
            missing += [{"rows": rows, "n": n, "kind": kind, "way": x, "said": said} for x, said in left_out.items()]
    ours = [row for row in found if row["way"].startswith("qaxis")]
    wrong, compared = sum(row["wrong"] for row in ours), sum(row["rows"] for row in ours)
    widest = max((row["high"] - row["low"]) / (2 * row["took"]) for row in ours)
    return Result(
        passed=wrong == 0,
        verdict=f"measured, {wrong} rows differ from the stable sort",
        headline="; ".join(
            f"{row['rows']} x {row['n']} {row['kind']} {row['took']:.0f} us" for row in ours if row["way"] == "qaxis"
        ),
        values={
            "repeats": value(repeats, "replays"),
            "bandwidth": value(speed / 1e12, "TB/s"),
            "wrong": value(wrong, "rows", n=compared),
            "widest": value(100 * widest, "%"),
            **_values(found, repeats),
        },
        cases=len(found),
        data={"rows": found, "left_out": missing},
    )


def _values(found: Sequence[dict[str, Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Microseconds of ours, and what torch takes of that; rivals that not every machine has are in the data."""
    values: dict[str, dict[str, Any]] = {}
    names = {"qaxis": "", "qaxis by rank": "_rank"}
    ratios = {"torch.topk": "_torch", "torch.topk unsorted": "_unsorted", "torch.sort stable": "_sort"}
    for row in found:
        name = f"r{row['rows']}_n{row['n']}_k{row['k']}_{row['kind']}"
        if row["way"] in names:
            took = {"low": row["low"], "high": row["high"]}
            values[f"{name}{names[row['way']]}_us"] = value(row["took"], "us", n=repeats, **took)
        if row["way"] in ratios:
            times = {"low": row["ratio_low"], "high": row["ratio_high"]}
            values[f"{name}{ratios[row['way']]}"] = value(row["ratio"], "x qaxis", n=repeats, **times)
    return values


def _timed(
    rows: int, n: int, k: int, kind: str, repeats: int, speed: float, seed: int, device: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every way on the same scores, checked, judged and timed together; and why others were left out."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "tied":
        scores = tied_rows(rows, n, k, device)
    else:
        scores = torch.randn(rows, n, device=device, generator=generator)
    right = stable(scores)[:, :k].contiguous()
    ways, left_out = selecting.ways(scores, k)
    graphs: dict[str, Any] = {}
    #: what each call gave, of which the last was captured
    kept: dict[str, list[torch.Tensor]] = {}
    for name, way in ways.items():
        try:
            kept[name] = []
            graphs[name] = capture(partial(_keep, kept[name], way, scores))
        except Exception as error:
            # What waits for the host cannot be timed like the others.
            left_out[name] = selecting.why(error)
    times = microseconds(graphs, repeats, f"{rows} x {n}, {kind}", seed=seed)[WRITTEN]
    shape = {"rows": rows, "n": n, "k": k, "kind": kind, "floor": 1e6 * rows * (4 * n + RESULT * k) / speed}
    found: list[dict[str, Any]] = [
        {
            **shape,
            "way": name,
            **_median(t),
            **_ratio(t, times["qaxis"]),
            "judged": selecting.judged(ways[name], scores, right),
        }
        for name, t in times.items()
    ]
    for row in found:
        if row["way"].startswith("qaxis"):
            order = "rank" if row["way"].endswith("rank") else "position"
            # Of one more call, and of the last replay.
            row["wrong"] = _wrong(scores, k, right, order) + _others(kept[row["way"]][-1], right, order)
    del graphs
    torch.cuda.empty_cache()
    return found, left_out


def _wrong(scores: torch.Tensor, k: int, right: torch.Tensor, order: str) -> int:
    """Rows with another position or bit than the stable sort's."""
    got, expected = qaxis.topk(scores, k, order=order, nan="last"), right if order == "rank" else right.sort(-1).values
    same = (got.indices == expected) & (bits(got.values) == bits(scores.gather(-1, expected)))
    return int((~same.all(-1)).sum())


def _others(indices: torch.Tensor, right: torch.Tensor, order: str) -> int:
    """Rows of other positions than the stable sort's."""
    return int((indices != (right if order == "rank" else right.sort(-1).values)).any(-1).sum())


def _keep(kept: list[torch.Tensor], way: Any, scores: torch.Tensor) -> None:
    kept.append(way(scores))


def _median(times: Sequence[float]) -> dict[str, float]:
    """Of microseconds, with an interval of 95 % that assumes no distribution."""
    low, high = _interval(times)
    return {"took": statistics.median(times), "low": low, "high": high}


def _ratio(times: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long as ours."""
    over = ratio(times, ours)
    return {"ratio": over.value, "ratio_low": over.low, "ratio_high": over.high}


def _interval(numbers: Sequence[float]) -> tuple[float, float]:
    """95 % of the median, by ranks."""
    found = stats.quantile_test(np.asarray(numbers), q=statistics.median(numbers), p=0.5).confidence_interval(0.95)
    return float(found.low), float(found.high)
