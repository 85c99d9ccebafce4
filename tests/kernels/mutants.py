"""Wrong kernels, which the table must reveal: what a dropped or twisted mask looks like, to the last bit of it."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from hf_cwd.kernels import interface
from tests.kernels import truth
from tests.kernels.table import APPLY, Case
from tests.support.reference.arithmetic import F

Row, Settings = interface.Row, interface.Settings


# --- Wrong rows: what a fused kernel reads ---


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


def stronger(row: Row) -> Row:
    """By a unit or two in the last place."""
    return row._replace(aligned=float(F(row.aligned) * F(1 + 2**-22)))


def same_row(row: Row) -> Row:
    return row


@contextlib.contextmanager
def rows(mutate: Callable[[Row], Row]) -> Iterator[None]:
    """Every module of the kernels sees mutated rows."""

    def mutated(true: Callable[..., Row]) -> Callable[..., Row]:
        return lambda *args, **named: mutate(true(*args, **named))

    with contextlib.ExitStack() as stack:
        for function, true in (("row", interface.row), ("apply_row", interface.apply_row)):
            for name, module in list(sys.modules.items()):
                if name.startswith("hf_cwd.kernels") and getattr(module, function, None) is true:
                    stack.enter_context(mock.patch.object(module, function, mutated(true)))
        yield


# --- Wrong settings: for any kernel ---


def not_cautious(settings: Settings) -> Settings:
    return settings._replace(cautious=False)


def other_zeros(settings: Settings) -> Settings:
    return settings._replace(mask="gt" if settings.mask == "ge" else "ge")


def no_decay(settings: Settings) -> Settings:
    return settings._replace(weight_decay=0.0)


def other_lr(settings: Settings) -> Settings:
    return settings._replace(lr=float(F(settings.lr) * F(1 + 2**-22)))


def same_settings(settings: Settings) -> Settings:
    return settings


class Mutated:
    """A kernel that takes other settings than it was given."""

    def __init__(self, kernel: Any, change: Callable[[Settings], Settings]) -> None:
        self.kernel, self.change = kernel, change
        self.refusal, self.refusal_to_apply = kernel.refusal, kernel.refusal_to_apply

    def _changed(self, items: Sequence[interface.Item]) -> list[interface.Item]:
        return [replace(item, settings=self.change(item.settings)) for item in items]

    def update(self, rule: Any, items: Sequence[interface.Item], *rest: Any) -> None:
        self.kernel.update(rule, self._changed(items), *rest)

    def apply(self, items: Sequence[interface.Item], *rest: Any) -> None:
        self.kernel.apply(self._changed(items), *rest)


_ROWS = (no_mask, never, swapped, zeros_opposed, zeros_aligned, left_out, growing, ascending, stronger, same_row)
_SETTINGS = (not_cautious, other_zeros, no_decay, other_lr, same_settings)
OF_ROWS: dict[str, Callable[[Row], Row]] = {mutant.__name__: mutant for mutant in _ROWS}
OF_SETTINGS: dict[str, Callable[[Settings], Settings]] = {mutant.__name__: mutant for mutant in _SETTINGS}
HARMLESS = {"same_row", "same_settings"}


def subjects(cases: list[Case]) -> list[Case]:
    """Of each operation that decays: plain float32, and half precision with a remainder."""
    kinds = {case.rule for case in cases if case.out is None}
    dtypes = ("float32 float32", "bfloat16+int16 bfloat16")
    names = {f"{kind} {two} {'-' if kind == APPLY else two.split()[1]}" for kind in kinds for two in dtypes}
    found = [case for case in cases if case.name.removesuffix(" counted") in names]
    assert {case.name.removesuffix(" counted") for case in found} == names
    return found


def noticed(kernel: Any, cases: list[Case], *, eager: bool = False) -> dict[str, dict[str, bool]]:
    """By mutant and subject: whether parameters were found to be wrong. Rows are not mutated for ``eager``."""

    def wrong(kernel: Any) -> dict[str, bool]:
        results = truth.run(kernel, "cpu", subjects(cases), eager=eager)
        return {case: any(" param[" in t or " remainder[" in t for t in texts) for case, texts in results.items()}

    found = {name: wrong(Mutated(kernel, change)) for name, change in OF_SETTINGS.items()}
    for name, change in ({} if eager else OF_ROWS).items():
        with rows(change):
            found[name] = wrong(kernel)
    return found
