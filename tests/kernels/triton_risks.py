"""What can go wrong in the Triton kernels beside their arithmetic: tables, launches, offsets, rows from the device.

    python -m tests.kernels.triton_risks RESULTS

runs all of it with Triton's interpreter, in a process of its own, and writes a JSON file: problems by case. Imported,
it only says which cases there are.
"""

import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_cwd import CWDOptimizer
from hf_cwd.kernels import interface, selection, triton
from hf_cwd.kernels.triton import tables
from hf_cwd.rules import RULES
from tests.kernels import odd
from tests.kernels.followed import HYPER, Followed, settings
from tests.optim import kept_calls

CASES: dict[str, Callable[[], Iterator[str]]] = {}


def case(function: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
    CASES[function.__name__] = function
    return function


class Recorder:
    """Launches of ``walk``, which are made all the same."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.module = triton.kernels()

    def __enter__(self) -> "Recorder":
        self.walk, self.module.walk = self.module.walk, self
        return self

    def __exit__(self, *_: object) -> None:
        self.module.walk = self.walk

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append((grid, args, options))
            self.walk[grid](*args, **options)

        return launch


def stepped(
    rule: str, followed: list[Followed], workspace: interface.Workspace, sums: interface.Sums | None = None
) -> None:
    triton.update(RULES[rule], [one.item() for one in followed], sums, workspace, None)


@case
def sizes_around_a_chunk() -> Iterator[str]:
    block = triton.BLOCK
    for rule in HYPER:
        workspace = interface.Workspace()
        all_sizes = (0, 1, 3, block - 1, block, block + 1, 2 * block, 3 * block + 5)
        some = [Followed(rule, n, seed=n, dtype=d) for n in all_sizes for d in ("float32", "bfloat16")]
        for _ in range(2):
            stepped(rule, some, workspace)
        for one in some:
            yield from one.problems(f"{rule} {len(one.right.bits)} {one.dtype}")


@case
def only_empty_tensors() -> Iterator[str]:
    sums = interface.Sums()
    stepped("adamw", [Followed("adamw", 0, seed=0)], interface.Workspace(), sums)
    triton.update(RULES["adamw"], [], sums, interface.Workspace(), None)
    triton.directions(RULES["muon"], [], [], interface.Workspace())
    if [call.numbers.tolist() for call in sums.calls] != [[[0.0] * 4]]:
        yield f"{sums.calls}"


@case
def one_launch_for_each_dtype_and_alignment() -> Iterator[str]:
    some = [
        Followed("adamw", 5 + k, seed=k, dtype=("float32", "bfloat16")[k % 2], offset=(0, 0, 0, 1)[k % 4], lr=1e-3 * k)
        for k in range(40)
    ]
    with Recorder() as recorder:
        stepped("adamw", some, interface.Workspace())
    for one in some:
        yield from one.problems(f"{one.dtype} {one.offset}")
    found = sorted((str(o["X"]), o["VECTOR"], len(args[0])) for _, args, o in recorder.launches)
    if found != [("bf16", 1, 10), ("bf16", 4, 10), ("fp32", 4, 20)]:
        yield f"launches are {found}"


@case
def nothing_is_compiled_again() -> Iterator[str]:
    """A variant is known by its constants and by what is known of its arguments, which are tensors or None."""
    some, workspace, variants = [Followed("adamw", 2000 + k, seed=k) for k in range(5)], interface.Workspace(), set()
    with Recorder() as recorder:
        for k in range(8):
            for one in some:
                one.settings = settings("adamw", lr=1e-3 * k, weight_decay=0.1 * (k % 2), maximize=k == 3)
            stepped("adamw", some[: 1 + k % 5], workspace)
        for _, args, options in recorder.launches:
            kinds = tuple((a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args)
            variants.add((kinds, tuple(sorted(options.items(), key=str))))
    if len(variants) != 1:
        yield f"{len(variants)} variants: {variants}"
    for one in some:
        yield from one.problems()


@case
def tensors_come_and_go() -> Iterator[str]:
    """As parameters that get a gradient now and then; more layouts than are kept."""
    some, workspace = [Followed("lion", 50 + k, seed=k) for k in range(12)], interface.Workspace()
    for step in range(3 * tables.KEPT):
        stepped("lion", [one for k, one in enumerate(some) if (step + k) % (2 + k % 5)], workspace)
    for k, one in enumerate(some):
        yield from one.problems(k)


@case
def memory_is_swapped() -> Iterator[str]:
    """A table knows addresses and lengths, and not which tensor it was made for."""
    one, other = Followed("adamw", 64, seed=1), Followed("adamw", 64, seed=2)
    workspace = interface.Workspace()
    for step in range(6):
        if step == 2:
            one.param = one.param.clone()
        if step == 3:
            one.states = tuple(state.clone() for state in one.states)
        stepped("adamw", [one, other] if step != 4 else [other, one], workspace)
    yield from one.problems("one")
    yield from other.problems("other")


@case
def the_same_address_with_another_length_or_dtype() -> Iterator[str]:
    workspace = interface.Workspace()
    x, g, m = torch.full((64,), 1.0), torch.full((64,), 1.0), torch.zeros(64)
    given = settings("lion", lr=0.5, weight_decay=0.0)
    for n in (64, 32):
        triton.update(RULES["lion"], [interface.Item(x[:n], g[:n], (m[:n],), None, 1, given, x)], None, workspace, None)
    if x.tolist() != [0.0] * 32 + [0.5] * 32:
        yield f"{x.tolist()}"
    half = x.view(torch.bfloat16)[:64].fill_(1.0)
    triton.update(RULES["lion"], [interface.Item(half, g, (m,), None, 1, given, x)], None, workspace, None)
    if half.tolist() != [0.5] * 64:
        yield f"{half.tolist()}"


@case
def one_copy_travels_in_a_step() -> Iterator[str]:
    one, workspace = Followed("lion", 64, seed=1), interface.Workspace()
    item = one.item()
    versions = []
    moves = [item, item, replace(item, step=2), replace(item, grad=one.grad.clone())]
    moves.append(replace(moves[-1], settings=settings("lion", lr=1e-3)))
    for move in [*moves, moves[-1]]:
        triton.update(RULES["lion"], [move], None, workspace, None)
        (own,) = workspace.tables.values()
        (table,) = own._tables.values()
        versions.append(table.words._version)
    changes = [after - before for before, after in itertools.pairwise(versions)]
    if changes != [1] * 5:
        yield f"copies after the first: {changes}"


@case
def items_that_are_kept() -> Iterator[str]:
    """On the tables of the last step, whatever changed in between."""
    for rule in HYPER:
        yield from (f"{rule}: {text}" for text in kept_calls.problems(rule, "triton"))


@case
def odd_tensors() -> Iterator[str]:
    """Steps in which the eager kernel takes what has no address, and these kernels the rest."""
    selection.FASTEST["cpu"] = "triton"
    choices = selection._kernel_for, selection._kernel_to_apply
    for choice in choices:
        choice.cache_clear()
    try:
        for rule in RULES:
            yield from (f"{rule}: {text}" for text in odd.problems(rule))
    finally:
        selection.FASTEST["cpu"] = "c"
        for choice in choices:
            choice.cache_clear()


@case
def two_rules_of_one_operation() -> Iterator[str]:
    """Each goes on with a table of its own, though both have tensors of the same lengths."""
    rules = [RULES["lion"], replace(RULES["lion"], name="another")]
    RULES["another"] = rules[1]
    try:
        for kernel in ("triton", "eager"):
            params = [torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in rules]
            groups = [{"params": [p], "algorithm": rule.name} for p, rule in zip(params, rules, strict=True)]
            optimizer = CWDOptimizer(groups, lr=0.1, algorithm="lion", kernel=kernel)
            for k in range(4):
                for number, p in enumerate(params):
                    p.grad = torch.sin(torch.arange(64.0) * (1 + k + 10 * number))
                optimizer.step()
            if kernel == "triton":
                found = [p.detach().clone() for p in params]
        yield from (f"parameter {k}" for k in range(2) if not torch.allclose(found[k], params[k]))
    finally:
        del RULES["another"]


@case
def sums_of_each_tensor() -> Iterator[str]:
    """Also of more chunks than there are places for their sums, and on the tables of the last step."""
    sizes = (3000, 5, 77, 70 * triton.BLOCK + 3)
    some = [Followed("adamw", n, seed=n, dtype=d, offset=n % 3) for n in sizes for d in ("float32", "bfloat16")]
    some.append(Followed("adamw", 77, seed=9, weight_decay=0.0))
    workspace = interface.Workspace()
    for _ in range(2):
        sums = interface.Sums()
        items = [one.item() for one in some]
        triton.update(RULES["adamw"], items, sums, workspace, None)
        (call,) = sums.calls
        places = [[id(item.param) for item in items].index(id(p)) for p in call.owners]
        if sorted(places) != list(range(len(some))):
            yield f"{len(places)} rows for {len(some)} parameters"
        for place, row in zip(places, call.numbers.tolist(), strict=True):
            right = some[place].sums
            if row[0] != right[0] or not np.allclose(row, right, rtol=4e-6):
                yield f"parameter {place}: {row}, not {right}"


@case
def directions_of_lengths_that_lie_badly() -> Iterator[str]:
    """Outputs cut from one tensor, some of them not at a multiple of 16 bytes. With a momentum of 0: the gradients."""
    made = settings("lion")._replace(hyper=(("momentum", 0.0), ("nesterov", False)))
    for last in ((8, 8), (3, 5), (0, 4)):
        grads = [torch.randn(shape) for shape in ((4, 8), (2, 16), (48, 1), last, (16, 16))]
        items = [interface.Item(g, g, (torch.zeros_like(g),), None, 1, made, g) for g in grads]
        for dtype in (torch.float32, torch.bfloat16):
            outs = torch.full((sum(g.numel() for g in grads),), torch.nan, dtype=dtype).split(
                [g.numel() for g in grads]
            )
            triton.directions(RULES["muon"], items, outs, interface.Workspace())
            for g, u in zip(grads, outs, strict=True):
                if not torch.equal(u, g.to(dtype).flatten()):
                    yield f"{last}: {tuple(g.shape)} became {u}"


@case
def offsets_beyond_32_bits() -> Iterator[str]:
    """Windows of tensors of 2**33 elements that are not there: an address minus an offset, and the chunk there."""
    ops, block = triton.kernels(), triton.BLOCK
    for chunk in ((1 << 31) // block - 1, (1 << 31) // block, (1 << 33) // block - 1, (1 << 33) // block):
        for dtype in (torch.float32, torch.bfloat16):
            x, g, m = (torch.full((block,), value, dtype=dtype) for value in (1.0, 1.0, 0.0))
            words = torch.zeros(1, 8, dtype=torch.int64)
            words[0, :3] = torch.tensor([t.data_ptr() - chunk * block * t.element_size() for t in (x, g, m)])
            words[0, tables.LENGTH] = (1 << 33) + block // 2  # the last of these chunks is not a full one
            rows = torch.tensor([interface.row(RULES["lion"], settings("lion", lr=0.5, weight_decay=0.0), 1)])
            kind = triton._type(dtype)
            ops.walk[(1,)](
                *(words, torch.tensor([[0, chunk]], dtype=torch.int32), rows, None),
                OP="lion",
                X=kind,
                G=kind,
                S=kind,
                STATES=1,
                REMAINDER=False,
                SUM=False,
                VECTOR=1,
                BLOCK=block,
            )
            right = block // 2 if chunk == (1 << 33) // block else block
            if x.tolist() != [0.5] * right + [1.0] * (block - right):
                yield f"chunk {chunk}, {dtype}: {x.unique().tolist()}"


@case
def rows_from_the_device_are_the_host_s() -> Iterator[str]:
    hyper = {
        "adamw": [{"betas": b, "eps": 1e-8} for b in ((0.9, 0.999), (0.95, 0.95), (0.0, 0.0), (0.5, 0.9999))],
        "lion": [HYPER["lion"]],
        "sgd": [HYPER["sgd"] | more for more in ({}, {"nesterov": True}, {"ema": True}, {"momentum": 0.0})],
        "muon": [{"momentum": 0.95, "nesterov": True}],
    }
    modes = [(True, "ge", 0.1), (True, "gt", 0.3), (False, "ge", 0.1), (True, "ge", 0.0)]
    rates = [3e-4, 0.0, torch.tensor(3e-4), torch.tensor(3e-4, dtype=torch.float64)]
    for rule, chosen in hyper.items():
        for k, given in enumerate(chosen):
            for j, (cautious, mask, weight_decay) in enumerate(modes):
                common = {"cautious": cautious, "mask": mask, "weight_decay": weight_decay, "maximize": k == 1}
                made = settings("lion", **common)._replace(hyper=tuple(given.items()), capturable=True)
                yield from _rows_differ(rule, made._replace(lr=rates[(j + k) % 4]))


def _rows_differ(rule: str, made: interface.Settings) -> Iterator[str]:
    steps = [*range(1, 20), 100, 999, 12345, 10**6, 2**24]
    here = [torch.tensor(float(step)) for step in steps]
    items = [interface.Item(torch.empty(0), torch.empty(0), (), None, step, made, step) for step in here]
    for applied in (False, True):
        scales = [0.2 * (k + 1) ** 0.5 if applied else 1.0 for k in range(len(steps))]
        given = tables.rows_to_apply(items, scales) if applied else tables.rows(RULES[rule], items)
        found = templates = torch.tensor(given.rows)
        if given.sources:  # without them nothing is on the device: a learning rate that is a float, and no step
            numbers = torch.tensor(given.numbers, dtype=torch.float64).view(torch.int64)
            words, found = torch.cat([torch.tensor(given.sources), numbers], 1), torch.empty_like(templates)
            triton.kernels().fill_rows[(len(templates),)](words, words.view(torch.float64), templates, found)
        at = made._replace(lr=float(made.lr))
        for k, (step, scale) in enumerate(zip(steps, scales, strict=True)):
            row = interface.apply_row(at, step, scale) if applied else interface.row(RULES[rule], at, step)
            right = torch.tensor(row)
            if not torch.equal(found[k].view(torch.int32), right.view(torch.int32)):
                wrong = [name for name, a, b in zip(interface.Row._fields, found[k], right, strict=True) if a != b]
                yield f"{rule} {made} step {step}: {wrong}"


def main(results: Path) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels import triton_child as child

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    child.interpreter.InterpreterBuilder.create_fma = child.fused
    child.interpreter._convert_float = child.converted
    results.write_text(json.dumps({name: list(function()) for name, function in CASES.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
