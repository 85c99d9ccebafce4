"""Output layers: of models by hand, as other libraries and people write them, and of models inside of others."""

import itertools
import logging

import pytest
import torch
from torch import nn
from torch.nn import (
    LSTM,
    Conv1d,
    Conv2d,
    Embedding,
    Linear,
    LSTMCell,
    ModuleDict,
    ModuleList,
    ReLU,
    Sequential,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    SamConfig,
    SamModel,
    Trainer,
)

from hf_cwd import route
from tests.support.tiny import TINY, tiny_data, tiny_llama

ENCODER = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}


class Net(nn.Module):
    """Children by keyword, in order."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Block(Net):
    """Of a transformer, as nanoGPT has them."""

    def __init__(self, attention=None):
        super().__init__(ln_1=nn.LayerNorm(8), attn=attention or CausalSelfAttention(), mlp=mlp())


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_embd = 8
        self.c_attn, self.c_proj = Linear(8, 24), Linear(8, 8)


class MultiHeadAttention(Net):
    """With a module for each head."""

    def __init__(self):
        heads = ModuleList(Net(key=Linear(8, 4), query=Linear(8, 4), value=Linear(8, 4)) for _ in range(2))
        super().__init__(heads=heads, proj=Linear(8, 8))


class BasicBlock(Net):
    def __init__(self):
        super().__init__(conv1=Conv2d(8, 8, 3), bn1=nn.BatchNorm2d(8), conv2=Conv2d(8, 8, 3))


class GCNConv(Net):
    def __init__(self, fan_in, fan_out):
        super().__init__(lin=Linear(fan_in, fan_out, bias=False))


class SAGEConv(Net):
    def __init__(self, fan_in, fan_out):
        super().__init__(lin_l=Linear(fan_in, fan_out), lin_r=Linear(fan_in, fan_out, bias=False))


class Discriminator(Net):
    def __init__(self):
        super().__init__(l1=Linear(8, 6), l2=Linear(6, 6), l3=Linear(6, 3))


def mlp(fan_in=8, fan_out=8):
    return Sequential(Linear(fan_in, 16), ReLU(), Linear(16, fan_out))


def net():
    return Discriminator()


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)


def tied_lstm():
    model = Net(encoder=Embedding(20, 8), rnn=LSTM(8, 8), decoder=Linear(8, 20))
    model.decoder.weight = model.encoder.weight
    return model


def twice():
    shared = Linear(8, 8)
    return Net(first=shared, second=shared, last=Linear(8, 3))


def nano_gpt(blocks, **head):
    body = ModuleDict({"wte": Embedding(20, 8), "wpe": Embedding(9, 8), "h": blocks, "ln_f": nn.LayerNorm(8)})
    return Net(transformer=body, **head)


# Each: the model, and the output layers in it. Every other weight of two dimensions or more is hidden, unless it is an
# embedding or reads the raw input.
PLAIN = {
    "sequential": (lambda: Sequential(mlp(), ReLU(), Linear(8, 3)), "2"),
    "nested sequential": (lambda: Sequential(Linear(8, 8), Sequential(ReLU(), Linear(8, 3))), "1.1"),
    "list of layers": (lambda: Net(layers=ModuleList([Linear(8, 6), Linear(6, 6), Linear(6, 3)])), "layers.2"),
    "nanoGPT": (lambda: nano_gpt(ModuleList([Block(), Block()]), lm_head=Linear(8, 20)), "lm_head"),
    "nanoGPT without a head": (lambda: nano_gpt(ModuleList([Block(), Block()])), ""),
    "nanoGPT of one block without a head": (lambda: nano_gpt(ModuleList([Block()])), ""),
    "lecture GPT": (
        lambda: Net(table=Embedding(20, 8), blocks=Sequential(Block(MultiHeadAttention())), lm_head=Linear(8, 20)),
        "lm_head",
    ),
    "llama.c": (
        lambda: Net(tok_embeddings=Embedding(20, 8), layers=ModuleList([Block()]), output=Linear(8, 20)),
        "output",
    ),
    "output made first": (lambda: Net(out=Linear(8, 20), tok=Embedding(20, 8), layers=ModuleList([Block()])), "out"),
    "input projection": (lambda: Net(linear=Linear(5, 8), encoder=encoder()), ""),
    "torch encoder": (lambda: Net(embed=Embedding(20, 8), encoder=encoder(), linear=Linear(8, 20)), "linear"),
    "torch transformer": (
        lambda: Net(transformer=nn.Transformer(8, 2, 1, 1, 16), generator=Net(proj=Linear(8, 20))),
        "generator.proj",
    ),
    "bare torch transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), ""),
    "bare attention": (lambda: nn.MultiheadAttention(8, 2), ""),
    "bare layer": (lambda: Linear(8, 3), ""),
    "LSTM": (lambda: Net(encoder=Embedding(20, 8), rnn=LSTM(8, 8), decoder=Linear(8, 20)), "decoder"),
    "LSTM cell": (lambda: Net(cell=LSTMCell(5, 8), readout=Linear(8, 3)), "readout"),
    "CRNN with CTC": (
        lambda: Net(cnn=Sequential(Conv2d(3, 8, 3), Conv2d(8, 8, 3)), rnn=LSTM(8, 8), fc=Linear(8, 20)),
        "fc",
    ),
    "CTC": (lambda: Net(encoder=mlp(), ctc_lo=Linear(8, 20)), "ctc_lo"),
    "CTC beside a decoder": (
        lambda: Net(encoder=mlp(), decoder=Net(rnn=LSTM(8, 8), output_layer=Linear(8, 20)), ctc=Net(lo=Linear(8, 20))),
        "decoder.output_layer ctc.lo",
    ),
    "RNN transducer": (
        lambda: Net(encoder=mlp(), predictor=Net(lstm=LSTM(8, 8), linear=Linear(8, 8)), joiner=Net(x=Linear(8, 20))),
        "joiner.x",
    ),
    "sequence to sequence": (
        lambda: Net(encoder=Net(rnn=LSTM(8, 8)), decoder=Net(rnn=LSTM(8, 8), attention=mlp(), fc_out=Linear(8, 20))),
        "decoder.fc_out",
    ),
    "policy and value of stable baselines": (
        lambda: Net(
            mlp_extractor=Net(policy_net=mlp(5, 8), value_net=mlp(5, 8)),
            action_net=Linear(8, 4),
            value_net=Linear(8, 2),
        ),
        "action_net value_net",
    ),
    "DINO": (
        lambda: Net(student=Net(trunk=mlp(), head=Net(mlp=mlp(), last_layer=Linear(8, 20)))),
        "student.head.last_layer",
    ),
    "ResNet": (
        lambda: Net(conv1=Conv2d(3, 8, 7), layer1=Sequential(BasicBlock(), BasicBlock()), fc=Linear(8, 10)),
        "fc",
    ),
    "ResNet without a head": (
        lambda: Net(conv1=Conv2d(3, 8, 7), layer1=Sequential(BasicBlock(), BasicBlock()), fc=nn.Identity()),
        "",
    ),
    "LeNet": (
        lambda: Net(
            conv1=Conv2d(1, 6, 5), conv2=Conv2d(6, 8, 5), fc1=Linear(128, 12), fc2=Linear(12, 8), fc3=Linear(8, 10)
        ),
        "fc3",
    ),
    "hidden layer named fc": (
        lambda: Net(conv1=Conv2d(1, 6, 5), conv2=Conv2d(6, 8, 5), fc=Linear(128, 12), out=Linear(12, 10)),
        "out",
    ),
    "VGG": (
        lambda: Net(features=Sequential(Conv2d(3, 8, 3)), classifier=Sequential(mlp(32, 8), ReLU(), Linear(8, 3))),
        "classifier.2",
    ),
    "EfficientNet": (
        lambda: Net(
            conv_stem=Conv2d(3, 8, 3),
            blocks=Sequential(Sequential(BasicBlock())),
            conv_head=Conv2d(8, 12, 1),
            classifier=Linear(12, 3),
        ),
        "classifier",
    ),
    "ConvNeXt": (
        lambda: Net(
            stem=Sequential(Conv2d(3, 8, 4)),
            stages=Sequential(Net(blocks=Sequential(BasicBlock()))),
            head=Net(norm=nn.LayerNorm(8), fc=Linear(8, 3)),
        ),
        "head.fc",
    ),
    "torchvision ViT": (
        lambda: Net(encoder=Net(layers=Sequential(Block(), Block())), heads=Sequential(Linear(8, 9), Linear(9, 3))),
        "heads.1",
    ),
    "MLP-Mixer": (
        lambda: Net(stem=Net(proj=Conv2d(3, 8, 4)), blocks=Sequential(Block(), Block()), head=Linear(8, 3)),
        "head",
    ),
    "DeepLab": (
        lambda: Net(
            backbone=Sequential(BasicBlock()),
            classifier=Sequential(Conv2d(8, 8, 3), ReLU(), Conv2d(8, 5, 1)),
            aux_classifier=Sequential(Conv2d(8, 8, 3), ReLU(), Conv2d(8, 5, 1)),
        ),
        "classifier.2 aux_classifier.2",
    ),
    "Inception": (
        lambda: Net(stem=Conv2d(3, 8, 3), AuxLogits=Net(conv0=Conv2d(8, 8, 1), fc=Linear(8, 5)), fc=Linear(8, 5)),
        "AuxLogits.fc fc",
    ),
    "U-Net": (
        lambda: Net(inc=Net(conv=Sequential(Conv2d(3, 8, 3), Conv2d(8, 8, 3))), outc=Net(conv=Conv2d(8, 2, 1))),
        "outc.conv",
    ),
    "diffusers U-Net": (
        lambda: Net(
            conv_in=Conv2d(4, 8, 3),
            time_embedding=Net(linear_1=Linear(8, 16), linear_2=Linear(16, 16)),
            down_blocks=ModuleList([BasicBlock()]),
            mid_block=BasicBlock(),
            conv_out=Conv2d(8, 4, 3),
        ),
        "conv_out",
    ),
    "DiT": (
        lambda: Net(
            t_embedder=Net(mlp=mlp()),
            blocks=ModuleList([Block()]),
            final_layer=Net(linear=Linear(8, 12), adaLN_modulation=Sequential(nn.SiLU(), Linear(8, 16))),
        ),
        "final_layer.linear",
    ),
    "WaveNet": (
        lambda: Net(
            stack=ModuleList([Net(a=Conv1d(8, 8, 2), b=Conv1d(8, 8, 1))]),
            post1=Conv1d(8, 8, 1),
            post2=Conv1d(8, 20, 1),
        ),
        "post2",
    ),
    "autoencoder": (lambda: Net(encoder=mlp(20, 4), decoder=mlp(4, 20)), "decoder.2"),
    "variational autoencoder": (
        lambda: Net(fc1=Linear(20, 12), fc21=Linear(12, 4), fc22=Linear(12, 4), fc3=Linear(4, 12), fc4=Linear(12, 20)),
        "fc4",
    ),
    "GAN": (lambda: Net(generator=mlp(4, 20), discriminator=mlp(20, 3)), "generator.2 discriminator.2"),
    "actor and critic": (lambda: Net(actor=mlp(5, 4), critic=mlp(5, 3)), "actor.2 critic.2"),
    "two heads on a trunk": (lambda: Net(trunk=mlp(), mu=Linear(8, 3), log_std=Linear(8, 3)), "mu log_std"),
    "a head that gives one number": (lambda: Net(trunk=mlp(), value=Linear(8, 1)), "value"),
    "DQN": (lambda: Net(conv=Sequential(Conv2d(4, 8, 8), Conv2d(8, 8, 4)), fc=mlp(32, 6)), "fc.2"),
    "dueling DQN": (
        lambda: Net(features=mlp(5, 8), value_stream=mlp(8, 2), advantage_stream=mlp(8, 4)),
        "value_stream.2 advantage_stream.2",
    ),
    "twin critics": (lambda: Net(q1=net(), q2=net()), "q1.l3 q2.l3"),
    "tasks": (lambda: Net(trunk=mlp(), tasks=ModuleDict({"a": Linear(8, 3), "b": Linear(8, 5)})), "tasks.a tasks.b"),
    "dictionary of heads": (
        lambda: Net(heads=ModuleDict({"a": Linear(8, 8), "b": mlp()}), trunk=mlp()),
        "heads.a heads.b.2",
    ),
    "list of heads": (lambda: Net(trunk=mlp(), heads=ModuleList([Linear(8, 8), Linear(8, 8)])), "heads.0 heads.1"),
    "GCN": (lambda: Net(conv1=GCNConv(5, 8), conv2=GCNConv(8, 3)), "conv2"),
    "GraphSAGE": (lambda: Net(convs=ModuleList([SAGEConv(5, 8), SAGEConv(8, 8), SAGEConv(8, 3)])), "convs.2"),
    "GNN with a readout": (lambda: Net(conv1=GCNConv(5, 8), conv2=GCNConv(8, 8), lin=Linear(8, 3)), "lin"),
    "siamese": (lambda: Net(backbone=net()), "backbone.l3"),
    "ensemble": (lambda: Net(models=ModuleList([net(), net()])), "models.0.l3 models.1.l3"),
    "copy": (lambda: Net(net=net(), ema_net=net()), "net.l3 ema_net.l3"),
    "momentum encoder": (lambda: Net(encoder_q=net(), encoder_k=net()), "encoder_q.l3 encoder_k.l3"),
    "student and teacher": (
        lambda: Net(student=Net(a=Linear(8, 4), b=Linear(4, 3)), teacher=net()),
        "student.b teacher.l3",
    ),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(net()), "module.l3"),
    "compiled": (lambda: torch.compile(net()), "_orig_mod.l3"),
    "parallel": (lambda: nn.DataParallel(net()), "module.l3"),
    "towers": (
        lambda: Net(image=encoder(), text=encoder(), image_projection=Linear(8, 5), text_projection=Linear(8, 5)),
        "image_projection text_projection",
    ),
    "a module twice": (twice, "last"),
    "detector": (
        lambda: Net(
            backbone=Sequential(BasicBlock()),
            roi_heads=Net(box_head=mlp(), box_predictor=Net(cls_score=Linear(8, 5), bbox_pred=Linear(8, 20))),
        ),
        "roi_heads.box_head.2 roi_heads.box_predictor.cls_score roi_heads.box_predictor.bbox_pred",
    ),
}


def raw_input(layer):
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.in_channels <= 4


@pytest.mark.parametrize("name", PLAIN)
def test_the_output_layers_of_models_by_hand(name):
    make, expected = PLAIN[name]
    model = make()
    routing = route(model)
    assert routing.outputs == expected.split()
    for r in routing.routes:
        path = r.name.rpartition(".")[0]
        layer = model.get_submodule(path)
        if len(r.shape) < 2 or 1 in r.shape or isinstance(layer, Embedding) or raw_input(layer):
            continue
        leads_out = any(f"{path}.".startswith(f"{output}.") for output in expected.split())
        assert (r.algorithm == "adamw") == leads_out, r
        assert not leads_out or r.reason.startswith("output head"), r


NAMES = """
    fc out linear regressor decoder heads cls unembed lm_head classifier score head output proj projection final logits
    readout prediction to_logits out_proj last predictor dense output_layer fc_out W_out action mlp_head lin value_head
    output_projection output_linear final_layer head_out last_linear mask_head pi q_values anything
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_layer_that_nothing_reads_leads_out_whatever_its_name_and_place(name):
    parts = {"embed": Embedding(20, 8), "hidden": Linear(8, 8), name: Linear(8, 20)}
    for order in itertools.permutations(parts):
        assert route(Net(**{part: parts[part] for part in order})).outputs == [name], order


