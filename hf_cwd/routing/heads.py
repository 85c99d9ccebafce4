"""Finds the output layers of a model: by what transformers says, else by name, else by structure.

- A transformers model, also inside of another model, has a body. Everything outside of the body is its head.
- Elsewhere, layers and containers whose name matches :data:`HEAD` are heads.
- If neither finds any, the search descends from the model: through the children whose name matches :data:`OUTPUT`, or
  else through the last child, until it reaches a layer. If a stack of blocks comes last, there is no output layer.

In a container that is a head, such as ``classifier``, only the last layer is an output layer.
"""

import itertools
import re
from collections.abc import Iterator

from torch import nn

from hf_cwd.distributed.local_view import full_shape
from hf_cwd.routing import adapters

Child = tuple[str, nn.Module]  # a child module and its name

# Names of heads outside of transformers models. Excluded: attention heads, EfficientNet's last hidden convolution.
HEAD = re.compile(
    r"(?!(conv|multi|attn|attention|self_attention)_?heads?)"
    r"((\w+_)?(heads?|classifiers?|score|logits|regressors?|unembed(ding)?|output_projection)|conv_out)"
)
# Names of output layers among the children of the model, or of a container that is a head.
OUTPUT = re.compile(
    r"outs?|outputs?|final|last|outc|decoder|cls|readout|ctc|aux\w*|(out|output|cls|pred|final|last)_\w+"
    r"|\w+_predictor|(\w+_)?(out|output|pred|prediction)(_(proj|projection|layer|conv|fc|linear))?|to_(?!\w*embed)\w+",
    re.IGNORECASE,
)
# Names that output layers share with other layers. They count only if no later layer reads the output.
ANY_LAYER = re.compile(r"(\w+_)?(fc|linear|lin|dense|proj|projection)")
# Names of models that run in parallel, each with an output layer: of children, or of a list whose members they are.
MODEL = re.compile(
    r"(\w+_)?(ensemble|members|(model|net|network|estimator|branch|tower|student|teacher|actor|critic|policy|agent"
    r"|generator|discriminator)s?|value|advantage|qf?)(_\w+)?"
)
# Classes whose last layer feeds the next block.
BLOCK = re.compile(r".*(Attention|Attn|Block|Bottleneck|(Encoder|Decoder|Transformer|Residual)Layer)")
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
LISTS = (nn.ModuleList, nn.ModuleDict)

# Names of heads in transformers models that do not name a body: anywhere in the model, and among its children. The
# projections of a dual encoder are the output layers of its towers.
TRANSFORMERS_HEADS = ("lm_head", "head", "score", "classifier", "output_projection")
TOWERS = re.compile(r"(text|visual|vision|image|audio|video)_projection|class_predictor")
# Classes of models inside of other models that have a head around their body.
WITH_HEAD = re.compile(r".*(For[A-Z]|LMHead)")
# Heads inside of transformers' bodies: patterns for the class of the module around, and for the name.
INNER_HEADS = (
    (r".*", re.compile(r"iou_prediction_head|pred_obj_score_head|presence_head|box_head|codec_head")),
    (r".*", re.compile(r"(enc|pre)_(score|bbox)_head|decoder_order_head|(\w+_)?bbox_embed|class_embed")),
    (r"Janus.*Head", re.compile(r"vision_head")),
    (r".*Decoder", re.compile(r"conv_out")),  # an encoder's conv_out makes the codes
)


