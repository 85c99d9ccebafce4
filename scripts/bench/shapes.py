"""Parameter shapes of models, from a few numbers and without a hub."""

import math
import re
from typing import NamedTuple

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """``matrix``: Muon's, a hidden matrix; embeddings and vectors are not."""

    name: str
    shape: Shape
    matrix: bool


class Gpt2(NamedTuple):
    vocabulary: int
    hidden: int
    layers: int
    positions: int

    def parameters(self) -> list[Parameter]:
        """Weights of linear layers lie transposed in GPT-2, as (in, out); the head is the embedding."""
        h = self.hidden
        block = {
            "ln_1.weight": (h,),
            "ln_1.bias": (h,),
            "attn.c_attn.weight": (h, 3 * h),
            "attn.c_attn.bias": (3 * h,),
            "attn.c_proj.weight": (h, h),
            "attn.c_proj.bias": (h,),
            "ln_2.weight": (h,),
            "ln_2.bias": (h,),
            "mlp.c_fc.weight": (h, 4 * h),
            "mlp.c_fc.bias": (4 * h,),
            "mlp.c_proj.weight": (4 * h, h),
            "mlp.c_proj.bias": (h,),
        }
        found = {"wte.weight": (self.vocabulary, h), "wpe.weight": (self.positions, h)}
        found |= {f"h.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        found |= {"ln_f.weight": (h,), "ln_f.bias": (h,)}
        return _sorted(found, ("wte.weight", "wpe.weight"))


class Llama(NamedTuple):
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int

    def parameters(self) -> list[Parameter]:
        """With a tied head."""
        h, kv = self.hidden, self.hidden // self.heads * self.key_value_heads
        block = {
            "self_attn.q_proj.weight": (h, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate_proj.weight": (self.inner, h),
            "mlp.up_proj.weight": (self.inner, h),
            "mlp.down_proj.weight": (h, self.inner),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        found = {"embed_tokens.weight": (self.vocabulary, h)}
        found |= {f"layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        return _sorted(found | {"norm.weight": (h,)}, ("embed_tokens.weight",))


class Stack(NamedTuple):
    """Equal matrices."""

    count: int
    shape: Shape

    def parameters(self) -> list[Parameter]:
        return [Parameter(f"matrix.{i}", self.shape, True) for i in range(self.count)]


def _sorted(shapes: dict[str, Shape], embeddings: tuple[str, ...]) -> list[Parameter]:
    return [Parameter(name, shape, len(shape) == 2 and name not in embeddings) for name, shape in shapes.items()]


MODELS: dict[str, Gpt2 | Llama | Stack] = {
    "gpt2-124m": Gpt2(vocabulary=50257, hidden=768, layers=12, positions=1024),
    "smollm2-135m": Llama(vocabulary=49152, hidden=576, inner=1536, layers=30, heads=9, key_value_heads=3),
    "llama-3.2-1b": Llama(vocabulary=128256, hidden=2048, inner=8192, layers=16, heads=32, key_value_heads=8),
    "square": Stack(8, (1024, 1024)),  # what Muon's two kinds of shapes cost, apart
    "wide": Stack(4, (1024, 4096)),
    "300-tensors": Stack(300, (64, 1024)),  # what a step costs its host
}
_STACK = re.compile(r"([1-9]\d*)\*([1-9]\d*(?:x[1-9]\d*)*)")


def shapes_of(model: str) -> list[Parameter]:
    """The parameters of a name in :data:`MODELS`, or of stacks of equal tensors: ``8*1024x1024,4*512``.

    Raises:
        ValueError: it is neither.
    """
    if model in MODELS:
        return MODELS[model].parameters()
    found = []
    for part in model.split(","):
        if (match := _STACK.fullmatch(part)) is None:
            raise ValueError(f"{model}: give one of {', '.join(MODELS)}, or NUMBER*ROWSxCOLUMNS, as 8*1024x1024")
        shape = tuple(map(int, match[2].split("x")))
        first = len(found)
        found += [Parameter(f"tensor.{first + i}", shape, len(shape) == 2) for i in range(int(match[1]))]
    return found


def elements(parameters: list[Parameter]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def least_aspect(parameters: list[Parameter]) -> float:
    """Of the matrices, the smallest ratio of longer to shorter side; 0 without any."""
    return min((max(p.shape) / min(p.shape) for p in parameters if p.matrix), default=0.0)


def largest_aspect(parameters: list[Parameter]) -> float:
    return max((max(p.shape) / min(p.shape) for p in parameters if p.matrix), default=0.0)
