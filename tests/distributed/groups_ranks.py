"""One of five ranks, of which only some hold matrices, or hold matrices of their own; writes what it saw.

    RANK=0 WORLD_SIZE=5 python -m tests.distributed.groups_ranks FOLDER

FOLDER/RANK.json holds, by scenario, "" or what was wrong. Every scenario compares with plain tensors that the same
process steps without communication. A rank that waits for one that never comes fails by the group's time-out.
"""

import datetime
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_cwd import CWDAdamW, CWDMuon, StepStatistics
from hf_cwd.distributed import rank_groups
from tests.distributed.given_gradients.small import assert_alike, dyadic, whole

WORLD = 5
TIMEOUT = 120  # seconds, of the world's group
LONGEST = 900  # seconds that all may take: DeviceMesh gives its groups torch's time-out of half an hour
STEPS = 3
SHAPES = {"a": (6, 4), "b": (8, 8), "c": (4, 6)}


def mesh_of(ranks):
    """All ranks make it, also those that are not in it."""
    return DeviceMesh("cpu", torch.tensor(ranks))


def values(seed):
    return {name: dyadic(shape, 10 * seed + i) * 2 for i, (name, shape) in enumerate(SHAPES.items())}


def stepped(params, seed, kind=CWDMuon, **options):
    """Trains named parameters on gradients that depend on the seed; the last step's statistics."""
    optimizer = kind(list(params.items()), 1e-2, weight_decay=0.5, **options)
    for step in range(STEPS):
        for i, p in enumerate(params.values()):
            gradient = dyadic(p.shape, 1000 * seed + 100 * step + i)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = gradient
        optimizer.statistics = StepStatistics(sample=step)
        optimizer.step()
    return optimizer.statistics.read(), optimizer


def alone(seed, kind=CWDMuon):
    params = {name: nn.Parameter(value) for name, value in values(seed).items()}
    return params, stepped(params, seed, kind)[0]


def sharded(on, placements, seed):
    return {
        name: nn.Parameter(distribute_tensor(value, on, placements, src_data_rank=None))
        for name, value in values(seed).items()
    }


def compare(params, seed, kind=CWDMuon, **options):
    """The same weights and statistics as one process."""
    found, optimizer = stepped(params, seed, kind, **options)
    wanted, statistics = alone(seed, kind)
    for name, p in whole(params).items():
        assert torch.equal(p, wanted[name]), f"{name} differs"
    assert_alike(found, statistics)
    return optimizer


def on_one_rank_only(rank):
    if rank == 0:
        compare({name: nn.Parameter(value) for name, value in values(1).items()}, 1)


def other_shapes_on_each_rank(rank):
    params = [nn.Parameter(dyadic((8, 8 + 4 * rank), 5).clone()) for _ in range(2)]
    for step in range(STEPS):
        for p, share in zip(params, ("auto", "never"), strict=True):
            p.grad = dyadic(p.shape, 10 * rank + step)
            CWDMuon([p], 1e-2, share=share).step()
    assert torch.equal(*params)


def fsdp2_on_two_ranks(rank):
    on = mesh_of([0, 1])
    if rank < 2:
        model = nn.ParameterDict(values(2))
        fully_shard(model, mesh=on)
        assert compare(dict(model.items()), 2).exchanges[0].plan.rounds


