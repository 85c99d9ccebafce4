"""What an optimizer step costs each rank of a parallel run, from the plans that training executes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.plan import EXCHANGE, Entry, Plan, flops_per_byte, plan
from hf_cwd.estimate import costs, zero_costs
from hf_cwd.estimate.costs import RankCost
from hf_cwd.estimate.parallelism import Parallelism, Zero, shardings
from hf_cwd.routing.route import Routing


class StepCost(NamedTuple):
    """The cost of a step.

    Attributes:
        costs: one for each rank.
        plans: the exchanges of a step, executed one after another; none for element-wise rules.
        remarks: notes on the numbers, for the reader.
    """

    costs: list[RankCost]
    plans: list[Plan]
    remarks: list[str]


def step_cost(
    model: nn.Module,
    routing: Routing,
    parallelism: Parallelism | Zero,
    *,
    arguments: Mapping[str, Any],
    states: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
) -> StepCost:
    """Computes the cost of a step.

    Args:
        model: the model; its parameters may be on the meta device.
        arguments: keyword arguments of the optimizer.
        states: bytes of optimizer state for each element of a parameter, by the parameter's name.
        dtype: the dtype of the parameters.
        device: the type of the devices that train.

    Raises:
        ValueError: the parallelism does not fit the model, or an argument of the optimizer.
    """
    if isinstance(parallelism, Zero):
        return _zero_step_cost(
            model, routing, parallelism, arguments=arguments, states=states, dtype=dtype, device=device
        )
    memory = costs.memory(model, shardings(model, parallelism), states=states, dtype=dtype)
    entries = costs.entries(model, routing, parallelism, arguments=arguments, dtype=dtype, device=device)
    plans = [_plan(entries, arguments, device)] if entries else []
    return StepCost(costs.costs(memory, plans, [costs.buffers(each) for each in plans]), plans, [])


def _zero_step_cost(
    model: nn.Module,
    routing: Routing,
    parallelism: Zero,
    *,
    arguments: Mapping[str, Any],
    states: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
) -> StepCost:
    if arguments.get("master", "none") != "none":
        raise ValueError(
            f"master={arguments['master']} with {parallelism}: DeepSpeed keeps float32 masters itself, and the "
            "optimizer needs none. Leave master out"
        )
    flats = zero_costs.flat_tensors(costs.groups(model, routing), parallelism)
    memory = zero_costs.memory(model, flats, parallelism, states=states, dtype=dtype)
    plans, peaks = [], []
    for flat in flats:
        if flat.group.rule.matrix is not None:
            entries = zero_costs.entries(flat, arguments=arguments, device=device)
            plans.append(_plan(entries, arguments, device))
            is_offloaded = parallelism.offload and device != "cpu"  # directions are where the flat tensors are
            peaks.append(costs.buffers(plans[-1], [0 if is_offloaded else flat.numel]))
    remarks = zero_costs.remarks(model, flats, parallelism, dtype=dtype, device=device)
    return StepCost(costs.costs(memory, plans, peaks), plans, remarks)


def _plan(entries: Sequence[Entry], arguments: Mapping[str, Any], device: str) -> Plan:
    return plan(
        entries,
        share=arguments.get("share", EXCHANGE["share"].default),
        exchange_bytes=arguments.get("exchange_bytes", EXCHANGE["exchange_bytes"].default),
        balance=flops_per_byte(device),
    )
