"""An import path to keep: pickled TrainingArguments and environments set up by ``hf-cwd enable`` use it."""

from hf_cwd.trainer.registration import member, register

__all__ = ["member", "register"]
