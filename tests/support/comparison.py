"""Runs an optimizer of the package next to the paper's algorithm and asserts that they agree at every step."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES
from tests.support.reference import paper

# Hyper-parameters beside the defaults under which each rule is compared; a rule not listed is compared at its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}, {"betas": (0.9, 0.95), "eps": 1e-6}, {"betas": (0.5, 0.75), "eps": 1e-3}],
    "lion": [{}, {"betas": (0.95, 0.98)}, {"betas": (0.5, 0.5)}],
    "muon": [
        {"nesterov": nesterov, "adjust_lr_fn": adjust, "momentum": momentum}
        for nesterov, momentum in ((True, 0.95), (False, 0.8))
        for adjust in ("match_rms_adamw", "original", "none")
    ],
    "sgd": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "ema": True},
        {"momentum": 0.8, "ema": True, "nesterov": True},
    ],
}
HANDFUL = 5  # float32 elements whose direction is within rounding of zero and took the other sign


def every_variant() -> list[tuple[str, dict[str, Any]]]:
    return [(rule, variant) for rule in RULES for variant in VARIANTS.get(rule, [{}])]


def _adamw(g, state, t, *, betas, eps):
    u, s, (m, v) = paper.adam(g, state["exp_avg"], state["exp_avg_sq"], t, beta1=betas[0], beta2=betas[1], eps=eps)
    return u, s, {"exp_avg": m, "exp_avg_sq": v}


def _lion(g, state, t, *, betas):
    u, s, m = paper.lion(g, state["exp_avg"], beta1=betas[0], beta2=betas[1])
    return u, s, {"exp_avg": m}


def _muon(g, state, t, *, momentum, nesterov, adjust_lr_fn, ns_steps, **_):
    rows, columns = g.shape
    scale = {
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "original": math.sqrt(max(1, rows / max(columns, 1))),  # of an empty matrix anything will do
        "none": 1.0,
    }[adjust_lr_fn]
    # The package keeps torch's moving average (1 - b) M; the paper keeps M.
    M = state["exp_avg"] / (1 - momentum)
    u, s, M = paper.muon(g, M, beta=momentum, nesterov=nesterov, ns_steps=ns_steps, scale=scale)
    return u, s, {"exp_avg": (1 - momentum) * M}


def _sgd(g, state, t, *, momentum, dampening, nesterov, ema):
    if momentum == 0:
        return g, g, {}
    if ema:
        u, s, m = paper.sgd(g, state["momentum_buffer"], beta=momentum, nesterov=nesterov)
    else:
        m = None if t == 1 else state["momentum_buffer"]
        u, s, m = paper.classical_sgd(g, m, momentum=momentum, dampening=dampening, nesterov=nesterov)
    return u, s, {"momentum_buffer": m}


# A rule of the package by the paper's algorithm: (g, state, t, **hyper-parameters) -> (u, s, state), state named as in
# the package. A new rule needs a line here, and fails its tests without one.
REFERENCES = {"adamw": _adamw, "lion": _lion, "muon": _muon, "sgd": _sgd}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def initial(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """A parameter of both signs, with a zero in it."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed)).to(dtype)
    if x.numel() > 3:
        x.view(-1)[1] = 0
    return x


def gradient(rng: np.random.Generator, x: np.ndarray, correlation: float) -> np.ndarray:
    """Random, plus ``correlation * x``. The first row is zero, as that of an unseen token: there ge and gt differ."""
    g = rng.standard_normal(x.shape) + correlation * x
    if g.ndim and len(g) > 1:
        g[0] = 0
    return g


