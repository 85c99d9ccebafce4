"""What StepStatistics says of a step, against numbers computed from the weights before and after it."""

import copy
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from torch import nn

from hf_cwd import CWDAdamW, CWDMuon, CWDOptimizer, StepStatistics
from hf_cwd.kernels.interface import Item, Settings
from hf_cwd.optim.original_params import OriginalParams
from hf_cwd.optim.statistics import Totals
from hf_cwd.rules import RULES

LR, DECAY, OTHER_LR = 0.02, 0.3, 0.05
SHAPES = ((6, 4), (3, 8), (5, 5))


def made(algorithm, weight_decay, state=None, **options):
    """Two groups, of which one has another learning rate and no decay; a companion rule takes the vectors."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": OTHER_LR, "weight_decay": 0.0}]
    optimizer = CWDOptimizer(groups, LR, algorithm=algorithm, weight_decay=weight_decay, **options)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups[:1]:
            group["weight_decay"] = weight_decay
        for p, value in zip(params, state["params"], strict=True):
            p.data.copy_(value)
    for seed, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 + seed), dtype=torch.float64)
    return optimizer, params


def after_steps(algorithm, steps, **options):
    optimizer, params = made(algorithm, DECAY, **options)
    for _ in range(steps):
        optimizer.step()
    return {"optimizer": copy.deepcopy(optimizer.state_dict()), "params": [p.detach().clone() for p in params]}


def stepped(algorithm, state, weight_decay, **options):
    optimizer, params = made(algorithm, weight_decay, state, **options)
    optimizer.statistics = StepStatistics()
    optimizer.step()
    return optimizer.statistics.read(), [p.detach().numpy() for p in params]


@pytest.mark.parametrize("mode", [{}, {"mask": "gt"}, {"cautious": False}], ids=str)
@pytest.mark.parametrize("algorithm", RULES)
def test_statistics_of_a_step(algorithm, mode):
    state = after_steps(algorithm, 2, **mode)
    before = [p.numpy() for p in state["params"]]
    found, after = stepped(algorithm, state, DECAY, **mode)
    _, undecayed = stepped(algorithm, state, 0.0, **mode)
    changes = [x - y for x, y in zip(before, undecayed, strict=True)]  # lr * scale * u
    decays = [y - z for y, z in zip(undecayed, after, strict=True)]
    decayed = [abs(d) > 1e-9 for d in decays[:2]]
    assert 0 < sum(map(np.sum, decayed)) <= 24 + 24
    total = found.total
    assert (total.numel, total.eligible) == (24 + 24 + 25, 24 + 24)
    assert total.decayed == sum(map(np.sum, decayed))
    assert total.decayed_fraction == total.decayed / 48
    norm = np.sqrt(sum((x**2).sum() for x in before))
    assert total.weight_rms == pytest.approx(norm / np.sqrt(73), rel=1e-9)
    updates = [change / lr for change, lr in zip(changes, (LR, LR, OTHER_LR), strict=True)]
    assert total.update_rms == pytest.approx(np.sqrt(sum((u**2).sum() for u in updates) / 73), rel=1e-6)
    assert total.update_to_weight == pytest.approx(np.sqrt(sum((c**2).sum() for c in changes)) / norm, rel=1e-6)
    # To first order the decay takes away the sum of d * x, over the norm's square.
    taken = sum((d * x).sum() for d, x in zip(decays[:2], before, strict=False))
    assert total.effective_decay == pytest.approx(taken / sum((x**2).sum() for x in before[:2]), rel=1e-6)
    if mode == {"cautious": False}:
        assert total.effective_decay == pytest.approx(LR * DECAY)
    first, second = found.groups
    assert first + second == total
    assert second.weight_rms == pytest.approx(np.sqrt((before[2] ** 2).mean()))
    assert isnan(second.decayed_fraction)
    assert isnan(second.effective_decay)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("steps", [2, 5])
def test_orthogonality_error(shape, steps):
    """Of the singular values of the update, which is O times the scale and the learning rate."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = CWDMuon([p], 1.0, adjust_lr_fn="none", ns_steps=steps, ns_dtype="float32")
    optimizer.statistics = StepStatistics()
    optimizer.step()
    singular = np.linalg.svd(-p.detach().numpy(), compute_uv=False)
    expected = np.sqrt(((singular**2 - 1) ** 2).mean())
    assert optimizer.statistics.read().orthogonality_error == pytest.approx(expected, rel=1e-5)


def test_every_matrix_is_sampled_in_time():
    params = [nn.Parameter(torch.zeros(4, 4 + k)) for k in range(3)]
    for seed, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    errors = set()
    for sample in range(30):
        optimizer = CWDMuon([(str(k), p) for k, p in enumerate(params)], 0.0)
        optimizer.statistics = StepStatistics(sample)
        optimizer.step()
        errors.add(round(optimizer.statistics.read().orthogonality_error, 6))
    assert len(errors) == 3


def test_what_is_not_finite_is_named():
    names = ("one", "two", "three")
    params = {name: nn.Parameter(torch.ones(4)) for name in names}
    for p in params.values():
        p.grad = torch.ones(4)
    params["two"].grad[1] = nan
    optimizer = CWDAdamW(params.items(), lr=0.1)
    optimizer.statistics = StepStatistics()
    optimizer.step()
    found = optimizer.statistics.read()
    assert not found.total.is_finite
    assert found.not_finite == {params["two"]: "parameter 'two' of shape (4,)"}


@pytest.mark.parametrize("kernel", ["eager", "c"])
@pytest.mark.parametrize(("algorithm", "key"), [("adamw", "exp_avg_sq"), ("lion", "exp_avg")])
def test_a_state_that_is_not_finite_is_named(algorithm, key, kernel):
    """Its directions are: 0 over an infinite second moment, and a sign."""
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = CWDOptimizer([("broken", p), ("whole", q)], lr=0.1, algorithm=algorithm, kernel=kernel)
    for is_broken in (False, True):
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        if is_broken:
            optimizer.state[p][key][1] = inf
            optimizer.statistics = StepStatistics()
        optimizer.step()
    assert p.isfinite().all()
    assert optimizer.statistics.read().not_finite == {p: "parameter 'broken' of shape (4,)"}


def test_nothing_was_stepped():
    optimizer = CWDAdamW([nn.Parameter(torch.ones(4))])
    optimizer.statistics = statistics = StepStatistics()
    assert not statistics.has_numbers
    assert statistics.read().total == Totals()
    optimizer.step()  # without a gradient
    assert not statistics.has_numbers


def test_other_steps_sum_up_nothing(monkeypatch):
    """And a learning rate that changes afterwards is not the step's."""
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = CWDAdamW([p], lr=0.1, weight_decay=0.5)
    optimizer.statistics = statistics = StepStatistics()
    optimizer.step()
    optimizer.statistics = None
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step()
    assert statistics.read().total.numel == 4
    assert statistics.read().total.effective_decay == pytest.approx(0.05)


def test_a_learning_rate_that_changes_in_place_is_this_step_s():
    p = nn.Parameter(torch.ones(4))
    statistics = StepStatistics()
    lr = torch.tensor(0.1)
    settings = Settings((), lr, 0.5, True, "ge", False, "auto", True)
    statistics.add(
        [Item(p.detach(), None, (), None, 1, settings, p)], [1.0], torch.tensor([[4.0, 4.0, 4.0, 4.0]]).double()
    )
    originals, group = OriginalParams(), {"params": [p]}
    originals.add(group, None)
    statistics.settle([group], originals)
    lr.fill_(7.0)
    assert statistics.read().total.effective_decay == pytest.approx(0.05)
