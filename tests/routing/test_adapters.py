"""What each of PEFT's methods trains, and the rule that gets it."""

import logging

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import BertConfig, BertModel, Trainer

from hf_cwd import route
from tests.support.tiny import TINY, tiny_data, tiny_llama

VECTOR = "adamw: vector (norm or scale)"
LORA, HIDDEN, BIAS = "muon: LoRA factor", "muon: hidden matrix", "adamw: vector (bias)"
Q = {"target_modules": ["q_proj"]}
PROMPT = {"num_virtual_tokens": 4}
# For each method its configuration, and for each part of a name what parameters with it get.
METHODS: dict[str, tuple[dict, dict[str, str]]] = {
    "ADALORA": (Q | {"init_r": 4, "total_step": 9}, {"lora_A": LORA, "lora_B": LORA, "lora_E": VECTOR}),
    "ADAMSS": (
        Q | {"r": 8, "num_subspaces": 2, "subspace_rank": 2},
        {"adamss_A": LORA, "adamss_B": LORA},
    ),
    "ADAPTION_PROMPT": (
        {"adapter_len": 4, "adapter_layers": 1},
        {"adaption_prompt": "adamw: learned input", "adaption_gate": VECTOR},
    ),
    "BEFT": (Q, {"beft_bias": VECTOR}),
    "BOFT": (Q | {"boft_block_size": 4}, {"boft_R": "adamw: blocks of a rotation", "boft_s": VECTOR}),
    "C3A": (Q | {"block_size": 8}, {"c3a_kernel": "adamw: circulant blocks"}),
    "CARTRIDGE": (PROMPT, {"trainable_embedding": "adamw: learned input"}),
    "CPT": (
        {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 2], "cpt_mask": [1, 1]},
        {"delta_embedding": "adamw: embedding"},
    ),
    "DEFT": (Q | {"r": 4}, {"deft_P": "muon: DEFT factor", "deft_R": "muon: DEFT factor"}),
    "DELORA": (Q | {"r": 4}, {"delora_A": LORA, "delora_B": LORA, "delora_lambda": VECTOR}),
    "FOURIERFT": (Q, {"fourierft_spectrum": VECTOR}),
    "FROD": (Q, {"frod_lambda_l": VECTOR, "frod_lambda_s_values": VECTOR}),
    "GLORA": (Q | {"r": 4}, {"glora_A": "muon: GLoRA factor", "glora_B": "muon: GLoRA factor"}),
    "GRALORA": (
        Q | {"r": 4, "hybrid_r": 2},
        {
            "gralora_A.": f"{LORA}, stack of 2",
            "gralora_B.": f"{LORA}, stack of 2",
            "gralora_A_general": LORA,
            "gralora_B_general": LORA,
        },
    ),
    "HIRA": (Q | {"r": 4}, {"hira_A": LORA, "hira_B": LORA}),
    "HRA": (Q | {"r": 4}, {"hra_u": "muon: HRA factor"}),
    "IA3": ({"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, {"ia3_l": VECTOR}),
    "LILY": (
        Q | {"r": 4, "num_B": 2},
        {"lily_A": LORA, "lily_B": f"{LORA}, fused blocks (4 + 4)", "lily_router": "adamw: router"},
    ),
    "LN_TUNING": ({"target_modules": ["norm"]}, {"ln_tuning_layers": VECTOR}),
    "LOHA": (Q | {"r": 4}, {"hada_w": "muon: LoHa factor"}),
    "LOKR": (
        Q | {"r": 2, "decompose_both": True, "decompose_factor": 4},
        {"lokr_w1": "muon: LoKr factor", "lokr_w2": "muon: LoKr factor"},
    ),
    "LORA": (Q | {"r": 4}, {"lora_A": LORA, "lora_B": LORA}),
    "MISS": (Q | {"r": 4}, {"miss_block": "adamw: block that parts of a weight share"}),
    "MULTITASK_PROMPT_TUNING": (
        PROMPT | {"num_tasks": 2, "num_ranks": 2},
        {"prefix_task_": "adamw: learned input", "embedding": "adamw: embedding"},
    ),
    "OFT": (Q | {"r": 0, "oft_block_size": 4}, {"oft_R": "adamw: blocks of a rotation"}),
    "OSF": (Q, {"U_low": "muon: OSF factor", "V_low": "muon: OSF factor", "S_low": VECTOR}),
    "PEANUT": (
        Q | {"r": 4, "depth": 1},
        {"peanut_A": LORA, "peanut_B": LORA, "peanut_encoders": HIDDEN, "peanut_decoders": HIDDEN},
    ),
    "POLY": (
        Q | {"r": 4},
        {"poly_lora_": f"{LORA}, stack of 4", "poly_router": "adamw: router"},
    ),
    "PREFIX_TUNING": (
        PROMPT | {"prefix_projection": True, "encoder_hidden_size": 16},
        {"embedding": "adamw: embedding", "0.weight": HIDDEN, "2.weight": HIDDEN, "bias": BIAS},
    ),
    "PROMPT_TUNING": (PROMPT, {"embedding": "adamw: embedding"}),
    "PSOFT": (Q | {"r": 4, "psoft_orth": False}, {"R.default.weight": "muon: PSOFT factor", "vector_": VECTOR}),
    "PVERA": (Q | {"r": 4}, {"pvera_lambda_": VECTOR}),
    "P_TUNING": (
        PROMPT | {"encoder_hidden_size": 16},
        {"embedding": "adamw: embedding", **{f"mlp_head.{i}.weight": HIDDEN for i in (0, 2, 4)}, "bias": BIAS},
    ),
    "RANDLORA": (Q | {"r": 4}, {"randlora_lambda": "adamw: diagonals", "randlora_gamma": "adamw: diagonals"}),
    "ROAD": (Q | {"group_size": 8}, {"road_theta": VECTOR, "road_alpha": VECTOR}),
    "SHADOW": (
        Q | {"r": 4},
        {
            "shadow_down": HIDDEN,
            "shadow_up.": HIDDEN,
            "0.weight": HIDDEN,
            "2.weight": HIDDEN,
            "bias": BIAS,
            "proj.weight": HIDDEN,
            "norm": VECTOR,
        },
    ),
    "SHIRA": (Q | {"r": 4}, {"shira_weight": VECTOR}),
    "SUPERTUNING": (
        Q | {"r": 4},
        {"supertuning_values": VECTOR, "supertuning_lora_A": LORA, "supertuning_lora_B": LORA},
    ),
    "TINYLORA": (Q | {"r": 4}, {"tinylora_v": VECTOR}),
    "TRAINABLE_TOKENS": (
        {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
        {"trainable_tokens_delta": "adamw: embedding (token delta)"},
    ),
    "UNILORA": (Q | {"r": 4}, {"unilora_theta_d": VECTOR}),
    "VBLORA": (
        Q | {"r": 4, "vector_length": 8, "num_vectors": 16},
        {"vector_bank": "adamw: vectors of a bank", "vblora_logits_": "adamw: logits that choose vectors"},
    ),
    "VERA": (Q | {"r": 4}, {"vera_lambda_": VECTOR}),
    "WAVEFT": (Q | {"n_frequency": 64}, {"waveft_spectrum": VECTOR}),
    "XLORA": (
        {"hidden_size": 32, "xlora_depth": 3, "xlora_size": 16},
        {
            "classifier.layers.0.weight": HIDDEN,
            "classifier.layers.3.weight": HIDDEN,
            "classifier.layers.6.weight": "adamw: output head",
            "bias": BIAS,
        },
    ),
}
NAMES = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
SAME = {"BONE": "MISS"}  # another name of it, or an older form


def adapted(name, options, tmp_path):
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2, use_cache=False)
    if name == "XLORA":
        get_peft_model(tiny_llama(), LoraConfig(r=4, **Q)).save_pretrained(tmp_path)
        options = options | {"adapters": {"one": str(tmp_path), "two": str(tmp_path)}}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)](task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def trained(model, expected):
    """For each part of a name what the trained parameters with it got, with each parameter counted once."""
    found = {key: set() for key in expected}
    for r in route(model).routes:
        if r.algorithm is not None:
            (key,) = [key for key in expected if key in r.name]
            found[key].add(f"{r.algorithm}: {r.reason}")
    return found


def test_every_method_of_peft_is_in_the_table():
    assert {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING} <= set(NAMES)
    assert set(NAMES) - SAME.keys() <= METHODS.keys(), "say what the new method trains"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAME])
