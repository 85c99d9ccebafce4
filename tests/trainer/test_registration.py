"""The names are real members of OptimizerNames, whoever is imported first, and travel in pickles."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments, hf_argparser, trainer_optimizer, training_args
from transformers.training_args import OptimizerNames

from hf_cwd import startup
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.rules import RULES
from hf_cwd.trainer import registration
from tests.support.launching import IMPORTS, launch


def python(code: str, *arguments: str) -> str:
    """Runs code in a new interpreter and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def snapshot():
    return (
        list(OptimizerNames),
        dict(OptimizerNames.__members__),
        dict(OptimizerNames._value2member_map_),
        {name for name in vars(OptimizerNames) if name.startswith("CWD")},
        dict(trainer_optimizer._OPTIMIZER_HANDLERS),
        TrainingArguments.__post_init__,
        hf_argparser.make_choice_type_function,
        list(sys.meta_path),
    )


def test_every_rule_is_a_member(algorithm):
    value = f"cwd_{algorithm}"
    member = OptimizerNames(value)
    assert isinstance(member, OptimizerNames)
    assert member == value
    assert member is getattr(OptimizerNames, value.upper()) is OptimizerNames[value.upper()]
    assert list(OptimizerNames).count(member) == 1
    assert member in OptimizerNames
    assert member in trainer_optimizer._OPTIMIZER_HANDLERS
    assert repr(member) == f"<OptimizerNames.{value.upper()}: '{value}'>"


def test_registering_again_changes_nothing():
    before = snapshot()
    registration.register()
    assert snapshot() == before


def test_unregistering_leaves_no_trace_and_can_be_repeated():
    before = snapshot()
    registration.unregister()
    registration.unregister()
    try:
        bare = snapshot()
        assert len(bare[0]) == len(before[0]) - len(RULES)
        assert not bare[3]
        assert not any("cwd" in str(name) for name in trainer_optimizer._OPTIMIZER_HANDLERS)
        assert TrainingArguments.__post_init__.__module__ == "transformers.training_args"
        assert not hasattr(TrainingArguments.__post_init__, "_hf_cwd_original")
        assert not hasattr(hf_argparser.make_choice_type_function, "_hf_cwd_original")
        with pytest.raises(ValueError, match="is not a valid OptimizerNames"):
            OptimizerNames("cwd_adamw")
        assert OptimizerNames("adamw_torch") is OptimizerNames.ADAMW_TORCH
    finally:
        registration.register()
    assert [str(name) for name in OptimizerNames] == [str(name) for name in before[0]]


def test_the_argument_parser_offers_the_names(algorithm, tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--optim"]
    (arguments,) = parser.parse_args_into_dataclasses([*command, f"cwd_{algorithm}"])
    assert arguments.optim is OptimizerNames(f"cwd_{algorithm}")
    assert arguments.to_dict()["optim"] == f"cwd_{algorithm}"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*command, f"cwd_{algorithm}x"])
    error = capsys.readouterr().err
    assert f"--optim cwd_{algorithm}x does not exist. Did you mean cwd_{algorithm}? hf_cwd has cwd_adamw" in error
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*command, "adagradd"])
    assert "invalid choice: 'adagradd'" in capsys.readouterr().err


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_a_member_are_the_member(algorithm, duplicate):
    member = OptimizerNames(f"cwd_{algorithm}")
    assert duplicate(member) is member
    assert duplicate([member])[0] is member


def test_an_unknown_cwd_name_gets_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"--optim cwd_adam does not exist\. Did you mean cwd_adamw\?"):
        TrainingArguments(output_dir=str(tmp_path), optim="cwd_adam")


def test_an_old_transformers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"cwd_lion needs transformers >= 5\.2, found 4\.57\.1: pip install -U"):
        TrainingArguments(output_dir=str(tmp_path), optim="cwd_lion")
    assert TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", use_cpu=True).optim == "adamw_torch"


