"""What must be refused under DeepSpeed: before the first update, by every rank, with what is wrong."""

import torch
import torch.distributed as dist

from hf_cwd.rules import RULES
from tests.distributed import zero_ranks
from tests.distributed.given_gradients.one_process import initial
from tests.distributed.given_gradients.tables import Variant
from tests.distributed.zero_tables import CONFIGS


def refused(rank, world, config, options, spoil, message, error=ValueError):
    """A step raises, and no weight has changed."""
    values = initial(torch.bfloat16 if options else torch.float32)
    engine, optimizer = zero_ranks.engine_of(CONFIGS[config], values, Variant("muon", options))
    spoil(rank, engine, optimizer)
    before = [flat.detach().clone() for flat in zero_ranks.flat_tensors(engine)]
    refusal = "nothing"
    try:
        engine.backward(engine(zero_ranks.gradients(0)))
        engine.step()
    except error as raised:
        refusal = str(raised)
    assert message in refusal, f"{refusal} instead of {message}"
    assert all(map(zero_ranks.same, zero_ranks.flat_tensors(engine), before)), "weights have changed"


def nothing(rank, engine, optimizer):
    pass


def other_masters(rank, engine, optimizer):
    """One rank's flat tensors do not hold its weights."""
    if rank == 0:
        for flat in zero_ranks.flat_tensors(engine):
            flat.data = flat.data + 1


def other_places(rank, engine, optimizer):
    """DeepSpeed's table of places is that of another version."""
    places = engine.optimizer.grad_position
    engine.optimizer.grad_position = {key: [i, place + 2, n] for key, (i, place, n) in places.items()}


def no_places(rank, engine, optimizer):
    del engine.optimizer.grad_position


def some_ranks(rank, engine, optimizer):
    """Parameters that only some ranks share out, as hpZ, MiCS and expert parallelism have them."""
    group, _ = dist.new_subgroups(1)
    for p in engine.module.parameters():
        p._dp_group = group


def marked(rank, engine, optimizer):
    """For DeepSpeed's own Muon."""
    next(engine.module.parameters()).use_muon = True


def without_places(rank, world, rule):
    """An element-wise rule steps the whole flat tensor, padding too, where DeepSpeed's places are not known."""
    engine, optimizer = zero_ranks.engine_of(CONFIGS["zero3"], initial(torch.float32), Variant(rule))
    del engine.optimizer.grad_position
    engine.backward(engine([g * (world if rank == 0 else 0) for g in zero_ranks.gradients(0)]))
    engine.step()
    assert optimizer._originals.flat_views(lambda group: False) == []
    wanted = zero_ranks.Reference(Variant(rule), steps=1).params
    for name, p in engine.module.params().items():
        assert zero_ranks.same(zero_ranks.whole(p), wanted[name].detach()), f"{name} differs"


def scenarios(world):
    if world != 2:
        return {}
    remainder = (("master", "remainder"),)
    return {
        "refused-other_masters": (refused, "zero2", (), other_masters, "those do not hold its weights"),
        "refused-other_masters_of_stage_3": (refused, "zero3_bf16", (), other_masters, "those do not hold its weights"),
        "refused-other_places": (refused, "zero3_bf16", (), other_places, "do not fit into a flat tensor"),
        "refused-no_places": (refused, "zero3", (), no_places, "does not say where it keeps parameters"),
        "refused-remainder": (refused, "zero2_bf16", remainder, nothing, "give the optimizer fp32 masters already"),
        "refused-marked": (refused, "zero2", (), marked, "has the attribute use_muon"),
        "refused-marked_of_stage_3": (refused, "zero3", (), marked, "has the attribute use_muon"),
        "refused-some_ranks": (refused, "zero1", (), some_ranks, "is shared out among ranks"),
        **{f"without_places-{name}": (without_places, name) for name, rule in RULES.items() if rule.matrix is None},
    }
