"""State dicts of torch.optim's optimizers into ours and back, and what is refused of them and of ours."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor

from hf_cwd import CWDSGD, CWDAdamW, CWDLion, CWDMuon
from tests.support.parity import SINGLE_TENSOR, assert_same_but_for_roundings, gradients, parameter, states_of, step

EXCHANGES = {
    "adamw": (torch.optim.AdamW, CWDAdamW, SINGLE_TENSOR),
    "adamw fused": (torch.optim.AdamW, CWDAdamW, {"fused": True}),
    "adamw foreach": (torch.optim.AdamW, CWDAdamW, {"foreach": True}),
    "sgd": (torch.optim.SGD, CWDSGD, {"momentum": 0.9, **SINGLE_TENSOR}),
    "sgd nesterov": (torch.optim.SGD, CWDSGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd without momentum": (torch.optim.SGD, CWDSGD, SINGLE_TENSOR),
    "muon": (torch.optim.Muon, CWDMuon, {"adjust_lr_fn": "match_rms_adamw"}),
    "muon original": (torch.optim.Muon, CWDMuon, {}),
}
EXCHANGE = pytest.mark.parametrize("exchange", EXCHANGES)


def begin(exchange: str, steps: int = 5, **more) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """A torch optimizer after some steps, and the gradients of the following ones."""
    torch_class, _, options = EXCHANGES[exchange]
    # torch.optim.SGD's coupled decay has no counterpart here.
    decay = {} if torch_class is torch.optim.SGD else {"weight_decay": 0.1}
    optimizer = torch_class([parameter((12, 20), torch.float32)], lr=0.01, **decay, **options, **more)
    grads = list(gradients((12, 20), torch.float32, steps=2 * steps))
    for g in grads[:steps]:
        step(optimizer, g)
    return optimizer, grads[steps:]


@EXCHANGE
def test_training_continues_as_if_nothing_had_happened(exchange):
    """torch -> ours with cautious=False, mid-training: every further step is the uninterrupted torch run's."""
    torch_optimizer, grads = begin(exchange)
    (theirs,) = torch_optimizer.param_groups[0]["params"]
    ours = torch.nn.Parameter(theirs.detach().clone())
    own_class = EXCHANGES[exchange][1]
    # "auto" is float32 on a CPU, and Gram's form for wide matrices.
    as_torch = {"ns": "standard", "ns_dtype": "bfloat16"} if own_class is CWDMuon else {}
    # The hyper-parameters given here are wrong on purpose: the saved ones win.
    optimizer = own_class([ours], lr=0.5, weight_decay=0.7, cautious=False, **as_torch)
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    for g in grads:
        before = ours.detach().clone()
        theirs.data.copy_(before)
        step(optimizer, g)
        step(torch_optimizer, g)
        # The states of torch's fused and foreach paths differ from its own single-tensor path by roundings.
        extra = 8 if "fused" in exchange or "foreach" in exchange else 0
        decay = optimizer.param_groups[0]["weight_decay"]
        assert_same_but_for_roundings(ours.detach(), theirs.detach(), before, weight_decay=decay, extra=extra)


@EXCHANGE
def test_cautious_training_continues_from_torch_states(exchange):
    """torch -> ours with cautious=True equals a cautious run that was given the same states by hand, bit for bit."""
    torch_class, own_class, options = EXCHANGES[exchange]
    torch_optimizer, grads = begin(exchange)
    (theirs,) = torch_optimizer.param_groups[0]["params"]
    decay = 0.0 if torch_class is torch.optim.SGD else 0.1
    named = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
    if torch_class is torch.optim.Muon:
        named = {"adjust_lr_fn": "original"} | named
    loaded, given = (torch.nn.Parameter(theirs.detach().clone()) for _ in range(2))
    optimizer = own_class([loaded], weight_decay=0.7, mask="gt")
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    reference = own_class([given], lr=0.01, weight_decay=decay, mask="gt", **named)
    state = {key: value.clone() for key, value in states_of(torch_optimizer).items() if value is not None}
    if torch_class is torch.optim.Muon:
        state["exp_avg"] = state.pop("momentum_buffer")
    reference.state[given].update({"step": torch.tensor(5.0)} | state)
    for g in grads:
        step(optimizer, g)
        step(reference, g)
        assert torch.equal(loaded, given)
    assert optimizer.param_groups[0]["mask"] == "gt"  # a key that torch has not keeps its present value


