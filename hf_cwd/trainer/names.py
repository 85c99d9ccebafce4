"""Where environments that ``hf-cwd enable`` has set up, and pickled TrainingArguments, look for these."""

from hf_cwd.trainer.registration import member, register

__all__ = ["member", "register"]
