"""``qaxis.topk``: one set and one order, by PyTorch and by the kernels, emulated where there is no GPU."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import qaxis
from qaxis.cuda import emulator
from qaxis.cuda.compiler import SHARED_LIMIT
from qaxis.ranking import api
from qaxis.ranking import cuda as kernels
from selfcheck.inputs import score_rows
from selfcheck.inputs.score_rows import bits, stable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    not kernels.runs_on(torch.device(DEVICE), kernels.CAPABILITY) or (DEVICE == "cpu" and not emulator.available()),
    reason="compute capability 9.0, or g++ to emulate CUDA, is needed",
)
BACKENDS = ["reference", pytest.param("cuda", marks=needs_kernel)]
INF, NAN = math.inf, math.nan


def right(scores: torch.Tensor, k: int, order: str) -> torch.Tensor:
    """Indices by torch's stable sort, NaN put behind all."""
    indices = stable(scores)[..., :k]
    return indices if order == "rank" else indices.sort(dim=-1).values


def check(got: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, k: int, order: str) -> None:
    values, indices = got
    expected = right(scores, k, order)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert values.shape == indices.shape == (*scores.shape[:-1], k) and values.device == scores.device
    assert torch.equal(indices, expected)
    assert torch.equal(bits(values), bits(scores.gather(-1, expected)))


def check_all(scores: torch.Tensor, k: int, backend: str = "cuda") -> None:
    for order in api.ORDERS:
        check(qaxis.topk(scores, k, order=order, nan="last", backend=backend), scores, k, order)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def hard_rows(n: int) -> torch.Tensor:
    return score_rows.hard_rows(n, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 31, 1000])
def test_hard_rows(backend, n):
    rows = hard_rows(n)
    for k in {1, (n + 1) // 2, n}:
        check_all(rows, k, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k"), [(16384, 1), (17001, 300), (17001, 5000)])
def test_hard_long_rows(backend, n, k):
    check_all(hard_rows(n), k, backend)


#: how, room in the lists, place in the sample: too little of each leads to another look
WAYS = [
    (kernels.ALL_LISTED, None, 0), (kernels.READ, 0, 0), (kernels.BEST_LISTED, 4096, 200),
    (kernels.BEST_LISTED, 64, 200), (kernels.BEST_LISTED, 4096, 3), (kernels.BEST_LISTED, 4096, 4096),
]  # fmt: skip
#: n, k, programs of a row, threads of a program, and a way
PLANS = [(16400, 500, cluster, 512, *way) for cluster in (1, 2, 4, 8) for way in WAYS]
PLANS += [(n, k, 1, 128, *way) for n, k in ((3, 2), (700, 33)) for way in WAYS[:2]]


@needs_kernel
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan)))
def test_no_plan_changes_the_selection(plan):
    n, k, cluster, threads, how, capacity, rank = plan
    rows = hard_rows(n)
    span = kernels.rounded_up(-(-((n + 6) // 4) // cluster), 8)
    capacity = 4 * span if capacity is None else capacity
    shared = kernels._beside(threads, span) + 8 * capacity
    launch = kernels._kernel("select_rows", rows.device, cluster, threads)
    forced = kernels.Plan(cluster, threads, span, how, capacity, rank, shared)
    values, indices, missing = kernels.Selector(forced, k, False, launch, None)(rows)
    check((values, indices), rows, k, "position")
    assert torch.equal(missing.bool(), torch.isnan(rows).any(-1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_row_against_pythons_stable_sort(data):
    numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN]))
    row = data.draw(st.lists(numbers, min_size=1, max_size=40))
    k = data.draw(st.integers(1, len(row)))
    order = sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i]))[:k]
    scores = torch.tensor(row, device=DEVICE)
    for backend in ("reference", "cuda") if needs_kernel.args[0] is False else ("reference",):
        assert qaxis.topk(scores, k, order="rank", nan="last", backend=backend).indices.tolist() == order
        assert qaxis.topk(scores, k, nan="last", backend=backend).indices.tolist() == sorted(order)


