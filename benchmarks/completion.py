"""What completing top-k attention is worth, on real text: perplexity, KL and agreement with dense attention, by way.

    python -m benchmarks.completion measure --model smollm2 --parts table --out benchmarks/local/smollm2.json
    python -m benchmarks.completion report benchmarks/local/*.json

Every article goes through the model once a way, float32, batch 1, on one GPU or slowly on a CPU. The ways are in
``selfcheck/rivals/completing.py``, the bytes that they read in ``bytes_read.py`` there, what is measured in
``completion_plans.py``. Results are written after each pass, so a run that was stopped (``--seconds``, or killed) goes
on where it was when the same command is given again. Selection is by float32 scores of matrix products, not canonical:
which of nearly equal keys are kept differs, which perplexity does not notice.

A machine without the packages gets weights by ``--subject`` or QAXIS_SUBJECT (a file, a folder of transformers, or of
a GGUF file or its parts) and articles by ``--texts`` or QAXIS_TEXTS, which the command ``texts`` writes elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.completion_plans import MAIN, MODES, bounds, parts, plans_of
from benchmarks.completion_report import report_of
from qaxis.validation import require
from selfcheck.checks.retrieval import TASKS
from selfcheck.harness.files import write_atomic
from selfcheck.inputs import optional, subjects
from selfcheck.rivals.bytes_read import DENSE, Plan, shape_of
from selfcheck.rivals.completing import Way, attending_by

#: (articles, tokens of each)
WINDOWS = {"smollm2": (40, 8192), "gemma": (12, 16384)}
#: positions whose logits are formed at once
POSITIONS = 512


# Model and articles.


@contextmanager
def _file_of(model: str, path: Path | None) -> Iterator[str | None]:
    """What ``load_model`` takes: None for the pinned package file, or a path; parts of a file are joined."""
    if path is None and model == "gemma":
        with optional.joined(optional.subjects()["gemma"]) as whole:
            yield str(whole)
        return
    if path is None or not path.is_dir() or (path / "config.json").is_file():
        yield None if path is None else str(path)
        return
    files, pieces = sorted(path.rglob("*.gguf")), sorted(path.rglob("*.gguf.part*"))
    found = len(files) == 1 or (not files and bool(pieces))
    require(found, "--subject", str(path), "a folder with config.json, one .gguf file, or the .gguf.part* of one")
    if files:
        yield str(files[0])
        return
    with tempfile.TemporaryDirectory(prefix="qaxis-subject-") as folder:
        joined = Path(folder) / pieces[0].name.split(".part")[0]
        with joined.open("wb") as out:
            for piece in pieces:
                with piece.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
        yield str(joined)


def load(model: str, path: Path | None, device: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, first digits of the digest)."""
    torch.set_float32_matmul_precision("highest")
    with _file_of(model, path) as name:
        loaded, tokenizer, digest = subjects.load_model(name, device)
    ids = torch.arange(1, 9, device=device)[None]
    with torch.inference_mode():
        own = loaded(input_ids=ids, use_cache=False).logits[0]
        ours = logits_of(loaded, loaded.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    require(torch.allclose(own, ours, atol=1e-3), "model", type(loaded).__name__, "one whose head makes its logits")
    return loaded, tokenizer, digest[:16]


def about_of(name: str, model: Any, digest: str, length: int) -> dict[str, Any]:
    """What a :class:`Store` says of its results."""
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    return {
        "model": name, "length": length, "digest": digest, "shape": list(shape_of(model)), "device": device,
        "torch": torch.__version__,
    }  # fmt: skip


def texts_of(tokenizer: Any, source: Path | None, corpus: str | None, count: int, length: int) -> list[torch.Tensor]:
    """Articles int64 ``[1, length]``, from the corpus, or from a file that ``texts`` wrote."""
    if source is None:
        return subjects.texts_of(tokenizer, subjects.documents(corpus)[0], "cpu", count, length)
    kept = [x for x in json.loads(source.read_text("utf-8")) if len(x) >= length]
    require(len(kept) >= count, "--articles", count, f"at most {len(kept)}, which {source} has of {length} tokens")
    return [torch.tensor([x[:length]]) for x in kept[:count]]


# Passes.


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[M, V]`` of hidden states ``[M, C]``."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.inference_mode()
def states(model: Any, ids: torch.Tensor, way: Way) -> tuple[torch.Tensor, float | None]:
    """(last hidden states ``[N, C]`` of ``ids [1, N]``, the mean k where only the selection knows it)."""
    with attending_by(model, way) as tally:
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0], tally.mean