def spacing(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of ``dtype`` around x (one unit in the last place)."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(x), info.smallest_normal))
    return info.eps * np.exp2(exponent - 1.0)


def assert_follows_paper(
    rule: str,
    param: torch.Tensor | None = None,
    *,
    steps: int = 20,
    correlation: float = 0.0,
    seed: int = 0,
    lr: float | tuple[float, ...] = 1e-2,
    weight_decay: float = 0.5,
    cautious: bool = True,
    mask: str = "ge",
    maximize: bool = False,
    kernel: str = "auto",
    **hyper: Any,
) -> CWDOptimizer:
    """Steps a parameter and the paper's algorithm with the same gradients, from the same x.

    float64 must agree to 1e-12. float32 must agree to its rounding, which adds up over the steps, except where the
    direction is within rounding of zero, so that a sign may differ: there an element may be off by its whole decay, and
    by the jump of its direction (Lion's sign). Such elements are counted, and may be a handful. float16 and bfloat16
    are rounded once a step; the algorithm is therefore restarted from the stored numbers before each step.
    Several learning rates are taken in turn.
    """
    rng = np.random.default_rng(seed)
    param = torch.nn.Parameter(initial((9, 14), seed=seed) if param is None else param)
    if "ns_dtype" in RULES[rule].hyperparameters and param.dtype != torch.float64:
        # bfloat16, the default, is too coarse: it changes the sign of many elements.
        hyper = {"ns_dtype": "float32"} | hyper
    options = {"weight_decay": weight_decay, "cautious": cautious, "mask": mask, "maximize": maximize, "kernel": kernel}
    optimizer = CWDOptimizer([param], algorithm=rule, **options, **hyper)
    rates = itertools.cycle(lr if isinstance(lr, tuple) else (lr,))
    own = {name: optimizer.param_groups[0][name] for name in RULES[rule].hyperparameters} | hyper
    keys = RULES[rule].state_keys(own)

    x, state = to_numpy(param), {key: np.zeros(param.shape) for key in keys}
    silent = np.ones(param.shape, dtype=bool)  # elements that never had a gradient: their direction is exactly zero
    uncertain, allowance, largest = np.zeros(param.shape, dtype=bool), 0.0, np.zeros(3)
    for t, lr in zip(range(1, steps + 1), rates, strict=False):
        low_precision = param.dtype in (torch.float16, torch.bfloat16)
        if low_precision and t > 1:
            x, state = to_numpy(param), {key: to_numpy(optimizer.state[param][key]) for key in keys}
            uncertain.fill(False)
            allowance = 0.0
        param.grad = torch.empty_like(param).copy_(torch.tensor(gradient(rng, x, correlation)))
        g = to_numpy(param.grad)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        u, s, state = REFERENCES[rule](-g if maximize else g, state, t, **own)
        decayed = paper.cautious(s, x, strict=mask == "gt") if cautious else 1.0
        silent &= g == 0
        near_zero = (np.abs(s) <= _gain(rule, own) * torch.finfo(torch.float32).eps * _max(s)) & ~silent
        if param.dtype != torch.float64:
            uncertain |= near_zero
        allowance = np.maximum(allowance, near_zero * lr * (weight_decay * np.abs(x) + 2 * np.abs(u)))
        largest = np.maximum(largest, (_max(x), lr * _max(u), _max(g)))
        x = paper.update(x, u, decayed, lr=lr, wd=weight_decay)

        rounding = _rounding(param.dtype, 1 if low_precision else t, _gain(rule, own), largest)
        error = np.abs(to_numpy(param) - x)
        unit = spacing(np.maximum(np.abs(x), np.abs(to_numpy(param))), param.dtype) / 2 if low_precision else 0.0
        where = f"{rule} {own}, step {t}"
        _assert_at_most(error, rounding + unit + np.where(uncertain, allowance, 0), f"parameter, {where}")
        flipped = np.sum(error > rounding + unit)
        # Averages of numbers on a coarse grid cancel exactly now and then; 1 in 5000 is ten times what is seen.
        handful = HANDFUL + (param.numel() // 5000 if low_precision else 0)
        assert flipped <= handful, f"{flipped} elements are off by their decay, {where}"
        _assert_state(optimizer.state[param], state, largest[2], low_precision, t, where)
    return optimizer


def _gain(rule: str, hyper: Mapping[str, Any]) -> float:
    """How far one rounding may grow in the direction, relative to the direction's largest element.

    Newton-Schulz multiplies what is small by its slope at zero in each iteration. Element-wise, 16 roundings are
    allowed for: an average that cancels is rounded relative to its terms, which are larger than it is.
    """
    return 16.0 if RULES[rule].matrix is None else paper.QUINTIC[0] ** hyper["ns_steps"]


def _rounding(dtype: torch.dtype, roundings: int, gain: float, largest: np.ndarray) -> float:
    x, lr_u, _ = largest
    if dtype == torch.float64:
        return 1e-12 * (1 + x)
    # Three roundings of x a step (decay, direction, and the product in between), and those of the direction.
    return torch.finfo(torch.float32).eps * roundings * (3 * x + gain * lr_u)


def _assert_state(found: Mapping[str, Any], expected: Mapping[str, Any], g: float, low: bool, t: int, where: str):
    assert set(found) == {"step", *expected}, where
    assert int(found["step"]) == t, where
    for key, value in expected.items():
        dtype = found[key].dtype
        eps = 1e-12 if dtype == torch.float64 else torch.finfo(torch.float32).eps
        # A moving average forgets its old roundings; 4 stands for those it remembers. Squares are of size g^2.
        bound = 4 * eps * max(1.0, g) ** 2 + (spacing(value, dtype) / 2 if low else 0.0)
        _assert_at_most(np.abs(to_numpy(found[key]) - value), bound, f"{key}, {where}")


def _assert_at_most(error: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    excess = error - bound
    # Written so that NaN fails.
    assert (excess <= 0).all(), f"{what}: off by {_max(error):.3g}, {np.sum(~(excess <= 0))} elements out of bounds"


def _max(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0))
