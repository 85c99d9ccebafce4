"""cwd/* in the logs of the plain Trainer."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from hf_cwd import CWDAdamW
from hf_cwd.rules import RULES
from hf_cwd.trainer.callbacks.diagnostics import KEYS, DiagnosticsCallback
from tests.support.tiny import tiny_data, tiny_llama

SUMMARY = {f"cwd/{key}" for key in KEYS}
ERROR = "cwd/orthogonality_error"


def train(args, rows=64, model=None, data=None, **options):
    data = tiny_data(rows) if data is None else data
    trainer = Trainer(model=model or tiny_llama(), args=args, train_dataset=data, **options)
    trainer.train()
    return trainer


def logged(trainer):
    return {
        entry["step"]: {key: value for key, value in entry.items() if key.startswith("cwd/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    }


def innermost(trainer):
    return trainer.optimizer.optimizer


class Recorder(TrainerCallback):
    """A reporting integration: keeps what it is given when it is given it."""

    logs: ClassVar[list[dict[str, Any]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "logs", [])
    return Recorder


class Optimizers(TrainerCallback):
    """On which steps the optimizer collects."""

    def __init__(self):
        self.collected = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if optimizer.optimizer.statistics is not None:
            self.collected.append(state.global_step + 1)


def test_unasked_and_for_integrations_and_the_file_alike(arguments, algorithm, recorder):
    watch = Optimizers()
    args = arguments(optim=f"cwd_{algorithm}", logging_first_step=True, max_steps=5, report_to=["recorder"])
    trainer = train(args, callbacks=[watch])
    found = logged(trainer)
    assert found.keys() == {1, 2, 4}
    assert watch.collected == [1, 2, 4]
    assert innermost(trainer).statistics is None
    keys = SUMMARY | ({ERROR} if RULES[algorithm].matrix else set())
    for entry in found.values():
        assert entry.keys() == keys
        assert len(entry) <= 6
        assert 0.3 < entry["cwd/decayed_fraction"] < 0.7
    reported = [{k: v for k, v in logs.items() if k.startswith("cwd/")} for logs in recorder.logs if "loss" in logs]
    assert reported == list(found.values())
    assert not any(key.startswith("cwd/") for logs in recorder.logs if "loss" not in logs for key in logs)
    trainer.save_state()
    saved = json.loads(Path(args.output_dir, "trainer_state.json").read_text())["log_history"]
    assert [{k: v for k, v in e.items() if k in keys} for e in saved if "loss" in e] == list(found.values())


def test_inert_with_another_optimizer(arguments):
    assert set().union(*logged(train(arguments(optim="adamw_torch"))).values()) == set()


def test_plain_decay_takes_all_of_it(arguments, algorithm):
    args = arguments(optim=f"cwd_{algorithm}", optim_args="cautious=false", lr_scheduler_type="constant")
    for entry in logged(train(args)).values():
        assert entry["cwd/decayed_fraction"] == 1.0
        assert entry["cwd/effective_decay"] == pytest.approx(1e-2 * 0.1)


def test_without_a_decay(arguments):
    (entry, _) = logged(train(arguments(optim="cwd_adamw", weight_decay=0.0))).values()
    assert entry.keys() == SUMMARY - {"cwd/decayed_fraction", "cwd/effective_decay"}


def test_groups(arguments):
    trainer = train(arguments(optim="cwd_muon", optim_args="cwd_log=groups"))
    rules = [group["algorithm"] for group in innermost(trainer).param_groups]
    assert rules == ["muon", "adamw", "adamw"]
    decays = [group["weight_decay"] for group in innermost(trainer).param_groups]
    for entry in logged(trainer).values():
        decayed = {key.removesuffix("/decayed_fraction") for key in entry if key.endswith("/decayed_fraction")}
        others = {key.removesuffix("/weight_rms") for key in entry if key.endswith("/weight_rms")}
        assert others == {"cwd", "cwd/muon", "cwd/adamw", "cwd/group_0", "cwd/group_1", "cwd/group_2"}
        assert others - decayed == {f"cwd/group_{i}" for i, decay in enumerate(decays) if not decay}
        for key in KEYS:
            assert entry[f"cwd/muon/{key}"] == entry[f"cwd/group_0/{key}"]
        assert entry["cwd/group_2/weight_rms"] == pytest.approx(1, abs=0.1)  # norms
        assert entry["cwd/adamw/update_rms"] != entry["cwd/group_1/update_rms"]


def test_off(arguments):
    watch = Optimizers()
    trainer = train(arguments(optim="cwd_adamw", optim_args="cwd_log=off"), callbacks=[watch])
    assert watch.collected == []
    assert set().union(*logged(trainer).values()) == set()


def test_a_wrong_value(arguments):
    with pytest.raises(ValueError, match=r"cwd_log=.*everything.*summary, groups, off"):
        arguments(optim="cwd_adamw", optim_args="cwd_log=everything")


def test_an_optimizer_that_was_given(arguments):
    model = tiny_llama()
    optimizer = CWDAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    trainer = train(arguments(optim="adamw_torch"), model=model, optimizers=(optimizer, None))
    assert all(entry.keys() == SUMMARY for entry in logged(trainer).values())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logs_by_epoch(arguments, accumulation):
    """The last step of each epoch, also where batches are left over."""
    watch = Optimizers()
    args = arguments(
        optim="cwd_adamw",
        logging_strategy="epoch",
        num_train_epochs=2,
        max_steps=-1,
        gradient_accumulation_steps=accumulation,
    )
    trainer = train(args, rows=30, callbacks=[watch])  # 8 batches
    steps = {1: [8, 16], 3: [3, 6]}[accumulation]
    assert watch.collected == list(logged(trainer)) == steps
    assert all(entry.keys() == SUMMARY for entry in logged(trainer).values())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny_data(64))


def test_a_stream_by_epoch_has_the_last_measured_step(arguments):
    args = arguments(optim="cwd_adamw", logging_strategy="epoch", max_steps=5, logging_steps=2)
    found = logged(train(args, data=Stream()))
    assert found.keys() == {5}
    assert found[5].keys() == SUMMARY | {"cwd/step"}
    assert found[5]["cwd/step"] == 4


class Forced(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or state.global_step == 3


def test_a_log_that_nobody_foresaw(arguments):
    found = logged(train(arguments(optim="cwd_adamw"), callbacks=[Forced()]))
    assert found[3] == found[2] | {"cwd/step": 2}
    assert "cwd/step" not in found[4]


def test_a_second_training_begins_anew(arguments):
    trainer = train(arguments(optim="cwd_adamw"))
    trainer.args.logging_steps, trainer.args.max_steps = 100, 3
    trainer.callback_handler.add_callback(Forced())
    trainer.state.log_history.clear()
    trainer.train()
    assert logged(trainer) == {3: {}}, "no number of the training before"


class Breaks(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")


def test_what_is_not_finite_ends_the_run(arguments, algorithm):
    """Also in Lion's momentum, of which neither update nor weights say anything."""
    args = arguments(optim=f"cwd_{algorithm}", max_grad_norm=0.0)  # clipping would spread it
    with pytest.raises(RuntimeError, match=r"step 2: .* of model.layers.1.mlp.up_proj.weight are not finite"):
        train(args, callbacks=[Breaks()])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"logging_nan_inf_filter": False},
            "step 2: weights, updates or optimizer states of model.layers.1",
        ),
        (
            {"optim_args": "cwd_log=off"},
            "step 3: the log has grad_norm nan. Weights and states that it has reached stay",
        ),
    ],
    ids=str,
)
def test_who_asks_for_such_numbers_or_none_of_ours_is_warned_once(arguments, caplog, options, said):
    args = arguments(optim="cwd_adamw", logging_steps=1, max_steps=5, **options)
    for _ in range(2):  # each run
        caplog.clear()
        trainer = train(args, callbacks=[Breaks()])
        assert trainer.state.global_step == 5
        (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING" and r.name == "hf_cwd"]
        assert warning.startswith(said)
        assert warning.endswith("gradient clipping (--max_grad_norm)")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert any(map(math.isnan, losses)) == ("logging_nan_inf_filter" in options), "the Trainer's filter hides it"


def test_an_ordinary_run_without_our_logs_is_not_warned(arguments, caplog):
    train(arguments(optim="cwd_adamw", logging_steps=1, optim_args="cwd_log=off"))
    assert [r for r in caplog.records if r.levelname == "WARNING" and r.name == "hf_cwd"] == []


def test_a_step_that_was_left_out_has_no_numbers(arguments):
    """As by a loss scaler."""
    callback, optimizer = DiagnosticsCallback(), CWDAdamW([torch.nn.Parameter(torch.ones(2))])
    state, args = TrainerState(log_history=[{"loss": 1.0}], logging_steps=1), arguments(optim="cwd_adamw")
    given = {"optimizer": optimizer, "train_dataloader": [1, 2, 3]}
    callback.on_step_begin(args, state, TrainerControl(), **given)
    assert optimizer.statistics is not None
    callback.on_step_end(args, state, TrainerControl(), **given)
    assert optimizer.statistics is None
    callback.on_log(args, state, TrainerControl(), logs=(logs := {"loss": 1.0}))
    assert logs == {"loss": 1.0}
