"""States in others' formats are taken as numbers or refused by name; what wrappers keep in a state is carried along."""

import copy
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_cwd import CWDAdamW, CWDLion, CWDMuon, CWDOptimizer
from hf_cwd.optim import state_dict
from hf_cwd.rules import RULES
from tests.kernels.odd import Wrapped
from tests.support.launching import ROOT, launch

REQUIREMENTS = ("torchao==0.18.0", "pytorch_optimizer==4.1.0")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What foreign_runs.py has found, with torchao and pytorch_optimizer from PyPI beside the environment."""
    folder = tmp_path_factory.mktemp("foreign")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *REQUIREMENTS]
    subprocess.run(pip, check=True, timeout=600)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as package:
            package.extractall(folder / "site")
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    launch("-m", "tests.optim.foreign_runs", folder, cwd=ROOT, PYTHONPATH=path, TORCHDYNAMO_DISABLE="1")
    return json.loads(Path(folder, "found.json").read_text())


@pytest.mark.parametrize(("bits", "kind"), [("8 bits", "OptimState8bit"), ("4 bits", "OptimState4bit")])
def test_torchao_s_states_are_taken_as_numbers(found, bits, kind):
    run = found["adopted"][bits]
    assert run["was"] == kind
    assert run["is"] == "Tensor"
    assert run["apart"] == 0.0
    assert run["moved"] > 1e-4
    assert sum(kind in line for line in found["said"]) == 1


def test_a_run_of_the_trainer_goes_on_from_torchao_s(found):
    assert found["trained"]["steps"] == [6]
    assert len(found["trained"]["losses"]) == 6


@pytest.mark.parametrize("momentum", ["none", "reset", "pullback"])
def test_inside_pytorch_optimizer_s_lookahead(found, momentum):
    run = found["lookahead"][momentum]
    assert run["apart"] < 1e-6
    assert run["apart after a break"] == run["lion apart after a break"] == 0.0
    ours, theirs, again = run["keys"]
    assert ours == theirs == again


class InTenths(Wrapped):
    """States that are kept as numbers of their own."""

    def dequantize(self):
        return self.inner * 0.1


def begun(kind=CWDAdamW, **options):
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = kind([("weights", p)], lr=0.1, **options)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    return optimizer, p


def loaded_with(value):
    optimizer, p = begun()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = value
    optimizer.load_state_dict(saved)
    return optimizer, p


def test_what_can_say_its_numbers_is_taken_as_them(caplog):
    state_dict._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="hf_cwd")
    for _ in range(2):
        optimizer, p = loaded_with(InTenths(torch.full((3, 4), 5.0)))
    assert type(optimizer.state[p]["exp_avg"]) is torch.Tensor
    assert (optimizer.state[p]["exp_avg"] == 0.5).all()
    assert [record.message for record in caplog.records] == [
        "saved states of type InTenths are taken as the numbers that they stand for"
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Wrapped(torch.ones(3, 4)), "is a Wrapped, a kind of tensor that does not say its numbers"),
        (torch.eye(3, 4).to_sparse(), "has layout torch.sparse_coo"),
        (torch.ones(3, 4).to_mkldnn(), "has layout torch._mkldnn"),
        ([1.0] * 12, "is a list, and no tensor"),
    ],
)
def test_the_rest_is_refused_by_name(value, words):
    with pytest.raises(ValueError, match=rf"the saved exp_avg of weights {words}"):
        loaded_with(value)


@pytest.mark.parametrize(
    "value",
    [
        *(torch.ones(1, 4).expand(3, 4), torch._neg_view(-torch.ones(3, 4)), torch.ones(4, 3).t()),
        torch.quantize_per_tensor(torch.ones(3, 4), 0.5, 0, torch.qint8),
    ],
)
def test_numbers_without_memory_of_their_own_get_it(value):
    optimizer, p = loaded_with(value)
    other, q = loaded_with(torch.ones(3, 4))
    for one, param in ((optimizer, p), (other, q)):
        param.grad = torch.full((3, 4), -2.0)
        one.step()
    assert torch.equal(p, q)


class Lookahead:
    """As timm's: its slow weights lie in the state of the optimizer that it wraps, whose state dict is its own."""

    def __init__(self, base, k=2, alpha=0.5):
        self.base, self.alpha = base, alpha
        for group in base.param_groups:
            group |= {"lookahead_alpha": alpha, "lookahead_k": k, "lookahead_step": 0}

    @torch.no_grad()
    def step(self):
        self.base.step()
        for group in self.base.param_groups:
            group["lookahead_step"] += 1
            for p in group["params"] if group["lookahead_step"] % group["lookahead_k"] == 0 else ():
                slow = self.base.state[p].setdefault("lookahead_slow_buff", p.detach().clone())
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)


