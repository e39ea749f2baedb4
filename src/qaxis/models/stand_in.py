"""Something that stands for a method of one model, in the threads that generate with it and for so long."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

Method = Callable[..., Any]
#: an attribute is set and taken away by one thread at a time
_lock = threading.Lock()


def _method(model: PreTrainedModel, name: str) -> Method:
    """The class's own, of a model that was read from a file while another was generating."""
    return getattr(type(model), name).__get__(model)  # type: ignore[no-any-return]


class StandIn:
    """An attribute of a model: threads that are generating get what they put there, others and compilers the method.

    Attributes:
        own: what stood in the model's own attribute before, or None.
        original: the method itself.
        users: how many calls of ``generate`` are under way.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        self.own = model.__dict__.get(name)
        self.original: Method = getattr(model, name)
        functools.update_wrapper(self, self.original)
        self.local, self.users = threading.local(), 0

    def stack(self) -> list[Method]:
        """What stands for the method in this thread, the innermost last."""
        return self.local.__dict__.setdefault("stack", [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack()
        if not stack or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return stack[-1](*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return _method(memo.get(id(self.model), self.model), self.name)

    def __reduce__(self) -> Any:
        return _method, (self.model, self.name)


@contextmanager
def standing_in(model: PreTrainedModel, name: str, make: Callable[[Method], Method]) -> Iterator[None]:
    """Inside, ``model.name`` is ``make(the method)`` in this thread. What somebody sets meanwhile stays."""
    with _lock:
        known = model.__dict__.get(name)
        there = known if isinstance(known, StandIn) else StandIn(model, name)
        model.__dict__[name] = there
        there.users += 1
    there.stack().append(make(there.original))
    try:
        yield
    finally:
        there.stack().pop()
        with _lock:
            there.users -= 1
            if there.users == 0 and model.__dict__.get(name) is there:
                if there.own is None:
                    del model.__dict__[name]
                else:
                    model.__dict__[name] = there.own
