"""The real Trainer, unmodified, with every name."""

import copy
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES
from tests.support.tiny import tiny_data, tiny_llama


def train(args, model=None, resume=None, rows=64, **options):
    trainer = Trainer(model=model or tiny_llama(), args=args, train_dataset=tiny_data(rows), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class RecordingTrainer(Trainer):
    """Keeps the batches it trained on."""

    def training_step(self, model, inputs, *args):
        self.batches = [*getattr(self, "batches", []), {key: value.clone() for key, value in inputs.items()}]
        return super().training_step(model, inputs, *args)


def by_hand(args, model, batches):
    """The Trainer's loop written out, with the optimizer that the Trainer makes."""
    helper = Trainer(model=model, args=args)
    optimizer = helper.create_optimizer()
    scheduler = helper.create_scheduler(args.max_steps)
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def test_every_name_trains_as_a_loop_by_hand_does(arguments, algorithm):
    # A bf16 Newton-Schulz iteration turns a rounding difference of the gradient norm into 0.5 % of the update.
    exact = "ns_dtype=float32" if "ns_dtype" in RULES[algorithm].hyperparameters else None
    args = arguments(optim=f"cwd_{algorithm}", optim_args=exact)
    trainer = RecordingTrainer(model=tiny_llama(), args=args, train_dataset=tiny_data())
    trainer.train()
    assert len(trainer.batches) == args.max_steps
    expected = by_hand(args, tiny_llama(), trainer.batches)
    start = tiny_llama()
    assert isinstance(trainer.optimizer.optimizer, CWDOptimizer)
    for (name, p), q, x in zip(
        trainer.model.named_parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, msg=name)
        assert not torch.equal(p, x), name


def test_decay_is_cautious_under_the_trainer(arguments, algorithm):
    """The same run with cautious=false, and with no decay, ends elsewhere."""
    weights = []
    for change in ({}, {"optim_args": "cautious=false"}, {"weight_decay": 0.0}):
        trainer = train(arguments(optim=f"cwd_{algorithm}", learning_rate=0.1, **change))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    cautious, plain, none = weights
    assert not torch.equal(cautious, plain)
    assert not torch.equal(cautious, none)


def test_cautious_false_is_torch_s_adamw(arguments):
    ours = train(arguments(optim="cwd_adamw", optim_args="cautious=false"))
    theirs = train(arguments(optim="adamw_torch"))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("masters", [False, True])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(arguments, algorithm, tmp_path, masters):
    """Also those of a bfloat16 model with its masters, which are in the optimizer's state."""
    options, dtype = ("master=remainder", torch.bfloat16) if masters else (None, torch.float32)
    args = arguments(optim=f"cwd_{algorithm}", optim_args=options, max_steps=6, save_strategy="steps", save_steps=3)
    whole = train(args, model=tiny_llama().to(dtype))
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(Path(args.output_dir) / "checkpoint-3", checkpoint)
    saved_args = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert saved_args.optim == f"cwd_{algorithm}"
    resumed = train(copy.deepcopy(saved_args), model=tiny_llama(seed=99).to(dtype), resume=str(checkpoint))
    assert resumed.state.global_step == 6
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    states = [t.optimizer.optimizer.state_dict()["state"] for t in (whole, resumed)]
    for index, state in states[0].items():
        assert ("remainder" in state) == masters
        for key, value in state.items():
            bits = torch.int16 if key == "remainder" else value.dtype  # which can be those of a NaN
            assert torch.equal(value.view(bits), states[1][index][key].view(bits)), key


def test_masters_need_a_bfloat16_model(arguments):
    args = arguments(optim="cwd_adamw", optim_args="master=remainder", bf16=True)
    with pytest.raises(
        ValueError, match=r"the optimizer.s are float32. Autocast, and mixed precision.*leave master out"
    ):
        train(args)


def test_the_logged_learning_rate_is_muon_s(arguments):
    args = arguments(optim="cwd_muon", optim_args="adamw_lr=1e-5", lr_scheduler_type="constant", logging_steps=1)
    logs = [log["learning_rate"] for log in train(args).state.log_history if "learning_rate" in log]
    assert logs == [1e-2] * 4


def test_one_start_up_line_says_what_runs(arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    Trainer(model=tiny_llama(), args=arguments(optim="cwd_muon", optim_args="nesterov=false")).create_optimizer()
    (record,) = [record for record in caplog.records if record.name == "hf_cwd"]
    for words in (
        "cwd_muon",
        "lr=0.01",
        "weight_decay=0.1",
        "nesterov=False",
        "adamw_lr=0.01",
        "mask=ge",
        "14 tensors",
    ):
        assert words in record.message


@pytest.mark.parametrize("bf16", [False, True])
def test_mixed_precision_accumulation_and_checkpointing(arguments, bf16):
    args = arguments(
        optim="cwd_muon",
        bf16=bf16,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,  # the name that every transformers 5 knows
        max_steps=5,
        logging_steps=1,
    )
    trainer = train(args, rows=8)  # every step sees the same 8 rows
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
