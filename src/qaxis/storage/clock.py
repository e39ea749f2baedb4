"""How many tokens a cache holds, in device memory: what a captured graph reads instead of an argument."""

from __future__ import annotations

import torch

from ..validation import is_integer, require


class Clock:
    """The end of the running forward pass: tokens in the cache once its own are appended.

    Attributes:
        tensor: int32 ``[1]`` on the device; its place in memory never changes.
        at: the same number on the host.
    """

    def __init__(self, device: torch.device | str) -> None:
        # An ordinary tensor in inference mode too: it is written to outside as well.
        with torch.inference_mode(False):
            self.tensor = torch.zeros(1, dtype=torch.int32, device=device)
        self.at = 0

    def move_to(self, end: int) -> None:
        """Set it to ``end``; nothing if it is there. While a graph is captured it moves relative to where it is.

        Raises:
            ValueError: for anything but a number of tokens that fits int32.
        """
        require(is_integer(end) and 0 <= end < 1 << 31, "end", end, "a number of tokens, 0 to 2147483647")
        if end == self.at:
            return
        if is_captured(self.tensor):
            # A replay goes on from where the last one stopped.
            self.tensor.add_(end - self.at)
        else:
            self.tensor.fill_(end)
        self.at = end


def is_captured(x: torch.Tensor) -> bool:
    """Whether what is done with ``x`` goes into a graph now: then views are of all room, as a graph's tokens grow."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