def two_models_on_two_halves(rank):
    halves = [mesh_of([0, 1]), mesh_of([2, 3])]
    if rank < 4:
        optimizer = compare(sharded(halves[rank // 2], [Shard(0)], 3 + rank // 2), 3 + rank // 2)
        assert optimizer.exchanges[0].group.ranks == ((0, 1) if rank < 2 else (2, 3))


def stages_of_one_root(rank):
    """Two stages under one seed, each on its part of a (pp, dp) mesh: equal weights, other gradients."""
    root = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("pp", "dp"))
    if rank < 4:
        params, wanted = sharded(root["dp"], [Shard(0)], 5), {n: nn.Parameter(v) for n, v in values(5).items()}
        stepped(params, 50 + rank // 2)
        stepped(wanted, 50 + rank // 2)
        for name, p in whole(params).items():
            assert torch.equal(p, wanted[name]), f"{name} differs"


def mesh_of_two_dimensions(rank):
    """It has no group of its own: one is made, of four ranks; the fifth waits for nothing."""
    on = mesh_of([[0, 1], [2, 3]])
    if rank < 4:
        for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Replicate()]):
            optimizer = compare(sharded(on, placements, 6), 6)
            (exchange,) = optimizer.exchanges
            assert exchange.group.ranks == (0, 1, 2, 3)
            made = exchange.group.process_group
            assert compare(sharded(on, placements, 6), 6).exchanges[0].group.process_group is made, "made once"
        timeout = made._get_backend(torch.device("cpu")).options._timeout
        assert timeout == datetime.timedelta(seconds=TIMEOUT)
        assert "hf_cwd" in made.group_desc
        compare(sharded(on, [Shard(0), Shard(1)], 7), 7, CWDAdamW)  # statistics need the ranks of the mesh, too


def rows_and_columns(rank):
    """Each rank is in two groups, and some have the parameters of one first, some those of the other."""
    root = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("row", "column"))
    if rank < 4:
        own = {dim: sharded(root[dim], [Shard(0)], seed) for seed, dim in ((8, "row"), (9, "column"))}
        named = [{"params": [(f"{dim}.{name}", p) for name, p in own[dim].items()]} for dim in own]
        optimizer = CWDMuon(named[::-1] if rank in (0, 3) else named, 1e-2, weight_decay=0.5)

        def step(number):
            for dim, seed in (("row", 8), ("column", 9)):
                for i, p in enumerate(own[dim].values()):
                    gradient = dyadic(p.shape, 1000 * seed + 100 * number + i)
                    p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.step()

        for number in range(STEPS):
            step(number)
        for dim, seed in (("row", 8), ("column", 9)):
            wanted, _ = alone(seed)
            for name, p in whole(own[dim]).items():
                assert torch.equal(p, wanted[name]), f"{dim} {name} differs"
        # One group changes what its plan depends on, and must not make the others wait for plans that only it makes.
        before = {exchange.group.ranks: exchange for exchange in optimizer.exchanges}
        assert len(before) == 2
        if rank in (0, 2):  # along the dimension "row"
            optimizer.param_groups[1 if rank == 0 else 0]["ns_steps"] = 6
        step(STEPS)
        after = {exchange.group.ranks: exchange for exchange in optimizer.exchanges}
        assert {ranks for ranks in after if after[ranks] is not before[ranks]} == (
            {(0, 2)} if rank in (0, 2) else set()
        )


def experts_on_another_mesh(rank):
    """Dense parameters on four ranks, experts on pairs of them, and a plain matrix on each, in one optimizer."""
    dense, root = mesh_of([0, 1, 2, 3]), DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("out", "ep"))
    if rank < 4:
        on = {"a": (dense, [Shard(0)]), "b": (root["ep"], [Shard(0)]), "c": None}
        params = {
            name: nn.Parameter(value if on[name] is None else distribute_tensor(value, *on[name], src_data_rank=None))
            for name, value in values(11).items()
        }
        optimizer = compare(params, 11)
        assert {exchange.group.ranks for exchange in optimizer.exchanges} >= {(0, 1, 2, 3), (rank,)}
        assert len(optimizer.exchanges) == 3


def replicas_in_a_group(rank):
    """share=always among the ranks of process_group only; another group beside it, and a rank in neither."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    if rank < 4:
        own, seed = pairs[rank % 2], 12 + rank % 2
        params = {name: nn.Parameter(value) for name, value in values(seed).items()}
        optimizer = compare(params, seed, share="always", process_group=own, exchange_bytes=1)
        assert optimizer.exchanges[0].plan.rounds
        assert optimizer.exchanges[0].group.ranks == ((0, 2) if rank % 2 == 0 else (1, 3))
    else:
        with pytest.raises(ValueError, match="rank 4 is not in the process_group"):
            CWDMuon([nn.Parameter(torch.ones(2, 2))], share="always", process_group=pairs[0])


class Stage(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def stages(seed=0):
    """Of different shapes."""
    torch.manual_seed(seed)
    return [Stage(8, 12).double(), Stage(8, 20).double()]


def pipeline_with_fsdp2(rank):
    """Two stages of a real pipeline, each under FSDP2 on two ranks, of which each has a batch of its own."""
    root = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("pp", "dp"))
    if rank >= 4:
        return
    number, copy = divmod(rank, 2)
    module = stages()[number]
    fully_shard(module, mesh=root["dp"])
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=root.get_group("pp"))
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=nn.MSELoss())
    optimizer = CWDMuon(list(module.named_parameters()), 1e-2, weight_decay=0.5)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(STEPS, 2, 2, 4, 8, generator=generator, dtype=torch.float64)  # (step, copy, x or y, ...)
    for x, y in batches[:, copy]:
        schedule.step(x) if number == 0 else schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()
    both = stages()
    model = nn.Sequential(*both)
    other = CWDMuon(model.parameters(), 1e-2, weight_decay=0.5, share="never")
    for step in batches:
        for x, y in step:
            for part in range(2):  # microbatches, whose gradients the schedule averages, and FSDP2 those of the copies
                half = slice(2 * part, 2 * part + 2)
                (nn.functional.mse_loss(model(x[half]), y[half]) / 4).backward()
        other.step()
        other.zero_grad()
    for (name, p), wanted in zip(module.named_parameters(), both[number].parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), wanted, rtol=0, atol=1e-10, msg=f"{name} differs")


def one_does_not_come(rank):
    """The others fail in our words, within the group's time."""
    brief = dist.new_group([1, 2], timeout=datetime.timedelta(seconds=3))
    if rank == 1:
        params = {name: nn.Parameter(value) for name, value in values(1).items()}
        with pytest.raises(RuntimeError, match="the exchange of matrices between ranks failed while comparing"):
            stepped(params, 1, share="always", process_group=brief)


SCENARIOS = [
    on_one_rank_only,
    other_shapes_on_each_rank,
    fsdp2_on_two_ranks,
    two_models_on_two_halves,
    stages_of_one_root,
    mesh_of_two_dimensions,
    rows_and_columns,
    experts_on_another_mesh,
    replicas_in_a_group,
    pipeline_with_fsdp2,
    one_does_not_come,
]


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timeout)
    assert rank_groups.of(None).ranks == tuple(range(WORLD))
    results = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank)
            results[scenario.__name__] = ""
        except (Exception, pytest.fail.Exception):
            results[scenario.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
