"""bench_train.py: a run of the real Trainer, and what it refuses."""

import gc
import itertools
import json

import bench_train
import pytest
import torch
from material import LLAMA
from transformers import LlamaConfig

OPTIMIZERS = ["adamw_torch_fused", "cwd_adamw", "cwd_muon:nesterov=false", "cwd_lion:warp=9"]


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each block collects garbage twice, which takes a second where so much is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_a_run(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_train, "quiet", lambda: None)  # it is for the whole process
    sizes = {"batch_size": 2, "block_size": 16, "steps": 2, "warmup": 1, "rounds": 2, "device": "cpu"}
    given = {"config_name": config, "json": tmp_path / "train.json", **sizes}.items()
    flags = [str(part) for name, value in given for part in (f"--{name}", value)]
    bench_train.main([*flags, "--optimizers", *OPTIMIZERS])
    run = json.loads((tmp_path / "train.json").read_text())
    assert list(run["optimizers"]) == [*OPTIMIZERS[:3], "adamw_torch_fused again"]
    assert "ValueError" in run["left_out"]["cwd_lion:warp=9"]
    assert (run["rounds"], run["same"]["conclusive"]) == (2, False)
    for row in run["optimizers"].values():
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / (row["step_ms"] / 1e3), rel=0.5)
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        assert 0 < row["share"] < 1
        assert len(row["step_ms_of_rounds"]) == 2
    same = run["optimizers"]
    assert same["adamw_torch_fused"]["loss"] == same["adamw_torch_fused again"]["loss"]  # the same training
    text = capsys.readouterr().out
    assert "INCONCLUSIVE" in text
    assert "left out: cwd_lion:warp=9" in text
    assert text.startswith("machine: ")


def test_a_model_learns_the_rows(tmp_path):
    given = {"dtype": "bfloat16", "bf16": False, "batch_size": 8, "block_size": 32, "logging_steps": 10}
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    found = bench_train.train(
        config, "cwd_adamw:master=remainder", "cpu", str(tmp_path), 28, 2, learning_rate=1e-2, **given
    )
    assert found["losses"][-1] < 0.8 * found["losses"][0]


def test_rows_are_walks_along_one_cycle():
    found = bench_train.rows(100, 16, 5)
    follows = {}
    for row in found:
        tokens = row["input_ids"].tolist()
        assert len(tokens) == 16
        for first, second in itertools.pairwise(tokens):
            assert follows.setdefault(first, second) == second
    assert all(
        torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(found, bench_train.rows(100, 16, 5), strict=True)
    )


ERRORS = {
    "size": (["--steps", "0"], "--steps 0: give at least 1"),
    "config": (["--config_name", "nowhere.json"], "--config_name nowhere.json: no such file"),
    "twice": (["--optimizers", "cwd_adamw", "cwd_adamw"], "each once; the baseline is run twice as it is"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench_train.main(argv)
    assert message in capsys.readouterr().err
