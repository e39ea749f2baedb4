"""CUDA kernels on a CPU, thread by thread: slow, but the text that a GPU compiles, checked where there is none.

Needs g++ on x86-64. See emulated.hpp for how.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from ..validation import require

#: the emulated processor is one: programs of two kernels, or two compilers, would share its state and files
_PROCESSOR = RLock()
#: programs along the second dimension of a grid
MOST_ROWS = 65535
HEADER = Path(__file__).with_name("emulated.hpp")
LAUNCHER = """
extern "C" void emulate(int x, int y, int threads, int dynamic, void** args) {{
#ifdef CLUSTER
    emulated::launch({name}, x, y, threads, CLUSTER, dynamic, args);
#else
    emulated::launch({name}, x, y, threads, 1, dynamic, args);
#endif
}}
"""


def available() -> bool:
    """Whether kernels can be emulated here."""
    return shutil.which("g++") is not None


class EmulatedKernel:
    """A kernel that is called as those that ``torch.cuda._compile_kernel`` gives."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.emulate = library.emulate

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Any], shared_mem: int = 0
    ) -> None:
        """Run every thread of every program.

        Raises:
            ValueError: for a grid or an integer that a GPU could not take.
        """
        # What a GPU refuses, or silently cuts off, is refused here.
        require(grid[1] <= MOST_ROWS and grid[2] == 1, "grid", grid, f"at most {MOST_ROWS} programs along y, 1 along z")
        values: list[Any] = []
        for x in args:
            if isinstance(x, int):
                require(-(1 << 31) <= x < 1 << 31, "argument", x, "an integer of 32 bits")
            if isinstance(x, torch.Tensor):
                values.append(ctypes.c_void_p(x.data_ptr()))
            else:
                values.append(ctypes.c_int(x) if isinstance(x, int) else ctypes.c_double(x))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        with _PROCESSOR:
            self.emulate(grid[0], grid[1], block[0], shared_mem, pointers)


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qaxis-emulated-")


def compiled(text: str, name: str, options: list[str]) -> EmulatedKernel:
    """Kernel ``name`` of ``text`` for this CPU.

    Raises:
        RuntimeError: without g++, or with what it says.
    """
    if not available():
        raise RuntimeError("g++ is needed to emulate CUDA kernels: `apt install g++`")
    with _PROCESSOR:
        return _built(HEADER.read_text("utf-8") + text + LAUNCHER.format(name=name), options)


def _built(source: str, options: list[str]) -> EmulatedKernel:
    stem = hashlib.sha256("\0".join([source, *options]).encode()).hexdigest()[:16]
    path, library = (Path(_folder().name) / f"{stem}{suffix}" for suffix in (".cpp", ".so"))
    if library.exists():
        return EmulatedKernel(ctypes.CDLL(str(library)))
    path.write_text(source, "utf-8")
    command = ["g++", "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
    done = subprocess.run([*command, *options, str(path), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:2000]}")
    return EmulatedKernel(ctypes.CDLL(str(library)))
