"""Items that are kept from one step to the next are those that would be made anew, whatever changes in between.

The Triton kernels, which then look at less, are held to it in tests/kernels/triton_risks.py.
"""

import weakref

import pytest
import torch

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES
from tests.optim.steady import problems


@pytest.mark.parametrize("kernel", ["eager", "c"])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
def test_kept_items_are_those_made_anew(rule, kernel):
    assert list(problems(rule, kernel)) == []


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
