"""Trainers that make their parameter groups themselves, or ask for the optimizer without a model."""

import gc
import logging
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

from hf_cwd import CWDMuon, route
from hf_cwd.trainer import model_lookup
from tests.support.tiny import tiny_data, tiny_llama

RULES = pytest.mark.parametrize("rule", ["adamw", "muon"])


class OwnGroups(Trainer):
    """The groups that :meth:`groups` makes, with a class and keywords asked for without a model."""

    def groups(self):
        return [{"params": list(self.model.parameters())}]

    def keywords(self, kwargs):
        return kwargs

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(self.groups(), **self.keywords(kwargs))
        return self.optimizer


class Layerwise(OwnGroups):
    """A rate for each layer, as a tensor in the last, and one that is left to the keyword."""

    def groups(self):
        named = list(self.model.named_parameters())
        rates = {"layers.0": 0.001, "layers.1": torch.tensor(0.002)}
        first = [{"params": [p for n, p in named if part in n], "lr": lr, "name": part} for part, lr in rates.items()]
        rest = [(n, p) for n, p in named if not any(part in n for part in rates)]
        return [*first, {"params": [p for _, p in rest], "weight_decay": 0.25}, {"params": [], "lr": 5.0}]


class ManyRates(OwnGroups):
    def groups(self):
        return [{"params": p, "lr": 1e-5 * i} for i, p in enumerate(self.model.parameters(), 1)]


class OtherKeyword(OwnGroups):
    def keywords(self, kwargs):
        return kwargs | {"lr": 0.004, "weight_decay": 0.5}


class Mapped(OwnGroups):
    """The groups of a learning_rate_mapping: patterns, with and without decay, all with names."""

    def groups(self):
        decayed, named = set(self.get_decay_parameter_names(self.model)), list(self.model.named_parameters())
        return [
            {
                "params": [(n, p) for n, p in named if ("mlp" in n) == mlp and (n in decayed) == decay],
                "lr": 0.02 if mlp else 0.01,
                "weight_decay": 0.1 if decay else 0.0,
            }
            for mlp in (True, False)
            for decay in (True, False)
            if any(("mlp" in n) == mlp and (n in decayed) == decay for n, _ in named)
        ]


def made(cls, args, model=None):
    return cls(model=model or tiny_llama(), args=args, train_dataset=tiny_data())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (OwnGroups, "lr 0.01, weight_decay 0.1"),
        (Layerwise, "lr 0.01 and 0.002 and 0.001, weight_decay 0.25 and 0.1"),
        (OtherKeyword, "lr 0.004, weight_decay 0.5"),
        (Mapped, "lr 0.02 and 0.01, weight_decay 0.1"),
        (ManyRates, "lr 1e-05 to 0.00021 (21 values), weight_decay 0.1"),
    ],
)
def test_they_train_and_the_start_up_line_has_their_rates(kind, told, arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    trainer = made(kind, arguments(optim="cwd_adamw"))
    trainer.train()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("cwd_adamw ")]
    assert line.startswith(
        f"cwd_adamw {told.replace('lr ', 'lr=').replace(', weight_decay ', ' weight_decay=')} betas="
    )
    groups = trainer.optimizer.optimizer.param_groups
    assert any(group.get("name") == "layers.1" for group in groups) == (kind is Layerwise)


@pytest.mark.parametrize(
    ("kind", "muon", "adamw"),
    [
        (OwnGroups, "lr 0.01, weight_decay 0.1", "lr 0.003, weight_decay 0.1"),
        # The embeddings, the head and the last norm have the keyword's rate.
        (Layerwise, "lr 0.002 and 0.001, weight_decay 0.1", "lr 0.003 and 0.002 and 0.001, weight_decay 0.25 and 0.1"),
        (OtherKeyword, "lr 0.004, weight_decay 0.5", "lr 0.003, weight_decay 0.5"),
        (Mapped, "lr 0.02 and 0.01, weight_decay 0.1", "lr 0.01, weight_decay 0.1 and 0"),
    ],
)
def test_muon_and_its_adamw_have_rates_of_their_own(kind, muon, adamw, arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    made(kind, arguments(optim="cwd_muon", optim_args="adamw_lr=0.003")).train()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("cwd_muon ")]
    assert f" parameters, {muon}; adamw: 7 tensors, 4,256 parameters, {adamw}" in line


@RULES
def test_peft_s_lora_plus(rule, arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))

    class LoraPlus(Trainer):
        def create_optimizer(self, model=None):
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            lr = kwargs.pop("lr")
            self.optimizer = create_loraplus_optimizer(self.model, cls, lr=lr, loraplus_lr_ratio=16.0, **kwargs)
            return self.optimizer

    trainer = made(LoraPlus, arguments(optim=f"cwd_{rule}"), model)
    trainer.train()
    groups = [group for group in trainer.optimizer.optimizer.param_groups if group["params"]]
    assert {(group["algorithm"], group["initial_lr"]) for group in groups} == {(rule, 0.01), (rule, 0.16)}
    if rule == "muon":
        assert ", lr 0.16 and 0.01, weight_decay 0" in caplog.text


def test_peft_s_lora_plus_with_the_class():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4))
    options = {"lr": 0.01, "loraplus_lr_ratio": 16.0, "routing": route(model)}
    optimizer = create_loraplus_optimizer(model, CWDMuon, **options)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.16]


# --- which model


def test_without_a_trainer_there_is_no_model(arguments):
    args = arguments(optim="cwd_muon")
    message = (
        "cwd_muon sorts the parameters of a model, and no Trainer with these TrainingArguments has been made yet: "
        r"write Trainer\.get_optimizer_cls_and_kwargs\(args, model\)"
    )
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args)
    other = made(Trainer, arguments(optim="cwd_muon"))
    assert other.args == args, "equal arguments are not these"
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args)
    assert Trainer.get_optimizer_cls_and_kwargs(arguments(optim="cwd_adamw"))[1]["lr"] == 0.01, "it sorts nothing"


def test_of_several_models_none_is_chosen(arguments):
    args = arguments(optim="cwd_muon")
    first, second = made(Trainer, args), made(Trainer, args)
    with pytest.raises(ValueError, match="2 Trainers with these TrainingArguments have a model each: write"):
        Trainer.get_optimizer_cls_and_kwargs(args)
    third = made(Trainer, args, model=first.model)
    del second
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls(third.model.parameters(), **kwargs).param_groups[0]["algorithm"] == "muon"


def test_no_model_is_kept_alive(arguments):
    args = arguments(optim="cwd_muon")
    trainer = made(OwnGroups, args)
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None
    with pytest.raises(ValueError, match="has been made yet"):
        model_lookup.model_of(args, "cwd_muon")
