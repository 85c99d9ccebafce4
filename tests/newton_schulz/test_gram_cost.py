"""What Newton-Schulz costs, and which of its forms runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_cwd import CWDMuon
from hf_cwd.newton_schulz import orthogonalize
from hf_cwd.newton_schulz.orthogonalize import FORMS, STRIP, flops, newton_schulz
from hf_cwd.rules import RULES
from tests.newton_schulz.test_orthogonalize import by_svd, matrices

BOTH = pytest.mark.parametrize("form", ["standard", "gram"])


def form_of(rows, columns, steps=5, form="auto", coefficients="quintic"):
    return orthogonalize._form(rows, columns, orthogonalize._table(coefficients, steps), form)


@BOTH
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (1, 9), (40, 60)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9])
def test_flops_are_those_of_the_products_that_run(shape, steps, form):
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.ones(3, *shape), steps=steps, form=form)
    assert counter.get_total_flops() == 3 * flops(*shape, steps=steps, form=form)
    assert isinstance(flops(*shape, steps=steps, form=form), int)


def test_flops_by_hand():
    """3 x 7, five iterations. Quintic: X X^T and Q X twice, 9 + 5 squares; Polar Express: three times, 5 + 5 + 1."""
    wide, square = 2 * 3 * 3 * 7, 2 * 3**3
    assert flops(3, 7, form="standard") == 5 * (2 * wide + square)
    assert flops(3, 7) == flops(7, 3, form="gram") == 4 * wide + 14 * square
    assert flops(3, 7, coefficients="polar_express") == 6 * wide + 11 * square


@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("coefficients", ["polar_express", [(8.0, -9.0, 3.0), (1.5, -0.5, 0.0)], [(2.0, -1.5, 0.5)]])
def test_flops_know_the_coefficients(coefficients, steps):
    options = {"coefficients": coefficients, "steps": steps, "form": "gram"}
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.ones(12, 30), **options)
    assert counter.get_total_flops() == flops(12, 30, **options)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (20, 30), (20, 29)], ids=str)
def test_auto_runs_what_it_counts(shape):
    hyper = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()}
    with FlopCounterMode(display=False) as counter:
        RULES["muon"].matrix(torch.ones(shape), **hyper)
    assert counter.get_total_flops() == RULES["muon"].matrix_flops(*shape, **hyper)
    assert counter.get_total_flops() == min(flops(*shape, steps=5, form=form) for form in ("standard", "gram"))


def test_strips_save_what_lies_right_of_the_diagonal():
    rows, long = 2 * STRIP + 88, 3 * STRIP
    strips = [(0, STRIP), (STRIP, 2 * STRIP), (2 * STRIP, rows)]
    part = sum((end - top) * end for top, end in strips) / rows**2
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.ones(rows, long), steps=1, form="standard")
    assert counter.get_total_flops() == part * (2 * rows**2 * long + 2 * rows**3) + 2 * rows**2 * long
    assert part < 0.7


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((64, 64), "standard"),
        ((64, 96), "standard"),
        ((64, 97), "gram"),
        ((2048, 2048), "standard"),
        ((768, 3072), "gram"),
        ((512, 2048), "gram"),
        ((1, 1), "standard"),
        ((1, 2), "gram"),
        ((0, 4), "standard"),
    ],
)
def test_auto_is_the_cheaper_form(shape, form):
    for coefficients, steps in itertools.product(("quintic", "polar_express"), (2, 3, 5, 8)):
        chosen = [form_of(*s, steps=steps, coefficients=coefficients) for s in (shape, shape[::-1])]
        assert chosen == [form, form]
    if max(shape) < 100:
        M = matrices(shape)
        assert torch.equal(newton_schulz(M), newton_schulz(M, form=form))
        assert torch.equal(newton_schulz(torch.stack([M, M]))[1], newton_schulz(M, form=form))


def test_one_iteration_is_never_cheaper_in_gram_s_form():
    assert {form_of(4, long, steps=1) for long in range(4, 100)} == {"standard"}


def test_the_rule_takes_the_form():
    """Bit for bit, so that the rule's ``ns`` reaches the iteration and the plan's costs."""
    rule = RULES["muon"]
    defaults = {name: kind.default for name, kind in rule.hyperparameters.items()} | {"ns_dtype": "bfloat16"}
    M, costs = matrices((12, 60)).float(), set()
    for form in ("standard", "gram"):
        hyper = defaults | {"ns": form}
        assert torch.equal(rule.matrix(M, **hyper), newton_schulz(M, form=form))
        costs.add(rule.matrix_flops(12, 60, **hyper))
    assert len(costs) == 2
    assert torch.equal(rule.matrix(M, **defaults), newton_schulz(M, form="gram"))
    assert rule.hyperparameters["ns"].choices == FORMS


# --- Names ---


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="form='fast' is not valid: form is one of auto, standard, gram"):
        newton_schulz(torch.ones(2, 3), form="fast")
    with pytest.raises(ValueError, match="'cubic' is not one of quintic, polar_express"):
        newton_schulz(torch.ones(2, 3), coefficients="cubic")
    x = torch.nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="muon: ns='fast' is not valid: ns is one of auto, standard, gram"):
        CWDMuon([x], ns="fast")
    with pytest.raises(
        ValueError, match="ns_coefficients='cubic' is not valid: ns_coefficients is one of quintic, polar_express"
    ):
        CWDMuon([x], ns_coefficients="cubic")


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_takes_the_form(form):
    x = torch.nn.Parameter(torch.zeros(4, 12))
    x.grad = matrices((4, 12)).float()
    CWDMuon([x], lr=1.0, ns=form, adjust_lr_fn="none", weight_decay=0.0).step()
    torch.testing.assert_close(-x.detach(), by_svd(x.grad.double()).float(), rtol=1e-4, atol=1e-4)
