"""The registry of rules. A new rule needs one file here and one line below."""

from hf_cwd.rules import adamw, lion, muon, sgd
from hf_cwd.rules.base import COMMON, Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (adamw.RULE, lion.RULE, muon.RULE, sgd.RULE)}

__all__ = ["COMMON", "RULES", "Rule"]
