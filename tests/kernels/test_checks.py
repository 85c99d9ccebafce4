"""What the table looks at: kernels that do something wrong must be found out."""

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_cwd.kernels import eager
from tests.kernels import by_hand, truth
from tests.kernels.table import APPLY, Case

CASES = {case.name: case for case in truth.cases(few=True)}
UPDATE, DIRECTIONS, KNOWN = "lion all dtypes in one call", "muon sizes to float32", f"{APPLY} all dtypes in one call"


def kernel(**replaced: Any) -> Any:
    names = ("refusal", "refusal_to_apply", "update", "directions", "apply")
    result = types.SimpleNamespace()
    vars(result).update({name: getattr(eager, name) for name in names} | replaced)
    return result


def problems(case: Case, **replaced: Any) -> list[str]:
    return truth.run(kernel(**replaced), "cpu", [case], eager=True)[case.name]


def afterwards(change: Callable[..., None]) -> Callable[..., None]:
    def update(rule: Any, items: Any, sums: Any, workspace: Any, last: Any) -> None:
        eager.update(rule, items, sums, workspace, last)
        change(items, sums)

    return update


def writes_before(items, sums):
    x = items[0].param
    x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(1)


def writes_behind(items, sums):
    m = items[0].buffers[0]
    m.as_strided((1,), (1,), m.storage_offset() + m.numel()).fill_(1)


def changes_the_gradient(items, sums):
    items[0].grad[3] = 1


def counts_once_more(items, sums):
    sums.calls[-1].numbers[0, 0] += 1


def forgets_to_sum(items, sums):
    sums.calls.pop()


def adds_a_little(items, sums):
    for call in sums.calls:
        call.numbers[:, 2] *= 1 + 1e-5


def loses_a_nan(items, sums):
    x = next(item.param for item in items if item.param.isnan().any())
    x.nan_to_num_(nan=0.0)


def loses_the_sign_of_zero(items, sums):
    for item in items:
        item.buffers[0].add_(0.0)


def one_unit_off(items, sums):
    items[0].param.view(torch.int32)[5] += 1


def loses_a_remainder(items, sums):
    next(item.remainder for item in items if item.remainder is not None)[7] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (writes_before, "wrote outside param"),
        (writes_behind, "wrote outside state 0"),
        (changes_the_gradient, "grad has changed"),
        (counts_once_more, "count is"),
        (forgets_to_sum, "sums of"),
        (loses_a_nan, "param["),
        (loses_the_sign_of_zero, "state 0["),
        (one_unit_off, "param[5]"),
        (loses_a_remainder, "remainder[7]"),
    ],
)
def test_wrong_memory(change, words):
    assert not problems(CASES[UPDATE])
    found = problems(CASES[UPDATE], update=afterwards(change))
    assert any(words in text for text in found), found


def test_sums_that_are_a_little_wrong():
    """Of ordinary numbers: those of the table are mostly infinite."""
    case = next(case for case in by_hand.CASES if case.name == "sgd")
    assert not problems(case)
    assert problems(case, update=afterwards(adds_a_little)) == ["parameter 0: the sum of x^2 is 128.00128, not 128"]


def test_a_kernel_that_does_nothing():
    assert problems(CASES[UPDATE], update=lambda *_: None)
    assert problems(CASES[KNOWN], apply=lambda *_: None)


def test_a_kernel_that_refuses_or_fails():
    """Is no kernel that may be left out."""
    assert problems(CASES[UPDATE], refusal=lambda *_: "float32 parameters") == ["refused: float32 parameters"]
    assert problems(CASES[UPDATE], update=lambda *_: 1 / 0) == ["raised ZeroDivisionError: division by zero"]


def unwritten(rule, items, outs, workspace):
    for item, out in zip(items, outs, strict=True):
        eager.directions(rule, [item], [torch.empty_like(out)], workspace)


def one_too_large(rule, items, outs, workspace):
    eager.directions(rule, items, outs, workspace)
    for out in outs:
        out.add_(1)


def beyond_the_end(rule, items, outs, workspace):
    longer = [out.as_strided((out.numel() + 1,), (1,)) for out in outs]
    eager.directions(rule, items, outs, workspace)
    for out in longer:
        out[-1] = 1


@pytest.mark.parametrize("wrong", [unwritten, one_too_large, beyond_the_end])
def test_wrong_directions(wrong):
    assert not problems(CASES[DIRECTIONS])
    assert problems(CASES[DIRECTIONS], directions=wrong)


def test_scales_and_directions_of_other_parameters():
    def apply(items, directions, scales, sums, workspace):
        eager.apply(items, directions, scales[::-1], sums, workspace)

    assert not problems(CASES[KNOWN])
    assert any("param[" in text for text in problems(CASES[KNOWN], apply=apply))


def test_a_kernel_that_trusts_yesterday_s_tensors():
    """The cases of a run share a workspace, and so do the calls of one case."""
    known = {}

    def update(rule, items, sums, workspace, last):
        eager.update(rule, known.setdefault(len(items), items), sums, workspace, last)

    names = ["lion all dtypes in one call", "lion three calls", "lion learning rate 0"]
    results = truth.run(kernel(update=update), "cpu", [CASES[name] for name in names], eager=True)
    assert not results[names[0]]
    assert results[names[1]], "a step and a learning rate of the first call"
    assert results[names[2]], "tensors of another case"


def test_a_step_that_is_not_read_anew():
    def update(rule, items, sums, workspace, last):
        steps = workspace.tables.setdefault("steps", [item.step for item in items])
        changed = [replace(item, step=step) for item, step in zip(items, steps, strict=True)]
        eager.update(rule, changed, sums, workspace, last)

    assert not problems(CASES["adamw three calls"])
    assert problems(CASES["adamw three calls"], update=update)
