"""Results of the claims about speed, and of the curve, of times and costs that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np

import qaxis
from selfcheck.checks import completion_curve, completion_speed, speed
from selfcheck.harness.claim import Result, value
from selfcheck.harness.timing import CLEAN, WRITTEN

#: medians by what is in the cache before; steps are faster where nothing has to be written back
TOOK = {
    "dense/cuDNN": (200.0, 180.0), "dense/Triton": (210.0, 170.0),
    "coded/15": (130.0, 110.0), "coded/31": (120.0, 115.0),
    "keys/all": (140.0, 120.0), "codes/all": (100.0, 80.0), "cache/all": (100.0, 100.0),
}  # fmt: skip
STAGES = {"score": 60.0, "cut": 5.0, "compact": 5.0, "rescore": 10.0, "choose": 10.0, "attend": 10.0}


def rounds(middle: float, repeats: int, seed: int) -> list[float]:
    """Times whose median is ``middle``, spread by a few per cent."""
    away = np.random.default_rng(seed).normal(0, 0.02, repeats)
    return [float(x) for x in middle * (1 + away - np.median(away))]


def found(shape: speed.Shape, kind: str, repeats: int = 41) -> speed.Found:
    """Ways whose stages are those of choose.cu, but for that of keys, which Triton ran."""
    own = kind == speed.INDEPENDENT
    took: dict[str, tuple[float, ...]] = dict(TOOK)
    if own:
        took |= {f"{way}/triton": (150.0, 140.0) for way in ("codes", "cache")} | {
            "peer/Quest-style, pages of 16": (500.0, 490.0)
        }
        took |= {f"keys/{stage}": (t,) for stage, t in STAGES.items()}
    times = {
        flush: {name: rounds(t[i], repeats, 7 * i + j) for j, (name, t) in enumerate(took.items()) if len(t) > i}
        for i, flush in enumerate((WRITTEN, CLEAN))
    }
    inside = {stage: t for stage, t in STAGES.items() if stage != "score"} if own else {}
    ways = [speed.Way(way, 2100.4, 1e8, True, inside if way != "keys" else {}) for way in ("keys", "codes", "cache")]
    return speed.Found(
        shape, kind, times, ways, [{"name": "Quest-style, pages of 16", "recall": 0.5, "share": 0.125}] if own else []
    )


def decode() -> Result:
    plan = speed.planned(quick=False)
    every = [found(shape, kind) for shape, kind in plan]
    for later in every[1:]:
        later.peers = []
    return speed.result(every, 3e12, 41)


#: how many times as long a step with completion takes, by what was in the cache before
COMPLETED = {"codes": {"mean": (1.05, 1.1), "linear": (1.1, 1.2)}, "keys": {"mean": (1.0, 1.0), "linear": (1.05, 1.1)}}


def completed(repeats: int = 41, wrong: str = "") -> Result:
    """Steps that take longer by the same factor in every round, however long the round's take; ``wrong`` of one."""
    every = []
    for shape in completion_speed.SHAPES:
        times: dict[str, dict[str, list[float]]] = {}
        for i, flush in enumerate((WRITTEN, CLEAN)):
            times[flush] = {f"dense/{x}": rounds(TOOK[f"dense/{x}"][i], repeats, i) for x in ("cuDNN", "Triton")}
            for way, factors in COMPLETED.items():
                base = rounds((100.0, 80.0)[i], repeats, 3)
                slow = [t * (1 + 0.5 * (r % 2)) * (0.8 if r % 2 == 0 else 1) for r, t in enumerate(base)]
                middle = float(np.median(slow))
                slow = [t * (100.0, 80.0)[i] / middle for t in slow]
                for kind, factor in {"none": (1.0, 1.0), **factors}.items():
                    times[flush][f"{way}/{kind}"] = [t * factor[i] for t in slow]
        here = [wrong] if wrong and shape[1] == 8192 else []
        every.append(completion_speed.Found(shape, times, here))
    return completion_speed.result(every, repeats)


def prefill() -> Result:
    took = {"flash": 2.0, "cudnn": 1.0, "tenth": 4.0, "fixed": 5.0}
    return speed.prefilled(
        [
            speed.Prefill(n, {name: rounds(1000 * t, repeats, i) for i, (name, t) in enumerate(took.items())}, 8192, 0)
            for n, repeats in speed.PREFILLS
        ],
        {"select": 1.0},
    )


def curve() -> dict[str, Any]:
    """Every way at some cost: values and rows as a run would write them."""
    shape, rows = completion_curve.Shape(9, 3, 64, 64), []
    values = {x: value(y, "") for x, y in (("texts", 6), ("tokens", 8192), ("dense_bytes", 1048704))}
    for i, plan in enumerate(completion_curve.plans()):
        change = qaxis.PerplexityChange(0.3 * i - 0.05, 0.3 * i - 0.1, 0.3 * i + 0.2, 10, 10, 6, 6 * 8191)
        kept = completion_curve._kept(plan, shape, 8192, [100.0 + i] if plan.budget[0] == "tolerance" else [])
        rows.append(completion_curve.row(plan, shape, 8192, kept, change))
        name = completion_curve.name_of(plan)
        values |= {name: completion_curve.as_value(change), f"{name}_share": value(rows[-1]["share"], "")}
    return {"values": values, "data": {"rows": rows}}


def records() -> dict[str, dict[str, Any]]:
    """Of the claims what a record has of a result."""
    found = {
        name: {"values": x.values, "data": x.data}
        for name, x in (("certified-speed", decode()), ("prefill-speed", prefill()), ("completion-speed", completed()))
    }
    return {**found, "completion-curve": curve()}
