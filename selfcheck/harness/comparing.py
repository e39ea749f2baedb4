"""Another party's evidence beside the committed one, claim by claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .content import claim_of, content
from .files import ROOT
from .records import Record, card
from .states import State, judge

#: what a comparison may find
WORDS = ("identical", "agrees", "differs", "not run")
#: how far a value without an interval may lie from the committed one, as a share of it and at least: last bits of a
#: forward pass move a perplexity or an entropy by far less, another text or model by far more
RELATIVE, ABSOLUTE = 0.01, 0.01
#: differences that are named
NAMED = 4


@dataclass
class Row:
    """What one claim's records say of one another."""

    name: str
    repeats: str
    word: str
    why: str = ""


def compare(theirs: list[Record], ours: list[Record], root: Path = ROOT) -> list[Row]:
    """One row a record that either has, in the order of ours.

    ``identical``: equal content, and it says everything. ``agrees``: equal content, and each value lies in the
    committed interval, so that nobody agrees by claiming a wide one. ``differs``: anything else, also a record that no
    evidence could be. What only one side has was not run by the other.
    """
    of_theirs, of_ours = _by_name(theirs, root), _by_name(ours, root)
    return [_row(name, of_theirs.get(name), of_ours.get(name), root) for name in dict.fromkeys([*of_ours, *of_theirs])]


def _by_name(records: list[Record], root: Path) -> dict[str, Record]:
    return {" on ".join(filter(None, (r["claim"], card(r, claim_of(r, root))))): r for r in records}


def _row(name: str, theirs: Record | None, ours: Record | None, root: Path) -> Row:
    claim = claim_of(theirs or ours or {}, root)
    repeats = claim["repeats"]
    if theirs is None or ours is None:
        return Row(name, repeats, "not run", "" if theirs is None else "nothing committed to compare with")
    state = State(claim, "", theirs)
    judge(state, root)
    wrong = state.reasons + differences(content(theirs, root), content(ours, root))
    if not wrong and repeats == "interval":
        wrong = _outside(theirs, ours, claim)
    if wrong:
        more = [f"and {len(wrong) - NAMED} more"] if len(wrong) > NAMED else []
        return Row(name, repeats, "differs", "; ".join([*wrong[:NAMED], *more]))
    if repeats == "bits":
        return Row(name, repeats, "identical")
    return Row(name, repeats, "agrees", "times are a machine's own" if repeats == "timed" else "")


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Where two contents differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        said = []
        for key in sorted(theirs.keys() | ours.keys()):
            where = f"{path}.{key}".lstrip(".")
            if key in theirs and key in ours:
                said += differences(theirs[key], ours[key], where)
            else:
                said.append(f"{where} only {'here' if key in theirs else 'committed'}")
        return said
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [x for i, pair in enumerate(zip(theirs, ours, strict=True)) for x in differences(*pair, f"{path}.{i}")]
    # 1 and True, 1 and 1.0 are not the same content.
    if type(theirs) is type(ours) and theirs == ours:
        return []
    return [f"{path} {_short(theirs)}, committed {_short(ours)}"]


def _short(made: Any) -> str:
    return f"{len(made)} entries" if isinstance(made, (dict, list)) else repr(made)[:40]


def _outside(theirs: Record, ours: Record, claim: dict[str, Any]) -> list[str]:
    """Values that are not where the committed ones are."""
    said = []
    for name, value in ours["values"].items():
        if any(fnmatchcase(f"values.{name}.value", pattern) for pattern in claim.get("varies", [])):
            continue
        found, was, low, high = theirs["values"][name]["value"], value["value"], value["low"], value["high"]
        if low is not None and high is not None:
            if not low <= found <= high:
                said.append(f"values.{name} {found:g}, committed [{low:g}, {high:g}]")
        elif not math.isclose(found, was, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            said.append(f"values.{name} {found:g}, committed {was:g}")
    return said