@pytest.mark.parametrize("name", ["attn_heads", "multi_head", "conv_head", "attention_head"])
def test_these_are_no_output_heads(name):
    assert route(Net(**{name: Linear(8, 8)}, hidden=Linear(8, 8), out=Linear(8, 3))).outputs == ["out"]


def test_embeddings_tied_to_an_output_layer_are_embeddings():
    routing = route(tied_lstm())
    assert routing.routes[0].reason == "embedding, tied to the output head"
    assert routing.outputs == ["decoder"]


def test_a_reason_says_how_a_head_was_found():
    reasons = {r.name: r.reason for r in route(Net(a=Linear(8, 8), b=Linear(8, 3))).routes}
    assert reasons["b.weight"] == "output head (nothing follows it)"
    reasons = {r.name: r.reason for r in route(Net(score=Linear(8, 3), a=Linear(8, 8))).routes}
    assert reasons["score.weight"] == "output head"


def test_weights_that_are_made_of_others_go_to_adamw():
    model = Net(a=Linear(8, 8), b=Linear(8, 8), c=Linear(8, 8), d=Linear(8, 8), out=Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model.a)
    nn.utils.parametrizations.orthogonal(model.b)
    nn.utils.weight_norm(model.c)
    nn.utils.spectral_norm(model.d)
    routes = {r.name: f"{r.algorithm}: {r.reason}" for r in route(model).routes}
    for name in (
        "a.parametrizations.weight.original1",
        "b.parametrizations.weight.original",
        "c.weight_v",
        "d.weight_orig",
    ):
        assert routes[name] == "adamw: parametrized weight"
    assert routes["c.weight_g"].startswith("adamw: vector")


