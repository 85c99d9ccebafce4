"""One rank: trains a step of each case under a real DeepSpeed engine, and compares it with what `explain` computes.

    RANK=0 WORLD_SIZE=3 python -m tests.estimate.zero_ranks FOLDER

FOLDER/RANK.json holds, by case, what differs, and what the command must have printed of the exchanges.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_cwd.cli import explain
from hf_cwd.cli.layout import parse_layout
from hf_cwd.estimate import costs, zero_costs
from hf_cwd.estimate.step_cost import StepCost, step_cost
from hf_cwd.rules import RULES
from hf_cwd.trainer.optim_args import optimizer_arguments
from tests.estimate.zero_tables import CASES, MODELS, SMALL, WORLD, Case


def model_of(case: Case) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[case.model]))
    model.get_input_embeddings().requires_grad_(not case.frozen)
    return model


def arguments_of(case: Case, folder: Path) -> TrainingArguments:
    options = {"optim": case.optim, "optim_args": case.optim_args or None, "use_cpu": True, "report_to": "none"}
    return TrainingArguments(str(folder / "out"), weight_decay=0.1, save_strategy="no", **options)


def told(case: Case, folder: Path) -> tuple[list[zero_costs.FlatTensor], StepCost]:
    """What the command computes of the model on the meta device."""
    with torch.device("meta"):
        model = model_of(case)
    layout, dtype = parse_layout(case.layout, WORLD), getattr(torch, case.dtype)
    arguments = optimizer_arguments(arguments_of(case, folder))
    routing = explain.routed(model, RULES[case.optim.removeprefix("cwd_")])
    states = {r.name: explain.state_bytes(r, arguments, zero_costs.MASTER) for r in routing.routes}
    options = {"arguments": arguments, "states": states, "dtype": dtype, "device": "cpu"}
    flats = zero_costs.flat_tensors(costs.groups(model, routing), layout)
    return flats, step_cost(model, routing, layout, **options)


def engine_of(case: Case, folder: Path) -> Any:
    """A DeepSpeed engine with the optimizer that the Trainer makes, as Accelerate makes it."""
    torch.manual_seed(0)
    model = model_of(case)
    optimizer = Trainer(model=model, args=arguments_of(case, folder)).create_optimizer()
    stages = {"stage": int(case.layout[4]), "sub_group_size": case.sub_group_size, "reduce_bucket_size": 10_000}
    stages |= {"stage3_param_persistence_threshold": 10 * SMALL["hidden_size"]}  # what "auto" stands for
    if case.layout.endswith("_offload"):
        stages["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stages, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": case.dtype == "bfloat16"}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.basic_optimizer is optimizer
    return engine


def size_of(tensors: Any) -> int:
    """Bytes of the memory that tensors lie in, each of which is counted once."""
    storages = (t.untyped_storage() for t in tensors if t is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def memory(engine: Any, gradients: int) -> costs.RankMemory:
    """What this rank keeps, found in DeepSpeed's attributes after a step."""
    keeper, params = engine.optimizer, list(engine.module.parameters())
    flats = flat_tensors(engine)
    weights, others = size_of(params), getattr(keeper, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    if engine.zero_optimization_stage() == 3:  # parts, and the small ones whole: their padding is not counted
        weights = size_of(p.ds_tensor for p in params) + sum(p.nbytes for p in params)
    states = [t for flat in flats for t in engine.basic_optimizer.state[flat].values() if t.ndim]
    return costs.RankMemory(weights, gradients, size_of([*flats, *others, *states]))


def flat_tensors(engine: Any) -> list[torch.Tensor]:
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def trained(engine: Any) -> int:
    """Trains a step; the bytes of gradients that there are before it."""
    keeper, params, found = engine.optimizer, list(engine.module.parameters()), []
    if engine.zero_optimization_stage() == 1:
        reduce_gradients = keeper.reduce_gradients

        def watched(**options: Any) -> None:  # stage 1 lets go of what it has reduced
            found.append(size_of(p.grad for p in params))
            reduce_gradients(**options)

        keeper.reduce_gradients = watched
    ids = torch.randint(0, SMALL["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    if engine.zero_optimization_stage() == 2 and not keeper.cpu_offload:
        found.append(size_of(t for tensors in keeper.averaged_gradients.values() for t in tensors))
    if engine.zero_optimization_stage() == 3:
        found.append(size_of([keeper.grad_partitions_flat_buffer]))
    found.append(size_of(flat.grad for flat in flat_tensors(engine)))
    engine.step()
    return sum(found)


def differences(case: Case, folder: Path) -> dict[str, Any]:
    zero_costs.SUB_GROUP_SIZE = case.sub_group_size
    flats, cost = told(case, folder)
    engine = engine_of(case, folder)
    gradients = trained(engine)
    optimizer, keeper, problems = engine.basic_optimizer, engine.optimizer, []
    groups = getattr(keeper, "sub_group_to_group_id", range(len(flats)))
    real = [(flat, optimizer.param_groups[groups[i]]) for i, flat in enumerate(flat_tensors(engine))]
    for (flat, group), mine in zip(real, flats, strict=True):
        shard = optimizer._originals.view(flat, group).shard
        found, wanted = ([p[1:] for p in some] for some in (shard.params, mine.params))  # names are worded otherwise
        if (found, flat.numel(), group["algorithm"]) != (wanted, mine.numel, mine.group.rule.name):
            problems.append(f"told {wanted} in {mine.numel} of {mine.group.rule.name}, is {found} in {flat.numel()}")
    plans = [exchange.plan for exchange in optimizer.exchanges]
    for plan, mine in zip(plans, cost.plans, strict=True):
        if (plan.jobs, plan.rounds, plan.received, plan.flops) != (mine.jobs, mine.rounds, mine.received, mine.flops):
            problems.append(f"told {mine}, the optimizer's plan is {plan}")
        for entry, other in zip(plan.entries, mine.entries, strict=True):
            if repr(other.name) not in entry.name or entry != dataclasses.replace(other, name=entry.name):
                problems.append(f"told {other}, is {entry}")
    own = cost.costs[dist.get_rank()]
    if (found := memory(engine, gradients)) != own[:3]:
        problems.append(f"keeps {found}, told {own}")
    engine.destroy()
    received = [sum(plan.received[rank] for plan in plans) for rank in range(WORLD)]
    return {"received": received, "rounds": sum(plan.rounds for plan in plans), "problems": problems}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.init_distributed("gloo")
    results = {str(case): differences(case, folder) for case in CASES}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
