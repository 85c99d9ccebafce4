"""README's figures of what a step costs are what `hf-cwd explain` prints."""

import re
import sys

import pytest

from hf_cwd.cli import main
from tests.support.launching import ROOT

HEAD = "| model | GPUs | layout | weights | gradients | states, masters | buffers | received | orthogonalised |"


def rows():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def number(text):
    return float(text.split()[0].replace(",", ""))


def figures(model, world, layout, capsys, monkeypatch):
    """The columns of the table of ranks, each with its largest number."""
    flags = f"--optim cwd_muon --weight_decay 0.1 --dtype bfloat16 --layout {layout} --world {world}".split()
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", str(ROOT / f"configs/models/{model}.json"), *flags])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ranks "))
    cells = [re.split(r"\s{2,}", line) for line in lines[start + 1 :]]
    table = [[number(cell) for cell in line[1:]] for line in cells if len(line) == 7]
    weights, gradients, states, buffers, received, work = map(max, zip(*table, strict=True))
    memory = [f"{mebibytes * 2**20 / 1e9:.1f} GB" for mebibytes in (weights, gradients, states, buffers)]
    return [*memory, f"{received / 1e9:.2f} GB", f"{work / 1e3:,.0f} TFLOP"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: "-".join(row[:3]))
def test_cost_of_a_step(row, capsys, monkeypatch):
    model, world, layout, *told = row
    assert told == figures(model.strip("`"), world, layout.strip("`"), capsys, monkeypatch)


def test_models_and_worlds_are_told():
    assert {row[0] for row in rows()} == {"`olmo-1b`", "`llama-7b`", "`llama-70b`"}
    assert {row[1] for row in rows()} == {"8", "64", "1024"}
