"""Items that are kept from one step to the next are those that would be made anew, whatever changes in between.

The Triton kernels, which then look at less, are held to it in tests/kernels/triton_risks.py.
"""

import pytest

from hf_cwd.rules import RULES
from tests.steady import problems


@pytest.mark.parametrize("kernel", ["eager", "c"])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
def test_kept_items_are_those_made_anew(rule, kernel):
    assert list(problems(rule, kernel)) == []
