"""A change of perplexity as a value of a record, as fields of a row, and in words."""

from __future__ import annotations

from typing import Any

from qaxis.measures.perplexity import PerplexityChange

from ..harness.claim import value


def as_value(change: PerplexityChange) -> dict[str, Any]:
    return value(change.percent, "%", n=change.texts, low=change.low, high=change.high)


def as_row(change: PerplexityChange) -> dict[str, float]:
    return {"change": change.percent, "low": change.low, "high": change.high}


def in_words(change: PerplexityChange, digits: int = 3) -> str:
    return f"{change.percent:+.{digits}f} % [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
