"""Every kernel against the truth table: on every clone of the C library, and in Triton's interpreter."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hf_cwd import kernels
from hf_cwd.kernels import c, eager, interface
from hf_cwd.rules import COMMON, RULES
from tests.kernels import by_hand, mutants, truth
from tests.kernels.numbers import crossing
from tests.kernels.table import APPLY, DECAYS, MODES, VARIATIONS, Case, at_call, dtypes_of, variations
from tests.support.reference import arithmetic

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Results = dict[str, Any]
PARTS = ("table", "by hand")


def _all_of(kernel: Any, threads: int = 1, **options: bool) -> Results:
    cases, before = truth.cases(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            "table": truth.run(kernel, "cpu", cases, **options),
            "by hand": truth.run(kernel, "cpu", by_hand.CASES, **options),
            "mutants": mutants.noticed(kernel, truth.cases(few=True), **options),
        }
    finally:
        torch.set_num_threads(before)


def _c(level: int, threads: int) -> Results:
    with mock.patch.object(c, "_level", return_value=level):
        return _all_of(c, threads)


def _triton() -> Results:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.kernels.triton_child", str(results)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return json.loads(results.read_text()) if done.returncode == 0 else {"failure": done.stderr}


def _runs() -> dict[str, Callable[[], Results]]:
    found = {"eager": functools.partial(_all_of, eager, eager=True)}
    levels = range(-1 if c.unavailable(CPU) else c._level() + 1)
    found |= {f"c {c.LEVELS[level]}": functools.partial(_c, level, 1) for level in levels}
    if levels:
        found["c in 3 threads"] = functools.partial(_c, levels[-1], 3)
    return found | {"triton interpreted": _triton}


RUNS = _runs()
FUSED = [run for run in RUNS if run != "eager"]


@functools.cache
def _results(run: str) -> Results:
    return RUNS[run]()


def results(run: str, part: str) -> Any:
    if run == "triton interpreted":
        pytest.importorskip("triton")
    found = _results(run)
    assert "failure" not in found, found["failure"][-3000:]
    return found[part]


def _asked() -> list[tuple[str, str, str]]:
    names = {"table": [case.name for case in truth.cases()], "by hand": [case.name for case in by_hand.CASES]}
    few = truth.cases(few=True)
    names |= {"few": [case.name for case in few], "capturable": [case.name for case in truth.for_capturable(few)]}
    found = [(run, part, name) for run in RUNS if "triton" not in run for part in PARTS for name in names[part]]
    triton = (("table", "few"), ("capturable", "capturable"), ("by hand", "by hand"))
    return found + [("triton interpreted", part, name) for part, which in triton for name in names[which]]


ASKED = _asked()


@pytest.mark.parametrize(("run", "part", "case"), ASKED, ids=map(", ".join, ASKED))
def test_kernel(run, part, case):
    problems = results(run, part)[case]
    assert not problems, "\n".join(problems[:10])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mutant", [*mutants.OF_SETTINGS, *mutants.OF_ROWS])
def test_mutants_are_noticed(run, mutant):
    """By each operation's cases by themselves: a kernel that drops the mask of one rule fails (house rule 1)."""
    if mutant in mutants.OF_ROWS and run == "eager":
        return  # it has no rows; tests/rules/test_mutations.py twists the definition that it follows
    noticed = results(run, "mutants")[mutant]
    assert {name.split()[0] for name in noticed} == {rule for rule in RULES if RULES[rule].matrix is None} | {APPLY}
    assert set(noticed.values()) == {mutant not in mutants.HARMLESS}, noticed


# --- Nothing is missing from the table ---


def test_every_rule_and_kernel_is_in_the_table():
    assert set(VARIATIONS) == set(RULES) == set(arithmetic.DIRECTIONS)
    assert {RULES[name].direction for name in VARIATIONS} == set(interface.FUSED)
    assert {case.rule for case in by_hand.CASES} == {*RULES, APPLY}
    assert {run.split()[0] for run in RUNS} >= set(kernels.KERNELS) - ({"c"} if c.unavailable(CPU) else set())
    assert set(kernels.KERNELS) == {"eager", "c", "triton"} == set(COMMON["kernel"].choices) - {"auto"}


def test_the_c_kernel_is_there():
    """A machine without a compiler tests the other kernels only, and says so."""
    if reason := c.unavailable(CPU):
        pytest.skip(reason)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("rule", [*VARIATIONS, APPLY])