def layouts() -> dict[str, torch.Tensor]:
    wide = random(3, 4, 2, 700)
    return {
        "a step of two": wide[..., ::2], "from the second": wide[..., 1:600], "from the third": wide[..., 2:],
        "from the fourth, odd rows": random(5, 701)[:, 3:], "expanded": random(1, 333).expand(6, 333),
        "expanded along the row": random(4, 1).expand(4, 50), "transposed": random(90, 7).t(),
        "permuted": wide[..., :9].permute(2, 0, 3, 1), "one row": random(129), "every other row": random(8, 70)[::2],
        "rows overlap": random(500).as_strided((9, 100), (3, 1)), "of one": random(4, 3, 1),
        "a column": random(40, 6)[:, 2:3],
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", layouts())
def test_any_strides(backend, layout):
    scores = layouts()[layout]
    for k in {1, scores.shape[-1] // 2 + 1 if scores.shape[-1] > 1 else 1, scores.shape[-1]}:
        check_all(scores, k, backend)


@needs_kernel
def test_long_rows_at_every_place_in_16_bytes():
    store = random(2, 16500)
    for start in range(4):
        check_all(store[:, start : start + 16399 + start], 200)


@needs_kernel
def test_kernels_read_no_byte_beside_the_rows():
    # Beside the rows stands what would be best.
    for start, end in ((1, 1003), (3, 1004), (2, 18001)):
        store = torch.full((3, end + 5), INF, device=DEVICE)
        store[:, start:end] = random(3, end - start)
        check_all(store[:, start:end], 17)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has no numbers at odd addresses")
@needs_kernel
def test_numbers_at_odd_addresses():
    data = bytearray(1) + bytearray(random(64).numpy().tobytes())
    scores = torch.frombuffer(data, dtype=torch.float32, offset=1)
    check_all(scores, 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
def test_no_rows_give_nothing(backend, shape):
    got = qaxis.topk(torch.empty(shape, device=DEVICE), 2, backend=backend)
    assert got.values.shape == got.indices.shape == (*shape[:-1], 2) and got.indices.dtype == torch.int64


def test_more_rows_than_a_grid_is_high():
    scores = (random(70000, 3) * 2).round()
    check_all(scores, 2, "auto")
    seen = []

    def launch(grid, block, args, shared_mem):
        seen.append(grid)

    kernels.Selector(kernels.plan_of(70000, 3, 2, 8), 2, False, launch, None)(scores)
    assert seen == [(70000, 1, 1)]


@needs_kernel
def test_many_ranks_are_sorted_by_torch(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_RANKED", 100)
    rows = hard_rows(300)
    check_all(rows, 101)
    assert kernels.selector_of(1, 300, 101, True, rows.device).rank is None
    assert kernels.selector_of(1, 300, 100, True, rows.device).rank is not None


def test_rows_in_parts(monkeypatch):
    monkeypatch.setattr(api.reference, "CHUNK_ELEMENTS", 100)
    check_all(hard_rows(300), 50, "reference")


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [8, 114, 132])
def test_every_plan_fits(multiprocessors):
    kinds = set()
    for rows in (1, 2, 32, 64, 128, 1024, 100000):
        for n in (1, 5, 500, 4096, 8192, 16383, 16384, 32768, 131072, 262144, 1 << 20, 5000001, (1 << 31) - 1):
            for k in {1, min(n, 256), min(n, 2048), n // 2 + 1, n}:
                plan = kernels.plan_of(rows, n, k, multiprocessors)
                kinds.add(plan.how)
                assert plan.shared <= SHARED_LIMIT and plan.cluster in (1, 2, 4, 8) and plan.span % 8 == 0
                # Every load of a row that begins anywhere in 16 bytes is somebody's.
                assert plan.cluster * plan.span >= (n + 3 + 3) // 4 and plan.cluster * plan.span < 1 << 30
                if plan.how == kernels.BEST_LISTED:
                    size = kernels.SAMPLED * plan.threads
                    assert k * size / n < plan.rank <= size / 2 and k < plan.cluster * plan.capacity
                    assert n // 4 - 2 >= size // 4
                if plan.how == kernels.ALL_LISTED:
                    assert plan.capacity == 4 * plan.span
    assert kinds == {kernels.ALL_LISTED, kernels.BEST_LISTED, kernels.READ}


def test_few_rows_are_shared_by_more_programs():
    shared = {rows: kernels.plan_of(rows, 131072, 2048, 132).cluster for rows in (1, 16, 17, 49, 50, 99, 100, 5000)}
    assert shared == {1: 8, 16: 8, 17: 4, 49: 4, 50: 2, 99: 2, 100: 1, 5000: 1}
    assert [kernels.plan_of(1, n, 9, 132).cluster for n in (8191, 8192, 16384, 32768)] == [1, 2, 4, 8]


@needs_kernel
def test_few_and_many_short_rows():
    assert kernels.plan_of(40, 50, 3, 8).threads == kernels.FEW_THREADS
    assert kernels.plan_of(4, 50, 3, 8).threads == kernels.THREADS
    check_all((random(40, 50) * 3).round(), 3)


# ---- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_refused_by_its_place(backend):
    scores = random(2, 3, 90)
    check(qaxis.topk(scores, 5, backend=backend), scores, 5, "position")
    scores[1, 2, 88] = -NAN
    with pytest.raises(ValueError, match=re.escape("scores[(1, 2, 88)]=nan: allowed is numbers")):
        qaxis.topk(scores, 5, backend=backend)
    long = random(2, 20000)
    long[1, 19999] = NAN
    with pytest.raises(ValueError, match=re.escape("scores[(1, 19999)]=nan")):
        qaxis.topk(long, 5, backend=backend)
    infinite = torch.tensor([INF, -INF, 0.0], device=DEVICE)
    assert qaxis.topk(infinite, 2, backend=backend).indices.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scores=", lambda x: qaxis.topk(x.tolist(), 1)),
        ("scores.dtype", lambda x: qaxis.topk(x.half(), 1)),
        ("scores.dtype", lambda x: qaxis.topk(x.bfloat16(), 1)),
        ("scores.dtype", lambda x: qaxis.topk(x.double(), 1)),
        ("scores.dtype", lambda x: qaxis.topk(x.int(), 1)),
        ("scores.shape=", lambda x: qaxis.topk(x[0, 0], 1)),
        ("scores.shape\\[-1\\]=0", lambda x: qaxis.topk(x[:, :0], 1)),
        ("scores.layout", lambda x: qaxis.topk(x.to_sparse(), 1)),
        ("scores.device", lambda x: qaxis.topk(x.to("meta"), 1)),
        ("k=0", lambda x: qaxis.topk(x, 0)),
        ("k=-1", lambda x: qaxis.topk(x, -1)),
        ("k=9", lambda x: qaxis.topk(x, 9)),
        ("k=True", lambda x: qaxis.topk(x, True)),
        ("k=2.0", lambda x: qaxis.topk(x, 2.0)),
        ("order", lambda x: qaxis.topk(x, 1, order="value")),
        ("nan", lambda x: qaxis.topk(x, 1, nan="first")),
        ("backend", lambda x: qaxis.topk(x, 1, backend="triton")),
    ],
)
def test_what_does_not_fit_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name}.*allowed is"):
        call(random(2, 8))


def test_kernels_that_are_not_there_are_said_to_be(monkeypatch):
    monkeypatch.setattr(api, "selector_of", lambda *_: None)
    check_all(random(2, 8), 3, "auto")
    with pytest.raises(ValueError, match="^backend='cuda': allowed is 'auto' or 'reference'"):
        qaxis.topk(random(2, 8), 3, backend="cuda")


def test_a_kernel_that_cannot_be_compiled_leaves_it_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda *_, **__: None)
    for by_rank in (False, True):
        assert kernels.selector_of(2, 8, 3, by_rank, torch.device(DEVICE)) is None


