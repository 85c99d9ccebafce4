"""The public names as a user's code has them, for a type checker: see test_house.py. It is not run.

A line with ``# type: ignore[code]`` is a mistake that the type checker has to find: an ignored line without an error is
an error itself (``warn_unused_ignores``).
"""

from dataclasses import dataclass
from typing import assert_type

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import hf_cwd
from hf_cwd import (
    CWDSGD,
    CWDAdamW,
    CWDArgumentsMixin,
    CWDLion,
    CWDMuon,
    CWDOptimizer,
    CWDTrainer,
    CWDTrainerMixin,
    CWDTrainingArguments,
    StepStatistics,
    cautious_mask,
    route,
)


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    routing = route(model, target_modules=["mlp"])
    assert_type(routing.routes[0].reason, str)
    return [
        CWDAdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, amsgrad=False, mask="gt"),
        CWDLion(model.named_parameters(), lr=torch.tensor(1e-4), weight_decay=1.0, state_dtype="bfloat16"),
        CWDMuon([{"params": list(model.parameters()), "weight_decay": 0.0}], routing=routing, adamw_lr=1e-3),
        CWDSGD(model.parameters(), momentum=0.9, ema=True, cautious=False, fused=None),
        CWDOptimizer(model.parameters(), 1e-3, algorithm="lion", betas=(0.9, 0.99)),
    ]


def make_wrong_optimizers(model: torch.nn.Module) -> None:
    CWDAdamW(model.parameters(), cautios=False)  # type: ignore[call-arg]
    CWDLion(model.parameters(), eps=1e-8)  # type: ignore[call-arg]
    CWDMuon(model.parameters(), kernel=3)  # type: ignore[arg-type]
    CWDSGD(model.parameters(), lr="1e-3")  # type: ignore[arg-type]
    CWDOptimizer(model.parameters(), 1e-3)  # type: ignore[call-arg]
    route(model, "adamw")  # type: ignore[call-arg]
    hf_cwd.CWDAdam(model.parameters())  # type: ignore[attr-defined]


def take_steps(optimizer: CWDOptimizer, closure_loss: Tensor) -> float:
    optimizer.statistics = StepStatistics(sample=3)
    optimizer.step()
    statistics = optimizer.statistics.read()
    assert_type(statistics.total.decayed_fraction, float)
    assert_type(statistics.orthogonality_error, float | None)
    optimizer.mark_replicated(p for group in optimizer.param_groups for p in group["params"])
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer.step(lambda: closure_loss.item())


def mask(update: Tensor, param: Tensor) -> Tensor:
    cautious_mask(update, param, "gt")  # type: ignore[call-arg]
    return cautious_mask(update, param, mask="gt")


class Seq2Seq(CWDTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class Seq2SeqArguments(CWDArgumentsMixin, Seq2SeqTrainingArguments):
    pass


def train(model: torch.nn.Module) -> None:
    args = CWDTrainingArguments("runs", learning_rate=1e-3, weight_decay=0.1, cwd_log="groups", cwd_not_finite="skip")
    assert_type(args.cwd_verify, str | None)
    plain: TrainingArguments = args
    trainer: Trainer = CWDTrainer(model=model, args=plain)
    trainer.train(resume_from_checkpoint=True)
    Seq2Seq(model=model, args=Seq2SeqArguments("runs", cwd_verify="fast", predict_with_generate=True)).evaluate()
    CWDTrainingArguments("runs", cwd_nots_finite="skip")  # type: ignore[call-arg]
