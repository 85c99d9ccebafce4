"""Which layers lead out of a model: by what transformers says, else by name, else by structure.

- A transformers model has a body and a head of its own, wherever it stands: everything around its body is its head.
- Elsewhere, layers and containers with a name of :data:`HEAD` lead out.
- Where neither has found any, the way out is followed down from the model: through the children named as in
  :data:`OUTPUT`, else through the last one, until it reaches a layer. It ends where a stack of blocks comes last.

Of a container that leads out, such as ``classifier``, only the last layer does.
"""

import itertools
import re
from collections.abc import Iterator

from torch import nn

from hf_cwd.distributed.deepspeed_zero import full_shape
from hf_cwd.routing import adapters

Child = tuple[str, nn.Module]  # with its name

# Names outside of transformers models, not those of an attention's heads and of EfficientNet's last hidden convolution.
HEAD = re.compile(
    r"(?!(conv|multi|attn|attention|self_attention)_?heads?)"
    r"((\w+_)?(heads?|classifiers?|score|logits|regressors?|unembed(ding)?|output_projection)|conv_out)"
)
# Names of children of the model, or of a part of it that leads out.
OUTPUT = re.compile(
    r"outs?|outputs?|final|last|outc|decoder|cls|readout|ctc|aux\w*|(out|output|cls|pred|final|last)_\w+"
    r"|\w+_predictor|(\w+_)?(out|output|pred|prediction)(_(proj|projection|layer|conv|fc|linear))?|to_(?!\w*embed)\w+",
    re.IGNORECASE,
)
# The same for layers: names that any layer may have. Only where no later layer takes what it gives.
ANY_LAYER = re.compile(r"(\w+_)?(fc|linear|lin|dense|proj|projection)")
# Models beside each other, each with an output of its own: children of these names, or members of a list that has one.
MODEL = re.compile(
    r"(\w+_)?(ensemble|members|(model|net|network|estimator|branch|tower|student|teacher|actor|critic|policy|agent"
    r"|generator|discriminator)s?|value|advantage|qf?)(_\w+)?"
)
# Classes whose last layer leads to the next block.
BLOCK = re.compile(r".*(Attention|Attn|Block|Bottleneck|(Encoder|Decoder|Transformer|Residual)Layer)")
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
LISTS = (nn.ModuleList, nn.ModuleDict)

# In transformers models that do not say what their body is: names anywhere in it, and of its children. A dual encoder's
# projections lead out of its towers.
TRANSFORMERS_HEADS = ("lm_head", "head", "score", "classifier", "output_projection")
TOWERS = re.compile(r"(text|visual|vision|image|audio|video)_projection|class_predictor")
# Classes of models inside of others whose body is not all they have.
WITH_HEAD = re.compile(r".*(For[A-Z]|LMHead)")
# Heads inside of transformers' bodies: pattern of the class of the module around, and of the name.
INNER_HEADS = (
    (r".*", re.compile(r"iou_prediction_head|pred_obj_score_head|presence_head|box_head|codec_head")),
    (r".*", re.compile(r"(enc|pre)_(score|bbox)_head|decoder_order_head|(\w+_)?bbox_embed|class_embed")),
    (r"Janus.*Head", re.compile(r"vision_head")),
    (r".*Decoder", re.compile(r"conv_out")),  # an encoder's leads to the codes
)


def output_layers(root: nn.Module) -> dict[nn.Module, str]:
    """The modules that lead out of a model, with all that is inside of them, and the reason."""
    heads = [head for model in _transformers_models(root) for head in _of_transformers(model)]
    for path, module in _walk(root):
        if HEAD.fullmatch(_name(path)):
            heads += _way_out(module, _name(path))
    reason = "output head"
    if not heads:
        heads = [layer for layer in _way_out(root, "") if layer is not root]
        reason = "output head (nothing follows it)"
    return {inner: reason for head in heads for inner in head.modules()}


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _is_transformers(module: nn.Module) -> bool:
    """Whether it is an architecture of transformers, or made like one: a PreTrainedModel that has a body."""
    kind = type(module)
    if not hasattr(kind, "base_model_prefix"):  # a PeftModel only passes the attribute on
        return False
    of_library = any(base.__module__.startswith("transformers.models.") for base in kind.__mro__)
    return of_library or isinstance(getattr(module, kind.base_model_prefix or "-", None), nn.Module)


def _walk(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, without what is inside of transformers models and of blocks."""
    if _is_transformers(root) or (path and _is_closed(root)):
        return
    yield path, root
    for name, child in root.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def _is_closed(module: nn.Module) -> bool:
    """Whether no layer inside leads out of the model."""
    return _is_of_torch(module) or adapters.is_prompt(module) or BLOCK.fullmatch(type(module).__name__) is not None


def _is_of_torch(module: nn.Module) -> bool:
    """Whether it is one of torch's own that consist of layers, such as its Transformer."""
    kind = type(module)
    by_hand = kind is nn.Module or isinstance(module, (*LAYERS, *LISTS, nn.Sequential))
    return kind.__module__.startswith("torch.nn.modules.") and not by_hand


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, LAYERS) or any(name in adapters.WRAPPED for name, _ in module.named_children()):
        return True
    return not isinstance(module, nn.Sequential) and type(module).__name__.endswith(("Linear", "Conv", "Conv1D"))


# --- Transformers


def _transformers_models(root: nn.Module) -> list[nn.Module]:
    """The outermost ones."""
    if _is_transformers(root):
        return [root]
    return [model for child in root.children() for model in _transformers_models(child)]


