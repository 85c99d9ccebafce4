"""What a step of an optimizer costs each rank of a parallel run, by the plans that training carries out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.plan import EXCHANGE, Plan, flops_per_byte, plan
from hf_cwd.estimate import costs, zero
from hf_cwd.estimate.costs import Cost
from hf_cwd.estimate.layouts import Parallelism, Zero, shardings
from hf_cwd.routing.route import Routing


class Bill(NamedTuple):
    """What a layout costs.

    Attributes:
        costs: of each rank.
        plans: carried out one after another in a step; none for element-wise rules.
        remarks: what to know of the numbers.
    """

    costs: list[Cost]
    plans: list[Plan]
    remarks: list[str]


def bill(
    model: nn.Module,
    routing: Routing,
    layout: Parallelism | Zero,
    *,
    arguments: Mapping[str, Any],
    states: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
) -> Bill:
    """What a step costs, by the plans that training carries out.

    Args:
        arguments: keyword arguments of the optimizer.
        states: bytes of state that an element of each parameter has.
        dtype: of the parameters.
        device: type of the device that trains.

    Raises:
        ValueError: the model, or an argument of the optimizer, does not go with the layout.
    """
    options = {name: arguments.get(name, kind.default) for name, kind in EXCHANGE.items()}
    options["balance"] = flops_per_byte(device)
    if isinstance(layout, Zero):
        if arguments.get("master", "none") != "none":
            raise ValueError(
                f"--optim_args master={arguments['master']} with --layout {layout}: DeepSpeed gives the optimizer "
                "float32 masters, and there is nothing to keep of others. Leave master out"
            )
        flats = zero.flat_tensors(costs.groups(model, routing), layout)
        kept = zero.kept(model, flats, layout, states=states, dtype=dtype)
        plans, peaks = [], []
        for flat in flats:
            if flat.group.rule.matrix is not None:
                plans.append(plan(zero.entries(flat, arguments=arguments, device=device), **options))
                away = layout.offload and device != "cpu"  # directions lie where the flat tensors do
                peaks.append(costs.buffers(plans[-1], [0 if away else flat.numel]))
        remarks = zero.remarks(model, flats, layout, dtype=dtype, device=device)
    else:
        kept = costs.kept(model, shardings(model, layout), states=states, dtype=dtype)
        found = costs.entries(model, routing, layout, arguments=arguments, dtype=dtype, device=device)
        plans, remarks = [plan(found, **options)] if found else [], []
        peaks = [costs.buffers(one) for one in plans]
    return Bill(costs.costs(kept, plans, peaks), plans, remarks)
