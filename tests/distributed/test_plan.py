"""The plan against a count of every element, the formulas for its traffic, and the bounds that it promises."""

import dataclasses
import random
from fractions import Fraction
from math import ceil, prod

import pytest
import torch

from hf_cwd.distributed.collectives import digest
from hf_cwd.distributed.geometry import Mesh, Replicate, Shard, StridedShard, everywhere
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, holders, plan, sources
from hf_cwd.distributed.schedule import Schedule
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.rules import RULES
from tests.distributed import brute
from tests.distributed.brute import MODELS, Param, flops, mixed, random_mesh, run
from tests.distributed.test_geometry import LAYOUTS, mesh_of

DTYPES = {2: torch.bfloat16, 4: torch.float32}
HYPER = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()}
PLAIN = MatrixLayout()
STAGE = Stage.of("muon", HYPER)


def entries_of(params):
    return [Entry(f"p{i}", p.shape, p.layout, mesh_of(p), STAGE, DTYPES[p.bytes], i) for i, p in enumerate(params)]


def on(mesh, shapes, layout=PLAIN):
    return [Entry(f"p{i}", shape, layout, mesh, STAGE, torch.float32, i) for i, shape in enumerate(shapes)]


def fsdp(world):
    return Mesh((world,), tuple(range(world)), (Shard(0),))


def random_model(draw):
    """Parameters of all kinds of layouts; a third of the models on one mesh, as those of a framework are."""
    common, params = None, []
    for _ in range(draw.randint(1, 7)):
        shape, layout = draw.choice(LAYOUTS)
        if draw.random() < 0.3:
            shape, layout = (draw.randint(1, 9), draw.randint(1, 9)), MatrixLayout()
        mesh = common or random_mesh(draw, 2)
        if common is None and draw.random() < 0.33:
            common = mesh
        params.append(Param(shape, *mesh, layout, draw.choice((4, 4, 2))))
    return params


def served(planned, params, shares):
    """(job, the matrix's share of each rank) of each job, and how often each replica of each matrix is served."""
    jobs, count = [], {}
    for job in planned.jobs:
        jobs.append((job, shares[job.entry][job.matrix]))
        for replica in job.serves:
            count[job.entry, job.matrix, replica] = count.get((job.entry, job.matrix, replica), 0) + 1
    return jobs, count


@pytest.mark.parametrize("share", ["auto", "always", "never"])
@pytest.mark.parametrize("seed", range(3))
def test_random_models(seed, share):
    draw = random.Random(f"{seed} {share}")
    for _ in range(60):
        params, balance = random_model(draw), draw.choice((1, 10, 100, 1000))
        exchange = draw.choice((1, 64, 500, 10_000))
        planned = plan(entries_of(params), share=share, exchange_bytes=exchange, balance=balance)
        check_plan(planned, params, share=share, exchange=exchange, balance=balance)


def check_plan(planned, params, *, share, exchange, balance):
    shares = [brute.shares_of(param) for param in params]
    ranks = {rank for param in params for rank in param.ranks}
    jobs, count = served(planned, params, shares)

    wanted = [
        (i, number, replica)
        for i, matrices in enumerate(shares)
        for number, matrix in enumerate(matrices)
        if matrix.numel
        for replica in set(matrix.replica.values())
    ]
    assert count == dict.fromkeys(wanted, 1), "each matrix once for each replica"
    assert [job.entry for job, _ in jobs] == sorted(job.entry for job, _ in jobs), "in the parameters' order"
    received, work = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    for job, matrix in jobs:
        check_owner(planned.entries[job.entry], job, matrix)
        check_sharing(job, matrix, share=share, balance=balance)
        for rank, elements in brute.moves(matrix, job.owner, job.serves).items():
            received[rank] += elements * matrix.bytes
        work[job.owner] += flops(*job.shape)
    assert planned.received == received
    assert planned.flops == work
    check_rounds(planned, jobs, ranks, exchange)


