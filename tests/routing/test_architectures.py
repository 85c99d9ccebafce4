"""The routing of real architectures: pinned parameter by parameter, true to the modules' own code, and trained."""

import copy
import difflib

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Trainer

from hf_cwd import CWDMuon, route
from tests.routing.architectures import DECODER, MODELS, ROUTES
from tests.support.tiny import tiny_data

NOT_CAUSAL = ("gpt2_cross_attention", "bert", "modernbert", "t5", "vit", "resnet", "whisper", "wav2vec2", "qwen2_vl")
FUSED = sorted(path.stem for path in ROUTES.glob("*.txt") if ", fused " in path.read_text())
# By the name of a fused layer and the number of its parts: the layer next to it whose input vanishes when one part of
# its output, given by its position, has the value. v = 0 silences attention, gate = 0 a gated MLP. Where one part of
# two or v of q, k, v does, the others are what is left; beta = sigmoid(b) and sigmoid(gate) need a large number.
SILENCED = {
    ("c_attn", 2): ("c_proj", {1: 0.0}),
    ("c_attn", 3): ("c_proj", {2: 0.0}),
    ("query_key_value", 3): ("dense", {2: 0.0}),
    ("qkv_proj", 3): ("o_proj", {2: 0.0}),
    ("Wqkv", 3): ("Wo", {2: 0.0}),
    ("qkv", 3): ("proj", {2: 0.0}),
    ("q_proj", 2): ("o_proj", {1: -1e4}),
    ("kv_a_proj_with_mqa", 2): ("o_proj", {0: 0.0}),
    ("kv_b_proj", 2): ("o_proj", {1: 0.0}),
    ("gate_up_proj", 2): ("down_proj", {0: 0.0, 1: 0.0}),
    ("Wi", 2): ("Wo", {0: 0.0, 1: 0.0}),
    ("in_proj", 2): ("out_proj", {0: 0.0, 1: 0.0}),
    ("x_proj", 3): ("out_proj", {1: 0.0, 2: 0.0}),
    ("in_proj", 5): ("out_proj", {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}),
    ("in_proj_qkvz", 4): ("out_proj", dict.fromkeys(range(4), 0.0)),
    ("in_proj_ba", 2): ("out_proj", {0: -1e4}),
}


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="some modules had other names")
@pytest.mark.parametrize("name", MODELS)
def test_the_routing_is_the_one_in_the_file(name):
    path = ROUTES / f"{name}.txt"
    pinned, found = path.read_text().splitlines(), str(route(MODELS[name]())).splitlines()
    difference = "\n".join(difflib.unified_diff(pinned, found, f"routes/{name}.txt", "now", n=0, lineterm=""))
    if difference:
        renew = "If every line is right, renew the files: python -m tests.routing.architectures"
        pytest.fail(f"the routing of {name} has changed:\n{difference}\n{renew}", pytrace=False)


