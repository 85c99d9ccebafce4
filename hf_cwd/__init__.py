"""Cautious Weight Decay (arXiv 2510.12402) for the Hugging Face Trainer.

Importing it makes ``cwd_*`` values of ``--optim``, before or after transformers is, and imports neither that nor torch.
"""

import atexit
import importlib
from typing import TYPE_CHECKING

from hf_cwd import ending, startup

if TYPE_CHECKING:
    from hf_cwd.decay import cautious_mask
    from hf_cwd.optim.named import CWDSGD, CWDAdamW, CWDLion, CWDMuon
    from hf_cwd.optim.optimizer import CWDOptimizer
    from hf_cwd.optim.statistics import StepStatistics
    from hf_cwd.routing.route import route
    from hf_cwd.trainer.arguments import CWDArgumentsMixin, CWDTrainingArguments
    from hf_cwd.trainer.trainer import CWDTrainer, CWDTrainerMixin

__version__ = "0.1.0"
__all__ = ["CWDSGD", "CWDAdamW", "CWDArgumentsMixin", "CWDLion", "CWDMuon", "CWDOptimizer", "CWDTrainer",
           "CWDTrainerMixin", "CWDTrainingArguments", "StepStatistics", "cautious_mask", "route"]  # fmt: skip
_HOMES = {"CWDOptimizer": "optim.optimizer", "StepStatistics": "optim.statistics", "cautious_mask": "decay",
          "CWDTrainer": "trainer.trainer", "CWDTrainerMixin": "trainer.trainer", "route": "routing.route",
          "CWDArgumentsMixin": "trainer.arguments", "CWDTrainingArguments": "trainer.arguments"}  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name at all for one that this function knows

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOMES.get(name, "optim.named")
        return globals().setdefault(name, getattr(importlib.import_module(f"hf_cwd.{home}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


atexit.register(ending.settle)
startup.install()
