"""A decode step that reads from the device how many keys there are: rows of a batch that see and keep different keys,
keys that are always kept, soft caps and sink logits."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch

from qaxis.attention import backend
from qaxis.attention.always import NONE, Always
from qaxis.attention.logits import Logits
from qaxis.decode import KeyIndex, index_cache, index_keys
from qaxis.decode.triton_step import TritonStep, Tuning
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side, Stored

#: several stretches, bests and candidates that do not fit into registers: little work takes every way
SMALL = Tuning(
    block=32, loop=2, threshold=32, stretch=128, lines=1, rescore=64, rescore_programs=6, choose=32, choose_out=64,
    attend=16,
)  # fmt: skip


def bell(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(x: torch.Tensor, grid: Grid | None = None, sinks: int = 0) -> Stored:
    side = Side(x, grid or Grid(), sinks)
    side.prepare(x)()
    return side.stored()


def rows_of(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor([(*row, -7) for row in rows], dtype=torch.int32)


class Given(NamedTuple):
    q: torch.Tensor
    k: Any
    v: Any
    index: KeyIndex


def given(
    batch: int, heads: int, kv_heads: int, n: int, dim: int, dtype: torch.dtype = torch.float32, form: str = "keys",
    size: int = 128, sinks: int = 0, seed: int = 0,
) -> Given:  # fmt: skip
    """Queries, keys, values and index; ``form`` is keys, codes (kept beside keys) or cache."""
    q, k, v = (
        bell(batch, h, m, dim, seed=seed + h + m).to(dtype) for h, m in ((heads, 1), (kv_heads, n), (kv_heads, n))
    )
    v = v.flip(2)
    if form == "cache":
        keys, values = (stored(x, Grid(8, "channel", size), sinks) for x in (k, v))
        return Given(q, keys, values, index_cache(keys))
    index = index_keys(k)
    if form == "codes":
        coded = index_keys(k, codes=True) if size == 128 else index_cache(stored(k.float(), Grid(8, "channel", size)))
        assert coded.codes is not None
        left_out = (k.float() - coded.codes.dequantized().float()).norm(dim=-1).amax(-1) * 1.01
        index = dataclasses.replace(coded, norm=index.norm + left_out, residual=left_out)
    return Given(q, k, v, index)


def exact(
    g: Given, rows: torch.Tensor, width: int, logits: Logits, always: Always
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and indices of the reference, each row alone over what it sees."""
    k, v = (x.dequantized() if isinstance(x, Stored) else x for x in (g.k, g.v))
    outputs, indices = [], []
    for b, (begin, end, k_eff, _) in enumerate(rows.tolist()):
        chosen = torch.full((1, g.q.shape[1], 1, width), -1)
        if k_eff:
            place = torch.arange(k.shape[2])
            allowed = ((place >= begin) & (place < end))[None, None, None]
            kept = torch.full((1, 1, 1), k_eff)
            one = g.q[b : b + 1], k[b : b + 1].nan_to_num(), allowed, kept
            found = backend.select(*one, backend="reference", always=always)
            chosen[..., : found.shape[3]] = found
        one = g.q[b : b + 1], k[b : b + 1].nan_to_num(), v[b : b + 1].nan_to_num(), chosen, logits
        outputs.append(backend.attend(*one, backend="reference"))
        indices.append(chosen)
    return torch.cat(outputs), torch.cat(indices)


def check(step: TritonStep, g: Given, rows: torch.Tensor, logits: Logits | None = None, always: Always = NONE) -> None:
    """What a step gives is the reference's, to the bit, whatever its work space held before."""
    for name in ("fast", "best", "position", "count", "flat_position", "flat_key"):
        space = getattr(step, name)
        space.view(torch.int16 if space.dtype == torch.uint16 else space.dtype).fill_(-3)
    step.top.fill_(torch.nan)
    logits = Logits(0.3) if logits is None else logits
    found = step(*g, rows=rows, logits=logits, always=always)
    output, indices = exact(g, rows, step.k_eff, logits, always)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.output, output)


# ---- what rows see ---------------------------------------------------------------------------------------------------

#: begin, end, k_eff: everything, a part, one key, nothing of something, nothing at all, all of what is seen
SEEN = rows_of((0, 300, 40), (37, 161, 9), (130, 131, 1), (5, 290, 0), (77, 77, 0), (250, 300, 50))