def check_owner(entry, job, matrix):
    assert job.numel == matrix.numel == prod(job.shape)
    assert matrix.held.get(job.owner), "an owner holds a part"
    assert matrix.replica[job.owner] in job.serves
    moved = brute.moves(matrix, job.owner, job.serves)
    assert holders(entry, job) == {rank: matrix.held[rank] for rank in moved}
    at_home = [rank for rank in matrix.held if matrix.replica[rank] == matrix.replica[job.owner]]
    assert sorted(sources(entry, job)) == sorted(at_home)
    assert (job.round is None) == (list(moved) == [job.owner])
    assert (job.round is None) == (not any(moved.values())), "what nobody else needs does not move"


def check_sharing(job, matrix, *, share, balance):
    copies = len(set(matrix.replica.values()))
    assert len(job.serves) in (1, copies)
    if copies > 1 and share != "auto":
        assert len(job.serves) == (copies if share == "always" else 1)
    elif copies > 1:
        gain = brute.worth_sharing(matrix, flops(*job.shape), balance)
        assert abs(gain) < 1e-6 or (len(job.serves) > 1) == (gain > 0)


def check_rounds(planned, jobs, ranks, exchange):
    moving = {}
    for job, matrix in jobs:
        if job.round is not None:
            moving.setdefault(matrix.bytes, []).append((job, matrix))
    number = 0
    for size, group in moving.items():
        busiest = dict.fromkeys(ranks, 0)
        for job, matrix in group:
            for rank, elements in brute.moves(matrix, job.owner, job.serves).items():
                busiest[rank] += elements * size
        largest = max(job.numel for job, _ in group) * size
        expected = ceil(Fraction(max(busiest.values()), max(exchange, largest)))
        used = {job.round for job, _ in group}
        assert max(used) - min(used) < expected
        number += expected
    assert planned.rounds == number
    used = [{job.round for job, _ in group} for group in moving.values()]
    assert sum(map(len, used)) == len(set().union(*used)), "a round is of one dtype"


def test_sole_holders_do_not_move():
    """Whole experts; packed gate and up of an even number of ranks; a matrix with fewer rows than ranks."""
    for mesh in (fsdp(4), Mesh((2, 2), (0, 1, 2, 3), (StridedShard(0, 2), Shard(0)))):
        planned = plan(on(mesh, [(8, 6, 4)] * 3, MatrixLayout((3, 3))))
        assert planned.received == dict.fromkeys(range(4), 0)
        assert planned.rounds == 0
        assert {job.round for job in planned.jobs} == {None}
        assert len(set(planned.flops.values())) == 1
    planned = plan(on(fsdp(2), [(8, 4)], MatrixLayout((4, 4))))
    assert [(job.owner, job.round) for job in planned.jobs] == [(0, None), (1, None)]
    planned = plan(on(fsdp(4), [(1, 9)]))
    assert [(job.owner, job.round) for job in planned.jobs] == [(0, None)]
    # Each replica has its own expert; working for both is an exchange between them.
    hsdp = Mesh((2, 2), (0, 1, 2, 3), (Replicate(), Shard(0)))
    assert plan(on(hsdp, [(2, 4, 4)]), share="never").received == dict.fromkeys(range(4), 0)
    assert sum(plan(on(hsdp, [(2, 4, 4)]), share="always").received.values()) == 2 * 16 * 4


WORLDS = (2, 3, 4, 8, 64)


def cuts_evenly(shapes, parts):
    return all(shape[0] % parts == 0 for shape in shapes)


def assert_mean(planned, expected):
    received = planned.received.values()
    assert Fraction(sum(received), len(received)) == expected


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", ["GPT-2", "squares and slivers", "one"])
def test_mean_traffic(model, world):
    shapes = MODELS[model]
    total = sum(map(prod, shapes)) * 4
    assert_mean(plan(on(everywhere(range(world)), shapes), share="always"), Fraction((world - 1) * total, world))
    assert_mean(plan(on(everywhere(range(world)), shapes), share="never"), 0)
    if cuts_evenly(shapes, world):
        assert_mean(plan(on(fsdp(world), shapes)), Fraction(2 * (world - 1) * total, world * world))
    for shards in (2, 4):
        copies, rest = divmod(world, shards)
        if rest or copies == 1 or not cuts_evenly(shapes, shards):
            continue
        mesh = Mesh((copies, shards), tuple(range(world)), (Replicate(), Shard(0)))
        gathered = Fraction((shards - 1) * total, shards * world)
        assert_mean(
            plan(on(mesh, shapes), share="always"), gathered + (1 - Fraction(1, world)) * Fraction(total, shards)
        )
        assert_mean(plan(on(mesh, shapes), share="never"), Fraction(2 * (shards - 1) * total, shards * shards))


