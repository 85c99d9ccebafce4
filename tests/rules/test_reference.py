"""Every rule against the paper's algorithms in float64 numpy, and against a case computed by hand."""

import numpy as np
import pytest
import torch

from hf_cwd import CWDOptimizer, StepStatistics
from hf_cwd.kernels import eager
from hf_cwd.rules import RULES
from tests.support.comparison import REFERENCES, assert_follows_paper, every_variant, initial, to_numpy
from tests.support.reference import paper

VARIANTS = pytest.mark.parametrize(("rule", "hyper"), every_variant(), ids=str)


def test_every_rule_has_a_reference():
    assert set(REFERENCES) == set(RULES)


@VARIANTS
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)], ids=str)
@pytest.mark.parametrize(("mask", "correlation"), [("ge", 0.0), ("gt", 0.0), ("ge", 1.0), ("gt", -1.0)])
def test_float64(rule, hyper, shape, mask, correlation):
    assert_follows_paper(rule, initial(shape), mask=mask, correlation=correlation, **hyper)


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["ge", "gt"])
def test_lower_precision(rule, hyper, dtype, mask):
    assert_follows_paper(rule, initial((14, 9), dtype), mask=mask, **hyper)


@pytest.mark.parametrize("lr", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("cautious", [True, False])
def test_rates(algorithm, lr, weight_decay, cautious):
    assert_follows_paper(algorithm, lr=lr, weight_decay=weight_decay, cautious=cautious)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_maximize(algorithm, dtype):
    assert_follows_paper(algorithm, initial((9, 14), dtype), maximize=True, correlation=-0.5)


def test_learning_rate_is_read_at_each_step(algorithm):
    assert_follows_paper(algorithm, lr=(0.1, 0.01, 0.0, 0.05))


# --- Layouts and sizes ---


def _sizes(rule):
    """Shapes about the kernel's block: one element more, a whole number of blocks, and a part left over."""
    if RULES[rule].matrix is not None:
        return [(16, eager.BLOCK // 16), (24, eager.BLOCK // 12 + 1), (1, 7), (7, 1), (1, 1)]
    return [(eager.BLOCK + 1,), (2 * eager.BLOCK,), (3, eager.BLOCK // 2 + 5), (2, 3, 4, 5), (7,), (1,), ()]


@pytest.mark.parametrize(("rule", "shape"), [(rule, shape) for rule in RULES for shape in _sizes(rule)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes(rule, shape, dtype):
    assert_follows_paper(rule, initial(shape, dtype), steps=4)


LAYOUTS = {
    "transposed": lambda dtype: initial((14, 9), dtype).t(),
    "every second column": lambda dtype: initial((9, 28), dtype)[:, ::2],
    "channels_last": lambda dtype: initial((4, 3, 5, 6), dtype).to(memory_format=torch.channels_last),
    "permuted": lambda dtype: initial((4, 3, 5), dtype).permute(2, 0, 1),
}


@pytest.mark.parametrize(
    ("rule", "layout"),
    [(r, name) for r in RULES for name in LAYOUTS if RULES[r].matrix is None or LAYOUTS[name](torch.float32).ndim == 2],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layouts(rule, layout, dtype):
    param = LAYOUTS[layout](dtype)
    assert not param.is_contiguous()
    stride = param.stride()
    optimizer = assert_follows_paper(rule, param, steps=5)
    assert optimizer.param_groups[0]["params"][0].stride() == stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_another_layout(algorithm, dtype):
    x = initial((9, 14), dtype)
    for transposed in (False, True):
        param = torch.nn.Parameter(x.clone())
        grad = initial((9, 14), dtype, seed=1)
        param.grad = grad.t().contiguous().t() if transposed else grad
        CWDOptimizer([param], 0.1, algorithm=algorithm, weight_decay=0.5).step()
        if not transposed:
            expected = param.detach()
    assert torch.equal(param.detach(), expected)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [(rule, shape) for rule in RULES for shape in [(0, 3), (3, 0), *([] if RULES[rule].matrix else [(0,)])]],
    ids=str,
)
def test_empty_parameter(rule, shape):
    assert_follows_paper(rule, torch.zeros(shape), steps=2)


# --- What is decayed ---


@VARIANTS
@pytest.mark.parametrize("mask", ["ge", "gt"])
def test_decayed_elements_are_counted(rule, hyper, mask):
    """The count is that of the reference's mask, over two parameters and only where there is something to decay."""
    rng = np.random.default_rng(0)
    params = [torch.nn.Parameter(initial(shape, seed=1)) for shape in ((6, 7), (5, 4), (2, 2))]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = CWDOptimizer(groups, 1e-2, algorithm=rule, mask=mask, **hyper)
    own = {name: optimizer.param_groups[0][name] for name in RULES[rule].hyperparameters}
    states = [{key: np.zeros(p.shape) for key in RULES[rule].state_keys(own)} for p in params]
    for t in range(1, 6):
        expected = 0
        for i, p in enumerate(params):
            g = rng.standard_normal(p.shape)
            g[0] = 0
            p.grad = torch.from_numpy(g)
            _, s, states[i] = REFERENCES[rule](g, states[i], t, **own)
            expected += int(paper.cautious(s, to_numpy(p), strict=mask == "gt").sum()) if i < 2 else 0
        optimizer.statistics = StepStatistics()
        optimizer.step()
        total = optimizer.statistics.read().total
        assert (total.decayed, total.eligible, total.numel) == (expected, 6 * 7 + 5 * 4, 6 * 7 + 5 * 4 + 2 * 2)


# --- The references themselves ---


def test_lion_is_lion_k_of_the_one_norm():
    rng = np.random.default_rng(0)
    x = y = rng.standard_normal(50)
    m = n = np.zeros(50)
    for _ in range(20):
        g = rng.standard_normal(50)
        u, s, m = paper.lion(g, m, beta1=0.9, beta2=0.95)
        x = paper.update(x, u, paper.cautious(s, x), lr=0.1, wd=0.5)
        u, s, n = paper.lion_k(g, n, beta1=0.9, beta2=0.95)
        y = paper.update(y, u, paper.cautious(s, y), lr=0.1, wd=0.5)
    np.testing.assert_allclose(x, y, rtol=1e-13)


# Two steps by hand, lr 0.1, weight_decay 0.5 (a decay of 0.05 x): hyper-parameters, shape, x0, gradients, x1, x2.
BY_HAND = {
    # Step 1: m_hat = g, sqrt(v_hat) = |g|, so u = (1, 1, -1); u*x >= 0 for the first only.
    #   x1 = (2 - .1 - .1, -2 - .1, .5 + .1) = (1.8, -2.1, .6)
    # Step 2: v = .75 (.25 g^2) + .25 g^2 = .4375 g^2 and v_hat = v / (1 - .75^2) = g^2 again.
    #   m = .25 g1 + .5 g2 = (-.25, .75, .5); m_hat = m / .75 = (-1/3, 1, 2/3); sqrt(v_hat) = (1, 1, 2)
    #   u = (-1/3, 1, 1/3): u*x < 0, < 0, > 0
    #   x2 = (1.8 + .1/3, -2.1 - .1, .6 - .1/3 - .03)
    "adamw": (
        {"betas": (0.5, 0.75), "eps": 0.0},
        (3,),
        [2, -2, 0.5],
        [[1, 1, -2], [-1, 1, 2]],
        [1.8, -2.1, 0.6],
        [1.8 + 0.1 / 3, -2.2, 0.57 - 0.1 / 3],
    ),
    # Step 1: c = .5 g = (1, -2, 0), u = (1, -1, 0), u*x = (+, +, 0): all are decayed, the last without a gradient too.
    #   x1 = (1 - .1 - .05, -1 + .1 + .05, 2 - .1) = (.85, -.85, 1.9); m = .25 g = (.5, -1, 0)
    # Step 2: c = .5 m + .5 g = (.25 - 1, -.5 + 3, 0) = (-.75, 2.5, 0), u = (-1, 1, 0), u*x = (-, -, 0)
    #   x2 = (.95, -.95, 1.9 - .095)
    "lion": (
        {"betas": (0.5, 0.75)},
        (3,),
        [1, -1, 2],
        [[2, -4, 0], [-2, 6, 0]],
        [0.85, -0.85, 1.9],
        [0.95, -0.95, 1.805],
    ),
    # One iteration at singular value 1 gives 3.4445 - 4.7750 + 2.0315 = .701. A column of 4 has factor sqrt(4/1) = 2 on
    # the direction ("original") and none on the decay.
    # Step 1: M = G = (3, -4, 0, 0), O = .701 (.6, -.8, 0, 0), 2 O = (.8412, -1.1216, 0, 0); O*x = (+, -, 0, 0)
    #   x1 = (1 - .08412 - .05, 2 + .11216, 1 - .05, 0)
    # Step 2: M = .5 M + G = (1.5 + 2.5, -2 + 5, 0, 0) = (4, 3, 0, 0), 2 O = 1.402 (.8, .6, 0, 0), all O*x >= 0
    #   x2 = (.86588 * .95 - .11216, 2.11216 * .95 - .08412, .95 * .95, 0)
    "muon": (
        {"momentum": 0.5, "nesterov": False, "ns_steps": 1, "adjust_lr_fn": "original"},
        (4, 1),
        [1, 2, 1, 0],
        [[3, -4, 0, 0], [2.5, 5, 0, 0]],
        [0.86588, 2.11216, 0.95, 0],
        [0.710426, 1.922432, 0.9025, 0],
    ),
    # Step 1: m = .5 g = (1, 1, -2), u*x = (+, -, -): x1 = (1 - .1 - .05, -1 - .1, 4 + .2)
    # Step 2: m = .5 m + .5 g = (.5 - .25, .5 + .5, -1 + 2) = (.25, 1, 1), u*x = (+, -, +): the first is decayed, which
    #   its raw gradient would not say. x2 = (.85 - .025 - .0425, -1.1 - .1, 4.2 - .1 - .21)
    "sgd": (
        {"momentum": 0.5, "ema": True},
        (3,),
        [1, -1, 4],
        [[2, 2, -4], [-0.5, 1, 4]],
        [0.85, -1.1, 4.2],
        [0.7825, -1.2, 3.89],
    ),
}


def test_by_hand(algorithm):
    hyper, shape, x0, gradients, *expected = BY_HAND[algorithm]
    param = torch.nn.Parameter(torch.tensor(x0, dtype=torch.float64).reshape(shape))
    optimizer = CWDOptimizer([param], 0.1, algorithm=algorithm, weight_decay=0.5, **hyper)
    for g, x in zip(gradients, expected, strict=True):
        param.grad = torch.tensor(g, dtype=torch.float64).reshape(shape)
        optimizer.step()
        torch.testing.assert_close(param.detach().flatten(), torch.tensor(x, dtype=torch.float64))
