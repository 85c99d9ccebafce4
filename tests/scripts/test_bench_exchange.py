"""bench/exchange.py: two real processes, and what it refuses."""

import json
import os

import pytest
import torch
from bench import exchange as bench_exchange

from hf_cwd.distributed.geometry import Mesh, Shard
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, plan
from hf_cwd.newton_schulz.matrices import MatrixLayout
from tests.support.launching import ROOT, launch

LAYERS, HIDDEN, INNER, EXCHANGE_BYTES = 2, 16, 48, 4096


def test_two_processes(tmp_path):
    options = {"hidden": HIDDEN, "layers": LAYERS, "exchange_bytes": EXCHANGE_BYTES, "steps": 2, "json": "numbers.json"}
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = launch(ROOT / "scripts/bench/exchange.py", "--processes", 2, *flags, cwd=tmp_path)

    layer = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
    stage = Stage.of("muon", {"ns": "auto", "ns_steps": 5, "ns_coefficients": "quintic", "ns_dtype": "float32"})
    mesh = Mesh((2,), (0, 1), (Shard(0),))
    entries = [
        Entry(str(i), shape, MatrixLayout(), mesh, stage, torch.float32, i) for i, shape in enumerate(layer * LAYERS)
    ]
    planned = plan(entries, exchange_bytes=EXCHANGE_BYTES)
    (result,) = json.loads((tmp_path / "numbers.json").read_text())["results"]
    total = 4 * sum(rows * columns for rows, columns in layer * LAYERS)
    assert result["rounds"] == planned.rounds > 1
    assert result["received"] == [planned.received[0], planned.received[1]]
    assert sum(result["received"]) == total  # each rank 2 (W - 1) / W * N / W of N bytes, on average
    assert result["gathered"] == [total / 2, total / 2]
    seconds = result["seconds"]
    assert sorted(seconds) == ["communication", "full_gather", "orthogonalisation", "together"]
    assert min(seconds.values()) > 0

    head, rows = done.stdout.split("\n\n")[:2]
    assert f"{LAYERS} layers of a Llama of width {HIDDEN}" in head
    assert f"{os.cpu_count()} cores, torch {torch.__version__}" in head
    assert "load: " in head
    names = [line.rpartition("  ")[0].strip() for line in rows.splitlines()[2:]]
    assert names == list(bench_exchange.ROWS.values())
    assert f"{max(result['received']) / 1e6:.2f}" in rows
    assert f"{seconds['together'] * 1e3:.1f}" in rows


ERRORS = {
    "one process": (["--processes", "1"], "--processes 1: nothing is exchanged by fewer than 2"),
    "odd": (["--layout", "hsdp", "--processes", "3"], "--processes 3: --layout hsdp has two replicas"),
    "shape": (["--shapes", "16,4096"], "--shapes 16,4096: write ROWSxCOLUMNS"),
    "size": (["--hidden", "0"], "--hidden 0: give at least 1"),
    "device": (["--device", "abacus"], "--device abacus: torch finds no such device"),
    "torchrun": (["--processes", "2"], "--processes: torchrun has started the processes already"),
}


@pytest.mark.parametrize(("argv", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(argv, message, monkeypatch, capsys, request):
    if request.node.callspec.id == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bench_exchange.main(argv)
    assert message in capsys.readouterr().err
