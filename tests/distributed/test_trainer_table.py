"""The trainer equality table: the real Trainer on 2, 3 and 4 ranks reaches the weights of one process."""

from collections import defaultdict

import pytest
import torch

from hf_cwd.rules import RULES
from tests.distributed import trainer_table
from tests.distributed.trainer_table import (
    GLOBAL_BATCH,
    LAYOUTS,
    LEARNING_RATE,
    MODELS,
    STEPS,
    VARIATIONS,
    WEIGHT_DECAY,
    Case,
)
from tests.support.forking import DEEPSPEED, TRANSFORMERS, fork, fork_ranks
from tests.support.launching import ROOT, finish_all

WORLDS = (2, 3, 4)
LAUNCHES = [(world, deepspeed) for world in WORLDS for deepspeed in (False, True)]
CASES = [case for world, deepspeed in LAUNCHES for case in trainer_table.cases(world, deepspeed=deepspeed)]

# A gradient's rounding in float64, about 1e-17 here, is divided by AdamW's eps of 1e-8 where the gradient is smaller
# than that: lr * 1e-9 a step. In float32 it is about 1e-9, and divided by the eps of 1e-4 that these cases set.
LARGEST_DIFFERENCE = {torch.float64: 1e-10, torch.float32: 1e-6}
NORM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative: some roundings of a sum over all elements
FIGURES_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # cwd/* in the log: EXCEPTIONS count there too
# The share of elements that may differ by more: their direction is within rounding of zero, so that its sign, which
# Lion takes and every mask depends on, may differ. None does in float64.
EXCEPTIONS = {torch.float64: 0.0, torch.float32: 1e-4}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """What the ranks of each world size wrote: a list of ranks, each a dict of exactly the cases it was to train."""
    folder, cache = tmp_path_factory.mktemp("table"), {}

    def ranks(world, deepspeed=False):
        launch = world, deepspeed
        if launch not in cache:
            cache[launch] = None  # a launch that fails is not repeated by each of its tests
            kind = ["deepspeed"] if deepspeed else []
            program = ["-m", "tests.distributed.trainer_ranks", folder, *kind]
            files = [folder / "-".join([str(world), str(rank), *kind]) for rank in range(world)]
            for _ in range(2):  # once more where gloo stood still, see trainer_ranks.py
                modules = DEEPSPEED if deepspeed else TRANSFORMERS
                one = [fork(*program, cwd=ROOT)] if world == 1 else []
                ended = finish_all(one or fork_ranks(world, *program, cwd=ROOT, modules=modules))
                errors = "".join(rank.stderr for rank in ended)
                if all(file.exists() for file in files) or "Timeout (0:0" not in errors:
                    break
            # Not by the exit status: some launches abort at the interpreter's exit, with all results written.
            loaded = [torch.load(file, weights_only=False) for file in files if file.exists()]
            cache[launch] = [{Case(*case): result for case, result in rank.items()} for rank in loaded]
            wanted = trainer_table.cases(world, deepspeed=deepspeed)
            assert [list(rank) for rank in cache[launch]] == [wanted] * world, errors
        assert cache[launch] is not None, f"the launch of {world} ranks failed: see the first test that needed it"
        return cache[launch]

    ranks(1)  # it writes the models that the others load
    return ranks


def global_batches(ranks):
    """The rows of each step, and the number of items that each part of it was divided by."""
    rows, items = defaultdict(list), defaultdict(set)
    for rank in ranks:
        for step, batch, count in rank["batches"]:
            rows[step] += map(tuple, batch)
            items[step].add(count)
    return {step: (sorted(rows[step]), items[step]) for step in rows}


def movement(weights, start):
    return torch.cat([(weights[name] - start[name]).double().flatten() for name in start])


def test_every_rule_and_model_is_in_the_table():
    matrices = {rule.name for rule in RULES.values() if rule.matrix is not None}
    for name, layout in LAYOUTS.items():
        plain = [case for case in CASES if case.layout == name and case.variation == layout.plain]
        met = {(case.model, case.rule) for case in plain}
        assert {rule for _, rule in met} == (set(RULES) if layout.matrices else set(RULES) - matrices)
        assert {model for model, _ in met} == set(layout.models)
        if layout.matrices:
            assert met >= {(model, rule) for model in layout.models for rule in matrices}
    for deepspeed in (False, True):
        trained = {(case.model, case.rule) for case in CASES if bool(LAYOUTS[case.layout].deepspeed) == deepspeed}
        assert trained == {(model, rule) for model in MODELS for rule in RULES}


