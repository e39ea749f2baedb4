"""Work space of cuBLAS for a graph that is captured: its own, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Around a capture: its products take new work space, from the graph's memory, and leave none behind.

    torch keeps one a stream, for good, in the memory of the graph that was captured on it first. A later graph on that
    stream would point into it; and it is dropped whenever somebody clears the work spaces, as torch.compile does when
    it captures graphs: the replay would write to memory that is another's by then.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
