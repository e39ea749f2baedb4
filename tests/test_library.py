"""The library: against brute force, and what it does with bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.arithmetic.rounding import order_error_bound
from qaxis.attention.logits import Logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ROOT = Path(__file__).parents[1]


def tensors(heads=4, kv_heads=2, m=3, n=40, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, m, dim, generator=g)
    k, v = torch.randn(2, 2, kv_heads, n, dim, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def brute_force(q, k, budget, causal):
    """Full stable sort of canonical scores, row by row."""
    scores = qaxis.canonical_scores(q, k)
    m, n = scores.shape[2:]
    rows = []
    for i in range(m):
        visible = n - m + i + 1 if causal else n
        order = torch.argsort(canonical.sort_key(scores[:, :, i, :visible]), dim=-1, descending=True, stable=True)
        rows.append(order[..., : budget.k_eff(visible)].sort(-1).values)
    width = max(r.shape[-1] for r in rows)
    return torch.stack([torch.nn.functional.pad(r, (0, width - r.shape[-1]), value=-1) for r in rows], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 2, 3, 40, 16), (3, 1, 20, 20, 80), (7, 1, 1, 200, 96), (8, 1, 5, 129, 32), (1, 1, 1, 1, 64)]
)
def test_both_backends_are_the_brute_force_set_and_the_same_bits(dtype, causal, shape):
    q, k, v = tensors(*shape, dtype=dtype)
    budget = qaxis.Budget(0.2, 3)
    a = qaxis.topk_attention(q, k, v, budget, causal=causal, backend="reference")
    b = qaxis.topk_attention(q, k, v, budget, causal=causal, backend="triton")
    assert torch.equal(a.indices, brute_force(q, k, budget, causal))
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.output.float().view(torch.int32), b.output.float().view(torch.int32))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_near_ties_attack_the_certified_band(data):
    n, dim = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 70))
    q, k, _ = tensors(2, 1, 2, n, dim, seed=data.draw(st.integers(0, 10**6)))
    step = data.draw(st.sampled_from([0.0, 2.0**-24, 2.0**-23, 2.0**-22, 2.0**-12]))
    k = k[:, :, :1] * (1 + torch.randint(-2, 3, (1, 1, n, 1), generator=torch.Generator().manual_seed(n)) * step)
    budget = qaxis.Budget(0, data.draw(st.integers(1, n)))
    assert torch.equal(qaxis.topk_indices(q, k, budget, causal=False), brute_force(q, k, budget, False))


def test_close_to_dense_attention_when_every_key_is_kept():
    q, k, v = tensors()
    ours = qaxis.topk_attention(q, k, v, 40, causal=False).output
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(ours, dense, atol=1e-6)


def test_scaling_by_a_power_of_two_changes_no_index():
    q, k, _ = tensors()
    assert torch.equal(qaxis.topk_indices(q, k, 7), qaxis.topk_indices(q * 2.0**20, k, 7))


def test_split_of_the_work_changes_no_bit():
    from qaxis.attention import triton as kernels

    q, k, v = tensors(n=300)
    index = qaxis.topk_indices(q, k, 290)
    cuts = ((16, 4), (64, 64), (512, 2))
    outputs = [kernels.attend(q, k, v, index, Logits(0.25), block=b, combine_block=c) for b, c in cuts]
    assert all(torch.equal(outputs[0], o) for o in outputs)
    whole = qaxis.topk_attention(q, k, v, 290)
    one = qaxis.topk_attention(q[:1, :, -1:], k[:1], v[:1], 290)
    assert torch.equal(whole.output[:1, :, -1:], one.output)


def test_non_contiguous_input_gives_the_same_bits():
    q, k, v = tensors()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[1].is_contiguous()
    for backend in ("reference", "triton"):
        a = qaxis.topk_attention(q, k, v, 9, backend=backend)
        b = qaxis.topk_attention(*strided, 9, backend=backend)
        assert torch.equal(a.output, b.output) and torch.equal(a.indices, b.indices)


def test_ties_go_to_the_lower_position_and_zero_query_ties_all():
    q, k, _ = tensors()
    expected = torch.arange(5).expand(2, 4, 3, 5)
    assert torch.equal(qaxis.topk_indices(torch.zeros_like(q), k, 5), expected)
    assert torch.equal(qaxis.topk_indices(q, k[:, :, :1].expand(-1, -1, 40, -1), 5), expected)


def test_rounding_bounds_grow_with_the_tree_and_hold():
    q, k, _ = tensors(n=30, dim=48)
    exact = q.double().reshape(2, 2, 6, 48) @ k.double().transpose(-1, -2)
    error = (qaxis.canonical_scores(q, k).double() - exact.reshape(2, 4, 3, 30)).abs()
    bound = order_error_bound(q, k)
    assert bool((error <= bound).all()) and bool((bound <= 10.1 * 2.0**-24 * (error * 0 + 500)).all())
    with pytest.raises(ValueError, match="k.dtype"):
        order_error_bound(q, k.half())


def test_exp2_is_within_two_ulp():
    t = torch.linspace(-149, 127.9, 400001)
    exact = torch.exp2(t.double())
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)) - exact.float()
    assert float(((canonical.exp2(t).double() - exact).abs() / ulp.double()).max()) <= 2
    assert canonical.exp2(torch.tensor([-151.0, 0.0, 1.0])).tolist() == [0.0, 1.0, 2.0]


def test_overflowing_products_are_refused_by_both_backends():
    q, k, v = tensors()
    for backend in ("reference", "triton"):
        with pytest.raises(ValueError, match="score"):
            qaxis.topk_attention(q * 1e25, k * 1e25, v, 5, backend=backend)


def test_entropy_of_uniform_attention_and_fit():
    q, k, _ = tensors()
    h = qaxis.attention_entropy(torch.zeros_like(q), k, causal=False)
    assert torch.allclose(h, torch.full_like(h, 40.0).log())
    fit = qaxis.fit_entropy_scaling([64, 256, 1024], [[0.5 * torch.tensor(n).log() + 1 for n in (64, 256, 1024)]])
    assert fit.alpha == pytest.approx(0.5) and fit.r_squared == pytest.approx(1)
    with pytest.raises(ValueError, match="lengths"):
        qaxis.fit_entropy_scaling([64, 64, 64], [[1, 1, 1]])


def change(x, value):
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("q", lambda q, k, v: (change(q, torch.nan), k, v, 5)),
        ("k", lambda q, k, v: (q, change(k, torch.inf), v, 5)),
        ("v", lambda q, k, v: (q, k, change(v, -torch.inf), 5)),
        ("budget", lambda q, k, v: (q, k, v, 0)),
        ("budget", lambda q, k, v: (q, k, v, -3)),
        ("budget", lambda q, k, v: (q, k, v, 41)),
        ("budget", lambda q, k, v: (q, k, v, 2.5)),
        ("budget", lambda q, k, v: (q, k, v, True)),
        ("multiple", lambda q, k, v: (q[:, :3], k, v, 5)),
        ("head_dim", lambda q, k, v: (q[..., :8], k, v, 5)),
        ("batch", lambda q, k, v: (q[:1], k, v, 5)),
        ("v.shape", lambda q, k, v: (q, k, v[:, :, :7], 5)),
        ("k.dtype", lambda q, k, v: (q, k.half(), v, 5)),
        ("v.dtype", lambda q, k, v: (q, k, v.half(), 5)),
        ("q.dtype", lambda q, k, v: (q.double(), k.double(), v.double(), 5)),
        ("q.shape", lambda q, k, v: (q[0], k, v, 5)),
        ("q.shape", lambda q, k, v: (q[:, :, :0], k, v, 5)),
        ("queries are the last", lambda q, k, v: (q, k[:, :, :2], v[:, :, :2], 1)),
        ("k.device", lambda q, k, v: (q, k.to("meta"), v, 5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_input_is_named(name, edit, backend):
    *qkv, budget = edit(*tensors())
    with pytest.raises(ValueError, match=name):
        qaxis.topk_attention(*qkv, budget, backend=backend)


def test_bad_scale_backend_budget_and_zero_query():
    q, k, v = tensors()
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            qaxis.topk_attention(q, k, v, 5, scale=scale)
    with pytest.raises(ValueError, match="backend"):
        qaxis.topk_indices(q, k, 5, backend="cuda")
    for arguments in ((-0.1, 1), (1.5, 1), (0.1, 0), (0.1, 1.5)):
        with pytest.raises(ValueError, match="coverage|minimum"):
            qaxis.Budget(*arguments)
    with pytest.raises(ValueError, match="zero vector"):
        qaxis.unit_query(torch.zeros(2, 3))


def test_budget_counts_decimals_exactly():
    assert [qaxis.Budget(0.1, 1).k_eff(n) for n in (1, 10, 11, 640, 70)] == [1, 1, 2, 64, 7]
    assert qaxis.Budget(0.1, 64).k_eff(10) == 10


@pytest.mark.parametrize("folder", ["models", "storage"])
def test_contributing_names_every_module_of_the_two_largest_folders(folder):
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text[text.index(f"| in `{folder}/` | is |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    there = {path.name for path in (ROOT / "src" / "qaxis" / folder).glob("*.py")} - {"__init__.py"}
    assert named == there, (named - there, there - named)