def output_layers(root: nn.Module) -> dict[nn.Module, str]:
    """The output layers of a model and all modules inside of them, each with the reason."""
    heads = [head for model in _transformers_models(root) for head in _of_transformers(model)]
    for path, module in _walk(root):
        if HEAD.fullmatch(_name(path)):
            heads += _last_layers(module, _name(path))
    reason = "output head"
    if not heads:
        heads = [layer for layer in _last_layers(root, "") if layer is not root]
        reason = "output head (nothing follows it)"
    return {inner: reason for head in heads for inner in head.modules()}


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, or a PreTrainedModel of another library that has a body."""
    cls = type(module)
    if not hasattr(cls, "base_model_prefix"):  # the instance would not do: a PeftModel forwards the attribute
        return False
    of_library = any(base.__module__.startswith("transformers.models.") for base in cls.__mro__)
    return of_library or isinstance(getattr(module, cls.base_model_prefix or "-", None), nn.Module)


def _walk(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, except transformers models, blocks, and modules inside of them."""
    if _is_transformers(root) or (path and _is_closed(root)):
        return
    yield path, root
    for name, child in root.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def _is_closed(module: nn.Module) -> bool:
    """Whether a module contains no output layer."""
    return _is_of_torch(module) or adapters.is_prompt(module) or BLOCK.fullmatch(type(module).__name__) is not None


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own modules that consist of layers, such as nn.Transformer."""
    cls = type(module)
    by_hand = cls is nn.Module or isinstance(module, (*LAYERS, *LISTS, nn.Sequential))
    return cls.__module__.startswith("torch.nn.modules.") and not by_hand


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, LAYERS) or any(name in adapters.WRAPPED for name, _ in module.named_children()):
        return True
    return not isinstance(module, nn.Sequential) and type(module).__name__.endswith(("Linear", "Conv", "Conv1D"))


# --- Transformers


def _transformers_models(root: nn.Module) -> list[nn.Module]:
    """The outermost transformers models in a module."""
    if _is_transformers(root):
        return [root]
    return [model for child in root.children() for model in _transformers_models(child)]


def _of_transformers(model: nn.Module, *, nested: bool = False, in_body: bool = False) -> list[nn.Module]:
    """The heads of a transformers model and of models inside of it: output embeddings, and modules outside the body.

    Args:
        nested: the model is inside of another transformers model.
        in_body: the model is in the body of another transformers model that names its body.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [] if output is None else [output]
    body = getattr(model, model.base_model_prefix or "-", None)
    has_body = isinstance(body, nn.Module) and body is not model
    if has_body:
        heads += _around(model, body) if not nested or WITH_HEAD.match(type(model).__name__) else []
    elif not in_body:
        heads += [module for path, module in model.named_modules() if _name(path) in TRANSFORMERS_HEADS]
        for name, child in model.named_children():
            if HEAD.fullmatch(name) or TOWERS.fullmatch(name):
                heads += _last_layers(child, name)
    for module in model.modules():
        for name, child in module.named_children():
            if any(re.fullmatch(cls, type(module).__name__) and p.fullmatch(name) for cls, p in INNER_HEADS):
                heads += _last_layers(child, name)
    within = set(body.modules()) if has_body else set()
    for inner in (m for child in model.children() for m in _transformers_models(child)):
        heads += _of_transformers(inner, nested=True, in_body=in_body or inner in within)
    return heads


def _around(model: nn.Module, body: nn.Module) -> list[nn.Module]:
    """The modules outside of the body, except other transformers models, which have their own heads."""
    outside = []
    for child in model.children():
        inside = list(child.modules())
        if child is body:
            continue
        if body not in inside and not any(map(_is_transformers, inside)):
            outside += inside
        elif not _is_transformers(child):
            outside += _around(child, body)
    return outside


# --- Everything else


def _last_layers(module: nn.Module, name: str) -> list[nn.Module]:
    """The layers that compute a module's output; none if it ends with a stack of blocks or an unknown module."""
    if _is_layer(module):
        return [module]
    children = [(n, child) for n, child in module.named_children() if _holds_matrix(child)]
    if not children or _is_transformers(module) or (_is_closed(module) if name else _is_of_torch(module)):
        return []
    if isinstance(module, LISTS) and (HEAD.fullmatch(name) or MODEL.fullmatch(name)):
        return [layer for _, child in children for layer in _last_layers(child, name)]
    named = [layer for n, child in children if _is_named(n) for layer in _last_layers(child, n)]
    for i, (n, child) in enumerate(children):
        if ANY_LAYER.fullmatch(n) and _is_layer(child) and not _is_read(child, children[i + 1 :]):
            named.append(child)
    return named or [layer for n, child in _last(module, children) for layer in _last_layers(child, n)]