@torch.inference_mode()
def compared(
    model: Any, ids: torch.Tensor, dense: torch.Tensor, other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every token but the first: loss, KL from dense to ``other`` in nats, and whether the best token is the same.

    ``dense, other [N, C]`` are hidden states; each result is float64 ``[N - 1]`` on the CPU.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, ids.shape[1] - 1, POSITIONS):
        rows = slice(start, min(start + POSITIONS, ids.shape[1] - 1))
        target = ids[0, rows.start + 1 : rows.stop + 1, None]
        a, b = (logits_of(model, x[rows]).log_softmax(-1) for x in (dense, other))
        same = a.argmax(-1) == b.argmax(-1)
        loss = -b.gather(1, target)[:, 0]
        found.append((loss, (a.exp() * (a - b)).sum(-1), same))
    loss, kl, same = (torch.cat(x).double().cpu() for x in zip(*found, strict=True))
    return loss, kl, same


class Store:
    """Results in one JSON file, which is whole at any time."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"about": about, "articles": {}, "tasks": {}}
        if path.is_file():
            self.document = json.loads(path.read_text("utf-8"))
            for name in {"model", "length", "digest", "steps"} & {*about}:
                was, now = self.document["about"][name], about[name]
                require(was == now, name, now, f"{was}, as in {path}: another model or length goes to another file")

    def article(self, index: int, ids: torch.Tensor) -> dict[str, Any]:
        """The record of an article, by its tokens."""
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
        return self.document["articles"].setdefault(digest, {"index": index, "ways": {}})

    def write(self) -> None:
        write_atomic(self.path, (json.dumps(self.document) + "\n").encode())

    def seconds(self) -> dict[str, float]:
        """By way, the median of what its passes took."""
        took: dict[str, list[float]] = {}
        for article in self.document["articles"].values():
            for name, found in article["ways"].items():
                took.setdefault(name, []).append(found["seconds"])
        return {name: statistics.median(x) for name, x in took.items()}


class Clock:
    """Says when there is no time for another pass."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds
        self.longest = 0.0

    def allows(self) -> bool:
        return self.end is None or time.monotonic() + 1.3 * self.longest < self.end

    @contextmanager
    def timed(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        # The first passes are slower than what follows.
        self.longest = max(0.8 * self.longest, time.monotonic() - begun)


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def pass_of(
    model: Any, ids: torch.Tensor, dense: torch.Tensor | None, plan: Plan, kept: float | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """(what is kept of one pass: sums over the first tokens, hidden states)."""
    begun = time.perf_counter()
    length = ids.shape[1]
    hidden, mean = states(model, ids, plan.way(shape_of(model), length, kept))
    of = compared(model, ids, hidden if dense is None else dense, hidden)
    sums = {
        name: [float(x[: n - 1].sum()) for n in bounds(length)]
        for name, x in zip(("loss", "kl", "agree"), of, strict=True)
    }
    found = {**sums, "seconds": round(time.perf_counter() - begun, 3)}
    if mean is not None or kept is not None:
        found["kept"] = kept if mean is None else mean
    return found, hidden


def measure_texts(model: Any, texts: list[torch.Tensor], plans: list[Plan], store: Store, clock: Clock) -> bool:
    """All passes that are missing, article by article; False if time ran out."""
    for i, ids in enumerate(texts):
        record = store.article(i, ids)
        missing = [plan for plan in plans if plan.name not in record["ways"]]
        dense: torch.Tensor | None = None
        on_device = ids.to(model.device)
        for plan in missing:
            if not clock.allows():
                return False
            with clock.timed():
                if dense is None and plan != DENSE:
                    dense = states(model, on_device, DENSE.way(shape_of(model), ids.shape[1]))[0]
                kept = record["ways"].get(plan.source, {}).get("kept") if plan.budget[0] == "like" else None
                found, hidden = pass_of(model, on_device, dense, plan, kept)
                if plan == DENSE:
                    dense = hidden
            record["ways"][plan.name] = found
            store.write()
            change = 100 * np.expm1((found["loss"][-1] - record["ways"]["dense"]["loss"][-1]) / (ids.shape[1] - 1))
            say(f"article {i}: {plan.name}: {change:+.3f} %, {found['seconds']:.2f} s")
    return True


# Tasks.

WORDS = ("apple", "river", "table", "music", "stone", "garden", "window", "horse")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
BELL = "\nThe bell rang.\n"


class Asked(NamedTuple):
    """A question behind a text: token ids ``[1, n]``; the whole answer, or the first tokens of all choices."""

    question: torch.Tensor
    answer: torch.Tensor
    choices: torch.Tensor | None = None
    right: int = 0


def task_plans(only: str) -> list[Plan]:
    every = [Plan(b, c) for b in MAIN for c in ("none", "linear")]
    return [DENSE, *(plan for plan in every if re.search(only, plan.name))]


def prompts(tokenizer: Any, hay: torch.Tensor, i: int, count: int, n: int) -> dict[str, tuple[Any, dict[str, Asked]]]:
    """Two texts of about ``n`` tokens with what is asked of each: an article with hidden sentences, a list of words.

    The article has pass key and needle behind each other at depth ``(i + 0.5) / count``, and bells that ring at random
    places; the list is random words, one of which comes twice as often as each of the others.
    """
    random = np.random.default_rng(1000 + i)

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def choice(question: str, names: tuple[str, ...], right: int) -> Asked:
        first = torch.tensor([int(ids(f" {name}")[0, 0]) for name in names])
        require(len(first.unique()) == len(names), "tokenizer", names, "one whose first tokens of these differ")
        return Asked(ids(question), first[right].reshape(1, 1), first, right)

    made = {task: make(i) for task, make in TASKS.items()}
    asked = {task: Asked(ids(question), ids(answer)) for task, (_, question, answer) in made.items()}
    rings = int(random.integers(2, 10))
    asked["counting"] = choice(
        "\nQuestion: How many times did the bell ring?\nAnswer: The bell rang", NUMBERS, rings - 2
    )  # fmt: skip
    hidden = [(int((i + 0.5) / count * 1e6), ids("".join(hide for hide, _, _ in made.values())))]
    hidden += [(int(x), ids(BELL)) for x in random.integers(0, 1_000_000, rings)]
    longest = max(x.question.shape[1] + x.answer.shape[1] for x in asked.values())
    room, pieces, at = n - longest - sum(x.shape[1] for _, x in hidden), [], 0
    require(room > 0, "--task-tokens", n, f"more than {n - room}")
    for depth, sentence in sorted(hidden, key=lambda x: x[0]):
        cut = int(depth / 1e6 * room)
        pieces += [hay[:, at:cut], sentence]
        at = cut
    text = torch.cat([*pieces, hay[:, at:room]], 1)
    often = int(random.integers(len(WORDS)))
    share = np.where(np.arange(len(WORDS)) == often, 2.0, 1.0)
    drawn = random.choice(len(WORDS), size=n, p=share / share.sum())
    listed = ids("\nHere is a list of words:" + "".join(f" {WORDS[j]}" for j in drawn))[:, : n - longest]
    common = choice("\nQuestion: Which word is the most common in the list?\nAnswer: The word is", WORDS, often)
    return {"article": (text, asked), "list": (listed, {"most frequent word": common})}


@torch.inference_mode()
def answers(
    model: Any, text: torch.Tensor, asked: dict[str, Asked], read: Way, ask: list[Way]
) -> list[dict[str, dict[str, Any]]]:
    """By way of asking and task: whether the answer is found, and its loss in nats (a token, or among the choices).

    The text is read once. A whole answer is found if each token is the best after the true ones before, a choice if it
    is the best of the choices.
    """
    cache, decoder, device = DynamicCache(), model.get_decoder(), model.device
    with attending_by(model, read):
        decoder(input_ids=text.to(device), past_key_values=cache, use_cache=True)
    every = []
    for way in ask:
        found = {}
        for task, one in asked.items():
            ids, length = torch.cat([one.question, one.answer], 1).to(device), one.answer.shape[1]
            with attending_by(model, way):
                hidden = decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
            cache.crop(-ids.shape[1])
            logits = logits_of(model, hidden[-length - 1 : -1])
            if one.choices is None:
                target = one.answer[0].to(device)
                loss = torch.nn.functional.cross_entropy(logits, target)
                found[task] = {"found": bool((logits.argmax(-1) == target).all()), "loss": float(loss)}
            else:
                among = logits[-1, one.choices.to(device)].log_softmax(-1)
                found[task] = {"found": int(among.argmax()) == one.right, "loss": -float(among[one.right])}
        every.append(found)
    return every


def measure_tasks(
    model: Any, tokenizer: Any, hays: list[torch.Tensor], lengths: list[int], plans: list[Plan], store: Store,
    clock: Clock,
) -> bool:  # fmt: skip
    """Every prompt by every plan, dense prefill and sparse decode as well as both sparse; False if time ran out."""
    shape = shape_of(model)
    for n in lengths:
        for i, hay in enumerate(hays):
            record = store.document["tasks"].setdefault(f"{n} {i}", {})
            for context, (text, asked) in prompts(tokenizer, hay, i, len(hays), n).items():
                done = record.setdefault(context, {})
                names = {mode: [p for p in plans if f"{mode}: {p.name}" not in done] for mode in MODES}
                jobs = [("decode", DENSE, names["decode"])] if names["decode"] else []
                jobs += [("both", plan, [plan]) for plan in names["both"] if plan != DENSE]
                for mode, read, ask in jobs:
                    if not clock.allows():
                        return False
                    with clock.timed():
                        ways = [plan.way(shape, n) for plan in ask]
                        found = answers(model, text, asked, read.way(shape, n), ways)
                    done |= {f"{mode}: {plan.name}": x for plan, x in zip(ask, found, strict=True)}
                    store.write()
                    said = {p.name: [t for t, y in x.items() if y["found"]] for p, x in zip(ask, found, strict=True)}
                    say(f"{n} tokens, prompt {i}, {context}, {mode}: {said}")
    return True


# Commands.


@click.group()
def main() -> None:
    """Completion of top-k attention on real text."""


def subject_options(command: Any) -> Any:
    """Where model and articles come from."""
    for option in (
        click.option("--model", default="smollm2", show_default=True, type=click.Choice(list(WINDOWS))),
        click.option("--subject", envvar="QAXIS_SUBJECT", type=click.Path(path_type=Path, exists=True),
                     help="File or folder of the model's weights (parts of a file are joined), if not the package's."),
        click.option("--corpus", envvar="QAXIS_CORPUS", help="As of the self-check, if not the pinned one."),
        click.option("--articles", type=int, help="40 of SmolLM2, 12 of Gemma if not given."),
        click.option("--length", type=int, help="Tokens; 8192 of SmolLM2, 16384 of Gemma if not given."),
        click.option("--out", required=True, type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = option(command)
    return command


@main.command()
@subject_options
def texts(
    model: str, subject: Path | None, corpus: str | None, articles: int | None, length: int | None, out: Path
) -> None:  # fmt: skip
    """Write the articles' tokens as JSON, for a machine without the corpus (measure --texts)."""
    count, tokens = (given or usual for given, usual in zip((articles, length), WINDOWS[model], strict=True))
    tokenizer = load(model, subject, "cpu")[1]
    found = texts_of(tokenizer, None, corpus, count, tokens)
    write_atomic(out, (json.dumps([x[0].tolist() for x in found]) + "\n").encode())


@main.command()
@subject_options
@click.option("--texts", "source", envvar="QAXIS_TEXTS", type=click.Path(path_type=Path, exists=True),
              help="Articles as the command texts wrote them.")  # fmt: skip
@click.option("--parts", "chosen", default="table", show_default=True, help=", ".join(parts()))
@click.option("--only", default="", help="Ways whose name matches this regular expression, and dense attention.")
@click.option("--seconds", type=float, help="Begin no pass that would end later.")
@click.option("--task-tokens", default="", help="Lengths of prompts; 2048 and a little below --length if not given.")
@click.option("--prompts", "prompt_count", default=12, show_default=True, help="Of a length, for tasks.")
@click.option("--device", default=None, help="cuda where there is one.")
@click.option("--estimate", is_flag=True, help="Only say how long the missing passes would take.")
def measure(
    model: str, subject: Path | None, corpus: str | None, articles: int | None, length: int | None, out: Path,
    source: Path | None, chosen: str, only: str, seconds: float | None, task_tokens: str, prompt_count: int,
    device: str | None, estimate: bool,
) -> None:  # fmt: skip
    """Measure what is missing in --out."""
    clock = Clock(seconds)
    names = list(filter(None, chosen.split(",")))
    plans = plans_of(names, only)
    count, tokens = (given or usual for given, usual in zip((articles, length), WINDOWS[model], strict=True))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer, digest = load(model, subject, device)
    found = texts_of(tokenizer, source, corpus, count, tokens)
    about = {**about_of(model, loaded, digest, tokens), "bounds": bounds(tokens)}
    store = Store(out, about)
    if estimate:
        click.echo(estimated(loaded, found, plans, store))
        return
    done = measure_texts(loaded, found, plans, store, clock)
    if done and "tasks" in names:
        lengths = [int(x) for x in task_tokens.split(",") if x] or [min(2048, tokens // 2), tokens - 192]
        done = measure_tasks(
            loaded, tokenizer, found[:prompt_count], lengths, task_plans(only), store, clock
        )  # fmt: skip
    say("everything is measured" if done else "time ran out: the same command goes on")


def estimated(model: Any, found: list[torch.Tensor], plans: list[Plan], store: Store) -> str:
    """What the missing passes take: by what was measured, or by one pass of a plan on the first article."""
    took = store.seconds()
    ids = found[0].to(model.device)
    missing: dict[Plan, int] = {}
    for i, text in enumerate(found):
        done = store.article(i, text)["ways"]
        for plan in plans:
            missing[plan] = missing.get(plan, 0) + (plan.name not in done)
    total, lines = 0.0, []
    tried: dict[tuple[str, str, str], float] = {}
    for plan, passes in missing.items():
        kind = (plan.budget[0], plan.complete, plan.rival)
        if passes and plan.name not in took and kind not in tried:
            kept = 0.1 * ids.shape[1] if plan.budget[0] == "like" else None
            tried[kind] = pass_of(model, ids, None, plan, kept)[0]["seconds"]
        each = took.get(plan.name, tried.get(kind, 0.0))
        total += passes * each
        lines.append(f"{plan.name}: {passes} passes of {each:.2f} s")
    return "\n".join([*lines, f"together {total:.0f} s, without loading and tasks"])


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", type=int, help="Over so many first tokens: a power of two from 512 on; all if not given.")
def report(files: tuple[Path, ...], tokens: int | None) -> None:
    """Print tables and checks of targets as Markdown."""
    click.echo(report_of([json.loads(x.read_text("utf-8")) for x in files], tokens))


if __name__ == "__main__":
    main()
