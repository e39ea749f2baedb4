"""Which way attention goes under enable: the certified step over a cache kept in place, with the reference's tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import qaxis

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def prompt(n=40, batch=1):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("index", ["codes", "bounds"])
def test_steps_give_the_tokens_of_the_reference(llama, backend, index):
    ids, mask = prompt(40, 2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    found = {}
    for way in ("reference", backend):
        cache = qaxis.Cache(llama.config, index=index) if way != "reference" else DynamicCache(config=llama.config)
        with qaxis.sparse(llama, qaxis.Budget(0.2, 5), backend=way), qaxis.record(llama) as recording:
            found[way] = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(*found.values())
    ran = {name.split(":")[0] for name in recording.engines}
    assert backend in ran, recording.engines
