"""The resume table: a run that goes on in new processes ends with every bit of the run that was never stopped."""

import json
from math import inf

import pytest

from hf_cwd.rules import RULES
from tests.checkpoint.resumes import CELLS, LOSSES, LOSSY, STEPS, TRAINERS, VARIATIONS, trainers
from tests.support.forking import fork
from tests.support.launching import ROOT, launch

STATES = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1}  # of each weight, at least


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumes")
    launch("-m", "tests.checkpoint.resumes", folder, cwd=ROOT, start=fork)
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


SAME = {
    "one": "ddp",
    "fsdp2": "fsdp2",
    "fsdp2-sharded": "fsdp2-sharded",
    "zero2": "zero1 zero2 zero1-offload zero2-offload",
}
SAME["zero3"] = "zero3 zero3-offload"
UNDER = {
    "one": "one process or DDP",
    "fsdp2": "FSDP with state_dict_type FULL_STATE_DICT",
    "fsdp2-sharded": "FSDP with state_dict_type SHARDED_STATE_DICT",
    "zero2": "DeepSpeed's ZeRO-1 or 2 on 2 ranks",
    "zero3": "DeepSpeed's ZeRO-3 on 2 ranks",
}


def test_the_checkpoint_of_another_layout_is_refused_by_name(results):
    """Or resumed, where the layouts keep their states alike; DeepSpeed's not by another number of ranks."""
    went_on = set()
    for rank in results["crossed"]:
        for run, said in rank.items():
            source, target = run.split(" to ")
            if not said:
                went_on.add((source, target))
                continue
            assert f"{source}-adamw/checkpoint-4 was saved under {UNDER[source]}, and this run trains under " in said
            assert f". Resume it under {UNDER[source]}, or begin a new run by from_pretrained from its weights" in said
            lacks = {
                "fsdp2-sharded": "which accelerate merge-weights makes",
                "zero3": "which zero_to_fp32.py in it makes",
            }
            assert lacks.get(source, "weights") in said
            assert ("which" in said) == (source in lacks)
    expected = {(source, f"{target}-adamw") for source, targets in SAME.items() for target in targets.split()}
    expected = {(source, target) for source, target in expected if target != f"{source}-adamw"}
    assert went_on == expected | {("fsdp2", "fsdp2-adamw-3")}
    said = next(rank["zero2 to zero2-adamw-3"] for rank in results["crossed"] if "zero2 to zero2-adamw-3" in rank)
    assert "on 2 ranks, and this run trains under DeepSpeed's ZeRO-1 or 2 on 3 ranks" in said
