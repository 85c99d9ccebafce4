"""Runs that kill themselves while they save and resume: each goes on, and ends as the run that nobody killed."""

import json

import pytest

from tests.checkpoint.victims import CHAIN
from tests.support.forking import fork
from tests.support.launching import ROOT, finish_all

LAYOUTS = ("one", "fsdp2", "zero3")


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """What became of the runs of each layout, see victims.py."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    victims = [fork("-m", "tests.checkpoint.victims", folders[name], name, cwd=ROOT) for name in LAYOUTS]
    for done in finish_all(victims):
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((folder / "results.json").read_text()) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_at_every_point_ends_the_same(launches, layout):
    """Weights, states, schedule and random numbers bit for bit; nothing of an interrupted save is left."""
    chain = launches[layout]["chain"]
    world = 1 if layout == "one" else 2
    assert len(chain["kills"]) == sum(victim is None or victim < world for victim, _, _ in CHAIN)
    for kill in chain["kills"]:
        assert kill["reached"], f"{kill}\n{chain['log']}"
        assert -9 in kill["codes"], kill
        assert 0 not in kill["codes"], f"a rank has ended well beside one that was killed: {kill}"
    assert chain["codes"] == [0] * world, chain["log"]
    assert chain["same"]
    assert chain["left"] == []


def test_a_run_that_is_killed_before_every_change_of_a_file_ends_the_same(launches):
    changes = launches["one"]["changes"]
    assert changes["same"], changes["log"]
    for kill in changes["kills"]:
        assert kill["codes"] == [-9, 0], f"{kill}\n{changes['log']}"
        assert kill["same"], kill
    seen = [kill["at"] for kill in changes["kills"]]
    assert len(seen) > 25
    for part in (
        *("os.rmdir _tmp-checkpoint-1-00000000", "os.rename checkpoint-2", "open optimizer.pt"),  # putting in order
        *("open .cwd_manifest.json.part", "os.rename .cwd_manifest.json.part", "os.rename checkpoint-3"),
        *("os.mkdir _tmp-checkpoint-1-", "os.rename checkpoint-1", "os.rmdir _tmp-checkpoint-1-"),  # rotation
    ):
        assert any(at.startswith(part) for at in seen), f"{part} was not reached: {seen}"
