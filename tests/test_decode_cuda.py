"""The CUDA C++ outside its claims: what it leaves to Triton, room that runs out, the emulator's own behaviour."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qaxis
from qaxis import decode
from qaxis.cuda import compiler, emulator
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

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


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_compiler)])
def test_prefill_in_chunks_selects_the_canonical_sets(backend):
    q, k, v = bell(2, 4, 60, 32), bell(2, 2, 300, 32, seed=1), bell(2, 2, 300, 32, seed=2)
    budget = qaxis.Budget(0.1, 8)
    out = prefill_attention(q, k, v, budget, selection=True, backend=backend, tuning=PrefillTuning(chunk=32))
    exact = qaxis.topk_attention(q, k, v, budget)
    assert torch.equal(selected_positions(out.bits), exact.indices)
    assert torch.allclose(out.output, exact.output, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "n, kind",
    # Lists that are short, or overflow; a sample first; a row that fills a program's shared memory by itself.
    [(n, kind) for n in (60, 300) for kind in ("normal", "zero query", "few that differ", "one long key")]
    + [(2600, "normal"), (9000, "normal")],
)
def test_select_cu_at_any_length(n, kind):
    q, k = bell(1, 2, 4, 64), bell(1, 1, n, 64, seed=1)
    if kind == "zero query":
        q = q * 0
    elif kind == "few that differ":
        k = k[:, :, :3].repeat(1, 1, -(-n // 3), 1)[:, :, :n].contiguous()
    elif kind == "one long key":
        k[:, :, n // 2] *= 300
    out = prefill_attention(q, k, k, n // 10, selection=True, backend="cuda")
    assert torch.equal(selected_positions(out.bits), qaxis.topk_indices(q, k, n // 10, causal=True))


def test_prefill_refuses_what_it_cannot_do():
    q, k = bell(1, 3, 4, 32), bell(1, 2, 10, 32)
    with pytest.raises(ValueError, match=r"q\.shape\[1\]=3"):
        prefill_attention(q, k, k, 5)
    with pytest.raises(ValueError, match=r"backend='fast'"):
        prefill_attention(q[:, :2], k, k, 5, backend="fast")
    with pytest.raises(ValueError, match=r"q\.shape\[2\]=4"):
        prefill_attention(q[:, :2], k[:, :, :3], k[:, :, :3], 2)
