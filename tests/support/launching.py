"""Real processes, and what a training script needs in a place without a hub."""

import gc
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.forking import ENVIRONMENT, ROOT, Forked
from tests.support.tiny import tiny_llama

IMPORTS = ROOT / "tests/trainer/scripts/imports.py"


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """Keeps what was imported out of the garbage collector's sight.

    Each Trainer.train() has all garbage collected, which looks at a million objects of torch and transformers and takes
    four times as long as the few steps that a test trains.
    """
    gc.collect()
    gc.freeze()


def start(*command, cwd, python=sys.executable, **environment) -> subprocess.Popen:
    """Starts `python command...`; collect it with :func:`finish`."""
    return subprocess.Popen(
        [str(python), *map(str, command)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen | Forked) -> subprocess.CompletedProcess:
    # Against a hang only: ranks that wait for each other are slowed many times over by a busy machine.
    try:
        output, errors = process.communicate(timeout=1800)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish_all(processes: list[subprocess.Popen | Forked]) -> list[subprocess.CompletedProcess]:
    """Collects processes that wait for each other: one whose output nobody reads stands still once a pipe is full."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(finish, processes))


def flags(folder: Path, **changes) -> list[str]:
    """Arguments of a script that trains on :func:`write_material`, for a few steps."""
    defaults = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.txt",
        "validation_file": folder / "valid.txt",
        "metric": ROOT / "scripts/metrics/token_accuracy.py",
        "optim": "cwd_muon",
        "optim_args": "nesterov=false",
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "remove_unused_columns": "false",
        "report_to": "none",
        "use_cpu": "true",
    }
    return [str(part) for key, value in (defaults | changes).items() for part in (f"--{key}", value)]


def launch(*command, cwd, start=start, **options) -> subprocess.CompletedProcess:
    """Runs `python command...` to its end, which must be a good one; ``start=fork`` begins with torch imported."""
    result = finish(start(*command, cwd=cwd, **options))
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def write_material(folder: Path) -> None:
    """train.txt, valid.txt, data/train.jsonl: some of the demo corpus; model/: a tiny Llama and its tokenizer."""
    with lzma.open(ROOT / "scripts/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as corpus:
        lines = [json.loads(line)["text"][:1000] for line, _ in zip(corpus, range(24), strict=False)]
    (folder / "train.txt").write_text("\n".join(lines[4:]), encoding="utf-8")
    (folder / "valid.txt").write_text("\n".join(lines[:4]), encoding="utf-8")
    (folder / "data").mkdir()
    rows = (json.dumps({"text": line}) for line in lines)
    (folder / "data" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<eos>"]}
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=320, show_progress=False, **options))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    tiny_llama(vocab_size=320).save_pretrained(folder / "model")


class Environment:
    """A virtual environment that borrows every package of this one, except hf_cwd, which it has as a link."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin/python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site_packages / "borrowed.pth").write_text("\n".join(borrowed))  # not the .pth files in there
        self.package = self.site_packages / "hf_cwd"
        self.package.symlink_to(ROOT / "hf_cwd")
        self.cwd = folder

    def start(self, *command, **environment):
        return start(*command, python=self.python, cwd=self.cwd, PYTHONDONTWRITEBYTECODE="", **environment)

    def launch(self, *command, **environment):
        return launch(*command, python=self.python, cwd=self.cwd, PYTHONDONTWRITEBYTECODE="", **environment)

    def modules(self, *options) -> set[str]:
        """What is imported when Python has started."""
        return set(
            json.loads(self.launch(*options, "-c", "import sys, json; print(json.dumps([*sys.modules]))").stdout)
        )
