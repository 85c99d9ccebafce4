"""Hyperparameter search makes model and optimizer anew for each trial: the guards must see to that, and not trip."""

import gc
import weakref

import optuna
import pytest
import torch
from optuna.samplers import GridSampler
from transformers import Trainer, TrainerCallback

from hf_cwd import log
from hf_cwd.trainer.wrappers import innermost
from tests.support.tiny import tiny_data, tiny_llama


@pytest.fixture(autouse=True)
def fresh_warnings():
    log.warn_once.cache_clear()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Watch(TrainerCallback):
    """Keeps each trial's optimizer weakly, what was in it, and whether it moved the weights."""

    def __init__(self):
        self.trials, self.optimizers = [], []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        optimizer = innermost(optimizer)
        self.start = model.lm_head.weight.detach().clone()
        decayed = [group for group in optimizer.param_groups if group["weight_decay"] != 0]
        self.trials.append(
            {
                "optimizer": type(optimizer).__name__,
                "learning_rate": {group["initial_lr"] for group in optimizer.param_groups},
                "weight_decay": {group["weight_decay"] for group in decayed},
                "mask": {group["mask"] for group in decayed},
                "hooks": len(optimizer._optimizer_step_post_hooks),
            }
        )
        self.optimizers.append(weakref.ref(optimizer))

    def on_train_end(self, args, state, control, model, optimizer, **kwargs):
        optimizer = innermost(optimizer)
        self.trials[-1] |= {
            "hooks left": len(optimizer._optimizer_step_post_hooks),
            "moved": not torch.equal(model.lm_head.weight, self.start),
            "steps": {float(state["step"]) for state in optimizer.state.values()},
        }


def searcher(arguments, kind=Trainer, **options):
    args = arguments(max_steps=3, **options)
    return kind(
        args=args,
        model_init=lambda: tiny_llama(),
        train_dataset=tiny_data(16),
        eval_dataset=tiny_data(8),
        callbacks=[watch := Watch()],
    ), watch


def search(trainer, grid, **options):
    """One trial for each point of the grid; gives the best."""

    def space(trial):
        return {key: trial.suggest_categorical(key, values) for key, values in grid.items()}

    count = max(map(len, grid.values()))
    return trainer.hyperparameter_search(
        space, n_trials=count, direction="minimize", backend="optuna", sampler=GridSampler(grid, seed=0), **options
    )


@pytest.mark.parametrize("optim", ["cwd_adamw", "cwd_muon"])
def test_each_trial_trains_an_optimizer_of_its_own_with_its_own_numbers(optim, arguments, caplog):
    trainer, watch = searcher(arguments, optim=optim)
    tried = []

    def space(trial):
        chosen = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
            "weight_decay": trial.suggest_float("weight_decay", 0.1, 0.3),
        }
        tried.append(chosen)
        return chosen

    best = trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna")
    assert best.hyperparameters in tried
    assert len(watch.trials) == 2
    for trial, chosen in zip(watch.trials, tried, strict=True):
        assert trial["learning_rate"] == {chosen["learning_rate"]}
        assert trial["weight_decay"] == {chosen["weight_decay"]}
        assert (trial["moved"], trial["steps"], trial["hooks"]) == (True, {3.0}, 1)
    first, second = (ref() for ref in watch.optimizers)
    assert first is not second
    assert not second._optimizer_step_post_hooks
    assert not [record for record in caplog.records if record.name == "hf_cwd" and record.levelname == "WARNING"]


def test_a_trial_s_optimizer_is_not_kept(arguments):
    """Nor its states, for which the next trial may have no room."""
    trainer, watch = searcher(arguments, optim="cwd_adamw")
    search(trainer, {"learning_rate": [1e-3, 1e-2, 3e-2]})
    gc.collect()
    assert [ref() is not None for ref in watch.optimizers] == [False, False, True]


def test_a_search_over_names_and_options(arguments):
    trainer, watch = searcher(arguments, optim="cwd_adamw")
    search(trainer, {"optim": ["cwd_lion", "cwd_sgd"]})
    assert {trial["optimizer"] for trial in watch.trials} == {"CWDLion", "CWDSGD"}
    assert all(trial["moved"] for trial in watch.trials)
    trainer, watch = searcher(arguments, optim="cwd_adamw")
    search(trainer, {"optim_args": ["mask=ge", "mask=gt"]})
    assert {mask for trial in watch.trials for mask in trial["mask"]} == {"ge", "gt"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"optim_args": ["mask=lt"]}, "mask='lt' is not valid"),
        ({"optim_args": ["maks=ge"]}, "Did you mean mask"),
        ({"weight_decay": [-0.1]}, "weight_decay=-0.1 is not valid"),
        ({"adam_beta1": [1.5]}, r"--adam_beta1=1.5 is not valid"),
        ({"optim": ["cwd_adam"]}, "cwd_adam is not a valid OptimizerNames"),
    ],
)
def test_a_wrong_value_of_a_trial_is_an_error_before_it_trains(grid, message, arguments):
    """Though TrainingArguments, which check them otherwise, are not built again."""
    trainer, watch = searcher(arguments, optim="cwd_adamw")
    with pytest.raises(ValueError, match=message):
        search(trainer, grid)
    assert watch.trials == []


class KeepingTrainer(Trainer):
    """Makes its optimizer once, whatever happens to the model."""

    kept = None

    def create_optimizer(self, model=None):
        self.kept = self.optimizer = self.kept or super().create_optimizer(model)
        return self.optimizer


def test_a_former_trial_s_optimizer_is_an_error(arguments):
    trainer, watch = searcher(arguments, KeepingTrainer, optim="cwd_adamw")
    with pytest.raises(RuntimeError, match="none of the 21 parameters of CWDAdamW is a parameter of LlamaForCausalLM"):
        search(trainer, {"learning_rate": [1e-3, 1e-2]})
    assert len(watch.trials) == 1


def test_a_pruned_trial_leaves_no_hook_behind(arguments):
    trainer, watch = searcher(arguments, optim="cwd_adamw", eval_strategy="steps", eval_steps=1)

    class PruneSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    search(trainer, {"learning_rate": [1e-3, 1e-2, 3e-2]}, pruner=PruneSecond())
    assert [trial["steps"] for trial in watch.trials] == [{3.0}, {1.0}, {3.0}]
    assert [trial["hooks"] for trial in watch.trials] == [1, 1, 1]
    assert [trial["hooks left"] for trial in watch.trials] == [0, 0, 0]
