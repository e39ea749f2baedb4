"""Evidence, by one name for those who read it: files (``records``), what repeats (``content``), belief (``states``)."""

from __future__ import annotations

from .content import content, content_digest, content_root
from .records import (
    DEFAULT,
    FILES,
    GPU,
    SCHEMA,
    card,
    chain,
    committed,
    every,
    family,
    load,
    malformed,
    read,
    record_digest,
    write,
)
from .states import (
    State,
    accepted,
    check_file,
    fresh,
    judge,
    left_out,
    mixed_tables,
    renewal,
    stale_files,
    states,
    understood,
)

__all__ = [
    "DEFAULT", "FILES", "GPU", "SCHEMA", "State", "accepted", "card", "chain", "check_file", "committed", "content",
    "content_digest", "content_root", "every", "family", "fresh", "judge", "left_out", "load",
    "malformed", "mixed_tables", "read", "record_digest", "renewal", "stale_files", "states", "understood", "write",
]  # fmt: skip
