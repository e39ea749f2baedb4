"""The CUDA C++ outside its claims: what it leaves to Triton, room that runs out, the emulator's own behaviour."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qaxis
from qaxis import decode
from qaxis.cuda import compiler, emulator

needs_compiler = pytest.mark.skipif(not emulator.available(), reason="g++ is needed to emulate CUDA")


def bell(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_compiler
@pytest.mark.parametrize("codes", [False, True])
def test_a_step_has_the_canonical_bits(codes):
    q, k, v = (bell(1, h, n, 64, seed=s, dtype=torch.bfloat16) for h, n, s in ((6, 1, 0), (2, 900, 1), (2, 900, 2)))
    exact = qaxis.topk_attention(q, k, v, 120)
    decoder = decode.Decoder(1, 6, 900, 64, 120, "cpu")
    index = decode.index_keys(k, codes=codes)
    assert decoder.native(q, k, v, index) is not None
    step = decoder(q, k, v, index)
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)
    assert int(step.rescored.sum(-1).min()) >= 120


@needs_compiler
def test_ties_beyond_any_room_go_to_the_lower_positions():
    q, v = bell(1, 2, 1, 32), bell(1, 1, 12000, 32, seed=2)
    k = bell(1, 1, 1, 32, seed=1).expand(1, 1, 12000, 32).contiguous()
    decoder = decode.Decoder(1, 2, 12000, 32, 40, "cpu")
    index = decode.index_keys(k)
    fast = decoder.native(q, k, v, index)
    step = decoder(q, k, v, index)
    # Every key is a candidate: more than a program has room for.
    assert int(step.rescored.max()) > fast.room
    assert torch.equal(step.indices, torch.arange(40).expand(1, 2, 1, 40))
    assert torch.equal(step.output, qaxis.topk_attention(q, k, v, 40).output)


@needs_compiler
def test_a_decoder_keeps_nothing_from_one_step_to_the_next():
    decoder = decode.Decoder(1, 4, 700, 32, 30, "cpu")
    for seed in range(3):
        q, k, v = bell(1, 4, 1, 32, seed=seed), bell(1, 2, 700, 32, seed=seed + 10), bell(1, 2, 700, 32, seed=seed + 20)
        exact, step = qaxis.topk_attention(q, k, v, 30), decoder(q, k, v, decode.index_keys(k))
        assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


@needs_compiler
@pytest.mark.parametrize("name", ["keys", "codes"])
@pytest.mark.parametrize("n", [500, 512, 1025])
def test_lengths_about_a_block(name, n):
    q, k, v = bell(1, 8, 1, 64), bell(1, 1, n, 64, seed=1), bell(1, 1, n, 64, seed=2)
    exact = qaxis.topk_attention(q, k, v, n // 2)
    step = decode.Decoder(1, 8, n, 64, n // 2, "cpu")(q, k, v, decode.index_keys(k, codes=name == "codes"))
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


def test_what_it_does_not_run_is_left_to_triton():
    q, k, v = bell(1, 2, 1, 48), bell(1, 1, 200, 48, seed=1), bell(1, 1, 200, 48, seed=2)
    decoder = decode.Decoder(1, 2, 200, 48, 20, "cpu")
    index = decode.index_keys(k)
    assert decoder.native(q, k, v, index) is None
    exact, step = qaxis.topk_attention(q, k, v, 20), decoder(q, k, v, index)
    assert torch.equal(step.indices, exact.indices) and torch.equal(step.output, exact.output)


def test_without_a_compiler_it_says_so_and_triton_runs(monkeypatch, caplog):
    monkeypatch.setattr(emulator, "available", lambda: False)
    compiler.compiled.cache_clear()
    q, k, v = bell(1, 2, 1, 32), bell(1, 1, 100, 32, seed=1), bell(1, 1, 100, 32, seed=2)
    step = decode.Decoder(1, 2, 100, 32, 10, "cpu")(q, k, v, decode.index_keys(k))
    compiler.compiled.cache_clear()
    assert torch.equal(step.indices, qaxis.topk_attention(q, k, v, 10).indices)
    assert "cannot be used" in caplog.text and "apt install g++" in caplog.text


@pytest.mark.parametrize("n, k, message", [(0, 1, "n=0"), (10, 0, "k=0"), (10, 11, "k=11")])
def test_sizes_that_are_not_allowed(n, k, message):
    with pytest.raises(ValueError, match=message):
        decode.Decoder(1, 2, n, 32, k, "cpu")


@needs_compiler
def test_a_thread_that_waits_for_ever_is_named():
    kernel = 'extern "C" __global__ void stuck(int* p) { if (threadIdx.x != 5) __syncthreads(); *p = 1; }'
    script = (
        "import torch; from qaxis.cuda import emulator; "
        f"emulator.compiled({kernel!r}, 'stuck', [])((1, 1, 1), (64, 1, 1), [torch.zeros(1, dtype=torch.int32)])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "thread 0 of program 0 waits for ever" in done.stderr


@needs_compiler
def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(RuntimeError, match="nowhere"):
        emulator.compiled('extern "C" __global__ void f(int* p) { *p = nowhere; }', "f", [])
