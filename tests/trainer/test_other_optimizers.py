"""Checkpoints of the Trainer's plain optimizers, of other rules, and of none: continued, refused or begun anew."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_cwd import log
from hf_cwd.checkpoint import manifest
from tests.support.tiny import tiny_data, tiny_llama

PLAIN = "cautious=false"


def run(arguments, optim, optim_args=None, resume=None, **options):
    args = arguments(optim=optim, optim_args=optim_args, max_steps=6, save_strategy="steps", save_steps=3, **options)
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=tiny_data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def checkpoint(arguments, tmp_path):
    """Where a run with an optimizer was after 3 steps, and how it ended."""

    def make(optim, optim_args=None, **options):
        trainer = run(arguments, optim, optim_args, **options)
        kept = tmp_path / f"{optim}-3"
        shutil.move(Path(trainer.args.output_dir, "checkpoint-3"), kept)
        return kept, trainer

    return make


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("adamw_torch", None), ("cwd_adamw", PLAIN)),
        (("adamw_torch_fused", None), ("cwd_adamw", PLAIN)),
        (("cwd_adamw", PLAIN), ("adamw_torch", None)),
        (("cwd_adamw", PLAIN), ("adamw_torch_fused", None)),
        (("sgd", "momentum=0.9"), ("cwd_sgd", f"{PLAIN},momentum=0.9")),
        (("cwd_sgd", f"{PLAIN},momentum=0.9"), ("sgd", "momentum=0.9")),
    ],
    ids=str,
)
def test_goes_on_as_if_nothing_had_happened(arguments, checkpoint, first, second):
    """Equal to the first one's uninterrupted run, to roundings; without a decay for SGD, where torch's is another."""
    decay = {"weight_decay": 0.0} if "sgd" in first[0] else {}
    kept, whole = checkpoint(*first, **decay)
    resumed = run(arguments, *second, resume=str(kept), **decay)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)
    afresh = run(arguments, *second, **decay)
    assert (weights(afresh) - weights(whole)).abs().max() < 1e-6, "the two are the same optimizer"
    key = "momentum_buffer" if "sgd" in first[0] else "exp_avg"
    ours, theirs = (
        torch.cat([t.optimizer.optimizer.state[p][key].flatten() for p in t.model.parameters()])
        for t in (resumed, whole)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_cautious_training_goes_on_from_a_plain_one(arguments, checkpoint):
    kept, whole = checkpoint("adamw_torch")
    resumed = run(arguments, "cwd_adamw", resume=str(kept))
    moved = (weights(resumed) - weights(whole)).abs()
    assert 0 < moved.max() < 3 * 1e-2 * 0.1 * weights(whole).abs().max(), "by the decay that was left out, not more"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("cwd_adamw", "cwd_muon", r"is of rule 'adamw', the optimizer's is 'muon' and 'adamw': .*on_rule_change=reset"),
        ("adamw_torch", "cwd_muon", r"has 2 parameter groups, this one 3 of rule 'muon' and 'adamw'"),
        ("adamw_torch", "cwd_lion", r"holds exp_avg_sq, but rule 'lion' keeps step, exp_avg"),
    ],
)
def test_another_rule_is_refused_unless_asked_for(arguments, checkpoint, caplog, first, second, words):
    kept, whole = checkpoint(first)
    with pytest.raises(ValueError, match=words):
        run(arguments, second, resume=str(kept))
    log.warn_once.cache_clear()
    resumed = run(arguments, second, "on_rule_change=reset", resume=str(kept))
    assert any("begins with new states at step 3, since the saved" in record.message for record in caplog.records)
    optimizer = resumed.optimizer.optimizer
    assert {int(optimizer.state[p]["step"]) for p in resumed.model.parameters()} == {3}
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "loss" in entry]
    assert rates == [entry["learning_rate"] for entry in whole.state.log_history if "loss" in entry], "the schedule"
    assert resumed.state.global_step == 6


def test_fewer_groups_go_on(arguments, checkpoint):
    """Though torch's schedule cannot be loaded for more groups than it was made for."""
    kept, whole = checkpoint("cwd_muon")
    resumed = run(arguments, "cwd_lion", "on_rule_change=reset", resume=str(kept))
    assert [len(trainer.lr_scheduler.base_lrs) for trainer in (whole, resumed)] == [3, 2]
    assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()[:2]
    assert "load_state_dict" not in resumed.lr_scheduler.state_dict()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_states(arguments, checkpoint, caplog, missing):
    """The Trainer would go on without a word. What a manifest says of it is tested elsewhere."""
    kept, _ = checkpoint("cwd_lion")
    (kept / missing).unlink()
    (kept / manifest.NAME).unlink()
    with pytest.raises(RuntimeError, match="resumed at step 3, and CWDLion got no state back"):
        run(arguments, "cwd_lion", resume=str(kept))
    log.warn_once.cache_clear()
    run(arguments, "cwd_lion", "on_rule_change=reset", resume=str(kept))
    assert any("since the checkpoint holds no optimizer state" in record.message for record in caplog.records)


def test_what_was_restored_is_said(arguments, checkpoint, caplog):
    caplog.set_level("INFO", "hf_cwd")
    kept, _ = checkpoint("cwd_adamw")
    run(arguments, "cwd_adamw", resume=str(kept))
    assert "resumed at step 3: 63 state tensors of 21 of 21 parameters restored" in [r.message for r in caplog.records]
