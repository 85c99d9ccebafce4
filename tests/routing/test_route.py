"""cwd_muon's split of a model: the kinds of layers, --optim_target_modules, groups, errors and the start-up line."""

import logging
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, Trainer

from hf_cwd import CWDMuon, route
from tests.routing.architectures import llama_with_lora
from tests.support.tiny import TINY, tiny_llama


def routes(model, **options):
    return {r.name: f"{r.algorithm or 'frozen'}: {r.reason}" for r in route(model, **options).routes}


def test_a_classification_head_and_a_bare_body():
    full = routes(tiny_llama())
    classifier = routes(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=3, pad_token_id=0)))
    assert classifier.pop("score.weight") == full.pop("lm_head.weight") == "adamw: output head"
    assert classifier == full
    assert routes(LlamaModel(LlamaConfig(**TINY))) == {name.removeprefix("model."): full[name] for name in full}


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
        "conv.weight": "adamw: input layer (convolution of the raw input)",
        "conv.bias": "adamw: vector (bias)",
        "hidden.weight": "muon: hidden matrix",
        "hidden.bias": "adamw: vector (bias)",
        "attention.in_proj_weight": "muon: hidden matrix, fused q, k, v (4 + 4 + 4)",
        "attention.in_proj_bias": "adamw: vector (bias)",
        "attention.out_proj.weight": "muon: hidden matrix",
        "attention.out_proj.bias": "adamw: vector (bias)",
        "head.weight": "adamw: output head",
        "head.bias": "adamw: vector (bias)",
    }


def test_convolutions_by_kind():
    model = nn.ModuleDict(
        {
            "hidden": nn.Conv2d(8, 6, 3, bias=False),
            "pointwise": nn.Conv1d(8, 6, 1, bias=False),
            "grouped": nn.Conv2d(8, 6, 3, groups=2, bias=False),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8, bias=False),
            "transposed": nn.ConvTranspose2d(8, 6, 2, bias=False),
            "image": nn.Conv2d(3, 8, 4, bias=False),
            "one_row": nn.Conv2d(8, 1, 3, bias=False),
            "patch_embed": nn.Linear(48, 8, bias=False),
        }
    )
    assert routes(model) == {
        "hidden.weight": "muon: convolution, flattened",
        "pointwise.weight": "muon: convolution, flattened",
        "grouped.weight": "muon: convolution, flattened, fused groups (3 + 3)",
        "depthwise.weight": "adamw: depthwise convolution",
        "transposed.weight": "adamw: transposed convolution",
        "image.weight": "adamw: input layer (convolution of the raw input)",
        "one_row.weight": "adamw: vector (one row or column)",
        "patch_embed.weight": "adamw: input layer (patch embedding)",
    }


def test_recurrent_layers_are_cut_into_their_gates():
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 5, proj_size=3), "gru": nn.GRU(6, 5), "rnn": nn.RNN(6, 5)})
    found = {name: reason for name, reason in routes(model).items() if "bias" not in name}
    assert found == {
        "lstm.weight_ih_l0": "muon: recurrent matrix, fused gates (4 x 5)",
        "lstm.weight_hh_l0": "muon: recurrent matrix, fused gates (4 x 5)",
        "lstm.weight_hr_l0": "muon: recurrent matrix",
        "gru.weight_ih_l0": "muon: recurrent matrix, fused gates (5 + 5 + 5)",
        "gru.weight_hh_l0": "muon: recurrent matrix, fused gates (5 + 5 + 5)",
        "rnn.weight_ih_l0": "muon: recurrent matrix",
        "rnn.weight_hh_l0": "muon: recurrent matrix",
    }
    assert {reason.split(":")[0] for name, reason in routes(model).items() if "bias" in name} == {"adamw"}


def test_a_router_written_by_hand_is_known_by_its_experts():
    block = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    found = routes(nn.ModuleDict({"block": block, "gate": nn.Linear(4, 4), "out": nn.Linear(4, 3)}))
    assert found["block.gate.weight"] == "adamw: router"
    assert found["gate.weight"] == found["block.experts.0.weight"] == "muon: hidden matrix"


