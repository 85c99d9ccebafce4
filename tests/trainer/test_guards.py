"""What trains nothing, or something else, under an unmodified Trainer ends or warns; ordinary runs hear nothing."""

import pytest
import torch
from transformers import Trainer

from hf_cwd import CWDAdamW, CWDLion, log
from hf_cwd.trainer.callbacks import optimizer_guard
from hf_cwd.trainer.callbacks.optimizer_guard import OptimizerGuard
from hf_cwd.trainer.wrappers import innermost
from tests.support.tiny import tiny_llama
from tests.trainer.guarding import At, HeldTrainer, make, warned, weights


@pytest.fixture(autouse=True)
def fresh_warnings():
    log.warn_once.cache_clear()


@pytest.mark.parametrize("optim", ["cwd_adamw", "cwd_muon"])
def test_an_ordinary_run_hears_nothing_and_is_left_without_a_hook(optim, arguments, caplog):
    hooks = []
    trainer = make(arguments(optim=optim, max_steps=optimizer_guard.UNSTEPPED + 2, gradient_accumulation_steps=2))
    trainer.add_callback(At(lambda: hooks.append(len(innermost(trainer.optimizer)._optimizer_step_post_hooks))))
    trainer.train()
    assert hooks == [1] * (optimizer_guard.UNSTEPPED + 2)
    assert not innermost(trainer.optimizer)._optimizer_step_post_hooks
    trainer.train()  # again, with the same optimizer
    assert trainer.state.global_step == optimizer_guard.UNSTEPPED + 2
    assert warned(caplog) == []


def test_other_optimizers_are_left_alone(arguments, caplog):
    """Even where everything that the guards look for is the case."""
    hooks = []
    model = tiny_llama()
    stale = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "caution": True}], lr=0.0)
    args = arguments(optim="adamw_torch", weight_decay=0.0, learning_rate=0.0, max_steps=optimizer_guard.UNSTEPPED + 2)
    trainer = make(args, HeldTrainer, model, optimizers=(stale, None))
    trainer.add_callback(At(lambda: hooks.append(len(innermost(trainer.optimizer)._optimizer_step_post_hooks))))
    trainer.train()
    assert set(hooks) == {0}
    assert trainer.pop_callback(OptimizerGuard)._optimizer is None
    assert warned(caplog) == []