def test_a_new_rule_is_a_name_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "toy", dataclasses.replace(RULES["lion"], name="toy"))
    registration.register()
    try:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), optim="cwd_toy", use_cpu=True, optim_args="betas=0.5:0.6"
        )
        model = torch.nn.Linear(2, 2)
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        (group,) = cls(model.parameters(), **options).param_groups
        assert (cls, group["algorithm"], group["betas"]) == (CWDOptimizer, "toy", (0.5, 0.6))
    finally:
        registration._remove_member(training_args.OptimizerNames, "cwd_toy")
        trainer_optimizer._OPTIMIZER_HANDLERS.pop("cwd_toy", None)


def test_new_processes(tmp_path):
    """hf_cwd first, transformers from many threads; then a process that never heard of hf_cwd reads the arguments."""
    saved = tmp_path / "training_args.bin"
    python(
        """
        import sys, threading
        import torch
        import hf_cwd
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not loaded & {"transformers", "accelerate", "datasets"}, loaded
        assert "torch.distributed.tensor" not in sys.modules

        import transformers  # in one thread: its lazy __init__ fails in several at once, with or without us
        from hf_cwd.trainer.registration import register
        failures = []
        def load(i):
            try:
                register()
                from transformers.training_args import TrainingArguments
                from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
                register()
                arguments = TrainingArguments(output_dir=sys.argv[2], optim="cwd_muon", use_cpu=True)
                assert arguments.optim in _OPTIMIZER_HANDLERS
            except BaseException as error:
                failures.append(repr(error))
        threads = [threading.Thread(target=load, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not failures, failures

        from transformers.training_args import OptimizerNames
        assert [str(name.value) for name in OptimizerNames].count("cwd_muon") == 1
        import inspect, transformers.training_args
        assert "class OptimizerNames" in inspect.getsource(transformers.training_args)
        from transformers import TrainingArguments
        torch.save(TrainingArguments(output_dir=sys.argv[2], optim="cwd_muon", use_cpu=True), sys.argv[1])
        """,
        str(saved),
        str(tmp_path),
    )
    python(
        """
        import copy, pickle, sys, torch
        assert "hf_cwd" not in sys.modules
        arguments = torch.load(sys.argv[1], weights_only=False)
        from transformers.training_args import OptimizerNames
        for twin in (arguments, pickle.loads(pickle.dumps(arguments)), copy.copy(arguments), copy.deepcopy(arguments)):
            assert twin.optim is OptimizerNames.CWD_MUON
        """,
        str(saved),
    )


@pytest.mark.parametrize(
    "modules",
    [
        # transformers' lazy __init__ fails in several threads at once, with or without us: one of them, or it is first.
        ["hf_cwd", "torch", "transformers.training_args"],
        ["hf_cwd", "transformers.trainer", "accelerate", "torch"],
        ["transformers", "torch", "transformers.trainer", "hf_cwd", "trl", "accelerate", "hf_cwd.trainer.registration"],
    ],
    ids=" ".join,
)
def test_modules_may_be_imported_by_several_threads(modules, tmp_path):
    """Each thread begins while those before it import what it needs, too."""
    printed = launch(IMPORTS, *modules, cwd=tmp_path).stdout
    assert {f"cwd_{rule}" for rule in RULES} <= set(eval(printed))


def test_the_finder_waits_for_what_is_added_to():
    assert set(startup.MODULES) == set(registration._ACTIONS)


def test_another_finder_may_ask_all_others():
    """Hooks of other packages look for a module as ours does; whoever stands first, each module is added to once."""
    python(
        """
        import sys
        import hf_cwd
        from hf_cwd import startup

        class Asks:
            def find_spec(self, fullname, path, target=None):
                if fullname not in startup.MODULES:
                    return None
                others = [finder for finder in sys.meta_path if finder is not self]
                specs = (finder.find_spec(fullname, path, target) for finder in others)
                return next((spec for spec in specs if spec is not None), None)

        sys.meta_path.insert(0, Asks())
        import transformers.trainer, transformers.training_args
        assert [name.value for name in transformers.training_args.OptimizerNames].count("cwd_muon") == 1
        assert len(set(transformers.trainer.DEFAULT_CALLBACKS)) == len(transformers.trainer.DEFAULT_CALLBACKS) == 6
        assert "exec_module" not in vars(transformers.trainer.__loader__)
        """
    )
