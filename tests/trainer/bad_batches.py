"""Batches whose loss is NaN, and a CWDTrainer that takes batches in their order."""

import math

from torch.utils.data import SequentialSampler

from hf_cwd import CWDTrainer
from tests.support.tiny import tiny_data

BATCH = 4


def rows(n=4, bad=()):
    """Rows of `n` batches; those of the batches in `bad` break the loss."""
    return [{**row, "bad": float(i // BATCH in bad)} for i, row in enumerate(tiny_data(n * BATCH))]


class InOrder(CWDTrainer):
    """Trains on the rows in their order; a bad one's loss is NaN, as that of a model that diverges on it."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        bad = inputs.pop("bad").any()
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * math.nan if bad else loss