def test_the_table_has_everything(rule, few):
    cases = [case for case in truth.cases(few=few) if case.rule == rule]
    assert len({case.name for case in cases}) == len(cases)
    seen = [(p.dtypes, p.settings) for case in cases for p in case.parameters]

    def mode(settings: arithmetic.Settings) -> Any:
        factor = float(settings.weight_decay != 0)
        return (factor, settings.cautious, settings.mask), settings.maximize

    assert set(dict(seen)) == set(dtypes_of(rule))
    kinds = {(s.hyper, s.step, s.scale, mode(s)) for _, s in seen if s.lr}
    assert kinds >= {(*variation, mode) for variation in variations(rule) for mode in MODES}
    assert {(d, mode(s)) for d, s in seen} >= {(d, mode) for d in dtypes_of(rule) for mode in MODES}
    assert {p.aligned for case in cases for p in case.parameters} == {True, False}
    assert {0, 1} <= {p.size for case in cases for p in case.parameters}
    if rule != APPLY and RULES[rule].matrix is not None:
        assert {case.out for case in cases} == {"float32", "bfloat16"}
        return
    assert {case.counted for case in cases if "in one call" not in case.name} == {True, False}
    for settings in (s for s in {s for _, s in seen} if s.weight_decay and s.cautious):
        results = [
            r for case in cases for p, r in zip(case.parameters, case.expected(), strict=True) if p.settings == settings
        ]
        assert 0 < sum(r.sums[0] for r in results) < sum(len(r.u) for r in results)


def test_steps_and_betas():
    assert {step for given in VARIATIONS.values() for _, step in given} >= {1, 2, 1000, 1_000_000}
    for rule in ("adamw", "lion"):
        for k in range(2):
            betas = {hyper.get("betas", (0.9, 0.9))[k] for hyper, _ in VARIATIONS[rule]}
            assert min(betas) < 0.5 < max(betas)
    for rule in ("muon", "sgd"):
        momenta = {hyper["momentum"] for hyper, _ in VARIATIONS[rule] if rule == "muon" or hyper.get("ema")}
        assert min(momenta) < 0.5 < max(momenta)
    assert {decay[:2] for decay in DECAYS} == {(1.0, True), (1.0, False), (0.0, True)}


@pytest.mark.parametrize("full", [False, True])
def test_every_special_value_meets_every_other(full):
    levels = np.stack(crossing(full))
    for a in range(4):
        for b in range(a):
            assert len({tuple(pair) for pair in levels[[a, b]].T}) == 13**2
    if full:
        assert len({tuple(triple) for triple in levels[:3].T}) == 13**3
    rows = [case for case in truth.cases(few=not full) if case.name.startswith("adamw float32 float32 float32")]
    assert rows
    for parameter in rows[0].parameters:
        numbers = parameter.numbers("adamw")
        pairs = {(x.tobytes(), g.tobytes()) for x, g in zip(numbers.param.bits, numbers.grad.bits, strict=True)}
        assert len(pairs) >= 13**2


@pytest.mark.parametrize("case", by_hand.CASES, ids=lambda case: case.name)
def test_the_reference_by_hand(case):
    (example,) = case.parameters
    right, given, settings = example.result, example.given, at_call(example.settings, 0)
    u, states, finite = given.grad.wide, [], True
    if case.rule != APPLY:
        u, states, finite = arithmetic.directed(case.rule, given.grad, given.states, settings)
    found = arithmetic.stepped(given.param, given.remainder, u, states, settings, finite)
    if case.out:
        pairs = [(arithmetic.Stored.of(u, case.out), arithmetic.Stored.of(right.u, case.out))]
    else:
        pairs = [(found.param, right.param)]
        if right.sums is not None:
            np.testing.assert_array_equal(found.sums[: len(right.sums)], right.sums)
    for a, b in [*pairs, *zip(states, right.states, strict=True)]:
        assert ((a.bits == b.bits) | (np.isnan(a.wide) & np.isnan(b.wide))).all(), (a.wide, b.wide)
    if right.remainder is not None:
        assert found.remainder.tolist() == right.remainder.tolist()


def test_names_of_the_cases():
    """Two cases of one name would be one result."""
    for cases in (truth.cases(), truth.cases(few=True), by_hand.CASES):
        assert len({case.name for case in cases}) == len(cases)
        assert all(isinstance(case, Case) for case in cases)
