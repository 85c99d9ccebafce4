"""What the comparisons with torch.optim share."""

from collections.abc import Iterator

import torch
from torch import Tensor

SINGLE_TENSOR = {"foreach": False, "fused": False}


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int, seed: int = 1) -> Iterator[Tensor]:
    """Gradients of sizes from 1e-4 to 1e2, so that every kind of rounding occurs; their first row is zero."""
    generator = torch.manual_seed(seed)
    for _ in range(steps):
        size = 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-4, 2, generator=generator)
        g = size * torch.randn(shape, dtype=torch.float64, generator=generator)
        g[0] = 0
        yield g.to(dtype)


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0)).to(dtype))


def step(optimizer: torch.optim.Optimizer, grad: Tensor) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = grad.clone()  # torch.optim.SGD's momentum buffer is made from the gradient
    optimizer.step()


def ulp(x: Tensor) -> Tensor:
    return torch.nextafter(x.abs(), torch.full_like(x, torch.inf)) - x.abs()


def assert_same_but_for_roundings(
    found: Tensor, expected: Tensor, before: Tensor, *, weight_decay: float, extra: int = 0
) -> None:
    """One step from ``before`` by two programs that round at different places.

    The parameter is rounded by half a unit in the last place (ulp) when the update is subtracted, on either side; with
    a decay also here when that is subtracted, and in torch when 1 - lr * weight_decay is rounded and when x is
    multiplied by it: 2.5 ulp in all. The update is the result of four roundings on either side (two scalars, two
    operations), each of eps / 2. With an update that is small beside x this is 2 ulp, as a whole number of them.
    """
    update = (expected - before).abs()
    bound = (2.5 if weight_decay else 1.0) * ulp(torch.maximum(before.abs(), expected.abs()))
    bound += (8 + extra) * torch.finfo(found.dtype).eps / 2 * update
    worst = ((found - expected).abs() / bound).max().item()
    assert worst <= 1, f"{worst} times the bound"


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]
