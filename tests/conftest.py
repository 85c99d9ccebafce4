"""Shared by all tests: one thread, no hub, and the cases that every rule meets."""

import os
import resource
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from hf_cwd.rules import RULES
from tests.support import forking, garbage

torch.set_num_threads(1)


STARTED = time.monotonic()


# What a module of tests that starts processes has among its names.
STARTERS = {"Environment", "fork", "fork_ranks", "launch", "multiprocessing", "start", "subprocess"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only modules whose tests start no other process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the modules first that start processes, since they take longest: workers then end together."""

    def is_quick(item: pytest.Item) -> bool:
        return STARTERS.isdisjoint(vars(item.module))

    items.sort(key=is_quick)
    if config.getoption("--quick"):
        slow = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=slow)
        del items[: len(slow)]


def pytest_collection_finish() -> None:
    garbage.pass_over()  # what the modules of all tests have imported


def pytest_configure() -> None:
    forking.begin_session()  # also for workers of pytest-xdist, which inherit it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what the tests took, with the workers of pytest-xdist."""
    if hasattr(terminalreporter.config, "workerinput"):
        return
    seconds = forking.end_session()
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        seconds += used.ru_utime + used.ru_stime
    wall = time.monotonic() - STARTED
    terminalreporter.write_line(f"{wall / 60:.1f} minutes, {seconds / 60:.1f} of processor time (user + system)")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Gives each test the same environment variables: PEFT's BOFT and accelerate leave some behind in the process."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(params=sorted(RULES))
def algorithm(request: pytest.FixtureRequest) -> str:
    """The name of each registered rule in turn."""
    return request.param
