"""gpu_check without a GPU: what it says, how its parts are run and reported, and what of them runs on a CPU."""

import gc
import json
import os
import subprocess
import sys
import time

import pytest
from bench import gpu as bench_gpu
from bench import gpu_parts as bench_gpu_parts
from bench import gpu_zero as bench_gpu_zero
from material import LLAMA
from transformers import LlamaConfig

from tests.support.launching import ROOT, finish, start

# Stands in for the parts: leaves its checks, then ends as its name says.
PROGRAM = """
import json, sys, time
name, folder, _ = sys.argv[1:]
with open(folder + "/checks.jsonl", "w") as file:
    for number, (ok, text) in enumerate([(True, ""), (True, ""), (None, "3.1 TB/s"), (name != "graph", "a" * 500)]):
        print(json.dumps({"name": f"check {number}", "ok": ok, "text": text}), file=file)
print("last words", flush=True)
if name == "waiting":
    time.sleep(60)
sys.exit(3 if name == "training" else 0)
"""
# The part zero on a CPU; under DeepSpeed, Muon decays by a tenth less than without it.
ZERO = """
import contextlib, json, sys
from bench import gpu_zero as bench_gpu_zero, gpu_zero_run as bench_gpu_zero_run, train as bench_train

@contextlib.contextmanager
def then_decaying_less(device):
    with bench_gpu_zero_run.process_group(device) as join:
        def join_and_change():
            join()
            rate, decay = bench_gpu_zero_run.OPTIMIZERS["cwd_muon"]
            bench_gpu_zero_run.OPTIMIZERS["cwd_muon"] = rate, 0.9 * decay
        yield join_and_change

bench_train.quiet()
bench_gpu_zero.process_group = then_decaying_less
checks = []
bench_gpu_zero.zero(lambda *check: checks.append(check), 1000.0, "cpu", **json.loads(sys.argv[2]))
with open(sys.argv[1], "w") as file:
    json.dump(checks, file)
"""


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each block collects garbage twice, which takes a second where so much is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(bench_gpu, "PROGRAM", path)
    monkeypatch.setattr(bench_gpu, "no_gpu", lambda: None)
    waiting = bench_gpu.PARTS["waiting"]._replace(seconds=2)
    monkeypatch.setitem(bench_gpu.PARTS, "waiting", waiting)
    return path


def test_without_a_gpu_it_says_so_in_a_line():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "scripts/gpu_check"], env=environment, cwd=os.sep, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_check: no GPU: torch ")
    assert done.stderr.count("\n") == 1


def test_without_torch_it_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu.importlib.util, "find_spec", lambda name: None)
    assert bench_gpu.main([]) == 2
    assert "has no torch" in capsys.readouterr().err


def test_a_part_that_fails_leaves_the_others(program, tmp_path, capsys):
    start = time.monotonic()
    assert (
        bench_gpu.main(["--parts", "graph", "waiting", "training", "step", "--json", str(tmp_path / "all.json")]) == 1
    )
    assert time.monotonic() - start < 30
    text = capsys.readouterr().out
    assert "FAIL graph: check 3: aaa" in text
    assert "FAIL waiting: end of the part: stopped after 2 s: last words" in text
    assert "FAIL training: end of the part: exit status 3: last words" in text
    assert "ok   step: 2 checks: check 0, check 1" in text
    assert "-    step: check 2: 3.1 TB/s" in text
    assert "FAILED: graph, waiting, training in" in text
    assert max(map(len, text.splitlines())) <= bench_gpu.WIDTH
    assert (tmp_path / "all.json").stat().st_size > 0


def test_all_is_well(program, capsys):
    assert bench_gpu.main(["--parts", "step", "train"]) == 0
    assert "\npassed in " in capsys.readouterr().out


def test_no_time_is_a_failure(program, capsys):
    assert bench_gpu.main(["--parts", "step", "--seconds", "5"]) == 1
    assert "FAIL step: not run: 5 s are over" in capsys.readouterr().out


def test_all_lines_fit():
    checks = [{"name": f"number {k}", "ok": None if k % 2 else False, "text": "x" * 200} for k in range(100)]
    total = 0
    for part in bench_gpu.PARTS:
        shown = bench_gpu.lines(part, checks)
        assert shown[0].startswith("FAIL")
        assert "more lines are in --json" in shown[-1]
        total += sum(len(line) + 1 for line in shown)
    assert total < 7500  # and a table of 9 lines


def test_parts_exist():
    assert all(callable(getattr(bench_gpu_parts, name)) for name in bench_gpu.PARTS)


def test_optimizers_of_the_parts():
    for make in bench_gpu_parts.optimizers().values():
        (one, params), (other, others) = make("cpu"), make("cpu")
        for step in range(2):
            for optimizer, some in ((one, params), (other, others)):
                bench_gpu_parts.new_gradients(some, step)
                optimizer.step()
        assert bench_gpu_parts.differing((one, other), (params, others)) == []
        one.step()
        assert any("step" in wrong for wrong in bench_gpu_parts.differing((one, other), (params, others)))


def test_training_part():
    found = []
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    given = {"config": config, "batch_size": 8, "block_size": 32}
    bench_gpu_parts.training(lambda *check: found.append(check), "cpu", 15, **given)
    assert len(found) == len(bench_gpu_parts.TRAININGS)
    assert [name for name, ok, _ in found if not ok] == [], found


def test_kernels_part():
    found = []
    bench_gpu_parts.kernels(lambda name, ok, text: found.append((name, ok, text)), ("c:cpu", "eager:cpu", "none:cpu"))
    assert [(name, ok) for name, ok, _ in found] == [("c on cpu", True), ("eager on cpu", True), ("none on cpu", False)]
    assert "166 of 166 cases right" in found[0][2]


def test_zero_part(tmp_path):
    """In a process of its own, for it joins a group and changes the environment."""
    (tmp_path / "child.py").write_text(ZERO)
    given = {"names": ["cwd_adamw", "cwd_muon"], "cases": [("zero2", "fp32"), ("zero3_offload", "bf16")]}
    given["model"] = {key: value for key, value in LLAMA.items() if key not in ("model_type", "attention_dropout")}
    arguments = tmp_path / "checks.json", json.dumps(given)
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = finish(start(tmp_path / "child.py", *arguments, cwd=tmp_path, PYTHONPATH=path))
    assert (tmp_path / "checks.json").exists(), done.stdout + done.stderr
    found = {name: (ok, text) for name, ok, text in json.loads((tmp_path / "checks.json").read_text())}
    assert list(found) == ["without DeepSpeed", "checkpoint", "zero2 fp32", "zero3_offload bf16"]
    assert found["checkpoint"][0], found
    assert found["zero3_offload bf16"][0], found
    ok, text = found["zero2 fp32"]
    assert not ok
    assert text.startswith("muon: ValueError: "), text
    assert "of the way off, more than 5e-03; of the way off: adamw " in text


def test_zero_part_without_deepspeed(monkeypatch):
    monkeypatch.setattr(bench_gpu_zero.importlib.util, "find_spec", lambda name: None)
    found = []
    bench_gpu_zero.zero(lambda *check: found.append(check))
    assert found == [("deepspeed", None, "not installed: nothing to check")]


def test_a_check_that_raises_fails_alone():
    found = []

    def check():
        raise RuntimeError("no\n  such thing")

    bench_gpu_parts.attempt(lambda *check: found.append(check), "this one", check)
    assert found == [("this one", False, "RuntimeError: no such thing")]
