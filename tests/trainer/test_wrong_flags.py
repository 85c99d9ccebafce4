"""A table of what users get wrong in flags, YAML and JSON files and layouts: refused in words, before a model is there.

Wrong arguments in Python are in tests/optim/test_wrong_arguments.py.
"""

import json
import re
import sys

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_cwd import CWDTrainingArguments
from hf_cwd.cli import main
from hf_cwd.cli.layout import RANKS, parse_layout
from tests.support.tiny import TINY

NUMBER = "is a finite number >= 0"
LIST = "begins like a JSON list, but is not valid JSON"
MODULES = "names no modules: give a regular expression, a list of names or all-linear"

# Values of --optim, and the names that are suggested.
NAMES = [
    *(
        (name, "Did you mean cwd_muon? hf_cwd has cwd_adamw, cwd_lion, cwd_muon, cwd_sgd")
        for name in ("muon", "Muon", "MUON")
    ),
    *((name, "Did you mean cwd_lion, or transformers' lion_8bit?") for name in ("lion", "Lion", "lionn")),
    *((name, "Did you mean cwd_adamw, or transformers' adamw_torch?") for name in ("adamw", "AdamW", "adam", "adam_w")),
    *(
        (name, "Did you mean cwd_adamw? hf_cwd has")
        for name in (
            "cwd-adamw",
            "CWD_ADAMW",
            "cwdadamw",
            "CWDAdamW",
            "cwd.adamw",
            "cwd adamw",
            " cwd_adamw",
            "cwd_adam",
        )
    ),
    *((name, "Did you mean cwd_sgd?") for name in ("cwd-sgd", "CWD_SGD", "cwd_sdg")),
    ("sgdd", "Did you mean cwd_sgd, or transformers' sgd?"),
    ("cwd", "--optim cwd does not exist. hf_cwd has cwd_adamw"),
    ("cwd_xyz", "--optim cwd_xyz does not exist. hf_cwd has cwd_adamw"),
]

# TrainingArguments, and what the error says.
FLAGS = [
    *(
        (
            {"optim": "cwd_adamw", "learning_rate": value},
            f"cwd_adamw: --learning_rate={value!r} is not valid: --learning_rate {NUMBER}",
        )
        for value in (
            -1,
            -1.0,
            "-1",
            "fast",
            "",
            "1e-3x",
            "1,5",
            "nan",
            "inf",
            None,
            True,
            [1e-3],
            {"a": 1},
            1j,
            float("nan"),
        )
    ),
    *(
        (
            {"optim": "cwd_muon", "weight_decay": value},
            f"cwd_muon: --weight_decay={value!r} is not valid: --weight_decay {NUMBER}",
        )
        for value in (-0.1, "ten", None, False, float("inf"))
    ),
    *(
        ({"optim": "cwd_adamw", key: value}, f"cwd_adamw: --{key}={value!r} is not valid: --{key} {NUMBER}")
        for key, value in (
            ("adam_beta1", 1.0),
            ("adam_beta2", "1"),
            ("adam_beta2", None),
            ("adam_epsilon", -1e-8),
            ("adam_epsilon", "tiny"),
        )
    ),
    (
        {"optim": "cwd_lion", "adam_beta1": "0.8"},
        "cwd_lion has no Adam in it: leave the flag out. Its betas are set by --optim_args betas=",
    ),
    (
        {"optim": "cwd_sgd", "adam_epsilon": 1e-6},
        "--adam_epsilon given, but cwd_sgd has no Adam in it: leave the flag out",
    ),
    (
        {"optim": "cwd_adamw", "adam_beta2": "0.98", "optim_args": "betas=0.9:0.95"},
        "betas=(0.9, 0.95) in --optim_args contradicts --adam_beta2 ((0.9, 0.98)): give one of them",
    ),
    *(
        ({"optim": "cwd_muon", "optim_args": value}, message)
        for value, message in (
            ("nesterow=false", "cwd_muon has no option 'nesterow'. Did you mean nesterov?"),
            ("nesterov", "'nesterov' is not key=value"),
            ("ns_coefficients=0:0:0", "ns_coefficients='0:0:0' is not valid"),
            ("ns_coefficients=nan:1:1", "ns_coefficients='nan:1:1' is not valid"),
            ("ns_coefficients=3:4", "ns_coefficients='3:4' is not valid"),
            ("ns_coefficients=3.4:-4.8:2:1", "ns_coefficients='3.4:-4.8:2:1' is not valid"),
            ("ns_coefficients=9:9:9", "with ns_steps=5 takes the singular value 0.05 to 9.45e+117 instead of about 1"),
            ("betas=0.9", "betas='0.9' is not valid"),
            ("lr=1", "lr is set by --learning_rate, not here"),
            ("mask=ge,mask=gt", "mask is given twice"),
            (5, "optim_args=5 is neither text nor a mapping"),
            (True, "optim_args=True is neither text nor a mapping"),
            (["mask=gt"], "optim_args=['mask=gt'] is neither text nor a mapping"),
            ({"mask": None}, "mask='None' is not valid: mask is one of ge, gt"),
            ({"masks": "gt"}, "cwd_muon has no option 'masks'. Did you mean mask?"),
            ({"cautious": 1}, "cautious='1' is not valid: cautious is true or false"),
            ({"betas": 0.9}, "betas='0.9' is not valid"),
            ({"betas": [0.9]}, "betas='0.9' is not valid"),
            ({"betas": {"beta1": 0.9}}, "betas=\"{'beta1':0.9}\" is not valid"),
            ({"weight_decay": 0.1}, "weight_decay is set by --weight_decay, not here"),
            ({"learning_rate": 0.1}, "learning_rate is set by --learning_rate, not here"),
            ({1: 2}, "cwd_muon has no option '1'"),
            ('{"mask": "gt"', "begins like a JSON object, but is not valid JSON: Expecting ',' delimiter"),
            ("{mask: gt}", "begins like a JSON object, but is not valid JSON"),
        )
    ),
    *(
        ({"optim": "cwd_muon", "optim_target_modules": value}, f"--optim_target_modules {value!r} {message}")
        for value, message in (
            ('["q_proj", "v_proj"', f"{LIST}: Expecting ',' delimiter"),
            ('["q_proj" "v_proj"]', LIST),
            ("['q_proj','v_proj']", LIST),
            ("[q_proj,v_proj]", LIST),
            ("[q_proj", "is not a regular"),
            ("*proj", "is not a regular expression: nothing to repeat"),
            ("(q|v", "is not a regular expression: missing )"),
            ([], MODULES),
            ("", MODULES),
            ([""], MODULES),
            ([1], MODULES),
            ([None], MODULES),
            (5, MODULES),
            (True, MODULES),
            ({"q_proj": 1}, MODULES),
            (["q_proj", ["v_proj"]], MODULES),
        )
    ),
    ({"optim": "cwd_muon", "optim_target_modules": "[]"}, f"--optim_target_modules [] {MODULES}"),
    (
        {"optim": "cwd_muon", "optim_target_modules": ["*proj"]},
        "--optim_target_modules '*proj' is not a regular expression",
    ),
    ({"optim": "cwd_lion", "optim_target_modules": "all-linear"}, "--optim_target_modules has no effect on cwd_lion"),
]

