"""Keeps collections of garbage short, in processes that make many models.

DeepSpeed, Accelerate and the Trainer collect garbage several times for each model: without this each collection walks
over all that torch, transformers and DeepSpeed have imported, which takes longer than the steps of a tiny model.
"""

import gc


def pass_over() -> None:
    """Collects what is garbage now, and lets later collections pass over all that is left."""
    gc.collect()
    gc.freeze()
