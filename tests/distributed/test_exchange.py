"""Matrices that a rank holds whole: orthogonalised where their directions are written, or wherever those are."""

import copy
import pickle
from types import MappingProxyType

import pytest
import torch

from hf_cwd.distributed import local_view
from hf_cwd.distributed.build import Source, build
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.rank_groups import alone
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.matrix_step import MatrixLoop, PreparedExchange
from hf_cwd.rules import RULES

HYPER = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()}
SHAPES = [(6, 10), (6, 10), (8, 5)]


class Loop(MatrixLoop):
    """Directions are the parameters themselves, written where they are offered, or elsewhere; updates are results."""

    def __init__(self, exchange, params, *, as_offered):
        super().__init__(PreparedExchange([], exchange, [], []), [], None, {}, None)
        self._params, self._present = params, [True] * len(params)
        self._as_offered = as_offered
        self.offered, self.results = [], {}

    def _directions(self, sources, outs=MappingProxyType({})):
        self.offered += outs
        for i in sources:
            self._step.parts[i] = outs[i].copy_(self._params[i]) if self._as_offered else self._params[i].clone()

    def _apply(self, sources):
        self.results.update({i: self._step.parts.pop(i) for i in sources})


@pytest.mark.parametrize("as_offered", [True, False], ids=["in the given tensors", "elsewhere, as under CPU offload"])
def test_whole_matrices(as_offered):
    params = [torch.randn(shape, generator=torch.manual_seed(k)) for k, shape in enumerate(SHAPES)]
    stage = Stage.of("muon", HYPER)
    sources = [
        Source(local_view.of(p), f"matrix {k}", MatrixLayout(), stage, torch.float32) for k, p in enumerate(params)
    ]
    exchange = build(sources, alone(), share="never", exchange_bytes=1 << 20)
    loop = Loop(exchange, params, as_offered=as_offered)
    loop.run(lambda: None)
    assert loop.offered == [0, 1, 2]
    for i, p in enumerate(params):
        assert torch.equal(loop.results[i], stage(p))


def test_memory_between_devices_is_used_again():
    staging = Staging()
    first = staging.tensor("lent", 100, torch.float32)
    assert (first.shape, first.dtype) == ((100,), torch.float32)
    smaller = staging.tensor("lent", 60, torch.bfloat16)
    assert (smaller.shape, smaller.dtype, smaller.data_ptr()) == ((60,), torch.bfloat16, first.data_ptr())
    assert staging.tensor("returned", 100, torch.float32).data_ptr() != first.data_ptr()
    larger = staging.tensor("lent", 101, torch.float64)
    assert larger.numel() == 101
    assert staging.tensor("lent", 0, torch.float32).numel() == 0
    assert copy.deepcopy(staging)._memory == pickle.loads(pickle.dumps(staging))._memory == {}
