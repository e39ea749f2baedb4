"""Captured graphs have work space of their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from qaxis.cuda.workspaces import own_workspaces

ROOT = Path(__file__).parents[1]


def test_work_spaces_are_new_before_and_gone_after_whatever_happens(monkeypatch):
    cleared = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False)
    with own_workspaces():
        assert len(cleared) == 1
    assert len(cleared) == 2
    with pytest.raises(RuntimeError, match="capture"), own_workspaces():
        raise RuntimeError("capture")
    assert len(cleared) == 4


def test_no_graph_is_captured_without():
    """Wherever a graph is captured, in the library, the harness or a benchmark."""
    found = 0
    for folder in ("src", "selfcheck", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                items = [ast.unparse(x.context_expr) for x in node.items] if isinstance(node, ast.With) else []
                captures = [i for i, x in enumerate(items) if x.startswith("torch.cuda.graph(")]
                for i in captures:
                    found += 1
                    assert "own_workspaces()" in items[:i], f"{path}:{node.lineno}"
    assert found == 4
