"""Embeddings resized between two calls of train(): said before the first step, since states have the old shapes."""

import pytest
import torch

from tests.support.tiny import tiny_llama
from tests.trainer.guarding import At, make


def resized(arguments, optim, *, tied, tokens):
    trainer = make(arguments(optim=optim), model=tiny_llama(tie_word_embeddings=tied))
    trainer.train()
    trainer.model.resize_token_embeddings(tokens)
    return trainer


@pytest.mark.parametrize("tokens", [80, 64 - 8])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optim", ["cwd_adamw", "cwd_lion", "cwd_muon"])
def test_resized_embeddings_are_named_before_the_first_step(optim, tied, tokens, arguments):
    trainer = resized(arguments, optim, tied=tied, tokens=tokens)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(
        RuntimeError,
        match=rf"model\.embed_tokens\.weight has data of shape \({tokens}, 32\) now, and a \w+ of shape \(64, 32\)"
        ".*set trainer.optimizer and trainer.lr_scheduler to None",
    ):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_what_the_message_says_helps(arguments):
    trainer = resized(arguments, "cwd_adamw", tied=True, tokens=80)
    trainer.optimizer = trainer.lr_scheduler = None
    steps = []
    trainer.add_callback(At(lambda: steps.append(1)))
    trainer.train()
    assert len(steps) == 4
    assert trainer.model.model.embed_tokens.weight.shape == (80, 32)
