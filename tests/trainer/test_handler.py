"""--optim_args by declared type; the flags that are the user's; errors before a model is loaded."""

import copy

import pytest
from accelerate import ParallelismConfig
from transformers import Trainer

from hf_cwd.rules import RULES
from hf_cwd.trainer.argument_checks import check_finished_arguments
from hf_cwd.trainer.optim_args import options, parse_optim_args
from tests.support.tiny import tiny_llama


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cwd_adamw", None, {}),
        ("cwd_adamw", "", {}),
        ("cwd_adamw", "cautious=false", {"cautious": False}),
        ("cwd_adamw", "cautious=True, mask=gt", {"cautious": True, "mask": "gt"}),
        ("cwd_adamw", "betas=0.9:0.95,eps=1e-6", {"betas": (0.9, 0.95), "eps": 1e-6}),
        ("cwd_lion", "betas=0.95:0.98", {"betas": (0.95, 0.98)}),
        ("cwd_sgd", "momentum=0.9,ema=true", {"momentum": 0.9, "ema": True}),
        (
            "cwd_muon",
            "nesterov=false,betas=0.9:0.95,adamw_lr=3e-4,mask=gt",
            {"nesterov": False, "adamw_betas": (0.9, 0.95), "adamw_lr": 3e-4, "mask": "gt"},
        ),
        ("cwd_muon", "eps=1e-5,adamw_eps=1e-9", {"eps": 1e-5, "adamw_eps": 1e-9}),
        ("cwd_muon", "ns_steps=6,ns_dtype=float32", {"ns_steps": 6, "ns_dtype": "float32"}),
        ("cwd_muon", "share=never,exchange_bytes=1048576", {"share": "never", "exchange_bytes": 1 << 20}),
        ("cwd_muon", "ns_coefficients=2:-1.5:0.5", {"ns_coefficients": ((2.0, -1.5, 0.5),)}),
    ],
)
def test_strings_become_typed_arguments(name, text, expected):
    assert parse_optim_args(name, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nesterov", r"'nesterov' is not key=value.*momentum"),
        ("mask=gt,", r"'' is not key=value"),
        ("mask=a=b", r"'mask=a=b' is not key=value"),
        ("=gt", r"'=gt' is not key=value"),
        ("mask=", r"'mask=' is not key=value"),
        ("nesterow=false", r"no option 'nesterow'\. Did you mean nesterov\? Its options are .*adamw_lr.*nesterov"),
        ("mask=gt,mask=ge", r"mask is given twice"),
        ("betas=0.9:0.95,adamw_betas=0.9:0.99", r"adamw_betas is given twice"),
        ("nesterov=0", r"nesterov='0' is not valid: nesterov is true or false"),
        ("cautious=no", r"cautious='no' is not valid"),
        ("momentum=fast", r"momentum='fast' is not valid: momentum is a finite number >= 0 and < 1"),
        ("momentum=1", r"momentum='1' is not valid"),
        ("momentum=nan", r"momentum='nan' is not valid"),
        ("adamw_lr=-1", r"adamw_lr='-1' is not valid"),
        ("ns_steps=2.5", r"ns_steps='2.5' is not valid: ns_steps is a whole number from 1 to 99"),
        ("betas=0.9", r"betas='0.9' is not valid: betas is two numbers .* written 0.9:0.95"),
        ("betas=0.9:1.5", r"betas='0.9:1.5' is not valid"),
        ("betas=0.9:0.95:0.99", r"is not valid"),
        ("mask=product", r"mask='product' is not valid: mask is one of ge, gt"),
        ("kernel=cuda", r"kernel='cuda' is not valid"),
        ("ns_coefficients=septic", r"ns_coefficients='septic' is not valid: .*one of quintic"),
        ("share=some", r"share='some' is not valid: share is one of auto, always, never"),
        ("exchange_bytes=0", r"exchange_bytes='0' is not valid: exchange_bytes is a whole number from 1"),
        ("lr=0.1", r"lr is set by --learning_rate"),
        ("weight_decay=0.1", r"weight_decay is set by --weight_decay"),
    ],
)
def test_bad_strings_are_refused_when_the_arguments_are_built(text, message, arguments):
    with pytest.raises(ValueError, match=f"(?s)--optim_args.*{message}"):
        arguments(optim="cwd_muon", optim_args=text)


def test_other_optimizers_options_are_none_of_our_business(arguments):
    assert arguments(optim="adamw_torch", optim_args="not a key").optim_args == "not a key"


def test_every_option_s_default_is_valid(algorithm):
    rule = RULES[algorithm]
    for name, option in options(algorithm).items():
        assert option.hyperparameter.check(option.hyperparameter.default) is not None, name
    assert set(rule.hyperparameters) <= options(algorithm).keys()
    assert ({"share", "exchange_bytes"} <= options(algorithm).keys()) == (rule.matrix is not None)


def built(args, model=None):
    """The parameter groups the Trainer makes."""
    trainer = Trainer(model=model or tiny_llama(), args=args)
    return trainer.create_optimizer().param_groups


def test_adam_flags_reach_adamw(arguments):
    (group, _) = built(arguments(optim="cwd_adamw", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6))
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    (group, _) = built(arguments(optim="cwd_adamw"))
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8), "the flags' own defaults"
    (group, _) = built(arguments(optim="cwd_adamw", optim_args="betas=0.7:0.8"))
    assert group["betas"] == (0.7, 0.8)


def test_adam_flags_reach_muon_s_adamw_groups_only(arguments):
    muon, decayed, plain = built(arguments(optim="cwd_muon", adam_beta2=0.95, adam_epsilon=1e-6, optim_args="eps=1e-5"))
    assert muon["eps"] == 1e-5
    assert decayed["betas"] == plain["betas"] == (0.9, 0.95)
    assert decayed["eps"] == plain["eps"] == 1e-6


