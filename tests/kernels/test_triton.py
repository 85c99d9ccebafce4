"""The Triton kernels without a GPU: tables, launches and offsets in the interpreter, the arithmetic of compiled code.

Their numbers are in test_truth.py.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_cwd.kernels import interface, triton
from hf_cwd.kernels.triton import tables
from hf_cwd.rules import RULES
from tests.kernels.followed import settings
from tests.kernels.triton_compiled import SUMMED, VARIANTS
from tests.kernels.triton_risks import CASES

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
F, B = torch.float32, torch.bfloat16


def in_a_process(module, results, **environment):
    command = [sys.executable, "-m", f"tests.kernels.{module}", str(results)]
    mine = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=mine | environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return in_a_process("triton_risks", tmp_path_factory.mktemp("risks") / "results.json", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_risk(problems, name):
    assert problems[name] == []


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    return in_a_process("triton_compiled", folder / "results.json", TRITON_CACHE_DIR=str(folder / "cache"))


def count(pattern, ptx):
    return len(re.findall(rf"\b{pattern}\b", ptx))


@needs_triton
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_arithmetic(compiled, name):
    """Each operation as often as the contract has it, for the elements of a thread in a full chunk and in another."""
    ptx, operation = compiled[name], VARIANTS[name][0]
    elements = 2 * triton.BLOCK // (32 * triton.WARPS)
    fma, mul, add, sub, roots = {
        "adamw": (4, 5, 1, 1, 1),  # m, v, decay, update | g, take*g, keep*v, root_scale, direction_scale | eps | g - m
        "lion": (4, 1, 0, 1, 0),  # two averages of one difference, decay, update | g
        "momentum": (6, 2, 0, 2, 0),  # three forms of m, of which one is Nesterov's, ... | g, keep*m
        "directions": (4, 2, 0, 2, 0),
        "apply": (2, 0, 0, 0, 0),
    }[operation]
    assert count(r"fma\.rn\.f32", ptx) == fma * elements
    assert count(r"mul(\.rn)?\.f32", ptx) == mul * elements
    assert count(r"add(\.rn)?\.f32", ptx) == add * elements
    assert count(r"sub(\.rn)?\.f32", ptx) == sub * elements
    assert count(r"sqrt\.rn\.f32", ptx) == count(r"div\.rn\.f32", ptx) == roots * elements
    assert not re.search(r"\.ftz|\.approx|\.full|fma\.rn\.f64", ptx)


@needs_triton
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_memory_accesses(compiled, name):
    """A full chunk is read and written with 16 bytes a thread of the widest dtype, and without exchanges of threads."""
    ptx, (operation, x, g, s, states, rest, aligned) = compiled[name], VARIANTS[name]
    read = [g, *[s] * states, *([x] if operation != "directions" else []), *([x] if rest else [])]
    written = [x, *[s] * states, *([x] if rest else [])]
    vector = triton.vector((x, g, s)) if aligned else 1
    times = triton.BLOCK // (32 * triton.WARPS) // vector
    for kind, dtypes in (("ld", read), ("st", written)):
        for words in (4, 2):
            expected = sum(vector * dtype.itemsize == 4 * words for dtype in dtypes) * times if aligned else 0
            assert count(rf"{kind}\.global\.v{words}\.b32", ptx) == expected, (kind, words)
    assert "bar.sync" not in ptx


@needs_triton
def test_compiled_sums(compiled):
    """They change neither the step's arithmetic nor its memory accesses, and are added in fp64."""
    plain, summed = compiled[SUMMED], compiled["sums"]
    for pattern in (r"fma\.rn\.f32", r"div\.rn\.f32", r"ld\.global\.v\d\.b32", r"st\.global\.v\d\.b32"):
        assert count(pattern, summed) == count(pattern, plain) > 0, pattern
    assert len(re.findall(r"\b(?:atom|red)\.global\.\S*add\.f64", summed)) == 4
    assert not re.search(r"\b(?:atom|red)\.", plain)


def test_importing_does_not_import_triton():
    code = "import sys, hf_cwd.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@needs_triton
def test_the_layouts_of_both_sides_agree():
    ops = triton.kernels()
    for name in ("WORDS", "LENGTH", "ROW", "FIELDS", "SOURCES", "PLACES"):
        assert getattr(ops, name).value == getattr(tables, name), name
    assert ops.COLUMNS.value == interface.COLUMNS
    assert [getattr(ops, field.upper()).value for field in interface.Row._fields] == list(range(tables.FIELDS))


def test_every_fused_rule_has_an_operation():
    assert triton.OPERATIONS.keys() == triton.STATES.keys() == interface.FUSED.keys()


