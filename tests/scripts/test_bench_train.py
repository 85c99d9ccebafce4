"""bench/train.py: a run of the real Trainer, and what it refuses."""

import gc
import itertools
import json

import pytest
import torch
from bench import train as bench_train
from material import LLAMA
from transformers import LlamaConfig

from tests.support.forking import free_port
from tests.support.launching import ROOT, finish, start

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


def test_a_run_under_deepspeed(config, tmp_path):
    sizes = {"batch_size": 1, "block_size": 16, "steps": 2, "warmup": 1, "rounds": 1, "device": "cpu", "threads": 1}
    given = {"config_name": config, "json": tmp_path / "train.json", **sizes}
    given |= {"deepspeed": ROOT / "configs/deepspeed/zero2.json"}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = finish(
        start(*launcher, ROOT / "scripts/bench/train.py", *flags, "--optimizers", "cwd_lion", "cwd_muon", cwd=tmp_path)
    )
    assert (tmp_path / "train.json").stat().st_size, done.stderr
    run = json.loads((tmp_path / "train.json").read_text())
    assert (run["processes"], run["deepspeed"], run["left_out"]) == (2, "zero2.json", {})
    for row in run["optimizers"].values():
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / (row["step_ms"] / 1e3), rel=0.5)
        assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert done.stdout.count("machine: ") == 1, "one process reports"
    assert "1 x 16 tokens a step in each of 2 processes, zero2.json" in done.stdout


def test_other_optimizers_are_what_accelerate_makes_of_them():
    path = ROOT / "configs/deepspeed/zero2_offload.json"
    assert bench_train.deepspeed_config(path, "cwd_adamw")["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in bench_train.deepspeed_config(path, "adamw_torch")


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
    "deepspeed": (["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json: no such file"),
    "torchrun": (["--deepspeed", __file__], "--deepspeed: start it by torchrun, also a single process"),
    "size": (["--steps", "0"], "--steps 0: give at least 1"),
    "config": (["--config_name", "nowhere.json"], "--config_name nowhere.json: no such file"),
    "twice": (["--optimizers", "cwd_adamw", "cwd_adamw"], "each once; the baseline is run twice as it is"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench_train.main(argv)
    assert message in capsys.readouterr().err
