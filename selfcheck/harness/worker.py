"""The process that measures claims: told which on standard input, one JSON line each, it says how far it is.

A claim is measured away from the process that the user talks to, so that its crash is a failed claim, two can run at
once, and what libraries print is kept apart from the progress.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import platform
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .. import isolated
from . import seal, tracing
from .digests import digest
from .evidence import check_file
from .files import ROOT, SelfcheckError, sha256
from .run import UNFINISHED, Options, record

#: seconds between two reports of progress
OFTEN = 0.2
#: names in the environment that keep libraries from drawing bars of their own
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Worker:
    """One process: its channel to the one that started it, and the context that its claims share."""

    def __init__(self) -> None:
        self.channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self.claims = {claim["id"]: claim for claim in seal.claims()}
        self.orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def say(self, **words: Any) -> None:
        self.channel.write(json.dumps(words) + "\n")
        self.channel.flush()

    def listen(self) -> None:
        """Queue what standard input says; None when it ends."""
        for line in sys.stdin:
            self.orders.put(json.loads(line))
        self.orders.put(None)

    def progress(self, items: Iterable[Any], label: str) -> Iterator[Any]:
        items, last = list(items), 0.0
        for i, item in enumerate(items):
            if time.monotonic() - last > OFTEN:
                self.say(label=label, done=i, of=len(items))
                last = time.monotonic()
            yield item

    def serve(self) -> None:
        """Measure what is ordered until there is no more."""
        threading.Thread(target=self.listen, daemon=True).start()
        first = self.orders.get()
        if first is None:
            return
        options = Options(**first)
        try:
            self.prepare(options)
            self.say(device=self.device)
            while (order := self.orders.get()) is not None:
                self.measure(self.claims[order["claim"]], options, order["threads"])
        except SelfcheckError as error:
            self.say(error=str(error))

    def prepare(self, options: Options) -> None:
        """Have this tree's own code measured, traced from its first import on."""
        tracing.install()
        import torch

        import qaxis  # noqa: F401

        from .claim import Context

        if options.device != "cpu" and not (options.device.startswith("cuda") and torch.cuda.is_available()):
            raise SelfcheckError(f"--device={options.device!r}: allowed is cpu, or cuda where torch sees a GPU")
        self.device = f"{platform.system()} {platform.machine()} CPU"
        if options.device != "cpu":
            self.device = torch.cuda.get_device_name(options.device)
        self.context = Context(
            quick=options.quick, device=options.device, model_name=options.model, corpus_name=options.corpus,
            seed=options.seed, progress=self.progress,
        )  # fmt: skip

    def measure(self, claim: dict[str, Any], options: Options, threads: int | None) -> None:
        import torch

        from .claim import NotRunError

        device = self.device
        if threads is not None:
            torch.set_num_threads(threads)
            device = f"{device}, {threads} thread{'s' if threads > 1 else ''}"
        said: dict[str, Any]
        try:
            said = {"record": run_claim(claim, self.context, options, device)}
        except NotRunError as error:
            said = {"not_run": str(error)}
        sys.stdout.flush()
        self.say(**said)


def run_claim(claim: dict[str, Any], context: Any, options: Options, device: str) -> dict[str, Any]:
    """Measure one claim; a check that raises is a failed claim, not a crash of the others.

    Raises:
        NotRunError: if this machine cannot measure it.
        SelfcheckError: if a subject cannot be used, or the tree is not what the seal says, before or after.
    """
    from .claim import NotRunError

    seal.verify(consequence=f"{claim['id']} was not measured")
    started = time.perf_counter()
    tracing.clear_caches()
    with tracing.apart() as ran:
        try:
            module, function = claim["check"].split(":")
            check = getattr(importlib.import_module(f"selfcheck.checks.{module}"), function)
            result = dict(vars(check(context)))
        except (SelfcheckError, NotRunError):
            raise
        except isolated.Refused as error:
            raise SelfcheckError(str(error)) from error
        except Exception as error:
            result = {**UNFINISHED, "passed": False, "verdict": f"{type(error).__name__}: {error}"[:500]}
    seal.verify(consequence=f"what was measured of {claim['id']} is not kept")
    subjects = context.kept["subjects"][0].digests if "subjects" in context.kept else None
    depends = sealed_digests(tracing.dependencies({*ran, check_file(claim)}))
    seconds = time.perf_counter() - started
    return record(claim, result, options, device=device, depends=depends, subjects=subjects, seconds=seconds)


def sealed_digests(names: list[str]) -> dict[str, str]:
    """Digest of every dependency.

    Raises:
        SelfcheckError: for one that is not sealed, or not what the seal says: nobody knows which text was measured.
    """
    locked = seal.locked()
    out = {}
    for name in names:
        file = name.partition(":")[0]
        if file not in locked or locked[file] != sha256(ROOT / file):
            raise SelfcheckError(f"{file}: {'changed while it was measured' if file in locked else 'is not sealed'}")
        said = digest(ROOT, name)
        if said is None:
            raise SelfcheckError(f"{name}: a dependency of this run, but nothing of that name is there")
        out[name] = said
    return out


def main() -> None:
    os.environ.update(QUIET)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    worker = Worker()
    # What libraries print, C code included, goes to standard error, which the other process keeps in a file.
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    worker.serve()


if __name__ == "__main__":
    main()