@pytest.mark.parametrize("case", trainer_table.cases(1), ids=str)
def test_one_process(table, case):
    """What the others are compared with: it trains, and only what is to be trained."""
    result = table(1)[0][case]
    moved = {name for name, p in result["weights"].items() if not torch.equal(p, result["start"][name])}
    assert moved == set(result["trained"])
    if VARIATIONS[case.variation].model:
        assert moved < set(result["start"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process(table, case):
    layout, variation = LAYOUTS[case.layout], VARIATIONS[case.variation]
    ranks = [rank[case] for rank in table(layout.world, bool(layout.deepspeed))]
    one = table(1)[0][trainer_table.one_process(case)]
    for rank in ranks:
        assert rank["world_size"] == layout.world
        assert rank["optimizer"] == one["optimizer"]
        assert layout.placements <= set(rank["placements"].values())
        assert bool(layout.placements) == bool(rank["placements"])

    # The same rows in each global batch, divided by the same number of items; tensor parallel ranks share their rows.
    expected = global_batches([one])
    assert [len(rows) for rows, _ in expected.values()] == [GLOBAL_BATCH] * STEPS
    groups = [ranks[i :: layout.same_batch] for i in range(layout.same_batch)]
    assert all(global_batches(group) == expected for group in groups)

    dtype = torch.float32 if variation.float32 else torch.float64
    coarse = layout.sums_in_bfloat16 and case.variation == "bfloat16"
    # bfloat16 has 8 bits. Where one sign in twenty differs under Lion (see below) later gradients do, too: by 1.1 %
    # on a processor without instructions for bfloat16.
    tolerance = (2e-2 if case.rule == "lion" else 1e-2) if coarse else NORM_TOLERANCE[dtype]
    for rank in ranks:
        for norms in ("logged_norms",) if layout.deepspeed else ("logged_norms", "applied_norms"):
            assert rank[norms] == pytest.approx(one[norms], rel=tolerance)
            assert len(rank[norms]) == STEPS
        assert rank["weights"].keys() == one["weights"].keys()
        assert len(rank["figures"]) == STEPS
        for ours, wanted in zip(rank["figures"], one["figures"], strict=True):
            assert ours == pytest.approx(wanted, rel=0.3 if coarse else FIGURES_TOLERANCE[dtype])
        if coarse:
            # Gradients rounded to bfloat16 on their way move elements whose gradient nearly cancels: a few percent of
            # the way that all went (0.03 here); what lost a shard or a rank would be as far off as the way is long.
            # DeepSpeed's masters start from weights in bfloat16, and it computes with such: there a sign in twenty
            # differs under Lion (0.22 of the way; 0.03 with other rules).
            start = {n: x.bfloat16() for n, x in one["start"].items()} if layout.deepspeed else one["start"]
            moved, wanted = movement(rank["weights"], start), movement(one["weights"], one["start"])
            assert (moved - wanted).norm() <= (0.3 if layout.deepspeed else 0.1) * wanted.norm()
            continue
        differing = 0
        for name, x in one["weights"].items():
            assert x.dtype == dtype
            difference = (rank["weights"][name] - x).abs()
            assert (difference <= STEPS * LEARNING_RATE * (2 + WEIGHT_DECAY * x.abs())).all(), name
            differing += int((difference > LARGEST_DIFFERENCE[dtype]).sum())
        assert differing <= EXCEPTIONS[dtype] * sum(x.numel() for x in one["weights"].values())


@pytest.mark.parametrize("case", [case for case in CASES if case.variation != "plain"], ids=str)
def test_variation_was_active(table, case):
    variation, layout = VARIATIONS[case.variation], LAYOUTS[case.layout]
    for rank in (rank[case] for rank in table(layout.world, bool(layout.deepspeed))):
        calls = STEPS * variation.arguments.get("gradient_accumulation_steps", 1)
        if case.variation == "compiled":
            assert rank["graphs"] > 0
        else:
            dtype = torch.float32 if variation.float32 else torch.float64
            dtype = torch.bfloat16 if "bf16" in variation.arguments else dtype
            recomputed = 2 if "gradient_checkpointing" in variation.arguments else 1
            assert rank["linear_dtypes"] == [dtype] * (calls * recomputed)
        if "max_grad_norm" in variation.arguments:
            limit = variation.arguments["max_grad_norm"]
            assert min(rank["logged_norms"]) > 2 * limit
        if "max_grad_norm" in variation.arguments and not layout.deepspeed:  # which steps before it can be seen
            assert rank["applied_norms"] == pytest.approx([limit] * STEPS, rel=1e-4)  # torch divides by norm + 1e-6


# An adapter that is added to a model sharded at load time is of plain tensors: nobody says that they are replicas.
ADAPTED = [case for case in CASES if LAYOUTS[case.layout].distributed and case.variation == "lora"]


@pytest.mark.parametrize("case", [c for c in CASES if RULES[c.rule].matrix and c not in ADAPTED], ids=str)
def test_ranks_that_share_parameters_share_the_work(table, case):
    """Among them DDP's, of whose parameters only the Trainer knows that they are replicas."""
    layout = LAYOUTS[case.layout]
    everybody = tuple(range(layout.world))
    for number, rank in enumerate(rank[case] for rank in table(layout.world, bool(layout.deepspeed))):
        # Under tensor parallelism some matrices are plain tensors, and each rank's own.
        assert set(rank["together"]) - {(number,)} == {everybody}


def test_activation_checkpointing_of_fsdp2_was_active(table):
    for case in trainer_table.cases(2):
        if case.layout == "fsdp2_checkpointed":
            assert len(table(2)[0][case]["linear_dtypes"]) == 2 * STEPS


def test_shards_are_uneven_and_empty(table):
    """3 ranks cut 50 rows into 17, 17 and 16, and 4 experts into 2, 2 and none."""
    numels = defaultdict(set)
    for rank in table(3):
        for case, result in rank.items():
            if case.layout == "fsdp2_3":
                for name, numel in result["numels"].items():
                    numels[case.model, name].add(numel)
    assert len(numels["llama", "model.layers.0.mlp.up_proj.weight"]) == 2
    assert 0 in numels["qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj"]
