"""A table of what users get wrong in Python: each is refused with the value, the reason and the fix, in words.

Wrong flags, files and layouts are in trainer/test_wrong_flags.py.
"""

import copy
import json
import math
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from hf_cwd import CWDSGD, CWDAdamW, CWDLion, CWDMuon, CWDOptimizer, route
from tests.support.launching import ROOT
from tests.support.stepping import parameter, run

FINITE = "is not valid: {} is a finite number >= 0"
TAKES = "an optimizer takes an iterable of Tensors"
BETAS = "betas is two numbers >= 0 and < 1"
HISTORY = torch.tensor(1e-3, requires_grad=True)

# An optimizer's arguments, and what the error says of them.
ARGUMENTS = [
    *(
        (CWDAdamW, {"lr": value}, f"adamw: lr={value!r} {FINITE.format('lr')}")
        for value in ("1e-3", None, True, False, -1e-3, math.nan, math.inf, -math.inf, 1j, [1e-3], (1e-3,), {}, 10**400)
    ),
    *(
        (CWDSGD, {"lr": value}, f"sgd: lr={value!r} {FINITE.format('lr')}")
        for value in (
            torch.tensor([1e-3, 1e-3]),
            torch.tensor([]),
            torch.tensor(-1e-3),
            torch.tensor(math.nan),
            torch.tensor(1j),
            torch.tensor(True),
            torch.tensor(1),
            torch.empty((), device="meta"),
            HISTORY,
        )
    ),
    *(
        (CWDLion, {"lr": value}, f"lion: lr={value!r} {FINITE.format('lr')}")
        for value in (np.float32(-1), np.float64("nan"), np.bool_(True), np.complex64(1), np.array([1e-3, 1e-3]))
    ),
    *(
        (CWDMuon, {"weight_decay": value}, f"muon: weight_decay={value!r} {FINITE.format('weight_decay')}")
        for value in ("0.1", None, True, -0.1, math.nan, math.inf, torch.tensor(0.1), (0.1,))
    ),
    *(
        (CWDAdamW, {"eps": value}, f"adamw: eps={value!r} {FINITE.format('eps')}")
        for value in ("1e-8", -1e-8, math.nan, None, torch.tensor(1e-8))
    ),
    *(
        (CWDAdamW, {"betas": value}, f"adamw: betas={value!r} is not valid: {BETAS}")
        for value in (
            0.9,
            None,
            "0.9:0.95",
            "ab",
            (),
            (0.9,),
            (0.9, 0.95, 0.99),
            (1.0, 0.0),
            (0.0, 1.0),
            (-0.1, 0.9),
            (0.9, math.nan),
            (True, 0.9),
            (False, 0.9),
            ("0.9", "0.95"),
            (0.9, None),
            (0.9, 1j),
            {0.9, 0.95},
            {0.9: 1, 0.95: 2},
            torch.tensor([0.9, 0.95]),
            (0.9, torch.tensor(0.99)),
            (torch.tensor(0.9), 0.99),
            np.array([0.9, 1.0]),
            ((0.9, 0.95), (0.9, 0.95)),
        )
    ),
    (CWDLion, {"betas": (0.9,)}, f"lion: betas=(0.9,) is not valid: {BETAS}"),
    *(
        (
            CWDMuon,
            {"momentum": value},
            f"muon: momentum={value!r} is not valid: momentum is a finite number >= 0 and < 1",
        )
        for value in (1, 1.0, -0.1, "0.9", True, math.nan, None, torch.tensor(0.9))
    ),
    *(
        (CWDMuon, {"nesterov": value}, f"nesterov={value!r} is not valid: nesterov is true or false")
        for value in (1, 0, None, "true")
    ),
    *(
        (CWDMuon, {"ns_steps": value}, f"ns_steps={value!r} is not valid: ns_steps is a whole number from 1 to 99")
        for value in (0, -1, 100, 2.5, "5", True, None, math.nan, math.inf, np.float32(2.5), (5,))
    ),
    *(
        (
            CWDMuon,
            {"ns_coefficients": value},
            f"ns_coefficients={value!r} is not valid: ns_coefficients is one of quintic",
        )
        for value in (
            "septic",
            None,
            3.4,
            (),
            (3.0,),
            (3.0, -4.0),
            (0.0, 0.0, 0.0),
            (0, 0, 0),
            (-3.4, 4.8, -2.0),
            (0.5, 0.0, 0.0),
            (math.nan, 1.0, 1.0),
            (math.inf, 1.0, 1.0),
            (True, 0.0, 0.0),
            ("3", "-4", "2"),
            ((3.4, -4.8, 2.0), (1.0,)),
            (3.4445, -4.775, 2.0315, 1.0),
            [],
        )
    ),
    *(
        (
            CWDMuon,
            {"ns_coefficients": value},
            f"muon: ns_coefficients=({value!r},) with ns_steps=5 takes the singular value",
        )
        for value in ((10.0, 10.0, 10.0), (100.0, 0.0, 0.0), (1e300, 1e300, 0.0), (1.0, -2.0, 0.0))
    ),
    (CWDMuon, {"ns": "fast"}, "ns='fast' is not valid: ns is one of auto, standard, gram"),
    (CWDMuon, {"ns_dtype": "float8"}, "ns_dtype='float8' is not valid: ns_dtype is one of auto, bfloat16"),
    (CWDMuon, {"ns_dtype": torch.float32}, "ns_dtype=torch.float32 is not valid"),
    (CWDMuon, {"adjust_lr_fn": "arbitrary"}, "adjust_lr_fn='arbitrary' is not valid: adjust_lr_fn is one of match_rms"),
    (CWDMuon, {"adjust_lr_fn": ["original"]}, r"adjust_lr_fn=['original'] is not valid"),
    (CWDMuon, {"share": "sometimes"}, "share='sometimes' is not valid: share is one of auto, always, never"),
    (CWDMuon, {"exchange_bytes": 0}, "exchange_bytes=0 is not valid: exchange_bytes is a whole number from 1"),
    # Of the AdamW beside Muon, of which these parameters have no group.
    (CWDMuon, {"adamw_betas": (0.9, 1.0)}, f"adamw: betas=(0.9, 1.0) is not valid: {BETAS}"),
    (CWDMuon, {"adamw_eps": -1}, f"adamw: eps=-1 {FINITE.format('eps')}"),
    (CWDMuon, {"adamw_lr": "3e-4"}, f"adamw: lr='3e-4' {FINITE.format('lr')}"),
    (CWDSGD, {"dampening": 1.5}, "dampening=1.5 is not valid: dampening is a finite number >= 0 and < 1"),
    (CWDSGD, {"momentum": -0.5}, "momentum=-0.5 is not valid"),
    (
        CWDSGD,
        {"nesterov": True},
        "sgd: nesterov=True needs momentum > 0 and dampening=0, not momentum=0.0, dampening=0.0",
    ),
    (CWDSGD, {"ema": True}, "sgd: ema=True is momentum*m + (1 - momentum)*g: give momentum > 0"),
    (CWDSGD, {"ema": 1}, "ema=1 is not valid: ema is true or false"),
    *(
        (CWDLion, {"mask": value}, f"mask={value!r} is not valid: mask is one of ge, gt")
        for value in ("product", None, ["ge"])
    ),
    *(
        (CWDLion, {"cautious": value}, f"cautious={value!r} is not valid: cautious is true or false")
        for value in ("false", 0)
    ),
    (CWDLion, {"kernel": "cuda"}, "kernel='cuda' is not valid: kernel is one of auto, eager, c, triton"),
    (
        CWDLion,
        {"state_dtype": "fp32"},
        "state_dtype='fp32' is not valid: state_dtype is one of auto, float32, bfloat16",
    ),
    (CWDLion, {"master": "fp32"}, "master='fp32' is not valid: master is one of none, remainder"),
    (CWDLion, {"maximize": None}, "maximize=None is not valid: maximize is true or false"),
    (CWDLion, {"capturable": 1}, "capturable=1 is not valid: capturable is true or false"),
    (CWDLion, {"on_rule_change": "ignore"}, "CWDLion: on_rule_change='ignore' is not valid: on_rule_change is one of"),
    *(
        (CWDAdamW, {key: True}, f"{key}=True is not supported: ")
        for key in ("amsgrad", "fused", "foreach", "differentiable")
    ),
    (
        CWDAdamW,
        {"decoupled_weight_decay": False},
        "decoupled_weight_decay=False is not supported: the decay is decoupled",
    ),
    (CWDAdamW, {"amsgrad": True, "foreach": True}, "foreach=True is not supported: the kernel= option chooses"),
]
KEYWORDS = [
    (CWDAdamW, {"weight_decy": 0.1}, "CWDAdamW has no argument 'weight_decy'. Did you mean weight_decay?"),
    (CWDAdamW, {"momentum": 0.9}, "CWDAdamW has no argument 'momentum'."),
    (CWDLion, {"eps": 1e-8}, "CWDLion has no argument 'eps'."),
    (CWDLion, {"amsgrads": False}, "CWDLion has no argument 'amsgrads'."),
    (CWDAdamW, {"share": "never"}, "CWDAdamW has no argument 'share'."),
    (CWDMuon, {"exchange_byte": 1}, "CWDMuon has no argument 'exchange_byte'. Did you mean exchange_bytes?"),
]


