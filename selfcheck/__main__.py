"""Command line: ``python -m selfcheck [run|evidence|compare|status|seal|golden]``; nox calls it."""

from . import isolated

if __name__ == "__main__":
    isolated.enter("selfcheck")

import _thread
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from .harness import comparing, evidence, leftovers, renew, seal, surroundings, tables, versions
from .harness.display import Lines, console
from .harness.files import ROOT, SelfcheckError, target
from .harness.jobs import Pool, cores
from .harness.keeping import Kept, check_kept
from .harness.run import Options, attested, destination, gpu_destination, targets

Claim = dict[str, Any]
#: what it means that the tree is another one after a run
CHANGED = "files changed while claims were measured; records of before are kept"
#: what this process has written, for whoever stops it
KEPT = Kept()


def _check_arguments(only: tuple[str, ...], device: str, jobs: int | None) -> None:
    ids = [claim["id"] for claim in seal.claims()]
    for name in only:
        if name not in ids:
            raise SelfcheckError(f"--only={name!r}: allowed is one of {', '.join(ids)}")
    if device != "cpu" and not device.startswith("cuda"):
        raise SelfcheckError(f"--device={device!r}: allowed is cpu, or cuda where torch sees a GPU")
    if jobs is not None and jobs < 1:
        raise SelfcheckError(f"--jobs={jobs}: allowed is a number of at least 1")


def _jobs(asked: int | None, device: str) -> int:
    """Two claims at once where there are cores for them; on a GPU one, if not asked for more."""
    return asked or (1 if device != "cpu" else min(2, cores()))


def _in_order(claims: list[Claim], states: list[evidence.State], jobs: int) -> list[Claim]:
    """Claims of one job as they stand in checks.toml; of several, the long ones first, so that they end together."""
    seconds = {state.claim["id"]: renew.expected(state) for state in states}
    return claims if jobs == 1 else sorted(claims, key=lambda c: 0 if c.get("model") else -seconds[c["id"]])


def _renewed(pool: Pool, claims: list[Claim], clock: renew.Time) -> list[dict[str, Any]]:
    """Measure claims while there is time, and keep the record of each as it comes."""
    pool.fits, pool.done = clock.fits, lambda record: KEPT.keep(record, pool.options)
    return pool.run(claims)


def _begin(options: Options, only: tuple[str, ...], jobs: int | None) -> None:
    """Refuse at once what would otherwise stop the run later, perhaps after the measurements."""
    seal.verify()
    _check_arguments(only, options.device, jobs)
    surroundings.check_writable(*targets(options))
    check_kept(options)
    surroundings.settle()
    leftovers.remove(output=options.folder)


def _elsewhere(options: Options) -> list[str]:
    """What ``--output`` means for the committed evidence, in a sentence."""
    if not options.output:
        return []
    said, option = f"the evidence in {ROOT} is as it was", f"--output {shlex.quote(options.output)}"
    if destination(options) == evidence.DEFAULT or gpu_destination(options):
        said += f"; `python -m figures {option}`, then `python -m paper {option}`, read this and write beside it"
    return [said]


def _failures(records: list[dict[str, Any]], not_run: list[str], only: tuple[str, ...]) -> None:
    """A claim that failed, or that could not run though it was asked for by name or nothing else ran, is an error."""
    failed = [r["claim"] for r in records if not r["passed"]]
    said = [f"failed: {', '.join(failed)}"] if failed else []
    if missed := [name for name in not_run if name in only or not records]:
        said.append(f"not run: {', '.join(missed)}; the reason is above")
    if said:
        raise SelfcheckError("; ".join(said))


def _folder(context: click.Context, option: click.Parameter, said: str | None) -> str | None:
    """FOLDER as a full path."""
    return None if said is None else str(surroundings.absolute(said))


def _subject(context: click.Context, option: click.Parameter, said: str | None) -> str | None:
    """A name; empty, as a variable that is not set gives, it would mean the pinned subject."""
    if said == "":
        raise SelfcheckError(f"--{option.name}='': allowed is a name or a path")
    return said


def _name(context: click.Context, option: click.Parameter, said: str | None) -> str | None:
    """NAME of whoever repeats the measurements."""
    if said is not None and not re.fullmatch("[a-z0-9-]{1,40}", said):
        raise SelfcheckError(f"--attest={said!r}: allowed are 1 to 40 of a-z, 0-9 and -")
    return said