@pytest.mark.parametrize("form", ["keys", "codes"])
@pytest.mark.parametrize("tuning", [Tuning(), SMALL], ids=["usual", "small"])
def test_rows_see_and_keep_different_keys(form, tuning):
    step, g = TritonStep(6, 2, 300, 32, 50, "cpu", tuning), given(6, 2, 2, 300, 32, form=form)
    check(step, g, SEEN)


@pytest.mark.parametrize("form", ["keys", "codes"])
def test_keys_that_no_row_sees_are_not_looked_at(form):
    g, rows = given(2, 2, 1, 200, 32, form=form), rows_of((20, 190, 30), (3, 150, 30))
    for b, (begin, end, *_) in enumerate(rows.tolist()):
        for x in (g.k, g.v):
            x[b, :, :begin], x[b, :, end:] = torch.nan, torch.nan
    step = TritonStep(2, 2, 400, 32, 30, "cpu", SMALL)
    check(step, g, rows)
    assert int(step.count.sum()) <= 2 * (170 + 147)


def test_a_row_that_sees_nothing_gives_zero():
    g, rows = given(2, 2, 1, 50, 16), rows_of((9, 9, 0), (0, 50, 5))
    found = TritonStep(2, 2, 50, 16, 5, "cpu")(*g, rows=rows)
    assert bool((found.indices[0] == -1).all()) and not found.output[0].any() and found.output[1].all()