def params(cls):
    return [parameter(2, 2, dtype=torch.bfloat16)]


@pytest.mark.parametrize(("cls", "options", "message"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", None))
def test_arguments(cls, options, message):
    """With parameters, and with None for them: what is wrong with the arguments is said first."""
    for given in (params(cls), None):
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(given, **options)


@pytest.mark.parametrize(("cls", "options", "message"), KEYWORDS, ids=lambda value: getattr(value, "__name__", None))
def test_keywords(cls, options, message):
    for given in (params(cls), None):
        with pytest.raises(TypeError, match="^" + re.escape(message)):
            cls(given, **options)


def shared():
    p = parameter(2, 2)
    return [{"params": [p]}, {"params": [parameter(2, 2, seed=1), p]}]


# What an optimizer is given to train, and the type and text of the error.
GIVEN = [
    (
        lambda: None,
        TypeError,
        f"{TAKES}, of (name, Tensor) pairs, or of dicts with such an iterable as 'params', and got None",
    ),
    (lambda: 5, TypeError, "and got int"),
    (lambda: "model", TypeError, "and got str"),
    (lambda: parameter(2, 2), TypeError, "and got torch.FloatTensor: put it into a list"),
    (lambda: nn.Linear(2, 2), TypeError, "and got torch.nn.modules.linear.Linear: give model.parameters()"),
    (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        TypeError,
        "and entry 0 is torch.nn.modules.linear.Linear: give model.parameters()",
    ),
    (lambda: nn.Linear(2, 2).parameters, TypeError, "Module.parameters: call it, as in model.parameters()"),
    (lambda: {"params": [parameter(2, 2)]}, TypeError, "and got dict: put it into a list"),
    (lambda: nn.Linear(2, 2).state_dict(), TypeError, "and got collections.OrderedDict: give its values()"),
    (lambda: {parameter(2, 2)}, TypeError, "parameters in a set have another order in each run: give a list"),
    (lambda: [None], TypeError, "and entry 0 is None"),
    (lambda: [1.0], TypeError, "and entry 0 is float"),
    (lambda: [parameter(2, 2), [parameter(2, 2)]], TypeError, "and entry 1 is list"),
    (lambda: [(parameter(2, 2), "weight")], TypeError, "and entry 0 is a tuple of torch.FloatTensor, str"),
    (lambda: [(1, parameter(2, 2))], TypeError, "and entry 0 is a tuple of int, torch.FloatTensor"),
    (lambda: [{"params": [parameter(2, 2)]}, parameter(2, 2)], TypeError, "and got 1 dicts among 2 entries"),
    (lambda: [], ValueError, "the optimizer got an empty parameter list"),
    (lambda: iter(()), ValueError, "the optimizer got an empty parameter list"),
    (lambda: [parameter(2, 2) * 2], ValueError, "parameter 0 of shape (2, 2) is computed from other Tensors"),
    (
        lambda: [("w", parameter(2, 2)), parameter(2, 2)],
        ValueError,
        "1 of 2 parameters of a group have no name: name all or none",
    ),
    (
        shared,
        ValueError,
        "parameters of shape (2, 2) are in parameter groups 0 and 1: a parameter can be in one group only",
    ),
    (
        lambda: [{"params": [parameter(2, 2)]}, {"params": [("w", parameter(2, 2))]}],
        ValueError,
        "parameter group 1 has names of its parameters, and group 0 has none",
    ),
    (
        lambda: [{"params": [("w", parameter(2, 2))]}, {"params": [parameter(2, 2)]}],
        ValueError,
        "parameter group 0 has names of its parameters, and group 1 has none",
    ),
    (
        lambda: [{"params": [parameter(2, 2)], "param_names": ["a", "b"]}],
        ValueError,
        "has 2 param_names and 1 parameters",
    ),
    (lambda: [{"param": [parameter(2, 2)]}], ValueError, "a parameter group has no 'params', only 'param'"),
    (lambda: [{}], ValueError, "a parameter group has no 'params', only nothing"),
    (lambda: [{"params": None}], TypeError, "and got None"),
    (lambda: [{"params": nn.Linear(2, 2)}], TypeError, "give model.parameters()"),
    (lambda: [{"params": {parameter(2, 2)}}], TypeError, "parameters in a set have another order in each run"),
    (lambda: [{"params": [{"params": [parameter(2, 2)]}]}], TypeError, "and entry 0 is dict: put it into a list"),
    *(
        (
            lambda key=key, value=value: [
                {"params": [parameter(2, 2, seed=1)]},
                {"params": [parameter(2, 2)], key: value},
            ],
            ValueError,
            f"parameter group 1: adamw: {key}={value!r} is not valid",
        )
        for key, value in (
            ("lr", None),
            ("lr", "1e-4"),
            ("lr", -1),
            ("weight_decay", None),
            ("weight_decay", True),
            ("betas", (0.9,)),
            ("eps", math.nan),
            ("mask", "product"),
            ("cautious", "no"),
        )
    ),
    *(
        (lambda key=key: [{"params": [parameter(2, 2)], key: True}], ValueError, f"{key}=True is not supported")
        for key in ("amsgrad", "fused", "foreach", "differentiable")
    ),
    (
        lambda: [{"params": [parameter(2, 2)], "algorithm": "adam"}],
        ValueError,
        "algorithm='adam' is not a registered rule",
    ),
    (
        lambda: [{"params": [parameter(2)], "algorithm": "muon"}],
        ValueError,
        "of shape (2,) is not a matrix: muon takes 2-D",
    ),
    (
        lambda: [{"params": [parameter(2, 2)], "algorithm": "muon", "layout": {"row": 2}}],
        ValueError,
        "of shape (2, 2) does not fit the group's layout={'row': 2}",
    ),
    (
        lambda: [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))],
        RuntimeError,
        "of shape (2, 2) is complex: a sign",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), GIVEN)
