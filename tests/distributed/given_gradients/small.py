"""Three small matrices, for what needs no table."""

from dataclasses import astuple

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES
from tests.distributed.given_gradients.layouts import mesh

SHAPES = {"a": (6, 4), "b": (1, 8), "c": (4, 6)}  # b is empty on all ranks but one


def dyadic(shape, seed, denominator=16):
    """Numbers whose sums are exact in any order, in float32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / denominator


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make(params, rule, **options):
    return CWDOptimizer(list(params.items()), 1e-2, algorithm=rule, weight_decay=0.5, **options)


def sharing(rule, share):
    return {"share": share} if RULES[rule].matrix else {}


def parameters(sharded, shapes=SHAPES):
    """Plain or cut along rows; ``sharded`` may be a list of placements."""
    placements = [Shard(0)] if sharded is True else sharded
    values = {name: dyadic(shape, seed) * 2 for seed, (name, shape) in enumerate(shapes.items())}
    if placements:
        on = mesh()
        values = {name: distribute_tensor(value, on, placements, src_data_rank=None) for name, value in values.items()}
    return {name: nn.Parameter(value) for name, value in values.items()}


def give(params, seed):
    for i, p in enumerate(params.values()):
        gradient = dyadic(p.shape, 100 * seed + i)
        if isinstance(p, DTensor):
            gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = gradient


def assert_same(params, others):
    for name, p in params.items():
        assert torch.equal(local(p.detach()), local(others[name].detach())), f"{name} differs"


def whole(params):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()}


def assert_alike(found, wanted):
    """Statistics of ranks and of one process: sums of float32 squares in another order."""
    assert len(found.groups) == len(wanted.groups)
    for ours, theirs in zip(found.groups, wanted.groups, strict=True):
        np.testing.assert_allclose(astuple(ours), astuple(theirs), rtol=2e-6)
    errors = [np.nan if one.orthogonality_error is None else one.orthogonality_error for one in (found, wanted)]
    np.testing.assert_allclose(*errors, rtol=1e-5)
