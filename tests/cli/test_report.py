"""``hf-cwd report``: the command on runs of the real Trainer, and its errors."""

import json
import subprocess
import sys

import pytest
from transformers import Trainer, TrainingArguments

import hf_cwd  # noqa: F401  registers the names
from hf_cwd import cli
from tests.support.tiny import tiny_data, tiny_llama

MINUS = "\N{MINUS SIGN}"


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "report", *map(str, arguments)])
    return cli.main()


def train(folder, seed, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        optim="cwd_adamw",
        learning_rate=1e-2,
        weight_decay=0.5,
        seed=seed,
        per_device_train_batch_size=4,
        include_num_input_tokens_seen="all",
        **options,
    )
    trainer = Trainer(
        model=tiny_llama(seed),
        args=args,
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(8),
    )
    trainer.train()
    return trainer


def test_runs_of_the_trainer(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        train(tmp_path / f"runs/plain-seed{seed}", seed, optim_args="cautious=false").save_state()
        train(tmp_path / f"runs/cwd-seed{seed}", seed)  # its state is in its checkpoints only
    paths = [tmp_path / "runs/plain-seed1", tmp_path / "runs"]
    capsys.readouterr()
    assert command(monkeypatch, *paths, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html\n"
    text = (tmp_path / "out/report.html").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "loss.png",
        "eval_loss.png",
        "cwd_decayed_fraction.png",
        "grad_norm.png",
        "learning_rate.png",
        "cwd_effective_decay.png",
        "cwd_update_to_weight.png",
        "cwd_update_rms.png",
        "cwd_weight_rms.png",
        "train_tokens_per_second.png",
        "num_input_tokens_seen.png",
    }
    ends = {}
    for name in ("plain-seed1", "plain-seed2", "cwd-seed1", "cwd-seed2"):
        states = [*(tmp_path / "runs" / name).glob("trainer_state.json"), tmp_path / "runs" / name / "checkpoint-6"]
        state = states[0] if states[0].is_file() else states[0] / "trainer_state.json"
        history = json.loads(state.read_text())["log_history"]
        ends[name] = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
        assert f'<th scope="row">{name}</th>' in text
        assert f"<td>{ends[name]:.4f}" in text
    assert "<td>100.0 %" in text  # plain decay decays every element
    difference = sum(ends[f"cwd-seed{seed}"] - ends[f"plain-seed{seed}"] for seed in (1, 2)) / 2
    assert f"<td>{difference:+.4f}</td>".replace("-", MINUS) in text
    assert "Two seeds are too few to rely on." in text


def test_a_directory_without_a_run(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, tmp_path)
    assert error.value.code == 2
    assert f"hf-cwd report: error: {tmp_path}: no trainer_state.json" in capsys.readouterr().err


def test_a_truncated_run_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    path = tmp_path / "cut/trainer_state.json"
    path.write_text(path.read_text()[:-5])
    assert command(monkeypatch, tmp_path, "--output", tmp_path / "page") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/page/report.html\n"
    (line,) = printed.err.splitlines()
    assert line.startswith(f"hf-cwd report: left out: {path}: cannot be read as JSON")
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, path.parent)
    assert error.value.code == 2
    assert f"hf-cwd report: error: {path}: cannot be read as JSON" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "--output", tmp_path / "file")
    assert f"{tmp_path}/file: cannot be written (File exists); give another --output" in capsys.readouterr().err


def test_without_matplotlib(tmp_path):
    """In a process of its own, where importing it fails as if it were not installed."""
    code = "import sys; sys.modules['matplotlib'] = None; from hf_cwd.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the charts need matplotlib: pip install 'hf_cwd[report]'" in done.stderr
