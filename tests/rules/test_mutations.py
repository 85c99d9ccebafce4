"""The oracle itself: the comparison with the paper must fail for each way in which a decay is known to go wrong.

Each mutant replaces the one definition that every rule goes through in the eager kernel. A mutant that the comparison
does not notice means that the comparison is blind, or that something takes a way round the definition. The other
kernels, which cannot be mutated from here, are held to the eager one in tests/kernels.
"""

import dataclasses

import pytest
import torch

from hf_cwd import decay
from hf_cwd.rules import RULES
from tests.support.comparison import assert_follows_paper, every_variant, initial

true_mask, true_step, true_rules = decay.cautious_mask, decay.step_, dict(RULES)
SHAPES = {torch.float64: (9, 14), torch.float32: (14, 9)}


def compare(rule, hyper, dtype, **options):
    """A gradient that follows x a little, so that u*x has either sign often; the first row has none."""
    options |= {"correlation": 0.5, "steps": 10, "kernel": "eager"}
    assert_follows_paper(rule, initial(SHAPES[dtype], dtype), **hyper, **options)


def no_mask(u, x, *, mask):
    return torch.ones_like(x)


def never(u, x, *, mask):
    return torch.zeros_like(x)


def inverted(u, x, *, mask):
    return 1 - true_mask(u, x, mask=mask)


def other_zeros(u, x, *, mask):
    return true_mask(u, x, mask="gt" if mask == "ge" else "ge")


def magnitudes(u, x, *, mask):
    return true_mask(u - x, x, mask=mask)


def scaled_decay(x, u, *, lr, scale=1.0, **rest):
    """Muon's shape-scaled learning rate in the decay too."""
    true_step(x, u, lr=lr * scale, **rest)


def after_the_update(x, u, *, weight_decay, **rest):
    true_step(x, u, weight_decay=0.0, **rest)
    true_step(x, u, weight_decay=weight_decay, **(rest | {"scale": 0.0}))


def without_lr(x, u, *, lr, weight_decay, **rest):
    true_step(x, u, lr=lr, weight_decay=weight_decay / lr, **rest)


def renormalised(x, u, *, weight_decay, mask="ge", **rest):
    """As Cautious Optimizers rescale their mask."""
    kept = true_mask(u, x, mask=mask).mean().item()
    true_step(x, u, weight_decay=weight_decay / kept, mask=mask, **rest)


def ascending(x, u, *, weight_decay, **rest):
    true_step(x, u, weight_decay=-weight_decay, **rest)


MASK_MUTANTS = [no_mask, never, inverted, other_zeros, magnitudes]
STEP_MUTANTS = [after_the_update, without_lr, renormalised, ascending]
EVERYTHING = pytest.mark.parametrize(("rule", "hyper"), every_variant(), ids=str)
DTYPES = pytest.mark.parametrize("dtype", SHAPES, ids=str)


@EVERYTHING
@DTYPES
@pytest.mark.parametrize("mask", ["ge", "gt"])
def test_unmutated(rule, hyper, dtype, mask):
    compare(rule, hyper, dtype, mask=mask)


@EVERYTHING
@DTYPES
@pytest.mark.parametrize("mask", ["ge", "gt"])
@pytest.mark.parametrize("mutant", MASK_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_wrong_mask(monkeypatch, rule, hyper, dtype, mask, mutant):
    monkeypatch.setattr(decay, "cautious_mask", mutant)
    with pytest.raises(AssertionError, match="parameter"):
        compare(rule, hyper, dtype, mask=mask)


@EVERYTHING
@DTYPES
@pytest.mark.parametrize("mutant", STEP_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_wrong_step(monkeypatch, rule, hyper, dtype, mutant):
    monkeypatch.setattr(decay, "step_", mutant)
    with pytest.raises(AssertionError, match="parameter"):
        compare(rule, hyper, dtype)


@pytest.mark.parametrize(
    ("rule", "hyper"),
    [(rule, hyper) for rule, hyper in every_variant() if RULES[rule].scale and hyper.get("adjust_lr_fn") != "none"],
    ids=str,
)
@DTYPES
def test_scaled_learning_rate_in_the_decay(monkeypatch, rule, hyper, dtype):
    monkeypatch.setattr(decay, "step_", scaled_decay)
    with pytest.raises(AssertionError, match="parameter"):
        # Four times as tall as wide, so that every scale differs from 1.
        assert_follows_paper(rule, initial((20, 5), dtype), kernel="eager", **hyper)


def _remembers(rule, hyper):
    """A direction that depends on earlier gradients; without a state it is the gradient itself (SGD)."""
    group = {name: kind.default for name, kind in RULES[rule].hyperparameters.items()} | hyper
    return RULES[rule].state_keys(group) != ()


@pytest.mark.parametrize(("rule", "hyper"), [case for case in every_variant() if _remembers(*case)], ids=str)
@DTYPES
def test_mask_by_the_raw_gradient(monkeypatch, rule, hyper, dtype):
    """1[g*x >= 0], in the paper's ablation worse than no decay at all."""
    seen = []

    def direction(grad, *buffers, **rest):
        seen.append(grad.clone())
        return true_rules[rule].direction(grad, *buffers, **rest)

    def masked_by_gradient(u, x, *, mask):
        return true_mask(seen[-1].reshape(x.shape), x, mask=mask)

    monkeypatch.setitem(RULES, rule, dataclasses.replace(RULES[rule], direction=direction))
    compare(rule, hyper, dtype)  # recording alone changes nothing
    monkeypatch.setattr(decay, "cautious_mask", masked_by_gradient)
    with pytest.raises(AssertionError, match="parameter"):
        compare(rule, hyper, dtype)


def swapped_betas(grad, *buffers, betas, **rest):
    return true_rules["adamw"].direction(grad, *buffers, betas=betas[::-1], **rest)


def leaking_state(grad, exp_avg, **rest):
    u = true_rules["lion"].direction(grad, exp_avg, **rest)
    exp_avg.mul_(1 - 1e-3)
    return u


def state_before_direction(grad, exp_avg, *, betas, **rest):
    exp_avg.lerp_(grad, 1 - betas[1])
    return exp_avg.lerp(grad, 1 - betas[0]).sign_()


@DTYPES
@pytest.mark.parametrize(
    ("rule", "mutant"), [("adamw", swapped_betas), ("lion", leaking_state), ("lion", state_before_direction)]
)
def test_wrong_state(monkeypatch, rule, mutant, dtype):
    monkeypatch.setitem(RULES, rule, dataclasses.replace(RULES[rule], direction=mutant))
    with pytest.raises(AssertionError):
        compare(rule, {}, dtype)
