"""What must be refused: before the first update, by every rank, with the name of the parameter."""

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from tests.sharding.injected_layouts import mesh, mesh_of
from tests.sharding.injected_small import assert_same, dyadic, give, local, make, parameters


def refused(rank, world, rule, build, message):
    params, options = build(rank)
    give(params, 1)
    before = {name: local(p.detach()).clone() for name, p in params.items()}
    optimizer = make(params, rule, **options)
    refusal = "nothing"
    try:
        optimizer.step()
    except ValueError as error:
        refusal = str(error)
    assert message in refusal, f"{refusal} instead of {message}"
    assert_same(params, before)
    assert not optimizer.state


def partial(rank):
    params = parameters(True)
    params["b"] = nn.Parameter(DTensor.from_local(dyadic((1, 8), 1), mesh(), [Partial()]))
    return params, {}


def other_weights(rank):
    params = parameters(True)
    params["b"] = nn.Parameter(dyadic((2, 8), rank))
    return params, {}


def other_shapes(rank):
    params = parameters(True)
    params["b"] = nn.Parameter(dyadic((2 + rank, 8), 1))
    return params, {}


def other_numbers(rank):
    params = parameters(True)
    if rank == 0:
        del params["c"]
    return params, {}


def other_share(rank):
    return parameters(True), {"share": ("always", "never", "auto")[rank % 3]}


def other_bytes(rank):
    return parameters(True), {"exchange_bytes": 1000 + rank}


def other_coefficients(rank):
    return parameters(True), {"ns_steps": 5 + rank}


def reversed_ranks(rank):
    """torch cuts by the place in the mesh here, and puts together by the number of the rank."""
    on = mesh_of(*reversed(range(dist.get_world_size())))
    params = parameters(True)
    params["c"] = nn.Parameter(distribute_tensor(dyadic((4, 6), 1), on, [Shard(0)], src_data_rank=None))
    return params, {}


def not_copies(rank):
    return {"a": nn.Parameter(dyadic((6, 4), 7 + rank))}, {"share": "always"}


REFUSALS: dict[str, tuple[Callable[[int], Any], str]] = {
    "partial": (partial, "'b'"),
    "other_weights": (other_weights, "'b'"),
    "other_shapes": (other_shapes, "'b'"),
    "other_numbers": (other_numbers, "different numbers of parameters"),
    "other_share": (other_share, "share="),
    "other_bytes": (other_bytes, "exchange_bytes="),
    "other_coefficients": (other_coefficients, "'a'"),
    "reversed_ranks": (reversed_ranks, "'c'"),
    "not_copies": (not_copies, "'a'"),
}


def warned(rank, world, rule):
    """With share=auto, ranks that train different weights without a word to each other are left to it."""
    params, others = ({"a": nn.Parameter(dyadic((6, 4), 7 + rank))} for _ in range(2))
    optimizer, one = make(params, rule, share="auto"), make(others, rule, share="never")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("hf_cwd").addHandler(handler)
    for seed in (1, 2):
        give(params, seed)
        give(others, seed)
        optimizer.step()
        one.step()
    logging.getLogger("hf_cwd").removeHandler(handler)
    assert_same(params, others)
    assert [("'a'" in r.getMessage(), r.levelname) for r in records] == [(True, "WARNING")]
