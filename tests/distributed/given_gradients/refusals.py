"""What must be refused: before the first update, by every rank, with the name of the parameter."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.distributed.given_gradients.layouts import mesh, mesh_of
from tests.distributed.given_gradients.small import assert_same, dyadic, give, local, make, parameters
from tests.distributed.given_gradients.traffic import Collectives


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


def other_replicas(rank):
    """Equal placements, and other numbers than they say."""
    params = parameters(True)
    params["b"] = nn.Parameter(DTensor.from_local(dyadic((2, 8), rank), mesh(), [Replicate()], run_check=False))
    return params, {"share": "always"}


def other_shapes(rank):
    return {"a": nn.Parameter(dyadic((6, 4), 7)), "b": nn.Parameter(dyadic((2 + rank, 8), 1))}, {"share": "always"}


def other_order(rank):
    """Factors of LoRA that begin as zeros: their weights do not tell which is which."""
    names = ["q.lora_B", "k.lora_B"] if rank == 0 else ["k.lora_B", "q.lora_B"]
    return {name: nn.Parameter(torch.zeros(8, 2)) for name in names}, {"share": "always"}


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
    "other_replicas": (other_replicas, "'b' of shape (2, 8): ranks [0] and [1] hold it as replicas"),
    "other_shapes": (other_shapes, "'b'"),
    "other_order": (other_order, "_B' of shape (8, 2) has another name"),
    "other_numbers": (other_numbers, "different numbers of parameters"),
    "other_share": (other_share, "share="),
    "other_bytes": (other_bytes, "exchange_bytes="),
    "other_coefficients": (other_coefficients, "'a'"),
    "reversed_ranks": (reversed_ranks, "'c'"),
    "not_copies": (not_copies, "'a' of shape (6, 4): ranks [0] and [1] hold it as replicas"),
}


def marked_apart(rank, world, rule):
    """Replicas with equal weights and other gradients, as of local SGD, or after a forgotten all-reduce."""
    for marked, share in ((True, "auto"), (False, "always")):
        params = {"a": nn.Parameter(dyadic((64, 32), 7)), "b": nn.Parameter(dyadic((8, 8), 8))}
        optimizer = make(params, rule, share=share)
        optimizer.mark_replicated(params.values() if marked else ())
        give(params, 1)
        optimizer.step()  # equal gradients, so far
        before = {name: p.detach().clone() for name, p in params.items()}
        states = {name: optimizer.state[p]["exp_avg"].clone() for name, p in params.items()}
        for one in optimizer._matrix_step._prepared.values():  # it is looked at every 128 steps
            for prepared in one[1]:
                prepared.steps = 0
        give(params, 2)
        params["a"].grad = dyadic((64, 32), 10 + rank)
        refusal = "nothing"
        try:
            optimizer.step()
        except ValueError as error:
            refusal = str(error)
        assert "'a' of shape (64, 32)" in refusal, refusal
        assert "their gradients differ" in refusal, refusal
        assert "share=never" in refusal, refusal
        assert_same(params, before)
        assert all(torch.equal(optimizer.state[p]["exp_avg"], states[name]) for name, p in params.items())


def rounding_is_no_difference(rank, world, rule):
    """Kernels that are not deterministic make gradients of replicas differ in the last bits of bfloat16."""
    params = {"a": nn.Parameter(dyadic((64, 32), 7))}
    optimizer = make(params, rule, share="always")
    generator = torch.Generator().manual_seed(rank)
    exact = torch.randn(64, 32, generator=torch.Generator().manual_seed(100))
    params["a"].grad = exact * (1 + 2**-8 * (2 * torch.rand(64, 32, generator=generator) - 1))
    optimizer.step()
    whole = [torch.empty_like(params["a"].detach()) for _ in range(world)]
    dist.all_gather(whole, params["a"].detach())
    assert all(torch.equal(whole[0], other) for other in whole), "rank 0's direction is everybody's"


def each_for_itself(rank, world, rule):
    """Equal weights and other gradients on ranks that nothing connects: every rank trains its own."""
    params, others = ({"a": nn.Parameter(dyadic((6, 4), 7)), "b": nn.Parameter(torch.zeros(8, 2))} for _ in range(2))
    optimizer, one = make(params, rule, share="auto"), make(others, rule, share="never")
    for step in range(3):
        give(params, 10 * rank + step)
        give(others, 10 * rank + step)
        with Collectives(world) as seen:
            optimizer.step()
        one.step()
        assert not seen.calls, f"communicated: {dict(seen.calls)}"
    assert_same(params, others)