def assert_balanced(shapes, sharding, exchange):
    """Bytes and work of the busiest rank are within one largest matrix of the mean, and no round is idle or crowded."""
    planned = plan(on(sharding, shapes), share="always", exchange_bytes=exchange)
    largest, most = max(map(prod, shapes)) * 4, max(flops(*shape) for shape in shapes)
    received, work = planned.received.values(), planned.flops.values()
    assert max(received) <= Fraction(sum(received), len(received)) + largest
    assert max(work) <= Fraction(sum(work), len(work)) + most

    bound = max(exchange, largest)
    assert planned.rounds == ceil(Fraction(max(received), bound))
    rounds = [dict.fromkeys(sharding.ranks, 0) for _ in range(planned.rounds)]
    for job in planned.jobs:
        for rank, held in holders(planned.entries[job.entry], job).items():
            rounds[job.round][rank] += 4 * (job.numel - held if rank == job.owner else held)
    if sum(map(prod, shapes)) * 4 >= planned.rounds * largest:  # else a matrix can fill more than a round
        assert {job.round for job in planned.jobs} == set(range(planned.rounds))
    # A matrix is in one round or the next, and neighbours in the parameters' order may have one owner.
    assert max(max(round_.values()) for round_ in rounds) <= bound + 2 * largest