# --layout and --world.
LAYOUTS = [
    *(
        (text, None, "is not understood. Write ddp, fsdp2, tp, or several")
        for text in (
            "",
            "tp=",
            "tp=0",
            "tp=-1",
            "tp=1.5",
            "tp=two",
            "hsdp=8",
            "tp:8",
            "tp=2;ddp=2",
            "tp=2,,ddp=2",
            "zero4=2",
            "TP=2",
        )
    ),
    ("tp", None, "say how many ranks tp has, tp=8, or give --world"),
    ("tp=2,tp=2", None, "'tp=2' is not understood"),
    ("fsdp2,tp=3", 8, "3 does not divide --world 8"),
    ("fsdp2=4", 8, "has 4 ranks, and --world is 8: leave --world out"),
    ("ddp", 0, "--world 0: give the number of ranks, which is from 1 to 100,000"),
    ("ddp", -4, "--world -4: give the number of ranks"),
    ("zero3", RANKS + 1, "--world 100001: give the number of ranks"),
    ("fsdp2=1000000", None, "has 1,000,000 ranks: give 100,000 at most"),
    ("ddp=1000,fsdp2=1000", None, "has 1,000,000 ranks: give 100,000 at most"),
    ("zero1=99999999999999999999", None, "ranks: give 100,000 at most"),
    ("fsdp2=4,ep=3", None, "ep must be a multiple of tp, and a divisor of fsdp2 x tp"),
    ("zero3=4,tp=2", None, "zero3 is over all ranks, and has not been tried together with tp"),
]


def refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_names(name, message, arguments, capsys):
    refused(lambda: arguments(optim=name), message)
    with pytest.raises(SystemExit, match="2"):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", name])
    assert message in capsys.readouterr().err


def test_names_that_are_not_like_ours_are_left_to_transformers(arguments):
    for name in ("adagradd", "rmsprop2", "none", None):
        with pytest.raises(ValueError, match="is not a valid OptimizerNames, please select one of"):
            arguments(optim=name)


@pytest.mark.parametrize(("options", "message"), FLAGS)
def test_flags(options, message, arguments):
    refused(lambda: arguments(**options), message)


@pytest.mark.parametrize(("options", "message"), FLAGS)
def test_flags_in_files(options, message, tmp_path):
    """The same from a YAML and a JSON file, where these can hold the value."""
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", **options}
    parser = HfArgumentParser(TrainingArguments)
    for suffix, write, read in (
        ("yaml", yaml.safe_dump, parser.parse_yaml_file),
        ("json", json.dumps, parser.parse_json_file),
    ):
        path = tmp_path / f"arguments.{suffix}"
        try:
            path.write_text(write(options))
        except (TypeError, yaml.YAMLError):
            continue
        refused(lambda path=path, read=read: read(path), message.replace("{1:", "{'1':"))


