"""The peak of an exchange's memory, as `hf-cwd explain --layout` prints it, by hand."""

from dataclasses import replace

import torch

from hf_cwd.distributed.geometry import Mesh, Shard
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, Job, Plan
from hf_cwd.estimate.costs import buffers
from hf_cwd.newton_schulz.matrices import MatrixLayout


def test_buffers_by_hand():
    """Four matrices of 8 elements on two ranks that hold half of each; two rounds, with a matrix of each rank in each.

    A rank's round has 4 elements that come and 4 that go, each way; and there are 8 of directions. While the first is
    worked on, or the second, both have directions and something under way.
    """
    halves = Mesh((2,), (0, 1), (Shard(0),))
    stage = Stage.of("muon", {})
    of_each = [Entry(str(i), (4, 2), MatrixLayout(), halves, stage, torch.bfloat16, i) for i in range(4)]
    jobs = [Job(i, 0, (4, 2), owner=i % 2, serves=(0,), round=i // 2) for i in range(4)]
    found = Plan(tuple(of_each), tuple(jobs), 2, {0: 0, 1: 0}, {0: 0, 1: 0})
    assert buffers(found) == [2 * (8 + 8 + 8 + 16)] * 2
    alone = Plan(tuple(of_each[:2]), tuple(jobs[:2]), 1, {0: 0, 1: 0}, {0: 0, 1: 0})
    assert buffers(alone) == [2 * (8 + 8 + 8)] * 2
    assert buffers(Plan((), (), 0, {0: 0}, {0: 0})) == [0]


def test_buffers_of_flat_tensors_by_hand():
    """The same matrices in one flat tensor, of which each rank has 16 elements and 2 of padding: its direction is there
    in both rounds. In one of two flat tensors, it is there until the last of its matrices has returned.
    """
    halves = Mesh((2,), (0, 1), (Shard(0),))
    stage = Stage.of("muon", {})
    jobs = [Job(i, 0, (4, 2), owner=i % 2, serves=(0,), round=i // 2) for i in range(4)]

    def found(*places):
        """Matrices by the source that they lie in."""
        of_each = [
            Entry(str(i), (4, 2), MatrixLayout(), halves, stage, torch.bfloat16, s) for i, s in enumerate(places)
        ]
        return Plan(tuple(of_each), tuple(jobs), 2, {0: 0, 1: 0}, {0: 0, 1: 0})

    assert buffers(found(0, 0, 0, 0), [18]) == [2 * (8 + 8 + 8 + 18)] * 2
    assert buffers(found(0, 1, 1, 0), [9, 10]) == [2 * (8 + 8 + 8 + 19)] * 2
    # The first one is done with after the first round, and the second one begins with the next one's parts.
    assert buffers(found(0, 0, 1, 1), [9, 10]) == [2 * (8 + 8 + 8 + 19)] * 2
    jobs += [Job(i, 0, (4, 2), owner=i % 2, serves=(0,), round=2) for i in (4, 5)]
    three = Plan(found(0, 0, 1, 1, 2, 2).entries, tuple(jobs), 3, {0: 0, 1: 0}, {0: 0, 1: 0})
    assert buffers(three, [9, 20, 30]) == [2 * (8 + 8 + 8 + 50)] * 2
    assert buffers(replace(three, entries=found(0, 0, 1, 1, 0, 2).entries), [9, 20, 30]) == [2 * (8 + 8 + 8 + 59)] * 2
    # Nothing moves, and the direction is made all the same.
    still = [replace(job, round=None) for job in jobs[:4]]
    assert buffers(replace(found(0, 0, 0, 0), jobs=tuple(still), rounds=0), [18]) == [2 * 18] * 2