def test_learning_rate_and_weight_decay_are_the_user_s(arguments, algorithm):
    groups = built(arguments(optim=f"cwd_{algorithm}", learning_rate=0.0123, weight_decay=0.456))
    assert {group["lr"] for group in groups} == {0.0123}
    assert {group["weight_decay"] for group in groups} == {0.456, 0.0}
    muon, *adamw = built(arguments(optim="cwd_muon", learning_rate=0.0123, optim_args="adamw_lr=0.004"))
    assert muon["lr"] == 0.0123
    assert {group["lr"] for group in adamw} == {0.004}


def test_lion_s_betas_change_only_through_optim_args(arguments):
    assert built(arguments(optim="cwd_lion"))[0]["betas"] == (0.9, 0.95)
    for name in ("cwd_lion", "cwd_sgd"):
        with pytest.raises(ValueError, match=f"--adam_beta2 given, but {name} has no Adam"):
            arguments(optim=name, adam_beta2=0.98)
    with pytest.raises(ValueError, match=r"--adam_beta1 and --adam_epsilon given.*optim_args betas="):
        arguments(optim="cwd_lion", adam_beta1=0.8, adam_epsilon=1e-6)


def test_contradictions_and_what_cannot_be_honoured(arguments):
    with pytest.raises(ValueError, match=r"betas=\(0.9, 0.95\) in --optim_args contradicts --adam_beta2 .*give one"):
        arguments(optim="cwd_adamw", adam_beta2=0.98, optim_args="betas=0.9:0.95")
    with pytest.raises(ValueError, match="adamw_eps=1e-09 in --optim_args contradicts --adam_epsilon"):
        arguments(optim="cwd_muon", adam_epsilon=1e-6, optim_args="adamw_eps=1e-9")
    assert arguments(optim="cwd_adamw", adam_beta2=0.95, optim_args="betas=0.9:0.95")
    with pytest.raises(ValueError, match="optim_target_modules has no effect on cwd_adamw, which takes any module"):
        arguments(optim="cwd_adamw", optim_target_modules="all-linear")
    with pytest.raises(ValueError, match=r"optim_target_modules '\*proj' is not a regular expression"):
        arguments(optim="cwd_muon", optim_target_modules="*proj")
    with pytest.raises(ValueError, match=r"--weight_decay=-0.1 is not valid"):
        arguments(optim="cwd_lion", weight_decay=-0.1)
    with pytest.raises(ValueError, match=r"--adam_beta2=1.0 is not valid"):
        arguments(optim="cwd_adamw", adam_beta2=1.0)
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0"):
        arguments(optim="cwd_sgd", optim_args="nesterov=true")


FSDP1 = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 1}}


def optimizer_of(args):
    """What the Trainer asks for when it makes the optimizer; a Trainer would need the processes."""
    return Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


def refused_twice(args, message):
    """When TrainingArguments are finished, and when the optimizer is made."""
    for check in (check_finished_arguments, optimizer_of):
        with pytest.raises(ValueError, match=message):
            check(args)


def accepted(args):
    check_finished_arguments(args)
    optimizer_of(args)


def test_sharded_layouts_are_accepted(arguments, algorithm, monkeypatch):
    name = f"cwd_{algorithm}"
    accepted(arguments(optim=name, fsdp="full_shard", fsdp_config={"fsdp_version": 2}))
    sizes = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, tp_size=2)
    accepted(arguments(optim=name, parallelism_config=sizes))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    accepted(arguments(optim=name))


def test_fsdp1_is_refused_where_the_optimizer_gets_no_matrices(arguments, algorithm, monkeypatch):
    name, whole = f"cwd_{algorithm}", RULES[algorithm].matrix is not None
    flat = "needs whole matrices.*fsdp_version: 2" if whole else "needs use_orig_params.*fsdp_use_orig_params: true"
    plain = arguments(optim=name)
    with pytest.raises(ValueError, match=f"{name} .*{flat}"):
        arguments(optim=name, fsdp="full_shard", fsdp_config={"version": 1, "use_orig_params": False})
    if whole:
        with pytest.raises(ValueError, match=flat):
            arguments(optim=name, **copy.deepcopy(FSDP1))
    else:
        accepted(arguments(optim=name, **copy.deepcopy(FSDP1)))  # transformers sets use_orig_params
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # whose version is 1 where it names none
    refused_twice(plain, flat)
    monkeypatch.setenv("FSDP_USE_ORIG_PARAMS", "true")
    if whole:
        refused_twice(plain, flat)
    else:
        accepted(plain)


@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_context_and_sequence_parallelism_are_refused_by_name(kind, arguments, algorithm, monkeypatch):
    message = f"cwd_{algorithm} does not support {kind}_size=2: .*Set {kind}_size to 1"
    plain, sizes = arguments(optim=f"cwd_{algorithm}"), ParallelismConfig(**{f"{kind}_size": 2})
    with pytest.raises(ValueError, match=message):
        arguments(optim=f"cwd_{algorithm}", parallelism_config=sizes)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "2")
    refused_twice(plain, message)


def test_layouts_of_other_optimizers_are_none_of_our_business(arguments):
    check_finished_arguments(arguments(optim="adamw_torch", **copy.deepcopy(FSDP1)))


def test_cautious_false_and_mask_reach_every_group(arguments, algorithm):
    groups = built(arguments(optim=f"cwd_{algorithm}", optim_args="cautious=false,mask=gt"))
    assert {(group["cautious"], group["mask"]) for group in groups} == {(False, "gt")}
