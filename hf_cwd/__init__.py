"""Cautious Weight Decay (arXiv 2510.12402) for the Hugging Face Trainer.

Importing it adds the ``cwd_*`` values of ``--optim``, before or after transformers is imported. It imports neither
transformers nor torch.
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
__all__ = [
    "CWDSGD",
    "CWDAdamW",
    "CWDArgumentsMixin",
    "CWDLion",
    "CWDMuon",
    "CWDOptimizer",
    "CWDTrainer",
    "CWDTrainerMixin",
    "CWDTrainingArguments",
    "StepStatistics",
    "cautious_mask",
    "route",
]
_MODULES = {
    "CWDAdamW": "optim.named",
    "CWDLion": "optim.named",
    "CWDMuon": "optim.named",
    "CWDSGD": "optim.named",
    "CWDOptimizer": "optim.optimizer",
    "StepStatistics": "optim.statistics",
    "cautious_mask": "decay",
    "route": "routing.route",
    "CWDArgumentsMixin": "trainer.arguments",
    "CWDTrainingArguments": "trainer.arguments",
    "CWDTrainer": "trainer.trainer",
    "CWDTrainerMixin": "trainer.trainer",
}

if not TYPE_CHECKING:  # a type checker would take any name at all for one that this function knows

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(importlib.import_module(f"hf_cwd.{_MODULES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


atexit.register(ending.settle)
startup.install()
