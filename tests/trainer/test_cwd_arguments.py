"""CWDArgumentsMixin: with every class of training arguments, in Python, on the command line, as JSON and pickled."""

from dataclasses import dataclass, fields

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig, TrlParser

from hf_cwd import CWDArgumentsMixin, CWDTrainer, CWDTrainingArguments
from hf_cwd.trainer.resuming import verify_mode
from tests.support.tiny import tiny_llama


@dataclass
class Seq2SeqArguments(CWDArgumentsMixin, Seq2SeqTrainingArguments):
    pass


@dataclass
class SFTArguments(CWDArgumentsMixin, SFTConfig):
    own: int = 3


@dataclass
class DPOArguments(CWDArgumentsMixin, DPOConfig):
    pass


@dataclass
class GRPOArguments(CWDArgumentsMixin, GRPOConfig):
    optim: str = "cwd_muon"


CLASSES = [CWDTrainingArguments, Seq2SeqArguments, SFTArguments, DPOArguments, GRPOArguments]


def made(kind, tmp_path, **options):
    """Of TRL's only, bf16 is on by default."""
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    return kind(**(defaults | options))


@pytest.mark.parametrize("kind", CLASSES)
def test_the_base_s_defaults_but_for_the_optimizer(kind, tmp_path):
    base = kind.__mro__[2]
    args, plain = made(kind, tmp_path), made(base, tmp_path)
    assert args.optim.value == ("cwd_muon" if kind is GRPOArguments else "cwd_adamw")
    assert (args.cwd_log, args.cwd_not_finite, args.optim_args) == (None, "stop", None)
    given, expected = args.to_dict(), plain.to_dict()
    assert {key for key in expected if given[key] != expected[key]} == {"optim"}
    assert given.keys() - expected.keys() == {"cwd_log", "cwd_not_finite", "cwd_verify"} | ({"own"} & given.keys())
    # The base's positional order is kept.
    names = [field.name for field in fields(base)]
    assert [field.name for field in fields(kind)][: len(names)] == names


@pytest.mark.parametrize("kind", CLASSES)
def test_copies(kind, tmp_path):
    """By to_dict, and by pickle as the Trainer saves them."""
    args = made(kind, tmp_path, cwd_log="groups", cwd_not_finite="skip", optim_args="mask=gt")
    assert args.optim_args == "mask=gt,cwd_log=groups"
    given = args.to_dict()
    given.pop("generation_batch_size", None)  # GRPOConfig makes it of steps_per_generation, and refuses both
    again = kind(**given)
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for copy in (again, loaded):
        assert type(copy) is kind
        assert copy.to_json_string() == args.to_json_string()


@pytest.mark.parametrize(("kind", "parser"), [(CWDTrainingArguments, HfArgumentParser), (SFTArguments, TrlParser)])
def test_on_the_command_line(kind, parser, tmp_path, capsys):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (args,) = parser((kind,)).parse_args_into_dataclasses([*common, "--cwd_not_finite", "ignore", "--cwd_log", "off"])
    assert (args.optim, args.cwd_not_finite, args.optim_args) == ("cwd_adamw", "ignore", "cwd_log=off")
    (args,) = parser((kind,)).parse_args_into_dataclasses([*common, "--optim", "adamw_torch"])
    assert args.optim == "adamw_torch"
    with pytest.raises(SystemExit):
        parser((kind,)).parse_args_into_dataclasses([*common, "--cwd_not_finite", "stpo"])
    assert "invalid choice: 'stpo' (choose from" in capsys.readouterr().err


def test_a_trainer_s_own_file_loads(arguments, tmp_path):
    args = made(CWDTrainingArguments, tmp_path, cwd_not_finite="skip")
    CWDTrainer(model=tiny_llama(), args=args).save_model()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (saved.optim, saved.cwd_not_finite) == ("cwd_adamw", "skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cwd_log": "all"}, "cwd_log='all' does not exist: give one of summary, groups, off"),
        ({"cwd_not_finite": None}, "cwd_not_finite=None does not exist: give one of stop, skip, ignore"),
        (
            {"cwd_log": "off", "optim_args": "mask=gt, cwd_log=groups"},
            "cwd_log='off' contradicts cwd_log=groups in --optim_args: give one of them",
        ),
        ({"cwd_log": "off", "optim": "adamw_torch"}, "cwd_log='off' has no effect with optim='adamw_torch'"),
        (
            {"cwd_verify": "off", "optim_args": "cwd_verify=fast"},
            "cwd_verify='off' contradicts cwd_verify=fast in --optim_args: give one of them",
        ),
        ({"optim_args": "cwd_verify=never"}, "cwd_verify='never' is not valid"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(CWDTrainingArguments, tmp_path, **options)


def test_the_same_twice_is_no_contradiction(tmp_path):
    args = made(CWDTrainingArguments, tmp_path, cwd_log="off", optim_args="cwd_log=off")
    assert args.optim_args == "cwd_log=off"


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "full"),
        ({"optim_args": "cwd_verify=fast"}, "fast"),
        ({"cwd_verify": "off"}, "off"),
        ({"cwd_verify": "off", "optim_args": "mask=gt,cwd_verify=off"}, "off"),
        ({"cwd_verify": "fast", "optim": "adamw_torch"}, "fast"),  # beside optimizers=
        ({"optim": "adamw_torch"}, "full"),
    ],
    ids=str,
)
def test_how_checkpoints_are_compared(options, mode, tmp_path):
    assert verify_mode(made(CWDTrainingArguments, tmp_path, **options)) == mode
    if "cwd_verify" not in options:  # as other arguments say it
        assert verify_mode(TrainingArguments(str(tmp_path), use_cpu=True, **({"optim": "cwd_adamw"} | options))) == mode


def test_the_other_order_of_bases():
    """There TrainingArguments' default of optim would win, and nothing of the mixin's would be checked."""
    with pytest.raises(TypeError, match=r"write class Wrong\(CWDArgumentsMixin, SFTConfig\)"):

        @dataclass
        class Wrong(SFTConfig, CWDArgumentsMixin):
            pass


def test_a_class_without_dataclass(tmp_path):
    class Plain(CWDArgumentsMixin, TrainingArguments):
        pass

    for options in ({}, {"output_dir": str(tmp_path)}):
        with pytest.raises(TypeError, match=r"class Plain lacks fields of .*: add @dataclass to it"):
            Plain(**options)

    class Derived(CWDTrainingArguments):
        """Adds no field, and needs none."""

    assert made(Derived, tmp_path).optim == "cwd_adamw"
