"""One rank: steps every case of zero_tables.py under real DeepSpeed engines, and writes what it saw.

    RANK=0 WORLD_SIZE=2 python -m tests.distributed.zero_ranks FOLDER

FOLDER/WORLD-RANK.json holds, by case, "" or what was wrong. Gradients are the same given numbers as in the injected
table; rank 0 contributes all of them, times the number of ranks, so that their mean is exact.
"""

import datetime
import json
import os
import sys
from functools import cache
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from hf_cwd import CWDOptimizer, StepStatistics
from hf_cwd.rules import RULES
from tests.distributed import zero_refusals
from tests.distributed.given_gradients import one_process, traffic
from tests.distributed.given_gradients.one_process import initial, of_matrices
from tests.distributed.given_gradients.ranks import outcome, same
from tests.distributed.given_gradients.small import assert_alike, dyadic
from tests.distributed.given_gradients.tables import PARAMETERS, STEPS, Variant
from tests.distributed.zero_tables import CONFIGS, cases
from tests.support import garbage

TIMEOUT = 120  # seconds, of the process group
MUON = Variant("muon", (("ns_dtype", "float32"),))
SPACING = 10_000  # between the numbers of one parameter's elements and the next one's


class Holder(nn.Module):
    """A parameter in a module of its own: stage 3 gathers it when the module is called."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self, coefficient):
        return (self.weight * coefficient.to(self.weight.dtype)).sum()


class Model(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.holders = nn.ModuleList(Holder(value.clone()) for value in values.values())

    def forward(self, coefficients):
        return sum(holder(c) for holder, c in zip(self.holders, coefficients, strict=True))

    def params(self):
        return dict(zip(PARAMETERS, (holder.weight for holder in self.holders), strict=True))


def make(params, variant, **changes):
    """Parameters whose matrices lie alike share a group, and so a flat tensor."""
    groups = {}
    for group in one_process.groups(params, variant.rule):
        # A matrix with 35 elements has a flat tensor of its own, which has padding on one rank too.
        odd = any(name == "odd" for name, _ in group["params"])
        kind = groups.setdefault((group.get("algorithm"), repr(group.get("layout")), odd), {**group, "params": []})
        kind["params"] += group["params"]
    options = {"lr": 1e-2, "weight_decay": 0.5, **dict(variant.options), **changes}
    return CWDOptimizer(list(groups.values()), algorithm=variant.rule, **options)


def engine_of(config, values, variant):
    """A DeepSpeed engine with our optimizer, as Accelerate makes it."""
    model = Model(values)
    optimizer = make(model.params(), variant)
    top = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}
    top |= {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0, "steps_per_print": 10**9, **config.top}
    zero = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, **config.zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**top, "zero_optimization": zero})
    assert type(engine.optimizer).__name__ == config.optimizer
    assert engine.basic_optimizer is optimizer
    return engine, optimizer


@cache
def held(name):
    """For each flat tensor of matrices, by parameter, which elements of it each rank has.

    It is DeepSpeed that cuts the numbers, as it cuts the parameters: each element is given a number of its own.
    """
    config = CONFIGS[name]
    if config.optimizer == "BF16_Optimizer":  # it takes nothing but bfloat16, and lays parameters out as stage 1 does
        return held("zero1")
    numbers = {
        name: SPACING * (i + 1) + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for i, (name, (shape, _)) in enumerate(PARAMETERS.items())
    }
    # In bfloat16 the numbers would be rounded; the places do not depend on it.
    engine, _ = engine_of(config._replace(top={}), numbers, MUON)
    flats = flat_tensors(engine)
    own = []
    for flat in flats:
        values = flat.detach()[~flat.detach().isnan()].long()  # padding is NaN, or zero
        values = values[values >= SPACING]
        own.append({n: values[values // SPACING == i + 1] % SPACING for i, n in enumerate(PARAMETERS)})
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    result = []
    for k in range(len(own)):
        of_flat = {
            n: [rank[k][n] for rank in gathered] for n in PARAMETERS if any(len(rank[k][n]) for rank in gathered)
        }
        for n, elements in of_flat.items():
            numel = torch.Size(PARAMETERS[n][0]).numel()
            assert sorted(torch.cat(elements).tolist()) == list(range(numel)), f"{n} is not cut into parts"
        if any(n in of_matrices(MUON) for n in of_flat):
            result.append(of_flat)
    return result


def flat_tensors(engine):
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    raise AttributeError("no flat tensors")


def whole(p):
    if not hasattr(p, "ds_id"):
        return p.detach().clone()
    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def check_traffic(case, optimizer, seen, rank, world):
    """Raises AssertionError unless exactly what has to move moved, in as few calls as that takes."""
    names, options = of_matrices(case.variant), dict(case.variant.options)
    if not names:
        assert not seen.calls, f"an element-wise rule communicated: {dict(seen.calls)}"
        return
    itemsize = {"bfloat16": 2, "float64": 4}.get(options.get("ns_dtype"), 4)
    own, rounds, moving = [0] * world, 0, 0
    flats = held(case.config)
    if CONFIGS[case.config].optimizer == "BF16_Optimizer":  # it steps all groups at once
        flats = [{name: elements for of_flat in flats for name, elements in of_flat.items()}]
    assert len(optimizer.exchanges) == len(flats)
    for exchange, of_flat in zip(optimizer.exchanges, flats, strict=True):
        plan = exchange.plan
        entries = [name.split("'")[1] for name in (entry.name for entry in plan.entries)]
        assert sorted(entries) == sorted(of_flat), "the flat tensor holds these parameters"
        shares = {n: traffic.shares(traffic.homes(*PARAMETERS[n]), of_flat[n]) for n in of_flat}
        alike = {n: [0] * world for n in of_flat}
        everybody = exchange.group.ranks
        bytes_, largest = traffic.expected(everybody, plan.jobs, entries, shares, alike, set(of_flat), itemsize)
        totals = [sum(bytes_[receiver, sender] for sender in range(world)) for receiver in range(world)]
        assert [plan.received[r] for r in range(world)] == totals, f"the plan says {plan.received}, not {totals}"
        assert plan.rounds == traffic.rounds(totals, largest, options.get("exchange_bytes", 1 << 28))
        own = [a + bytes_[rank, sender] for sender, a in enumerate(own)]
        rounds += plan.rounds
        moving += plan.rounds > 0
        if "zero3" not in case.config:
            moved = {job.entry for job in plan.jobs if job.round is not None}
            sources = [plan.entries[entry].source for entry in moved]
            assert max(map(sources.count, sources), default=0) <= world - 1, "what no boundary of a part cuts moves"
    assert seen.received == own, f"received {seen.received} bytes from each rank instead of {own}"
    once = {"all_to_all_single": 2 * rounds, "all_reduce": moving} if rounds else {}
    assert dict(seen.calls) == once, f"{dict(seen.calls)} instead of {once}"


class Reference:
    """The same steps in one process, of float32 masters."""

    def __init__(self, variant, steps=STEPS):
        self.params = {name: nn.Parameter(value) for name, value in initial(torch.float32).items()}
        self.optimizer = make(self.params, variant, **({"share": "never"} if of_matrices(variant) else {}))
        for step in range(steps):
            for p, g in zip(self.params.values(), gradients(step), strict=True):
                p.grad = g
            self.optimizer.statistics = StepStatistics(sample=step)
            self.optimizer.step()
        self.statistics = self.optimizer.statistics.read()


reference = cache(Reference)


def gradients(step):
    shapes = [shape for shape, _ in PARAMETERS.values()]
    found = [dyadic(shape, 1000 * (step + 1) + i) for i, shape in enumerate(shapes)]
    if step == 1:
        found[0].zero_()
    return found


def run(case, rank, world):
    config = CONFIGS[case.config]
    engine, optimizer = engine_of(config, initial(torch.float32), case.variant)
    step_of_optimizer, seen = optimizer.step, None

    def watched(*args, **kwargs):
        with seen:
            return step_of_optimizer(*args, **kwargs)

    optimizer.step = watched
    for step in range(STEPS):
        seen = traffic.Collectives(world)
        share = float(world) if rank == 0 else 0.0
        optimizer.statistics = statistics = StepStatistics(sample=step)
        engine.backward(engine([g * share for g in gradients(step)]))
        engine.step()
        if step:
            check_traffic(case, optimizer, seen, rank, world)
    one, params = reference(case.variant), engine.module.params()
    assert_alike(statistics.read(), one.statistics)
    keys = RULES[case.variant.rule].state_keys(one.optimizer.param_groups[0])
    for name, p in params.items():
        wanted, found = one.params[name].detach(), whole(p)
        dtype = torch.bfloat16 if config.is_bf16 else torch.float32
        assert same(found, wanted.to(dtype)), f"{name} differs by {(found - wanted).abs().max()}"
        if "round_robin" in case.config:
            continue  # DeepSpeed's table of what lies where is wrong then
        master = safe_get_full_fp32_param(p)
        assert same(master.view(wanted.shape), wanted), f"the master of {name} differs"
        state = one.optimizer.state[one.params[name]]
        for key in keys if dict(case.variant.options).get("state_dtype") is None else ():
            if key in state:
                full = safe_get_full_optimizer_state(p, key)
                assert same(full.view(wanted.shape), state[key]), f"{key} of {name} differs"
    steps = {int(state["step"]) for state in optimizer.state.values() if state}
    assert steps == {STEPS}, f"steps {steps}"
    engine.destroy()


def main():
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    # New memory, and so what DeepSpeed leaves as padding, is NaN: it must not get anywhere.
    torch.use_deterministic_algorithms(True, warn_only=True)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    store = dist.FileStore(f"{folder}/{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    os.environ.setdefault("LOCAL_RANK", str(rank))
    deepspeed.init_distributed("gloo")
    results = {}
    for case in cases(world):
        results[str(case)] = outcome(run, case, rank, world)
        garbage.pass_over()  # stage 3 leaves much behind
    for name, (function, *arguments) in zero_refusals.scenarios(world).items():
        results[name] = outcome(function, rank, world, *arguments)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
