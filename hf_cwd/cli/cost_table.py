"""The table that ``hf-cwd explain --layout`` prints: memory, bytes received and operations of each rank."""

from collections.abc import Hashable, Sequence
from typing import Any

from hf_cwd.estimate.costs import RankCost
from hf_cwd.estimate.parallelism import Parallelism, Zero
from hf_cwd.estimate.step_cost import StepCost

LINES = 16  # a table of more lines is replaced by one line with the smallest and the largest values


def lines(parallelism: Parallelism | Zero, cost: StepCost, *, optim: str, dtype: str, unfolded: bool) -> list[str]:
    """The table, and notes on it.

    Args:
        optim: the name of the optimizer.
        dtype: the dtype of the parameters.
        unfolded: print one line for every rank; else ranks with equal costs share one.
    """
    ranks, plans = cost.costs, cost.plans
    result = [f"--layout {parallelism}: {len(ranks):,} ranks, {dtype} parameters", *_table(cost, unfolded=unfolded)]
    result += [*cost.remarks, "Not counted: activations, and what the framework itself gathers and reduces"]
    if not plans:
        return [*result, f"{optim} is element-wise: each rank steps what it holds, and no exchange is needed"]
    wires = {str(entry.dtype).removeprefix("torch.") for one in plans for entry in one.entries}
    moved = [each.received for each in ranks]
    if any(moved):
        result.append(
            f"Rounds of exchange a step: {sum(one.rounds for one in plans)}, in {' and '.join(sorted(wires))}; the "
            f"busiest rank receives {max(moved) * len(moved) / sum(moved):.2f} times the mean"
        )
    else:
        result.append("No exchange: every matrix is orthogonalised where it is")
    if isinstance(parallelism, Parallelism) and parallelism.ddp == parallelism.world > 1 and any(moved):
        result.append(
            "Replicas share the work under the Trainer, which knows what it wraps in DDP. In your own training loop "
            "they do so only with share=always"
        )
    work, idle = [each.flops for each in ranks], sum(each.flops == 0 for each in ranks)
    result.append(
        f"The busiest rank orthogonalises {max(work) * len(work) / sum(work):.2f} times the mean; {idle:,} of "
        f"{len(work):,} ranks have no matrix to orthogonalise"
    )
    return result


def _table(cost: StepCost, *, unfolded: bool) -> list[str]:
    ranks, same = cost.costs, positions(cost.costs)
    titles = ["ranks", "weights", "gradients", "states", "buffers", "bytes received", "GFLOP"]
    if unfolded:
        cells = [(str(rank), *_amounts(each, each)) for rank, each in enumerate(ranks)]
    elif len(same) <= LINES:
        cells = [(_some(which), *_amounts(each, each)) for each, which in same.items()]
    else:
        columns = list(zip(*ranks, strict=True))
        cells = [(_some(range(len(ranks))), *_amounts(RankCost(*map(min, columns)), RankCost(*map(max, columns))))]
    if not cost.plans:
        titles, cells = titles[:4], [line[:4] for line in cells]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    result = []
    for first, *rest in (titles, *cells):
        amounts = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        result.append("  ".join([first.ljust(widths[0]), *amounts]))
    return result


def positions(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """The positions of each value in a sequence."""
    result: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        result.setdefault(value, []).append(position)
    return result


def ranges(numbers: set[int]) -> str:
    """Numbers as text: ``0-3,5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _amounts(low: RankCost, high: RankCost) -> list[str]:
    """The columns of a line, each from ``low`` to ``high``: memory in MiB, traffic in bytes, operations in GFLOP."""
    return [
        write(a) if write(a) == write(b) else f"{write(a)} to {write(b)}"
        for write, a, b in zip([_mebibytes] * 4 + ["{:,}".format, _giga], low, high, strict=True)
    ]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.1f}"


def _some(ranks: Sequence[int]) -> str:
    """The ranks as ranges; if there are more than three, the first two and the number of ranks."""
    spans = ranges(set(ranks)).split(",")
    return ",".join(spans) if len(spans) <= 3 else f"{','.join(spans[:2])} ... ({len(ranks):,} ranks)"