@pytest.mark.parametrize("exchange", [1, 1 << 28])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_busiest_rank(model, world, exchange):
    shapes = MODELS[model]
    assert_balanced(shapes, everywhere(range(world)), exchange)
    if cuts_evenly(shapes, world):
        assert_balanced(shapes, fsdp(world), exchange)
    if world > 4 and cuts_evenly(shapes, 4):
        mesh = Mesh((world // 4, 4), tuple(range(world)), (Replicate(), Shard(0)))
        assert_balanced(shapes, mesh, exchange)


@pytest.mark.parametrize("block", range(4))
def test_busiest_rank_of_mixed_shapes(block):
    for seed in range(60 * block, 60 * block + 60):
        shapes, world = mixed(seed)
        assert_balanced(shapes, everywhere(range(world)), 1 << 20)
        assert_balanced(shapes, fsdp(world), 1 << 20)


def test_share_weighs_work_against_traffic():
    """By hand: 2 copies of a square n x n, 30 n^3 operations against 2 n^2 elements of 4 bytes from rank to rank."""
    shapes, ranks = [(64, 64)], everywhere((0, 1))
    for balance, serves in ((479, [(0, 1)]), (480, [(0,), (1,)]), (481, [(0,), (1,)])):
        planned = plan(on(ranks, shapes), balance=balance)
        assert [job.serves for job in planned.jobs] == serves
    # Larger matrices are more work for a byte.
    planned = plan(on(ranks, [(32, 32), (128, 128)]), balance=480)
    assert [job.serves for job in planned.jobs] == [(0,), (1,), (0, 1)]


REFERENCE = on(fsdp(4), [(8, 6), (6, 8), (5, 4, 4)]) + on(everywhere(range(4)), [(9, 9)])


def changed(position=0, **values):
    return [dataclasses.replace(e, **values) if i == position else e for i, e in enumerate(REFERENCE)]


CHANGES = {
    "name": changed(name="q"),
    "shape": changed(shape=(8, 7)),
    "layout": changed(layout=MatrixLayout((4, 4))),
    "placement": changed(sharding=Mesh((4,), (0, 1, 2, 3), (Shard(1),))),
    "strided": changed(sharding=Mesh((4,), (0, 1, 2, 3), (StridedShard(0, 2),))),
    "order of ranks": changed(sharding=Mesh((4,), (1, 0, 2, 3), (Shard(0),))),
    "mesh": changed(sharding=Mesh((2, 2), (0, 1, 2, 3), (Replicate(), Shard(0)))),
    "coefficients": changed(stage=Stage.of("muon", HYPER | {"eps": 1e-8})),
    "steps": changed(stage=Stage.of("muon", HYPER | {"ns_steps": 6})),
    "dtype": changed(dtype=torch.bfloat16),
    "source": changed(source=7),
    "a stack's layout": changed(2, layout=MatrixLayout((2, 2))),
    "order of parameters": [REFERENCE[1], REFERENCE[0], *REFERENCE[2:]],
    "one more": [*REFERENCE, REFERENCE[0]],
}
OPTIONS = {"share": "always", "exchange_bytes": 100}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_has_another_digest(name):
    assert digest(plan(CHANGES[name], **OPTIONS)) != digest(plan(REFERENCE, **OPTIONS))


@pytest.mark.parametrize("options", [{"share": "never"}, {"exchange_bytes": 1 << 20}])
def test_other_options_have_another_digest(options):
    assert digest(plan(REFERENCE, **OPTIONS | options)) != digest(plan(REFERENCE, **OPTIONS))


def test_every_process_plans_alike():
    """Nothing may depend on the order of sets or on hashes, which differ from process to process."""
    program = (
        "from tests.distributed.test_plan import *; import json;"
        "print(json.dumps([digest(plan(REFERENCE, **OPTIONS)), digest(plan(on(fsdp(8), MODELS['GPT-2'])))]))"
    )
    expected = str([digest(plan(REFERENCE, **OPTIONS)), digest(plan(on(fsdp(8), MODELS["GPT-2"])))])
    assert run("-c", program, PYTHONHASHSEED="1234").stdout.strip() == expected


def test_nothing_to_exchange():
    empty = plan([])
    assert (empty.jobs, empty.rounds, empty.received, empty.flops) == ((), 0, {}, {})
    nothing = plan(on(fsdp(2), [(0, 4), (4, 0), (0, 3, 3)]))
    assert (nothing.jobs, nothing.rounds, nothing.received) == ((), 0, {0: 0, 1: 0})
    alone = plan(on(everywhere([0]), [(4, 5), (2, 3, 3)]))
    assert [(job.owner, job.serves, job.round) for job in alone.jobs] == [(0, (0,), None)] * 3
    assert (alone.rounds, alone.received) == (0, {0: 0})
    assert alone.flops == {0: flops(4, 5) + 2 * flops(3, 3)}


def test_equal_matrices_of_idle_ranks():
    """More ranks than matrices: one each for as many."""
    planned = plan(on(fsdp(8), [(8, 8)] * 3))
    assert sorted(planned.flops.values()) == [0] * 5 + [flops(8, 8)] * 3
    pinned = on(fsdp(2), [(2, 8, 8)]) + on(fsdp(2), [(2, 9)])
    assert {job.owner for job in plan(pinned).jobs if job.entry == 0} == {0, 1}
    # A rank that has whole experts already is spared.
    experts = Mesh((2,), (0, 1), (Shard(0),))
    busy = plan([*on(experts, [(1, 16, 16)]), *on(fsdp(2), [(16, 16)])])
    assert [job.owner for job in busy.jobs] == [0, 1]


def test_a_parameter_is_applied_once_its_last_matrix_has_come_back():
    """Its four matrices travel in two rounds: it begins in the first, and ends in the second."""
    (entry,) = on(Mesh((2,), (0, 1), (Shard(1),)), [(16, 4)], MatrixLayout(sizes=(4, 4, 4, 4)))
    planned = plan([entry], exchange_bytes=1)
    assert [job.round for job in planned.jobs] == [0, 0, 1, 1]
    for rank in (0, 1):
        schedule = Schedule(planned, rank, peers=(0, 1), local_sizes=[32], batch_bytes=0)
        assert (schedule.begins, schedule.ends) == ([[0], []], [[], [0]])
