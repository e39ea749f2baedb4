"""The public decode step: CUDA C++ where it runs, Triton elsewhere, the same indices and bits."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..attention.always import NONE
from ..attention.logits import Logits
from ..validation import check_scale
from .cuda import CudaStep, Shape, shape_of, step_of, takes
from .form import MadeFor, Numbers, device_of, outline, readable_of
from .index import KeyIndex
from .triton_step import Step, TritonStep


class Decoder:
    """Decode steps of one shape, with the indices and the bits of ``topk_attention``; kernels are made at first use.

    Args:
        batch, heads, n, head_dim: sizes B, H, N, D.
        k_eff: keys every query keeps, in 1..N.
        device: where it runs. On a CPU the CUDA kernels are emulated, slowly, where g++ is there.

    Its work space is for one step at a time: threads that decode at once take one each.

    Raises:
        ValueError: naming the argument, on a size or device that is not allowed.
    """

    def __init__(self, batch: int, heads: int, n: int, head_dim: int, k_eff: int, device: torch.device | str) -> None:
        self.made_for = MadeFor(batch, heads, n, head_dim, k_eff, device_of(device))
        self.steps: dict[Shape, CudaStep | None] = {}
        #: what runs arguments that were checked, by their outline
        self.known: dict[Hashable, CudaStep | None] = {}
        self.triton: TritonStep | None = None

    def __call__(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, scale: float | None = None) -> Step:
        """Attend from one query a head over the k_eff keys of N that score highest.

        Only form is checked, on the host: whether numbers are finite, and sums of products stay inside float32, is left
        to the caller, as looking at them would wait for the device. Nothing waits for it, so the step can be captured
        in a CUDA graph.

        Args:
            q: ``[B, H, 1, D]``; float32, float16 or bfloat16. Any strides, as for k and v.
            k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. Same dtype and device; H a multiple of Hkv (GQA). Each a
                tensor, an 8-bit cache of float32 or bfloat16, or what the ``update`` of a quantised cache returned.
            index: of these keys, by :func:`qaxis.decode.index_keys`; of a cache by :func:`qaxis.decode.index_cache`, in
                the state that is passed.
            scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``. It cannot change the selection.

        Returns:
            output, indices, and in ``rescored`` the candidates of each program of a row.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
            RuntimeError: without a GPU, if Triton was loaded before its interpreter was chosen.
        """
        k, v = readable_of(k, v, index)
        step = self.cuda_step(q, k, v, index)
        scale = check_scale(scale, self.made_for.head_dim)
        if step is None:
            other = self._triton_step()
            return other.run(q, k, v, index, other.full, Logits(scale), NONE)
        with torch.cuda.device_of(q):
            step.score(q, k, index)
            return Step(*step.choose(q, k, v, index, scale), step.count)

    def cuda_step(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> CudaStep | None:
        """What runs these in CUDA C++, or None where Triton does; arguments, and what is refused, as for a step."""
        found = outline(q, k, v, index)
        if found not in self.known:
            self.made_for.check(q, k, v, index)
            self.known[found] = self._new_or_kept(q, k, v, index)
        return self.known[found]

    def _new_or_kept(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> CudaStep | None:
        if not takes(q, k, v, index):
            return None
        shape = shape_of(q, k, v, index, self.made_for.k_eff)
        if shape not in self.steps:
            self.steps[shape] = step_of(shape)
        return self.steps[shape]

    def _triton_step(self) -> TritonStep:
        if self.triton is None:
            m = self.made_for
            self.triton = TritonStep(m.batch, m.heads, m.n, m.head_dim, m.k_eff, m.device)
        return self.triton
