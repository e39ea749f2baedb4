"""What the user sees while claims run: one line a claim on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Claim = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 150)
#: seconds between two plain lines about one claim
SELDOM = 15.0
#: first and last lines of a library's output that are shown under a claim
NOTES = 6


class Lines:
    """Progress of the claims of one run. Use as a context manager.

    Args:
        total: claims of the run.
    """

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.tasks: dict[str, TaskID] = {}
        self.labels: dict[str, tuple[str, float, float]] = {}
        columns = (TextColumn("    {task.fields[claim]}"), BarColumn(30), TextColumn("{task.fields[label]}"))
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=False,
                             disable=not console.is_terminal)  # fmt: skip

    def __enter__(self) -> Lines:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, claim: Claim) -> None:
        self.count += 1
        console.print(f"[{self.count}/{self.total}] {claim['id']}: {claim['statement']} ...", markup=False)
        self.tasks[claim["id"]] = self.bars.add_task("", total=None, claim=claim["id"], label="")
        self.labels[claim["id"]] = ("", time.monotonic(), time.monotonic())

    def progress(self, claim: Claim, label: str, done: int, of: int) -> None:
        self.bars.update(self.tasks[claim["id"]], completed=done, total=of, label=f"{label} {done}/{of}")
        _, began, shown = self.labels[claim["id"]]
        self.labels[claim["id"]] = (f"{label} {done}/{of}", began, shown)

    def tick(self) -> None:
        """Now and then say in plain lines how far the claims are, where no bar can."""
        if console.is_terminal:
            return
        now = time.monotonic()
        for name, (label, began, shown) in self.labels.items():
            if now - shown > SELDOM:
                console.print(f"    {name}: {label or 'at work'}, {now - began:.0f} s", markup=False)
                self.labels[name] = (label, began, now)

    def finished(self, claim: Claim, record: dict[str, Any] | None, why_not: str, notes: str) -> None:
        self.bars.remove_task(self.tasks.pop(claim["id"]))
        self.labels.pop(claim["id"])
        if record is None:
            console.print(f"    {claim['id']}: not run: {why_not}", markup=False)
        else:
            mark = "ok" if record["passed"] else f"FAILED ({record['verdict']})"
            line = f"    {claim['id']} {mark}: {record['headline']}  ({record['seconds']:.0f} s)"
            console.print(line, markup=False)
        shown = list(dict.fromkeys(line.rstrip() for line in notes.splitlines() if line.strip()))
        if len(shown) > 2 * NOTES:
            shown[NOTES:-NOTES] = [f"... {len(shown) - 2 * NOTES} more lines ..."]
        for line in shown:
            console.print(f"      | {line}", markup=False, style="dim", highlight=False)