def test_what_a_method_trains_goes_where_it_belongs(name, tmp_path):
    options, expected = METHODS[name]
    model = adapted(name, options, tmp_path)
    assert trained(model, expected) == {key: {value} for key, value in expected.items()}
    routing = route(model)
    assert routing.unknown == []
    params = [p for p in model.parameters() if p.requires_grad]
    if any(value.startswith("muon") for value in expected.values()):
        groups = routing([{"params": params}])
        assert sum(len(group["params"]) for group in groups) == len(params)
    else:
        with pytest.raises(ValueError, match="PeftModelForCausalLM has no trainable matrix for muon"):
            routing([{"params": params}])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trainable_token_indices": [1, 2]}, {"trainable_tokens_delta": "adamw: embedding (token delta)"}),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, {"tokens_delta": "adamw: embedding (token delta)"}),
        ({"use_dora": True}, {"lora_magnitude_vector": VECTOR}),
        ({"init_lora_weights": "pissa"}, {}),
        ({"init_lora_weights": "olora"}, {}),
        ({"init_lora_weights": "orthogonal"}, {}),
        ({"use_rslora": True}, {}),
        ({"lora_bias": True}, {"lora_B.default.bias": BIAS}),
        ({"modules_to_save": ["lm_head"]}, {"lm_head": "adamw: output head"}),
        ({"modules_to_save": ["embed_tokens"]}, {"embed_tokens": "adamw: embedding"}),
        ({"layers_to_transform": [0]}, {}),
        ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, {"lora_diag": VECTOR}),
    ],
    ids=str,
)
def test_what_lora_trains_beside_its_factors(options, expected):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, **Q, **options))
    expected = {"lora_A": LORA, "lora_B.default.weight": LORA} | expected
    assert trained(model, expected) == {key: {value} for key, value in expected.items()}


