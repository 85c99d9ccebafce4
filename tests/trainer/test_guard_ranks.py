"""Gradients that are not finite, on several ranks: all of them skip the step, or all stop."""

import pytest
import torch

from tests.support import forked_python
from tests.support.forking import DEEPSPEED, fork, fork_ranks
from tests.support.launching import ROOT, finish_all


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """What two ranks, and one under DeepSpeed, wrote of each case; and how the first launch ended, by its last case."""
    folder = tmp_path_factory.mktemp("ranks")
    program = ["-m", "tests.trainer.guard_ranks", folder]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    python = forked_python.write(folder / "python")
    many = fork(*torchrun, *program, cwd=ROOT, modules=DEEPSPEED, PYTHON_EXEC=str(python))
    many, one = finish_all([many, *fork_ranks(1, *program, "deepspeed", cwd=ROOT, modules=DEEPSPEED)])
    files = [folder / f"{rank}.pt" for rank in (0, 1, "deepspeed")]
    assert all(file.exists() for file in files), many.stderr + one.stderr
    return many, [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("layout", ["ddp-adamw", "fsdp2-adamw", "fsdp2-muon"])
def test_ranks_skip_together(launches, layout):
    """Rank 1's second batch is bad: the weights end as without the second step, on both."""
    _, (first, second, _) = launches
    one, other = first[f"skip-{layout}"], second[f"skip-{layout}"]
    without = first[f"without-{layout}"]["weights"]
    for name, p in without.items():
        assert torch.equal(one["weights"][name], p), name
        assert torch.equal(other["weights"][name], p), name
    assert one["skipped"] == other["skipped"] == 1
    assert not torch.equal(without["lm_head.weight"], first["start"]["lm_head.weight"])


@pytest.mark.parametrize("layout", ["ddp-adamw", "fsdp2-adamw", "fsdp2-muon"])
def test_ranks_stop_together(launches, layout):
    """And only the rank whose loss it was says so."""
    _, (first, second, _) = launches
    one, other = first[f"stop-{layout}"]["error"], second[f"stop-{layout}"]["error"]
    assert one.startswith("step 2: the gradient norm is nan. Not finite: gradients of ")
    assert other.startswith("step 2: the gradient norm is nan, this rank's loss nan. Not finite: gradients of ")


def test_a_stop_ends_the_launch(launches):
    done, _ = launches
    assert done.returncode != 0
    assert "RuntimeError: step 2: the gradient norm is nan" in done.stderr


def test_deepspeed_stops_and_cannot_skip(launches):
    _, (_, _, found) = launches
    said = "step 2: the gradient norm is inf, this rank's loss nan. All weights on this rank are finite. "
    assert found["stop"]["error"].startswith(f"{said}DeepSpeed has skipped the step. Look at ")
    assert found["skip"]["error"].startswith("cwd_not_finite='skip' is impossible under DeepSpeed, which steps before")
