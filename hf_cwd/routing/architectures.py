"""Tables of transformers' models: fused projections, stacks of experts, and parameters that are not matrices.

The tables follow the models' code (transformers 5.2 to 5.23). They go by module class and name, because the shape does
not distinguish a fused projection, a stack of matrices and a table of positions.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from hf_cwd.newton_schulz.matrices import MatrixLayout

Cut = Callable[[Any, int], tuple[tuple[int, ...], int]]


class Fused(NamedTuple):
    """A projection that holds several matrices.

    Attributes:
        module: a pattern for the name of the linear layer.
        parent: a pattern for the class of the module that holds the layer.
        parts: the names of the fused matrices, for the reason that is shown.
        cut: takes that module and the number of output features, returns ``sizes`` and ``periods`` of the
            :class:`MatrixLayout`.
    """

    module: str
    parent: str
    parts: str
    cut: Cut


def _equal(n: int) -> Cut:
    return lambda parent, rows: ((rows // n,) * n, 1)


def _q_and_kv(q: Callable[[Any], int]) -> Cut:
    """First q, then k and v, which have fewer heads in grouped-query attention."""
    return lambda parent, rows: ((q(parent), (rows - q(parent)) // 2, (rows - q(parent)) // 2), 1)


def _by_head(heads: Callable[[Any], int]) -> Cut:
    """q, k, v of the first head, then of the second, and so on."""
    return lambda parent, rows: ((rows // heads(parent) // 3,) * 3, heads(parent))


def _falcon(parent: Any, rows: int) -> tuple[tuple[int, ...], int]:
    head = parent.head_dim
    if parent.new_decoder_architecture:
        return (parent.num_heads // parent.num_kv_heads * head, head, head), parent.num_kv_heads
    return ((rows - 2 * head, head, head), 1) if parent.multi_query else ((head, head, head), parent.num_heads)


def _bigcode(parent: Any, rows: int) -> tuple[tuple[int, ...], int]:
    if parent.multi_query:
        return (parent.embed_dim, parent.kv_dim, parent.kv_dim), 1
    return (parent.head_dim,) * 3, parent.num_heads


def _mamba2(parent: Any, rows: int) -> tuple[tuple[int, ...], int]:
    states = (parent.conv_dim - parent.intermediate_size) // 2
    return (parent.intermediate_size, parent.intermediate_size, states, states, parent.num_heads), 1


def _qkvz(parent: Any, rows: int) -> tuple[tuple[int, ...], int]:
    values = parent.num_v_heads // parent.num_k_heads * parent.head_v_dim
    return (parent.head_k_dim, parent.head_k_dim, values, values), parent.num_k_heads


QKV, GATE_UP = "q, k, v", "gate, up"
MAMBA1 = "(Falcon|Jamba)?MambaMixer"
MAMBA2 = "(NemotronH)?Mamba2Mixer|BambaMixer|FalconH1Mixer|.*HybridMambaLayer|Zamba2MambaMixer"
FUSED: tuple[Fused, ...] = (
    Fused("qkv_proj", "Phi.*Attention", QKV, _q_and_kv(lambda a: a.config.num_attention_heads * a.head_dim)),
    Fused("qkv_proj", "CodeGenAttention", "q, v, k in four slices", lambda a, rows: ((rows // 12,) * 3, 4)),
    Fused("qkv_proj", "MiniMaxLightningAttention", QKV + " by head", _by_head(lambda a: a.num_attention_heads)),
    Fused("qkv", "Exaone4_5_VisionAttention", QKV, lambda a, rows: ((a.q_dim, a.kv_dim, a.kv_dim), 1)),
    Fused("qkv", ".*", QKV, _equal(3)),  # all other vision models, and timm's
    Fused("Wqkv", "DbrxAttention", QKV, _q_and_kv(lambda a: a.hidden_size)),
    Fused("Wqkv", "MptAttention|ModernBertAttention", QKV, _equal(3)),
    Fused("att_proj|qkv_linear", "BarkSelfAttention|LayoutLMv2SelfAttention", QKV, _equal(3)),
    Fused(
        "q_proj",
        "Qwen(3Next|3_5|3_5Moe|4ExpText)Attention",
        "q, gate by head",
        lambda a, rows: ((a.head_dim, a.head_dim), rows // a.head_dim // 2),
    ),
    Fused("c_attn", "GPTBigCodeAttention", QKV, _bigcode),
    Fused("c_attn", "CausalSelfAttention", QKV, lambda a, rows: ((a.n_embd,) * 3, 1)),  # nanoGPT's
    Fused("c_attn", ".*", QKV, lambda a, rows: ((a.split_size,) * (rows // a.split_size), 1)),
    Fused("query_key_value", "FalconAttention", QKV, _falcon),
    Fused("query_key_value", "GPTNeoXAttention", QKV + " by head", _by_head(lambda a: a.config.num_attention_heads)),
    Fused("query_key_value", "GPTNeoXJapaneseAttention", QKV + " by head", _by_head(lambda a: a.num_attention_heads)),
    Fused("query_key_value", "(Bloom|Persimmon)Attention", QKV + " by head", _by_head(lambda a: a.num_heads)),
    Fused("in_proj", "DisentangledSelfAttention", QKV + " by head", _by_head(lambda a: a.num_attention_heads)),
    Fused("to_kv|kv_proj", ".*Conformer.*|Evolla.*|JetMoeAttention", "k, v", _equal(2)),
    Fused(
        "kv_a_proj_with_mqa",
        ".*",
        "latent, rotary key",
        lambda a, rows: ((a.kv_lora_rank, rows - a.kv_lora_rank), 1),
    ),
    Fused(
        "kv_b_proj",
        ".*",
        "k, v by head",
        lambda a, rows: ((a.qk_nope_head_dim, a.v_head_dim), rows // (a.qk_nope_head_dim + a.v_head_dim)),
    ),
    Fused("gate_up_proj", ".*", GATE_UP, _equal(2)),
    Fused("input_linear", "GraniteMoe.*(MLP|MoE)|JetMoeMoE", GATE_UP, _equal(2)),
    Fused("fc1", "AriaExperts", GATE_UP, _equal(2)),
    Fused("Wi", "ModernBert.*MLP", GATE_UP, _equal(2)),
    Fused("fc1", "Moonshine(Streaming)?DecoderMLP", GATE_UP, _equal(2)),
    Fused("proj", "ClvpGatedLinearUnit", GATE_UP, _equal(2)),
    Fused("proj_up_gate_z", "xLSTMFeedForward", GATE_UP, _equal(2)),
    Fused("linear_1", "(AyaVision|Cohere2Vision)MultiModalProjector", "x, gate", _equal(2)),
    Fused("in_proj", "Lfm.*ShortConv", "B, C, x", _equal(3)),
    Fused("in_proj", MAMBA1, "x, gate", _equal(2)),
    Fused("in_proj", "ZambaMambaMixer", "x, gate in turn", lambda a, rows: ((1, 1), rows // 2)),
    Fused("in_proj", MAMBA2, "gate, x, B, C, dt", _mamba2),
    Fused(
        "x_proj",
        MAMBA1,
        "dt, B, C",
        lambda a, rows: ((a.time_step_rank, a.ssm_state_size, a.ssm_state_size), 1),
    ),
    Fused("in_proj_qkv", ".*GatedDeltaNet", QKV, lambda a, rows: ((a.key_dim, a.key_dim, a.value_dim), 1)),
    Fused("in_proj_qkvz", ".*GatedDeltaNet", "q, k, v, z by head", _qkvz),
    Fused(
        "in_proj_ba",
        ".*GatedDeltaNet",
        "b, a by head",
        lambda a, rows: ((rows // a.num_k_heads // 2,) * 2, a.num_k_heads),
    ),
)
# A layer with such a name in a model that is not in the table is fused too, but how is unknown.
LOOKS_FUSED = re.compile(r".*qkv.*|query_key_value|c_attn|.*gate_up.*|to_kv")

# Parameters outside of linear layers and convolutions that are not matrices, by their own name.
NO_MATRIX: tuple[tuple[str, str], ...] = (
    (r".*bias(es)?(_[a-z])?|bias_[a-z]", "bias"),
    (r"A_log|D|time_mix_.*", "state-space parameter"),
    (r".*scale.*|alpha|beta|gamma", "scale"),
    (r".*(pos_|position|_pos|token|emb|query|latent|probe|prompt|relative|pointer|extensor|_ape).*", "learned input"),
)
# Modules whose weights are matrices, but not hidden matrices: a pattern for the class of the module, or of one of the
# two modules around it.
NO_HIDDEN_LAYER: tuple[tuple[str, str], ...] = (
    (r".*(Router|TopK\w*Gat\w*|Mo[eE]\w*Gate)", "router"),
    (r".*Hyper(Connection|Head)", "hyper-connection"),
    (r"ParametrizationList", "parametrized weight"),
    (r".*CodebooksHead", "output head"),
)
ROUTER_LAYER, MOE_BLOCK = re.compile(r"(shared_expert_)?gate|router"), re.compile(r".*(Moe|MoE|MOE|Sparse).*")
INPUT_LAYER = re.compile(r".*(patch_?embed|patch_?proj|patcher)", re.IGNORECASE)

EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

# Parameters outside of linear layers that are matrices: patterns for the module's class and the parameter's name, and
# the layout.
MATRICES: tuple[tuple[str, str, Callable[[Any], MatrixLayout]], ...] = (
    ("DbrxExpertGLU", "w1|v1|w2", lambda m: MatrixLayout((m.ffn_hidden_size,) * m.moe_num_experts)),
    ("AriaGroupedExpertsGemm", "weight", lambda m: MatrixLayout(transposed=True)),
    (".*ParallelExperts", "weight", lambda m: MatrixLayout()),
    (".*MultiModalProjector", "mm_input_projection_weight", lambda m: MatrixLayout(transposed=True)),
    ("XLNetRelativeAttention", "[qkvr]", lambda m: MatrixLayout(transposed=True, flattened=True)),
    ("XLNetRelativeAttention", "o", lambda m: MatrixLayout(flattened=True)),
    ("RecurrentGemmaRglru", "(input|recurrent)_gate_weight", lambda m: MatrixLayout(transposed=True)),
    (
        "ZambaMambaMixer",
        "x_proj_weight",
        lambda m: MatrixLayout((m.time_step_rank, m.ssm_state_size, m.ssm_state_size)),
    ),
    ("ZambaMambaMixer", "dt_proj_weight", lambda m: MatrixLayout()),
)


def fused(name: str, parent: Any, rows: int) -> tuple[str, MatrixLayout] | None:
    """The names and the layout of the matrices in a fused layer, by its name and the module around it; None for one.

    Args:
        rows: the layer's number of output features.

    Raises:
        ValueError: the name says that the layer is fused, but how is unknown.
    """
    for row in FUSED:
        if re.fullmatch(row.module, name) and re.fullmatch(row.parent, type(parent).__name__):
            try:
                sizes, periods = row.cut(parent, rows)
                layout = MatrixLayout(tuple(size for size in sizes if size), periods)
                layout.check((rows, 1))
            except (AttributeError, ValueError):
                break
            names = row.parts.split(", ")
            return ", ".join(names[-len(sizes) :]), layout  # cross-attention has q in another layer
    else:
        if not LOOKS_FUSED.fullmatch(name):
            return None
    raise ValueError(f"fused by its name, but the order of its rows in a {type(parent).__name__} is unknown")


def matrix(module: nn.Module, name: str) -> MatrixLayout | None:
    """The layout of a parameter in the table ``MATRICES``; None for any other."""
    for class_name, attribute, layout in MATRICES:
        if re.fullmatch(class_name, type(module).__name__) and re.fullmatch(attribute, name):
            return layout(module)
    return None


def experts(module: nn.Module, name: str, shape: tuple[int, ...]) -> MatrixLayout | None:
    """The layout of a stack of experts' weights ``(experts, ., .)``; None for any other parameter.

    transformers' modules have attributes that describe the layout. Llama 4 has none, and older versions do not say that
    the gate and up rows of GPT-OSS alternate.
    """
    class_name = type(module).__name__
    if len(shape) != 3 or not class_name.endswith(("Experts", "NaiveMoe")) or name not in EXPERTS:
        return None
    transposed = getattr(module, "is_transposed", class_name == "Llama4TextExperts")
    if name != "gate_up_proj":
        return MatrixLayout(transposed=transposed)
    half = shape[-1 if transposed else -2] // 2
    if getattr(module, "is_concatenated", class_name != "GptOssExperts"):
        return MatrixLayout((half, half), transposed=transposed)
    return MatrixLayout((1, 1), half, transposed=transposed)
