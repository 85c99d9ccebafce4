"""The resume table: a run that goes on in new processes ends with every bit of the run that was never stopped."""

import json
from math import inf

import pytest

from hf_cwd.rules import RULES
from tests.checkpoint.resumes import CELLS, LOSSES, LOSSY, STEPS, TRAINERS, VARIATIONS, trainers
from tests.launching import ROOT, launch

STATES = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1}  # of each weight, at least


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumes")
    launch("-m", "tests.checkpoint.resumes", folder, cwd=ROOT)
    return json.loads((folder / "results.json").read_text())


def test_every_rule_is_saved_and_resumed_by_both_trainers():
    for rule in RULES:
        assert {trainers(cell) for cell in CELLS if cell.rule == rule} == set(TRAINERS)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_resumed_run_ends_as_the_uninterrupted_one(results, cell):
    """In every rank's file: weights, states, schedule, random numbers. Losses, gradient norms and decay as well."""
    found = results[str(cell)]
    assert {name: size for name, size in found["files"].items() if size != 0} == {}
    assert found["more files"] == []
    whole, resumed = found["logs"]
    assert [entry["step"] for entry in whole] == list(range(STEPS - 2, STEPS + 1))
    assert resumed == whole
    trained = sum(p.numel() for p in VARIATIONS[cell.variation].model(0).parameters() if p.requires_grad)
    assert found["numbers"] >= (1 + STATES[cell.rule]) * trained


@pytest.mark.parametrize("what", LOSSES)
def test_what_is_lost_on_the_way_is_seen(results, what):
    lost, whole = results[what], results[str(LOSSY)]
    assert lost["numbers"] == whole["numbers"]
    assert 0 < lost["files"]["model.safetensors"] < inf
    assert 0 < lost["files"]["optimizer.pt"] < inf
    assert lost["logs"][0] != lost["logs"][1]
