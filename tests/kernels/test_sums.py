"""What kernels sum up, of the numbers that training has; special ones are in the truth table."""

from unittest import mock

import numpy as np
import pytest
import torch

from hf_cwd.kernels import c, eager
from hf_cwd.kernels.interface import Sums, Workspace
from hf_cwd.rules import RULES
from tests.kernels.followed import HYPER, Followed

CPU = torch.device("cpu")
LEVELS = range(-1 if c.unavailable(CPU) else c._level() + 1)
SIZES = (0, 1, 31, 32, 33, 2047, 2048, 2049, 16384, 5 * 16384 + 7)  # around what the C kernel adds up at a time


def followed(rule):
    some = [Followed(rule, n, seed=n, dtype=d) for n in SIZES for d in ("float32", "bfloat16", "float16")]
    return [*some, Followed(rule, 99, seed=99, weight_decay=0.0), Followed(rule, 99, seed=98, cautious=False)]


def check(kernel, rule, some):
    for _ in range(2):
        sums, items = Sums(), [one.item() for one in some]
        kernel.update(RULES[rule], items, sums, Workspace(), None)
        found = {id(p): row for call in sums.calls for p, row in zip(call.owners, call.numbers.tolist(), strict=True)}
        assert len(found) == len(some)
        for item, one in zip(items, some, strict=True):
            assert found[id(item.param)][0] == one.sums[0], "decayed elements"
            np.testing.assert_allclose(found[id(item.param)][1:], one.sums[1:], rtol=1e-6)


@pytest.mark.parametrize("rule", HYPER)
def test_eager(rule):
    check(eager, rule, followed(rule))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", HYPER)
def test_c(rule, level):
    before = torch.get_num_threads()
    try:
        with mock.patch.object(c, "_level", return_value=level):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                check(c, rule, followed(rule))
    finally:
        torch.set_num_threads(before)
