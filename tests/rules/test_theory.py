"""What the paper proves, on problems small enough to solve: CWD finds minima of the loss itself, plain decay does not.

All in float64, with several starting points as the elements of one parameter.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_cwd import CWDOptimizer

# The paper's betas; SGD in the paper's form.
PAPER = {"adamw": {"betas": (0.9, 0.95)}, "lion": {}, "sgd": {"momentum": 0.9, "ema": True}}


def make(algorithm: str, x0, **options) -> tuple[CWDOptimizer, torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.as_tensor(x0, dtype=torch.float64).clone())
    return CWDOptimizer([param], algorithm=algorithm, **options), param


def minimise(algorithm: str, x0, grad: Callable[[Tensor], Tensor], *, lr: float, steps: int, **options) -> Tensor:
    """The parameter after ``steps`` with a learning rate that goes to 0 linearly; the rates add up to lr*steps/2."""
    optimizer, param = make(algorithm, x0, **options)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        param.grad = grad(param.detach())
        optimizer.step()
    return param.detach()


# --- (x - 5)^2 / 2 ---


@pytest.mark.parametrize("algorithm", PAPER)
def test_one_dimension(algorithm):
    """Plain decay stops where |u| = weight_decay * |x|: at 1/wd with |u| = 1, at 5/(1 + wd) with u = x - 5."""
    run = {"lr": 0.05, "steps": 1200, "weight_decay": 0.5, **PAPER[algorithm]}
    plain, cautious = (
        minimise(algorithm, [0.1, 9.0, -4.0], lambda x: x - 5, cautious=c, **run).numpy() for c in (False, True)
    )
    # What is left of the start is exp(-wd * (sum of rates)) = exp(-.5 * 30) = 3e-7 of it; Adam's |u| is 1 to 1e-5.
    np.testing.assert_allclose(plain, 5 / 1.5 if algorithm == "sgd" else 2.0, rtol=1e-5)
    # The momentum remembers 10 steps, over which x may drift by wd * x * (sum of the last 10 rates) = 5e-3.
    np.testing.assert_allclose(cautious, 5.0, atol=5e-3)


@pytest.mark.parametrize("algorithm", PAPER)
def test_one_dimension_at_a_constant_rate(algorithm):
    """The decay still acts for a step after the minimum was crossed: x stays within one step of it."""
    lr, wd = 0.05, 0.5
    optimizer, param = make(algorithm, [0.1, 9.0, -4.0], lr=lr, weight_decay=wd, **PAPER[algorithm])
    for t in range(900):
        param.grad = param.detach() - 5
        optimizer.step()
        if t > 600:
            assert (param.detach() - 5).abs().max() <= lr * (1 + wd * 5)


# --- 20-dimensional quadratic ---


def quadratic() -> tuple[Tensor, Tensor]:
    """A positive definite A and the minimum x* of (x - x*) A (x - x*) / 2, far outside the box |x| <= 1/wd."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(20, 20))
    A = A @ A.T / 20 + 0.1 * np.eye(20)
    minimum = np.linalg.solve(A, 3 * rng.normal(size=20))
    assert np.abs(minimum).max() > 20
    return torch.from_numpy(A), torch.from_numpy(minimum)


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize("weight_decay", [0.3, 1.0])
def test_plain_decay_ends_in_a_box_and_cwd_at_the_minimum(algorithm, weight_decay):
    A, minimum = quadratic()
    run = {"lr": 0.04, "steps": 3000, "weight_decay": weight_decay, **PAPER[algorithm]}
    plain, cautious = (
        minimise(algorithm, torch.zeros(20), lambda x: A @ (x - minimum), cautious=c, **run) for c in (False, True)
    )

    def gap(x):
        return float((x - minimum) @ A @ (x - minimum) / 2)

    # From 0, with |u| = 1 all the way; Adam's |u| is 1 to 1e-5.
    edge = (1 - math.exp(-weight_decay * 0.04 * 3000 / 2)) / weight_decay
    assert plain.abs().max().item() == pytest.approx(edge, rel=2e-5)
    assert gap(plain) > 100
    assert gap(cautious) < 1e-4


def _gradient_descent(f, x, state, t, lr, wd):
    return f


def _momentum(f, x, state, t, lr, wd):
    m = state["momentum_buffer"]
    return f + (m @ m) / 2 + wd * (m * x).clamp(min=0).sum()


