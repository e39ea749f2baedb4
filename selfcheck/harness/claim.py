"""What a check gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..inputs.passes import Runs, measure
from ..inputs.subjects import Subjects, documents, load, texts_of


class NotRunError(Exception):
    """This machine cannot run the check. The claim is then not run, never passed."""


@dataclass(kw_only=True)
class Result:
    """A check's measurement.

    ``verdict`` says in words what was found right or wrong, ``headline`` has the numbers. ``values`` maps a name to
    {value, unit, n, low, high}; ``data`` feeds figures and tables, its rows are dicts; ``checks`` names the
    parametrised checks inside this one, each of which tests something different.
    """

    passed: bool
    verdict: str
    headline: str
    values: dict[str, dict[str, Any]]
    cases: int
    data: dict[str, Any] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)


def value(
    x: float, unit: str = "", *, n: int | None = None, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """One measured value with its unit, sample count and 95 % interval."""
    return {"value": x, "unit": unit, "n": n, "low": low, "high": high}


@dataclass
class Context:
    """One run: profile, device, seed, and the subjects, loaded once when first needed."""

    quick: bool = False
    device: str = "cpu"
    model_name: str | None = None
    corpus_name: str | None = None
    seed: int = 20260601
    progress: Callable[..., Iterable[Any]] = lambda items, label: items

    @property
    def tokens(self) -> int:
        """Length of the windows that are measured."""
        return 512 if self.quick else 2048

    @property
    def text_count(self) -> int:
        return 2 if self.quick else 8

    @cached_property
    def subjects(self) -> Subjects:
        return load(self.model_name, self.corpus_name, self.device, self.text_count, self.tokens)

    def texts(self, count: int, tokens: int) -> list[Any]:
        """Texts of another length than the windows that every claim shares."""
        return texts_of(self.subjects.tokenizer, documents(self.corpus_name)[0], self.device, count, tokens)

    @cached_property
    def runs(self) -> Runs:
        """The forward passes that several claims share: dense, sparse, INT8, entropies."""
        return measure(self.subjects.model, self.subjects.texts, self.tokens, self.progress)
