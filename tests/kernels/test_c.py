"""What the truth table does not say of the C kernel: threads, ends of loops and chunks, large tensors, processes.

tests/kernels/test_truth.py runs the whole table on every clone of the library.
"""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch

from hf_cwd.kernels import build, c, eager
from hf_cwd.kernels.interface import Item, Settings, Sums, Workspace
from hf_cwd.rules import RULES
from tests.kernels import truth
from tests.kernels.table import APPLY, MODES, RATES, Case, Dtypes, Parameter, settings, variations

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REASON = c.unavailable(CPU)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LEVELS = range(-1 if REASON else c._level() + 1)
CHUNK = 0 if REASON else ctypes.c_int.in_dll(c._load(), "cwd_chunk").value
# Around vectors, what is prefetched and widened at a time (32, 1024), and what a thread takes.
SIZES = (0, 1, 3, 15, 16, 17, 31, 32, 33, 63, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
# Loops of their own, a rule each, and two that are widened.
DTYPES = (
    Dtypes("float32", "float32"),
    Dtypes("bfloat16", "bfloat16"),
    Dtypes("bfloat16", "bfloat16", "float32", True),
    Dtypes("bfloat16", "bfloat16", "bfloat16"),
    Dtypes("float16", "float32", "float16"),
    Dtypes("float32", "bfloat16", "bfloat16"),
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _case(rule: str, dtypes: Dtypes, counted: bool) -> Case:
    """Every size, in turn with every variation and mode; each third tensor starts where vectors do."""
    known = variations(rule)
    chosen = [settings(known[k % len(known)], MODES[k % len(MODES)], RATES[k % len(RATES)]) for k in range(len(SIZES))]
    parameters = [Parameter(dtypes, s, k, size=SIZES[k], aligned=k % 3 == 0) for k, s in enumerate(chosen)]
    matrix = rule != APPLY and RULES[rule].matrix is not None
    return Case(f"{rule} {dtypes}", rule, tuple(parameters), "bfloat16" if matrix else None, counted and not matrix)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [*RULES, APPLY])
def test_sizes(rule, dtypes, threads):
    for level, count, counted in product(LEVELS, (1, 3), (False, True)):
        threads(count)
        with mock.patch.object(c, "_level", return_value=level):
            (problems,) = truth.run(c, "cpu", [_case(rule, dtypes, counted)]).values()
        assert not problems, "\n".join([f"{c.LEVELS[level]}, {count} threads", *problems])


def _settings(rule: str = "adamw", weight_decay: float = 0.1) -> Settings:
    hyper = tuple((name, kind.default) for name, kind in RULES[rule].hyperparameters.items())
    return Settings(hyper, 1e-3, weight_decay, True, "ge", False, "auto", False)


def _items(sizes: tuple[int, ...], given: tuple[Settings, ...]) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    tensors = [[torch.randn(n, generator=generator) for _ in range(4)] for n in sizes]
    return [Item(x, g, (m, v.abs()), None, 3, given[k % len(given)], x) for k, (x, g, m, v) in enumerate(tensors)]


MIXED = (5, 3 * CHUNK + 5, 0, CHUNK, 1, 7 * CHUNK + 1, *(40,) * 50, 2 * CHUNK)


def _stepped(team: int | None = None) -> list[torch.Tensor]:
    """A step of many tensors: the numbers, and their sums."""
    items, sums = _items(MIXED, (_settings(), _settings(weight_decay=0.0))), Sums()
    if team is None:
        c.update(RULES["adamw"], items, sums, Workspace(), None)
    else:
        with mock.patch.object(c, "_openmp", return_value=team):
            c.update(RULES["adamw"], items, sums, Workspace(), None)
    return [t for item in items for t in (item.param, *item.buffers)] + [call.numbers for call in sums.calls]


TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def _teams(members: int):
    """A runtime that starts ``members`` threads, whatever it was asked for."""

    @TEAM
    def team(work, job, asked, flags):
        del asked, flags
        run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
        started = [threading.Thread(target=run, args=(job,)) for _ in range(members)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()

    return team


def test_the_number_of_threads_changes_nothing(threads):
    threads(1)
    right = _stepped()
    for count in (2, 3, 5):
        threads(count)
        for _ in range(5):
            assert all(map(torch.equal, _stepped(), right))
        for members in (1, 2, 7):  # a runtime may give fewer, or more
            team = _teams(members)
            found = _stepped(ctypes.cast(team, ctypes.c_void_p).value)
            assert all(map(torch.equal, found, right))
    with mock.patch.object(c, "_openmp", return_value=None):
        assert c.threads() == 1
        assert all(map(torch.equal, _stepped(), right))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_master", [False, True])
def test_nan_stays_nan(level, dtype, is_master):
    """Whatever its payload: rounded like a number, the largest ones would become a zero and the least infinity."""
    if is_master and dtype != torch.bfloat16:
        return
    bits = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000, -0x400000, 0x7F80FFFF] * 9, dtype=torch.int32
    )
    x, remainder = torch.ones(len(bits), dtype=dtype), torch.zeros(len(bits), dtype=torch.int16) if is_master else None
    with mock.patch.object(c, "_level", return_value=level):
        c.apply([Item(x, x, (), remainder, 1, _settings(), x)], [bits.view(torch.float32)], [1.0], None, Workspace())
    assert x.isnan().all()
    assert remainder is None or not remainder.any()


