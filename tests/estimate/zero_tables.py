"""Models, layouts and options that `explain` and real DeepSpeed engines are compared on."""

from typing import NamedTuple

from hf_cwd.estimate import zero_costs

WORLD = 3
SMALL = {"vocab_size": 66, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# Nothing of it is a multiple of three, nor are whole groups: parts are uneven, and padded.
LLAMA = {"model_type": "llama", "intermediate_size": 50, "attention_bias": True, **SMALL}
# Stacks of experts, fused gate and up: parameters that hold many matrices, in groups of their own.
MOE = {"model_type": "qwen3_moe", "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, **SMALL}
MOE |= {"num_experts": 5, "num_experts_per_tok": 2}
MODELS = {"llama": LLAMA, "moe": MOE}


class Case(NamedTuple):
    layout: str
    model: str = "llama"
    dtype: str = "float32"
    optim: str = "cwd_muon"
    optim_args: str = "exchange_bytes=4096"
    frozen: bool = False
    sub_group_size: int = zero_costs.SUB_GROUP_SIZE

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in self._asdict().items() if k != "layout" and v != self._field_defaults[k])
        return " ".join([self.layout, *changed])


STAGES = [f"zero{stage}" for stage in (1, 2, 3)]
CASES = [
    *(Case(layout) for stage in STAGES for layout in (stage, f"{stage}_offload")),
    *(Case(layout, dtype="bfloat16") for layout in (*STAGES, "zero1_offload", "zero3_offload")),
    *(Case(stage, model="moe") for stage in STAGES),
    *(Case(stage, optim_args="exchange_bytes=4096,state_dtype=bfloat16", frozen=True) for stage in STAGES),
    *(Case(stage, optim="cwd_adamw", optim_args="") for stage in STAGES),
    Case("zero3", sub_group_size=2000),
]
