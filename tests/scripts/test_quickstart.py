"""compare.py: the two runs differ in the optimizer and in nothing else."""

import json
import re

import compare
import pytest
import torch
from matplotlib.image import imread
from transformers import Trainer

from hf_cwd.report.compare import differing
from hf_cwd.report.measures import FRACTION
from hf_cwd.report.read import read


@pytest.fixture
def recorded(monkeypatch):
    """One record a run: its Trainer, its first weights and all its batches."""
    runs = []
    original = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if not runs or runs[-1]["trainer"] is not self:
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            runs.append({"trainer": self, "weights": weights, "batches": []})
        runs[-1]["batches"].append(inputs["input_ids"].clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return runs


@pytest.fixture
def arguments(workspace, tmp_path):
    def build(*more):
        own = ["--steps", "8", "--model", workspace / "config.json", "--output_dir", tmp_path / "run"]
        passed_on = ["--train_file", workspace / "docs.jsonl", "--train_tokenizer_vocab_size", 512]
        passed_on += [
            "--cache_dir",
            workspace / "cache",
            "--block_size=64",
            "--disable_tqdm",
            "true",
            "--use_cpu",
            "true",
        ]
        return [str(part) for part in (*own, *passed_on, *more)]

    return build


def optimizer(run):
    wrapped = run["trainer"].optimizer
    return getattr(wrapped, "optimizer", wrapped)


def assert_alike(one, other):
    assert one["trainer"] is not other["trainer"]
    assert len(one["batches"]) == len(other["batches"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(one["batches"], other["batches"], strict=True))
    assert not torch.equal(one["batches"][0], one["batches"][1])
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    decays, rates = (
        [{g[key] for g in optimizer(r).param_groups} for r in (one, other)] for key in ("weight_decay", "initial_lr")
    )
    assert decays[0] == decays[1]
    assert max(decays[0]) > 0
    assert rates[0] == rates[1]
    after = [dict(run["trainer"].model.named_parameters()) for run in (one, other)]
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("optim", compare.RECIPES)
def test_both_runs_differ_in_the_optimizer_only(optim, recorded, arguments, tmp_path, capsys):
    summary = compare.main(arguments("--optim", optim))
    baseline, cwd = recorded
    assert_alike(baseline, cwd)
    if optim == "cwd_adamw":
        assert type(optimizer(baseline)) is torch.optim.AdamW
    else:
        assert type(optimizer(baseline)) is type(optimizer(cwd))
        assert not any(group["cautious"] for group in optimizer(baseline).param_groups)
    assert all(group["cautious"] for group in optimizer(cwd).param_groups)
    assert 0 < summary["runs"]["cwd"]["decayed_fraction"] < 1
    assert summary["runs"]["baseline"]["decayed_fraction"] == 1

    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    report = tmp_path / "run/report"
    for name in ("loss", "eval_loss", "cwd_decayed_fraction"):
        assert imread(report / f"{name}.png")[..., :3].std() > 0.01  # not a blank page
    text = (report / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<th scope="row">(baseline|cwd)</th><td>8</td>', text) == ["baseline", "cwd"]
    assert "Too few seeds to say anything" in text
    records = read([tmp_path / "run/baseline", tmp_path / "run/cwd"])
    assert all(run.recorded for run in records)
    apart, common = differing(records)
    assert common["learning_rate"] == compare.RECIPES[optim]["learning_rate"]
    assert common["num_parameters"] == summary["runs"]["cwd"]["num_parameters"]
    if optim == "cwd_adamw":
        assert (apart["optim"], apart["cautious"]) == (["adamw_torch", optim], [None, True])
    else:
        assert apart.keys() == {"output_dir", "optim_args", "cautious"}
        assert apart["cautious"] == [False, True]
    out = capsys.readouterr().out
    for run in summary["runs"].values():
        assert f"<td>{run['eval_loss']:.4f}" in text
        for number in (f"{run['eval_loss']:.4f}", f"{run['perplexity']:.2f}", f"{run['eval_token_accuracy']:.2%}"):
            assert number in out
    assert str(report / "report.html") in out
    assert compare.CAVEAT in out


def test_existing_output_is_no_hindrance(recorded, arguments):
    """A second call trains anew, to the same numbers."""
    first, second = compare.main(arguments()), compare.main(arguments())
    assert len(recorded) == 4
    assert_alike(recorded[1], recorded[2] | {"trainer": recorded[0]["trainer"]})
    for name in ("baseline", "cwd"):
        for key in ("train_loss", "eval_loss", "decayed_fraction"):
            assert first["runs"][name][key] == second["runs"][name][key]


def test_tokenizer_is_trained_once(recorded, arguments, workspace, tmp_path):
    """Without a tokenizer flag the first run trains it and the second loads it."""
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((workspace / "config.json").read_text()) | {"vocab_size": 4096})
    )
    argv = [
        part
        for part in arguments("--model", tmp_path / "config.json")
        if part not in ("--train_tokenizer_vocab_size", "512")
    ]
    compare.main(argv)
    one, other = (run["trainer"].processing_class for run in recorded)
    assert one.get_vocab() == other.get_vocab()
    assert 512 < len(one) <= compare.VOCABULARY
    assert (tmp_path / "run/baseline/tokenizer").is_dir()
    assert not (tmp_path / "run/cwd/tokenizer").exists()


def test_optim_args_reach_both_runs():
    assert compare.optimizers("cwd_lion", "mask=gt")["baseline"][1][-1] == "mask=gt,cautious=false"
    assert compare.optimizers("cwd_lion", "mask=gt")["cwd"][1][-1] == "mask=gt"
    # torch's AdamW would ignore them
    assert compare.optimizers("cwd_adamw", "eps=1e-6")["baseline"][1] == [
        "--optim",
        "cwd_adamw",
        "--optim_args",
        "eps=1e-6,cautious=false",
    ]


def test_own_flags_replace_the_defaults():
    args, rest = compare.parse(["--lr_scheduler_type=linear", "--logging_steps", "7", "--dataset_name", "x"])
    flags = compare.common_flags(args, rest)
    assert flags[-4:] == ["--logging_steps", "7", "--dataset_name", "x"]
    assert not {"--train_file", "--lr_scheduler_type"} & set(flags)
    assert flags.count("--logging_steps") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--weight_decay", "0"], "nothing to be cautious about"),
        (["--optim_args", "mask=gt,cautious=true"], "the comparison itself"),
        (["--optim", "adamw_torch"], "cwd_muon"),
        (["--stepz", "3"], "unknown arguments: --stepz 3"),
        (["--train_file", "nope.txt"], "nope.txt: no such file"),
        (["--learning_rate", "inf"], "--learning_rate inf: give a finite number"),
    ],
)
def test_mistakes(argv, message, refused, tmp_path):
    assert message in refused(compare, ["--output_dir", str(tmp_path), *argv])


def test_summary_counts_training_time_and_final_losses(tmp_path):
    losses = [{"step": i, "loss": float(30 - i), FRACTION: 0.25} for i in range(1, 21)]
    evaluations = [{"step": i, "eval_loss": 1.0, "eval_runtime": 2.0} for i in (10, 20, 20)]
    end = {"step": 20, "train_loss": 19.5, "train_runtime": 10.0}
    history = [*losses[:10], evaluations[0], *losses[10:], evaluations[1], end, evaluations[2]]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    metrics = {
        "train_tokens": 1200,
        "eval_loss": 1.0,
        "perplexity": 2.7,
        "eval_token_accuracy": 0.5,
        "num_parameters": 7,
    }
    summary = compare.summarise(*read([tmp_path]), metrics, plain=False)
    assert summary["train_loss"] == 10.5  # the mean of 11 and 10, the last tenth
    assert summary["train_seconds"] == 6.0  # two evaluations on the way, one after training
    assert summary["train_tokens_per_second"] == 200
    assert summary["decayed_fraction"] == 0.25
