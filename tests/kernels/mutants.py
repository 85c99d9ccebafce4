"""Wrong rows, which the table must reveal with any kernel that reads rows: what a dropped or twisted mask looks like."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from hf_cwd.kernels import base
from tests.kernels import truth
from tests.kernels.table import APPLY, Case
from tests.reference.arithmetic import F

Row = base.Row


def unmutated(row: Row) -> Row:
    return row


def no_mask(row: Row) -> Row:
    on = min(row.opposed, row.aligned, row.neither)
    return row._replace(opposed=on, aligned=on, neither=on)


def never(row: Row) -> Row:
    return row._replace(opposed=-0.0, aligned=-0.0, neither=-0.0)


def swapped(row: Row) -> Row:
    return row._replace(opposed=row.aligned, aligned=row.opposed)


def zeros_opposed(row: Row) -> Row:
    return row._replace(neither=row.opposed)


def zeros_aligned(row: Row) -> Row:
    return row._replace(neither=row.aligned)


def left_out(row: Row) -> Row:
    return row._replace(decays=0.0)


def growing(row: Row) -> Row:
    return row._replace(opposed=-row.opposed, aligned=-row.aligned, neither=-row.neither)


def ascending(row: Row) -> Row:
    return row._replace(rate=-row.rate)


def scaled_decay(row: Row) -> Row:
    """A little stronger: by one unit in the last place."""
    return row._replace(aligned=float(F(row.aligned) * F(1 + 2**-22)))


MUTANTS: dict[str, Callable[[Row], Row]] = {
    mutant.__name__: mutant
    for mutant in (
        *(no_mask, never, swapped, zeros_opposed, zeros_aligned, left_out, growing, ascending, scaled_decay),
    )
}


@contextlib.contextmanager
def rows(mutate: Callable[[Row], Row]) -> Iterator[None]:
    """Every module of the kernels sees mutated rows."""

    def mutated(*args: Any, **named: Any) -> Row:
        return mutate(true(*args, **named))

    true = base.row
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("hf_cwd.kernels") and getattr(module, "row", None) is true:
                stack.enter_context(mock.patch.object(module, "row", mutated))
        yield


def subjects(cases: list[Case]) -> list[Case]:
    """The cases that each mutant has to fail: all dtypes alike, plain float32, and half precision with a remainder."""
    kinds = {case.rule for case in cases if case.out is None}
    ends = {"float32 float32 float32", "bfloat16+int16 bfloat16 bfloat16"} | {"float32 float32 -", "bfloat16+int16 float16 -"}
    found = [case for case in cases if case.rule in kinds and case.name.removesuffix(" counted").split(" ", 1)[1] in ends]
    assert {case.rule for case in found} == kinds >= {APPLY}
    return found


def noticed(kernel: Any, device: str, cases: list[Case]) -> dict[str, dict[str, bool]]:
    """By mutant and case: whether parameters were found to be wrong."""
    found = {}
    for name, mutant in {"unmutated": unmutated, **MUTANTS}.items():
        with rows(mutant):
            results = truth.run(kernel, device, subjects(cases))
        found[name] = {case: any(" param[" in text for text in texts) for case, texts in results.items()}
    return found
