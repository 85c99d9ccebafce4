"""Runs made by hand: a directory with what the Trainer would have left there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def logged(losses: dict[int, float], key: str = "loss") -> list[dict[str, Any]]:
    """Log entries from steps and values."""
    return [{"step": step, key: value, "epoch": 0.1} for step, value in losses.items()]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, history: Any, *, record: dict[str, Any] | None = None, **state: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        steps = [entry["step"] for entry in history if isinstance(entry, dict) and type(entry.get("step")) is int]
        last = max(steps, default=0)
        state = {"global_step": last, "max_steps": last, "log_history": history, **state}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        if record is not None:
            (folder / "cwd_run.json").write_text(json.dumps(record))
        return folder

    return make