def test_lora_of_an_output_head_of_embeddings_and_of_stacked_experts():
    head = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"]))
    assert trained(head, {"q_proj": 0, "lm_head": 0, "embed_tokens": 0}) == {
        "q_proj": {LORA},
        "lm_head": {"adamw: output head"},
        "embed_tokens": {"adamw: embedding (LoRA)"},
    }


def test_block_diagonal_factors_are_cut_into_their_blocks():
    blocks = peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, **Q, use_bdlora=blocks))
    assert trained(model, {"lora_A": 0, "lora_B": 0}) == {"lora_A": {f"{LORA}, fused blocks (2 + 2)"}, "lora_B": {LORA}}


def test_factors_of_convolutions():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    assert trained(lora, {"lora_A": 0, "lora_B": 0}) == {
        "lora_A": {"muon: convolution, flattened"},
        "lora_B": {"muon: convolution, flattened"},
    }
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    loha = get_peft_model(model, peft.LoHaConfig(r=4, target_modules=["0"], use_effective_conv2d=True))
    assert trained(loha, {"hada_w": 0, "hada_t": 0}) == {
        "hada_w": {"muon: LoHa factor"},
        "hada_t": {"adamw: core of a decomposed convolution"},
    }


def test_hidden_layers_of_prompts_are_no_heads_of_a_model_without_one():
    bert = BertModel(BertConfig(**{key: TINY[key] for key in TINY if key != "num_key_value_heads"}))
    config = peft.PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, encoder_hidden_size=16)
    routing = route(get_peft_model(bert, config))
    assert routing.outputs == []
    assert [r.reason for r in routing.routes if "mlp_head" in r.name and len(r.shape) == 2] == ["hidden matrix"] * 3


def test_the_name_of_an_adapter_decides_nothing():
    model = get_peft_model(tiny_llama(), peft.AdaLoraConfig(init_r=4, total_step=9, **Q), adapter_name="query_token")
    assert trained(model, {"lora_A": 0, "lora_B": 0, "lora_E": 0})["lora_A"] == {LORA}


class Unheard(nn.Linear):
    """A layer of a method that PEFT will have one day."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight.requires_grad_(False)
        self.novel_core = nn.Parameter(torch.zeros(4, 4))
        self.lora_A = nn.Linear(linear.in_features, 4, bias=False)

    def forward(self, x):
        return super().forward(x) + (self.lora_A(x) @ self.novel_core).sum(-1, keepdim=True)


def test_a_method_that_is_not_known_yet_trains_and_is_named(arguments, caplog):
    caplog.set_level(logging.INFO, "hf_cwd")
    model = tiny_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Unheard(layer.self_attn.q_proj)
    before = [layer.self_attn.q_proj.novel_core.clone() for layer in model.model.layers]
    args = arguments(optim="cwd_muon", max_steps=2)
    Trainer(model=model, args=args, train_dataset=tiny_data(8)).train()
    named = [r.getMessage() for r in caplog.records if "novel_core" in r.getMessage()]
    assert named == [
        "adamw takes parameters that may be matrices for muon: model.layers.0.self_attn.q_proj.novel_core and 1 more "
        "(no rule knows Unheard.novel_core). target_modules would give it to muon"
    ]
    for layer, old in zip(model.model.layers, before, strict=True):
        assert not torch.equal(layer.self_attn.q_proj.novel_core, old)
