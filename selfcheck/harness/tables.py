"""The tables of the command line: what was measured, and where every claim stands."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from . import seal
from .comparing import Row
from .evidence import State, renewal

STYLES = {"fresh": "", "failed": "bold red", "stale": "yellow", "missing": "yellow"}


def measured(records: list[dict[str, Any]], found: list[State]) -> Table:
    """What this run measured; of the other claims, what their evidence says."""
    table = Table(box=box.SIMPLE_HEAD, title="Claims", title_justify="left")
    for name in ("id", "statement", "published", "measured", "status", "s"):
        table.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    made = {record["claim"]: record for record in records}
    shown = set[str]()
    for state in found:
        claim, record = state.claim, made.get(state.claim["id"])
        row = [claim["id"] if record else state.name, claim["statement"], claim["published"]]
        if record is None:
            headline = state.record["headline"] if state.record and state.word in ("fresh", "failed") else "-"
            status = {"missing": "NOT RUN", "stale": "NOT RUN; evidence stale"}.get(state.word)
            status = status or f"committed evidence{'' if state.word == 'fresh' else ': FAILED'}, {state.device}"
            table.add_row(*row, headline, status, "", style="dim")
        elif claim["id"] not in shown:
            shown.add(claim["id"])
            status = record["status"] if record["passed"] else "FAILED: " + record["verdict"]
            style = None if record["passed"] else "bold red"
            table.add_row(*row, record["headline"], status, f"{record['seconds']:.0f}", style=style)
    for r in seal.reported():
        table.add_row(r["id"], r["statement"], r["published"], "-", "reported", "")
    return table


def states(found: list[State]) -> Table:
    """Where every claim stands and what renews it."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("claim", "state", "card", "s", "why", "renewed by"):
        table.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    for state in found:
        seconds = f"{state.record['seconds']:.0f}" if state.record else ""
        card = state.device if state.on_gpu and state.record else state.card
        why = [reason.removeprefix("stale, ").removeprefix("failed: ") for reason in state.reasons]
        table.add_row(
            state.claim["id"], state.word, card, seconds, "" if state.word == "missing" else "; ".join(why),
            "" if state.word == "fresh" else renewal(state), style=STYLES[state.word],
        )  # fmt: skip
    return table


def compared(found: list[Row]) -> Table:
    """Another party's evidence beside the committed one."""
    table = Table(box=box.SIMPLE_HEAD, title="Beside the committed evidence", title_justify="left")
    for name in ("claim", "repeats", "result", "why"):
        table.add_column(name, overflow="fold")
    for row in found:
        style = {"differs": "bold red", "not run": "dim"}.get(row.word)
        table.add_row(row.name, row.repeats, row.word, escape(row.why), style=style)
    return table


def dependencies(found: list[State]) -> Table:
    """What the run of every claim depended on."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("claim")
    table.add_column("depends on", overflow="fold")
    for state in found:
        depends = sorted(state.record["depends"]) if state.record else []
        table.add_row(state.name, "\n".join(depends) or "-")
    return table
