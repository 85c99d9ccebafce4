"""Settings: what is known of them, which differ, and how the page says so."""

import pytest

from hf_cwd.report import settings_tables
from hf_cwd.report.compare import differing
from hf_cwd.report.read import read
from tests.report.conftest import logged, written

RECORD = {
    "arguments": {"optim": "cwd_muon", "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": -1, "seed": 1},
    "optimizer": {"optimizer_class": "CWDMuon", "weight_decay": 0.3, "adamw_betas": [0.9, 0.95]},
    "model": {"model_class": "LlamaForCausalLM", "num_parameters": 1164160, "num_trainable": 1164160},
    "world_size": 2,
    "versions": {"hf_cwd": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}


def changed(**arguments):
    return {**RECORD, "arguments": {**RECORD["arguments"], **arguments}}


def folds(text):
    """The summaries of what is folded away, and whether it is open."""
    return {
        part.split("</summary>")[0].split("<summary>")[1]: part.startswith(" open")
        for part in text.split("<details")[1:]
    }


def test_names_and_sections_of_a_record(make_run):
    folder = make_run("run", logged({8: 1.0}), record=RECORD)
    (folder / "config.json").write_text('{"hidden_size": 32}')
    (run,) = read([folder])
    settings = run.settings
    assert settings.values["weight_decay"] == 0.1  # an argument has its own name, in every run
    assert settings.values["optimizer.weight_decay"] == 0.3
    assert settings.values["max_steps"] == 8  # as it came to be
    sections = {
        "optim": "Optimizer",
        "max_steps": "Training arguments",
        "adamw_betas": "Optimizer",
        "num_parameters": "Model",
        "torch": "Versions",
    }
    assert {key: settings.sections[key] for key in sections} == sections
    assert settings.sections["world_size"] == "Other"
    assert settings.sections["model.hidden_size"] == "Model configuration"


def test_settings_that_differ_come_first_and_others_are_folded(make_run, tmp_path):
    paths = [
        make_run("a", logged({1: 1.0}), record=changed(output_dir="runs/a")),
        make_run("b", logged({1: 1.0}), record=changed(learning_rate=3e-4, warmup_steps=5, output_dir="runs/b")),
    ]
    text, parsed = written(paths, tmp_path / "out")
    head = parsed.cells.index(["Setting", "Of", "a", "b"])
    assert parsed.cells[head + 1 : head + 3] == [
        ["learning_rate", "Optimizer", "0.001", "0.0003"],
        ["warmup_steps", "Training arguments", "not set", "5"],
    ]
    assert parsed.cells[head + 3] == ["Setting", "Value"]  # output_dir is no setting that matters
    assert ["num_parameters", "1,164,160"] in parsed.cells
    assert ["b", "runs/b"] in parsed.cells
    assert folds(text) == {
        "Optimizer: 5 settings that all runs have in common": False,
        "Training arguments: 2 settings that all runs have in common": False,
        "Model: 3 settings that all runs have in common": False,
        "Other: 1 setting that all runs have in common": False,
        "Versions: 3 settings that all runs have in common": False,
        "Names and places": False,
    }


def test_of_one_run_the_arguments_are_folded(make_run, tmp_path):
    text, _ = written([make_run("a", logged({1: 1.0}), record=RECORD)], tmp_path / "out")
    found = folds(text)
    assert found["Training arguments: 2 settings"] is False
    assert found["Optimizer: 6 settings"] is True


def test_seeds_share_a_column(make_run, tmp_path):
    records = {"a-seed1": changed(), "a-seed2": changed(seed=2), "b": changed(weight_decay=0)}
    _, parsed = written([make_run(n, logged({1: 1.0}), record=r) for n, r in records.items()], tmp_path / "out")
    assert ["Setting", "Of", "a", "b"] in parsed.cells
    assert ["seed", "Training arguments", "1, 2", "1"] in parsed.cells
    assert ["weight_decay", "Optimizer", "0.1", "0"] in parsed.cells


def test_many_settings_are_rows(make_run, tmp_path):
    paths = [make_run(f"lr{i}", logged({1: 1.0}), record=changed(learning_rate=float(i))) for i in range(9)]
    _, parsed = written(paths, tmp_path / "out")
    assert ["Run", "learning_rate"] in parsed.cells
    assert ["lr3", "3"] in parsed.cells


def test_what_is_not_known_is_no_difference(make_run, tmp_path):
    """A run without a record, and one whose configuration was not saved, beside a run that says everything."""
    whole, bare = make_run("whole", logged({1: 1.0}), record=RECORD), make_run("bare", logged({1: 1.0}))
    (whole / "config.json").write_text('{"hidden_size": 32}')
    (bare / "README.md").write_text("### Training hyperparameters\n- learning_rate: 0.002\n- optimizer: some words\n")
    unsaved = make_run("unsaved", logged({1: 1.0}), record=RECORD)
    apart, common = differing(read([whole, bare, unsaved]))
    assert apart == {"learning_rate": [1e-3, 2e-3, 1e-3]}
    assert (common["model.hidden_size"], common["weight_decay"], common["optimizer"]) == (32, 0.1, "some words")
    _, parsed = written([whole, bare], tmp_path / "out")
    assert ["learning_rate", "Optimizer", "0.001", "0.002"] in parsed.cells


VERSIONS = "hf_cwd 0.1.0, transformers 5.23.0, torch 2.13.0"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (RECORD, f"LlamaForCausalLM with 1.164 M parameters; 2 processes; {VERSIONS}"),
        (None, f"LlamaForCausalLM with 1.164 M parameters; 2 processes; {VERSIONS}"),
        ({**RECORD, "model": {"model_class": "LlamaForCausalLM"}, "world_size": 1}, f"LlamaForCausalLM; {VERSIONS}"),
        ({**RECORD, "versions": {}, "model": {}, "world_size": 1}, ""),
    ],
    ids=["alike", "no record", "other", "less"],
)
def test_what_trained_is_said_where_all_runs_agree(second, said, make_run, tmp_path):
    paths = [make_run("a", logged({1: 1.0}), record=RECORD), make_run("b", logged({1: 1.0}), record=second)]
    assert settings_tables.facts(read(paths)) == said
    text, _ = written(paths, tmp_path / "out")
    assert f'<p class="muted">{said}.</p>' in text if said else '<p class="muted">' not in text


def test_what_is_trained_of_a_model(make_run):
    record = {**RECORD, "model": {**RECORD["model"], "num_trainable": 5000}}
    runs = read([make_run("a", logged({1: 1.0}), record=record)])
    assert settings_tables.facts(runs).startswith("LlamaForCausalLM with 1.164 M parameters, 5,000 of them trained; 2")
