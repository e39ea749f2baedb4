"""The clock of a cache and the rows of a decode step: PyTorch against a plain model, Triton against PyTorch."""

from __future__ import annotations

import pytest
import torch

import qaxis
from qaxis.arithmetic.triton import jit, tl
from qaxis.decode.rows import fixed_rows, write_rows
from qaxis.decode.rows_triton import write
from qaxis.storage import triton_window
from qaxis.storage.clock import Clock
from qaxis.storage.window import first_held, places_for


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def plain(end, table, pads, window, places):
    """The same rows, one by one, by replaying how a window moves."""
    rows = []
    first = 0
    for token in range(end if places else 0):
        if token - first >= places:
            first = token - (window - 1)
    for pad in pads:
        begin = min(end, max(pad, end - window if window else 0))
        rows.append([begin - first, end - first, int(table[min(end - begin, len(table) - 1)]), 0])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("window", [0, 1, 5, 300])
def test_rows_are_those_of_a_plain_model(window):
    table = qaxis.Budget(0.1, 7).table(1000).int()
    pads = int32(0, 3, 700, 2)
    for places in {0, window and places_for(window), window and window + 3}:
        for end in (0, 1, 4, 8, 9, 255, 299, 300, 303, 304, 511, 600, 897, 1500, 2401):
            wanted = plain(end, table, pads.tolist(), window, places)
            for function in (write_rows, write):
                out = torch.full((4, 4), -9, dtype=torch.int32)
                function(out, int32(end), table, pads, window, places)
                assert torch.equal(out, wanted), (function, end, places)
                function(out, int32(end), table, None, window, places)
                assert torch.equal(out, plain(end, table, [0] * 4, window, places))


def test_fixed_rows_and_a_table_that_ends_early():
    assert torch.equal(fixed_rows(2, 9, 4, "cpu"), int32(0, 9, 4, 0, 0, 9, 4, 0).view(2, 4))
    out = fixed_rows(1, 1, 1, "cpu")
    for function in (write_rows, write):
        function(out, int32(50), int32(0, 1, 2, 2), None, 0, 0)
        assert out.tolist() == [[0, 50, 2, 0]]


def test_rows_that_do_not_fit_are_named():
    good = {"out": fixed_rows(2, 9, 4, "cpu"), "clock": int32(3), "table": int32(0, 1), "pads": int32(0, 1)}
    wrong = {
        "out.shape": {"out": torch.zeros(2, 3, dtype=torch.int32)}, "clock.dtype": {"clock": torch.zeros(1)},
        "pads.shape": {"pads": int32(0)}, "table.dtype": {"table": torch.zeros(3)}, "window": {"window": -1},
        "places": {"window": 8, "places": 7}, "out.stride": {"out": torch.zeros(4, 2, dtype=torch.int32).T[:, :4]},
        "table.shape": {"table": torch.zeros(0, dtype=torch.int32)}, "clock": {"clock": 3},
    }  # fmt: skip
    wrong["out.stride"] = {"out": torch.zeros(4, 2, dtype=torch.int32).T}
    for name, change in wrong.items():
        with pytest.raises(ValueError, match=name):
            write_rows(**{**good, **change})


def test_a_window_keeps_enough_and_a_move_overwrites_nothing_it_reads():
    for window in (1, 2, 100, 256, 257, 513):
        places = places_for(window)
        for end in range(1, 4 * places, 7):
            first, before = first_held(end, window, places), first_held(end - 1, window, places)
            assert min(end, window) <= end - first <= places
            assert first == int(first_held(int32(end), window, places))
            if first > before:
                # Read from [first - before, ...), written to [0, window): apart, so that it can be repeated.
                assert first - before >= window


_first_held = triton_window.first_held


@jit
def _first_kernel(out, window, places, ENDS: tl.constexpr):
    end = tl.arange(0, ENDS)
    tl.store(out + end, _first_held(end, window, places))


@pytest.mark.parametrize("window", [1, 2, 7, 128, 129, 1000])
def test_triton_and_python_agree_where_a_window_begins(window):
    """One of many lengths, and one of each number alone, as a kernel has it."""
    for places in {window, window + 1, window + 5, 2 * window, places_for(window)}:
        out = torch.full((4096,), -1, dtype=torch.int32)
        _first_kernel[(1,)](out, window, places, ENDS=4096)
        assert out.tolist() == [first_held(end, window, places) for end in range(4096)]
        assert torch.equal(first_held(torch.arange(4096, dtype=torch.int32), window, places), out)


def test_a_clock_moves_in_device_memory():
    clock = Clock("cpu")
    place = clock.tensor.data_ptr()
    for end in (7, 8, 8, 2):
        clock.move_to(end)
        assert clock.at == end == int(clock.tensor) and clock.tensor.data_ptr() == place
    for wrong in (-1, 2.0, 1 << 31):
        with pytest.raises(ValueError, match="end"):
            clock.move_to(wrong)
