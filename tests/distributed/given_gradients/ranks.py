"""One rank: steps every case of the injected-gradients table for this world size, and writes what it saw.

    RANK=0 WORLD_SIZE=2 python -m tests.distributed.given_gradients.ranks FOLDER

FOLDER/WORLD-RANK.json holds, by case, "" or what was wrong. The comparison is with plain tensors in the same process,
stepped without any communication; their digests are written too, for the test compares them with one process's.
"""

import contextlib
import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_cwd import StepStatistics
from tests.distributed.given_gradients import layouts, tables, traffic
from tests.distributed.given_gradients.one_process import (
    cut,
    gradients,
    initial,
    make,
    of_matrices,
    placed,
    reference_of,
)
from tests.distributed.given_gradients.scenarios import scenarios
from tests.distributed.given_gradients.small import assert_alike, local
from tests.distributed.given_gradients.tables import PARAMETERS, STEPS

TIMEOUT = 60  # seconds, of the process group


def sharded_gradient(param, gradient, elements):
    part = cut(gradient, elements).to(param.dtype)
    if not isinstance(param, DTensor):
        return part
    options = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    return DTensor.from_local(part, param.device_mesh, param.placements, **options)


def same(ours, wanted):
    """Bit for bit, but for the payload of a NaN."""
    zero = torch.zeros((), dtype=wanted.dtype)
    return ours.dtype == wanted.dtype and all(
        torch.equal(a, b)
        for a, b in (
            (ours.isnan(), wanted.isnan()),
            (ours.where(~ours.isnan(), zero), wanted.where(~wanted.isnan(), zero)),
        )
    )


def parameters_of(exchange):
    """The names of its parameters, by the number of the plan's entry."""
    return [entry.name.split("'")[1] for entry in exchange.plan.entries]


def check_traffic(case, optimizer, seen, given, step, rank, world):
    """Raises AssertionError unless exactly what has to move moved, in as few calls as that takes."""
    calls, options = dict(seen.calls), dict(case.variant.options)
    if not of_matrices(case.variant):
        assert not calls, f"an element-wise rule communicated: {calls}"
        return
    if case.layout == "plain" and options.get("share") != "always":
        assert not calls, f"ranks that nothing connects communicated: {calls}"
    if case.layout in ("plain", "ddp") and options.get("share") == "never":
        assert not calls, f"share=never communicated: {calls}"
    if step == 0:
        return
    exchanges = [exchange for exchange in optimizer.exchanges if exchange.plan.rounds]
    rounds = sum(exchange.plan.rounds for exchange in exchanges)
    once = {"all_to_all_single": 2 * rounds, "all_reduce": len(exchanges)} if rounds else {}
    assert calls == once, f"{calls} instead of {once}"
    received = [0] * world
    for exchange in exchanges:
        check_exchange(case, exchange, given, rank, received)
    assert seen.received == received, f"received {seen.received} bytes from each rank instead of {received}"
    if options.get("share") == "never" and case.layout in ("replicated", "whole_experts"):
        assert not calls, "share=never in a replicated layout"


def check_exchange(case, exchange, given, rank, received):
    """Adds what this rank has to receive from each in an exchange, and compares it with what the plan says."""
    plan, names, ranks = exchange.plan, parameters_of(exchange), exchange.group.ranks
    options = dict(case.variant.options)
    sizes = {"bfloat16": 2, "float32": 4, "float64": 8}
    direction = 8 if case.variant.dtype == torch.float64 else 4
    itemsize = min(direction, sizes.get(options.get("ns_dtype"), direction))
    elements, replicas = zip(*(placed(case.layout)[name] for name in names), strict=True)
    held = {n: traffic.shares(traffic.homes(*PARAMETERS[n]), e) for n, e in zip(names, elements, strict=True)}
    replicas = dict(zip(names, replicas, strict=True))
    present = {name for name in names if given[name] is not None}  # on some rank
    bytes_, largest = traffic.expected(ranks, plan.jobs, names, held, replicas, present, itemsize)
    own = {sender: bytes_[rank, sender] for sender in ranks}
    for sender, size in own.items():
        received[sender] += size
    if present == set(names):
        totals = [sum(bytes_[receiver, sender] for sender in ranks) for receiver in ranks]
        assert sum(own.values()) == plan.received[rank], "the plan says otherwise"
        rounds = traffic.rounds(totals, largest, options.get("exchange_bytes", 1 << 28))
        assert plan.rounds == rounds, f"{plan.rounds} rounds instead of {rounds}"
    if case.layout == "whole_experts":
        assert not [job for job in plan.jobs if names[job.entry].startswith("experts") and job.round is not None]


def run(case, rank, world):
    model = layouts.Model(initial(case.variant.dtype))
    getattr(layouts, case.layout)(model)
    params = {name: dict(model.named_parameters())[name] for name in PARAMETERS}
    optimizer = make(params, case.variant)
    if case.layout == "ddp":
        optimizer.mark_replicated(params.values())
    for step in range(STEPS):
        given = gradients(case, step, rank, world)
        for name, p in params.items():
            has = given[name] is not None and given[name][1][rank]
            p.grad = sharded_gradient(p, given[name][0], placed(case.layout)[name][0][rank]) if has else None
        deep = traffic.Operators() if case.pattern == "changing" else contextlib.nullcontext()
        optimizer.statistics = StepStatistics(sample=step)
        with traffic.Collectives(world) as seen, deep:
            optimizer.step()
        if step and case.pattern == "changing":
            assert deep.count == seen.calls.total(), "a collective went past torch.distributed's functions"
        check_traffic(case, optimizer, seen, given, step, rank, world)
    moving = {
        parameters_of(exchange)[job.entry]
        for exchange in optimizer.exchanges
        for job in exchange.plan.jobs
        if job.round is not None
    }
    rounds = max((exchange.plan.rounds for exchange in optimizer.exchanges), default=0)
    found = optimizer.statistics.read()
    reference = reference_of(case, rank, world, moving)
    if case.pattern != "some_ranks":  # a rank's reference then has that rank's gradients only
        assert_alike(found, reference.statistics)
    for name, p in params.items():
        elements, one = placed(case.layout)[name][0][rank], reference.params[name]
        assert same(local(p.detach()), cut(one.detach(), elements)), f"{name} differs"
        own, wanted = (o.state.get(q, {}) for o, q in ((optimizer, p), (reference.optimizer, one)))
        assert own.keys() == wanted.keys(), f"the state of {name} has {list(own)}, not {list(wanted)}"
        for key, value in own.items():
            assert key == "step" or isinstance(value, DTensor) == isinstance(p, DTensor), f"{key} of {name} is not cut"
            expected = wanted[key] if key == "step" else cut(wanted[key], elements)
            assert same(local(value), expected), f"{key} of {name} differs"
    return {"rounds": rounds, "reference": reference.digest()}


def outcome(function, *arguments):
    """What a case has to say, with "problem" where it failed."""
    try:
        return {"problem": ""} | (function(*arguments) or {})
    except Exception:
        return {"problem": traceback.format_exc()}


def main():
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timeout)
    results = {}
    for case in tables.cases(world):
        results[str(case)] = outcome(run, case, rank, world)
    for name, (function, *arguments) in scenarios(world).items():
        results[name] = outcome(function, rank, world, *arguments)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
