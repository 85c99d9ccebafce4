"""What every torch optimizer can do, for every rule."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_cwd import CWDMuon, route
from hf_cwd.rules import RULES
from tests.support.stepping import make, parameter, run, set_grads


def test_a_parameter_without_a_gradient_is_left_alone(algorithm):
    p, q = parameter(4, 3), parameter(4, 3, seed=1)
    optimizer = make([p, q], algorithm, weight_decay=0.5)
    before = q.detach().clone()
    set_grads([p], 0)
    optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state
    set_grads([p, q], 1)
    optimizer.step()
    assert (int(optimizer.state[p]["step"]), int(optimizer.state[q]["step"])) == (2, 1)


def test_maximize_is_the_negated_gradient(algorithm):
    p, q = parameter(4, 3), parameter(4, 3)
    up, down = make([p], algorithm, maximize=True), make([q], algorithm)
    for seed in range(3):
        set_grads([p], seed)
        q.grad = -p.grad
        up.step()
        down.step()
    assert torch.equal(p, q)


def test_a_tensor_learning_rate_may_change_between_steps(algorithm):
    p, q = parameter(4, 3), parameter(4, 3)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    with_tensor, with_float = make([p], algorithm, lr=rate), make([q], algorithm, lr=1e-2)
    run(with_tensor, [p], 2)
    run(with_float, [q], 2)
    assert torch.equal(p, q)
    rate.mul_(0.5)
    with_float.param_groups[0]["lr"] = 5e-3
    run(with_tensor, [p], 2, first=2)
    run(with_float, [q], 2, first=2)
    assert torch.equal(p, q)


def test_closure_is_run_with_gradients_and_its_loss_returned(algorithm):
    p = parameter(3, 3)
    optimizer = make([p], algorithm)
    start = p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((start**2).sum().item())
    assert not torch.equal(p, start)
    assert optimizer.step() is None


def test_schedulers_drive_the_learning_rate_and_momentum(algorithm):
    p = parameter(3, 3)
    optimizer = make([p], algorithm, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for seed in range(4):
        set_grads([p], seed)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    before = p.detach().clone()
    run(optimizer, [p], 1)
    assert torch.equal(p, before), "a learning rate of 0 moves and decays nothing"


def test_one_cycle_changes_muon_momentum_and_leaves_its_adamw_groups():
    matrix, vector = parameter(3, 3), parameter(3)
    groups = [{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}]
    optimizer = CWDMuon(groups, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


def test_named_parameters_and_added_groups(algorithm):
    p, q = parameter(3, 2), parameter(2, 3)
    optimizer = make([("p", p)], algorithm)
    optimizer.add_param_group({"params": [("q", q)], "lr": 0.0})
    assert [group["param_names"] for group in optimizer.param_groups] == [["p"], ["q"]]
    before = q.detach().clone()
    run(optimizer, [p, q], 2)
    assert torch.equal(q, before)
    assert int(optimizer.state[q]["step"]) == 2


def test_group_dicts_given_by_the_user_are_not_mutated(algorithm):
    group = {"params": [parameter(2, 2)], "weight_decay": 0.3}
    make([group], algorithm, lr=0.5)
    assert set(group) == {"params", "weight_decay"}
    assert make([group], algorithm, lr=0.25).param_groups[0]["lr"] == 0.25


def test_a_group_of_another_rule_has_that_rules_hyperparameters_only():
    groups = [{"params": [parameter(3, 3)]}, {"params": [parameter(3)], "algorithm": "adamw", "betas": (0.5, 0.6)}]
    muon, adamw = CWDMuon(groups, lr=0.1, adamw_lr=0.2, adamw_eps=1e-6, weight_decay=0.3).param_groups
    assert set(RULES["muon"].hyperparameters) <= muon.keys()
    assert "betas" not in muon
    assert set(RULES["muon"].hyperparameters) & adamw.keys() == {"eps"}
    assert (muon["lr"], adamw["lr"], adamw["eps"], adamw["betas"]) == (0.1, 0.2, 1e-6, (0.5, 0.6))
    assert muon["weight_decay"] == adamw["weight_decay"] == 0.3


def test_state_dict_round_trip_continues_bit_for_bit(algorithm):
    params = [parameter(5, 3), parameter(3, 5, seed=1)]
    optimizer = make(params, algorithm, weight_decay=0.2, mask="gt")
    run(optimizer, params, 3)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(twins, algorithm)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["mask"] == "gt"
    for ours, theirs in zip(run(optimizer, params, 3, first=3), run(resumed, twins, 3, first=3), strict=True):
        assert torch.equal(ours, theirs)
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], resumed.state[q][key]) for key in optimizer.state[p])


def test_a_scheduler_s_group_keys_survive_a_state_dict(algorithm):
    p = parameter(2, 2)
    optimizer = make([p], algorithm)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    resumed = make([p], algorithm)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["initial_lr"] == optimizer.param_groups[0]["initial_lr"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_train_on(algorithm, duplicate):
    p = parameter(3, 3)
    optimizer = make([p], algorithm)
    run(optimizer, [p], 2)
    twin = duplicate(optimizer)
    (q,) = twin.param_groups[0]["params"]
    assert torch.equal(run(optimizer, [p], 2)[0], run(twin, [q], 2)[0])
    twin.add_param_group({"params": [parameter(2, 2)]})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_s_parameters_are_not_known_to_be_replicated(duplicate):
    p = parameter(3, 3)
    optimizer = CWDMuon([p])
    optimizer.mark_replicated([p])
    assert optimizer._matrix_step._replicated == {p}
    assert duplicate(optimizer)._matrix_step._replicated == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_state_has_the_parameter_s_dtype_and_shape(algorithm, dtype):
    p = parameter(3, 4, dtype=dtype)
    optimizer = make([p], algorithm)
    run(optimizer, [p], 2)
    for key in RULES[algorithm].state_keys(optimizer.param_groups[0]):
        assert optimizer.state[p][key].dtype == dtype
        assert optimizer.state[p][key].shape == p.shape
    assert p.dtype == dtype
    assert p.isfinite().all()


def test_routing_sorts_a_model_for_muon():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 7)})
    optimizer = CWDMuon(model.named_parameters(), routing=route(model), adamw_lr=0.5, lr=0.1)
    names = {group["algorithm"]: group["param_names"] for group in optimizer.param_groups}
    assert names == {"muon": ["body.weight"], "adamw": ["embed.weight", "body.bias", "lm_head.weight", "lm_head.bias"]}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
