"""Numbers of README.md: each stands between marks that name it, and is written from evidence as the paper's are.

``<!--qx KEY FORMAT-->shown<!--/-->``; KEY is ``claim.value``, or one of ``facts``. Browsers show only what is between.
"""

from __future__ import annotations

import re
from pathlib import Path

from paper.numbers import Records
from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError

README = "README.md"
MARKED = re.compile(r"<!--qx ([\w.-]+)(?: ([^\s>]+))?-->((?:(?!<!--)[^\n])*)<!--/-->")
#: what begins or ends a mark, whole or not
BEGINS, ENDS = re.compile(r"<!--\s*qx"), re.compile(r"<!--\s*/")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = {2: "twenty", 3: "thirty", 4: "forty", 5: "fifty"}


def in_words(n: int) -> str:
    """A number below sixty as an English word, as it begins a sentence."""
    word = WORDS[n] if n < 20 else TENS[n // 10] + (f"-{WORDS[n % 10]}" if n % 10 else "")
    return word.capitalize()


def text_of(root: Path = ROOT) -> str:
    """README.md as it is. Raises SelfcheckError if it is missing or no UTF-8."""
    try:
        return (root / README).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SelfcheckError(f"{README}: unreadable ({error})") from None


def facts(records: Records, root: Path = ROOT) -> dict[str, str]:
    """What README.md says beside the values of records."""
    claims = seal.claims(root)
    on_gpu = sum(claim.get("where") == "gpu" for claim in claims)
    return {
        "content": evidence.content_root(evidence.every(records), root),
        "speed.card": _card(records["certified-speed"]["device"]),
        "generation.card": _card(records["generation-speed"]["device"]),
        "claims.cpu": in_words(len(claims) - on_gpu),
        "claims.gpu": in_words(on_gpu),
    }


def _card(device: str) -> str:
    """A card's common name: ``H100`` of ``NVIDIA H100 80GB HBM3``."""
    return device.split()[1] if len(device.split()) > 1 else device


def render(text: str, records: Records, root: Path = ROOT) -> str:
    """README.md with every marked number as the evidence has it.

    Raises:
        SelfcheckError: for a mark that names nothing.
    """
    known, marks = facts(records, root), len(MARKED.findall(text))
    begun, ended = len(BEGINS.findall(text)), len(ENDS.findall(text))
    if not begun == ended == marks:
        raise SelfcheckError(
            f"{README}: {begun} marks begin and {ended} end, {marks} are whole: allowed is "
            "<!--qx KEY FORMAT-->shown<!--/--> on one line"
        )

    def written(mark: re.Match[str]) -> str:
        key, form = mark[1], mark[2] or ""
        shown = known.get(key) or _value(key, form, records)
        return f"<!--qx {key}{f' {form}' if form else ''}-->{shown}<!--/-->"

    return MARKED.sub(written, text)


def _value(key: str, form: str, records: Records) -> str:
    claim, _, name = key.partition(".")
    try:
        value = records[claim]["values"][name]["value"]
        return format(value, form or ",")
    except (KeyError, ValueError) as error:
        raise SelfcheckError(
            f"{README}: <!--qx {key} {form}--> names no value that can be written so ({error})"
        ) from None
