"""Checkpoints of bitsandbytes' 32-bit Lion and AdamW are continued, those of 8 bits refused; there is no way back."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.forking import fork
from tests.support.launching import ROOT, launch

REQUIREMENT = "bitsandbytes==0.50.2"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What bitsandbytes_runs.py has found, with bitsandbytes from PyPI beside the environment."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
    subprocess.run(pip, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        package.extractall(folder / "site")
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    launch("-m", "tests.optim.bitsandbytes_runs", folder, cwd=ROOT, PYTHONPATH=path, start=fork)
    return json.loads(Path(folder, "found.json").read_text())


@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_continued_as_if_nothing_had_happened(found, rule):
    run = found["continued"][rule]
    assert run["steps"] == 10
    assert run["moved"] > 1e-5
    assert run["apart"] <= 5 * torch.finfo(torch.float32).eps * run["largest"]  # a rounding a step


@pytest.mark.parametrize(("rule", "keys"), [("lion", "step, exp_avg"), ("adamw", "step, exp_avg, exp_avg_sq")])
def test_states_of_8_bits_are_refused(found, rule, keys):
    assert found["refused"][rule].startswith("the saved state holds absmax1, ")
    assert f", but rule {rule!r} keeps {keys}: continue with the optimizer that saved it" in found["refused"][rule]


def test_a_run_of_the_trainer_goes_on(found):
    assert max(found["trained"]["apart"]) < 1e-6
    assert found["trained"]["apart if cautious"] > 1e-6
