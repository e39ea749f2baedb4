"""Worker processes: who measures what, and what becomes of a claim whose process dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from .. import isolated
from .files import ROOT, SelfcheckError
from .run import UNFINISHED, Options, record

Claim = dict[str, Any]
POSIX = os.name == "posix"
#: seconds that a worker gets to clean up when it is stopped
GRACE = 3.0


class Display(Protocol):
    """What the user sees of a run."""

    def started(self, claim: Claim) -> None: ...
    def progress(self, claim: Claim, label: str, done: int, of: int) -> None: ...
    def finished(self, claim: Claim, record: dict[str, Any] | None, why_not: str, notes: str) -> None: ...
    def tick(self) -> None: ...


@dataclass
class Job:
    """One worker process."""

    process: subprocess.Popen[str]
    log: Path
    #: whether it takes the claims that share the model and its forward passes
    model: bool
    device: str = ""
    claim: Claim | None = None
    since: float = 0.0
    #: how much of the log was shown
    shown: int = 0

    def order(self, **words: Any) -> None:
        # A worker that just died has closed its end; the reader says so.
        with contextlib.suppress(OSError):
            stdin = cast(IO[str], self.process.stdin)
            stdin.write(json.dumps(words) + "\n")
            stdin.flush()

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            cast(IO[str], self.process.stdin).close()

    def notes(self) -> str:
        """What the worker, or a library in it, printed since this was asked last."""
        with self.log.open("rb") as stream:
            stream.seek(self.shown)
            said = stream.read()
        self.shown += len(said)
        return said.decode("utf-8", "replace")

    def stop(self) -> None:
        """End the process and what it started."""
        for sent in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, sent) if POSIX else self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(claim: Claim, options: Options) -> int | None:
    """Threads of torch for one claim: the same number however many jobs there are, as it may bear on the last bits.

    Half the cores for forward passes of the model, one for all else, which is single-threaded Python.
    """
    if options.device != "cpu":
        return None  # the GPU computes
    return max(1, cores() // 2) if claim.get("model") else 1


@dataclass
class Pool:
    """Runs claims in worker processes; those that share the model stay in one process, in their order.

    Args:
        jobs: worker processes at most.
        fits: asked before a claim is started; a claim that does not fit is left out.
        done: called with every record as it comes.
    """

    options: Options
    jobs: int
    display: Display
    fits: Callable[[Claim], bool] = lambda claim: True
    done: Callable[[dict[str, Any]], object] = lambda record: None
    running: list[Job] = field(default_factory=list)
    #: claims that wait: for the worker that has the model, and for any
    of_model: list[Claim] = field(default_factory=list)
    others: list[Claim] = field(default_factory=list)
    begun: bool = False
    messages: queue.SimpleQueue[tuple[Job, dict[str, Any]]] = field(default_factory=queue.SimpleQueue)
    records: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self) -> Iterator[Pool]:
        """Whatever happens inside, no process is left behind."""
        with tempfile.TemporaryDirectory(prefix="qaxis-selfcheck-") as folder:
            self.folder = Path(folder)
            try:
                yield self
            finally:
                for job in self.running:
                    job.stop()

    def start(self, model: bool) -> Job:
        """A new worker process, importing torch while others work."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        # Hypothesis keeps notes where it runs, if not told otherwise: in a tree that is perhaps not to be written.
        env = {"HYPOTHESIS_STORAGE_DIRECTORY": str(self.folder / "hypothesis"), **isolated.environment()}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                isolated.command("selfcheck.harness.worker"), cwd=ROOT, env=env,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, encoding="utf-8",
                start_new_session=POSIX,
            )  # fmt: skip
        job = Job(process, log, model)
        self.running.append(job)
        threading.Thread(target=self._read, args=(job,), daemon=True).start()
        job.order(**self.options.words())
        return job

    def _read(self, job: Job) -> None:
        for line in cast(IO[str], job.process.stdout):
            self.messages.put((job, json.loads(line)))
        self.messages.put((job, {"gone": job.process.wait()}))

    def ready(self) -> str:
        """Start one worker and wait for it; the name of its device.

        Raises:
            SelfcheckError: if it has none of the kind that was asked for.
        """
        job = self.start(model=True)
        while not job.device:
            self._handle(*self.messages.get())
        return job.device

    def run(self, claims: list[Claim]) -> list[dict[str, Any]]:
        """Measure claims in this order, those of the model apart if there is more than one job; returns the records.

        Raises:
            SelfcheckError: for what stops the whole run, as a missing subject.
        """
        alone = self.jobs == 1
        if self.options.device == "cpu":
            for claim in (c for c in claims if c.get("where") == "gpu"):
                self.not_run.append(claim["id"])
                self.display.started(claim)
                self.display.finished(claim, None, "this claim needs a GPU (--device cuda)", "")
            claims = [c for c in claims if c.get("where") != "gpu"]
        self.of_model = [c for c in claims if alone or c.get("model")]
        self.others = [c for c in claims if not (alone or c.get("model"))]
        self.begun = True
        for job in self.running:
            self._next(job)
        while len(self.running) < min(self.jobs, bool(self.of_model) + len(self.others)):
            self.start(model=not any(job.model for job in self.running))
        while self.running:
            with contextlib.suppress(queue.Empty):
                self._handle(*self.messages.get(timeout=0.5))
            self.display.tick()
        return self.records

    def _next(self, job: Job) -> None:
        for waiting in (self.of_model, self.others) if job.model else (self.others,):
            while waiting:
                claim = waiting.pop(0)
                if self.fits(claim):
                    job.claim, job.since = claim, time.perf_counter()
                    self.display.started(claim)
                    job.order(claim=claim["id"], threads=threads_of(claim, self.options))
                    return
        job.dismiss()

    def _handle(self, job: Job, said: dict[str, Any]) -> None:
        if "error" in said:
            raise SelfcheckError(said["error"])
        if "label" in said and job.claim:
            self.display.progress(job.claim, said["label"], said["done"], said["of"])
        elif "device" in said:
            job.device = said["device"]
            job.notes()
            if self.begun:
                self._next(job)
        elif "gone" in said:
            self.running.remove(job)
            if job.claim is not None:
                self._finish(job, {"record": self._crashed(job, job.claim, said["gone"])})
                if self.others or (job.model and self.of_model):
                    self.start(job.model)
            elif not job.device:
                raise SelfcheckError(f"a worker process did not start:\n{job.notes()}")
        elif job.claim is not None:
            self._finish(job, said)
            self._next(job)

    def _finish(self, job: Job, said: dict[str, Any]) -> None:
        claim, job.claim = cast(Claim, job.claim), None
        made = said.get("record")
        if made is None:
            self.not_run.append(claim["id"])
        else:
            self.records.append(made)
            self.done(made)
        self.display.finished(claim, made, said.get("not_run", ""), job.notes())

    def _crashed(self, job: Job, claim: Claim, code: int) -> dict[str, Any]:
        """The record of a claim whose process ended: failed, and of no known dependencies."""
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        verdict = f"its process ended with {name}"
        result = {**UNFINISHED, "passed": False, "verdict": verdict}
        seconds = time.perf_counter() - job.since
        return record(claim, result, self.options, device=job.device, depends={}, subjects=None, seconds=seconds)
