"""CUDA C++ for Hopper: the certified decode step in two kernels, with the indices and bits of every other way."""

from .decode import Decoder, NativeStep, step_for

__all__ = ["Decoder", "NativeStep", "step_for"]
