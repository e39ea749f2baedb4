"""What ``benchmarks.completion`` measures, by part; ways by name and the bytes that they read are in the self-check."""

from __future__ import annotations

import re

from qaxis.validation import require
from selfcheck.rivals.bytes_read import DENSE, Plan
from selfcheck.rivals.choosing_keys import AUTHORED
from selfcheck.rivals.standing_in import EVERY

MAIN = (("coverage", 0.1), ("coverage", 0.05), ("coverage", 0.02), ("k", 256))
TOLERANCES = (0.2, 0.1, 0.05, 0.02)
#: what is read sparsely; the question always is
MODES = ("decode", "both")


def parts() -> dict[str, list[Plan]]:
    """What each part measures beside dense attention; a plan may be in several."""
    rivals = [Plan(b, c) for b in MAIN[:3] for c in ("none", "linear")]
    for name in AUTHORED:
        for budget in MAIN[:3]:
            same = ("bytes", budget[1])
            rivals += [Plan(budget, "none", name), Plan(budget, "linear", name)]
            rivals += [Plan(same, "none", name), Plan(same, "own mass", name)]
            rivals += [Plan(b, "SparQ", name) for b in (budget, same) if name == "SparQ"]
    return {
        "table": [Plan(b, c) for b in MAIN for c in EVERY],
        "curve": [
            Plan(b, c)
            for b in [*(("k", x) for x in (32, 64, 128, 256, 512, 1024)),
                      *(("coverage", x) for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5))]
            for c in ("none", "mean", "linear")
        ],
        "rivals": rivals,
        "int8": [Plan(("all", 0), stored=True), *(Plan(b, c, stored=True) for b in MAIN for c in ("none", "linear"))],
        "tolerance": [
            Plan((what, t), c) for t in TOLERANCES for c in ("none", "linear") for what in ("tolerance", "like")
        ],
        "tasks": [],
    }  # fmt: skip


def plans_of(chosen: list[str], only: str) -> list[Plan]:
    """The plans of those parts whose names match; dense attention first, as everything is compared with it."""
    known = parts()
    for part in chosen:
        require(part in known, "--parts", part, f"some of {', '.join(known)}")
    every = dict.fromkeys(plan for part in chosen for plan in known[part] if re.search(only, plan.name))
    return [DENSE, *every] if every else []


def bounds(length: int) -> list[int]:
    """Numbers of first tokens whose sums are kept: powers of two from 512 on, and all."""
    return [*(1 << e for e in range(9, length.bit_length()) if 1 << e < length), length]