@pytest.mark.parametrize(("text", "world", "message"), LAYOUTS)
def test_layouts(text, world, message):
    refused(lambda: parse_layout(text, world), message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--layout", "tp=7"],
            "tp=7 does not divide the 2 attention heads of model.layers.0.self_attn.q_proj (num_attention",
        ),
        (
            ["--layout", "fsdp2=2,tp=2"],
            "tp=2 does not divide the 1 attention heads of model.layers.0.self_attn.k_proj (num_key",
        ),
        (["--layout", "ep=2,fsdp2=2"], "transformers has no ep plan for LlamaForCausalLM: leave ep out of the layout"),
        (["--world", "8"], "--world 8 needs --layout"),
        (["--layout", "ddp", "--world", "x"], "argument --world: invalid int value: 'x'"),
        (["--layout", "ddp=2", "--device", "banana"], "argument --device: invalid choice: 'banana'"),
        (["--optim", "muon"], "argument --optim: invalid choice: 'muon' (choose from"),
        (["--learning_rate", "-1"], "cwd_muon: --learning_rate=-1.0 is not valid"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--optim_args", "ns_coefficients=0:0:0"], "--optim_args: ns_coefficients='0:0:0' is not valid"),
        (["--optim_args", '{"mask": "gt"'], "begins like a JSON object, but is not valid JSON"),
        (["--optim_target_modules", '["q_proj"'], LIST),
    ],
)
def test_explain(flags, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}))
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", str(path), *flags])
    with pytest.raises(SystemExit, match="2"):
        main()
    printed = capsys.readouterr()
    assert f"hf-cwd explain: error: {message}" in printed.err or message in printed.err
    assert "Traceback" not in printed.err


# --- and what is right


def test_numbers_that_yaml_takes_for_text(tmp_path):
    """1e-3 has no point, and so is text in YAML 1.1; on a command line it is a number, as here."""
    path = tmp_path / "arguments.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nuse_cpu: true\noptim: cwd_adamw\nlearning_rate: 1e-3\nweight_decay: 1e-1\n"
        "adam_beta1: 8e-1\nadam_epsilon: 1e-7\noptim_args:\n  eps: 1e-7\n  mask: gt\n"
    )
    assert yaml.safe_load(path.read_text())["learning_rate"] == "1e-3"
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(path)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_epsilon) == (1e-3, 0.1, 0.8, 1e-7)
    assert args.optim_args == "eps=1e-7,mask=gt"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, None),
        ({"cautious": False, "betas": [0.9, 0.95], "eps": 1e-6}, "cautious=false,betas=0.9:0.95,eps=1e-06"),
        ('{"cautious": false, "betas": [0.9, 0.95]}', "cautious=false,betas=0.9:0.95"),
        ({"ns_coefficients": [[3, -4, 2], [2, -1.5, 0.5]]}, "ns_coefficients=3:-4:2:2:-1.5:0.5"),
        ({"ns_coefficients": "polar_express", "nesterov": True}, "ns_coefficients=polar_express,nesterov=true"),
    ],
)
def test_optim_args_as_a_mapping(given, text, arguments):
    args = arguments(optim="cwd_muon", optim_args=given)
    assert args.optim_args == text
    assert arguments(**(args.to_dict() | {"report_to": "none"})).optim_args == text


def test_a_mapping_with_the_own_fields(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "cwd_log": "off"}
    assert CWDTrainingArguments(**options, optim_args={"mask": "gt"}).optim_args == "mask=gt,cwd_log=off"
    assert CWDTrainingArguments(**options, optim_args={"cwd_log": "off"}).optim_args == "cwd_log=off"
    refused(lambda: CWDTrainingArguments(**options, optim_args={"cwd_log": "groups"}), "contradicts cwd_log=groups")
    refused(lambda: CWDTrainingArguments(**options, optim_args=["mask=gt"]), "is neither text nor a mapping")


def test_several_triples_of_coefficients(arguments):
    from hf_cwd.trainer.optim_args import optimizer_arguments

    args = arguments(optim="cwd_muon", optim_args="ns_coefficients=3:-4:2:2:-1.5:0.5")
    assert optimizer_arguments(args)["ns_coefficients"] == ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5))


def test_regular_expressions_that_begin_with_a_bracket(arguments):
    for text in ("[qv]_proj", "[a-z]{1,2}_proj", '["q_proj", "v_proj"]', "all_linear"):
        assert arguments(optim="cwd_muon", optim_target_modules=text).optim_target_modules == text


def test_a_learning_rate_that_is_a_tensor(arguments):
    lr = torch.tensor(1e-3)
    assert arguments(optim="cwd_adamw", learning_rate=lr).learning_rate is lr


def test_other_optimizers_are_none_of_our_business(arguments):
    args = arguments(optim="adamw_torch", learning_rate="1e-3", optim_args={"a": 1}, optim_target_modules='["a"')
    assert (args.learning_rate, args.optim_args) == ("1e-3", {"a": 1})
