"""Given gradients under real DeepSpeed engines: the same weights, masters and states as one process, to the bit, and
exactly the bytes that have to move. zero_tables.py says what is stepped, zero_ranks.py how it is compared.
"""

import json
from functools import cache

import pytest

from hf_cwd.rules import RULES
from tests.distributed import zero_refusals
from tests.distributed.zero_tables import CONFIGS, WORLDS, cases
from tests.support.forking import DEEPSPEED, fork_ranks
from tests.support.launching import ROOT, finish_all

QUIET = {"PYTHONWARNINGS": "ignore"}  # a thousand lines on collectives that DeepSpeed should call otherwise
CASES = [(world, case) for world in WORLDS for case in cases(world)]
NAMES = [(world, name) for world in WORLDS for name in zero_refusals.scenarios(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each rank's results for a world size, launched when first asked for."""
    folder = tmp_path_factory.mktemp("zero")

    @cache
    def of(world):
        command = ("-m", "tests.distributed.zero_ranks", folder)
        # DeepSpeed names its shared memory by the port: two runs on one machine must not share it.
        ranks = fork_ranks(world, *command, cwd=ROOT, modules=DEEPSPEED, DS_ACCELERATOR="cpu", **QUIET)
        files = [folder / f"{world}-{rank}.json" for rank in range(world)]
        return [
            {"errors": rank.stderr} if rank.returncode else json.loads(file.read_text())
            for rank, file in zip(finish_all(ranks), files, strict=True)
        ]

    return of


def test_every_rule_meets_every_configuration():
    """No case drops out of the table unseen."""
    for rule in RULES:
        assert {case.config for _, case in CASES if case.variant.rule == rule} == set(CONFIGS)
    thorough = {name for name, config in CONFIGS.items() if config.thorough}
    assert thorough == {"zero2", "zero3"}
    assert {world for world, _ in CASES} == {1, 2, 3}


@pytest.mark.parametrize("world", WORLDS)
def test_every_case_was_run(world, results):
    wanted = {*map(str, cases(world)), *zero_refusals.scenarios(world)}
    for rank in results(world):
        assert set(rank) == wanted, rank.get("errors")


@pytest.mark.parametrize(("world", "case"), CASES, ids=lambda value: str(value))
def test_weights_states_and_traffic(world, case, results):
    for number, rank in enumerate(results(world)):
        assert not rank[str(case)]["problem"], f"rank {number}: {rank[str(case)]['problem']}"


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_scenario(world, name, results):
    for number, rank in enumerate(results(world)):
        assert not rank[name]["problem"], f"rank {number}: {rank[name]['problem']}"
