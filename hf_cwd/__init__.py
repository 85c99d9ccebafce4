"""Cautious Weight Decay (arXiv 2510.12402) for the Hugging Face Trainer.

Importing this package makes ``cwd_adamw``, ``cwd_lion``, ``cwd_muon`` and ``cwd_sgd`` values of ``--optim``, before or
after transformers is imported. It imports neither transformers nor torch; what is used of it does.
"""

import importlib
from typing import Any

from hf_cwd import startup

__version__ = "0.1.0"
__all__ = ["CWDSGD", "CWDAdamW", "CWDLion", "CWDMuon", "CWDOptimizer", "DecayCount", "cautious_mask", "route"]
_HOMES = {"CWDOptimizer": "optimizer", "DecayCount": "decay", "cautious_mask": "decay", "route": "trainer.routing"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"hf_cwd.{_HOMES.get(name, 'optimizers')}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


startup.install()