def _of_transformers(model: nn.Module, *, nested: bool = False, in_body: bool = False) -> list[nn.Module]:
    """The output embeddings and all that is around the body, with the same of the models inside.

    Args:
        nested: it is a part of another transformers model; ``in_body``: of the body of one that says what its body is.
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
                heads += _way_out(child, name)
    for module in model.modules():
        for name, child in module.named_children():
            if any(re.fullmatch(kind, type(module).__name__) and p.fullmatch(name) for kind, p in INNER_HEADS):
                heads += _way_out(child, name)
    within = set(body.modules()) if has_body else set()
    for inner in (m for child in model.children() for m in _transformers_models(child)):
        heads += _of_transformers(inner, nested=True, in_body=in_body or inner in within)
    return heads


def _around(model: nn.Module, body: nn.Module) -> list[nn.Module]:
    """The modules outside of the body, without other transformers models, which have heads of their own."""
    found = []
    for child in model.children():
        inside = list(child.modules())
        if child is body:
            continue
        if body not in inside and not any(map(_is_transformers, inside)):
            found += inside
        elif not _is_transformers(child):
            found += _around(child, body)
    return found


# --- Everything else


def _way_out(module: nn.Module, name: str) -> list[nn.Module]:
    """The layers by which a module leads out; none if that is a stack of blocks, or what is not known here."""
    if _is_layer(module):
        return [module]
    children = [(n, child) for n, child in module.named_children() if _holds_matrix(child)]
    if not children or _is_transformers(module) or (_is_closed(module) if name else _is_of_torch(module)):
        return []
    if isinstance(module, LISTS) and (HEAD.fullmatch(name) or MODEL.fullmatch(name)):
        return [layer for _, child in children for layer in _way_out(child, name)]
    named = [layer for n, child in children if _is_named(n) for layer in _way_out(child, n)]
    for i, (n, child) in enumerate(children):
        if ANY_LAYER.fullmatch(n) and _is_layer(child) and not _is_taken(child, children[i + 1 :]):
            named.append(child)
    return named or [layer for n, child in _last(module, children) for layer in _way_out(child, n)]


def _is_named(name: str) -> bool:
    return HEAD.fullmatch(name) is not None or OUTPUT.fullmatch(name) is not None


def _last(module: nn.Module, children: list[Child]) -> list[Child]:
    """The last child, and those that stand beside it; none if they are a stack of blocks."""
    (name, last), before = children[-1], children[:-1]
    widths = _widths(last)
    if widths is not None and isinstance(module, nn.Sequential):
        return children[-1:]
    models = [child for child in before if _are_models(child, children[-1])]
    if widths is None:
        stacked = re.search(r"\d", name) and any(type(child) is type(last) for _, child in before)
        return [] if isinstance(module, nn.ModuleList) or (stacked and not models) else [*models, children[-1]]
    beside = list(itertools.takewhile(lambda child: _read_the_same(child[1], last), reversed(before)))
    if beside and widths[0] == widths[1]:  # they can read what the last one gives: it only was made after them
        return beside
    return [*models, *beside, children[-1]]


def _are_models(one: Child, other: Child) -> bool:
    """Whether two children are models beside each other, not one after the other: ``net`` and ``ema_net``."""
    names = [re.sub(r"_?\d+", "", name) for name, _ in (one, other)]
    if all(map(MODEL.fullmatch, names)):
        return not _is_layer(one[1])
    if names != [one[0], other[0]] or any(_widths(child) is not None for _, child in (one, other)):
        return False
    words = [set(re.findall(r"[a-z]{3,}", name.lower())) for name in names]
    return type(one[1]) is type(other[1]) or bool(words[0] & words[1])


def _read_the_same(one: nn.Module, last: nn.Module) -> bool:
    """Whether a layer reads what the last one reads, and cannot be what the last one reads."""
    widths, last_widths = _widths(one), _widths(last)
    return widths is not None and widths[0] == last_widths[0] != widths[1]


def _widths(module: nn.Module) -> tuple[int | None, int | None] | None:
    """Input and output features of a layer, or of layers one after the other; None for anything else."""
    layers = [m for m in module.modules() if isinstance(m, LAYERS)]
    in_turn = isinstance(module, nn.Sequential) and all(
        isinstance(child, LAYERS) for child in module.children() if _holds_matrix(child)
    )
    if not layers or not (_is_layer(module) or in_turn or len(layers) == 1):
        return (None, None) if _is_layer(module) else None
    return _width(layers[0], "in"), _width(layers[-1], "out")


def _width(layer: nn.Module, side: str) -> int | None:
    return getattr(layer, f"{side}_features", None) or getattr(layer, f"{side}_channels", None)


def _is_taken(layer: nn.Module, later: list[Child]) -> bool:
    """Whether a later layer reads as many features as this one gives; as many in each place, of a convolution."""
    given = _widths(layer)[1]
    for module in (m for _, child in later for m in child.modules()):
        read = _width(module, "in") or getattr(module, "input_size", None) or getattr(module, "embed_dim", None)
        flattened = isinstance(layer, nn.modules.conv._ConvNd) and given and read and read % given == 0
        if read is not None and (read == given or flattened):
            return True
    return False


def _holds_matrix(module: nn.Module) -> bool:
    """Whether it holds a weight that is no vector, outside of embeddings and of transformers models."""
    if _is_transformers(module) or adapters.is_prompt(module):
        return False
    if _is_layer(module):  # also a quantised one, whose weight is no parameter
        return True
    is_embedding = type(module).__name__.endswith(("Embedding", "EmbeddingBag"))
    own = not is_embedding and any(len(full_shape(p)) > 1 for p in module.parameters(recurse=False))
    return own or any(map(_holds_matrix, module.children()))
