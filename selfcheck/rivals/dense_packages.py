"""Dense decode steps of packages that are no dependency: FlashAttention-3 and FlashInfer, where they are installed.

Nothing of them is needed: what cannot be imported is not among the steps, and what fails is left out by whoever runs
it. Names have the package's version, as nothing else pins it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

#: (module, package) of FlashAttention-3: Dao-AILab's, its forward pass alone, SGLang's
FLASH_ATTENTION_3 = (
    ("flash_attn_interface", "flash_attn_3"),
    ("fa3_fwd_interface", "fa3-fwd"),
    ("sgl_kernel.flash_attn", "sgl-kernel"),
)
#: tokens of a page, as servers have them
PAGE = 16
#: bytes that FlashInfer asks for, zeroed before their first use
WORKSPACE = 128 << 20
Step = Callable[[], torch.Tensor]


def version(package: str) -> str:
    """Of an installed package; "unknown" if it was put there by hand."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def found(module: str) -> Any:
    """A module, or None; what is said of one that is there and cannot be imported is printed."""
    try:
        return importlib.import_module(module)
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and problem.name in (module, module.partition(".")[0]):
            return None
        print(f"{module}: cannot be imported ({first_line(problem)})")
        return None


def first_line(problem: BaseException) -> str:
    """What an exception says, in short."""
    return (str(problem).splitlines() or [type(problem).__name__])[0][:90]


def steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Step]]:
    """(name, step) for q ``[B, H, 1, D]``, k and v ``[B, Hkv, N, D]``, contiguous; no mask.

    A step may fail; its output has as many numbers as q, in its order. One that cannot be prepared is left out.
    """
    for name, prepare in _there(q, k, v):
        try:
            step = prepare()
        except Exception as problem:
            print(f"{name}: does not run here ({first_line(problem)})")
            continue
        yield name, step


def _there(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Callable[[], Step]]]:
    """(name, what prepares that step) of packages that can be imported."""
    for module, package in FLASH_ATTENTION_3:
        if (there := found(module)) is not None:
            yield f"FlashAttention-3 ({package} {version(package)})", partial(_flash, there, q, k, v)
    if (there := found("flashinfer")) is not None:
        name = f"FlashInfer {version('flashinfer-python')}"
        for cores in (True, False):
            by = "tensor cores" if cores else "CUDA cores"
            if q.shape[0] == 1:
                yield f"{name}, single, {by}", partial(_single, there, q, k, v, cores)
            yield f"{name}, batch, {by}", partial(_batch, there, q, k, v, cores)


def _flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Step:
    """Tokens before heads, as views: its loads take any stride of these. It chooses splits and packing itself."""
    query, keys, values = (x.transpose(1, 2) for x in (q, k, v))

    def step() -> torch.Tensor:
        out = module.flash_attn_with_kvcache(query, keys, values)
        return out[0] if isinstance(out, tuple) else out

    return step


def _single(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cores: bool) -> Step:
    """One sequence, whose keys lie as they are."""
    query, keys, values = q[0, :, 0], k[0], v[0]
    return lambda: module.single_decode_with_kv_cache(query, keys, values, kv_layout="HND", use_tensor_cores=cores)


def paged(x: torch.Tensor, page: int = PAGE) -> torch.Tensor:
    """``[B, Hkv, N, D]`` as pages ``[B * N / page, Hkv, page, D]``, a sequence after the other: a copy."""
    return x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1).contiguous()


def _batch(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cores: bool) -> Step:
    """Keys in pages, planned once: a plan is of lengths, which do not change here."""
    batch, heads, _, dim = q.shape
    kv, n = k.shape[1:3]
    pages = n // PAGE
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device), "HND", use_tensor_cores=cores
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
    wrapper.plan(
        starts, torch.arange(batch * pages, dtype=torch.int32, device=q.device),
        torch.full((batch,), PAGE, dtype=torch.int32, device=q.device),
        heads, kv, dim, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    query, cache = q[:, :, 0].contiguous(), (paged(k), paged(v))
    return lambda: wrapper.run(query, cache)