class Mixer(nn.Module):
    """A layer that no table can know."""

    def __init__(self):
        super().__init__()
        self.mixing, self.blocks = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(2, 3, 4))
        self.my_qkv = nn.Linear(4, 12, bias=False)


def test_what_no_table_knows_goes_to_adamw_and_is_named(caplog):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Mixer(), Mixer(), nn.Linear(4, 2, bias=False))
    routing = route(model)
    fused = "fused by its name, but the order of its rows in a Mixer is unknown"
    assert routes(model)["1.my_qkv.weight"] == f"adamw: {fused}"
    assert [r.name for r in routing.unknown] == [
        *("1.mixing", "1.blocks", "1.my_qkv.weight"),
        *("2.mixing", "2.blocks", "2.my_qkv.weight"),
    ]
    assert caplog.records == []
    groups = CWDMuon(model.parameters(), routing=routing).param_groups
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [
        [(4, 4)],
        [(4, 4), (2, 3, 4), (12, 4)] * 2 + [(2, 4)],
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "adamw takes parameters that may be matrices for muon: 1.mixing and 1 more (no rule knows Mixer.mixing); "
        f"1.blocks and 1 more (no rule knows Mixer.blocks); 1.my_qkv.weight and 1 more ({fused}). "
        "target_modules would give it to muon"
    ]


def test_where_nothing_but_the_unknown_is_left_muon_is_refused():
    model = nn.Sequential(Mixer(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"no trainable matrix for muon.*no rule knows Mixer\.mixing.*Use CWDAdamW$"):
        CWDMuon(model.parameters(), routing=route(model))


def test_target_modules_settle_what_no_table_knows(caplog):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Mixer(), nn.Linear(4, 2, bias=False))
    model[1].my_qkv.requires_grad_(False)
    assert routes(model, target_modules=["0", "1.mixing", "1.blocks"]) == {
        "0.weight": "muon: hidden matrix",
        "1.mixing": "muon: matrix, as named",
        "1.blocks": "muon: matrix, as named, stack of 2",
        "1.my_qkv.weight": "frozen: frozen",
        "2.weight": "adamw: output head (nothing follows it)",
    }
    assert route(model, target_modules=["0", "1.mixing"]).unknown == []
    assert routes(model, target_modules="all-linear") == {
        "0.weight": "muon: hidden matrix",
        "1.mixing": "adamw: not in target_modules (no rule knows Mixer.mixing)",
        "1.blocks": "adamw: not in target_modules (no rule knows Mixer.blocks)",
        "1.my_qkv.weight": "frozen: frozen",
        "2.weight": "adamw: output head (nothing follows it)",
    }


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (r".*\.q_proj", r".*q_proj\.weight"),
        (r"model\.layers\.1\..*", r".*layers\.1\..*proj\.weight"),
        (["q_proj", "down_proj"], r".*(q|down)_proj\.weight"),
        ([r".*layers\.0.*(k|v)_proj", "q_proj"], r".*(layers\.0.*[kv]|q)_proj\.weight"),
        ('["q_proj", "down_proj"]', r".*(q|down)_proj\.weight"),
        ("all-linear", r".*_proj\.weight"),
        (r".*(q_proj|lm_head)", r".*q_proj\.weight"),
    ],
    ids=str,
)
def test_optim_target_modules_restrict_muon_to_what_they_name(targets, named, arguments):
    model = tiny_llama()
    expected = {name for name, _ in model.named_parameters() if re.fullmatch(named, name)}
    before, after = routes(model), routes(model, target_modules=targets)
    assert {name for name, reason in after.items() if reason.startswith("muon")} == expected
    for name in before:
        outside = before[name].startswith("muon") and name not in expected
        assert after[name] == ("adamw: not in target_modules" if outside else before[name])
    args = arguments(optim="cwd_muon", optim_target_modules=targets)
    groups = Trainer(model=model, args=args).create_optimizer().param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for group in groups if group["algorithm"] == "muon" for p in group["params"]} == expected
    assert {names[p] for group in groups for p in group["params"]} == before.keys()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", r"'q_proj' names no matrix that muon could take: no module has such a name"),
        (["q_proj", "qq_proj"], r"'qq_proj' names no matrix that muon could take: no module has such a name"),
        (["embed_tokens"], r"'embed_tokens' names no matrix .*: model\.embed_tokens\.weight is: embedding"),
        (r".*norm", r"'\.\*norm' names no matrix .*input_layernorm\.weight is: vector"),
        (r"lm_head", r"'lm_head' names no matrix .*lm_head\.weight is: output head"),
    ],
    ids=str,
)
def test_a_target_that_names_no_matrix_is_an_error(targets, message, arguments):
    trainer = Trainer(model=tiny_llama(), args=arguments(optim="cwd_muon", optim_target_modules=targets))
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