@pytest.mark.parametrize("form, sinks", [("keys", 0), ("codes", 0), ("cache", 0), ("cache", 3)])
def test_one_step_serves_a_growing_cache(form, sinks):
    step = TritonStep(2, 2, 500, 32, 40, "cpu", SMALL)
    for n in (490, 3, 128, 129, 383):
        g = given(2, 2, 1, n, 32, torch.bfloat16, form, sinks=sinks, seed=n)
        check(step, g, rows_of((0, n, min(n, 40)), (n // 3, n, min(n - n // 3, 7))))


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("form", ["codes", "cache"])
@pytest.mark.parametrize("n", [63, 270])
def test_groups_of_other_sizes(form, size, n):
    step, g = TritonStep(1, 3, 300, 32, 20, "cpu", SMALL), given(1, 3, 1, n, 32, torch.bfloat16, form, size, 3)
    check(step, g, rows_of((40, n, 20)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24, 256])
def test_sizes_and_dtypes(dtype, dim):
    g = given(1, 3, 1, 90, dim, dtype)
    check(TritonStep(1, 3, 100, dim, 17, "cpu"), g, rows_of((11, 90, 17)))


@pytest.mark.parametrize("group", range(1, 10))
def test_any_number_of_heads_shares_a_key_head(group):
    g = given(1, group, 1, 140, 16, form="codes" if group % 2 else "keys")
    check(TritonStep(1, group, 150, 16, 5, "cpu"), g, rows_of((2, 139, 5)))


@pytest.mark.parametrize("k_eff", [0, 1, 2, 50, 148, 149])
def test_from_none_to_everything(k_eff):
    check(TritonStep(1, 2, 160, 16, 149, "cpu", SMALL), given(1, 2, 1, 150, 16), rows_of((1, 150, k_eff)))


def test_ties_within_a_window_go_to_the_lower_position():
    g = given(1, 2, 1, 150, 16)
    k = g.k[:, :, :1].expand(1, 1, 150, 16).contiguous()
    found = TritonStep(1, 2, 150, 16, 40, "cpu")(g.q, k, g.v, index_keys(k), rows=rows_of((33, 140, 40)))
    assert torch.equal(found.indices, torch.arange(33, 73).expand(1, 2, 1, 40))


def test_bounds_that_are_no_numbers_leave_every_key_open():
    g, rows = given(1, 2, 1, 150, 16), rows_of((33, 140, 40))
    index = dataclasses.replace(g.index, norm=torch.full_like(g.index.norm, torch.nan))
    check(TritonStep(1, 2, 150, 16, 40, "cpu", SMALL), g._replace(index=index), rows)


# ---- what is always kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [Always(4, 0), Always(0, 6), Always(4, 6), Always(30, 30)])
@pytest.mark.parametrize("form", ["keys", "codes", "cache"])
def test_what_is_always_kept_counts(form, always):
    n, most = 200, 70
    step, g = TritonStep(4, 2, 260, 32, most, "cpu", SMALL), given(4, 2, 1, n, 32, torch.bfloat16, form, sinks=2)
    # Room for others, none, fewer visible keys than are always kept, and one.
    rows = rows_of((0, n, most), (13, n, sum(always)), (n - 9, n, 9), (n - 1, n, 1))
    check(step, g, rows, always=always)


def test_what_is_always_kept_is_not_among_the_fast_scores():
    # The best keys of all are always kept: were they counted, the cut would lie above all others.
    g = given(1, 1, 1, 200, 16)
    k = g.k.clone()
    k[:, :, :10], k[:, :, 190:] = 9 * g.q, 9 * g.q
    step = TritonStep(1, 1, 200, 16, 30, "cpu", SMALL)
    check(step, g._replace(k=k, index=index_keys(k)), rows_of((0, 200, 30)), always=Always(10, 10))
    # And what is kept of them is no candidate twice.
    assert int(step.count.sum()) < 100


# ---- logits ----------------------------------------------------------------------------------------------------------

LOGITS = [
    Logits(0.25, soft_cap=2.0), Logits(1.7, soft_cap=0.3), Logits(3.0, soft_cap=1e-30), Logits(0.1, soft_cap=50),
    Logits(0.25, sink=torch.tensor([0.5, -3.0, 40.0, 0.0])),
    Logits(0.25, soft_cap=30.0, sink=torch.tensor([-torch.inf, -100.0, 1.0, 0.1]).bfloat16()),
    Logits(0.25, sink=torch.arange(8.0)[1::2]),
]  # fmt: skip


@pytest.mark.parametrize("logits", LOGITS, ids=range(len(LOGITS)))
def test_soft_caps_and_sinks(logits):
    form, always = ("cache", NONE) if logits.sink is None else ("keys", Always(2, 1))
    step, g = TritonStep(3, 4, 150, 32, 30, "cpu", SMALL), given(3, 4, 2, 140, 32, form=form)
    check(step, g, rows_of((0, 140, 30), (90, 140, 0), (21, 140, 3)), logits, always)


@pytest.mark.parametrize("logits", [Logits(0.25), *LOGITS], ids=range(len(LOGITS) + 1))
def test_attention_over_given_keys(logits):
    from qaxis.attention import triton as kernels

    g = given(2, 4, 2, 70, 32)
    q = torch.cat([g.q, 30 * g.q, -g.q], 2)
    indices = torch.stack([torch.randperm(70)[:40].sort().values for _ in range(24)]).view(2, 4, 3, 40)
    indices[0, 0, 0, 5:], indices[1, 3, 2] = -1, -1
    right = backend.attend(q, g.k, g.v, indices, logits, backend="reference")
    assert torch.equal(kernels.attend(q, g.k, g.v, indices, logits, block=16, combine_block=2), right)
    assert torch.equal(backend.attend(q, g.k, g.v, indices, logits, backend="triton"), right)


# ---- what a captured step depends on ---------------------------------------------------------------------------------


class _Observed:
    """A kernel whose grids and arguments are noted: of tensors where they lie."""

    def __init__(self, kernel: Any, seen: list[object]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            # What the step returns is allocated anew each time.
            own = [(x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
            self.seen.append((grid, own, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("form", ["keys", "codes", "cache"])
def test_launches_depend_on_the_room_and_not_on_the_length(form, monkeypatch):
    from qaxis.attention import triton as attention
    from qaxis.decode import triton_step

    seen: list[object] = []
    for module in (triton_step, attention):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Observed(kernel, seen))
    step = TritonStep(1, 2, 300, 32, 20, "cpu", SMALL)
    whole = given(1, 2, 1, 290, 32, torch.bfloat16, form, sinks=2)
    launches = []
    for n in (290, 140, 30):
        g = whole._replace(k=_first(whole.k, n), v=_first(whole.v, n))
        codes = g.k if form == "cache" else _first(whole.index.codes, n) if form == "codes" else None
        g = g._replace(index=dataclasses.replace(whole.index, codes=codes))
        kept, logits = len(step.checked), Logits(0.3, 20.0, torch.zeros(2))
        seen.clear()
        found = step.run(*g, rows_of((0, n, 20)), logits, Always(1, 2))
        launches.append(list(seen))
        assert len(step.checked) == kept
        output, indices = exact(g, rows_of((0, n, 20)), 20, logits, Always(1, 2))
        assert torch.equal(found.indices, indices) and torch.equal(found.output, output)
    assert len(launches[0]) >= 6 and launches[0] == launches[1] == launches[2]


def _first(x: Any, n: int) -> Any:
    """The first ``n`` tokens at the same place in memory; the newest of a cache are copied into a whole group."""
    if not isinstance(x, Stored):
        return x[:, :, :n]
    size = x.grid.group_size
    whole = n - n % size
    newest = torch.full((*x.codes.shape[:2], size, x.dim), torch.nan, dtype=x.dtype)
    newest[:, :, : n - whole] = x.dequantized()[:, :, whole:n]
    return dataclasses.replace(
        x, codes=x.codes[:, :, :whole], scales=x.scales[:, :, : whole // size], newest=newest[:, :, : n - whole]
    )


# ---- form ------------------------------------------------------------------------------------------------------------

ROWS = rows_of((0, 90, 5), (0, 90, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": ROWS.tolist()}, "rows='list'"),
        ({"rows": ROWS[:1]}, r"rows\.shape=\(1, 4\)"),
        ({"rows": ROWS.long()}, r"rows\.dtype=torch\.int64"),
        ({"rows": ROWS.t().contiguous().t()}, r"rows\.stride\(\)=\(1, 2\)"),
        ({"rows": ROWS.to("meta")}, r"rows\.device='meta'"),
        ({"always": (1, 2)}, r"always=\(1, 2\)"),
        ({"always": Always(-1, 2)}, r"always\.sinks=-1"),
        ({"always": Always(2, True)}, r"always\.recent=True"),
        ({"always": Always(5, 4)}, r"always=Always\(sinks=5, recent=4\): allowed is at most 8 keys"),
        ({"logits": 0.5}, "logits='float'"),
        ({"logits": Logits(0.5), "scale": 0.5}, "scale=0.5: allowed is None beside logits"),
        ({"logits": Logits(-1.0)}, "scale=-1.0"),
        ({"logits": Logits(1.0, soft_cap=0.0)}, r"logits\.soft_cap=0.0"),
        ({"logits": Logits(1.0, soft_cap=float("inf"))}, r"logits\.soft_cap=inf"),
        ({"logits": Logits(1.0, soft_cap=1e31)}, r"logits\.soft_cap=1e\+31"),
        ({"logits": Logits(1.0, sink=torch.zeros(3))}, r"logits\.sink\.shape=\(3,\)"),
        ({"logits": Logits(1.0, sink=torch.zeros(2, dtype=torch.float64))}, r"logits\.sink\.dtype=torch\.float64"),
        ({"logits": Logits(1.0, sink=torch.zeros(2, device="meta"))}, r"logits\.sink\.device='meta'"),
    ],
)
def test_what_is_not_allowed_is_named(change, message):
    step, g = TritonStep(2, 2, 100, 16, 8, "cpu"), given(2, 2, 1, 90, 16)
    with pytest.raises(ValueError, match=f"^{message}"):
        step(*g, **({"rows": ROWS} | change))


def test_more_keys_than_there_is_room_for_are_named():
    step = TritonStep(2, 2, 80, 16, 8, "cpu")
    with pytest.raises(ValueError, match=r"^k\.shape\[2\]=90: allowed is at most 80"):
        step(*given(2, 2, 1, 90, 16), rows=ROWS)
    with pytest.raises(ValueError, match=r"^k\.shape\[2\]=70"):
        step(*given(2, 2, 1, 70, 16))


def test_a_cache_with_a_whole_group_among_its_newest_is_named():
    keys = stored(bell(1, 1, 300, 32))
    late = dataclasses.replace(
        keys, codes=keys.codes[:, :, :128], scales=keys.scales[:, :, :1], newest=keys.dequantized()[:, :, 128:]
    )
    g = Given(bell(1, 1, 1, 32), late, bell(1, 1, 300, 32), index_cache(late))
    with pytest.raises(ValueError, match=r"^k\.codes\.shape=\(1, 1, 128, 32\): allowed is 256 of 300 tokens"):
        TritonStep(1, 1, 300, 32, 8, "cpu")(*g)
