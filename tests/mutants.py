"""Break the code on purpose, once per check, and see that check go red. Run by `nox -s mutants`.

Each mutant is a copy of the sealed tree with one edit, sealed again (the seal would otherwise stop the
run) and checked with `--quick --only CLAIM`. A mutant that survives is an error of the check.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from selfcheck.files import ROOT

COPIED = ("src", "selfcheck", "figures", "paper", "constraints.txt", "pyproject.toml", "noxfile.py")


class Mutant(NamedTuple):
    claim: str
    fault: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("thm1", "unit score loses its sign", "selfcheck/checks/ranking.py", "1 if axis >= 0 else -1", "1"),
    Mutant("selection", ">= became >", "src/qaxis/ranking.py", "selected = fast >= kth", "selected = fast > kth"),
    Mutant("kernel-grid", "fast exp2", "src/qaxis/kernels.py", "_exp2(t), 0.0)", "tl.exp2(t), 0.0)"),
    Mutant("kernel-grid", "tie to the higher position", "src/qaxis/kernels.py", "| (n - 1 - position)", "| position"),
    Mutant("kernel-real", "wrong kv head", "src/qaxis/kernels.py", "(h // group) * stride_kh", "(h % 3) * stride_kh"),
    Mutant("kernel-real", "sum in another order", "src/qaxis/kernels.py", "x = even + odd", "x = even + odd * 1.0000001"),
    Mutant("flag-off", "disable leaves qaxis on", "src/qaxis/integration.py", "        else:\n            disable(model)", "        else:\n            pass"),
    Mutant("int8-bytes", "scales are not stored small", "src/qaxis/cache.py", "exponents.squeeze(-1)]", "exponents.squeeze(-1).double()]"),
    Mutant("int8-ppl", "update returns what it was given", "src/qaxis/cache.py", "return self.dequantized()\n", "return key_states, value_states\n"),
    Mutant("int8-ppl", "scale doubled", "src/qaxis/cache.py", "* power_of_two(exponent.to(", "* 2 * power_of_two(exponent.to("),
    Mutant("entropy", "entropy in the wrong sign", "src/qaxis/entropy.py", "return -torch.where(", "return torch.where("),
    Mutant("dppl", "minimum budget ignored", "src/qaxis/budget.py", "max(minimum, -(-over", "max(1, -(-over"),
    Mutant("dppl", "sparse run is dense", "selfcheck/runs.py", "qaxis.sparse(model, qaxis.Budget()", "qaxis.sparse(model, qaxis.Budget(1.0)"),
)  # fmt: skip


def run(mutant: Mutant) -> tuple[bool, str]:
    """(caught, what the self-check said)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "local")
                )
            else:
                shutil.copy(source, tree / name)
        target = tree / mutant.file
        text = target.read_text("utf-8")
        if mutant.old not in text:
            raise SystemExit(f"mutants: {mutant.file} has no {mutant.old!r}; update tests/mutants.py")
        target.write_text(text.replace(mutant.old, mutant.new, 1), "utf-8")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])}
        command = [sys.executable, "-m", "selfcheck"]
        subprocess.run([*command, "seal"], cwd=tree, env=env, check=True, capture_output=True)
        done = subprocess.run(
            [*command, "run", "--quick", "--only", mutant.claim],
            cwd=tree, env=env, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    said = [line.strip() for line in done.stdout.splitlines() if "FAILED (" in line]
    return done.returncode != 0 and bool(said), said[0].split("FAILED", 1)[-1] if said else done.stderr[-300:]


def main() -> None:
    survived = []
    for i, mutant in enumerate(MUTANTS, 1):
        print(f"[{i}/{len(MUTANTS)}] {mutant.claim}: {mutant.fault} ...", flush=True)
        caught, said = run(mutant)
        print(f"    {'caught' if caught else 'SURVIVED'}{said[:160]}", flush=True)
        if not caught:
            survived.append(mutant.fault)
    if survived:
        sys.exit(f"mutants: survived: {', '.join(survived)}")
    print(f"{len(MUTANTS)} faults, every one caught")


if __name__ == "__main__":
    main()