def test_levels_are_the_processor_s():
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("no list of an x86-64's features")
    (flags, *_) = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    has_v4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags.split())
    has_v3 = {"avx2", "fma", "bmi2", "f16c"} <= set(flags.split())
    assert c._level() == (2 if has_v4 else 1 if has_v3 else -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elements_beyond_2_31(dtype):
    """The last chunks of a tensor of 2^31 + 5 elements, nearly all of which no memory was ever given to."""
    numel = 2**31 + 5
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = [mmap.mmap(-1, numel * dtype.itemsize, flags=flags) for _ in range(2)]
    except OSError as error:
        pytest.skip(f"no room for addresses: {error}")
    x, u = (torch.frombuffer(memory_, dtype=dtype) for memory_ in memory)
    tail = slice(numel - 2 * CHUNK, None)
    x[tail], u[tail] = torch.randn(2 * CHUNK), torch.randn(2 * CHUNK)
    small = Item(x[tail].clone(), u[tail], (), None, 1, _settings(), x)
    eager.apply([small], [small.grad], [0.5], None, Workspace())
    first = numel // CHUNK - 1
    with mock.patch.object(c, "_Job", lambda *values: c_job(*values, first)):
        c.apply([Item(x, u, (), None, 1, _settings(), x)], [u], [0.5], None, Workspace())
    begin = first * CHUNK - (numel - 2 * CHUNK)  # of what was stepped, in the tail
    assert torch.equal(x[tail][begin:], small.param[begin:])
    assert not torch.equal(x[tail][begin : begin + 16], u[tail][begin : begin + 16])
    assert (x[: 2 * CHUNK] == 0).all()
    assert (x[2**31 - 4 * CHUNK : 2**31 - 3 * CHUNK] == 0).all()


c_job = c._Job


def _child(script: str) -> str:
    command = [sys.executable, "-c", script]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openmp_runtime_is_torch_s():
    """A second one would spin on the cores that the first one's threads need."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no list of what is loaded")
    script = """
import pathlib, re, torch
from tests.kernels.test_c import _stepped, c
def runtimes():
    return set(re.findall(r"\\S*/lib(?:[gi]?omp)[^/\\s]*", pathlib.Path("/proc/self/maps").read_text()))
torch.ones(1 << 20).add_(1)
before = runtimes()
_stepped()
print(len(before), before == runtimes(), c.about())
"""
    assert _child(script).split(maxsplit=2) == ["1", "True", f"{c.LEVELS[c._level()]}, 2 threads\n"]


def test_after_a_fork():
    """The runtime's threads stay behind in the parent; a child that waited for them would wait for ever.

    The child calls nothing of torch that has threads: that does wait.
    """
    script = """
import os, signal
from tests.kernels.test_c import MIXED, RULES, _items, _settings, c, Workspace
def step(items):
    c.update(RULES["adamw"], items, None, Workspace(), None)
    return [t.numpy().tobytes() for item in items for t in (item.param, *item.buffers)]
here, there = (_items(MIXED, (_settings(),)) for _ in range(2))
right = step(here)
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(0 if c.threads() == 1 and step(there) == right else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), c.threads())
"""
    assert _child(script) == "0 2\n"


def test_host_time():
    """300 small tensors take 0.4 ms here; the bound is loose, for machines that are slow or have other work."""
    items = _items((64,) * 300, (_settings(), _settings(weight_decay=0.0)))

    def seconds() -> float:
        start = time.process_time()
        c.update(RULES["adamw"], items, None, Workspace(), None)
        return time.process_time() - start

    assert min(seconds() for _ in range(20)) < 2e-3


def test_refusals():
    f32, f64 = torch.float32, torch.float64
    adamw = RULES["adamw"]
    assert c.refusal(adamw, (f32, torch.bfloat16, f32, torch.float16)) is None
    assert c.refusal(adamw, (f64, f64, f64, f64)) == "float64 parameters"
    assert c.refusal(adamw, (f32, f64, f32, f32)) == "float64 gradients"
    assert c.refusal(adamw, (f32, f32, f32, f64)) == "float64 states"
    assert c.refusal_to_apply((f32, f64)) == "float64 directions"
    other = mock.Mock(direction=lambda *_: None)
    other.name = "other"
    assert c.refusal(other, (f32, f32)) == "the rule other"


def test_where_it_is_unavailable():
    assert c.unavailable(torch.device("cuda")) == "it runs on a CPU only"
    with mock.patch.object(c, "_level", return_value=-1):
        assert c.unavailable(CPU) == "this processor has no fused multiply-add"
    with mock.patch.object(c, "_load", return_value="there is no compiler"):
        assert c.unavailable(CPU) == "there is no compiler"


def test_a_failed_build_is_a_reason():
    c._load.cache_clear()
    try:
        with mock.patch.object(build, "library", side_effect=build.BuildError("cc failed")):
            assert c.unavailable(CPU) == "cc failed"
    finally:
        c._load.cache_clear()
    assert c.unavailable(CPU) is None
