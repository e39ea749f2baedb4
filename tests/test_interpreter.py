"""Without a GPU Triton's interpreter is chosen, whichever of qaxis, Triton and transformers is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from selfcheck.harness.files import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")

USES = {
    "prefill": "import qaxis.prefill\nout = qaxis.prefill.prefill_attention(q.expand(-1, -1, 4, -1), k, k, 9)[0]",
    "decode": "import qaxis.decode as d\nout = d.Decoder(1, 2, 50, 48, 9, 'cpu')(q, k, k, d.index_keys(k))[0]",
    "reference": "out = qaxis.topk_attention(q, k, k, 9, backend='reference').output",
    "attention": "out = qaxis.topk_attention(q, k, k, 9, backend='triton').output",
}
CODE = """
{first}
import torch, qaxis
g = torch.Generator().manual_seed(0)
q, k = torch.randn(1, 2, 1, 48, generator=g), torch.randn(1, 2, 50, 48, generator=g)
{use}
exact = qaxis.topk_attention(q, k, k, 9).output
assert torch.allclose(out[:, :, -1:], exact, atol=1e-5), "another result"
"""


def run(use: str, first: str, **environment: str) -> tuple[int, str]:
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(first=first, use=USES[use])],
        env={**env, **environment, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("use", USES)
def test_qaxis_first_and_nothing_in_the_environment(use):
    code, said = run(use, "")
    assert code == 0, said


@pytest.mark.parametrize("value", ["1", "TRUE", "on", "y"])
def test_the_variable_is_read_as_triton_reads_it(value):
    code, said = run("prefill", "import triton", TRITON_INTERPRET=value)
    assert code == 0, said


FIRST = [
    "import triton",
    "from transformers import LlamaForCausalLM",
    "import transformers.models.llama.modeling_llama",
]


@pytest.mark.parametrize("use", ["prefill", "decode", "attention"])
@pytest.mark.parametrize("first", FIRST)
def test_triton_first_is_another_order_of_the_same(use, first):
    code, said = run(use, first)
    assert code == 0, said


def test_no_function_of_triton_is_left_to_be_compiled():
    code, said = run(
        "attention",
        "import triton, triton.language as tl\nwas = tl.sum, tl.standard._sum_combine, tl.tensor.sum, tl.rand\n"
        "assert all(isinstance(f, triton.JITFunction) for f in was)\nimport qaxis\n"
        "now = tl.sum, tl.standard._sum_combine, tl.tensor.sum, tl.rand\n"
        "assert not any(isinstance(f, triton.JITFunction) for f in now)\n"
        "assert tl.sum is tl.standard.sum is tl.tensor.sum",
    )
    assert code == 0, said


@pytest.mark.parametrize("use", ["prefill", "attention"])
def test_an_interpreter_that_was_turned_off_is_named(use):
    code, said = run(use, "", TRITON_INTERPRET="0")
    assert code == 1 and said.startswith("ValueError: q.device='cpu'") and "set TRITON_INTERPRET=1 before" in said


def test_the_reference_needs_no_interpreter():
    code, said = run("reference", "", TRITON_INTERPRET="0")
    assert code == 0, said


def test_an_empty_variable_is_none():
    code, said = run("prefill", "", TRITON_INTERPRET="")
    assert code == 0, said


def test_a_variable_that_changes_midway_is_named():
    first = "import os, qaxis, qaxis.arithmetic.triton\nos.environ['TRITON_INTERPRET'] = '0'"
    code, said = run("attention", first)
    assert code == 1 and said.startswith("RuntimeError: TRITON_INTERPRET was changed after")


@pytest.mark.parametrize("use", ["prefill", "decode"])
def test_an_interpreter_that_is_chosen_after_triton_came_is_named(use):
    """As with a GPU, where nobody decides anew what Triton was imported for."""
    first = "import os, triton, qaxis\nos.environ['TRITON_INTERPRET'] = '1'"
    code, said = run(use, first, TRITON_INTERPRET="0")
    assert code == 1 and said.startswith("RuntimeError: triton was imported to compile kernels, and TRITON_INTERPRET")
    assert "before Python starts" in said and "GPU" not in said
