"""Every architecture that transformers can build from its default configuration, on the meta device."""

import pytest
import torch
from transformers.models.auto import modeling_auto

from hf_cwd import route

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
# Raw parameters whose role is not known here, so that AdamW gets them.
UNKNOWN = {
    "funnel": "r_kernel",
    "glm5_next_text": "index_kpool_compress_gate",
    "inkling2_text": "rel_logits_proj.proj",
    "inkling_text": "rel_logits_proj.proj",
    "reformer": ("position_embeddings.weights.0", "position_embeddings.weights.1"),
}


def built(config_class, model_class):
    """The model with few layers, or as it is, where they must fit other values; None where neither can be built."""
    small = config_class()
    for name in LAYERS:
        if isinstance(getattr(small, name, None), int) and getattr(small, name) > 4:
            setattr(small, name, 4)
    for config in (small, None):
        try:
            with torch.device("meta"):
                return model_class(config or config_class())
        except Exception:  # whatever transformers raises: a package that is missing, a default that does not fit
            continue
    return None


@pytest.mark.parametrize(
    ("task", "least"),
    [("CAUSAL_LM", 100), ("MASKED_LM", 25), ("IMAGE_CLASSIFICATION", 30), ("SEQ_TO_SEQ_CAUSAL_LM", 15)],
)
def test_every_parameter_is_known(task, least):
    known = 0
    for config_class, model_class in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING").items():
        try:
            model = built(config_class, model_class[0] if isinstance(model_class, tuple) else model_class)
        except Exception:  # the configuration itself
            continue
        if model is None:
            continue
        name = config_class.model_type
        routing = route(model)
        assert bool(routing.unknown) == (name in UNKNOWN), name
        for r in routing.unknown:
            assert (r.name.endswith(UNKNOWN[name]), r.algorithm) == (True, "adamw"), r
        known += 1
        assert len(routing.routes) == len(set(model.parameters())), name
        assert sum(r.numel for r in routing.routes) == sum(p.numel() for p in model.parameters()), name
        for r in routing.routes:
            if r.name.endswith(("mamba.in_proj.weight", "mixer.in_proj.weight")):
                assert "fused" in r.reason, (name, r)  # every state-space layer has several projections in one
            if r.algorithm == "muon":
                assert r.layout is not None or len(r.shape) == 2, (name, r)
                if r.layout is not None:
                    r.layout.check(r.shape)
            elif r.algorithm == "adamw":
                assert r.layout is None, (name, r)
        matrices = sum(r.numel for r in routing.routes if r.algorithm == "muon")
        assert matrices > 0, name
    assert known >= least, "most of the models could not be built, so that this test says nothing"
