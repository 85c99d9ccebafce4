"""The table that ``hf-cwd explain --layout`` prints: what each rank of a parallel run keeps, receives and does."""

from collections.abc import Hashable, Sequence
from typing import Any

from hf_cwd.estimate.bill import Bill
from hf_cwd.estimate.costs import Cost
from hf_cwd.estimate.layouts import Parallelism, Zero

LINES = 16  # of the table; where there would be more, one line says from what to what


def lines(layout: Parallelism | Zero, found: Bill, *, optim: str, dtype: str, unfolded: bool) -> list[str]:
    """The table and what to know of it.

    Args:
        optim: name of the optimizer.
        dtype: of the parameters.
        unfolded: one line for every rank; else ranks that are alike share one.
    """
    ranks, plans = found.costs, found.plans
    result = [f"--layout {layout}: {len(ranks):,} ranks, {dtype} parameters", *_table(found, unfolded=unfolded)]
    result += [*found.remarks, "Not counted: activations, and what the framework itself gathers and reduces"]
    if not plans:
        return [*result, f"{optim} is element-wise: each rank steps what it holds, and no exchange is needed"]
    wires = {str(entry.dtype).removeprefix("torch.") for one in plans for entry in one.entries}
    moved = [cost.received for cost in ranks]
    if any(moved):
        result.append(
            f"Rounds of exchange a step: {sum(one.rounds for one in plans)}, in {' and '.join(sorted(wires))}; the "
            f"busiest rank receives {max(moved) * len(moved) / sum(moved):.2f} times the mean"
        )
    else:
        result.append("No exchange: every matrix is orthogonalised where it is")
    if isinstance(layout, Parallelism) and layout.ddp == layout.world > 1 and any(moved):
        result.append(
            "Replicas share the work under the Trainer, which knows what it wraps in DDP. In a loop of your own each "
            "rank works for itself unless share=always says that they are replicas"
        )
    work, idle = [cost.flops for cost in ranks], sum(cost.flops == 0 for cost in ranks)
    result.append(
        f"The busiest rank orthogonalises {max(work) * len(work) / sum(work):.2f} times the mean; {idle:,} of "
        f"{len(work):,} ranks have no matrix to orthogonalise"
    )
    return result


def _table(found: Bill, *, unfolded: bool) -> list[str]:
    ranks, same = found.costs, positions(found.costs)
    titles = ["ranks", "weights", "gradients", "states", "buffers", "bytes received", "GFLOP"]
    if unfolded:
        cells = [(str(rank), *_amounts(cost, cost)) for rank, cost in enumerate(ranks)]
    elif len(same) <= LINES:
        cells = [(_some(which), *_amounts(cost, cost)) for cost, which in same.items()]
    else:
        columns = list(zip(*ranks, strict=True))
        cells = [(_some(range(len(ranks))), *_amounts(Cost(*map(min, columns)), Cost(*map(max, columns))))]
    if not found.plans:
        titles, cells = titles[:4], [line[:4] for line in cells]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    result = []
    for first, *rest in (titles, *cells):
        amounts = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        result.append("  ".join([first.ljust(widths[0]), *amounts]))
    return result


def positions(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Where each value stands."""
    result: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        result.setdefault(value, []).append(position)
    return result


def ranges(numbers: set[int]) -> str:
    """Numbers in words: ``0-3,5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _amounts(low: Cost, high: Cost) -> list[str]:
    """The columns of a line: memory in MiB, traffic in bytes, work in GFLOP; from ``low`` to ``high``."""
    return [
        write(a) if write(a) == write(b) else f"{write(a)} to {write(b)}"
        for write, a, b in zip([_mebibytes] * 4 + ["{:,}".format, _giga], low, high, strict=True)
    ]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.1f}"


def _some(ranks: Sequence[int]) -> str:
    """The ranks as ranges; of many ranges the first, and how many ranks there are."""
    found = ranges(set(ranks)).split(",")
    return ",".join(found) if len(found) <= 3 else f"{','.join(found[:2])} ... ({len(ranks):,} ranks)"
