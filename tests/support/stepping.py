"""Parameters, gradients and optimizers for the tests, all from seeds."""

import torch
from torch import nn

from hf_cwd import CWDOptimizer


def make(params, algorithm, **options):
    return CWDOptimizer(params, options.pop("lr", 1e-2), algorithm=algorithm, **options)


def parameter(*shape, seed=0, dtype=torch.float32, device="cpu"):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return nn.Parameter(x.to(dtype=dtype, device=device))


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps, first=0):
    for seed in range(first, first + steps):
        set_grads(params, seed)
        optimizer.step()
    return [p.detach().clone() for p in params]
