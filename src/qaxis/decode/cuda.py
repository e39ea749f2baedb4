"""The decode step in CUDA C++: two kernels where Triton launches six, with the same indices and bits.

It needs clusters of programs, so compute capability 9.0; on a CPU it is emulated, thread by thread, to be checked.
:func:`refusal` looks at how the numbers lie. All else a step depends on is its :class:`Shape`, and what changes with a
token lies in device memory (``rows.py``): no argument of a launch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import exponent_factor, next_power_of_two
from ..attention.always import NONE, Always
from ..attention.logits import Logits
from ..cuda import compiler
from ..cuda.compiler import ELEMENTS, MOST_STRIDE, SHARED_LIMIT, in_16_bytes, readable, runs_on, start_of, units
from ..cuda.emulator import MOST_ROWS
from ..storage.formats import EIGHT
from ..storage.moments import Moments
from ..storage.side import Stored
from .form import Numbers
from .index import KeyIndex

HERE = Path(__file__).parent
SCORE_KEYS, SCORE_CODES, CHOOSE = (HERE / f"{name}.cu" for name in ("score_keys", "score_codes", "choose"))
#: what all three share, and what choose.cu consists of, in the order in which it is compiled
SHARED_PARTS = tuple(HERE / f"{name}.cuh" for name in ("seen", "tally"))
STAGES = tuple(
    HERE / f"{name}.cuh"
    for name in ("numbers", "counts", "program", "logits", "candidates", "scores", "edge", "tail", "choice", "attend")
)
#: what completion adds: shared (two), to what scores keys, to what chooses and attends
LINE_PART, RUN_PART, FIT_PART, COMPLETE_PART = (HERE / f"{name}.cuh" for name in ("line", "run", "fit", "complete"))
#: dtypes of sink logits, as attend.cuh numbers them
SINKS = {**ELEMENTS, torch.float64: 3}
#: needed by choose.cu
CAPABILITY = (9, 0)
#: as in seen.cuh, keys of a block, whose chosen ones are counted together; as in program.cuh, keys in the bin of the
#: last chosen one that are compared with each other, against the slower way, and times of a profile
BLOCK, NEAR, MARKS = 512, 112, 13
#: as in line.cuh: where a row's sums of values begin, behind those of its scores
VALUES = 4
#: as in tally.cuh: counts of a row's keys; neighbours whose best is kept
TALLY, SUB = 2048, 16
#: keys of a group of codes
TILE = 128
#: candidates that there is room for, of the keys kept, and more: a fiftieth more, and what codes are off by
CANDIDATES, MORE = 3, 1024
#: programs of a row, at most: more share its work, and wait longer for each other; 8 run on every GPU with clusters
MOST_PROGRAMS = 8
#: chosen keys whose values a team of lanes loads at once: more loads in flight, more registers
MOST_RANKS = 8
#: query heads of a key head that the kernels have registers for
MOST_GROUP = 8
#: candidates that a program has room for: beside so many another program fits on a multiprocessor; at most
SHARED_ROOM, MOST_ROOM = 4096, 20480
#: keys from which on scores take so long that programs may wait for a multiprocessor to themselves
LONG = 1 << 19
#: products of 16 keys whose codes a warp has asked for
AHEAD = 3
#: score programs that a multiprocessor runs at the same time: of keys, of codes by head_dim (registers allow no more)
KEYS_AT_ONCE, CODES_AT_ONCE = 3, {64: 4, 128: 4, 256: 2}
#: multiprocessors that the emulator pretends to have, as many as an H200
EMULATED_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """All that the kernels and the work space of a step depend on, so that steps can be kept by it."""

    batch: int
    heads: int
    kv_heads: int
    #: places of keys, at most
    n: int
    head_dim: int
    dim_v: int
    #: keys that a row keeps, at most
    k_eff: int
    dtype: torch.dtype
    device: torch.device
    #: numbers of ``dtype`` in 16 bytes
    each: int
    #: keys are scored by 8-bit codes first
    coded: bool
    #: keys and values are 8-bit caches
    stored: bool
    #: some keys are always kept
    forced: bool
    #: as LOGITS in choose.cu
    logits: int
    #: what is left out is put back
    completed: bool = False

    @property
    def rows(self) -> int:
        """Query heads of all batches."""
        return self.batch * self.heads

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads


class Variant(NamedTuple):
    """Fields of a :class:`Shape` that follow from what a step is asked beside queries, keys and values."""

    forced: bool = False
    logits: int = 0
    completed: bool = False


PLAIN = Variant()


def variant_of(always: Always, logits: Logits | None, completion: str = "none") -> Variant:
    """What of these is compiled into a step. Their numbers are not, nor is what kind of completion it is."""
    kind = 0 if logits is None or logits.plain else 1 if logits.soft_cap is None else 2
    return Variant(always != NONE, kind, completion != "none")


def shape_of(
    q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, n: int, k_eff: int,
    variant: Variant = PLAIN,
) -> Shape:  # fmt: skip
    """The shape of a step over at most ``n`` places that keeps at most ``k_eff`` keys."""
    return Shape(
        batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], n=n, head_dim=k.shape[3], dim_v=v.shape[3],
        k_eff=k_eff, dtype=q.dtype, device=q.device, each=in_16_bytes(q),
        coded=index.codes is not None, stored=isinstance(k, Stored), **variant._asdict(),
    )  # fmt: skip


def takes(q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> bool:
    """Whether the kernels can read these as they lie: sizes, formats, strides and alignment."""
    return not refusal(q, k, v, index)


def refusal(q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> str:
    """Why the kernels cannot read these as they lie, or nothing if they can; how many tokens there are is no reason."""
    if q.shape[1] // k.shape[1] > MOST_GROUP:
        return f"{q.shape[1] // k.shape[1]} query heads share a key head, more than {MOST_GROUP}"
    if q.shape[0] * q.shape[1] > MOST_ROWS:
        return f"{q.shape[0] * q.shape[1]} rows, more than {MOST_ROWS}"
    # Kernels take the strides of q in numbers, as 32 bits.
    if max(units(q, 1)) >= MOST_STRIDE:
        return "the strides of q are too large"
    parts: list[torch.Tensor | None] = [q]
    if isinstance(k, Stored) or isinstance(v, Stored):
        if not (isinstance(k, Stored) and isinstance(v, Stored) and _alike(k, v)):
            return "keys and values are not two caches of 8 bits per channel of bfloat16, alike"
        parts += [part for x in (k, v) for part in (x.codes, x.scales, x.first, x.newest)]
    else:
        parts += [k, v]
    if index.codes is not None:
        if q.shape[3] not in CODES_AT_ONCE:
            return f"codes of head_dim {q.shape[3]}, not {', '.join(map(str, CODES_AT_ONCE))}"
        if index.codes.grid != EIGHT or index.largest_scales.data_ptr() % 16:
            return "codes that are not 8 bits in groups of 128, or bounds that are not aligned"
        parts += [index.codes.codes, index.codes.scales]
    if not readable(in_16_bytes(q), (q.shape[3], v.shape[3]), *parts):
        return "head_dim is no power of two that fits, or rows of numbers are not whole, aligned loads"
    return ""


def _alike(k: Stored, v: Stored) -> bool:
    """Whether one set of sizes describes both caches, as choose.cu has but one."""
    grids = k.grid == v.grid == EIGHT and k.dtype == v.dtype == torch.bfloat16
    return grids and k.codes.shape[2] == v.codes.shape[2] and k.first.shape[2] == v.first.shape[2]


@dataclass(frozen=True)
class Plan:
    """How the work of a step is cut; no value changes a bit of the result."""

    #: keys of a row, whole blocks
    padded: int
    #: programs of a row, and threads of each
    cluster: int
    threads: int
    #: candidates that a program has room for
    room: int
    #: chosen keys that a team loads at once, how often it does, and those of a program, at most
    ranks: int
    turns: int
    span: int
    #: bytes of ``Shared`` in program.cuh, and of all shared memory
    fixed: int
    shared: int
    #: programs that score the keys of one head
    score_programs: int


def _fixed_bytes(dim_v: int, cluster: int, threads: int) -> int:
    """Size of ``Shared`` in program.cuh."""
    warps = threads // 32
    return 4 * (TALLY + 2 * NEAR * (cluster + 1) + cluster + warps + 10 + (warps + cluster) * (dim_v + 1))


def _room(shape: Shape, cluster: int, own: int) -> int:
    """Candidates that a program with ``own`` blocks has room for; more are looked for in a slower way."""
    room = CANDIDATES * shape.k_eff // cluster + MORE
    if room > SHARED_ROOM and cluster > 1:
        # Less, so that two programs fit on a multiprocessor: of many keys fewer more.
        room = max(SHARED_ROOM, CANDIDATES * shape.k_eff // (2 * cluster) + MORE)
    return max(own * 8, min(own * BLOCK, room, MOST_ROOM))


def _score_programs(shape: Shape, multiprocessors: int) -> int:
    """As many as run at the same time, if each of their four warps has some keys."""
    at_once = CODES_AT_ONCE[shape.head_dim] if shape.coded else KEYS_AT_ONCE
    # One more fits a line.
    most = max(1, at_once * multiprocessors // (shape.batch * shape.kv_heads) - shape.completed)
    tile = TILE if shape.coded else 16 * 32 * shape.each // shape.head_dim
    return min(most, -(-shape.n // (4 * tile)))


def _ring(shape: Shape) -> int:
    """Bytes of codes that the four warps of a program in score_codes.cu have asked for, or ``FitSpace`` of fit.cuh."""
    ring = 4 * AHEAD * 16 * shape.head_dim
    return max(ring, 4 * shape.group * (2 * shape.head_dim + shape.dim_v)) if shape.completed else ring


def plan_of(shape: Shape, multiprocessors: int) -> Plan | None:
    """How a GPU with so many multiprocessors does it, or None if its shared memory is too small."""
    n, k_eff = shape.n, shape.k_eff
    padded = -(-n // BLOCK) * BLOCK
    blocks = padded // BLOCK
    # One program a multiprocessor.
    cluster = min(MOST_PROGRAMS, 1 << max(0, (multiprocessors // shape.rows).bit_length() - 1))
    own = -(-blocks // cluster)
    # Two smaller programs a multiprocessor, as clusters of large ones do not fit on all of them.
    threads = 1024 if cluster == 1 else 512
    teams = threads // (shape.dim_v // shape.each)
    share = max(1, next_power_of_two(k_eff) // cluster // teams)
    ranks = min(MOST_RANKS, share)
    turns = max(1, share // ranks)
    span, room = turns * ranks * teams, _room(shape, cluster, own)
    fixed = _fixed_bytes(shape.dim_v, cluster, threads)
    shared = -(-fixed // 16) * 16 + 4 * (2 * room + own + blocks + 16 * own + 2 * span)
    # Clusters of programs that fill a multiprocessor each do not all fit at once, and the last would wait for the
    # first: no matter where the scores take much longer than the rest.
    at_once = cluster == 1 or 2 * (shared + 1024) <= SHARED_LIMIT + 1024 or n >= LONG
    if shared > SHARED_LIMIT or span * cluster < k_eff or not at_once:
        return None
    programs = _score_programs(shape, multiprocessors)
    return Plan(padded, cluster, threads, room, ranks, turns, span, fixed, shared, programs)


def _kernels(shape: Shape, plan: Plan, profile: bool) -> tuple[Any, Any] | None:
    """The kernels that score and that choose and attend, or None if they cannot be compiled."""
    common = {"elem": ELEMENTS[shape.dtype], "dim": shape.head_dim, "group": shape.group}
    forced, before, stages = {"forced": int(shape.forced)}, SHARED_PARTS, STAGES
    common["completed"] = int(shape.completed)
    own = dict(common)
    if shape.completed:
        # Capped logits are too dear for the score kernels.
        common["summed"] = int(shape.logits < 2)
        own |= {"dim_v": shape.dim_v, "logits": shape.logits, "summed": common["summed"]}
        before, stages = (*before, LINE_PART, RUN_PART), (*stages, COMPLETE_PART)
    fit = (FIT_PART,) if shape.completed else ()
    if shape.coded:
        memory = _ring(shape)
        score = compiler.compiled(SCORE_CODES, "score_codes", memory, shape.device, before + fit, **own, ahead=AHEAD)
    else:
        score = compiler.compiled(SCORE_KEYS, "score_keys", 0, shape.device, before + fit, **own, **forced)
    choose = compiler.compiled(
        CHOOSE, "choose_and_attend", plan.shared, shape.device, before + stages, True, **common, **forced,
        dim_v=shape.dim_v, cluster=plan.cluster, threads=plan.threads, ranks=plan.ranks,
        levels=plan.turns.bit_length() - 1, coded=int(shape.coded), stored=int(shape.stored), logits=shape.logits,
        profile=int(profile), shared=plan.fixed,
    )  # fmt: skip
    return None if score is None or choose is None else (score, choose)


class _Buffers:
    """Work space of a step; what one kernel leaves there the other reads."""

    def __init__(self, shape: Shape, plan: Plan, profile: bool) -> None:
        def empty(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=shape.device)

        self.word = empty(shape.rows, plan.padded)
        self.fast = empty(shape.rows, plan.padded, dtype=torch.uint16) if shape.coded else self.word
        self.best = empty(shape.rows, plan.padded // SUB, dtype=self.fast.dtype)
        self.units = empty(shape.rows, dtype=torch.float32)
        # By how many places the 16-bit scores of a group may be off.
        self.off = empty(shape.rows, plan.padded // TILE if shape.coded else 0, dtype=torch.float32)
        self.count = empty(shape.rows, plan.cluster)
        self.marks = empty(shape.rows, plan.cluster, MARKS, dtype=torch.int64) if profile else self.count
        # As line.cuh has it: of each row sums of scores, from VALUES on of values, and of both.
        self.line = empty(shape.rows, VALUES + 2 * shape.dim_v if shape.completed else 0, dtype=torch.float32)
        # Of every SUB neighbours mass and excess, as run.cuh has them.
        self.sums = empty(shape.rows, plan.padded // SUB if shape.completed else 0, 2, dtype=torch.float32)
        # Counts of keys, as tally.cuh has them: all 0 before a step, and after it.
        self.tally = empty(shape.rows, TALLY).zero_()


class CudaStep:
    """Work space and kernels for decode steps of one shape, over what :func:`takes` allows.

    Args:
        shape, plan: what the step depends on, and how its work is cut.
        kernels: those that score, and that choose and attend.
        profile: write the time of each phase to ``marks``, int64 ``[B * H, cluster, MARKS]``, nanoseconds.
    """

    def __init__(self, shape: Shape, plan: Plan, kernels: tuple[Any, Any], profile: bool) -> None:
        self.shape, self.plan, self.profile = shape, plan, profile
        self.score_kernel, self.choose_kernel = kernels
        self.buffers = _Buffers(shape, plan, profile)
        #: int32 ``[B * H, cluster]``: candidates of every program of a row
        self.count, self.marks = self.buffers.count, self.buffers.marks

    def run(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor, logits: Logits,
        always: Always = NONE, completion: str = "none", moments: Moments | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Output and indices, as :meth:`choose` has them; with completion if the shape is ``completed``, else without.

        Args:
            completion: ``"mean"`` or ``"linear"`` with ``moments``, of the rows' complete groups of keys.
        """
        self.score(q, k, index, rows, always, completion, moments, logits)
        return self.choose(q, k, v, index, rows, logits, always, completion)

    def score(
        self, q: torch.Tensor, k: Numbers, index: KeyIndex, rows: torch.Tensor, always: Always = NONE,
        completion: str = "none", moments: Moments | None = None, logits: Logits | None = None,
    ) -> None:  # fmt: skip
        """Scores of every key that ``rows`` see, canonical ones or fast ones by codes; with completion, lines too."""
        shape, plan, work = self.shape, self.plan, self.buffers
        grid, block = (plan.score_programs + shape.completed, shape.batch * shape.kv_heads, 1), (128, 1, 1)
        fit: list[Any] = []
        if shape.completed:
            assert moments is not None and logits is not None
            fit = [*moments, work.line, int(completion == "linear"), work.sums, *_of_logits(logits, q)[:2]]
        sizes = (shape.heads, shape.kv_heads, plan.padded, shape.n, shape.k_eff)
        strides = units(q, 1)[:2]
        if index.codes is not None:
            c = index.codes
            left_out, strides_of_left_out = _left_out(index)
            self.score_kernel(grid, block, [
                q, start_of(c.codes, q), start_of(c.scales, q), index.norm, left_out, index.largest_scales, rows,
                work.fast, work.best, work.units, work.off, work.tally, *sizes, c.first.shape[2], *always,
                *strides, *units(c.codes, shape.each), *units(c.scales, shape.each),
                *strides_of_left_out, fast_scores.rounding(shape.head_dim) * 3, fast_scores.SPLIT * shape.head_dim,
                *fit,
            ], shared_mem=_ring(shape))  # fmt: skip
            return
        assert isinstance(k, torch.Tensor)
        self.score_kernel(grid, block, [
            q, k, index.norm, rows, work.word, work.best, work.units, work.tally, *sizes, *always,
            *strides, *units(k, shape.each), *fit,
        ])  # fmt: skip

    def choose(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor, logits: Logits,
        always: Always = NONE, completion: str = "none",
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Output ``[B, H, 1, Dv]`` in q's dtype and indices int64 ``[B, H, 1, k_eff]``, once keys are scored."""
        shape, plan, work = self.shape, self.plan, self.buffers
        indices = torch.empty(shape.batch, shape.heads, 1, shape.k_eff, dtype=torch.int64, device=shape.device)
        out = torch.empty(shape.batch, shape.heads, 1, shape.dim_v, dtype=shape.dtype, device=shape.device)
        in_full = 0 if index.codes is None else index.codes.first.shape[2]
        self.choose_kernel((plan.cluster, shape.rows, 1), (plan.threads, 1, 1), [
            q, *self._side(k, q), *self._side(v, q), rows, work.fast, work.best, work.word, work.units, work.off,
            work.tally, out, indices, work.count, work.marks,
            shape.heads, shape.n, plan.padded, shape.k_eff, plan.room, plan.span, in_full, *always,
            *units(q, 1)[:2], *_of_logits(logits, q),
            *([work.line, work.sums, int(completion == "linear")] if shape.completed else []),
        ], shared_mem=plan.shared)  # fmt: skip
        return out, indices

    def _side(self, x: Numbers, none: torch.Tensor) -> list[Any]:
        if not isinstance(x, Stored):
            return [x, none, none, none, *units(x, self.shape.each), *[0] * 9]
        parts = [x.codes, x.scales, x.first, x.first if x.newest is None else x.newest]
        starts = (start_of(part, none) for part in parts)
        return [*starts, *(s for part in parts for s in units(part, self.shape.each))]


def _left_out(index: KeyIndex) -> tuple[torch.Tensor, list[int]]:
    """What codes leave out of any key of a group or a head, strides of batches, heads, groups, whether it is scaled."""
    scaled = index.scaled_residuals
    if scaled is None:
        return index.residual, [index.residual.shape[1], 1, 0, 0]
    return start_of(scaled, index.residual), [*scaled.stride(), 1]


def _of_logits(logits: Logits, none: torch.Tensor) -> list[Any]:
    """Arguments of choose.cu; a scale alone is folded into the change of base, as ``logits_of`` does it."""
    factor = exponent_factor(logits.scale if logits.plain else 1.0)
    cap = 1.0 if logits.soft_cap is None else float(logits.soft_cap)
    sink = (none, -1, 0) if logits.sink is None else (logits.sink, SINKS[logits.sink.dtype], logits.sink.stride(0))
    return [factor, float(logits.scale), cap, *sink]


def step_of(shape: Shape, *, profile: bool = False) -> CudaStep | None:
    """What runs this shape, or None where the kernels do not run or do not fit."""
    if not runs_on(shape.device, CAPABILITY):
        return None
    plan = plan_of(shape, _multiprocessors(shape.device))
    kernels = None if plan is None else _kernels(shape, plan, profile)
    return None if plan is None or kernels is None else CudaStep(shape, plan, kernels, profile)


def why_none(shape: Shape) -> str:
    """Why :func:`step_of` has nothing that runs this shape."""
    if not runs_on(shape.device, CAPABILITY):
        return f"{shape.device} has not compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if plan_of(shape, _multiprocessors(shape.device)) is None:
        return f"{shape.k_eff} keys of {shape.n} do not fit into shared memory"
    return "the kernels cannot be compiled, as logged"


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return EMULATED_MULTIPROCESSORS


def step_for(
    q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, k_eff: int, profile: bool = False
) -> CudaStep | None:
    """A new step over all of these keys, or None where the CUDA kernels cannot run them."""
    if not takes(q, k, v, index):
        return None
    return step_of(shape_of(q, k, v, index, k.shape[2], k_eff), profile=profile)
