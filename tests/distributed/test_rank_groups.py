"""Exchanges among the ranks that hold something: pipelines, parts of the world, one rank; see groups_ranks.py."""

import json

import pytest
import torch
import torch.distributed as dist

from hf_cwd import CWDMuon
from hf_cwd.distributed import rank_groups
from tests.distributed.groups_ranks import SCENARIOS, WORLD
from tests.support.forking import fork_ranks
from tests.support.launching import ROOT, finish_all


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    command = ("-m", "tests.distributed.groups_ranks", folder)
    ended = finish_all(fork_ranks(WORLD, *command, cwd=ROOT))
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    assert all(file.exists() for file in files), "".join(result.stderr for result in ended)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks_that_hold_something_work_together(name, results):
    problems = {rank: result[name] for rank, result in enumerate(results) if result[name]}
    assert not problems, "\n".join(f"rank {rank}: {problem}" for rank, problem in problems.items())


def test_a_plan_depends_on_what_the_matrix_stage_reads():
    """A momentum that warms up is read by the kernels, and leaves the exchange as it is."""
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    optimizer = CWDMuon(params, 1e-2)
    seen = []
    for change in ({}, {"momentum": 0.9}, {"nesterov": False}, {"lr": 1e-3, "weight_decay": 0.3}, {"ns_steps": 6}):
        optimizer.param_groups[0].update(change)
        for p in params:
            p.grad = torch.randn(6, 4)
        optimizer.step()
        seen.append(optimizer.exchanges[0])
    assert seen[0] is seen[1] is seen[2] is seen[3]
    assert seen[4] is not seen[3]


@pytest.mark.parametrize("wrong", ["world", 3, [0, 1]])
def test_what_is_no_process_group_is_refused(wrong):
    with pytest.raises(TypeError, match=r"is no torch\.distributed\.ProcessGroup"):
        CWDMuon([torch.nn.Parameter(torch.ones(2, 2))], process_group=wrong)


def test_a_rank_without_a_world_is_alone():
    assert not dist.is_initialized()
    assert rank_groups.of(None) == rank_groups.alone() == rank_groups.RankGroup((0,))
    assert not rank_groups.alone().together
