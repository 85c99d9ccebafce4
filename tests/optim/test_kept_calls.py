"""Items that are kept from one step to the next are those that would be made anew, whatever changes in between.

The Triton kernels, which then look at less, are held to it in tests/kernels/triton_risks.py.
"""

import weakref

import pytest
import torch

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES
from tests.optim.kept_calls import problems


@pytest.mark.parametrize("kernel", ["eager", "c"])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
def test_kept_items_are_those_made_anew(rule, kernel):
    assert list(problems(rule, kernel)) == []


@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
def test_parameters_of_one_shape_have_gradients_in_turn(rule):
    """As many in each step, of the same size: only the parameters tell that they are others."""
    results = []
    for forgets in (False, True):
        params = [torch.nn.Parameter(torch.full((4, 3), value)) for value in (1.0, -2.0)]
        optimizer = CWDOptimizer(params, algorithm=rule, lr=0.1, weight_decay=0.5)
        for present in ((0, 1), (0,), (1,), (0,)):
            for number, p in enumerate(params):
                p.grad = torch.full((4, 3), 0.5) if number in present else None
            if forgets:
                optimizer._kept.clear()
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_freed(rule):
    """By zero_grad(), not in the next step, which would have the memory of two sets of gradients."""
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = CWDOptimizer([p], algorithm=rule, lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(4, 3)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None


@pytest.mark.parametrize("kernel", ["eager", "c"])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
def test_each_step_has_its_own_gradients_rate_and_number(rule, kernel):
    """Gradients that all stay alive, so that none has the address of an earlier one; two groups, and two dtypes."""
    shapes, dtypes, results = [(4, 3), (70,), (257,)], [torch.float32, torch.float32, torch.bfloat16], []
    generator = torch.Generator().manual_seed(0)
    steps = [
        [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for _ in range(5)
    ]
    for forgets in (False, True):
        params = [torch.nn.Parameter(torch.ones(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.2}]
        optimizer = CWDOptimizer(groups, algorithm=rule, lr=0.1, weight_decay=0.5, kernel=kernel)
        for k, gradients in enumerate(steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            if forgets:
                optimizer._kept.clear()
            optimizer.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