@pytest.mark.parametrize("implementation", [SINGLE_TENSOR, {"fused": True}, {"foreach": True}], ids=str)
def test_adamw_there_and_back(implementation):
    """torch -> ours -> torch in one training run: equal to the uninterrupted torch run, step by step."""
    whole, grads = begin("adamw")
    (x,) = whole.param_groups[0]["params"]
    param = torch.nn.Parameter(x.detach().clone())
    ours = CWDAdamW([param], cautious=False)
    ours.load_state_dict(copy.deepcopy(whole.state_dict()))
    for g in grads[:2]:
        param.data.copy_(x)
        step(whole, g)
        step(ours, g)
    back = torch.optim.AdamW([param], **implementation)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert {k: back.param_groups[0][k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        k: whole.param_groups[0][k] for k in ("lr", "betas", "eps", "weight_decay")
    }
    for g in grads[2:]:
        before = x.detach().clone()
        param.data.copy_(before)
        step(whole, g)
        step(back, g)
        assert float(states_of(back)["step"]) == float(states_of(whole)["step"])
        if implementation is SINGLE_TENSOR:
            assert torch.equal(param, x)
        else:
            # torch's implementations differ from each other by roundings, of the states too.
            assert_same_but_for_roundings(param.detach(), x.detach(), before, weight_decay=0.1, extra=8)


@pytest.mark.parametrize("ema", [False, True])
def test_sgd_there_and_back(ema):
    """Under torch's name of the momentum, so that torch does not begin it anew. ema is dampening = momentum, but for
    the first step."""
    options = {"momentum": 0.9} | ({"dampening": 0.9} if ema else {})
    whole, grads = begin("sgd", **({"dampening": 0.9} if ema else {}))
    (x,) = whole.param_groups[0]["params"]
    param = torch.nn.Parameter(x.detach().clone())
    ours = CWDSGD([param], weight_decay=0.0)
    ours.load_state_dict(copy.deepcopy(whole.state_dict()))
    for g in grads[:2]:
        step(whole, g)
        step(ours, g)
        assert torch.equal(param, x)
    back = torch.optim.SGD([param], lr=1.0)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert {key: back.param_groups[0][key] for key in options} == options
    for g in grads[2:]:
        step(whole, g)
        step(back, g)
        assert torch.equal(param, x)


def test_named_parameters_must_be_the_same():
    def named(*names):
        return CWDAdamW([(name, parameter((2, 2), torch.float32)) for name in names])

    saved = named("one", "two", "three").state_dict()
    named("module.one", "two", "three").load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match="no longer one; now four"):
        named("four", "two", "three").load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match="their order is another"):
        named("two", "one", "three").load_state_dict(copy.deepcopy(saved))


def test_a_rule_change_by_name():
    param = parameter((12, 20), torch.float32)
    optimizer = CWDLion([param], lr=0.03, on_rule_change="reset")
    step(optimizer, torch.ones(12, 20))
    for saved, why in (
        (begin("adamw")[0].state_dict(), "holds exp_avg_sq, but rule 'lion' keeps step, exp_avg"),
        (CWDMuon([parameter((12, 20), torch.float32)]).state_dict(), "is of rule 'muon', the optimizer's is 'lion'"),
    ):
        optimizer.load_state_dict(saved)
        assert why in optimizer.reset_because
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.03, "present hyper-parameters"
        step(optimizer, torch.ones(12, 20))
        assert int(optimizer.state[param]["step"]) == 1
    optimizer.load_state_dict(_two_groups())
    assert "has 2 parameter groups, this one 1 of rule 'lion'" in optimizer.reset_because
    optimizer.load_state_dict(_lion())
    assert optimizer.reset_because is None
    assert int(optimizer.state[param]["step"]) == 1


# --- Refusals ---


def _lion():
    optimizer = CWDLion([parameter((12, 20), torch.float32)])
    step(optimizer, torch.ones(12, 20))
    return optimizer.state_dict()


def _adamw_without(key):
    state_dict = copy.deepcopy(begin("adamw")[0].state_dict())
    del state_dict["state"][0][key]
    return state_dict


def _two_parameters():
    params = [parameter((12, 20), torch.float32) for _ in range(2)]
    return torch.optim.AdamW(params).state_dict()


def _two_groups():
    return torch.optim.AdamW([{"params": [parameter((2, 2), torch.float32)]} for _ in range(2)]).state_dict()


def _another_shape():
    optimizer = torch.optim.AdamW([parameter((9, 20), torch.float32)])
    step(optimizer, torch.ones(9, 20))
    return optimizer.state_dict()