def _wanted(options: Options, only: tuple[str, ...]) -> list[Claim]:
    """The claims of a run: named, or those of its device, where a GPU repeats a CPU's unless somebody attests."""
    if options.attest and (options.quick or options.model or options.corpus):
        raise SelfcheckError("--attest: allowed is a full run on the pinned model and corpus")
    gpu = options.device != "cpu"
    of_device = [c for c in seal.claims() if (c.get("where") == "gpu") == gpu or (gpu and not options.attest)]
    wanted = [c for c in (seal.claims() if only else of_device) if not only or c["id"] in only]
    if options.attest and (other := [c["id"] for c in wanted if c not in of_device]):
        raise SelfcheckError(f"--attest with --device={options.device!r}: {', '.join(other)} is measured elsewhere")
    return wanted


def _compared(records: list[dict[str, Any]]) -> None:
    """Print what another party's records say beside the committed ones; raises if any differs."""
    found = comparing.compare(records, evidence.committed())
    console.print(tables.compared(found))
    words = [row.word for row in found]
    console.print(", ".join(f"{words.count(word)} {word}" for word in comparing.WORDS))
    if differing := [row.name for row in found if row.word == "differs"]:
        raise SelfcheckError(f"differs from the committed evidence: {', '.join(differing)}")


def _shown(path: Path) -> str:
    """A file of the tree by its name in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


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

    from .harness.files import write_atomic

    surroundings.settle()
    from .checks.golden import GOLDEN, make_golden

    write_atomic(GOLDEN, (json.dumps(make_golden(), indent=1, sort_keys=True) + "\n").encode())
    console.print(f"wrote {GOLDEN.relative_to(ROOT)}; seal it with `nox -s seal`")


@main.command()
@click.option("--quick", is_flag=True, help="A smaller run for a change in hand; the paper never accepts it.")
@click.option("--only", multiple=True, metavar="CLAIM", help="Run this claim only; may be repeated.")
@click.option("--model", metavar="NAME_OR_PATH", callback=_subject, help="Another causal language model.")
@click.option(
    "--corpus",
    metavar="NAME_OR_PATH",
    callback=_subject,
    help="Other texts: .bz2 dump, .txt, .json, .parquet, or a dataset name.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--jobs", type=int, help="Claims measured at once on a CPU; 2 where there are two cores.")
@click.option("--attest", metavar="NAME", callback=_name, help="Write your own evidence beside ours, and compare.")
@click.option("--output", metavar="FOLDER", callback=_folder, help=surroundings.OUTPUT_HELP)
def run(only: tuple[str, ...], jobs: int | None, **asked: Any) -> None:
    """Verify the lock, run the checks, write evidence."""
    options, device = Options(**asked), asked["device"]
    _begin(options, only, jobs)
    jobs, wanted = _jobs(jobs, device), _wanted(options, only)
    started = time.perf_counter()
    console.print("seal intact; importing torch and transformers ...")
    with Lines(len(wanted)) as lines, Pool(options, jobs, lines).open() as pool:
        pool.done = lambda record: KEPT.keep(record, options)
        made = {r["claim"]: r for r in pool.run(_in_order(wanted, evidence.states(output=options.folder), jobs))}
    seal.verify(consequence=CHANGED)
    records = [made[c["id"]] for c in wanted if c["id"] in made]
    states = evidence.states(output=options.folder)
    rows = [s for s in states if s.claim["id"] in made or not only or s.claim["id"] in only]
    console.print(tables.measured(records, rows))
    console.print(
        f"{len(records)} claims, {sum(len(r['checks']) for r in records)} parametrised checks in "
        f"{time.perf_counter() - started:.0f} s\n" + "\n".join(_written(options, wanted))
    )
    if options.attest:
        _compared(evidence.read(target(attested(options.attest), output=options.folder)))
    _failures(records, pool.not_run, only)


def _written(options: Options, wanted: list[Claim]) -> list[str]:
    """Where the evidence of a run lies, in sentences."""
    said = [f"evidence {_shown(path)}, chain root {root}" for path, root in KEPT.roots.items()]
    on_gpu = [c for c in wanted if c.get("where") == "gpu" and c["id"] in KEPT.claims]
    if on_gpu and gpu_destination(options) and (apart := versions.outside_here(True)):
        said.append(f"GPU claims are kept apart from the committed evidence: {', '.join(apart)}")
    return said + _elsewhere(options)


@main.command("compare")
@click.argument("file", type=click.Path(path_type=Path))
def compare_command(file: Path) -> None:
    """Compare another party's evidence, claim by claim, with the committed evidence; 1 if any differs."""
    seal.verify()
    _compared(evidence.read(file))


