"""A small real Llama (random weights) and a copy of the sealed tree, for tests that tamper."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfcheck.harness import seal
from selfcheck.harness.files import ROOT

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: threads on top of that only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of everything the harness reads, to be tampered with."""
    for name in ("src", "selfcheck", "figures", "paper"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "local")
        )
    for name in seal.expand(seal.SEALED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path
