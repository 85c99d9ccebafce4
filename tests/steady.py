"""What may change between two steps, applied to an optimizer that keeps its items and to one that forgets them."""

import copy
from collections.abc import Iterator

import torch

from hf_cwd import CWDOptimizer
from hf_cwd.kernels import KERNELS
from hf_cwd.rules import RULES

SHAPES = [(8, 6), (16,), (4, 12), (33,), (16, 8)]


def lr(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.03


def no_gradient(optimizer, params):
    params[1].grad = None


def another_state_tensor(optimizer, params):
    for name in RULES[optimizer.param_groups[0]["algorithm"]].state_keys(optimizer.param_groups[0]):
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name].clone()


def other_memory(optimizer, params):
    params[2].data = params[2].data.clone()


def options(optimizer, params):
    optimizer.param_groups[0].update(cautious=False, weight_decay=0.7)
    optimizer.param_groups[1].update(mask="gt", maximize=True)


def transposed_gradient(optimizer, params):
    params[0].grad = params[0].grad.t().contiguous().t()


def loaded(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def counted_by_hand(optimizer, params):
    optimizer.state[params[3]]["step"] += 5


def another_count(optimizer, params):
    optimizer.state[params[4]]["step"] = torch.tensor(40.0)


def without_state(optimizer, params):
    optimizer.state.pop(params[2])


def another_group(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones(5, 3)))
    optimizer.add_param_group({"params": [params[-1]], "weight_decay": 0.9})
    params[-1].grad = torch.ones(5, 3)


def nothing(optimizer, params):
    pass


CHANGES = [
    *(nothing, nothing, lr, no_gradient, another_state_tensor, other_memory, options, transposed_gradient, loaded),
    *(nothing, counted_by_hand, another_count, without_state, nothing, another_group),
]
KEEP_STEADY = {nothing, lr, options}


def problems(rule: str, kernel: str) -> Iterator[str]:
    """Differences between the two after each change; and changes after which the items were, or were not, kept."""
    module, kept, previous = KERNELS[kernel], [], nothing
    update = module.update
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0, "lr": 0.02}]
        hyper = {"momentum": 0.9} if rule == "sgd" else {}
        made.append((CWDOptimizer(groups, lr=0.01, weight_decay=0.5, algorithm=rule, kernel=kernel, **hyper), params))

    def watched(*arguments, steady):
        kept.append(steady)
        update(*arguments, steady=steady)

    module.update = watched
    try:
        for number, change in enumerate([nothing, *(c for each in CHANGES for c in (each, nothing))]):
            for forgets, (optimizer, params) in enumerate(made):
                generator = torch.Generator().manual_seed(number)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                change(optimizer, params)
                if forgets:
                    optimizer._cache.clear()
                optimizer.step()
            wanted = number > 0 and change in KEEP_STEADY and previous is not no_gradient  # which comes back here
            if kept[-2:] != [wanted, False]:
                yield f"{number} {change.__name__}: items kept {kept[-2:]}, not {[wanted, False]}"
            previous = change
            (one, ours), (other, theirs) = made
            for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                pairs = {"parameter": (p, q)} | {key: (one.state[p][key], other.state[q][key]) for key in one.state[p]}
                yield from (
                    f"{number} {change.__name__}: {name} of {k}"
                    for name, (a, b) in pairs.items()
                    if not torch.equal(a.detach(), b.detach())
                )
    finally:
        module.update = update
