"""Text, images, and models small enough to train for real in a second."""

import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from common.lm_data import train_tokenizer
from common.usage import command
from datasets import Dataset
from digits import write
from material import LLAMA, TEMPLATE, VIT
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

ROOT = Path(__file__).resolve().parents[2]
# For every script.
DEFAULTS = {
    "optim": "cwd_adamw",
    "weight_decay": 0.1,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
    "use_cpu": "true",
    "dataloader_pin_memory": "false",
}


@pytest.fixture
def refused(monkeypatch, capfd):
    """`refused(module, argv)`: the one line by which a script, run as a command, says what is wrong; it ends with 2."""

    def run(module: ModuleType, argv: list[str]) -> str:
        script = f"{module.__name__}.py"
        monkeypatch.setattr(sys, "argv", [script, *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(module.main)
        assert stop.value.code == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{script}: error: "))
        assert printed.endswith(f"{line}\n")
        return line.removeprefix(f"{script}: error: ")

    return run


def command_line(options: dict[str, Any]) -> list[str]:
    """The options, on top of the defaults, as arguments of a script; None leaves one out."""
    pairs = (DEFAULTS | options).items()
    return [str(part) for key, value in pairs if value is not None for part in (f"--{key}", value)]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """docs.jsonl, 200 documents of the demo corpus cut short; config.json; cache/."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    with lzma.open(ROOT / "scripts/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as corpus:
        speeches = [json.loads(line) for line in corpus][:200]
    rows = [json.dumps({"text": speech["text"][:1500], "year": speech["year"]}) for speech in speeches]
    (folder / "docs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def flags(workspace):
    """`flags(output_dir=..., optim=...)`: arguments of pretrain.py, on top of tiny defaults; None leaves one out."""
    defaults = {
        "config_name": workspace / "config.json",
        "train_tokenizer_vocab_size": 512,
        "train_file": workspace / "docs.jsonl",
        "block_size": 64,
        "cache_dir": workspace / "cache",
        "output_dir": workspace / "unused",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
    }
    return lambda **changes: command_line(defaults | changes)


@pytest.fixture(scope="session")
def model(workspace) -> Path:
    """The tiny Llama with a tokenizer and a chat template."""
    folder = workspace / "chat model"
    documents = Dataset.from_json(str(workspace / "docs.jsonl"), cache_dir=str(workspace / "cache"))
    tokenizer = train_tokenizer(documents, text_column="text", vocab_size=512)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(workspace / "config.json")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(workspace) -> list[str]:
    lines = (workspace / "docs.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines][:40]


@pytest.fixture(scope="session")
def pairs(workspace, texts) -> Path:
    """40 real prompts and completions; the last two of each twenty are held out."""
    path = workspace / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": t[:30], "completion": t[30:60]}) for t in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def arguments(flags, model, pairs):
    """As `flags`, for finetune.py."""
    defaults = {
        "config_name": None,
        "train_tokenizer_vocab_size": None,
        "block_size": None,
        "model_name_or_path": model,
        "train_file": pairs,
        "max_length": 64,
        "validation_split_percentage": 10,
    }
    return lambda **changes: flags(**(defaults | changes))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """What scripts/digits.py writes, and config.json."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "config.json").write_text(json.dumps(VIT))
    write(folder)
    return folder


@pytest.fixture(scope="session")
def image_flags(digits):
    """As `flags`, for classify_images.py."""
    defaults = {
        "config_name": digits / "config.json",
        "train_dir": digits / "train",
        "validation_dir": digits / "validation",
        "output_dir": digits / "unused",
        "learning_rate": 5e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
    }
    return lambda **changes: command_line(defaults | changes)
