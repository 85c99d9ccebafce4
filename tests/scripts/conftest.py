"""A corpus and a model small enough to train for real in a second."""

import json
import lzma
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # as Python does for `python scripts/pretrain.py`

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,  # so that a resumed run must also restore the state of the random numbers
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """docs.jsonl, 200 documents of the demo corpus cut short; config.json; cache/."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "config.json").write_text(json.dumps(CONFIG))
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
        "optim": "cwd_adamw",
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
    }

    def build(**changes) -> list[str]:
        return [
            str(part)
            for key, value in (defaults | changes).items()
            if value is not None
            for part in (f"--{key}", value)
        ]

    return build
