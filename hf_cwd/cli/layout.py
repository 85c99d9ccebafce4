"""``--layout`` and ``--world``: the layout that a command is about."""

import re
from collections.abc import Mapping
from math import prod

from hf_cwd.estimate.parallelism import DIMENSIONS, Parallelism, Zero

ZERO = tuple(f"zero{stage}{suffix}" for suffix in ("", "_offload") for stage in (1, 2, 3))
RANKS = 100_000  # more would take minutes to compute
GRAMMAR = (
    "ddp, fsdp2, tp, or several of them with their sizes: ddp=128,fsdp2=8 (HSDP: 128 replicas of 8 shards), "
    "fsdp2=128,tp=8, fsdp2=128,tp=8,ep=64 (ep: experts, over the ranks of fsdp2 and tp). Or one of DeepSpeed's zero1, "
    "zero2 and zero3, with _offload for an optimizer in the CPU's memory: zero3=8, zero2_offload=8. One of ddp, fsdp2, "
    "tp and zero may have no size if --world is given"
)


def parse_layout(text: str, world: int | None) -> Parallelism | Zero:
    """Parses ``--layout`` and ``--world``.

    Raises:
        ValueError: the text does not follow the grammar, or the sizes do not fit together.
    """
    if world is not None and not 1 <= world <= RANKS:
        raise ValueError(f"--world {world}: give the number of ranks, which is from 1 to {RANKS:,}")
    sizes = _sizes(text)
    zero = next((name for name in ZERO if name in sizes), None)
    if zero is not None and len(sizes) > 1:
        others = " and ".join(name for name in sizes if name != zero)
        raise ValueError(
            f"--layout {text!r}: {zero} is over all ranks, and has not been tried together with {others}: leave "
            f"{others} out, or {zero}"
        )
    complete = _with_open_size(text, sizes, world)
    result = Parallelism(**complete) if zero is None else Zero(int(zero[4]), complete[zero], zero.endswith("_offload"))
    _check_size(text, result.world, world)
    if zero is None and (result.fsdp2 * result.tp % result.ep or (result.ep > 1 and result.ep % result.tp)):
        raise ValueError(f"--layout {text!r}: ep must be a multiple of tp, and a divisor of fsdp2 x tp")
    return result


def _sizes(text: str) -> dict[str, int | None]:
    """The sizes in ``--layout`` by name; None for a name without a size."""
    sizes: dict[str, int | None] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(rf"({'|'.join((*DIMENSIONS, *ZERO))})(?:=([1-9]\d*))?", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"--layout {text!r}: {part!r} is not understood. Write {GRAMMAR}")
        sizes[match[1]] = None if match[2] is None else int(match[2])
    return sizes


def _with_open_size(text: str, sizes: Mapping[str, int | None], world: int | None) -> dict[str, int]:
    """The sizes, with the one that is missing computed from the number of ranks."""
    open_ = [name for name, size in sizes.items() if size is None]
    if "ep" in open_ or len(open_) > 1 or (open_ and world is None):
        missing = "ep" if "ep" in open_ else open_[0]
        raise ValueError(f"--layout {text!r}: say how many ranks {missing} has, {missing}=8, or give --world")
    if not open_:
        return dict(sizes)
    given = prod(size for name, size in sizes.items() if size is not None and name != "ep")
    if world % given:
        raise ValueError(f"--layout {text!r}: {given} does not divide --world {world}")
    return {**sizes, open_[0]: world // given}


def _check_size(text: str, size: int, world: int | None) -> None:
    if size > RANKS:
        raise ValueError(f"--layout {text!r} has {size:,} ranks: give {RANKS:,} at most")
    if world not in (None, size):
        raise ValueError(f"--layout {text!r} has {size} ranks, and --world is {world}: leave --world out")