def test_an_expression_is_for_the_whole_name():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 3)})
    assert next(r.algorithm for r in route(model, target_modules=".*proj").routes) == "muon"
    with pytest.raises(ValueError, match="'proj' names no matrix"):
        route(model, target_modules="proj")


def test_targets_that_mean_nothing_are_refused_before_a_model_is_loaded(arguments):
    with pytest.raises(ValueError, match=r"--optim_target_modules 'q_proj\(' is not a regular expression"):
        arguments(optim="cwd_muon", optim_target_modules=["v_proj", "q_proj("])
    for algorithm in ("adamw", "lion", "sgd"):
        with pytest.raises(ValueError, match=rf"--optim_target_modules has no effect on cwd_{algorithm}"):
            arguments(optim=f"cwd_{algorithm}", optim_target_modules="all-linear")


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
        ValueError, match=r"Sequential has no trainable matrix for muon.*1 x embedding.*Use --optim cwd_adamw$"
    ):
        Trainer(model=model, args=arguments(optim="cwd_muon")).create_optimizer()
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("proj.weight"))
    with pytest.raises(ValueError, match=r"no trainable matrix.*14 x frozen"):
        Trainer(model=model, args=arguments(optim="cwd_muon")).create_optimizer()
    message = r"PeftModel has no trainable matrix for muon.*4 x vector \(one row or column\).*Use --optim cwd_adamw$"
    with pytest.raises(ValueError, match=message):
        Trainer(model=llama_with_lora(rank=1), args=arguments(optim="cwd_muon")).create_optimizer()


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
        f"muon: 14 matrices in 14 tensors, {muon:,} parameters; adamw: 6 tensors, {rest:,} parameters; "
        "frozen: 1 tensors, 2,048 parameters"
    )


def test_one_start_up_line_says_what_each_rule_got(arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    args = arguments(optim="cwd_muon", optim_args="adamw_lr=3e-3", optim_target_modules=["q_proj", "k_proj"])
    optimizer = Trainer(model=model, args=args).create_optimizer()
    (record,) = [record for record in caplog.records if record.name == "hf_cwd"]
    muon = 2 * (32 * 32 + 16 * 32)
    rest = sum(p.numel() for p in model.parameters()) - muon - 64 * 32
    settings, _, summary = record.getMessage().partition(" | ")
    assert settings.startswith("cwd_muon lr=0.01 weight_decay=0.1 ")
    assert summary == (
        f"muon: 4 matrices in 4 tensors, {muon:,} parameters, lr 0.01, weight_decay 0.1; "
        f"adamw: 16 tensors, {rest:,} parameters, lr 0.003, weight_decay 0.1 and 0; "
        "frozen: 1 tensors, 2,048 parameters | output layers: lm_head"
    )
    assert {(g["algorithm"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        ("muon", 0.01, 0.1),
        ("adamw", 0.003, 0.1),
        ("adamw", 0.003, 0.0),
    }