def _lion(f, x, state, t, lr, wd):
    m = state["exp_avg"]
    return f + m.abs().sum() + wd * (m * x).clamp(min=0).sum()


def _adam(f, x, state, t, lr, wd):
    m, v = state["exp_avg"], state["exp_avg_sq"]
    h = (v / (1 - (1 - lr / 2) ** t)).sqrt() + 1e-3
    return f + (m * m / (2 * h)).sum() / (1 - (1 - lr) ** t) + wd * (m * x).clamp(min=0).sum()


# The Lyapunov functions of the paper's differential equations, at a = b = alpha = 1 and gamma = 1/2. With
# beta = 1 - lr * rate, a moving average is Euler's step of size lr of m' = rate * (g - m).
LYAPUNOV = {
    "gradient descent": ("sgd", {}, _gradient_descent, 1),
    "momentum": ("sgd", {"momentum": 0.99, "ema": True}, _momentum, 200),
    "lion": ("lion", {"betas": (0.99, 0.99)}, _lion, 200),
    "adam": ("adamw", {"betas": (0.99, 0.995), "eps": 1e-3}, _adam, 200),
}


@pytest.mark.parametrize("system", LYAPUNOV)
def test_lyapunov_function_decreases(system):
    """At every step for gradient descent; over windows for the others, whose finite steps chatter (6 % go up)."""
    algorithm, options, value, window = LYAPUNOV[system]
    A, minimum = quadratic()
    noise = torch.randn(20, dtype=torch.float64, generator=torch.manual_seed(0))
    rises = {}
    for cautious in (True, False):
        options = options | {"lr": 0.01, "weight_decay": 0.3, "cautious": cautious}
        optimizer, param = make(algorithm, minimum + 3 * noise, **options)
        values = []
        for t in range(1, 1101):
            param.grad = A @ (param.detach() - minimum)
            optimizer.step()
            x = param.detach()
            f = (x - minimum) @ A @ (x - minimum) / 2
            values.append(float(value(f, x, optimizer.state[param], t, 0.01, 0.3)))
        # The first steps of Adam's bias correction are not those of its differential equation.
        rises[cautious] = np.diff(values[100::window]) >= 0
    assert not rises[True].any()
    assert rises[False].mean() > 0.5  # plain decay leaves the minimum again: the function is one of CWD alone


# --- Matrices: |X - B|^2 / 2 ---


@pytest.mark.parametrize("exact", [True, False])
def test_muon_plain_decay_bounds_the_operator_norm(exact):
    """|X|_op -> |O|_op / wd: 1/wd with the polar factor; the quintic leaves |O|_op in [0.68, 1.14]."""
    quintic, convergent = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
    table = [quintic] * 5 + [convergent] * 4 if exact else [quintic]
    B = 4 * torch.randn(8, 12, dtype=torch.float64, generator=torch.manual_seed(0))
    wd, run = 0.25, {"lr": 0.1, "steps": 1000, "adjust_lr_fn": "none", "nesterov": False}
    run |= {"ns_coefficients": table, "ns_steps": 9 if exact else 5, "weight_decay": wd}
    plain, cautious = (minimise("muon", torch.zeros(8, 12), lambda x: x - B, cautious=c, **run) for c in (False, True))
    norm = float(torch.linalg.matrix_norm(plain, 2))
    assert float(torch.linalg.matrix_norm(B, 2)) > 5 / wd
    if exact:
        assert norm == pytest.approx((1 - math.exp(-wd * 0.1 * 1000 / 2)) / wd, rel=1e-4)
    else:
        assert 0.68 / wd <= norm <= 1.14 / wd
    assert float((plain - B).norm()) > 30
    # The momentum remembers 20 steps, of rates below 0.1 * 20 / 1000, each with a direction of norm sqrt(8).
    assert float((cautious - B).norm()) < 20 * 0.1 * 20 / 1000 * math.sqrt(8)