def _with_group(**keys):
    state_dict = copy.deepcopy(begin("adamw")[0].state_dict())
    state_dict["param_groups"][0].update(keys)
    return state_dict


REFUSED = {
    "amsgrad": (CWDAdamW, lambda: begin("adamw", amsgrad=True)[0].state_dict(), "amsgrad"),
    "three betas": (
        CWDAdamW,
        lambda: _with_group(betas=(0.9, 0.999, 0.9999), alpha=5.0),
        r"groups are not of rule 'adamw': .*betas=\(0.9, 0.999, 0.9999\) is not valid.*continue with the",
    ),
    "eps of two": (CWDAdamW, lambda: _with_group(eps=(1e-30, 1e-3)), "groups are not of rule 'adamw'.*eps="),
    "sgd that keeps nothing": (
        CWDAdamW,
        lambda: begin("sgd without momentum")[0].state_dict(),
        "the saved groups have none of betas, eps, which rule 'adamw' takes",
    ),
    "no groups": (CWDAdamW, lambda: {"last_epoch": 3}, "is no optimizer's, for it has no parameter groups"),
    "lion into adamw": (CWDAdamW, _lion, "'lion'"),
    "sgd into adamw": (CWDAdamW, lambda: begin("sgd")[0].state_dict(), "exp_avg_sq"),
    "adamw into lion": (CWDLion, lambda: begin("adamw")[0].state_dict(), "exp_avg_sq"),
    "adamw into sgd": (CWDSGD, lambda: begin("adamw")[0].state_dict(), "exp_avg_sq"),
    "adamw into muon": (CWDMuon, lambda: begin("adamw")[0].state_dict(), "exp_avg_sq"),
    "no exp_avg": (CWDAdamW, lambda: _adamw_without("exp_avg"), "exp_avg"),
    "no exp_avg_sq": (CWDAdamW, lambda: _adamw_without("exp_avg_sq"), "exp_avg_sq"),
    "group of two": (CWDAdamW, _two_parameters, "group 0 has 1 parameters, and had 2"),
    "two groups": (CWDAdamW, _two_groups, "has 2 parameter groups, this one 1 of rule 'adamw'.*on_rule_change=reset"),
    "another shape": (CWDAdamW, _another_shape, r"exp_avg of parameter 0 has shape \(9, 20\).*\(12, 20\).*resized"),
}


def assert_identical(found: dict, expected: dict) -> None:
    assert found.get("param_groups") == expected.get("param_groups")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.get("state", {}), expected.get("state", {}), rtol=0, atol=0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_begins_anew_on_demand(case):
    own_class, state_dict, message = REFUSED[case]
    param = parameter((12, 20), torch.float32)
    optimizer = own_class([param], lr=0.03, on_rule_change="reset")
    step(optimizer, torch.ones(12, 20))
    optimizer.load_state_dict(state_dict())
    assert re.search(message.partition(".*continue with")[0].partition(".*on_rule")[0], optimizer.reset_because)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.03
    step(optimizer, torch.ones(12, 20))
    assert int(optimizer.state[param]["step"]) == 1


def test_what_gives_way_is_listed():
    """Each group's own values, a companion's too; nothing where a group has the rate that it had."""
    matrix, vector = (parameter(shape, torch.float32) for shape in ((4, 4), (4,)))

    def make(**vectors):
        return CWDMuon(
            [{"params": [matrix]}, {"params": [vector], "algorithm": "adamw", "lr": 3e-3, **vectors}], lr=0.02
        )

    saved, same, other = make().state_dict(), make(), make(eps=1e-6, weight_decay=0.3)
    assert same.overruled is None
    same.load_state_dict(saved)
    assert same.overruled == []
    other.load_state_dict(saved)
    assert [*map(tuple, other.overruled)] == [("adamw", "weight_decay", 0.1, 0.3), ("adamw", "eps", 1e-8, 1e-6)]
    assert pickle.loads(pickle.dumps(other)).overruled == other.overruled


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case):
    own_class, state_dict, message = REFUSED[case]
    param = parameter((12, 20), torch.float32)
    optimizer = own_class([param], lr=0.03)
    step(optimizer, torch.ones(12, 20))
    before, x = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    saved = state_dict()
    unchanged = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.reset_because is None
    assert torch.equal(param, x)
    assert_identical(optimizer.state_dict(), before)
    assert_identical(saved, unchanged)
