"""Which runs are found, which state of a run counts, and what is known of its settings."""

import json
import shutil

import pytest

from hf_cwd.report import page
from hf_cwd.report.compare import differing, seed_groups
from hf_cwd.report.read import read, read_whole
from tests.report.conftest import logged

CARD = """# model

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.01
- seed: 7
- optimizer: Use OptimizerNames.CWD_LION and the args are:
cautious=false
- lr_scheduler_type: cosine

### Training results

- seed: 9
"""


def test_runs_below_a_directory_in_the_order_of_their_numbers(make_run, tmp_path):
    for name in ("sweep/run-10", "sweep/run-11", "sweep/run-2", "sweep/deeper/a", "sweep/.hidden/b"):
        make_run(name, logged({1: 1.0}))
    runs = read([tmp_path / "sweep/run-10", tmp_path / "sweep"])
    assert [run.name for run in runs] == [
        "run-10",
        "deeper/a",
        "run-2",
        "run-11",
    ]  # the one named first is first, and once


def test_relative_paths_and_links(make_run, tmp_path, monkeypatch):
    folder = make_run("sweep/a", logged({1: 1.0}))
    (tmp_path / "sweep/b").symlink_to(make_run("elsewhere/c", logged({1: 1.0})))
    monkeypatch.chdir(folder)
    assert [run.name for run in read([".", tmp_path / "sweep", "../b"])] == ["a", "b"]


def test_a_state_file_and_a_checkpoint_may_be_named(make_run):
    folder = make_run("a/checkpoint-3", logged({3: 1.0}))
    (folder.parent / "cwd_run.json").write_text('{"optim": "cwd_lion"}')
    (one,) = read([folder / "trainer_state.json"])
    (two,) = read([folder])
    assert one == two
    assert one.settings.values["optim"] == "cwd_lion"


@pytest.mark.parametrize(("own", "newest"), [(None, 10), (12, 12), (9, 10)])
def test_the_newest_state_counts(own, newest, make_run, tmp_path):
    """checkpoint-10 comes after checkpoint-9; a run that was resumed is past its own last state."""
    for step in (9, 10):
        make_run(f"run/checkpoint-{step}", logged({step: float(step)}))
    if own is not None:
        shutil.move(make_run("own", logged({own: float(own)})) / "trainer_state.json", tmp_path / "run")
    (run,) = read([tmp_path / "run"])
    assert run.step == newest
    assert run.series("loss").values == [newest]


def test_settings_of_the_record_the_state_and_the_config(make_run):
    record = {"arguments": {"learning_rate": 1e-3, "seed": 3, "none": None}, "optimizer": {"betas": [0.9, 0.95]}}
    folder = make_run("run", logged({1: 1.0}), record=record, train_batch_size=8)
    (folder / "config.json").write_text('{"hidden_size": 32}')
    (run,) = read([folder])
    assert run.recorded
    assert run.seed == 3
    assert run.settings.values == {
        "learning_rate": 1e-3,
        "seed": 3,
        "betas": "[0.9, 0.95]",
        "train_batch_size": 8,
        "max_steps": 1,
        "model.hidden_size": 32,
    }


def test_settings_of_the_same_name_keep_their_prefix(make_run):
    (run,) = read([make_run("run", [], record={"muon": {"lr": 1}, "adamw": {"lr": 2}})])
    assert run.settings.values["muon.lr"] == 1
    assert run.settings.values["adamw.lr"] == 2


def test_the_model_card_s_hyperparameters(make_run):
    folder = make_run("run", logged({1: 1.0}))
    (folder / "README.md").write_text(CARD)
    (run,) = read([folder])
    assert not run.recorded
    assert run.seed == 7
    assert run.settings.values["learning_rate"] == 0.01
    assert run.settings.values["optimizer"] == "Use OptimizerNames.CWD_LION and the args are: cautious=false"


def test_runs_that_differ_only_in_their_seed_by_their_records(make_run):
    paths = []
    for name, optim, seed in (("a", "cwd_lion", 1), ("b", "cwd_lion", 2), ("c", "cwd_muon", 1)):
        paths.append(make_run(name, [], record={"optim": optim, "seed": seed, "output_dir": name}))
    runs = read(paths)
    assert [group.members for group in seed_groups(runs)] == [[0, 1], [2]]
    apart, common = differing(runs)
    assert apart == {"optim": ["cwd_lion", "cwd_lion", "cwd_muon"], "seed": [1, 2, 1], "output_dir": ["a", "b", "c"]}
    assert common == {"max_steps": 0}