def _is_named(name: str) -> bool:
    return HEAD.fullmatch(name) is not None or OUTPUT.fullmatch(name) is not None


def _last(module: nn.Module, children: list[Child]) -> list[Child]:
    """The last child, and children that run in parallel with it; none if they are a stack of blocks."""
    (name, last), before = children[-1], children[:-1]
    widths = _widths(last)
    if widths is not None and isinstance(module, nn.Sequential):
        return children[-1:]
    models = [child for child in before if _are_models(child, children[-1])]
    if widths is None:
        stacked = re.search(r"\d", name) and any(type(child) is type(last) for _, child in before)
        return [] if isinstance(module, nn.ModuleList) or (stacked and not models) else [*models, children[-1]]
    beside = list(itertools.takewhile(lambda child: _read_the_same(child[1], last), reversed(before)))
    if beside and widths[0] == widths[1]:  # the last one may run before them, although it is defined after them
        return beside
    return [*models, *beside, children[-1]]


def _are_models(one: Child, other: Child) -> bool:
    """Whether two children are models that run in parallel, not one after the other: ``net`` and ``ema_net``."""
    names = [re.sub(r"_?\d+", "", name) for name, _ in (one, other)]
    if all(map(MODEL.fullmatch, names)):
        return not _is_layer(one[1])
    if names != [one[0], other[0]] or any(_widths(child) is not None for _, child in (one, other)):
        return False
    words = [set(re.findall(r"[a-z]{3,}", name.lower())) for name in names]
    return type(one[1]) is type(other[1]) or bool(words[0] & words[1])


def _read_the_same(one: nn.Module, last: nn.Module) -> bool:
    """Whether a layer reads the same input as the last one, and its output does not fit the last one's input."""
    widths, last_widths = _widths(one), _widths(last)
    return widths is not None and widths[0] == last_widths[0] != widths[1]


def _widths(module: nn.Module) -> tuple[int | None, int | None] | None:
    """The input and output features of a layer, or of a sequence of layers; None for any other module."""
    layers = [m for m in module.modules() if isinstance(m, LAYERS)]
    in_turn = isinstance(module, nn.Sequential) and all(
        isinstance(child, LAYERS) for child in module.children() if _holds_matrix(child)
    )
    if not layers or not (_is_layer(module) or in_turn or len(layers) == 1):
        return (None, None) if _is_layer(module) else None
    return _width(layers[0], "in"), _width(layers[-1], "out")


def _width(layer: nn.Module, side: str) -> int | None:
    return getattr(layer, f"{side}_features", None) or getattr(layer, f"{side}_channels", None)


def _is_read(layer: nn.Module, later: list[Child]) -> bool:
    """Whether a later layer has as many input features as this one has output features.

    The output of a convolution may be flattened, so that a multiple of its channels matches as well.
    """
    outputs = _widths(layer)[1]
    for module in (m for _, child in later for m in child.modules()):
        inputs = _width(module, "in") or getattr(module, "input_size", None) or getattr(module, "embed_dim", None)
        flattened = isinstance(layer, nn.modules.conv._ConvNd) and outputs and inputs and inputs % outputs == 0
        if inputs is not None and (inputs == outputs or flattened):
            return True
    return False


def _holds_matrix(module: nn.Module) -> bool:
    """Whether a module holds a weight of two or more dimensions, except in embeddings and transformers models."""
    if _is_transformers(module) or adapters.is_prompt(module):
        return False
    if _is_layer(module):  # also a quantised one, whose weight is not a parameter
        return True
    is_embedding = type(module).__name__.endswith(("Embedding", "EmbeddingBag"))
    own = not is_embedding and any(len(full_shape(p)) > 1 for p in module.parameters(recurse=False))
    return own or any(map(_holds_matrix, module.children()))