def test_there_is_a_file_for_each_model_and_no_other():
    assert sorted(path.name for path in ROUTES.iterdir()) == sorted(f"{name}.txt" for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_routed_once_and_frozen_ones_are_left_out(name):
    model = MODELS[name]()
    routing = route(model)
    named = dict(model.named_parameters())
    assert [(r.name, r.shape) for r in routing.routes] == [(n, tuple(p.shape)) for n, p in named.items()]
    groups = CWDMuon(model.named_parameters(), routing=routing).param_groups
    grouped = [name for group in groups for name in group["param_names"]]
    assert sorted(grouped) == sorted(name for name, p in named.items() if p.requires_grad)


def forward(name, model):
    tokens = torch.arange(3, 15)[None]
    if name == "qwen2_vl":
        model.model.visual(torch.randn(16, 3 * 2 * 4 * 4), grid_thw=torch.tensor([[1, 4, 4]]))
    elif name == "gpt2_cross_attention":
        model(tokens, encoder_hidden_states=torch.randn(1, 5, 32))
    else:
        model(tokens)


def output_features(shape, layout):
    """For each element of a fused weight, which output feature it belongs to."""
    dim = -1 if layout.transposed else -2
    return torch.arange(shape[dim]).unflatten(0, (-1, 1) if dim == -2 else (1, -1)).expand(shape)


def observed(name, model, fused, watched, change):
    """The input of ``watched`` in a forward pass in which ``change`` edits the output of ``fused``."""
    seen = []
    hooks = [
        fused.register_forward_hook(lambda module, args, output: change(output)),
        watched.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
    ]
    torch.manual_seed(0)
    forward(name, model)
    for hook in hooks:
        hook.remove()
    return seen[0]


def check_linear(name, model, r, layer, parent):
    fused, numbers = model.get_submodule(layer), output_features(r.shape, r.layout)
    rows = [part.flatten(0, -2)[:, 0] for part in r.layout.matrices(numbers)]
    beside, silencing = SILENCED[layer.rpartition(".")[2], len(rows)]
    watched = parent.get_submodule(beside)
    usual = observed(name, model, fused, watched, lambda y: y)
    assert usual.count_nonzero() > 0
    for part, value in silencing.items():
        left = observed(name, model, fused, watched, lambda y: y.index_fill(-1, rows[part], value))  # noqa: B023
        assert left.count_nonzero() == 0, f"{r.name}: part {part + 1} of {r.reason} is something else"

    if ", fused q, k, v" not in r.reason or len(rows) != 3:
        return

    def moved(y, part):
        y = y.clone()
        y[..., 0, rows[part]] += 10  # at the first position only
        return y

    def scaled(y, q, k):  # exactly, by powers of two
        return y.index_copy(-1, rows[0], y[..., rows[0]] * q).index_copy(-1, rows[1], y[..., rows[1]] * k)

    def attention(change, *arguments):
        return observed(name, model, fused, watched, lambda y: change(y, *arguments))

    assert torch.equal(attention(moved, 0)[..., -1, :], usual[..., -1, :]), f"{r.name}: another position's q counts"
    assert not torch.equal(attention(moved, 1)[..., -1, :], usual[..., -1, :]), f"{r.name}: no k counts"
    assert torch.equal(attention(scaled, 2, 0.5), usual), f"{r.name}: 2q and k/2 are not q and k"
    assert not torch.equal(attention(scaled, 2, 1), usual), f"{r.name}: 2q is the same as q"


def check_experts(name, model, r, experts):
    weight, seen = getattr(experts, r.name.rpartition(".")[2]), []
    original = weight.clone()
    hook = experts.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    forward(name, model)
    assert seen[-1].count_nonzero() > 0
    numbers = output_features(r.shape, r.layout)
    for part in r.layout.matrices(numbers):
        weight[torch.isin(numbers, part)] = 0
        forward(name, model)
        assert seen[-1].count_nonzero() == 0, f"{r.name}: its halves are mixed up"
        weight.copy_(original)
        if type(experts).__name__ == "GptOssExperts":
            break  # it multiplies by up + 1: only a gate of zero gives zero
    hook.remove()


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_cut_as_their_module_reads_them(name):
    model = MODELS[name]().eval().requires_grad_(False)
    routes = [r for r in route(copy.deepcopy(model).requires_grad_(True)).routes if r.layout and r.layout.sizes]
    assert routes
    for p_name, p in model.named_parameters():
        if p_name.endswith((".D", ".conv1d.bias")):
            p.zero_()  # what reaches the output of a state-space layer beside its state
    for r in routes:
        layer, _, attribute = r.name.rpartition(".")
        if attribute == "weight":
            check_linear(name, model, r, layer, model.get_submodule(layer.rpartition(".")[0]))
        else:
            check_experts(name, model, r, model.get_submodule(layer))


def test_experts_are_turned_the_way_that_their_features_flow():
    inner = {"mixtral": 48, "qwen3_moe": 16, "gpt_oss": 48, "deepseek_v3": 16, "jamba": 48, "qwen3_next": 16}
    for name, size in inner.items():
        model = MODELS[name]()
        stacks = [r for r in route(model).routes if r.reason.startswith("experts")]
        assert stacks, name
        for r in stacks:
            expected = (32, size) if r.name.endswith("down_proj") else (size, 32)
            found = {tuple(m.shape[-2:]) for m in r.layout.matrices(model.get_parameter(r.name))}
            assert found == {expected}, r.name


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_CAUSAL])
def test_the_trainer_trains_it(name, arguments):
    model = MODELS[name]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(optim="cwd_muon", max_steps=2), train_dataset=tiny_data(8))
    trainer.train()
    for r in route(model).routes:
        p = model.get_parameter(r.name)
        assert p.isfinite().all(), r.name
        if r.algorithm == "muon":
            assert not torch.equal(p, before[r.name]), r.name
        if r.algorithm is None:
            assert torch.equal(p, before[r.name]), r.name