def test_items_of_a_few_settings_share_rows():
    """Settings are those of a group if they are one object: groups that are alike may part. So are steps, on a GPU."""
    empty, groups = torch.empty(0), [settings("adamw"), settings("adamw")]
    items = [interface.Item(empty, empty, (), None, 1 + k // 8, groups[k % 2], empty) for k in range(12)]
    rows = tables.rows(RULES["adamw"], items)
    assert rows.places == [0, 1] * 4 + [2, 3] * 2
    assert rows.rows == [interface.row(RULES["adamw"], items[k].settings, items[k].step) for k in (0, 1, 8, 9)]
    assert not rows.sources
    assert tables.rows_to_apply(items, [1.0] * 12).places == [0, 1] * 6, "to decay and apply, the step does not matter"
    steps = [torch.ones(()), torch.ones(())]
    items = [replace(item, step=steps[k % 2]) for k, item in enumerate(items)]
    assert tables.rows(RULES["adamw"], items).places == [0, 1] * 6


def test_a_captured_step_has_a_table_of_its_own(monkeypatch):
    """A graph's replays copy from its host memory into its table, while other steps go on."""
    monkeypatch.setattr(tables.Table, "_pinned", lambda self: self.host.clone())
    x, *grads = torch.zeros(4, 8).unbind()
    item = interface.Item(x, x, (), None, torch.ones(()), settings("sgd", capturable=True), x)
    rows, own = tables.rows_to_apply([item], [1.0]), tables.Tables()

    def written(grad, capturing):
        return own.written([(x, grad)], rows, block=4, capturing=capturing)

    eager, graph = written(grads[0], False), written(grads[1], True)
    assert eager.words.data_ptr() != graph.words.data_ptr()
    assert eager.host.data_ptr() != graph.host.data_ptr()
    before = graph.words.clone(), graph.host.clone()
    again, second = written(grads[2], False), written(grads[2], True)
    assert again is eager
    assert second is not graph
    assert torch.equal(graph.words, before[0])
    assert torch.equal(graph.host, before[1])
    assert [int(table.words[1]) for table in (eager, graph)] == [grads[2].data_ptr(), grads[1].data_ptr()]
    assert graph.launches[0].places is eager.launches[0].places, "what never changes is shared"
    assert own._captured == [graph, second], "for as long as they may be replayed"


def test_a_learning_rate_on_the_device_must_be_one_that_the_kernel_reads():
    lr = torch.tensor(1e-3, dtype=torch.bfloat16)
    item = interface.Item(lr, lr, (), None, torch.ones(()), settings("lion", lr=lr), lr)
    with pytest.raises(ValueError, match=r"lr is a tensor of torch\.bfloat16"):
        tables.rows(RULES["lion"], [item])


@pytest.mark.parametrize(
    ("rule", "dtypes", "reason"),
    [
        ("adamw", (F, F, F, F), None),
        ("adamw", (B, F, F, F), None),
        ("adamw", (torch.float16,) * 4, None),
        ("adamw", (F, F, F, B), "states of different dtypes"),
        ("adamw", (torch.float64,) * 4, "float64 parameters"),
        ("lion", (F, torch.float64, F), "float64 gradients"),
        ("lion", (F, F, torch.float8_e4m3fn), "float8_e4m3fn states"),
        ("sgd", (F, F), None),
        ("muon", (F, F, F, B), None),
        ("muon", (F, F, F, torch.float64), "float64 directions"),
    ],
)
def test_refusal(rule, dtypes, reason):
    assert triton.refusal(RULES[rule], dtypes) == reason


def test_refusal_to_apply():
    assert triton.refusal_to_apply((B, F)) is None
    assert triton.refusal_to_apply((F, torch.float64)) == "float64 directions"
    assert triton.refusal_to_apply((torch.float64, F)) == "float64 parameters"


def test_a_rule_of_somebody_else_is_refused(monkeypatch):
    monkeypatch.delitem(triton.OPERATIONS, RULES["lion"].direction)
    assert triton.refusal(RULES["lion"], (F, F, F)) == "the rule lion, which has no fused form"


def test_unavailable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in triton.unavailable(torch.device("cpu"))
    assert "CUDA" in triton.unavailable(torch.device("xpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton.unavailable(torch.device("cpu")) == "Triton is not installed"
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    sys.modules["triton"].__version__ = "3.5.1"
    assert triton.unavailable(torch.device("cpu")) == "Triton 3.5.1 is older than 3.6"
    sys.modules["triton"].__version__ = "3.10.0+git1234"
    assert triton.unavailable(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in triton.unavailable(torch.device("cuda", 0))
