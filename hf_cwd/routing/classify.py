"""Classifies a parameter: a hidden matrix, or a parameter that must not be orthogonalised, with the reason."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from hf_cwd.distributed.local_view import full_shape
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.routing import adapters, architectures
from hf_cwd.routing.adapters import Adapter

# Components of a module's path that come from wrappers: PEFT, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {*adapters.WRAPPED, "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PARAMETRIZED = re.compile("weight_(g|v|orig)")  # by weight_norm, spectral_norm, pruning
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.LSTMCell: 4, nn.GRUCell: 3}


@dataclass(frozen=True)
class Place:
    """Where a parameter is: it is the attribute ``name`` of ``module``, whose path in the model is ``path``."""

    path: str
    module: nn.Module
    name: str

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class Classification:
    """What a parameter is.

    Attributes:
        is_matrix: whether it is a hidden matrix, or holds several; None if that is unknown.
        reason: what it is, or why that is unknown.
        layout: the matrices that it holds; None for a plain 2-D matrix.
    """

    is_matrix: bool | None
    reason: str
    layout: MatrixLayout | None = None


def classify(p: Tensor, place: Place, modules: Mapping[str, nn.Module]) -> Classification:
    """Classifies a parameter by its module and its name. Embeddings and output layers are not handled here.

    Args:
        modules: the model's modules by path.
    """
    module, name, shape = place.module, place.name, full_shape(p)
    layer, around = _around(place.path, modules)
    row = adapters.adapter(place.parameter)
    one_weight = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    raw = not (one_weight and name in ("weight", "bias")) and not isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    is_vector = sum(size > 1 for size in shape) < 2
    if row is not None and not row.is_matrix:
        return Classification(False, row.reason)
    if raw and row is None:
        for pattern, reason in architectures.NO_MATRIX:
            if re.fullmatch(pattern, name):
                return Classification(False, f"vector ({reason})" if is_vector else reason)
    if is_vector:
        what = "bias" if name.startswith("bias") else "norm or scale" if raw or len(shape) < 2 else "one row or column"
        return Classification(False, f"vector ({what})")
    for pattern, reason in architectures.NO_HIDDEN_LAYER:
        if any(re.fullmatch(pattern, type(m).__name__) for m in (module, *around[:2])):
            return Classification(False, reason)
    if one_weight and PARAMETRIZED.fullmatch(name):
        return Classification(False, "parametrized weight")
    if one_weight and raw:
        return _unknown(place)
    return _weight(place, layer, shape, around, row)


def _weight(
    place: Place, layer: str, shape: tuple[int, ...], around: list[nn.Module], row: Adapter | None
) -> Classification:
    """Classifies a weight that is not a vector and is not excluded, by the module that holds it."""
    module, name = place.module, place.name
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(place, module, shape, around)
    if row is not None:
        return _factor(place, row, shape, around)
    if isinstance(module, nn.Linear) or _is_linear(module, name, shape):
        return _linear(place, layer, shape, around)
    if type(module).__name__ == "Conv1D" and name == "weight":  # transformers': x @ weight
        return _fused(layer, around, shape, MatrixLayout(transposed=True), "hidden matrix")
    if isinstance(module, nn.MultiheadAttention):
        sizes = (shape[0] // 3,) * 3 if name == "in_proj_weight" else ()
        return _matrix("hidden matrix", "q, k, v", MatrixLayout(sizes), shape)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        gates = 1 if "_hr_" in name else GATES.get(type(module), 1)  # _hr_: the projection of an LSTM's output
        return _matrix("recurrent matrix", "gates", MatrixLayout((shape[0] // gates,) * gates), shape)
    if (layout := architectures.experts(module, name, shape)) is not None:
        return _matrix("experts", "gate, up", layout, shape)
    if (layout := architectures.matrix(module, name)) is not None:
        return _fused(layer, around, shape, layout, "hidden matrix")
    return _unknown(place)


def _unknown(place: Place) -> Classification:
    return Classification(None, f"no rule knows {type(place.module).__name__}.{place.name}")


def as_named(p: Tensor) -> Classification:
    """Classifies an unknown parameter whose module the user has named in ``target_modules``."""
    shape = full_shape(p)
    if sum(size > 1 for size in shape) < 2:
        return Classification(False, "vector (norm or scale)")
    return _matrix("matrix, as named", "", MatrixLayout(), shape)


def _around(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, list[nn.Module]]:
    """The name of a module without wrappers, and the modules that contain it, the nearest first."""
    parts = path.split(".modules_to_save.")[0].split(".")
    while parts and parts[-1] in WRAPPERS:
        parts.pop()
    outer = []
    for end in range(len(parts) - 1, -1, -1):
        outer.append(modules[".".join(parts[:end])])
    return parts[-1] if parts else "", outer


def _is_linear(module: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    return name == "weight" and len(shape) == 2 and type(module).__name__.endswith("Linear")


def _linear(place: Place, layer: str, shape: tuple[int, ...], around: list[nn.Module]) -> Classification:
    is_router = architectures.ROUTER_LAYER.fullmatch(layer) is not None
    if is_router and (architectures.MOE_BLOCK.fullmatch(type(around[0]).__name__) or hasattr(around[0], "experts")):
        return Classification(False, "router")
    if any(architectures.INPUT_LAYER.match(part) for part in place.path.split(".")[-2:]):
        return Classification(False, "input layer (patch embedding)")
    return _fused(layer, around, shape, MatrixLayout(), "hidden matrix")


def _factor(place: Place, row: Adapter, shape: tuple[int, ...], around: list[nn.Module]) -> Classification:
    """Classifies a factor of one of PEFT's methods."""
    if any(type(m).__name__ == "ParamWrapper" for m in around[:2]):
        return Classification(False, "LoRA factors of stacked experts")
    if len(shape) > 2 and not row.stacked:
        return Classification(False, f"{row.reason} of a convolution")
    parts = adapters.parts(row, place.parameter, [place.module, *around])
    return _matrix(row.reason, "blocks", MatrixLayout((shape[-2] // parts,) * parts), shape)


def _fused(
    layer: str, around: list[nn.Module], shape: tuple[int, ...], layout: MatrixLayout, reason: str
) -> Classification:
    """Classifies a matrix, or several if the layer is in the table of fused projections."""
    parts = "matrices"
    if not layout.sizes:
        try:
            rows = shape[-1 if layout.transposed else -2]
            fused = architectures.fused(layer, around[0] if around else None, rows)
        except ValueError as error:
            return Classification(None, str(error))
        if fused is not None:
            parts, of_rows = fused
            layout = dataclasses.replace(layout, sizes=of_rows.sizes, periods=of_rows.periods)
    return _matrix(reason, parts, layout, shape)


def _matrix(reason: str, parts: str, layout: MatrixLayout, shape: tuple[int, ...]) -> Classification:
    if len(layout.sizes) == 1:
        layout = dataclasses.replace(layout, sizes=())
    if layout.transposed:
        reason += ", transposed"
    if len(shape) > 2 and not layout.flattened:
        reason += f", stack of {prod(shape[:-2])}"
    if layout.sizes:
        sizes = [str(size * layout.periods) for size in layout.sizes]
        equal = len(sizes) > 3 and len(set(sizes)) == 1
        reason += f", fused {parts} ({f'{len(sizes)} x {sizes[0]}' if equal else ' + '.join(sizes)})"
    return Classification(True, reason, None if layout == MatrixLayout() and len(shape) == 2 else layout)


def _convolution(place: Place, module: Any, shape: tuple[int, ...], around: list[nn.Module]) -> Classification:
    if module.transposed:
        return Classification(False, "transposed convolution")
    if module.groups == module.in_channels > 1:
        return Classification(False, "depthwise convolution")
    # A LoRA factor may have as few channels, namely its rank.
    raw = module.in_channels <= 4 or module.in_channels in _input_channels(around)
    if module.groups == 1 and raw and "lora_" not in place.path:
        return Classification(False, "input layer (convolution of the raw input)")
    if min(shape[0] // module.groups, prod(shape[1:])) < 2:
        return Classification(False, "vector (one row or column)")
    layout = MatrixLayout((shape[0] // module.groups,) * module.groups, flattened=True)
    return _matrix("convolution, flattened", "groups", layout, shape)


def _input_channels(around: list[nn.Module]) -> set[int]:
    """The possible numbers of channels of the raw input, from the nearest configuration."""
    for module in around:
        config = getattr(module, "config", None)
        channels = [getattr(config, name, None) for name in ("num_channels", "in_channels", "in_chans", "num_mel_bins")]
        if any(isinstance(number, int) for number in channels):
            return {number for number in channels if isinstance(number, int)}
    return set()
