"""The CUDA C++ of the certified decode step, run on a CPU thread by thread, against the canonical reference."""

from __future__ import annotations

import itertools

import torch

import qaxis
from qaxis.native import Decoder, emulator
from qaxis.sides import Stored

from ..claim import Context, NotRunError, Result, value
from .certified import KINDS, attack, ways


def emulated(context: Context) -> Result:
    """Indices and output bits of the CUDA kernels, compiled for this CPU, on random and adversarial rows."""
    if not emulator.available():
        raise NotRunError("g++ is not on the PATH; install it (Debian, Ubuntu: apt install g++)")
    # Clusters of eight, of four, one program a row; the second has lists that overflow.
    shapes = [
        ((1, 3, 1, 900, 64), 100), ((1, 1, 1, 12000, 64), 16), ((4, 8, 2, 1500, 64), 150), ((17, 8, 4, 600, 64), 16),
        ((1, 8, 2, 3000, 128), 200),
    ]  # fmt: skip
    kinds = (*KINDS[::4], "near ties", "ties at the edge", "one direction") if context.quick else KINDS
    generator = torch.Generator().manual_seed(context.seed)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    decoders: dict[tuple[int, ...], Decoder] = {}
    rows = sets = bits = 0
    wrong: list[str] = []
    names: set[str] = set()
    plan = [
        (kind, shape, wanted, dtype)
        for kind, (shape, wanted) in itertools.product(kinds, shapes[:2] if context.quick else shapes)
        # Each variant has to be compiled: other dtypes in one shape.
        for dtype in (dtypes if shape == shapes[0][0] else dtypes[:1])
    ]
    for kind, shape, wanted, dtype in context.progress(plan, "attacks"):
        b, h, _, n, d = shape
        q, k, v = attack(kind, shape, dtype, generator)
        decoder = decoders.setdefault(shape, Decoder(b, h, n, d, wanted, "cpu"))
        exact = qaxis.topk_attention(q, k, v, wanted, backend="reference")
        for name, keys, values, index in ways(k, v):
            step = decoder.native(q, keys, values, index)
            if step is None:
                continue
            expected = exact
            if isinstance(keys, Stored):
                expected = qaxis.topk_attention(
                    q, keys.dequantized(), values.dequantized(), wanted, backend="reference"
                )
            found = decoder(q, keys, values, index)
            differ = int((found.indices != expected.indices).any(-1).sum())
            other = int((found.output != expected.output).flatten(2).any(-1).sum())
            label = f"{kind}, {str(dtype)[6:]}, N={n}, D={d}, {name}, cluster of {step.cluster}"
            if differ or other:
                wrong.append(label)
            names.add(label)
            rows, sets, bits = rows + b * h, sets + differ, bits + other
    headline = f"{rows} queries: {sets} sets differ, {bits} outputs differ"
    return Result(
        not wrong, headline + (f"; first: {wrong[0]}" if wrong else ""), headline,
        {"rows": value(rows, "queries"), "sets": value(sets, "queries"), "outputs": value(bits, "queries")},
        rows, {}, sorted(names),
    )  # fmt: skip
