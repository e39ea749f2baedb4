"""A kernel that is launched before the one before it has ended: what the driver is told, what kernels wait for."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qaxis import decode
from qaxis.cuda import launching
from qaxis.decode import cuda

DECODE = Path(decode.__file__).parent


class Driver:
    """What a launch was told."""

    def __init__(self) -> None:
        self.told: list[SimpleNamespace] = []

    def cuLaunchKernelEx(self, launch, function, arguments, extra):
        x = launch._obj
        first, attribute = x.attributes[0], ctypes.string_at(x.attributes, ctypes.sizeof(launching._Attribute))
        self.told.append(SimpleNamespace(
            grid=list(x.grid), block=list(x.block), shared=x.shared, stream=x.stream, many=x.many, id=first.id,
            value=int.from_bytes(attribute[8:12], "little"), function=function, extra=extra,
            integer=ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_int))[0],
            real=ctypes.cast(arguments[2], ctypes.POINTER(ctypes.c_double))[0],
            address=ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0],
        ))  # fmt: skip
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return made


def test_structures_are_as_long_as_the_drivers():
    assert ctypes.sizeof(launching._Attribute) == 72 and launching._Attribute.value.offset == 8
    assert ctypes.sizeof(launching._Launch) == 56
    offsets = [getattr(launching._Launch, name).offset for name in ("grid", "block", "shared", "stream", "attributes")]
    assert offsets == [0, 12, 24, 32, 40] and launching._Launch.many.offset == 48


def test_a_launch_says_all_and_that_it_may_be_early(driver):
    x = torch.zeros(3)
    kernel = launching.launched_early(SimpleNamespace(func="function"))
    kernel((4, 32, 1), (512, 1, 1), [x, -5, 0.25], shared_mem=70000)
    (told,) = driver.told
    assert (told.grid, told.block, told.shared, told.stream) == ([4, 32, 1], [512, 1, 1], 70000, 77)
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert (told.many, told.id, told.value) == (1, 6, 1)
    assert (told.address, told.integer, told.real) == (x.data_ptr(), -5, 0.25)
    assert told.function == "function" and told.extra is None


def test_a_driver_without_such_launches_gets_plain_ones(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: object())
    kernel = SimpleNamespace(func=None)
    assert launching.launched_early(kernel) is kernel
    assert "one after the other" in caplog.text


def test_the_second_kernel_of_a_step_waits_before_it_reads_what_the_first_wrote():
    text = (DECODE / "choose.cu").read_text("utf-8")
    body = text[text.index("DYNAMIC_SHARED(memory);") :]
    before, waits, after = body.partition("await_previous();")
    assert waits and "write_nothing" in after
    # Handed on as pointers by the constructor, which reads none of them.
    before = before.replace("Sizes{padded, k_eff, room, span}, seen, fast, best, marks, heads", "")
    assert not re.search(r"\b(fast|best|word|units_of|off|tally|count)\b", before)
    for name in ("score_codes.cu", "score_keys.cu"):
        first = (DECODE / name).read_text("utf-8").partition(") {\n    let_next_begin();")
        assert first[1] and "tally" in first[2]


def test_numbers_that_python_shares_with_the_kernels_are_the_same():
    for file, names in (
        ("seen", ["BLOCK"]),
        ("program", ["NEAR", "MARKS"]),
        ("tally", ["TALLY", "SUB"]),
        ("line", ["VALUES"]),
    ):
        text = (DECODE / f"{file}.cuh").read_text("utf-8")
        for name in names:
            (found,) = re.findall(rf"\b{name} = (\d+)", text)
            assert int(found) == getattr(cuda, name), name
