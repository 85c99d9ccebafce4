"""Shared by all tests: one thread, no hub, and the cases that every rule meets."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hf_cwd.rules import RULES

torch.set_num_threads(1)


@pytest.fixture(params=sorted(RULES))
def algorithm(request: pytest.FixtureRequest) -> str:
    """The name of each registered rule in turn."""
    return request.param
