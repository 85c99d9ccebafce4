"""cwd_muon's split of Llama-like models, parameter by parameter."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, Qwen2Config, Qwen2ForCausalLM, Trainer

from hf_cwd import route

from .conftest import TINY, tiny_llama

LAYER = {
    "self_attn.q_proj.weight": "muon: hidden matrix",
    "self_attn.k_proj.weight": "muon: hidden matrix",
    "self_attn.v_proj.weight": "muon: hidden matrix",
    "self_attn.o_proj.weight": "muon: hidden matrix",
    "mlp.gate_proj.weight": "muon: hidden matrix",
    "mlp.up_proj.weight": "muon: hidden matrix",
    "mlp.down_proj.weight": "muon: hidden matrix",
    "input_layernorm.weight": "adamw: vector (norm or scale)",
    "post_attention_layernorm.weight": "adamw: vector (norm or scale)",
}


def body(prefix="model.", layer=LAYER):
    routes = {f"{prefix}layers.{i}.{name}": reason for i in range(2) for name, reason in layer.items()}
    return routes | {f"{prefix}norm.weight": "adamw: vector (norm or scale)"}


def routes(model):
    return {r.name: f"{r.algorithm or 'frozen'}: {r.reason}" for r in route(model).routes}


def test_an_untied_llama():
    assert routes(tiny_llama()) == {
        "model.embed_tokens.weight": "adamw: embedding",
        **body(),
        "lm_head.weight": "adamw: output head",
    }


def test_a_tied_llama():
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert routes(model) == {"model.embed_tokens.weight": "adamw: embedding, tied to the output head", **body()}


def test_biases_are_vectors():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    biases = {f"self_attn.{name}_proj.bias": "adamw: vector (bias)" for name in "qkv"}
    assert routes(model) == {
        "model.embed_tokens.weight": "adamw: embedding",
        **body(layer=LAYER | biases),
        "lm_head.weight": "adamw: output head",
    }


def test_a_classification_head_and_a_bare_body():
    classifier = routes(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=3, pad_token_id=0)))
    assert classifier["score.weight"] == "adamw: output head"
    assert classifier["model.layers.0.self_attn.q_proj.weight"] == "muon: hidden matrix"
    assert routes(LlamaModel(LlamaConfig(**TINY))) == {"embed_tokens.weight": "adamw: embedding", **body(prefix="")}


def test_frozen_parameters_are_left_out_with_every_other_route_unchanged():
    model = tiny_llama()
    before = routes(model)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    after = routes(model)
    frozen = {name for name in before if name.startswith("model.layers.0.")}
    assert {name for name, reason in after.items() if reason == "frozen: frozen"} == frozen
    assert all(after[name] == before[name] for name in before.keys() - frozen)


def test_plain_torch_modules():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "hidden": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 1),
            "head": nn.Linear(4, 2),
        }
    )
    assert routes(model) == {
        "embed.weight": "adamw: embedding",
        "conv.weight": "adamw: not the weight of a linear layer (Conv1d.weight)",
        "conv.bias": "adamw: vector (bias)",
        "hidden.weight": "muon: hidden matrix",
        "hidden.bias": "adamw: vector (bias)",
        "attention.in_proj_weight": "adamw: not the weight of a linear layer (MultiheadAttention.in_proj_weight)",
        "attention.in_proj_bias": "adamw: vector (norm or scale)",
        "attention.out_proj.weight": "muon: hidden matrix",
        "attention.out_proj.bias": "adamw: vector (bias)",
        "head.weight": "adamw: output head",
        "head.bias": "adamw: vector (bias)",
    }


def test_the_trainer_s_decay_set_is_kept_and_muon_comes_first(arguments):
    model = tiny_llama()
    trainer = Trainer(model=model, args=arguments(optim="cwd_muon"))
    decayed = set(trainer.get_decay_parameter_names(model))
    names = {p: name for name, p in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert [group["algorithm"] for group in groups] == ["muon", "adamw", "adamw"]
    for group in groups:
        assert {names[p] in decayed for p in group["params"]} == {group["weight_decay"] != 0}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())


def test_a_subclass_s_decay_set_is_honoured(arguments):
    class NoDecay(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "q_proj" not in name]

    model = tiny_llama()
    groups = NoDecay(model=model, args=arguments(optim="cwd_muon")).create_optimizer().param_groups
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    (group,) = [group for group in groups if any(p is q_proj for p in group["params"])]
    assert (group["algorithm"], group["weight_decay"]) == ("muon", 0.0)


def test_no_matrix_is_an_error(arguments):
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.raises(
        ValueError, match=r"Sequential has no trainable matrix for muon.*1 x embedding.*--optim cwd_adamw"
    ):
        Trainer(model=model, args=arguments(optim="cwd_muon")).create_optimizer()
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("proj.weight"))
    with pytest.raises(ValueError, match=r"no trainable matrix.*14 x frozen"):
        Trainer(model=model, args=arguments(optim="cwd_muon")).create_optimizer()


def test_groups_of_another_model_and_later_thawed_parameters_are_refused():
    model = tiny_llama()
    routing = route(model)
    with pytest.raises(ValueError, match=r"of shape \(3, 3\) is not one of LlamaForCausalLM's"):
        routing([{"params": [nn.Parameter(torch.zeros(3, 3))]}])
    model.lm_head.weight.requires_grad_(False)
    routing = route(model)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight was frozen when the model was routed"):
        routing([{"params": list(model.parameters())}])


def test_the_summary_counts_everything():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    summary = route(model).summary()
    muon = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    rest = sum(p.numel() for p in model.parameters()) - muon - model.lm_head.weight.numel()
    assert summary == (
        f"muon: 14 tensors, {muon:,} parameters; adamw: 6 tensors, {rest:,} parameters; "
        "frozen: 1 tensors, 2,048 parameters"
    )
