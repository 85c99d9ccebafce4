"""Results for several replicas where a backend takes lists of tensors, as NCCL does: each result is packed once.

Gloo has no such all-to-all, so that sends and receives stand in for it. Run as a script it is one of four ranks.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_cwd import CWDMuon
from hf_cwd.distributed import geometry
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, plan
from hf_cwd.distributed.schedule import Schedule
from hf_cwd.newton_schulz.matrices import MatrixLayout
from tests.support.forking import fork_ranks
from tests.support.launching import ROOT, finish_all
from tests.support.stepping import parameter

RANKS = 4
SHAPES = [(16, 12), (7, 5), (3, 64), (1, 9), (32, 8)]
LAYOUTS = {"plain": None, "hsdp": (Replicate(), Shard(0)), "fsdp2 and tp": (Shard(0), Shard(1))}


class Works:
    def __init__(self, works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()


def train(params, cut, **options):
    """Three steps with gradients that are exact in any order."""
    fused = [{"params": params[:-1]}, {"params": params[-1:], "layout": MatrixLayout((8, 16, 8)).as_group_value()}]
    optimizer = CWDMuon(fused, lr=1e-2, weight_decay=0.5, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, shape in zip(params, SHAPES, strict=True):
            p.grad = cut(torch.randint(-8, 9, shape, generator=generator).float() / 16)
        optimizer.step()
    return optimizer


def rank_main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, packed, results = dist.get_rank(), [], {}

    def all_to_all(received, given, *, group, async_op):
        assert async_op
        assert group is None
        packed.append(len({part.data_ptr() for part in given if part.numel()}))
        received[rank].copy_(given[rank])
        sends = [dist.isend(part, peer) for peer, part in enumerate(given) if part.numel() and peer != rank]
        receives = [dist.irecv(part, peer) for peer, part in enumerate(received) if part.numel() and peer != rank]
        return Works(sends + receives)

    dist.all_to_all, dist.get_backend_config = all_to_all, lambda group: "cpu:with_lists"
    alone = [parameter(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    train(alone, lambda tensor: tensor, share="never")
    for name, placements in LAYOUTS.items():

        def cut(tensor, placements=placements):
            if placements is None:
                return tensor
            return distribute_tensor(tensor, init_device_mesh("cpu", (2, 2)), placements, src_data_rank=None)

        packed.clear()
        params = [nn.Parameter(cut(parameter(*shape, seed=seed).detach())) for seed, shape in enumerate(SHAPES)]
        rounds = train(params, cut, share="always", exchange_bytes=512).exchanges[0].plan.rounds
        whole = params if placements is None else [p.full_tensor() for p in params]
        same = all(torch.equal(p, q) for p, q in zip(whole, alone, strict=True))
        results[name] = {"same": same, "lists": len(packed), "rounds": rounds, "packed": max(packed, default=0)}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()


def test_replicas_get_one_packed_result(tmp_path):
    for result in finish_all(fork_ranks(RANKS, __file__, tmp_path, cwd=tmp_path, PYTHONPATH=str(ROOT))):
        assert result.returncode == 0, result.stderr[-2000:]
    for path in tmp_path.glob("*.json"):
        results = json.loads(path.read_text())
        assert all(result["same"] for result in results.values())
        assert all(result["rounds"] > 1 for result in results.values())
        lists = {name: result["lists"] for name, result in results.items()}
        assert lists == {name: 3 * results[name]["rounds"] * (name != "fsdp2 and tp") for name in LAYOUTS}
        assert results["plain"]["packed"] == 1, "one tensor for the three other ranks"
        assert results["hsdp"]["packed"] <= 2, "one for each shard"


def test_what_would_not_be_orthogonalised_is_refused():
    halves = geometry.Mesh((2,), (0, 1), (geometry.Shard(0),))
    stage = Stage.of("muon", {"ns": "auto", "ns_steps": 5, "ns_coefficients": "quintic"})
    planned = plan([Entry("layer.weight", (4, 6), MatrixLayout(), halves, stage, torch.float32, 0)])
    Schedule(planned, 0, peers=(0, 1), local_sizes=[12], batch_bytes=0)
    with pytest.raises(ValueError, match=r"layer\.weight .*12 of the 18 elements .* would not be orthogonalised"):
        Schedule(planned, 0, peers=(0, 1), local_sizes=[18], batch_bytes=0)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
