"""What DeepSpeed's configuration may say beside --optim cwd_*: checked when TrainingArguments are built."""

import copy
import json
import logging
import re

import pytest
import torch
from accelerate import DeepSpeedPlugin
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_cwd import CWDAdamW, log
from hf_cwd.distributed import deepspeed_zero
from hf_cwd.trainer import deepspeed
from tests.support.tiny import tiny_data, tiny_llama

ASKS = {  # a value that asks for each of what is refused
    "zero_hpz_partition_size": 2,
    "mics_shard_size": 2,
    "device": "nvme",
    "ratio": 0.5,
    "autotp_size": 2,
    "sequence_parallel_size": 2,
}


@pytest.fixture(autouse=True)
def _no_configuration_is_left():
    yield
    unset_hf_deepspeed_config()


def config(**changes):
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": 2}, **changes}


def section(kind, **params):
    return {"optimizer": {"type": kind, "params": params}}


def put(tree, key, value):
    first, _, rest = key.partition(".")
    if rest:
        put(tree.setdefault(first, {}), rest, value)
    else:
        tree[first] = value


@pytest.mark.parametrize(("key", "what"), [(key, what) for key, _, what in deepspeed.REFUSED])
def test_untried_parts_are_refused_by_name(key, what, arguments):
    tree = config(zero_optimization={"stage": 3})
    put(tree, key, ASKS.get(key.rpartition(".")[2], True))
    with pytest.raises(
        ValueError, match=rf"cwd_muon has not been tried with DeepSpeed's {re.escape(what)} \(\"{key}\": .*leave"
    ):
        arguments(optim="cwd_muon", deepspeed=tree)
    arguments(optim="adamw_torch", deepspeed=tree)  # another optimizer's business


def test_a_plain_configuration_is_accepted(arguments, algorithm):
    for stage in (1, 2, 3):
        for offload in ({}, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}):
            args = arguments(optim=f"cwd_{algorithm}", deepspeed=config(zero_optimization={"stage": stage, **offload}))
            assert args.hf_deepspeed_config.config["zero_optimization"]["stage"] == stage


def test_a_section_that_names_ours_works_as_the_flag_does(arguments, tmp_path):
    params = {"lr": "auto", "weight_decay": 0.1, "momentum": 0.9, "nesterov": False, "adamw_betas": [0.9, 0.95]}
    text = {**config(), **section("cwd_muon", **params), "bf16": {"enabled": "auto"}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(text))
    before = copy.deepcopy(text)
    for given in (text, str(file)):
        args = arguments(deepspeed=given, optim_args="ns_steps=6")
        assert args.optim == "cwd_muon"
        _, options = Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
        wanted = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False, "adamw_betas": (0.9, 0.95)}
        assert options.items() >= {**wanted, "ns_steps": 6}.items()
        found = args.hf_deepspeed_config
        assert "optimizer" not in found.config
        assert not found.mismatches
        assert args.deepspeed_plugin.deepspeed_config is found.config, "what Accelerate reads"
    assert text == before


def test_a_section_in_the_file_of_accelerate_s_configuration_works_too(arguments, tmp_path, monkeypatch):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({**config(), **section("cwd_lion", betas=[0.9, 0.99])}))
    args = arguments()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    deepspeed.adopt_section(args)
    assert (args.optim, args.optim_args) == ("cwd_lion", "betas=0.9:0.99")
    args.deepspeed_plugin = DeepSpeedPlugin()
    deepspeed.drop_section(args)
    assert "optimizer" not in args.deepspeed_plugin.deepspeed_config


