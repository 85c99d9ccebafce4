"""Runs made by hand: a directory with what the Trainer would have left there."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_cwd.report import page
from hf_cwd.report.read import read

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, ids and texts; raises where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.cells, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src", "xlink:href", "action", "data") if key in attributes]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and "table" in self.open and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


def written(paths, folder):
    text = page.write(read(paths), folder).read_text(encoding="utf-8")
    return text, Page(text)


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