def looked_ahead(make, interrupt=None):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 4))
    wrapper = Lookahead(make(p))
    for k in range(6):
        if k == interrupt:
            saved, p = copy.deepcopy(wrapper.base.state_dict()), nn.Parameter(p.detach().clone())
            wrapper = Lookahead(make(p))
            wrapper.base.load_state_dict(saved)
            back = wrapper.base.state_dict()["state"][0]
            assert torch.equal(back["lookahead_slow_buff"], saved["state"][0]["lookahead_slow_buff"])
        p.grad = torch.randn(3, 4)
        wrapper.step()
    return p.detach()


def plain_adamw(p):
    return CWDAdamW([p], lr=0.1, weight_decay=0.0, cautious=False)


def test_inside_timm_s_lookahead():
    theirs = looked_ahead(lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(looked_ahead(plain_adamw), theirs)


@pytest.mark.parametrize("rule", RULES)
def test_slow_weights_are_carried_along(rule):
    def make(p):
        return CWDOptimizer([p], lr=0.1, algorithm=rule, **({"momentum": 0.9} if rule == "sgd" else {}))

    assert torch.equal(looked_ahead(make, interrupt=3), looked_ahead(make))


def test_slow_weights_come_from_torch_s_too():
    p = nn.Parameter(torch.ones(3, 4))
    wrapper = Lookahead(torch.optim.AdamW([p], lr=0.1))
    for _ in range(2):
        p.grad = torch.ones(3, 4)
        wrapper.step()
    optimizer = CWDAdamW([p], lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(wrapper.base.state_dict()))
    assert torch.equal(optimizer.state[p]["lookahead_slow_buff"], wrapper.base.state[p]["lookahead_slow_buff"])
    assert optimizer.param_groups[0]["lookahead_step"] == 2


def test_what_a_wrapper_put_there_before_the_first_step_is_left_alone():
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = CWDLion([p], lr=0.1)
    optimizer.state[p] |= {"slow": p.detach().clone(), "backup": None, "count": 3}
    p.grad = torch.ones(3, 4)
    optimizer.step()
    assert list(optimizer.state[p]) == ["slow", "backup", "count", "step", "exp_avg"]


@pytest.mark.parametrize(
    ("foreign", "kind"),
    [
        ({"exp_avg": 1, "exp_avg_sq": 1, "exp_avg_slow": 1}, CWDAdamW),  # AdEMAMix
        ({"exp_avg": 1, "exp_avg_sq": 1}, CWDLion),
        ({"exp_avg": 1, "exp_avg_sq": 1, "exp_avg_diff": 1, "neg_pre_grad": 1}, CWDAdamW),  # Adan
        ({"exp_avg": 1, "exp_avg_sq": 1, "lookahead_slow_buff": 1}, CWDMuon),
    ],
)
def test_another_rule_is_still_recognised(foreign, kind):
    optimizer, _ = begun(kind)
    group = {"lr": 0.1, "weight_decay": 0.1, "params": [0]}
    saved = {"state": {0: {key: torch.ones(3, 4) for key in foreign} | {"step": torch.ones(())}}}
    with pytest.raises(ValueError, match=r"the saved state holds .*, but rule '\w+' keeps"):
        optimizer.load_state_dict(saved | {"param_groups": [group]})
