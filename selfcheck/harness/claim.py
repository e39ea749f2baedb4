"""What a check gets and what it returns.

No claim depends on this file: a record holds the fields of a ``Result`` as they are, and what of a context bears on a
number is computed in ``inputs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..inputs.passes import Runs, measure
from ..inputs.subjects import Subjects, documents, load, texts_of, window
from . import tracing

T = TypeVar("T")


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


class shared(Generic[T]):
    """A property of the context that is computed once; whoever uses it depends on what computing it depended on."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, context: Any, owner: type) -> T:
        if self.name not in context.kept:
            # What this claim has in its caches already would not be seen again.
            tracing.clear_caches()
            with tracing.apart() as found:
                made = self.compute(context)
            context.kept[self.name] = made, found
        made, found = context.kept[self.name]
        tracing.RAN.update(found)
        return made


@dataclass
class Context:
    """One run: profile, device, seed, and the subjects, loaded once when first needed."""

    quick: bool = False
    device: str = "cpu"
    model_name: str | None = None
    corpus_name: str | None = None
    seed: int = 20260601
    progress: Callable[..., Iterable[Any]] = lambda items, label: items
    #: what is shared by several claims, and the files it came from
    kept: dict[str, tuple[Any, set[str]]] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Length of the windows that are measured."""
        return window(self.quick)[1]

    @property
    def text_count(self) -> int:
        return window(self.quick)[0]

    @shared
    def subjects(self) -> Subjects:
        return load(self.model_name, self.corpus_name, self.device, self.text_count, self.tokens)

    def texts(self, count: int, tokens: int) -> list[Any]:
        """Texts of another length than the windows that every claim shares."""
        return texts_of(self.subjects.tokenizer, documents(self.corpus_name)[0], self.device, count, tokens)

    @shared
    def runs(self) -> Runs:
        """The forward passes that several claims share: dense, sparse, INT8, entropies."""
        return measure(self.subjects.model, self.subjects.texts, self.tokens, self.progress)
