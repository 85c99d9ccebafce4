"""Parameters that become other tensors under their optimizer: resized, which is an error, or swapped, which is not."""

import copy

import pytest
import torch
from torch import nn

from hf_cwd import CWDAdamW, CWDOptimizer
from hf_cwd.rules import RULES


def begun(rule, kernel="auto", steps=2):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 6))
    hyper = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = CWDOptimizer([("embed.weight", p)], lr=0.1, algorithm=rule, kernel=kernel, **hyper)
    for _ in range(steps):
        p.grad = torch.randn(8, 6)
        optimizer.step()
    return optimizer, p


RESIZED = {
    "grown": lambda p: torch.randn(64, 6),
    "shrunk": lambda p: torch.randn(4, 6),
    "shrunk in place": lambda p: p[:4],
    "reshaped in place": lambda p: p.view(4, 12),
    "transposed": lambda p: p.t().contiguous(),
}


@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("rule", RULES)
def test_another_size_is_an_error(rule, kernel, how):
    optimizer, p = begun(rule, kernel)
    p.grad = None
    p.data = RESIZED[how](p.data)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    shape = ", ".join(map(str, p.shape))
    with pytest.raises(
        RuntimeError, match=rf"parameter 'embed\.weight' .*shape \({shape}\) now, .* \(8, 6\): .*Make a new optimizer"
    ):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("rule", RULES)
def test_another_size_between_gradient_and_step(rule):
    optimizer, p = begun(rule)
    p.grad = torch.ones(8, 6)
    p.data = torch.randn(64, 6)
    with pytest.raises(RuntimeError, match=r"data of shape \(64, 6\) now, and a gradient of shape \(8, 6\)"):
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_another_size_with_states_that_were_loaded(rule):
    saved = copy.deepcopy(begun(rule)[0].state_dict())
    optimizer, p = begun(rule, steps=0)
    optimizer.load_state_dict(saved)
    p.data = torch.randn(64, 6)
    p.grad = torch.ones(64, 6)
    with pytest.raises(RuntimeError, match=r"parameter 'embed\.weight' .*\(64, 6\) now, and a \w+ of shape \(8, 6\)"):
        optimizer.step()


def test_another_size_before_the_first_step_is_the_parameter_s():
    optimizer, p = begun("adamw", steps=0)
    p.data = torch.ones(64, 6)
    p.grad = torch.ones(64, 6)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (64, 6)


def test_states_elsewhere():
    optimizer, p = begun("adamw")
    optimizer.state[p]["exp_avg"] = torch.ones(8, 6, device="meta")
    p.grad = torch.ones(8, 6)
    with pytest.raises(RuntimeError, match=r"'embed.weight' .*lies on cpu, and its exp_avg on meta"):
        optimizer.step()


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def swapped_run(make):
    """After each step but one the tensors of a module are others, and the parameters the same objects."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    optimizer = make(model)
    for k in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        if k != 2:
            optimizer.zero_grad()
            model._apply(torch.clone)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_swapped_tensors_as_with_torch(swapping, kernel):
    """As model.to() does where torch is told to swap, and with tensors that have no data to be set (FSDP2)."""
    ours = swapped_run(
        lambda model: CWDAdamW(model.parameters(), lr=0.1, weight_decay=0.0, cautious=False, kernel=kernel)
    )
    theirs = swapped_run(lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_swapped_tensors_change_nothing(swapping, rule):
    def make(model):
        hyper = {"momentum": 0.9} if rule == "sgd" else {}
        groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}]
        groups.append({"params": [p for p in model.parameters() if p.ndim == 1], "algorithm": "adamw"})
        return CWDOptimizer(groups, lr=0.01, algorithm=rule, **hyper)

    found = swapped_run(make)
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(found, swapped_run(make))