def test_parameters_and_groups(given, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        CWDAdamW(given())


@pytest.mark.parametrize(("given", "kind", "message"), GIVEN)
def test_a_refused_group_is_not_kept(given, kind, message):
    """As another group; what is no list of groups is one group's parameters."""
    groups = given()
    is_groups = isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
    group = groups[0] if is_groups else {"params": groups}
    optimizer = CWDAdamW([parameter(2, 2, seed=5)])
    try:
        optimizer.add_param_group(group)
    except (ValueError, TypeError, RuntimeError):
        assert len(optimizer.param_groups) == len(optimizer._originals) == 1
    optimizer.add_param_group({"params": [parameter(2, 2)]})
    run(optimizer, [p for each in optimizer.param_groups for p in each["params"]], 1)


def test_other_values_that_are_no_group():
    optimizer = CWDAdamW([parameter(2, 2)])
    for group in (None, [parameter(2, 2)], parameter(2, 2)):
        with pytest.raises(TypeError, match="param_group must be a dict, but got"):
            optimizer.add_param_group(group)


def test_companions():
    p = parameter(2, 2)
    with pytest.raises(ValueError, match="algorithm='adam' is not a registered rule"):
        CWDOptimizer([p], algorithm="muon", companions={"adam": {}})
    with pytest.raises(TypeError, match=r"CWDOptimizer has no argument 'beta'\. Did you mean betas\?"):
        CWDOptimizer([p], algorithm="muon", companions={"adamw": {"beta": (0.9, 0.95)}})


def changed(**values):
    def change(saved):
        saved["param_groups"][0].update(values)

    return change


def stateful(cls, *shapes, **options):
    given = [parameter(*shape) for shape in shapes]
    optimizer = cls(given, **options)
    run(optimizer, given, 1)
    return optimizer


def of(cls, *shapes, **options):
    def change(saved):
        saved.clear()
        saved.update(stateful(cls, *shapes, **options).state_dict())

    return change


# State dicts for an AdamW of one matrix of 3 x 3, as changes of its own, and what the error says.
STATES = [
    (changed(amsgrad=True), "the saved optimizer used amsgrad=True, which has no counterpart here"),
    *(
        (changed(**{key: value}), f"{key}={value!r} is not valid")
        for key, value in (
            ("betas", (0.9, 0.9, 0.9)),
            ("betas", None),
            ("lr", -1),
            ("lr", "1e-3"),
            ("lr", math.nan),
            ("weight_decay", True),
            ("weight_decay", math.inf),
            ("eps", "1e-8"),
            ("mask", "product"),
        )
    ),
    (changed(params=[0, 1]), "parameter group 0 has 1 parameters, and had 2 when it was saved"),
    (
        lambda saved: saved["state"][0].pop("exp_avg"),
        "holds step, exp_avg_sq, but rule 'adamw' keeps step, exp_avg, exp_avg_sq",
    ),
    (lambda saved: saved["state"][0].update(exp_avg=torch.ones(2, 3)), "has shape (2, 3), and the parameter (3, 3)"),
    (of(CWDAdamW, (2, 2)), "has shape (2, 2), and the parameter (3, 3)"),
    (of(CWDAdamW, (3, 3), (3, 3)), "parameter group 0 has 1 parameters, and had 2"),
    (of(CWDLion, (3, 3)), "the saved state is of rule 'lion', the optimizer's is 'adamw'"),
    (of(CWDMuon, (3, 3)), "the saved state is of rule 'muon', the optimizer's is 'adamw'"),
    (of(CWDSGD, (3, 3), momentum=0.9), "the saved state is of rule 'sgd', the optimizer's is 'adamw'"),
]


@pytest.mark.parametrize(("change", "message"), STATES)
def test_state_dicts(change, message):
    optimizer = stateful(CWDAdamW, (3, 3))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    change(saved)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_the_table_is_long():
    cases = [*ARGUMENTS, *KEYWORDS, *GIVEN, *STATES]
    assert len(cases) >= 150
    repeated = [text for text, count in Counter(repr(case) for case in [*ARGUMENTS, *KEYWORDS]).items() if count > 1]
    assert repeated == []


# --- what torch refuses


def test_torch_s_invalid_inputs():
    """Each raises torch's type of error, at construction also where torch waits for the step; with None as well."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.optim.torch_invalid_inputs"], capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr
    found = [json.loads(line) for line in child.stdout.splitlines()]
    assert {name for name, *_ in found} == {"AdamW", "SGD", "Muon"}
    assert len(found) >= 28
    for name, description, expected, raised, message in found:
        assert (raised, bool(message)) == (expected, True), f"{name}: {description}: {message}"


@pytest.mark.parametrize("cls", [CWDAdamW, CWDSGD, CWDMuon])
@pytest.mark.parametrize("other", ["foreach", "differentiable"])
def test_what_torch_refuses_on_a_gpu_alone(cls, other):
    with pytest.raises(RuntimeError, match=f"fused=True is not supported: .*{other}=True is not supported: "):
        cls(None, fused=True, **{other: True})


# --- and what is right


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (CWDAdamW, {"lr": np.float64(0.5)}, {"lr": 0.5}),
        (CWDAdamW, {"lr": np.array(0.5)}, {"lr": 0.5}),
        (CWDAdamW, {"lr": Fraction(1, 2), "weight_decay": 0}, {"lr": 0.5, "weight_decay": 0.0}),
        (CWDAdamW, {"betas": np.array([0.5, 0.75])}, {"betas": (0.5, 0.75)}),
        (CWDAdamW, {"betas": [np.float32(0.5), 0]}, {"betas": (0.5, 0.0)}),
        (CWDMuon, {"ns_steps": np.int64(3), "nesterov": np.bool_(False)}, {"ns_steps": 3, "nesterov": False}),
        (CWDMuon, {"ns_steps": 3.0}, {"ns_steps": 3}),
        (CWDMuon, {"ns_coefficients": [2, -1.5, 0.5]}, {"ns_coefficients": ((2.0, -1.5, 0.5),)}),
        (CWDMuon, {"adjust_lr_fn": None}, {"adjust_lr_fn": "original"}),
        (CWDSGD, {"momentum": np.float32(0.5)}, {"momentum": 0.5}),
    ],
)
def test_numbers_of_other_libraries_become_python_s(cls, options, expected):
    (group,) = cls(params(cls), **options).param_groups
    for key, value in expected.items():
        assert group[key] == value
        assert type(group[key]) is type(value)


def test_a_learning_rate_that_is_a_tensor_stays_one():
    for lr in (torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)):
        (group,) = CWDAdamW([parameter(2, 2)], lr).param_groups
        assert group["lr"] is lr


def test_what_asks_for_nothing_is_taken(algorithm):
    nothing = {
        "amsgrad": False,
        "foreach": None,
        "fused": False,
        "differentiable": False,
        "decoupled_weight_decay": True,
    }
    optimizer = CWDOptimizer([{"params": [parameter(2, 2)], **nothing}], algorithm=algorithm, **nothing)
    assert not optimizer.param_groups[0].keys() & nothing.keys()


@pytest.mark.parametrize("bare", [False, True])
def test_groups_made_by_others(bare):
    """Without lr and weight_decay, with names, keys of their own, empty, of torch's optimizers, of tensors."""
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    named = list(model.named_parameters())
    lr = torch.tensor(0.125)
    groups = [
        {"params": [p for _, p in named[:2]], "param_names": [n for n, _ in named[:2]], "names": "own", "use_muon": 1},
        {"params": iter(named[2:4]), "lr": lr, "weight_decay": 0.25, "foreach": None, "amsgrad": False},
        {"params": dict(named[4:]).items(), "lr": 0.5},
    ]
    if bare:
        groups = [{"params": [p for _, p in named]}]
    optimizer = CWDMuon(groups, lr=0.75, weight_decay=0.0625, adamw_lr=1.0, routing=route(model))
    run(optimizer, [p for _, p in named], 2)
    held = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    assert held == ([] if bare else held)
    found = {
        (group["algorithm"], float(group["lr"]), group["weight_decay"], group.get("names"), group.get("use_muon"))
        for group in optimizer.param_groups
    }
    if bare:
        assert found == {("muon", 0.75, 0.0625, None, None), ("adamw", 1.0, 0.0625, None, None)}
    else:
        assert sorted(held) == sorted(name for name, _ in named)
        assert found == {
            ("muon", 0.75, 0.0625, "own", 1),
            ("adamw", 1.0, 0.0625, "own", 1),
            ("muon", 0.125, 0.25, None, None),
            ("adamw", 0.125, 0.25, None, None),
            ("adamw", 0.5, 0.0625, None, None),
        }
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]


def test_groups_of_a_torch_optimizer():
    p, q = parameter(2, 2), parameter(2, 2, seed=1)
    theirs = torch.optim.AdamW([{"params": [p], "lr": 0.5}, {"params": [q]}, {"params": []}], lr=0.25, foreach=False)
    ours = CWDAdamW(theirs.param_groups)
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.25, 0.25]
    run(ours, [p, q], 2)
    assert "foreach" in theirs.param_groups[0], "their groups are not ours to change"
