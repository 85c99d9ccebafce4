"""What may change between two steps, applied to an optimizer that keeps its items and to one that forgets them."""

import copy
from collections.abc import Iterator

import torch

from hf_cwd import CWDOptimizer
from hf_cwd.kernels import KERNELS, selection
from hf_cwd.rules import RULES

SHAPES = [(8, 6), (16,), (4, 12), (33,), (12, 12)]


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


def parted(optimizer, params):
    """The groups have been alike since :func:`alike`."""
    optimizer.param_groups[1]["lr"] = 0.5


def alike(optimizer, params):
    first, second, *_ = optimizer.param_groups
    second.update({name: value for name, value in first.items() if name != "params"})


def transposed_parameter(optimizer, params):
    """Of the same shape, at the same address."""
    params[4].data = params[4].data.t()


def transposed_back(optimizer, params):
    transposed_parameter(optimizer, params)


def negative_parameter(optimizer, params):
    """At the same address."""
    params[4].data = torch._neg_view(params[4].data)


def negative_back(optimizer, params):
    negative_parameter(optimizer, params)


def negative_gradient(optimizer, params):
    params[3].grad = torch._neg_view(params[3].grad)


def narrow_gradient(optimizer, params):
    params[1].grad.data = params[1].grad.data.to(torch.bfloat16)


def eager_by_name(optimizer, params):
    optimizer.param_groups[0]["kernel"] = "eager"


def no_kernel_by_name(optimizer, params):
    optimizer.param_groups[0]["kernel"] = "auto"


def half_of_a_bucket(optimizer, params):
    bucket = torch.zeros(2 * params[3].numel())
    bucket[params[3].numel() :] = params[3].grad
    params[3].grad = bucket[params[3].numel() :]


def a_key_of_a_wrapper(optimizer, params):
    optimizer.state[params[0]]["lookahead_slow_buff"] = params[0].detach().clone()


def nothing(optimizer, params):
    pass


CHANGES = [
    *(nothing, nothing, lr, no_gradient, another_state_tensor, other_memory, options, transposed_gradient, loaded),
    *(nothing, counted_by_hand, alike, another_count, without_state, nothing, parted, half_of_a_bucket),
    *(negative_gradient, a_key_of_a_wrapper, transposed_parameter, transposed_back, negative_parameter),
    *(negative_back, narrow_gradient, eager_by_name, no_kernel_by_name, another_group),
]
KEEP = {nothing, lr, options, alike, parted, half_of_a_bucket}
OUTLAST = {
    no_gradient,
    transposed_gradient,
    negative_gradient,
    transposed_parameter,
    negative_parameter,
    narrow_gradient,
    eager_by_name,
}  # the step: they change the next


def problems(rule: str, kernel: str) -> Iterator[str]:
    """Differences between the two after each change; and changes after which the items were, or were not, kept."""
    module, given, previous = KERNELS[kernel], [], nothing
    update = module.update
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0, "lr": 0.02}]
        hyper = {"momentum": 0.9} if rule == "sgd" else {}
        made.append((CWDOptimizer(groups, lr=0.01, weight_decay=0.5, algorithm=rule, **hyper), params))

    def watched(rule, items, sums, cache, kept):
        given[-1].append(items)
        update(rule, items, sums, cache, kept)

    module.update = watched
    fastest, selection.FASTEST["cpu"] = selection.FASTEST["cpu"], kernel
    selection._kernel_for.cache_clear()
    try:
        for number, change in enumerate([nothing, *(c for each in CHANGES for c in (each, nothing))]):
            for forgets, (optimizer, params) in enumerate(made):
                generator = torch.Generator().manual_seed(number)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                change(optimizer, params)
                if forgets:
                    optimizer._kept.clear()
                given.append([])
                optimizer.step()
            kept = number > 0 and len(given[-2]) == 1 and any(given[-2][0] is items for items in given[-4])
            wanted = number > 0 and change in KEEP and previous not in OUTLAST and kernel != "eager"
            if kept != wanted:
                yield f"{number} {change.__name__}: items kept {kept}, not {wanted}"
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
        module.update, selection.FASTEST["cpu"] = update, fastest
        selection._kernel_for.cache_clear()
