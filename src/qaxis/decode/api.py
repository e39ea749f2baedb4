"""The public decode step: CUDA C++ where it runs, Triton elsewhere, the same indices and bits."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..arithmetic.triton import check_device
from ..attention.always import NONE, Always
from ..attention.completion import kind_of
from ..attention.logits import Logits
from ..storage.moments import Moments
from .asked import check_completion, check_kept, check_rows, check_whole_groups, logits_of
from .cuda import CudaStep, Shape, refusal, shape_of, step_of, takes, variant_of, why_none
from .form import MadeFor, Numbers, device_of, layout, outline, readable_of
from .index import KeyIndex
from .rows import fixed_rows
from .triton_step import Step, TritonStep


class Decoder:
    """Decode steps of one shape, with the indices and the bits of ``topk_attention``; kernels are made at first use.

    Args:
        batch, heads, n, head_dim: sizes B, H, N, D. N is the room: most places that keys have.
        k_eff: keys every query keeps, in 1..N; at most so many where ``rows`` say how many.
        device: where it runs. On a CPU the CUDA kernels are emulated, slowly, where g++ is there.

    Its work space is for one step at a time: threads that decode at once take one each.

    Raises:
        ValueError: naming the argument, on a size or device that is not allowed.
    """

    def __init__(self, batch: int, heads: int, n: int, head_dim: int, k_eff: int, device: torch.device | str) -> None:
        self.made_for = MadeFor(batch, heads, n, head_dim, k_eff, device_of(device))
        self.all_rows = fixed_rows(batch, n, k_eff, self.made_for.device)
        self.steps: dict[Shape, CudaStep | None] = {}
        #: what runs arguments that lie so
        self.laid_out: dict[Hashable, CudaStep | None] = {}
        #: outlines of arguments that were checked
        self.checked: set[Hashable] = set()
        self.triton: TritonStep | None = None

    def __call__(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, scale: float | None = None, *,
        rows: torch.Tensor | None = None, always: Always = NONE, logits: Logits | None = None,
        completion: str = "none", moments: Moments | None = None,
    ) -> Step:  # fmt: skip
        """Attend from one query a head over the k_eff keys that score highest of those that it sees.

        Only form is checked, on the host: whether numbers are finite, and sums of products stay inside float32, is left
        to the caller, as looking at them would wait for the device. Nothing waits for it, so the step can be captured
        in a CUDA graph.

        Args:
            q: ``[B, H, 1, D]``; float32, float16 or bfloat16. Any strides, as for k and v.
            k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. Same dtype and device; H a multiple of Hkv (GQA). Each a
                tensor, an 8-bit cache of float32 or bfloat16, or what the ``update`` of a quantised cache returned.
                With ``rows`` they may be shorter than the room.
            index: of these keys, by :func:`qaxis.decode.index_keys`; of a cache by :func:`qaxis.decode.index_cache`, in
                the state that is passed.
            scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``. It cannot change the selection.
            rows: what each batch row sees and keeps, int32 ``[B, 4]``, contiguous, on q's device (``rows.py``); all
                keys and k_eff of them if ``None``. Over an 8-bit cache every row ends where the cache does.
            always: the first and newest of the keys a row sees that it keeps in any case; they count towards k_eff.
            logits: what becomes of a score before the softmax, in place of ``scale``.
            completion: ``"mean"`` or ``"linear"`` (``"block"``) puts back what is left out, as ``topk_attention`` has
                it, with its bits over an index without codes, as scores are canonical there. By codes those of what is
                left out are 16-bit places (``places.py``). CUDA C++ alone does it.
            moments: of the keys and values of each row's complete groups, float32 ``[B, Hkv, Dv + D, D]`` and
                ``[B, Hkv, Dv + D]`` (:mod:`qaxis.storage.moments`); None without completion.

        Returns:
            output, 0 for a row that keeps nothing; indices, ascending and padded with -1; and in ``rescored`` the
            candidates of each program of a row.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
            RuntimeError: if TRITON_INTERPRET changed after Triton was imported.
        """
        k, v = readable_of(k, v, index)
        self._check(q, k, v, index, rows)
        check_kept(always, self.made_for)
        logits = logits_of(logits, scale, self.made_for)
        kind = check_completion(completion, moments, k.shape[1], v.shape[3], always, logits, self.made_for)
        rows = self.all_rows if rows is None else rows
        return self.run(q, k, v, index, rows, logits, always, kind, moments)

    def run(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor, logits: Logits,
        always: Always = NONE, completion: str = "none", moments: Moments | None = None,
    ) -> Step:  # fmt: skip
        """The step itself, of arguments that fit: for a cache, whose parts are known to.

        What is launched depends on how they lie, not on how many tokens they have, and nothing is kept of a call.

        Raises:
            ValueError: naming ``completion``, where it is asked for and CUDA C++ does not run the step.
        """
        kind = kind_of(completion)
        step = self._step(q, k, v, index, always, logits, kind)
        if step is None:
            if kind != "none":
                why = self._why_not(q, k, v, index, always, logits, kind)
                raise ValueError(f"completion={completion!r}: allowed is 'none' where CUDA C++ runs no step: {why}")
            return self._triton_step().run(q, k, v, index, rows, logits, always)
        with torch.cuda.device_of(q):
            return Step(*step.run(q, k, v, index, rows, logits, always, kind, moments), step.count)

    def engine(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, always: Always = NONE,
        logits: Logits | None = None, completion: str = "none",
    ) -> tuple[str, str]:  # fmt: skip
        """What runs these arguments of a step, and why not the faster one.

        Returns:
            ``"cuda"`` or ``"triton"``; the reason, empty for the first.

        Raises:
            RuntimeError: where neither runs, with both reasons; Triton runs no step with completion.
        """
        k, v = readable_of(k, v, index)
        kind = kind_of(completion)
        if self._step(q, k, v, index, always, logits, kind) is not None:
            return "cuda", ""
        why = self._why_not(q, k, v, index, always, logits, kind)
        if kind != "none":
            raise RuntimeError(f"no decode step runs here: {why}; Triton's has no completion")
        try:
            check_device("q", q, calls_library=True)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"no decode step runs here: {why}; {error}") from error
        return "triton", why

    def cuda_step(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, always: Always = NONE,
        logits: Logits | None = None, completion: str = "none",
    ) -> CudaStep | None:  # fmt: skip
        """What runs these in CUDA C++, or None where Triton does; arguments, and what is refused, as for a step."""
        self._check(q, k, v, index, None)
        return self._step(q, k, v, index, always, logits, kind_of(completion))

    def _check(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor | None) -> None:
        # Of lengths that grow every one would be an outline of its own.
        found = None if rows is not None else outline(q, k, v, index)
        if found is None or found not in self.checked:
            self.made_for.check(q, k, v, index, shorter=rows is not None)
            for name, x in (("k", k), ("v", v), ("index.codes", index.codes)):
                check_whole_groups(name, x)
        if found is not None:
            self.checked.add(found)
        if rows is not None:
            check_rows(rows, self.made_for)

    def _shape(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, always: Always, logits: Logits | None, kind: str
    ) -> Shape:
        return shape_of(q, k, v, index, self.made_for.n, self.made_for.k_eff, variant_of(always, logits, kind))

    def _why_not(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, always: Always, logits: Logits | None, kind: str
    ) -> str:
        return refusal(q, k, v, index) or why_none(self._shape(q, k, v, index, always, logits, kind))

    def _step(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, always: Always, logits: Logits | None, kind: str
    ) -> CudaStep | None:
        found = (layout(q, k, v, index), variant_of(always, logits, kind))
        if found not in self.laid_out:
            shape = self._shape(q, k, v, index, always, logits, kind)
            self.laid_out[found] = self._new_or_kept(shape) if takes(q, k, v, index) else None
        return self.laid_out[found]

    def _new_or_kept(self, shape: Shape) -> CudaStep | None:
        if shape not in self.steps:
            self.steps[shape] = step_of(shape)
        return self.steps[shape]

    def _triton_step(self) -> TritonStep:
        if self.triton is None:
            m = self.made_for
            self.triton = TritonStep(m.batch, m.heads, m.n, m.head_dim, m.k_eff, m.device)
        return self.triton
