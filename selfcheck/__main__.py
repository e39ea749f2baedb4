"""Command line: ``python -m selfcheck [run|seal]``; nox calls it."""

from __future__ import annotations

import _thread
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .harness import evidence, seal
from .harness.files import ROOT, SelfcheckError

console = Console(width=None if sys.stdout.isatty() else 150)


def _progress(items: Iterable[Any], label: str) -> Iterator[Any]:
    yield from tqdm(
        list(items), desc=f"    {label}", file=sys.stdout, leave=False, mininterval=0.5 if sys.stdout.isatty() else 15
    )


def _table(records: list[dict[str, Any]], elsewhere: list[tuple[dict[str, Any], str]]) -> Table:
    published = {claim["id"]: claim["published"] for claim in seal.claims()}
    table = Table(box=box.SIMPLE_HEAD, title="Claims", title_justify="left")
    for name in ("id", "statement", "published", "measured", "status", "s"):
        table.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    for r in records:
        status = r["status"] if r["passed"] else "FAILED: " + r["verdict"]
        table.add_row(
            r["claim"], r["statement"], published[r["claim"]], r["headline"], status, f"{r['seconds']:.0f}",
            style=None if r["passed"] else "bold red",
        )  # fmt: skip
    for r, status in elsewhere:
        table.add_row(r["id"], r["statement"], r["published"], r.get("headline", "-"), status, "", style="dim")
    for r in seal.reported():
        table.add_row(r["id"], r["statement"], r["published"], "-", "reported", "")
    return table


def _elsewhere(claims: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Claims that were not run now: what the committed evidence says of them, if it is fresh."""
    rows = []
    for claim in claims:
        record = None
        for name in (evidence.GPU, evidence.DEFAULT):
            try:
                record = record or evidence.load(ROOT / name).get(claim["id"])
            except SelfcheckError:
                continue
        if record is None:
            rows.append((claim, "NOT RUN"))
        elif record["depends"] != seal.digests_of(claim):
            rows.append((claim, "NOT RUN; evidence stale"))
        else:
            status = "committed evidence" if record["passed"] else "committed evidence: FAILED"
            rows.append(({**claim, "headline": record["headline"]}, f"{status}, {record['device']}"))
    return rows


@click.group()
def main() -> None:
    """The sealed self-check of qaxis."""


@main.command("seal")
def seal_command() -> None:
    """Write selfcheck/checks.lock over the files as they are now."""
    console.print(f"sealed {seal.seal()} files in {seal.LOCK}")


@main.command("golden")
def golden_command() -> None:
    """Compute selfcheck/golden.json with the CPU reference; only for a new version of the arithmetic."""
    import json

    from .checks.golden import GOLDEN, make_golden
    from .harness.files import write_atomic

    write_atomic(GOLDEN, (json.dumps(make_golden(), indent=1, sort_keys=True) + "\n").encode())
    console.print(f"wrote {GOLDEN.relative_to(ROOT)}; seal it with `nox -s seal`")


@main.command()
@click.option("--quick", is_flag=True, help="A smaller run for a change in hand; the paper never accepts it.")
@click.option("--only", multiple=True, metavar="CLAIM", help="Run this claim only; may be repeated.")
@click.option("--model", metavar="NAME_OR_PATH", help="Another causal language model.")
@click.option(
    "--corpus", metavar="NAME_OR_PATH", help="Other texts: .bz2 dump, .txt, .json, .parquet, or a dataset name."
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
def run(quick: bool, only: tuple[str, ...], model: str | None, corpus: str | None, device: str) -> None:
    """Verify the lock, run the checks, write evidence."""
    seal.verify()
    claims = seal.claims()
    ids = [claim["id"] for claim in claims]
    for name in only:
        if name not in ids:
            raise SelfcheckError(f"--only={name!r}: allowed is one of {', '.join(ids)}")
    console.print("seal intact; importing torch and transformers ...")
    import torch

    from .harness.claim import Context, NotRunError
    from .harness.run import destination, gpu_destination, merge, run_claim

    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise SelfcheckError(f"--device={device!r}: allowed is cpu, or cuda where torch sees a GPU")
    context = Context(quick=quick, device=device, model_name=model, corpus_name=corpus, progress=_progress)
    on_gpu = {claim["id"] for claim in claims if claim.get("where") == "gpu"}
    wanted = [c for c in claims if c["id"] in (only or ids) and (only or device != "cpu" or c["id"] not in on_gpu)]
    started, records, not_run = time.perf_counter(), [], []
    for i, claim in enumerate(wanted, 1):
        console.print(f"[{i}/{len(wanted)}] {claim['id']}: {claim['statement']} ...", markup=False)
        try:
            record = run_claim(claim, context)
        except NotRunError as error:
            console.print(f"    not run: {error}", markup=False)
            not_run.append(claim["id"])
            continue
        records.append(record)
        mark = "ok" if record["passed"] else f"FAILED ({record['verdict']})"
        console.print(f"    {mark}: {record['headline']}  ({record['seconds']:.0f} s)", markup=False)
    if not records:
        raise SelfcheckError(f"not run: {', '.join(not_run)}; the reason is above")
    gpu_path = gpu_destination(context)
    made_on_gpu = [r for r in records if gpu_path and r["claim"] in on_gpu]
    others = [r for r in records if r not in made_on_gpu]
    written = []
    for path, made in ((destination(context, only), others), (gpu_path, made_on_gpu)):
        if path and made:
            root = evidence.write(path, merge(path, made, ids))
            written.append(f"evidence {path.relative_to(ROOT)}, root {root}")
    made_here = {r["claim"] for r in records}
    missing = [c for c in claims if c["id"] not in made_here and (not only or c["id"] in only)]
    console.print(_table(records, _elsewhere(missing)))
    console.print(
        f"{len(records)} claims, {sum(len(r['checks']) for r in records)} parametrised checks in "
        f"{time.perf_counter() - started:.0f} s\n" + "\n".join(written)
    )
    failed = [r["claim"] for r in records if not r["passed"]]
    if failed:
        raise SelfcheckError(f"failed: {', '.join(failed)}")


def hear_every_interrupt() -> None:
    """Raise a KeyboardInterrupt again that Python had to drop.

    One that arrives inside a ``__del__`` or a callback of the garbage collector (Hypothesis has one) cannot leave it:
    Python reports it as unraisable and goes on. A moment later it can be raised where the work is.
    """

    def interrupt_again() -> None:
        time.sleep(0.01)
        _thread.interrupt_main()

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Not a threading.Thread: the collector may have stopped the work inside one of its locks.
            _thread.start_new_thread(interrupt_again, ())
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


if __name__ == "__main__":
    hear_every_interrupt()
    try:
        main(standalone_mode=False)
    except SelfcheckError as error:
        sys.exit(f"selfcheck: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit("selfcheck: interrupted; the evidence is as it was before")
