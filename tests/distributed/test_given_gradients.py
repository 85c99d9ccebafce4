"""Given gradients on every layout: the same weights and states as one process, exactly the bytes that have to move.

given_gradients/tables.py says what is stepped, ranks.py how it is compared, scenarios.py what is no table.
There is one launch for each world size.
"""

import json
from functools import cache

import pytest

from hf_cwd.rules import RULES
from tests.distributed.given_gradients.ending import TIMEOUT
from tests.distributed.given_gradients.scenarios import scenarios
from tests.distributed.given_gradients.tables import LAYOUTS, PATTERNS, WORLDS, cases
from tests.support.forking import fork_ranks
from tests.support.launching import ROOT, finish_all

CASES = [(world, case) for world in WORLDS for case in cases(world)]
NAMES = [(world, name) for world in WORLDS for name in scenarios(world)]


def launch(world, *command):
    ranks = fork_ranks(world, "-m", *command, cwd=ROOT)
    return "".join(result.stderr for result in finish_all(ranks))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each rank's results for a world size, launched when first asked for."""
    folder = tmp_path_factory.mktemp("injected")

    @cache
    def of(world):
        errors = launch(world, "tests.distributed.given_gradients.ranks", folder)
        files = [folder / f"{world}-{rank}.json" for rank in range(world)]
        # Judged by what they wrote: a rank can abort at the interpreter's exit after correct results.
        return [json.loads(file.read_text()) if file.exists() else {"errors": errors} for file in files]

    return of


def test_every_rule_meets_every_layout_and_pattern():
    """No case drops out of the table unseen."""
    for rule in RULES.values():
        met = {(case.layout, case.pattern) for _, case in CASES if case.variant.rule == rule.name}
        able = {name for name, layout in LAYOUTS.items() if layout.matrices or rule.matrix is None}
        assert met == {(layout, pattern) for layout in able for pattern in PATTERNS}
    assert {name for name, layout in LAYOUTS.items() if not layout.matrices} == {"reversed_ranks"}
    assert {world for world, _ in CASES} == {1, 2, 3, 4}


@pytest.mark.parametrize("world", WORLDS)
def test_every_case_was_run(world, results):
    wanted = {*map(str, cases(world)), *scenarios(world)}
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


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_reference_is_one_process_s(world, results):
    """What the ranks compare with is what a process without ranks makes, to the bit."""
    (one,) = results(1)
    alone = {(case.variant, case.pattern): one[str(case)]["reference"] for case in cases(1)}
    for case in cases(world):
        if case.pattern != "some_ranks":  # there it depends on the layout who has one
            for rank in results(world):
                assert rank[str(case)]["reference"] == alone[case.variant, case.pattern]
    assert len(set(alone.values())) > len(alone) / 2


@pytest.mark.parametrize("world", WORLDS[1:])
def test_matrices_travel_in_several_rounds(world, results):
    """The table would not see a mistake between rounds if there were only one."""
    rounds = [
        results(world)[0][str(case)]["rounds"] for case in cases(world) if ("exchange_bytes", 1) in case.variant.options
    ]
    assert rounds
    assert min(rounds) > 2


@pytest.mark.parametrize("ending", ["exits", "stalls"])
def test_a_rank_that_ends_ends_the_others(ending, tmp_path):
    errors = launch(2, "tests.distributed.given_gradients.ending", tmp_path, ending)
    report = tmp_path / f"{ending}.txt"
    assert report.exists(), errors
    seconds, message = report.read_text().split("\n", 1)
    assert "the exchange of matrices between ranks failed while" in message
    assert float(seconds) < TIMEOUT + 10
