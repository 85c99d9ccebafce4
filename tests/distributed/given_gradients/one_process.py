"""What the table steps: values, gradients and groups, who holds what of them, and one process's steps."""

import hashlib
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hf_cwd import CWDOptimizer, StepStatistics
from hf_cwd.rules import RULES
from tests.distributed.given_gradients import layouts, traffic
from tests.distributed.given_gradients.small import dyadic, local
from tests.distributed.given_gradients.tables import PARAMETERS, STEPS, Variant


def initial(dtype):
    return {name: dyadic(shape, seed, 8).to(dtype) for seed, (name, (shape, _)) in enumerate(PARAMETERS.items())}


def groups(params, rule):
    """A group for each layout of matrices and one of the companion rule, or a single one of an element-wise rule."""
    if RULES[rule].matrix is None:
        return [{"params": list(params.items())}]
    result = [{"params": [], "algorithm": RULES[rule].companion, "lr": 2e-2}]
    for name, param in params.items():
        shape, layout = PARAMETERS[name]
        if len(shape) < 2:
            result[0]["params"].append((name, param))
        else:
            result.append({"params": [(name, param)], "layout": layout})
    return result


def of_matrices(variant):
    """The parameters whose matrices are exchanged, in the order of the optimizer's."""
    return [name for name, (shape, _) in PARAMETERS.items() if RULES[variant.rule].matrix and len(shape) > 1]


def make(params, variant, **changes):
    options = {"lr": 1e-2, "weight_decay": 0.5, **dict(variant.options), **changes}
    return CWDOptimizer(groups(params, variant.rule), algorithm=variant.rule, **options)


@cache
def placed(layout):
    """For each parameter the numbers of the elements that each rank holds, and what the ranks of a replica share.

    It is the framework that cuts the numbers, as it cuts the parameters.
    """
    numbers = {name: torch.arange(torch.Size(shape).numel()).view(shape) for name, (shape, _) in PARAMETERS.items()}
    model = layouts.Model({name: value.double() for name, value in numbers.items()})
    getattr(layouts, layout)(model)
    own = {}
    for name, p in model.named_parameters():
        replica = (dist.get_rank() if dist.is_initialized() else 0,)
        if isinstance(p, DTensor):
            coordinates = zip(p.placements, p.device_mesh.get_coordinate(), strict=True)
            copies = [c for k, c in coordinates if k.is_replicate()]
            replica = (*p.device_mesh.mesh.flatten().tolist(), -1, *copies)
        own[name] = (local(p.detach()).long(), replica)
    if not dist.is_initialized():
        return {name: ([elements], [replica]) for name, (elements, replica) in own.items()}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return {name: tuple(zip(*(rank[name] for rank in gathered), strict=True)) for name in own}


def cut(value, elements):
    return value.flatten()[elements.flatten()].view(elements.shape)


def gradients(case, step, rank, world):
    """For each parameter the full gradient, and whether each rank has its part of it; None: no rank has one."""
    result = {}
    for i, (name, (shape, _)) in enumerate(PARAMETERS.items()):
        gradient, given = dyadic(shape, 1000 * (step + 1) + i), [True] * world
        missing = {"changing": (i + step) % 3 == 0 or name in ("odd", "norm"), "nobody": step == 1}
        if missing.get(case.pattern):
            gradient = None
        elif case.pattern == "zero" and (step == 1 or name in ("few", "experts")):
            gradient.zero_()
        elif case.pattern == "nan" and step == 1 and i % 3 == 0:
            gradient.view(-1)[2] = torch.nan
        elif case.pattern == "some_ranks":
            # Copies of one part have a gradient all or none: ranks that hold the same first element hold the same.
            elements = placed(case.layout)[name][0]
            firsts = [own.flatten()[0].item() if own.numel() else -1 for own in elements]
            parts = sorted(set(firsts))
            given = [(parts.index(first) + i + step) % 2 == 0 for first in firsts]
            if step == 2:  # one rank and its copies have all that there are
                given = [first == parts[-1] for first in firsts]
        result[name] = None if gradient is None or not any(given) else (gradient, given)
    return result


class Reference:
    """The same steps in one process.

    Where only some ranks have a gradient, the others leave their part alone, if it is an element-wise rule's or if no
    part of the parameter moves; so does the reference, of which it is this rank's part that is compared. Parts of
    matrices that do move count as zero.

    Args:
        moving: the parameters of which parts move.
    """

    def __init__(self, case, rank, moving):
        self.case, self.rank, self.moving = case, rank, moving
        self.params = {name: nn.Parameter(value) for name, value in initial(case.variant.dtype).items()}
        alone = {"share": "never"} if of_matrices(case.variant) else {}
        self.optimizer = make(self.params, case.variant, **alone)

    def step(self, given):
        for name, p in self.params.items():
            p.grad = None
            if given[name] is None:
                continue
            gradient, has = given[name]
            if name in self.moving or has[self.rank]:
                p.grad = gradient.clone().to(p.dtype)
            if name in self.moving and not all(has):
                for rank, elements in enumerate(placed(self.case.layout)[name][0]):
                    if not has[rank]:
                        p.grad.view(-1)[elements.flatten()] = 0
        self.optimizer.step()

    def digest(self):
        numbers = hashlib.sha256()
        for p in self.params.values():
            numbers.update(p.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return numbers.hexdigest()


finished: dict[tuple[Variant, str], Reference] = {}


def reference_of(case, rank, world, moving):
    """The reference after all steps; one for all layouts, unless it depends on who holds what."""
    key = (case.variant, case.pattern)
    if key in finished:
        return finished[key]
    reference = Reference(case, rank, moving)
    with traffic.Collectives(world) as seen:
        for step in range(STEPS):
            reference.optimizer.statistics = StepStatistics(sample=step)
            reference.step(gradients(case, step, rank, world))
        reference.statistics = reference.optimizer.statistics.read()
    assert not seen.calls, f"one process communicated: {dict(seen.calls)}"
    if case.pattern != "some_ranks":
        finished[key] = reference
    return reference
