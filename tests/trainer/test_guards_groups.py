"""Parameters that the optimizer has not, numbers at which it does nothing, flags that are not followed."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_cwd import CWDAdamW, CWDLion, log
from hf_cwd.trainer.callbacks import optimizer_guard
from tests.support.tiny import tiny_llama
from tests.trainer.guarding import make, warned


@pytest.fixture(autouse=True)
def fresh_warnings():
    log.warn_once.cache_clear()


def test_a_model_that_was_made_again(arguments):
    args, old = arguments(optim="cwd_adamw"), tiny_llama()
    trainer = make(args, optimizers=(CWDAdamW(old.parameters()), None))
    with pytest.raises(RuntimeError, match="none of the 21 parameters of CWDAdamW is a parameter of LlamaForCausalLM"):
        trainer.train()


@pytest.mark.parametrize("optim", ["cwd_adamw", "adamw_torch"])
def test_a_given_optimizer_of_this_package_is_guarded_under_any_name(optim, arguments):
    trainer = make(arguments(optim=optim), optimizers=(CWDAdamW(tiny_llama().parameters()), None))
    with pytest.raises(RuntimeError, match="none of the 21 parameters"):
        trainer.train()


def test_everything_frozen(arguments):
    """Activation checkpointing makes the embeddings' output ask for a gradient: nothing else would fail."""
    trainer = make(arguments(optim="cwd_adamw", gradient_checkpointing=True))
    trainer.create_optimizer()
    trainer.model.requires_grad_(False)
    trainer.model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"all of the 21 parameters of LlamaForCausalLM that .* are frozen"):
        trainer.train()


def test_embeddings_that_were_resized_after_the_optimizer_was_made(arguments, caplog):
    trainer = make(arguments(optim="cwd_adamw"))
    trainer.create_optimizer()
    trainer.model.resize_token_embeddings(70)
    start = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, start), "transformers makes this one anew"
    (warning,) = warned(caplog)
    assert warning.startswith("lm_head.weight of LlamaForCausalLM get gradients, but are in no group of CWDAdamW")


def test_an_optimizer_of_a_part_of_the_model(arguments, caplog):
    model = tiny_llama()
    ours = CWDAdamW(model.lm_head.parameters(), lr=1e-2)
    make(arguments(optim="cwd_adamw"), model=model, optimizers=(ours, None)).train()
    (warning,) = warned(caplog)
    assert "model.layers.0.self_attn.k_proj.weight and 17 more of LlamaForCausalLM" in warning
    model.model.requires_grad_(False)  # as it says
    log.warn_once.cache_clear()
    make(arguments(optim="cwd_adamw"), model=model, optimizers=(ours, None)).train()
    assert len(warned(caplog)) == 1


def test_no_matrix_for_muon(arguments):
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = torch.nn.Embedding(64, 8), torch.nn.LayerNorm(8)

        def forward(self, input_ids, labels):
            return {"loss": self.norm(self.embedding(input_ids)).square().mean()}

    trainer = make(arguments(optim="cwd_muon"), model=Bag())
    message = r"Bag has no trainable matrix for muon.*\(1 x embedding, 1 x vector.*Use --optim cwd_adamw$"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# --- numbers


class NoDecayTrainer(Trainer):
    def get_decay_parameter_names(self, model):
        return []


def test_no_weight_decay_anywhere(arguments, caplog):
    make(arguments(optim="cwd_adamw"), NoDecayTrainer).train()
    (warning,) = warned(caplog)
    assert warning.startswith("weight_decay is 0 in every parameter group of CWDAdamW")
    model = tiny_llama()
    ours = CWDLion(model.parameters(), lr=1e-3, weight_decay=0.0)
    make(arguments(optim="adamw_torch"), model=model, optimizers=(ours, None)).train()
    assert [message.split(",")[0] for message in warned(caplog)[1:]] == [
        "weight_decay is 0 in every parameter group of CWDLion"
    ]


def test_the_default_weight_decay_is_warned_of_once(arguments, caplog):
    make(arguments(optim="cwd_lion", weight_decay=0.0)).train()
    (warning,) = warned(caplog)
    assert "--weight_decay is 0 (the Trainer's default): cwd_lion then decays nothing" in warning
    make(arguments(optim="cwd_adamw", weight_decay=0.0, optim_args="cautious=false")).train()
    assert len(warned(caplog)) == 1, "a baseline without decay is what was asked for"


def test_a_learning_rate_of_zero(arguments, caplog):
    make(arguments(optim="cwd_adamw", warmup_steps=2)).train()
    assert warned(caplog) == [], "a warm-up begins with it"
    make(arguments(optim="cwd_adamw", learning_rate=0.0)).train()
    (warning,) = warned(caplog)
    assert warning.startswith("the learning rate is 0 in every parameter group of CWDAdamW")


def test_a_schedule_of_another_optimizer(arguments):
    model = tiny_llama()
    ours, old = CWDAdamW(model.parameters()), CWDAdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(old)
    with pytest.raises(RuntimeError, match=r"schedule \(LinearLR\) was made for another optimizer \(CWDAdamW\)"):
        make(arguments(optim="cwd_adamw"), model=model, optimizers=(ours, schedule)).train()
    schedule = torch.optim.lr_scheduler.LinearLR(ours)
    make(arguments(optim="cwd_adamw"), model=model, optimizers=(ours, schedule)).train()


