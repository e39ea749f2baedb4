"""Isolated, ``selfcheck.harness.traced -c CODE ...``: as ``python -c``, and says in a file what it depends on."""

from __future__ import annotations

import json
import os
import sys

from . import tracing


def main() -> None:
    """Run the code as the main module; the report is written however it ends."""
    report, code = os.environ.pop(tracing.REPORT), sys.argv[2]
    sys.argv[:] = ["-c", *sys.argv[3:]]
    tracing.install()
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    finally:
        imported = {name: sorted(found) for name, found in tracing.IMPORTED.items() if found}
        with open(report, "w", encoding="utf-8") as stream:
            json.dump({"ran": sorted(tracing.RAN), "imported": imported}, stream)


if __name__ == "__main__":
    main()
