"""A run that saves at each step, where it saves, and what is said meanwhile."""

import logging

import pytest

from hf_cwd import CWDTrainer, CWDTrainingArguments
from tests.support.tiny import tiny_data, tiny_llama


@pytest.fixture
def train(tmp_path):
    def run(resume=None, kind=CWDTrainer, **options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        args = CWDTrainingArguments(**(defaults | options))
        trainer = kind(model=tiny_llama(), args=args, train_dataset=tiny_data(), eval_dataset=tiny_data(4))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="hf_cwd")
    return lambda: caplog.text
