"""A launch that may begin while the kernel before it is still running, as CUDA's programmatic dependent launch has it.

``torch.cuda._compile_kernel`` gives a kernel that starts once all before it have ended, and knows no attributes of a
launch. One that calls ``await_previous()`` (hardware.cuh) before it reads what the kernel before it wrote may have its
programs put on multiprocessors, and its first instructions fetched, as soon as all programs of that one have called
``let_next_begin()`` or ended. If that one was launched plainly, what is older can be read without waiting.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch

log = logging.getLogger(__name__)
#: of CUlaunchAttributeID
_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which the number is all that is used of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("many", ctypes.c_uint),
    )  # fmt: skip


class EarlyKernel:
    """A kernel of torch's, launched so; called as it is.

    Raises:
        AttributeError: where the driver or torch knows no such launch.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.func = kernel, kernel.func
        self.library = torch.cuda._utils._get_gpu_runtime_library()
        self.launch = self.library.cuLaunchKernelEx

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Any], shared_mem: int = 0
    ) -> None:
        """Launch on the current stream; tensors are passed by their addresses, other numbers as int and double."""
        values = [_value(x) for x in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        attribute = _Attribute(id=_SERIALIZATION, value=1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        launch = _Launch(grid, block, shared_mem, stream, ctypes.pointer(attribute), 1)
        torch.cuda._utils._check_cuda(self.launch(ctypes.byref(launch), self.func, pointers, None))


def launched_early(kernel: Any) -> Any:
    """A kernel of torch's as :class:`EarlyKernel`; as it is, which is right as well, where that cannot be."""
    try:
        return EarlyKernel(kernel)
    except AttributeError as error:
        log.warning("kernels are launched one after the other: %s", error)
        return kernel


def _value(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_int(x) if isinstance(x, int) else ctypes.c_double(x)
