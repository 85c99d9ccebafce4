"""bench/checkpoint.py: a run of two layouts, what it needs of memory, and what it refuses."""

import json

import pytest
from bench import checkpoint as bench_checkpoint
from material import LLAMA

from tests.support.launching import ROOT, launch

LAYOUTS = ("one", "zero3")
FLOATS = 4  # bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench_checkpoint")
    config = {**LLAMA, "vocab_size": 20_000, "hidden_size": 128, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    given = {"config_name": folder / "config.json", "rounds": 1, "output_dir": folder, "json": folder / "found.json"}
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = launch(ROOT / "scripts/bench/checkpoint.py", *flags, "--cold", "--layouts", *LAYOUTS, cwd=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "found.json"]
    return json.loads((folder / "found.json").read_text()), done.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_trainer_was_timed(run, layout):
    found = run[0]["layouts"][layout]
    assert [*found["saves"]] == [*found["sizes"]] == bench_checkpoint.SAVES
    assert [*found["loads"]] == bench_checkpoint.LOADS
    for row in (*found["saves"].values(), *found["loads"].values()):
        assert len(row["seconds"]) == len(row["bytes"]) == 1
        assert 0 < row["seconds"][0] < 300
    sizes = found["sizes"]
    states = 3 * FLOATS * found["parameters"]  # weights and two moments
    assert states < sizes["plain"] < 1.2 * states
    assert sizes["plain, synced"] == pytest.approx(sizes["plain"], abs=1000)
    assert sizes["plain"] + 2000 < sizes["Trainer"] < sizes["plain"] + 20_000  # a manifest
    assert sizes["CWDTrainer"] == pytest.approx(sizes["Trainer"], abs=1000)


def test_saving_has_no_second_copy(run):
    """Of 31 MB, in one process."""
    found = run[0]["layouts"]["one"]
    (needed,) = found["saves"]["CWDTrainer"]["bytes"]
    if needed is None:
        pytest.skip("the kernel does not tell the peak of the resident set")
    assert needed < found["sizes"]["CWDTrainer"] / 4


def test_the_report(run):
    text = run[1]
    assert text.startswith("machine: ")
    assert text.count("INCONCLUSIVE") == 4  # of one round
    assert text.count("CWDTrainer takes at most 1.10 of plain's time: inconclusive") == 4
    assert "config.json, 2.8 M parameters, cwd_adamw, zero3" in text
    assert "load, cold" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--config_name", "nowhere.json"], "nowhere.json does not exist"),
        (["--output_dir", "nowhere"], "nowhere does not exist"),
        (["--layouts", "zero4"], "--layouts zero4: there are one, ddp, fsdp2,"),
    ],
)
def test_mistakes(flags, said, capsys):
    with pytest.raises(SystemExit):
        bench_checkpoint.parse(flags)
    assert said in capsys.readouterr().err
