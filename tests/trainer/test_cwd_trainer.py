"""CWDTrainer: the plain Trainer's training while all is well, its own optimizers only, and gradients not finite."""

import logging
import math

import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_cwd import CWDLion, CWDMuon, CWDTrainer, CWDTrainerMixin, CWDTrainingArguments, log
from hf_cwd.rules import RULES
from hf_cwd.trainer import gradient_guard
from tests.support.tiny import tiny_data, tiny_llama
from tests.trainer.bad_batches import BATCH, InOrder, rows


@pytest.fixture
def options(tmp_path):
    log.warn_once.cache_clear()
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def trained(options, data, model=None, kind=InOrder, **changes):
    trainer = kind(model=model or tiny_llama(), args=CWDTrainingArguments(**(options | changes)), train_dataset=data)
    trainer.train()
    return trainer


def assert_same(one, other):
    """Bit for bit: weights, states and step counts."""
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        states = [t.optimizer.optimizer.state[x] for t, x in ((one, p), (other, q))]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])), (name, key)


@pytest.mark.parametrize(
    ("max_grad_norm", "not_finite"), [(0.05, "stop"), (0.05, "skip"), (0.05, "ignore"), (0.0, "stop"), (0.0, "skip")]
)
def test_all_is_well(options, max_grad_norm, not_finite):
    changes = {"optim": "cwd_muon", "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": 2}
    data = tiny_data(64)
    ours = trained(options, data, kind=CWDTrainer, cwd_not_finite=not_finite, **changes)
    plain = Trainer(model=tiny_llama(), args=TrainingArguments(**(options | changes)), train_dataset=data)
    plain.train()
    assert_same(ours, plain)
    logs = [
        [{key: entry[key] for key in ("loss", "grad_norm")} for entry in t.state.log_history if "loss" in entry]
        for t in (ours, plain)
    ]
    assert logs[0] == logs[1]


def test_a_step_that_is_not_finite_stops_the_run_before_it_is_made(options, algorithm):
    """The error names the parameter that it came from, and clipping has not spread it to the others."""
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    seen = []

    def broken(gradient):
        seen.append(None)
        return gradient * math.nan if len(seen) == 3 else gradient

    weight.register_hook(broken)
    args = CWDTrainingArguments(**(options | {"optim": f"cwd_{algorithm}", "save_strategy": "steps", "save_steps": 2}))
    trainer = InOrder(model=model, args=args, train_dataset=rows())
    message = (
        r"^step 3: the gradient norm is nan\. Not finite: gradients of model\.layers\.1\.mlp\.up_proj\.weight\. The "
        r"step has not been made; cwd_not_finite='skip' skips such steps, 'ignore' makes them\. Look at the "
        r"step's batch, lower --learning_rate or warm up longer, and resume from .*checkpoint-2$"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 2
    assert_same(trainer, trained(options, rows(), optim=f"cwd_{algorithm}", max_steps=2))


def test_the_loss_is_said_too(options):
    with pytest.raises(
        RuntimeError, match=r"step 2: the gradient norm is nan, this rank's loss nan\. .* and 18 more of 21"
    ):
        trained(options, rows(bad=[1]))


def test_weights_that_are_broken_already_are_named(options):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.inf
    with pytest.raises(RuntimeError, match=r"step 1: .*; weights of lm_head\.weight\. .*the last good checkpoint$"):
        trained(options, rows(), model)


def test_a_state_that_is_broken_is_named(options):
    """One that makes a weight NaN in a step whose gradients are finite: found in the next one."""
    args = CWDTrainingArguments(**(options | {"logging_strategy": "no"}))
    trainer = InOrder(model=tiny_llama(), args=args, train_dataset=rows())
    weight = trainer.model.lm_head.weight
    trainer.create_optimizer().state[weight] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full_like(weight, math.nan),
        "exp_avg_sq": torch.ones_like(weight),
    }
    named = r"weights of lm_head\.weight; optimizer states of lm_head\.weight\."
    with pytest.raises(RuntimeError, match=rf"step 2: the gradient norm is nan, .* {named}"):
        trainer.train()