def train(model, steps=4):
    optimizer = CWDMuon(model.named_parameters(), routing=route(model), lr=0.02, weight_decay=0.5)
    tokens = torch.stack([row["input_ids"] for row in tiny_data(8)])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def assert_equal(found, expected):
    # Fused and separate products are summed in another order; float64 keeps that below the twelfth digit.
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-10)


def test_phi3_trains_as_the_llama_that_it_fuses():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**DECODER)).double()
    phi3 = Phi3ForCausalLM(Phi3Config(**DECODER, rms_norm_eps=1e-6, sliding_window=None)).double()

    def fused(source):
        state, result = source.state_dict(), {}
        for key in phi3.state_dict():
            prefix = key.rpartition(".weight")[0].rpartition(".")[0]
            parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
            names = parts.get(key.split(".")[-2], ())
            result[key] = torch.cat([state[f"{prefix}.{n}.weight"] for n in names]) if names else state[key]
        return result

    phi3.load_state_dict(fused(llama))
    before = phi3.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].clone()
    assert train(phi3) == pytest.approx(train(llama), abs=1e-10)
    assert not torch.allclose(phi3.model.layers[0].self_attn.qkv_proj.weight, before, atol=1e-2)
    for key, value in fused(llama).items():
        assert_equal(phi3.state_dict()[key], value)


def test_gpt_neox_trains_as_with_separate_projections():
    class Separate(nn.Module):
        """q, k and v interleaved by head only on their way out."""

        def __init__(self, fused, heads):
            super().__init__()
            self.heads = heads
            weights = fused.weight.unflatten(0, (heads, 3, -1)).unbind(1)
            self.layers = nn.ModuleList(nn.Linear(fused.in_features, fused.in_features).double() for _ in "qkv")
            for layer, weight, bias in zip(self.layers, weights, fused.bias.view(heads, 3, -1).unbind(1), strict=True):
                layer.weight.data, layer.bias.data = weight.detach().flatten(0, 1), bias.detach().flatten().clone()

        def forward(self, x):
            parts = [layer(x).unflatten(-1, (self.heads, -1)) for layer in self.layers]
            return torch.cat(parts, dim=-1).flatten(-2)

    model = MODELS["gpt_neox"]().double()
    twin = copy.deepcopy(model)
    attention, other = model.gpt_neox.layers[0].attention, twin.gpt_neox.layers[0].attention
    other.query_key_value = Separate(other.query_key_value, heads=4)
    assert train(model) == pytest.approx(train(twin), abs=1e-10)
    fused = attention.query_key_value.weight.unflatten(0, (4, 3, -1)).unbind(1)
    for found, layer in zip(fused, other.query_key_value.layers, strict=True):
        assert_equal(found.flatten(0, 1), layer.weight)
    assert_equal(attention.dense.weight, other.dense.weight)


def test_mixtral_trains_as_with_an_expert_after_the_other():
    class Expert(nn.Module):
        def __init__(self, gate_up, down):
            super().__init__()
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                layer = nn.Linear(*reversed(weight.shape), bias=False)
                layer.weight.data = weight.detach().clone()
                self.add_module(name, layer)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Loop(nn.ModuleList):
        def forward(self, x, chosen, weights):
            masks = [(chosen == i).to(weights.dtype) * weights for i in range(len(self))]
            return sum(mask.sum(-1, keepdim=True) * expert(x) for mask, expert in zip(masks, self, strict=True))

    model = MODELS["mixtral"]().double()
    model.set_experts_implementation("eager")  # the default has no float64
    twin = copy.deepcopy(model)
    experts, other = model.model.layers[0].mlp.experts, twin.model.layers[0].mlp
    other.experts = Loop(map(Expert, other.experts.gate_up_proj, other.experts.down_proj))
    assert train(model) == pytest.approx(train(twin), abs=1e-10)
    for gate_up, down, expert in zip(experts.gate_up_proj, experts.down_proj, other.experts, strict=True):
        assert_equal(gate_up, torch.cat([expert.gate_proj.weight, expert.up_proj.weight]))
        assert_equal(down, expert.down_proj.weight)
