"""What PEFT's methods train: which of their parameters are matrices (PEFT 0.19 to 0.21).

By the attributes of PEFT's layers, which are parts of a parameter's name. What is not listed is found by its shape
(vectors: IA3, VeRA, FourierFT, RoAd, DoRA's magnitudes, ...) or as in any model (X-LoRA's classifier, LN tuning).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

WRAPPED = ("base_layer", "original_module")  # where PEFT keeps the layer in whose place it has put itself
PROMPTS = re.compile(r"(Multitask)?Prompt(Encoder|Embedding)|(Prefix|Cartridge)Encoder|CPTEmbedding")


class Adapter(NamedTuple):
    """What an attribute of PEFT's layers holds.

    Attributes:
        attribute: a pattern of a whole part of a parameter's name.
        stacked: whether dimensions before the last two are a stack of matrices.
        parts: the attribute that says how many matrices are fused into one, of the layer or of PEFT's around it.
    """

    attribute: str
    is_matrix: bool
    reason: str
    stacked: bool = False
    parts: str | None = None


ADAPTERS: tuple[Adapter, ...] = (
    # Also AdaLoRA, DoRA, PiSSA, CorDA, X-LoRA, ...; BdLoRA's are made of blocks.
    Adapter("(supertuning_)?lora_[AB]", True, "LoRA factor", parts="nblocks"),
    Adapter("(gralora_[AB]|poly_lora_[AB])", True, "LoRA factor", stacked=True),
    Adapter("(gralora_[AB]_general|hira_[AB]|delora_[AB]|adamss_[AB]|lily_A|peanut_[AB])", True, "LoRA factor"),
    Adapter("lily_B", True, "LoRA factor", parts="num_B"),
    Adapter("hada_w[12]_[ab]", True, "LoHa factor"),
    Adapter("lokr_w[12](_[ab])?", True, "LoKr factor"),
    Adapter("hra_u", True, "HRA factor"),
    Adapter("osf_svd_params", True, "OSF factor"),
    Adapter("deft_[PR]", True, "DEFT factor"),
    Adapter("glora_[A-E]", True, "GLoRA factor"),
    Adapter("psoft_R", True, "PSOFT factor"),
    Adapter("(lora|hira)_embedding_[AB]", False, "embedding (LoRA)"),
    Adapter("trainable_tokens_delta", False, "embedding (token delta)"),
    Adapter("prefix_task_(cols|rows)", False, "learned input"),
    Adapter("hada_t[12]|lokr_t2", False, "core of a decomposed convolution"),
    Adapter("oft_(embedding_)?R|boft_R", False, "blocks of a rotation"),
    Adapter("miss_block", False, "block that parts of a weight share"),
    Adapter("vblora_vector_bank", False, "vectors of a bank"),
    Adapter("vblora_logits_[AB]", False, "logits that choose vectors"),
    Adapter("randlora_(lambda|gamma)", False, "diagonals"),
    Adapter("c3a_kernel", False, "circulant blocks"),
    Adapter("(poly|lily)_router", False, "router"),
)


def adapter(name: str) -> Adapter | None:
    """The row of a parameter with this name; None if PEFT did not add it, or nothing here knows it."""
    parts = name.split(".")
    return next((row for row in ADAPTERS if any(re.fullmatch(row.attribute, part) for part in parts)), None)


def parts(row: Adapter, name: str, around: Sequence[nn.Module]) -> int:
    """How many matrices lie one below the other in a factor.

    Args:
        name: the parameter's.
        around: the module that holds it and those around, the nearest first.
    """
    holders = [module for module in around if row.parts is not None and hasattr(module, row.parts)]
    if not holders:
        return 1
    value = getattr(holders[0], row.parts)
    return value if isinstance(value, int) else next(value[part] for part in name.split(".") if part in value)


def is_prompt(module: nn.Module) -> bool:
    """Whether it makes learned inputs of a model, so that no layer in it leads out."""
    return PROMPTS.fullmatch(type(module).__name__) is not None