@pytest.mark.parametrize(
    ("optim", "changes"),
    [
        *((f"cwd_{rule}", {}) for rule in RULES),
        ("cwd_adamw", {"max_grad_norm": 0.0}),
        ("cwd_muon", {"gradient_accumulation_steps": 2}),
    ],
)
def test_a_skipped_step_leaves_everything_as_without_its_batch(options, optim, changes, caplog):
    accumulated = changes.get("gradient_accumulation_steps", 1)
    data = rows(4 * accumulated, bad=[accumulated])
    trainer = trained(options, data, optim=optim, cwd_not_finite="skip", **changes)
    assert trainer.state.global_step == 4
    rest = data[: BATCH * accumulated] + data[2 * BATCH * accumulated :]
    assert_same(trainer, trained(options, rest, optim=optim, max_steps=3, **changes))
    logged = [entry.get("cwd/skipped_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [None, 1, 1, 1]
    (warning,) = [r.message for r in caplog.records if r.name == "hf_cwd" and r.levelno == logging.WARNING]
    assert warning.startswith("step 2: the gradient norm is nan, this rank's loss nan. Not finite: gradients of ")
    assert warning.endswith("The step is skipped: 1 in this run so far")


def test_too_many_skipped_in_a_row(options):
    last = gradient_guard.MOST + 1  # batch 1 is skipped, batch 2 is good, and then all are bad
    data = rows(last + 4, bad=[0, *range(2, last + 4)])
    trainer = InOrder(
        model=tiny_llama(),
        train_dataset=data,
        args=CWDTrainingArguments(**{**options, "max_steps": last + 4, "cwd_not_finite": "skip"}),
    )
    with pytest.raises(RuntimeError, match=f"step {last + 1}: .*It would be the 20th skipped step in a row"):
        trainer.train()
    assert trainer._cwd_guard.skipped == gradient_guard.MOST
    assert_same(trainer, trained(options, data[BATCH : 2 * BATCH], max_steps=1))


def test_steps_cannot_be_skipped_where_nobody_computes_a_norm(options, monkeypatch):
    """As in transformers 5.2, without clipping."""
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    args = CWDTrainingArguments(**{**options, "max_grad_norm": 0.0, "cwd_not_finite": "skip"})
    with pytest.raises(ValueError, match=r"needs the gradient norm, and with max_grad_norm=0.0 .* 1e9 to clip"):
        CWDTrainer(model=tiny_llama(), args=args)
    args.max_grad_norm = 1e9
    CWDTrainer(model=tiny_llama(), args=args)


def test_ignored_it_is_as_with_the_plain_trainer(options):
    trainer = trained(options, rows(bad=[1]), cwd_not_finite="ignore")
    assert all(p.isnan().all() for p in trainer.model.parameters())
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry), "it hides it"


def test_a_loss_without_labels_harms_nothing_and_is_said(options, caplog):
    class NoLabels(InOrder):
        def compute_loss(self, model, inputs, **kwargs):
            bad = inputs["bad"].any()
            inputs["bad"] = torch.zeros(())
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss + math.nan if bad else loss

    trainer = trained(options, rows(bad=[1, 2]), kind=NoLabels)
    assert_same(trainer, trained(options, rows()))
    (warning,) = {r.message for r in caplog.records if r.name == "hf_cwd" and "labels" in r.message}
    assert warning.startswith("step 2: the loss is nan, but the gradients are finite: the step is made.")


@pytest.mark.parametrize("not_finite", ["stop", "skip"])
def test_a_loss_scaler_s_own_steps_are_none_of_ours(options, not_finite, monkeypatch):
    """It begins with a scale that makes every gradient infinite, and finds a smaller one."""
    args = CWDTrainingArguments(**(options | {"cwd_not_finite": not_finite}))
    trainer = InOrder(model=tiny_llama(), args=args, train_dataset=rows())
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**7
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [math.isfinite(norm) for norm in norms] == [False, False, True, True]
    assert trainer._cwd_guard.skipped == 0


def test_under_a_loss_scaler_the_loss_decides(options, monkeypatch):
    trainer = InOrder(model=tiny_llama(), args=CWDTrainingArguments(**options), train_dataset=rows(bad=[1]))
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(RuntimeError, match=r"^step 2: the loss is nan\. Not finite: gradients of "):
        trainer.train()


@pytest.mark.parametrize(
    ("optim", "made", "message"),
    [
        (
            "adamw_torch",
            None,
            "CWDTrainer trains with an optimizer of hf_cwd, and optim is 'adamw_torch': give CWDTrain",
        ),
        ("cwd_adamw", torch.optim.AdamW, r"was given AdamW by optimizers=: give a CWDAdamW"),
        ("adamw_torch", torch.optim.Muon, r"was given Muon by optimizers=: give a CWDAdamW"),
    ],
)
def test_other_optimizers_are_refused(options, optim, made, message):
    model = tiny_llama()
    optimizer = None if made is None else made([model.model.layers[0].mlp.up_proj.weight])
    with pytest.raises(ValueError, match=message):
        CWDTrainer(model, TrainingArguments(**(options | {"optim": optim})), optimizers=(optimizer, None))
    if optimizer is not None:
        with pytest.raises(ValueError, match=rf"was given {made.__name__} by optimizer_cls_and_kwargs="):
            CWDTrainer(model=model, args=TrainingArguments(**options), optimizer_cls_and_kwargs=(made, {"lr": 1.0}))


def test_no_arguments_name_no_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="and optim is 'adamw_torch_fused': give CWDTrainingArguments"):
        CWDTrainer(tiny_llama())


@pytest.mark.parametrize("optim", ["adamw_torch", "cwd_lion"])
def test_an_optimizer_of_ours_is_taken_as_it_is(options, optim):
    model = tiny_llama()
    optimizer = CWDLion(model.parameters(), lr=1e-3)
    args = TrainingArguments(**(options | {"optim": optim}))
    trainer = CWDTrainer(model=model, args=args, train_dataset=tiny_data(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    trainer = CWDTrainer(
        model=tiny_llama(), args=args, train_dataset=tiny_data(), optimizer_cls_and_kwargs=(CWDLion, {"lr": 1e-3})
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is CWDLion


def test_an_optimizer_of_ours_beside_the_name_of_another(options):
    model = tiny_llama()
    with pytest.raises(ValueError, match="CWDLion by optimizers=, and optim is 'cwd_adamw': give optim='cwd_lion'"):
        CWDTrainer(model, CWDTrainingArguments(**options), optimizers=(CWDLion(model.parameters()), None))


def test_seq2seq_with_unmodified_arguments(options):
    class MyTrainer(CWDTrainerMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    args = Seq2SeqTrainingArguments(**(options | {"optim": "cwd_muon", "predict_with_generate": True, "max_steps": 2}))
    trainer = MyTrainer(
        model=T5ForConditionalGeneration(config), args=args, train_dataset=tiny_data(16), eval_dataset=tiny_data(4)
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is CWDMuon
    assert math.isfinite(trainer.evaluate(max_length=4)["eval_loss"])
