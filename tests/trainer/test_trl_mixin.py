"""CWDTrainerMixin before TRL's trainers, with their own arguments as they are and with CWDArgumentsMixin's."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_cwd import CWDAdamW, CWDArgumentsMixin, CWDMuon, CWDTrainerMixin, CWDTrainingArguments
from tests.support.launching import write_material


class MySFT(CWDTrainerMixin, SFTTrainer):
    pass


class MyDPO(CWDTrainerMixin, DPOTrainer):
    pass


class MyGRPO(CWDTrainerMixin, GRPOTrainer):
    pass


@dataclass
class SFTArguments(CWDArgumentsMixin, SFTConfig):
    pass


@dataclass
class DPOArguments(CWDArgumentsMixin, DPOConfig):
    pass


@dataclass
class GRPOArguments(CWDArgumentsMixin, GRPOConfig):
    pass


def letters(completions, **others):
    """No two completions have the same reward, or almost none."""
    return [float(sum(map(ord, completion))) for completion in completions]


TEXTS = [
    "we the people of the state",
    "of the union it is a day",
    "to the congress as we see",
    "and so on and so forth",
]
ROWS = {
    MySFT: [{"text": text} for text in TEXTS],
    MyDPO: [{"prompt": text[:8], "chosen": text[8:], "rejected": text[:7:-1]} for text in TEXTS],
    MyGRPO: [{"prompt": text[:12]} for text in TEXTS],
}
GENERATING = {"num_generations": 2, "max_completion_length": 4}
CASES = [
    (MySFT, SFTConfig),
    (MySFT, SFTArguments),
    (MySFT, TrainingArguments),
    (MyDPO, DPOConfig),
    (MyDPO, DPOArguments),
    (MyGRPO, GRPOConfig),
    (MyGRPO, GRPOArguments),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_material(folder)
    return str(folder / "model")


@pytest.fixture
def make(model, tmp_path):
    def make(kind, arguments, model=model, **options):
        defaults = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "bf16": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        if not issubclass(arguments, CWDArgumentsMixin):
            defaults["optim"] = "cwd_muon"
        if kind is MyGRPO:
            defaults |= GENERATING
        args = arguments(**(defaults | options))
        tokenizer = None
        if Path(model).is_dir():
            tokenizer = AutoTokenizer.from_pretrained(model)
            tokenizer.pad_token = tokenizer.eos_token
        rewards = {"reward_funcs": letters} if kind is MyGRPO else {}
        rows = Dataset.from_list(ROWS[kind])
        return kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **rewards)

    return make


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_it_trains_and_its_card_says_how(kind, arguments, make, model, tmp_path):
    trainer = make(kind, arguments)
    trainer.train()
    muon = not issubclass(arguments, CWDArgumentsMixin)
    assert type(trainer.optimizer.optimizer) is (CWDMuon if muon else CWDAdamW)
    start = AutoModelForCausalLM.from_pretrained(model)
    assert all(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start.parameters(), strict=True))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all(0 < entry["cwd/decayed_fraction"] < 1 for entry in logged)

    trainer.create_model_card(model_name="mine", tags=["own"])
    card = ModelCard.load(tmp_path / "README.md")
    assert {"own", "trl", "cautious-weight-decay", "hf_cwd"} <= set(card.data.tags)
    assert f"It was trained by {'CWD-Muon' if muon else 'CWD-AdamW'} of hf_cwd" in card.text
    assert (
        card.text.index("### Optimizer") < card.text.index("### Framework versions") < card.text.index("## Citations")
    )


class BrokenSFT(MySFT):
    """Its second step's loss is NaN."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss


@pytest.mark.parametrize(("arguments", "options"), [(SFTConfig, {}), (SFTArguments, {"cwd_not_finite": "skip"})])
def test_gradients_that_are_not_finite(arguments, options, make, monkeypatch):
    monkeypatch.setitem(ROWS, BrokenSFT, ROWS[MySFT])
    trainer = make(BrokenSFT, arguments, max_steps=3, **options)
    if not options:
        with pytest.raises(RuntimeError, match="step 2: the gradient norm is nan, this rank's loss nan"):
            trainer.train()
        return
    trainer.train()
    assert [e.get("cwd/skipped_steps") for e in trainer.state.log_history if "loss" in e] == [None, 1, 1]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_another_optimizer_is_refused_before_the_model_is_loaded(make):
    for arguments in (SFTConfig, SFTArguments):
        with pytest.raises(ValueError, match="MySFT trains with an optimizer of hf_cwd, and optim is 'adamw_torch'"):
            make(MySFT, arguments, model="there/is-none", optim="adamw_torch")


def test_arguments_of_another_class(make):
    """SFTTrainer makes a SFTConfig of them, field by field."""
    with pytest.raises(TypeError, match=r"MySFT converts a CWDTrainingArguments to its own class.*SFTConfig"):
        make(MySFT, CWDTrainingArguments)