def test_auto_find_batch_size_trips_nothing(arguments, caplog):
    class Small(torch.nn.Module):
        """A Llama on a device that has room for batches of 2, and at first for one larger."""

        def __init__(self):
            super().__init__()
            self.llama, self.config, self.sizes = tiny_llama(), None, []

        def forward(self, input_ids, labels):
            self.sizes.append(len(input_ids))
            if len(input_ids) > 2 and len(self.sizes) > 1:
                raise RuntimeError("CUDA out of memory.")
            return self.llama(input_ids=input_ids, labels=labels)

    model = Small()
    start = weights(model).clone()
    trainer = make(arguments(optim="cwd_adamw", auto_find_batch_size=True), model=model)
    trainer.train()
    assert model.sizes[:2] == [4, 4]
    assert model.sizes[-4:] == [2, 2, 2, 2]
    optimizer = innermost(trainer.optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert optimizer.state[model.llama.lm_head.weight]["step"] == 5, "one before the memory ran out"
    assert not torch.equal(weights(model), start)
    assert not optimizer._optimizer_step_post_hooks
    assert warned(caplog) == []


# --- another optimizer


def test_an_optimizer_beside_the_name(arguments):
    model = tiny_llama()
    trainer = make(arguments(optim="cwd_muon"), model=model, optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(RuntimeError, match=r"--optim cwd_muon was asked for, and SGD is about to train.*optimizers="):
        trainer.train()
    model = tiny_llama()
    ours = CWDAdamW(model.parameters(), lr=1e-2)
    make(arguments(optim="cwd_adamw"), model=model, optimizers=(ours, None)).train()
    assert ours.state[model.lm_head.weight]["step"] == 4


def test_a_name_that_changed_after_the_optimizer_was_made(arguments):
    args = arguments(optim="cwd_adamw")
    trainer = make(args)
    args.optim = "cwd_lion"  # in time
    trainer.train()
    assert isinstance(innermost(trainer.optimizer), CWDLion)
    args.optim = "cwd_adamw"
    with pytest.raises(RuntimeError, match=r"cwd_adamw was asked for, and CWDLion with rule 'lion' is about to"):
        trainer.train()
    trainer.optimizer = None  # as it says
    trainer.train()
    assert isinstance(innermost(trainer.optimizer), CWDAdamW)


class MaskedUpdate(torch.optim.SGD):
    """An optimizer with a group key as timm and lion-pytorch have it, which also wraps others."""

    def __init__(self, params, optimizer=None, **keys):
        super().__init__([{"params": list(params), **keys}], lr=1e-2)
        if optimizer is not None:
            self.optimizer = optimizer


@pytest.mark.parametrize("keys", [{"caution": True}, {"cautious_factor": 0.0}])
def test_the_mask_of_other_packages_is_told_apart(keys, arguments):
    (key,) = keys
    model, args = tiny_llama(), arguments(optim="cwd_lion")
    trainer = make(args, model=model, optimizers=(MaskedUpdate(model.parameters(), **keys), None))
    with pytest.raises(
        RuntimeError, match=rf"MaskedUpdate is about.*Its {key}=.* \(arXiv 2411.16085\), which mask the"
    ):
        trainer.train()
    around = MaskedUpdate(model.parameters(), CWDLion(model.parameters()), **keys)
    with pytest.raises(RuntimeError, match=f"CWDLion is inside MaskedUpdate, whose {key}=.*train with one of the two"):
        make(args, model=model, optimizers=(around, None)).train()
    groups = CWDLion([{"params": list(model.parameters()), **keys}])
    with pytest.raises(ValueError, match=f"a parameter group of CWDLion has {key}=.*take the key out of the group"):
        make(args, model=model, optimizers=(groups, None)).train()


def test_those_keys_may_ask_for_nothing(arguments, caplog):
    model = tiny_llama()
    ours = CWDLion([{"params": list(model.parameters()), "caution": False, "cautious_factor": 1.0}])
    make(arguments(optim="cwd_lion"), model=model, optimizers=(ours, None)).train()
    assert warned(caplog) == []


# --- wrapped, replaced or held


class TwiceTrainer(Trainer):
    scaler = None

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.accelerator.scaler = self.scaler
        return self.optimizer


def test_wrapped_twice(arguments, caplog):
    args = arguments(optim="cwd_adamw")
    once, twice = make(args), make(args, TwiceTrainer)
    once.train()
    assert warned(caplog) == []
    twice.train()
    (warning,) = warned(caplog)
    assert "CWDAdamW is wrapped 2 times by Accelerate" in warning
    assert "does no harm" in warning
    assert torch.equal(weights(once.model), weights(twice.model)), "no harm"
    scaled = make(args, TwiceTrainer)
    scaled.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"wrapped 2 times.*gradients would be unscaled twice"):
        scaled.train()


def test_replaced_inside_its_wrapper(arguments):
    trainer = make(arguments(optim="cwd_adamw"))

    def replace():
        matrices, vectors = ([p for p in trainer.model.parameters() if p.ndim == n] for n in (2, 1))
        trainer.optimizer.optimizer = CWDAdamW([{"params": matrices}, {"params": vectors}])

    trainer.add_callback(At(replace, step=2))
    with pytest.raises(RuntimeError, match="CWDAdamW began this run, and at step 3 another CWDAdamW is in its place"):
        trainer.train()


def test_replaced_during_training(arguments):
    trainer = make(arguments(optim="cwd_adamw", max_steps=20))

    def replace():
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters())

    trainer.add_callback(At(replace, step=2))
    with pytest.raises(RuntimeError, match=r"10 training steps in a row.*trainer.optimizer was replaced"):
        trainer.train()
    assert trainer.state.global_step == 12


def test_steps_that_are_swallowed(arguments):
    trainer = make(arguments(optim="cwd_lion", max_steps=3), HeldTrainer)
    with pytest.raises(RuntimeError, match=r"3 training steps in a row called no step\(\) of CWDLion.*a wrapper"):
        trainer.train()
    assert not innermost(trainer.optimizer)._optimizer_step_post_hooks


def test_swallowed_steps_end_a_run_before_its_end(arguments):
    trainer = make(arguments(optim="cwd_lion", max_steps=optimizer_guard.UNSTEPPED + 2), HeldTrainer)
    with pytest.raises(RuntimeError, match=rf"{optimizer_guard.UNSTEPPED} training steps in a row called no step"):
        trainer.train()


def test_steps_may_be_swallowed_now_and_then(arguments, caplog):
    trainer = make(arguments(optim="cwd_lion", max_steps=2 * optimizer_guard.UNSTEPPED + 1), HeldTrainer)
    trainer.every = optimizer_guard.UNSTEPPED
    trainer.train()
    assert warned(caplog) == []


def test_a_loss_scaler_may_skip_steps(arguments, caplog, monkeypatch):
    monkeypatch.setattr(optimizer_guard, "SKIPPED", optimizer_guard.UNSTEPPED + 2)
    trainer = make(arguments(optim="cwd_adamw", max_steps=optimizer_guard.UNSTEPPED + 1))
    # So large a scale that every gradient is inf, and that stays so.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=0.9999)
    start = weights(trainer.model).clone()
    trainer.train()
    assert torch.equal(weights(trainer.model), start)
    assert warned(caplog) == []
    trainer = make(arguments(optim="cwd_adamw", max_steps=optimizer_guard.SKIPPED))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=0.9999)
    trainer.train()
    (warning,) = warned(caplog)
    assert "the loss scaler has skipped 12 steps in a row" in warning
