"""From an optimizer's tensors to an exchange: what each rank holds is read off, proven once, and planned."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.matrices import Layout
from hf_cwd.sharding import agree, dtensor, zero
from hf_cwd.sharding.exchange import Exchange
from hf_cwd.sharding.pieces import Mesh, check, everywhere
from hf_cwd.sharding.plan import Entry, flops_per_byte, plan
from hf_cwd.sharding.stage import Stage
from hf_cwd.sharding.staging import Staging
from hf_cwd.sharding.zero import FlatShard

_logger = logging.getLogger("hf_cwd")


class Source(NamedTuple):
    """A parameter of a matrix rule, or a flat tensor with parts of several.

    Attributes:
        param: the parameter, plain or a DTensor, or the flat tensor.
        name: for messages.
        layout: which matrices it holds, or each of the parameters does.
        stage: what is done with them.
        direction: dtype that its direction is computed in.
        flat: what lies in the flat tensor; None for a parameter.
    """

    param: Tensor
    name: str
    layout: Layout
    stage: Stage
    direction: torch.dtype
    flat: FlatShard | None = None

    @property
    def numel(self) -> int:
        """Elements that this rank has of it, without padding."""
        return dtensor.local(self.param).numel() if self.flat is None else self.flat.numel


def build(sources: Sequence[Source], *, share: str, exchange_bytes: int, staging: Staging | None = None) -> Exchange:
    """The exchange of these parameters. Every rank must call it; weights are read, nothing is changed.

    In a process group it communicates, unless all parameters are whole and ``share`` is "never": the ranks compare
    what they are about to plan, prove that parts and copies of the weights are what they are taken for, and compare
    the plan.

    Raises:
        ValueError: a layout that is not understood, or is not what it says, or ranks that differ. All ranks raise.
    """
    rank, ranks = _world()
    sharded = [i for i, (param, *_, flat) in enumerate(sources) if flat is not None or dtensor.is_dtensor(param)]
    device = _device(sources, sharded, together=len(ranks) > 1)
    meshes: dict[int, Mesh] = {}
    if len(ranks) > 1 and (sharded or share != "never"):
        try:
            meshes = _agreed(sources, sharded, rank, ranks, device, (share, exchange_bytes))
        except ValueError as error:
            if sharded or share == "always":
                raise
            _logger.warning("%s: each rank orthogonalises all of its matrices, as share=never does.", error)
            ranks = [rank]
    else:
        _prove_flat(sources, lambda flags: flags)
        ranks = [rank]
    entries = []
    for i, (param, name, layout, stage, direction, flat) in enumerate(sources):
        wire = stage.wire(direction, device.type)
        held = [(name, tuple(param.shape), meshes.get(i) or everywhere(ranks), 0)] if flat is None else flat.params
        entries += [Entry(own, shape, layout, how, stage, wire, i, offset) for own, shape, how, offset in held]
    planned = plan(entries, share=share, exchange_bytes=exchange_bytes, balance=flops_per_byte(device.type))
    exchange, problem = None, None
    try:
        exchange = Exchange(
            planned,
            rank,
            local_sizes=[source.numel for source in sources],
            device=device,
            batch_bytes=0 if device.type == "cpu" else exchange_bytes,  # batches save launches, and nothing on a CPU
            staging=staging or Staging(),
            padded=[i for i, s in enumerate(sources) if s.flat is not None and s.numel < s.param.numel()],
        )
    except ValueError as error:
        problem = error
    if len(ranks) > 1:
        fine, alike = agree.same([problem is None, agree.digest(planned)], device)
        problem = problem or (None if fine else ValueError("another rank could not carry out the plan: see its error"))
        if problem is None and not alike:
            problem = ValueError("ranks planned different exchanges: do they run the same versions of this package?")
    if problem is not None:
        raise problem
    if rank == 0 and planned.rounds:
        moving = sum(job.round is not None for job in planned.jobs)
        _logger.info(
            "%d of %d matrices travel between %d ranks, in %d rounds; the busiest rank receives %.1f MB a step",
            *(moving, len(planned.jobs), len(ranks), planned.rounds, max(planned.received.values()) / 1e6),
        )
    return exchange


def _world() -> tuple[int, list[int]]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), list(range(dist.get_world_size()))
    return 0, [0]


def _device(sources: Sequence[Source], sharded: Sequence[int], *, together: bool) -> torch.device:
    """Where matrices are gathered and orthogonalised: where the process group communicates."""
    if sharded:
        first = sources[sharded[0]]
        return dtensor.device(first.param) if first.flat is None else first.flat.device
    device = sources[0].param.device
    if together and f"{device.type}:" not in dist.get_backend_config():
        return dtensor.current_device(torch.accelerator.current_accelerator().type)
    return device


def _agreed(
    sources: Sequence[Source],
    sharded: Sequence[int],
    rank: int,
    ranks: Sequence[int],
    device: torch.device,
    options: tuple[str, int],
) -> dict[int, Mesh]:
    """The meshes of the DTensors, once all ranks have the same parameters and every layout has been proven."""
    meshes, problem = {}, None
    try:
        meshes = {i: _mesh(sources[i], ranks) for i in sharded if sources[i].flat is None}
    except ValueError as error:
        problem = error
    described = []
    for i, source in enumerate(sources):
        held = meshes.get(i) if source.flat is None else source.flat.params
        described.append((source.param.shape, source.layout, source.stage, source.direction, held))
    fine, count, options_alike, alike = agree.same(
        [problem is None, len(sources), agree.digest(options), agree.digest(described)], device
    )
    if problem is not None or not fine:
        raise problem or ValueError("another rank refused the layout of its parameters: see its error")
    if not count:
        raise ValueError(f"ranks have different numbers of parameters for matrices, here {len(sources)}")
    if not options_alike:
        raise ValueError(f"ranks have different options, here share={options[0]}, exchange_bytes={options[1]}")
    if not alike:
        each = agree.same([agree.digest(value) for value in described], device)
        raise ValueError(f"{sources[each.index(False)].name} has another shape, layout or options on another rank")

    _prove_flat(sources, lambda flags: agree.everybody(flags, device))
    plain = [i for i, source in enumerate(sources) if i not in meshes and source.flat is None]
    copies = agree.are_copies([sources[i].param for i in plain], device)
    for i, is_copy in zip(plain, copies, strict=True):
        if not is_copy:
            raise ValueError(
                f"{sources[i].name} is not a DTensor and has different weights on different ranks, so that it is "
                "neither sharded in a way that is known here, nor replicated"
            )
    kinds = {(tuple(sources[i].param.shape), mesh): i for i, mesh in reversed(meshes.items())}
    told = agree.everybody([agree.is_cut_as_told(sources[i].param, meshes[i], rank) for i in kinds.values()], device)
    for i, is_true in zip(kinds.values(), told, strict=True):
        if not is_true:
            raise ValueError(
                f"{sources[i].name} is not cut as its placements {sources[i].param.placements} say: its parts do not "
                "lie where its full tensor has them"
            )
    return meshes


def _prove_flat(sources: Sequence[Source], on_all: Callable[[list[bool]], list[bool]]) -> None:
    """Raises ValueError, on all ranks, where some flat tensor does not hold the weights that it is taken for.

    Args:
        on_all: for each flag, whether it is set on all ranks.
    """
    for source in sources:
        if source.flat is not None:
            told = on_all(zero.are_weights(source.flat, source.param))
            for param, is_true in zip(source.flat.params, told, strict=True):
                if not is_true:
                    raise ValueError(
                        f"{param.name} of shape {param.shape} does not lie where DeepSpeed {zero.version()} is taken "
                        f"to keep it in its flat tensors: those do not hold its weights (tested: {zero.TESTED}). "
                        "Nothing has been changed. Use one of those versions, or an element-wise rule (cwd_adamw)"
                    )


def _mesh(source: Source, ranks: Sequence[int]) -> Mesh:
    try:
        mesh = dtensor.mesh_of(source.param)
        check(tuple(source.param.shape), mesh)
    except ValueError as error:
        raise ValueError(f"{source.name} is a DTensor in a layout that is not supported: {error}") from None
    if sorted(mesh.ranks) != list(ranks):
        raise ValueError(
            f"{source.name} lies on ranks {sorted(mesh.ranks)} only, of {len(ranks)}; its matrices can be exchanged "
            "among all ranks only. Use an element-wise rule for it, such as adamw"
        )
    return mesh
