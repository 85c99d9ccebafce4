"""Cautious Weight Decay (arXiv 2510.12402) for the Hugging Face Trainer.

Importing this package makes ``cwd_adamw``, ``cwd_lion``, ``cwd_muon`` and ``cwd_sgd`` values of ``--optim``, before or
after transformers is imported, and does not import it.
"""

from hf_cwd.decay import DecayCount, cautious_mask
from hf_cwd.optimizer import CWDOptimizer
from hf_cwd.optimizers import CWDSGD, CWDAdamW, CWDLion, CWDMuon
from hf_cwd.trainer.names import register
from hf_cwd.trainer.routing import route

__version__ = "0.1.0"
__all__ = ["CWDSGD", "CWDAdamW", "CWDLion", "CWDMuon", "CWDOptimizer", "DecayCount", "cautious_mask", "route"]

register()