def test_what_a_capture_cannot_do_is_refused_in_it(monkeypatch):
    monkeypatch.setattr(api, "captured", lambda _: True)
    with pytest.raises(ValueError, match="^nan='raise': allowed is nan='last' while a CUDA graph is captured"):
        qaxis.topk(random(2, 8), 3)
    check(qaxis.topk(random(2, 8), 3, nan="last"), random(2, 8), 3, "position")


class NothingAskedFor(TorchDispatchMode):
    """Fails where numbers are brought to the host, or decide how long something is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", api.ORDERS)
def test_with_nan_last_nothing_waits_for_the_device(backend, order):
    scores = hard_rows(500)
    with NothingAskedFor():
        got = qaxis.topk(scores, 40, order=order, nan="last", backend=backend)
        with pytest.raises(AssertionError):
            qaxis.topk(scores[:1], 40, order=order, backend=backend)
    check(got, scores, 40, order)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("order", api.ORDERS)
@pytest.mark.parametrize(("n", "k"), [(300, 40), (70000, 600)])
def test_a_captured_call_replays_on_other_scores(order, n, k):
    scores = hard_rows(n)
    qaxis.topk(scores, k, order=order, nan="last")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = qaxis.topk(scores, k, order=order, nan="last")
    for seed in range(3):
        scores.copy_(hard_rows(n) if seed == 0 else random(*scores.shape, seed=seed))
        graph.replay()
        check(got, scores, k, order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", api.ORDERS)
def test_gradients_are_those_of_torch(backend, order):
    a, b = (random(4, 60).requires_grad_() for _ in range(2))
    weights = random(4, 7, seed=1)
    got = qaxis.topk(a, 7, order=order, backend=backend)
    (got.values * weights).sum().backward()
    (b.gather(-1, right(b.detach(), 7, order)) * weights).sum().backward()
    assert torch.equal(a.grad, b.grad) and not got.indices.requires_grad
    with torch.no_grad():
        assert not qaxis.topk(a, 7, order=order, backend=backend).values.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_gradients_too(backend):
    scores, tangent = random(4, 60), random(4, 60, seed=1)
    with forward_ad.dual_level():
        got = qaxis.topk(forward_ad.make_dual(scores, tangent), 7, backend=backend)
        found = forward_ad.unpack_dual(got.values).tangent
    assert torch.equal(found, tangent.gather(-1, got.indices))


def test_scores_stay_as_they_are_and_results_are_their_own():
    scores = random(3, 40)
    before = scores.clone()
    got = qaxis.topk(scores, 40)
    got.values.zero_()
    assert torch.equal(scores, before)


def test_a_compiled_caller_gets_the_same():
    scores = hard_rows(200)
    compiled = torch.compile(lambda x: qaxis.topk(x * 1.0, 20, nan="last"), backend="eager")
    check(compiled(scores), scores, 20, "position")