def test_a_raw_parameter_of_a_linear_layer_is_not_its_weight():
    class Noisy(Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.sigma = nn.Parameter(torch.ones(8, 8))

    routing = route(Net(noisy=Noisy(), out=Linear(8, 3)))
    assert [r.name for r in routing.unknown] == ["noisy.sigma"]
    assert {r.name: r.algorithm for r in routing.routes}["noisy.weight"] == "muon"


def test_lazy_layers_need_a_batch_first():
    model = Net(hidden=nn.LazyLinear(8), out=Linear(8, 3))
    with pytest.raises(ValueError, match=r"hidden\.weight has no shape yet: run the model on a batch before"):
        route(model)
    model.hidden(torch.zeros(2, 5))
    assert route(model).outputs == ["out"]


def bert(kind=BertModel, **options):
    return kind(BertConfig(**ENCODER, **options))


def llama_body():
    return LlamaModel(LlamaConfig(**TINY))


def permuted(parts):
    for order in itertools.permutations(parts):
        yield Net(**{name: parts[name]() for name in order})


# Parts in any order, and the output layers.
COMPOSED = {
    "vision and language": ({"vision": bert, "linear": lambda: Linear(32, 32), "llm": tiny_llama}, {"llm.lm_head"}),
    "encoder, projector, body, head": (
        {"encoder": bert, "projector": lambda: mlp(32, 32), "body": llama_body, "lm_head": lambda: Linear(32, 64)},
        {"lm_head"},
    ),
    "captions": ({"cnn": lambda: mlp(5, 32), "fc": lambda: Linear(32, 32), "lm": tiny_llama}, {"lm.lm_head"}),
    "distillation": (
        {"student": tiny_llama, "teacher": tiny_llama, "fit": lambda: Linear(32, 32)},
        {"student.lm_head", "teacher.lm_head"},
    ),
    "bi-encoder": ({"query": bert, "document": bert}, set()),
    "bi-encoder with a projection": ({"query": bert, "document": bert, "proj": lambda: Linear(32, 16)}, {"proj"}),
    "body and classifier": ({"bert": bert, "fc": lambda: Linear(32, 3)}, {"fc"}),
    "body and unnamed classifier": ({"bert": bert, "abc": lambda: mlp(32, 3)}, {"abc.2"}),
    "two heads": ({"bert": bert, "a": lambda: Linear(32, 3), "b": lambda: Linear(32, 5)}, {"a", "b"}),
    "value head": (
        {"pretrained_model": tiny_llama, "v_head": lambda: Net(summary=Linear(32, 1))},
        {"pretrained_model.lm_head", "v_head.summary"},
    ),
    "reward": ({"model": llama_body, "v_head": lambda: Linear(32, 2)}, {"v_head"}),
    "different heads": (
        {"a": lambda: bert(BertForSequenceClassification), "b": tiny_llama},
        {"a.classifier", "b.lm_head"},
    ),
    "list": ({"models": lambda: ModuleList([tiny_llama(), tiny_llama()])}, {"models.0.lm_head", "models.1.lm_head"}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_each_model_inside_has_a_body_and_a_head_in_any_order(name):
    parts, expected = COMPOSED[name]
    for model in permuted(parts):
        routing = route(model)
        assert set(routing.outputs) == expected
        for r in routing.routes:
            if r.name.endswith(("proj.weight", "dense.weight", "fit.weight", "0.weight", "linear.weight")):
                leads_out = any(r.name.startswith(f"{output}.") for output in expected)
                assert (r.algorithm == "adamw") == leads_out, r


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda model: Net(model=model)],
    ids=["compiled", "parallel", "averaged", "module"],
)
def test_a_wrapped_transformers_model_is_routed_as_without(wrap):
    def algorithms(model, prefix):
        return {r.name.removeprefix(prefix): (r.algorithm, r.reason) for r in route(model).routes}

    model = tiny_llama()
    wrapped = wrap(model)
    (inner,) = [name for name, _ in wrapped.named_children()]
    assert algorithms(wrapped, f"{inner}.") == algorithms(model, "")
    assert route(wrapped).outputs == [f"{inner}.lm_head"]


def test_sentence_transformers_dense_layer_leads_out():
    model = Sequential(Net(auto_model=bert()), nn.Identity(), Net(linear=Linear(32, 16)))
    assert route(model).outputs == ["2.linear"]
    assert route(model[:2]).outputs == []


class Regressor(PreTrainedModel):
    """A PreTrainedModel of one's own, which does not say what its body is."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.hidden, self.fc = BertModel(config), Linear(32, 32), Linear(32, 3)
        self.post_init()


class WithBody(Regressor):
    base_model_prefix = "encoder"


def test_a_pretrained_model_of_one_s_own_is_followed_to_its_end():
    assert route(Regressor(BertConfig(**ENCODER))).outputs == ["fc"]
    assert route(WithBody(BertConfig(**ENCODER))).outputs == ["hidden", "fc"]  # all that is around the body


def test_the_models_inside_of_a_transformers_model_have_heads():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**ENCODER), BertConfig(**ENCODER))
    routing = route(EncoderDecoderModel(config))
    assert routing.outputs == ["decoder.cls"]
    routing = route(Net(model=bert(BertLMHeadModel, is_decoder=True), projector=Linear(32, 32)))
    assert routing.outputs == ["model.cls"]


def test_the_projections_of_clip_lead_out_of_its_towers():
    vision = {
        key: ENCODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = CLIPConfig(
        text_config=ENCODER, vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    routing = route(CLIPModel(config))
    assert routing.outputs == ["visual_projection", "text_projection"]


def test_heads_inside_of_transformers_bodies_lead_out():
    with torch.device("meta"):
        sam, janus = SamModel(SamConfig()), JanusForConditionalGeneration(JanusConfig())
    outputs = route(sam).outputs
    assert outputs == ["mask_decoder.iou_prediction_head.proj_out"]
    routes = {r.name: r.reason for r in route(sam).routes}
    assert routes["mask_decoder.iou_prediction_head.proj_in.weight"] == "hidden matrix"
    assert set(route(janus).outputs) == {
        "lm_head",
        "model.vqmodel.decoder.conv_out",
        "model.generation_head.vision_head",
    }


def test_the_trainer_names_the_output_layers_of_a_plain_model(arguments, caplog):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.fc = Embedding(64, 8), Linear(8, 8), Linear(8, 64)

        def forward(self, input_ids, labels):
            logits = self.fc(self.hidden(self.embed(input_ids)).relu())
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    caplog.set_level(logging.INFO, "hf_cwd")
    Trainer(Plain(), arguments(optim="cwd_muon"), train_dataset=tiny_data()).train()
    lines = [record.getMessage() for record in caplog.records if " | " in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].endswith(" | output layers: fc")
