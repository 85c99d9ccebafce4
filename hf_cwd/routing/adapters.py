"""Which parameters of PEFT's methods are matrices (PEFT 0.19 to 0.21).

The table goes by the attributes of PEFT's layers, which are components of a parameter's name. A parameter that is not
listed is classified by its shape (vectors: IA3, VeRA, FourierFT, RoAd, DoRA's magnitudes, ...), or as in any other
model (X-LoRA's classifier, LN tuning).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

WRAPPED = ("base_layer", "original_module")  # attributes in which PEFT's wrappers keep the original layer
PROMPTS = re.compile(r"(Multitask)?Prompt(Encoder|Embedding)|(Prefix|Cartridge)Encoder|CPTEmbedding")


class Adapter(NamedTuple):
    """What an attribute of PEFT's layers holds.

    Attributes:
        attribute: a pattern for one whole component of a parameter's name.
        is_matrix: whether the parameter is a matrix, or several.
        reason: what the parameter is.
        stacked: whether dimensions before the last two are a stack of matrices.
        parts: the attribute that counts the fused matrices, of the layer or of the PEFT layer around it.
    """

    attribute: str
    is_matrix: bool
    reason: str
    stacked: bool = False
    parts: str | None = None


ADAPTERS: tuple[Adapter, ...] = (
    # Also AdaLoRA, DoRA, PiSSA, CorDA, X-LoRA, ...; BdLoRA's factors consist of blocks.
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
    """The row of the table for a parameter; None if the table has none."""
    parts = name.split(".")
    return next((row for row in ADAPTERS if any(re.fullmatch(row.attribute, part) for part in parts)), None)


def parts(row: Adapter, name: str, around: Sequence[nn.Module]) -> int:
    """How many matrices are stacked along the rows of a factor.

    Args:
        name: the parameter's name.
        around: the module that holds it and the modules that contain that one, the nearest first.
    """
    holders = [module for module in around if row.parts is not None and hasattr(module, row.parts)]
    if not holders:
        return 1
    value = getattr(holders[0], row.parts)
    return value if isinstance(value, int) else next(value[part] for part in name.split(".") if part in value)


def is_prompt(module: nn.Module) -> bool:
    """Whether a module makes learned inputs, so that none of its layers is an output layer."""
    return PROMPTS.fullmatch(type(module).__name__) is not None
