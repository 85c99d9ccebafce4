"""cautious=False against torch.optim's single-tensor paths, and state dicts that go back and forth."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_cwd import CWDSGD, CWDAdamW, CWDLion, CWDMuon

SINGLE_TENSOR = {"foreach": False, "fused": False}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int, seed: int = 1) -> Iterator[Tensor]:
    """Gradients of sizes from 1e-4 to 1e2, so that every kind of rounding occurs; their first row is zero."""
    generator = torch.manual_seed(seed)
    for _ in range(steps):
        size = 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-4, 2, generator=generator)
        g = size * torch.randn(shape, dtype=torch.float64, generator=generator)
        g[0] = 0
        yield g.to(dtype)


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0)).to(dtype))


def step(optimizer: torch.optim.Optimizer, grad: Tensor) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = grad.clone()  # torch.optim.SGD's momentum buffer is made from the gradient
    optimizer.step()


def ulp(x: Tensor) -> Tensor:
    return torch.nextafter(x.abs(), torch.full_like(x, torch.inf)) - x.abs()


def assert_same_but_for_roundings(
    found: Tensor, expected: Tensor, before: Tensor, *, weight_decay: float, extra: int = 0
) -> None:
    """One step from ``before`` by two programs that round at different places.

    The parameter is rounded by half a unit in the last place (ulp) when the update is subtracted, on either side; with
    a decay also here when that is subtracted, and in torch when 1 - lr * weight_decay is rounded and when x is
    multiplied by it: 2.5 ulp in all. The update is the result of four roundings on either side (two scalars, two
    operations), each of eps / 2. With an update that is small beside x this is 2 ulp, as a whole number of them.
    """
    update = (expected - before).abs()
    bound = (2.5 if weight_decay else 1.0) * ulp(torch.maximum(before.abs(), expected.abs()))
    bound += (8 + extra) * torch.finfo(found.dtype).eps / 2 * update
    worst = ((found - expected).abs() / bound).max().item()
    assert worst <= 1, f"{worst} times the bound"


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


# --- The same numbers ---


@DTYPES
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.9, 0.95), 1e-6), ((0.0, 0.5), 1e-3)])
def test_adamw(dtype, weight_decay, betas, eps):
    """States bit for bit over all steps; parameters to rounding in each step, taken from the same starting point."""
    options = {"lr": 3e-3, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    ours, theirs = parameter((30, 70), dtype), parameter((30, 70), dtype)
    optimizer = CWDAdamW([ours], cautious=False, **options)
    torch_optimizer = torch.optim.AdamW([theirs], **options, **SINGLE_TENSOR)
    for g in gradients((30, 70), dtype, steps=40):
        before = ours.detach().clone()
        theirs.data.copy_(before)
        step(optimizer, g)
        step(torch_optimizer, g)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(states_of(optimizer)[key], states_of(torch_optimizer)[key]), key
        assert_same_but_for_roundings(ours.detach(), theirs.detach(), before, weight_decay=options["weight_decay"])


@DTYPES
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 1.0 - 2**-20, False), (0.9, 0.0, True)],
)
def test_sgd_bit_for_bit(dtype, maximize, momentum, dampening, nesterov):
    """At weight_decay=0: torch.optim.SGD's decay is coupled. Parameters run on their own over all steps."""
    options = {"lr": 0.01, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "maximize": maximize}
    ours, theirs = parameter((30, 70), dtype), parameter((30, 70), dtype)
    optimizer = CWDSGD([ours], weight_decay=0.0, **options)
    torch_optimizer = torch.optim.SGD([theirs], **options, **SINGLE_TENSOR)
    for g in gradients((30, 70), dtype, steps=20):
        step(optimizer, g)
        step(torch_optimizer, g)
        assert torch.equal(ours, theirs)
        if momentum:
            assert torch.equal(states_of(optimizer)["momentum_buffer"], states_of(torch_optimizer)["momentum_buffer"])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 9)], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(shape, adjust_lr_fn, nesterov):
    """The same bfloat16 Newton-Schulz, so that only the parameter's own roundings differ."""
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    ours, theirs = parameter(shape, torch.float32), parameter(shape, torch.float32)
    optimizer = CWDMuon([ours], cautious=False, ns="standard", ns_dtype="bfloat16", **options)
    torch_optimizer = torch.optim.Muon([theirs], **options)
    for g in gradients(shape, torch.float32, steps=10):
        before = ours.detach().clone()
        theirs.data.copy_(before)
        step(optimizer, g)
        step(torch_optimizer, g)
        assert torch.equal(states_of(optimizer)["exp_avg"], states_of(torch_optimizer)["momentum_buffer"])
        assert_same_but_for_roundings(ours.detach(), theirs.detach(), before, weight_decay=options["weight_decay"])


# --- State dicts back and forth ---

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
    fewer = CWDLion([param], on_rule_change="reset")
    with pytest.raises(ValueError, match="of 2 parameter groups, cannot go on with this optimizer's 1"):
        fewer.load_state_dict(_two_groups())
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


REFUSED = {
    "amsgrad": (CWDAdamW, lambda: begin("adamw", amsgrad=True)[0].state_dict(), "amsgrad"),
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
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


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
