"""cwd_run.json: what trained, under any Trainer, without secrets, whole or not at all."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import hf_cwd
from hf_cwd import CWDLion, CWDTrainer, log
from hf_cwd.report.read import RECORD, read
from hf_cwd.trainer.callbacks import run_record
from tests.support.tiny import tiny_data, tiny_llama


def train(args):
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=tiny_data())
    trainer.train()
    return trainer


def test_the_report_reads_the_same_file():
    assert run_record.FILE == RECORD


def test_what_trained_is_written(arguments):
    args = arguments(
        optim="cwd_muon", optim_args="mask=gt,adamw_lr=1e-3,ns_steps=3", hub_token="hf_secret", warmup_steps=1
    )
    trainer = train(args)
    trainer.save_state()
    text = (Path(args.output_dir) / RECORD).read_text()
    assert "hf_secret" not in text
    found = json.loads(text)
    given = {key: value for key, value in args.to_dict().items() if value is not None and key != "hub_token"}
    nested = given.pop("accelerator_config"), found["arguments"].pop("accelerator_config")
    assert nested[1] == {key: value for key, value in nested[0].items() if value is not None}
    assert found["arguments"] == given
    assert found["optimizer"] == {
        "optimizer_class": "CWDMuon",
        "momentum": 0.95,
        "nesterov": True,
        "ns_steps": 3,
        "ns_coefficients": "quintic",
        "ns": "auto",
        "ns_dtype": "auto",
        "eps": 1e-7,
        "adjust_lr_fn": "match_rms_adamw",
        "cautious": True,
        "mask": "gt",
        "kernel": "auto",
        "state_dtype": "auto",
        "master": "none",
        "share": "auto",
        "exchange_bytes": 1 << 28,
        "adamw_lr": 1e-3,
        "adamw_betas": [0.9, 0.999],
        "adamw_eps": 1e-8,
    }
    count = sum(p.numel() for p in trainer.model.parameters())
    assert found["model"] == {"model_class": "LlamaForCausalLM", "num_parameters": count, "num_trainable": count}
    assert found["world_size"] == 1
    assert found["versions"].keys() >= {"hf_cwd", "python", "torch", "transformers", "accelerate"}
    assert "deepspeed" not in found["versions"], "it is installed, and was not used"
    assert (found["versions"]["hf_cwd"], found["versions"]["torch"]) == (hf_cwd.__version__, torch.__version__)
    assert not list(Path(args.output_dir).glob(".*")), "what it was written to first is gone"
    (run,) = read([args.output_dir])
    assert run.recorded
    assert {
        key: run.settings.values[key] for key in ("optim", "weight_decay", "mask", "num_trainable", "adamw_betas")
    } == {
        "optim": "cwd_muon",
        "weight_decay": 0.1,
        "mask": "gt",
        "num_trainable": count,
        "adamw_betas": "[0.9, 0.999]",
    }


def test_two_seeds_are_one_setting_and_another_mask_is_none(arguments, tmp_path):
    for name, options in (("a", {}), ("b", {"seed": 3}), ("c", {"optim_args": "mask=gt"})):
        train(arguments(optim="cwd_lion", output_dir=str(tmp_path / name), max_steps=1, **options)).save_state()
    one, other, third = read([tmp_path / name for name in "abc"])
    assert one.identity == other.identity != third.identity
    assert (one.seed, other.seed) == (42, 3)


def test_the_optimizer_s_own_groups_count(arguments):
    """Not what the arguments ask for: a given optimizer's, with its schedule's first learning rate."""
    model = tiny_llama()
    groups = [
        {"params": [model.lm_head.weight], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p is not model.lm_head.weight], "weight_decay": 0.0, "lr": 1e-3},
    ]
    optimizer = CWDLion(groups, lr=1e-4, mask="gt")
    args = arguments(optim="adamw_torch", weight_decay=0.0)
    trainer = CWDTrainer(model=model, args=args, train_dataset=tiny_data(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0
    assert run_record.optimizer_settings(args, trainer.optimizer) == {
        "lr": [1e-4, 1e-3],
        "weight_decay": 0.3,
        "betas": (0.9, 0.95),
        "cautious": True,
        "mask": "gt",
        "kernel": "auto",
        "state_dtype": "auto",
        "master": "none",
    }


@pytest.mark.parametrize("optim", ["adamw_torch", "cwd_adamw"])
def test_only_of_this_package_s_optimizers(arguments, optim):
    args = arguments(optim=optim, max_steps=1)
    train(args)
    assert (Path(args.output_dir) / RECORD).exists() == optim.startswith("cwd_")


def test_nested_secrets_and_values_that_json_lacks(arguments):
    args = arguments(optim="cwd_sgd", lr_scheduler_kwargs={"token": "x1", "api_key": "x2", "fine": {torch.float32}})
    given = run_record.contents(args, None, None)["arguments"]["lr_scheduler_kwargs"]
    assert given == {"fine": "{torch.float32}"}


def test_a_place_that_cannot_be_written_ends_no_training(arguments, tmp_path, caplog):
    log.warn_once.cache_clear()
    args = arguments(optim="cwd_lion", max_steps=1)
    (tmp_path / "out" / RECORD).mkdir(parents=True)  # in the file's place
    for _ in range(2):
        assert train(args).state.global_step == 1
    warnings = [r.message for r in caplog.records if r.name == "hf_cwd" and r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].endswith("cannot be written (Is a directory): hf-cwd report will not know this run's settings")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORD]
