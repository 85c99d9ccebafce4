"""Matrices that a rank holds whole: orthogonalised where their directions are written, or wherever those are."""

import pytest
import torch

from hf_cwd.matrices import Layout
from hf_cwd.rules import RULES
from hf_cwd.sharding.build import Source, build
from hf_cwd.sharding.stage import Stage

HYPER = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()}
SHAPES = [(6, 10), (6, 10), (8, 5)]


@pytest.mark.parametrize("given", [True, False], ids=["in the given tensors", "elsewhere, as under CPU offload"])
def test_whole_matrices(given):
    params = [torch.randn(shape, generator=torch.manual_seed(k)) for k, shape in enumerate(SHAPES)]
    stage = Stage.of("muon", HYPER)
    sources = [Source(p, f"matrix {k}", Layout(), stage, torch.float32) for k, p in enumerate(params)]
    exchange, offered, results = build(sources, share="never", exchange_bytes=1 << 20), [], {}

    def directions(wanted, outs):
        offered.extend(outs)
        return [outs[i].copy_(params[i]) if given else params[i].clone() for i in wanted]

    exchange.run(
        [True] * len(params), directions, lambda wanted, found: results.update(zip(wanted, found, strict=True))
    )
    assert offered == [0, 1, 2]
    for i, p in enumerate(params):
        assert torch.equal(results[i], stage(p))