def test_runs_that_differ_only_in_their_seed_by_their_names(make_run):
    names = ("lion-seed1", "lion-seed2", "muon/s1", "muon/s2", "adamw1", "adamw2")
    groups = seed_groups(read([make_run(name, []) for name in names]))
    assert [(group.label, group.members) for group in groups] == [
        ("lion", [0, 1]),
        ("muon", [2, 3]),
        ("adamw1", [4]),
        ("adamw2", [5]),
    ]


def test_a_resumed_run_says_so_and_keeps_the_later_entries(make_run):
    history = [*logged({10: 3.0, 20: 2.0, 30: 1.0}), *logged({20: 2.5, 40: 0.5})]
    (run,) = read([make_run("run", history)])
    assert run.series("loss") == ([10, 20, 40], [3.0, 2.5, 0.5])
    assert "was resumed" in " ".join(run.notes)


def test_a_clock_that_starts_anew_is_a_resume(make_run):
    def timed(*seconds):
        return [{"step": i, "loss": 1.0, "train_runtime": s} for i, s in enumerate(seconds, 1)]

    resumed, straight = read([make_run("a", timed(1.0, 2.0, 0.5)), make_run("b", timed(1.0, 2.0, 3.0))])
    assert "was resumed" in " ".join(resumed.notes)
    assert straight.notes == []


def test_finished_runs_and_others(make_run):
    early = [*logged({5: 1.0}), {"step": 5, "train_loss": 1.0, "train_runtime": 2.0}]
    paths = [
        make_run("stopped", logged({5: 1.0}), max_steps=10),
        make_run("early", early, max_steps=10),
        make_run("whole", logged({10: 1.0})),
    ]
    assert [run.finished for run in read(paths)] == [False, True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ('{"log_history": [{"step": 1', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ('{"log_history": {}}', '"log_history" is a dict'),
    ],
)
def test_a_state_that_cannot_be_read_is_named(content, message, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read([tmp_path])
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "trainer_state.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"trainer_state\.json: cannot be read"):
        read([tmp_path])


def test_a_path_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such directory"):
        read([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no trainer_state\.json in it or below it"):
        read([tmp_path])


@pytest.mark.parametrize(
    "history",
    [
        [],
        [None, 3, "x", {}, {"loss": 1.0}, {"step": "1", "loss": 1.0}, {"step": -1, "loss": 2.0}, {"step": 1.5}],
        [
            {"step": 10**400, "loss": 1.0},
            {"step": 1e300},
            {"step": True, "loss": 1.0},
            {"step": None},
            {"step": float("nan"), "loss": 1.0},
        ],
    ],
)
def test_entries_without_a_step_are_left_out(history, make_run):
    (run,) = read([make_run("run", history)])
    assert run.history == []
    assert "logged nothing yet: it is in no chart" in run.notes


def test_values_that_are_no_numbers_are_left_out(make_run):
    history = [{"step": 1, "loss": "1.0"}, {"step": 2, "loss": None}, {"step": 3, "loss": True}, {"step": 4, "loss": 2}]
    (run,) = read([make_run("run", history)])
    assert run.series("loss") == ([4], [2.0])


def test_no_pickle_is_opened(make_run):
    folder = make_run("run", logged({1: 1.0}))
    (folder / "training_args.bin").mkdir()  # opening it would raise
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == read([folder])[0].history


def test_runs_that_cannot_be_read_are_left_out(make_run, tmp_path):
    for name in ("a", "b", "c"):
        make_run(f"runs/{name}", logged({1: 1.0}), record={"optim": "cwd_lion"})
    cut = tmp_path / "runs/b/trainer_state.json", tmp_path / "runs/c/cwd_run.json"
    for path in cut:
        path.write_text(path.read_text()[:-9])
    runs, left_out = read_whole([tmp_path / "runs"])
    assert [run.name for run in runs] == ["a"]
    assert all(line.startswith(f"{path}: cannot be read as JSON") for path, line in zip(cut, left_out, strict=True))
    text = page.write(runs, tmp_path / "page", left_out=left_out).read_text(encoding="utf-8")
    assert all(f"Left out: {path}: cannot be read as JSON" in text for path in cut)
    with pytest.raises(ValueError, match=r"b.trainer_state\.json: cannot be read as JSON .*c.cwd_run\.json: cannot"):
        read_whole([tmp_path / "runs/b", tmp_path / "runs/c"])