def test_every_rule_reaches_the_minimum(algorithm):
    """At its default hyper-parameters, on a matrix, so that no rule needs to be named."""
    B = 2 * torch.randn(6, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    assert B.abs().max() > 1 / 0.3  # outside the box of plain decay
    run = {"lr": 0.1, "steps": 1000, "weight_decay": 0.3}
    plain, cautious = (
        minimise(algorithm, torch.zeros(6, 8), lambda x: x - B, cautious=c, **run) for c in (False, True)
    )
    assert (cautious - B).norm() < 0.02 * B.norm()
    assert (plain - B).norm() > 0.1 * B.norm()


# --- Sets of minima: CWD slides along them towards smaller parameters ---


def test_circle_and_parabola():
    """f = (|x - 3|^2 - 1)^2 and (y - 3 - (x - 3)^2)^2. Plain decay leaves the minima for the box |x| <= 2."""
    starts = [(4.5, 3.4), (3.2, 4.6), (4.5, 6.0), (5.0, 5.0)]
    circle = torch.tensor([True, True, False, False])

    def residual(p):
        x, y = (p - 3).unbind(1)
        return torch.where(circle, x**2 + y**2 - 1, y - x**2)

    def grad(p):
        x, y = (p - 3).unbind(1)
        s = residual(p)
        return torch.stack([torch.where(circle, 4 * s * x, -4 * s * x), torch.where(circle, 4 * s * y, 2 * s)], 1)

    run = {"lr": 0.02, "steps": 3000, **PAPER["adamw"]}
    undecayed = minimise("adamw", starts, grad, weight_decay=0.0, **run)
    plain = minimise("adamw", starts, grad, weight_decay=0.5, cautious=False, **run)
    cautious = minimise("adamw", starts, grad, weight_decay=0.5, **run)
    assert (residual(undecayed) ** 2 < 1e-8).all()
    assert (residual(cautious) ** 2 < 1e-8).all()
    # At (2, 2) the residuals are 1 and -2; Adam's |u| is 1 to 1e-3 with the rates of the last steps.
    torch.testing.assert_close(plain, torch.full_like(plain, 2.0), rtol=1e-3, atol=0)
    assert (cautious.norm(dim=1) < 0.95 * undecayed.norm(dim=1)).all()


# --- What the mask depends on, and what CWD costs ---


def masks(algorithm: str, **options) -> Tensor:
    """The masks of 10 steps with random gradients at a fixed x, read from how far a decay of 1 moves it."""
    generator = torch.manual_seed(0)
    x = torch.randn(7, 11, dtype=torch.float64, generator=generator)
    optimizer, param = make(algorithm, x, lr=0.1, weight_decay=1.0, **options)
    twin, undecayed = make(algorithm, x, lr=0.1, weight_decay=0.0, **options)
    found = []
    for _ in range(10):
        param.grad = undecayed.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
        twin.step()
        found.append(((undecayed - param).detach() / (0.1 * x)).round())
        with torch.no_grad():
            param.copy_(x)
            undecayed.copy_(x)
    return torch.stack(found)


def test_masks_are_of_zeros_and_ones(algorithm):
    found = masks(algorithm)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert 0.3 < found.mean() < 0.7  # an x that is independent of the gradients agrees with half of them


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
def test_bias_correction_and_eps_do_not_change_the_mask(eps):
    """Adam's mask is that of its first moment, which is the paper's SGD's and, with equal betas, Lion's."""
    expected = masks("sgd", momentum=0.9, ema=True)
    assert torch.equal(masks("adamw", betas=(0.9, 0.999), eps=eps), expected)
    assert torch.equal(masks("lion", betas=(0.9, 0.9)), expected)
    assert not torch.equal(masks("sgd"), expected)  # the raw gradient's is another


def test_shape_factors_do_not_change_the_mask_but_nesterov_does():
    expected = masks("muon", adjust_lr_fn="none")
    for adjust_lr_fn in ("match_rms_adamw", "original"):
        assert torch.equal(masks("muon", adjust_lr_fn=adjust_lr_fn), expected)
    assert not torch.equal(masks("muon", adjust_lr_fn="none", nesterov=False), expected)


def test_cwd_adds_no_state(algorithm):
    """A checkpoint of either kind loads into the other."""
    states = []
    for cautious in (True, False):
        optimizer, param = make(algorithm, torch.ones(3, 5), cautious=cautious, weight_decay=0.1)
        param.grad = torch.ones_like(param)
        optimizer.step()
        states.append({key: (value.shape, value.dtype) for key, value in optimizer.state[param].items()})
    assert states[0] == states[1]