def test_flags_that_a_resumed_run_does_not_follow(arguments, caplog):
    options = {"optim": "cwd_muon", "save_strategy": "steps", "save_steps": 2}
    make(arguments(**options)).train()
    checkpoint = str(Path(arguments().output_dir) / "checkpoint-2")
    make(arguments(**options)).train(resume_from_checkpoint=checkpoint)
    assert warned(caplog) == []
    changed = {"weight_decay": 0.3, "learning_rate": 3e-3, "adam_beta2": 0.95}
    trainer = make(arguments(**options, **changed, optim_args="mask=gt,momentum=0.9"))
    trainer.train(resume_from_checkpoint=checkpoint)
    (warning,) = warned(caplog)
    for part in (
        "the resumed cwd_muon keeps",
        "lr=0.01, not 0.003",
        "weight_decay=0.1, not 0.3",
        "adamw_betas=(0.9, 0.999), not (0.9, 0.95)",
        "mask=ge, not gt",
        "momentum=0.95, not 0.9",
    ):
        assert part in warning
    assert {group["mask"] for group in trainer.optimizer.param_groups} == {"ge"}, "it says the truth"


class LayerwiseTrainer(Trainer):
    """Its groups have rates of their own, of which none is the flag's."""

    def create_optimizer(self, model=None):
        vectors, matrices = ([p for p in self.model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (0, 1))
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        rate = options.pop("lr")
        groups = [{"params": matrices, "lr": rate / 10}, {"params": vectors, "lr": rate * 2, "weight_decay": 0.0}]
        self.optimizer = kind(groups, **options)
        return self.optimizer


def test_groups_with_their_own_rates_are_resumed_without_a_word(arguments, caplog):
    options = {"optim": "cwd_adamw", "save_strategy": "steps", "save_steps": 2}
    make(arguments(**options), LayerwiseTrainer).train()
    checkpoint = str(Path(arguments().output_dir) / "checkpoint-2")
    make(arguments(**options), LayerwiseTrainer).train(resume_from_checkpoint=checkpoint)
    assert warned(caplog) == []
    make(arguments(**options, learning_rate=0.1), LayerwiseTrainer).train(resume_from_checkpoint=checkpoint)
    (warning,) = warned(caplog)
    assert (
        "cwd_adamw keeps the hyper-parameters of its checkpoint, which override the flags: lr=0.001, not 0.01; "
        in warning
    )
    assert "lr=0.02, not 0.2. To change them" in warning


def test_a_given_optimizer_s_settings_that_its_checkpoint_overrules(arguments, caplog):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    for decay in (0.1, 0.3):
        model = tiny_llama()
        ours = CWDLion(model.parameters(), lr=1e-3, weight_decay=decay)
        checkpoint = str(Path(arguments().output_dir) / "checkpoint-2") if decay == 0.3 else None
        make(arguments(**options), model=model, optimizers=(ours, None)).train(resume_from_checkpoint=checkpoint)
    (warning,) = warned(caplog)
    assert "the resumed cwd_lion keeps the hyper-parameters of its checkpoint" in warning
    assert "weight_decay=0.1, not 0.3" in warning


def test_a_resumed_run_keeps_its_decay(arguments, caplog):
    """Though norms and biases have the one that is asked for now."""
    options = {"optim": "cwd_adamw", "save_strategy": "steps", "save_steps": 2}
    make(arguments(**options)).train()
    checkpoint = str(Path(arguments().output_dir) / "checkpoint-2")
    make(arguments(**options, weight_decay=0.0)).train(resume_from_checkpoint=checkpoint)
    assert any("weight_decay=0.1, not 0.0" in warning for warning in warned(caplog))


class DeafLlama(torch.nn.Module):
    """Its loss depends on its parameters at one step only: all gradients are 0 otherwise."""

    def __init__(self, hears=None):
        super().__init__()
        self.llama, self.hears, self.steps = tiny_llama(), hears, 0

    def forward(self, input_ids, labels):
        self.steps += 1
        return {"loss": self.llama(input_ids=input_ids, labels=labels).loss * (self.steps == self.hears)}


@pytest.mark.parametrize(
    ("mask", "fraction", "what"), [("ge", 1.0, "decayed every element"), ("gt", 0.0, "decayed nothing")]
)
def test_a_decayed_fraction_that_stays(mask, fraction, what, arguments, caplog):
    def fractions(steps, hears=None, **options):
        args = arguments(optim="cwd_sgd", logging_steps=1, max_steps=steps, **options)
        trainer = make(args, model=DeafLlama(hears))
        trainer.train()
        return [entry["cwd/decayed_fraction"] for entry in trainer.state.log_history if "loss" in entry]

    enough = optimizer_guard.SAME_FRACTION
    assert fractions(enough - 1, optim_args=f"mask={mask}") == [fraction] * (enough - 1)
    found = fractions(enough + 2, hears=4, optim_args=f"mask={mask}")
    assert 0.3 < found[3] < 0.7
    assert found.count(fraction) == enough + 1, "not in a row"
    assert warned(caplog) == []
    fractions(enough, optim_args=f"mask={mask}")
    (warning,) = warned(caplog)
    assert f"cwd/decayed_fraction was exactly {fraction:g} in 10 logs in a row: CWDSGD {what}" in warning
    log.warn_once.cache_clear()
    assert fractions(enough, optim_args="cautious=false") == [1.0] * enough
    assert len(warned(caplog)) == 1, "plain decay decays everything, and that was asked for"
