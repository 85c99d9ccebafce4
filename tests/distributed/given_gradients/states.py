"""Overflow of a gradient scaler, and state that is saved, copied, asked for or laid out unusually.

Every rank runs each function, which raises where something is wrong.
"""

import copy
import io
import pickle

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_cwd.rules import RULES
from tests.distributed.given_gradients.layouts import mesh
from tests.distributed.given_gradients.small import assert_same, dyadic, give, local, make, parameters, sharing, whole
from tests.distributed.given_gradients.traffic import Collectives


class Branches(nn.Module):
    """Two layers side by side: an inf in the gradient of one row stays there."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        with torch.no_grad():
            for seed, p in enumerate(self.parameters()):
                p.copy_(dyadic(p.shape, seed))

    def forward(self, x, weights):
        return (self.one(x) * weights[0]).sum() + (self.two(x) * weights[1]).sum()


def overflow(rank, world, rule, wrap):
    """An inf in one row of one rank's gradient: no rank steps; then all do, as one process does."""
    model, alone = wrap(Branches()), Branches()
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    params = dict(zip(names, model.parameters(), strict=True))
    optimizer = make(params, rule, **sharing(rule, "always"))
    one = make(dict(alone.named_parameters()), rule, **sharing(rule, "never"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, overflows in enumerate((True, False, True, False)):
        before = {name: local(p.detach()).clone() for name, p in params.items()}
        counts = [int(optimizer.state[p]["step"]) if p in optimizer.state else None for p in params.values()]
        inputs = [dyadic((3, 4), 50 + 10 * step + r) for r in range(world)]
        weights = [dyadic((2, 3, 6), 90 + 10 * step + r) for r in range(world)]
        own = weights[rank].clone()
        if overflows and rank == world - 1:
            own[0, :, 0] = torch.inf
        scaler.scale(model(inputs[rank], own)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflows:
            assert all(torch.equal(local(p.detach()), before[name]) for name, p in params.items()), "stepped on an inf"
            now = [int(optimizer.state[p]["step"]) if p in optimizer.state else None for p in params.values()]
            assert now == counts, "an overflow touched the state"
            assert step or not optimizer.state, "an overflow made state"
        else:
            for r in range(world):
                alone(inputs[r], weights[r] / world).backward()
            one.step()
            one.zero_grad()
            wanted = dict(alone.named_parameters())
            for name, value in whole(params).items():
                assert torch.equal(value.detach(), wanted[name].detach()), f"{name} differs after an overflow"
    assert scaler.get_scale() == 1.0


WRAPPERS = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": lambda model: fully_shard(model, mesh=mesh()),
}


def copied(rank, world, rule, sharded, how):
    """An optimizer continued from a copy steps as the one that was copied."""
    params = parameters(sharded)
    optimizer = make(params, rule, **sharing(rule, "always"))
    for seed in (1, 2):
        give(params, seed)
        optimizer.step()
    optimizer.zero_grad()
    twin, others = how(optimizer, params)
    give(params, 3)
    give(others, 3)
    optimizer.step()
    twin.step()
    assert_same(params, others)
    for p, q in zip(params.values(), others.values(), strict=True):
        assert int(twin.state[q]["step"]) == 3
        for key, value in optimizer.state[p].items():
            assert torch.equal(local(value), local(twin.state[q][key]))


def fresh(optimizer, params):
    others = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    rule = optimizer.defaults["algorithm"]
    return make(others, rule, **sharing(rule, "always")), others


def by_state_dict(optimizer, params):
    twin, others = fresh(optimizer, params)
    saved = io.BytesIO()
    torch.save(copy.deepcopy(optimizer.state_dict()), saved)
    saved.seek(0)
    twin.load_state_dict(torch.load(saved, weights_only=False))
    return twin, others


def by_deepcopy(optimizer, params):
    twin = copy.deepcopy(optimizer)
    return twin, dict(zip(params, (p for group in twin.param_groups for p in group["params"]), strict=True))


def by_pickle(optimizer, params):
    twin = pickle.loads(pickle.dumps(optimizer))
    return twin, dict(zip(params, (p for group in twin.param_groups for p in group["params"]), strict=True))


def by_checkpoint(optimizer, params):
    twin, others = fresh(optimizer, params)
    source, target = container(params), container(others)
    dcp.set_optimizer_state_dict(target, twin, copy.deepcopy(dcp.get_optimizer_state_dict(source, optimizer)))
    return twin, others


def container(params):
    module = nn.Module()
    for name, p in params.items():
        module.register_parameter(name, p)
    return module


def asked_for_state(rank, world, rule, frozen):
    """torch.distributed.checkpoint asks a fresh optimizer for its state by a step: it makes state and nothing else."""
    params = parameters(True)
    for name in frozen:
        params[name].requires_grad_(False)
    before = {name: local(p.detach()).clone() for name, p in params.items()}
    optimizer = make(params, rule, **sharing(rule, "always"))
    with Collectives(world) as seen:
        dcp.get_optimizer_state_dict(container(params), optimizer)
    assert not seen.calls, f"asking for state communicated: {dict(seen.calls)}"
    assert not optimizer.exchanges
    for name, p in params.items():
        assert torch.equal(local(p.detach()), before[name]), f"{name} changed"
        assert (p in optimizer.state) == (name not in frozen), f"state of {name}"
        if name not in frozen:
            assert optimizer.state[p]["step"] == 0
            for key in RULES[rule].state_keys(optimizer.param_groups[0]):
                assert optimizer.state[p][key].placements == p.placements
                assert not local(optimizer.state[p][key]).any()


def one_rank_asks(rank, world, rule):
    """Whoever has state made before the others: no rank waits, and the first real step is every rank's first."""
    params, others = parameters(True), parameters(False)
    optimizer, one = make(params, rule, **sharing(rule, "always")), make(others, rule, **sharing(rule, "never"))
    if rank == 0:
        dcp._init_optim_state(optimizer)
    give(params, 1)
    give(others, 1)
    optimizer.step()
    one.step()
    assert_same(whole(params), others)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def warm_up(rank, world, rule):
    """A first step with lr 0 is a step."""
    params, others = parameters(True), parameters(False)
    optimizer, one = make(params, rule), make(others, rule, **sharing(rule, "never"))
    for lr, seed in ((0.0, 1), (1e-2, 2)):
        for either, members in ((optimizer, params), (one, others)):
            either.param_groups[0]["lr"] = lr
            give(members, seed)
            either.step()
        assert {int(state["step"]) for state in optimizer.state.values()} == {seed}
    assert_same(whole(params), others)


def strided_memory(rank, world, rule):
    """Local tensors and gradients that are not contiguous."""
    params, others = parameters(True), parameters(False)
    for p in params.values():
        p._local_tensor = p._local_tensor.mT.contiguous().mT
    optimizer, one = make(params, rule), make(others, rule, **sharing(rule, "never"))
    for seed in (1, 2):
        give(params, seed)
        give(others, seed)
        for p in params.values():
            p.grad._local_tensor = p.grad._local_tensor.mT.contiguous().mT
        optimizer.step()
        one.step()
    assert_same(whole(params), others)
