"""Bad input to the optimizers names itself and the fix, before anything has changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_cwd import CWDSGD, CWDAdamW, CWDLion, CWDMuon, route
from hf_cwd.rules import RULES
from tests.support.stepping import make, parameter, run


@pytest.mark.parametrize("option", ["fused", "foreach", "differentiable"])
def test_torch_s_implementations(algorithm, option):
    with pytest.raises(ValueError, match=f"{option}=True is not supported.*Leave {option} out"):
        make([parameter(2, 2)], algorithm, **{option: True})
    make([parameter(2, 2)], algorithm, **{option: False})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", torch.tensor([1.0, 2.0])),
        ("weight_decay", -0.1),
        ("mask", "product"),
        ("kernel", "cuda"),
        ("cautious", "false"),
    ],
)
def test_values_out_of_range(algorithm, option, value):
    with pytest.raises(ValueError, match=rf"(?s){option}=.*is not valid: {option} is"):
        make([parameter(2, 2)], algorithm, **{option: value})


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (CWDAdamW, "betas", (0.9, 1.0)),
        (CWDAdamW, "betas", 0.9),
        (CWDAdamW, "eps", -1e-8),
        (CWDLion, "betas", (-0.1, 0.9)),
        (CWDMuon, "momentum", 1.0),
        (CWDMuon, "ns_steps", 0),
        (CWDMuon, "ns_steps", 2.5),
        (CWDMuon, "ns_dtype", "float8"),
        (CWDMuon, "ns_coefficients", (1.0, 2.0)),
        (CWDMuon, "adjust_lr_fn", "rms"),
        (CWDSGD, "dampening", 1.5),
    ],
)
def test_values_of_a_rule(cls, option, value):
    with pytest.raises(ValueError, match=rf"(?s){option}=.*is not valid: {option} is"):
        cls([parameter(2, 2)], **{option: value})


@pytest.mark.parametrize("wrong", [{"nesterov": True}, {"ema": True}, {"ema": True, "momentum": 0.9, "dampening": 0.1}])
def test_sgd_combinations(wrong):
    with pytest.raises(ValueError, match="momentum > 0"):
        CWDSGD([parameter(2)], **wrong)


def test_unknown_arguments_get_the_nearest_name():
    with pytest.raises(TypeError, match=r"no argument 'weight_decy'\. Did you mean weight_decay\?"):
        make([parameter(2)], "adamw", weight_decy=0.1)
    with pytest.raises(ValueError, match="algorithm='adam' is not a registered rule"):
        make([parameter(2)], "adam")


def test_options_of_the_exchange_are_those_of_rules_for_matrices():
    p = parameter(2, 2)
    with pytest.raises(TypeError, match=r"no argument 'exchange_byte'\. Did you mean exchange_bytes\?.*, share,"):
        CWDMuon([p], exchange_byte=1)
    with pytest.raises(ValueError, match="share='sometimes' is not valid: share is one of auto, always, never"):
        CWDMuon([p], share="sometimes")
    with pytest.raises(TypeError, match="CWDAdamW has no argument 'share'"):
        CWDAdamW([p], share="never")


def test_a_rule_for_matrices_says_what_they_cost():
    muon = RULES["muon"]
    with pytest.raises(ValueError, match="rule 'mine' has a matrix stage, and needs matrix_flops, scale as well"):
        replace(muon, name="mine", matrix_flops=None, scale=None)


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"parameter 'bias' of shape \(3,\) is not a matrix.*routing=hf_cwd.route"):
        CWDMuon(nn.Linear(2, 3).named_parameters())
    optimizer = CWDMuon([parameter(2, 2)])
    with pytest.raises(ValueError, match="is not a matrix"):
        optimizer.add_param_group({"params": [parameter(2)]})
    assert len(optimizer.param_groups) == 1, "a refused group is not kept"


def test_nothing_to_train():
    routing = route(nn.Linear(2, 2))
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="empty parameter list"):
            CWDMuon(empty, routing=routing)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        CWDMuon(parameter(2, 2), routing=routing)


def test_complex_parameters(algorithm):
    with pytest.raises(RuntimeError, match="is complex"):
        make([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], algorithm)


def test_sparse_complex_and_meta_gradients_change_nothing(algorithm):
    p, q = parameter(2, 2), parameter(2, 2)
    optimizer = make([p, q], algorithm)
    before = p.detach().clone()
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradient.*sparse=False"):
        optimizer.step()
    meta = nn.Parameter(torch.empty(2, 2, device="meta"))
    meta.grad = torch.empty(2, 2, device="meta")
    optimizer = make([p, meta], algorithm)
    with pytest.raises(RuntimeError, match="meta device"):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state


def test_a_complex_gradient(algorithm, monkeypatch):
    # torch refuses to attach one to a real parameter, but a tensor subclass or a hook can.
    p = parameter(2, 2)
    p.grad = torch.ones(2, 2)
    monkeypatch.setattr(torch.Tensor, "is_complex", lambda tensor: tensor is p.grad)
    with pytest.raises(RuntimeError, match="complex gradient"):
        make([p], algorithm).step()


def test_a_matrix_that_was_flattened_behind_our_back():
    p = parameter(2, 2)
    optimizer = CWDMuon([p])
    flat = nn.Parameter(p.detach().flatten())
    optimizer.param_groups[0]["params"][0] = flat  # what FSDP1 and DeepSpeed do
    flat.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="flattened since"):
        optimizer.step()


def test_state_of_another_rule_is_refused_and_nothing_changes():
    p = parameter(3, 3)
    adamw, muon = CWDAdamW([p]), CWDMuon([p])
    run(adamw, [p], 1)
    run(muon, [p], 1)
    before = copy.deepcopy(adamw.state_dict())
    with pytest.raises(ValueError, match="of rule 'muon', the optimizer's is 'adamw'"):
        adamw.load_state_dict(muon.state_dict())
    saved = muon.state_dict()
    del saved["param_groups"][0]["algorithm"]
    with pytest.raises(ValueError, match="holds step, exp_avg, but rule 'adamw' keeps step, exp_avg, exp_avg_sq"):
        adamw.load_state_dict(saved)
    after = adamw.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], before["state"][0][key]) for key in before["state"][0])