@main.command("evidence")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda for the claims that need a GPU.")
@click.option("--minutes", type=float, help="Start no claim that would end later, going by its last duration.")
@click.option("--only", multiple=True, metavar="CLAIM", help="Renew this claim only; may be repeated.")
@click.option("--jobs", type=int, help="Claims measured at once; what is timed side by side is measured alone.")
@click.option("--output", metavar="FOLDER", callback=_folder, help=surroundings.OUTPUT_HELP)
def evidence_command(
    device: str, minutes: float | None, only: tuple[str, ...], jobs: int | None, output: str | None
) -> None:
    """Renew evidence that is stale, failed or missing, the shortest claims first; written after each, so resumable."""
    options = Options(device=device, output=output)
    _begin(options, only, jobs)
    jobs, on_gpu, folder = _jobs(jobs, device), device != "cpu", options.folder
    if outside := versions.outside_here(on_gpu):
        raise SelfcheckError(f"records made here would be stale: {', '.join(outside)}")
    console.print("seal intact; importing torch and transformers ...")
    missed: list[str] = []
    with Lines(0) as lines, Pool(options, jobs, lines).open() as pool:
        pool.not_run = missed
        found, states = pool.ready(), [s for s in evidence.states(output=folder) if s.on_gpu == on_gpu]
        due = renew.due(states, found, only)
        lines.total = len(due)
        console.print(f"{found}: {len(due)} of {len(states)} records to renew, the shortest first")
        for state in due:
            why = "; ".join(state.reasons) or "another card than its table"
            console.print(f"    {state.name}: {why} ({renew.expected(state):.0f} s)", markup=False)
        clock = renew.Time(minutes, {s.claim["id"]: renew.expected(s) for s in due})
        # Most of a claim on a GPU is the CPU compiling its kernels: that can be shared, but not what is timed.
        timed = [s.claim for s in due if jobs > 1 and "table" in s.claim]
        records = _renewed(pool, [s.claim for s in due if s.claim not in timed], clock)
    if timed:
        with Lines(len(timed)) as lines, Pool(options, 1, lines).open() as pool:
            pool.not_run = missed
            records += _renewed(pool, timed, clock)
    seal.verify(consequence=CHANGED)
    left = [s for s in evidence.states(output=folder) if s.word != "fresh" and s.on_gpu == on_gpu]
    console.print(f"{len(records)} claims measured in {(time.monotonic() - clock.began) / 60:.1f} minutes; "
                  f"left: {', '.join(state.name for state in left) or 'none'}")  # fmt: skip
    for sentence in _elsewhere(options) if records else []:
        console.print(sentence)
    if clock.left_out and not records:
        shortest = min(clock.seconds[name] for name in clock.left_out)
        raise SelfcheckError(f"--minutes={minutes:g}: the shortest claim took {shortest:.0f} s last time")
    _failures(records, missed, only)


@main.command()
@click.option("--strict", is_flag=True, help="Exit with 1 unless every claim is fresh.")
@click.option("--depends", is_flag=True, help="Show the files that each record depends on as well.")
def status(strict: bool, depends: bool) -> None:
    """Say of every claim whether its evidence is fresh, and what renews it."""
    seal.verify(consequence="so nothing is said of evidence; `nox -s verify` says what else is wrong")
    states = evidence.states()
    console.print(tables.states(states))
    if depends:
        console.print(tables.dependencies(states))
    words = [state.word for state in states]
    console.print(", ".join(f"{words.count(word)} {word}" for word in tables.STYLES))
    mixed = evidence.mixed_tables(states)
    for table, devices in mixed.items():
        console.print(f"table {table} is from several cards: {', '.join(devices)}")
    if strict and (set(words) != {"fresh"} or mixed):
        raise SelfcheckError("not every claim is fresh")


def hear_every_interrupt() -> None:
    """Raise a KeyboardInterrupt again that Python had to drop.

    One that arrives inside a ``__del__`` or a callback of the garbage collector (Hypothesis has one) cannot leave it:
    Python reports it as unraisable and goes on. A moment later it can be raised where the work is.
    """

    def interrupt_again() -> None:
        time.sleep(0.01)
        _thread.interrupt_main()

    def report(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Not a threading.Thread: the collector may have stopped the work inside one of its locks.
            _thread.start_new_thread(interrupt_again, ())
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


if __name__ == "__main__":
    hear_every_interrupt()
    # Asked to end (by `timeout`, a batch system), it leaves no worker behind either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(standalone_mode=False)
    except SelfcheckError as error:
        sys.exit(f"selfcheck: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(f"selfcheck: interrupted; {KEPT}")