def test_two_optimizers_are_one_too_many(arguments):
    with pytest.raises(
        ValueError, match=r'cwd_muon is given.*delete the line "optimizer": \{"type": "AdamW", \.\.\.\}'
    ):
        arguments(optim="cwd_muon", deepspeed={**config(), **section("AdamW", lr="auto")})
    with pytest.raises(ValueError, match=r"--optim cwd_lion is given.*\"type\": \"cwd_muon\".*delete one of them"):
        arguments(optim="cwd_lion", deepspeed={**config(), **section("cwd_muon")})
    with pytest.raises(ValueError, match=r"--optim sgd is given.*delete one of them"):
        arguments(optim="sgd", deepspeed={**config(), **section("cwd_muon")})
    with pytest.raises(ValueError, match=r"names the optimizer cwd_adam: .*Did you mean cwd_adamw"):
        arguments(deepspeed={**config(), **section("cwd_adam")})
    with pytest.raises(ValueError, match=r'says "lr": 0.5, and --learning_rate is 0.01: write "lr": "auto"'):
        arguments(deepspeed={**config(), **section("cwd_muon", lr=0.5)})
    with pytest.raises(ValueError, match=r"cwd_lion has no option 'momentum'"):
        arguments(deepspeed={**config(), **section("cwd_lion", momentum=0.9)})
    assert arguments(optim="cwd_muon", deepspeed={**config(), **section("cwd_muon", lr=0.01)}).optim == "cwd_muon"


def test_a_second_learning_rate_and_deepspeed_s_scheduler_contradict_each_other(arguments):
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}
    arguments(optim="cwd_muon", deepspeed={**config(), **scheduler})
    with pytest.raises(ValueError, match=r"adamw_lr=0.1' sets a second learning rate.*delete its \"scheduler\" line"):
        arguments(optim="cwd_muon", optim_args="adamw_lr=0.1", deepspeed={**config(), **scheduler})


def test_deepspeed_s_own_cpu_optimizer_cannot_be_asked_for(arguments):
    with pytest.raises(ValueError, match=r'"zero_force_ds_cpu_optimizer": true.*delete that line'):
        arguments(optim="cwd_adamw", deepspeed=config(zero_force_ds_cpu_optimizer=True))


@pytest.mark.parametrize("version", ["0.14.0", "99.0"])
def test_versions_that_were_not_tried_are_named_once(version, arguments, monkeypatch, caplog):
    monkeypatch.setattr(deepspeed_zero, "version", lambda: version)
    log.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_cwd"):
        for _ in range(2):
            arguments(optim="cwd_adamw", deepspeed=config())
    (said,) = [record.getMessage() for record in caplog.records if "DeepSpeed" in record.getMessage()]
    assert said == f"DeepSpeed {version} has not been tried with hf_cwd, whose tests run with {deepspeed_zero.TESTED}"


def test_the_version_here_is_a_tested_one(arguments, caplog):
    log.warn_once.cache_clear()
    arguments(optim="cwd_adamw", deepspeed=config())
    assert not [record for record in caplog.records if "has not been tried" in record.getMessage()]


def test_missing_tools_are_named_before_a_compilation_fails(arguments, monkeypatch, tmp_path):
    assert deepspeed.missing_tools() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"cwd_sgd: .*needs a C\+\+ compiler \(c\+\+\) and ninja.*apt install g\+\+"):
        arguments(optim="cwd_sgd", deepspeed=config())
    arguments(optim="cwd_sgd")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # there nothing is compiled
    arguments(optim="cwd_sgd", deepspeed=config())


class Twice(torch.optim.SGD):
    """Somebody else's."""


def test_another_optimizer_in_our_place_ends_the_run_before_its_first_step(arguments):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model,
        arguments(optim="cwd_muon"),
        train_dataset=tiny_data(),
        optimizers=(Twice(model.parameters(), lr=1.0), None),
    )
    with pytest.raises(
        RuntimeError, match=r"cwd_muon was asked for, and Twice is about to train.*leave one of them out"
    ):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_guard_lets_ours_and_others_pass(arguments):
    for optim, optimizer in (("cwd_adamw", CWDAdamW), ("adamw_torch", Twice), ("cwd_lion", None)):
        model = tiny_llama()
        chosen = None if optimizer is None else optimizer(model.parameters(), lr=1e-3)
        trainer = Trainer(
            model, arguments(optim=optim, max_steps=1), train_dataset=tiny_data(), optimizers=(chosen, None)
        )
        trainer.train()
