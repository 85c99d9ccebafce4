"""``hf-cwd explain``: prints the rule, learning rate and weight decay of each parameter of a model, and the reason.

With ``--layout`` it also prints what a step costs each rank of a parallel run.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.cli import cost_table
from hf_cwd.cli.layout import GRAMMAR, parse_layout
from hf_cwd.estimate import zero_costs
from hf_cwd.estimate.parallelism import Zero
from hf_cwd.estimate.step_cost import step_cost
from hf_cwd.routing.route import Route, Routing, route
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.base import has_remainder, state_dtype
from hf_cwd.trainer.optim_args import naming_flags, optimizer_arguments
from hf_cwd.trainer.optim_names import PREFIX, names

# Tried in this order if a configuration does not name its model class.
AUTO_CLASSES = ("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "SpeechSeq2Seq", "ImageTextToText", "CTC")
TRAINER_FLAGS = ("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay")
DEVICES = ("cuda", "cpu", "xpu", "npu", "hpu", "mps")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Row(NamedTuple):
    """A row of the table: a parameter, or the parameters of that name in several layers, and their group's values."""

    name: str
    count: int
    shape: tuple[int, ...]
    rule: str
    lr: float | None
    weight_decay: float | None
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a configuration (JSON file or directory), model, PEFT adapter or Hub id")
    parser.add_argument("--optim", default="cwd_muon", choices=names(), help="default: %(default)s")
    parser.add_argument("--optim_args", help="as for the Trainer")
    parser.add_argument("--optim_target_modules", help="as for the Trainer")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="default: %(default)s, the Trainer's")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="default: %(default)s, the Trainer's")
    parser.add_argument("--model_class", help="a class of transformers; default: as in the configuration")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--all", action="store_true", help="print one line for every parameter and rank; default: equal ones share one"
    )
    parser.add_argument("--layout", help=f"what a step costs each rank: {GRAMMAR}".replace("%", "%%"))
    parser.add_argument("--world", type=int, help="number of ranks")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="parameters' dtype; default: %(default)s")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=DEVICES,
        help="type of the devices that train, which ns_dtype=auto depends on; default: %(default)s",
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table and the totals. It neither reads nor allocates weights."""
    from transformers import Trainer, TrainingArguments

    if args.layout is None and args.world is not None:
        raise ValueError(f"--world {args.world} needs --layout: {GRAMMAR}")
    parallelism = None if args.layout is None else parse_layout(args.layout, args.world)
    flags = {name: getattr(args, name) for name in TRAINER_FLAGS}
    arguments = optimizer_arguments(TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **flags))
    model = load(args.model, model_class=args.model_class, trust_remote_code=args.trust_remote_code)
    rule = RULES[args.optim.removeprefix(PREFIX)]
    routing = routed(model, rule, args.optim_target_modules)
    rates = {rule.name: arguments["lr"], rule.companion: arguments.get(f"{rule.companion}_lr", arguments["lr"])}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # the method does not use self
    rows = [_row(r, rates, arguments["weight_decay"] if r.name in decayed else 0.0) for r in routing.routes]
    title = f"{type(model).__name__} with --optim {args.optim}"
    print(title, "", *_table(rows if args.all else fold(rows)), "", *_totals(routing, arguments), sep="\n")
    if args.weight_decay == 0:
        print("--weight_decay is 0, the Trainer's default: nothing is decayed. Try --weight_decay 0.1")
    if parallelism is not None:
        dtype = getattr(torch, args.dtype)
        stepped = zero_costs.MASTER if isinstance(parallelism, Zero) else dtype
        states = {r.name: state_bytes(r, arguments, stepped) for r in routing.routes}
        cost = step_cost(
            model, routing, parallelism, arguments=arguments, states=states, dtype=dtype, device=args.device
        )
        lines = cost_table.lines(parallelism, cost, optim=args.optim, dtype=args.dtype, unfolded=args.all)
        print("", *lines, sep="\n")
    return 0


def load(name: str, *, model_class: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Makes the model of a configuration, a directory or a Hub id on the meta device.

    Raises:
        ValueError: there is no such model, or transformers cannot make it.
    """
    import transformers

    path = Path(name)
    if (path / "adapter_config.json").is_file():
        return _with_adapter(name, model_class=model_class, trust_remote_code=trust_remote_code)
    # A Hub id has at most one slash, and does not begin or end like this.
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise ValueError(f"{name}: there is no such file or directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name}: the directory has no config.json, nor an adapter_config.json")
    with _refusing(f"{name!r} is not a readable configuration, model directory or Hub id"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with _refusing(f"{name}: the model cannot be made from its configuration"), torch.device("meta"):
        return _made(config, model_class, trust_remote_code)


def _made(config: Any, model_class: str | None, trust_remote_code: bool) -> nn.Module:
    import transformers

    model_class = model_class or next(iter(config.architectures or ()), None)
    if model_class is not None and hasattr(transformers, model_class):
        return getattr(transformers, model_class)(config)
    if model_class is not None and not hasattr(config, "auto_map"):
        raise ValueError(f"transformers {transformers.__version__} has no {model_class}: name one by --model_class")
    for task in AUTO_CLASSES:
        auto = getattr(transformers, f"AutoModelFor{task}")
        if type(config) in auto._model_mapping or f"AutoModelFor{task}" in getattr(config, "auto_map", {}):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    return transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Converts any error in the block to a ValueError of one line. The block runs code and reads files of others."""
    try:
        yield
    except ImportError as error:
        match = re.search(r"requires the (\S+) library", str(error))
        needs = f"needs {match[1]}: pip install {match[1]}" if match else f"needs a package: {_line(error)}"
        raise ValueError(f"{what}: it {needs}") from error
    except Exception as error:
        raise ValueError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _with_adapter(directory: str, *, model_class: str | None, trust_remote_code: bool) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ValueError(f"{directory} is a PEFT adapter: pip install peft") from None
    with _refusing(f"{directory} is not a readable PEFT adapter"):
        config = peft.PeftConfig.from_pretrained(directory)
    if not config.base_model_name_or_path:
        raise ValueError(f"{directory}: adapter_config.json does not name the base_model_name_or_path")
    config.inference_mode = False
    model = load(config.base_model_name_or_path, model_class=model_class, trust_remote_code=trust_remote_code)
    with _refusing(f"{directory} does not fit {config.base_model_name_or_path}"), torch.device("meta"):
        return peft.get_peft_model(model, config)


def routed(model: nn.Module, rule: Rule, target_modules: str | None = None) -> Routing:
    """The routing for a rule. An element-wise rule trains every parameter that is not frozen.

    Raises:
        ValueError: see :func:`hf_cwd.route`; also if the rule needs matrices and the model has none.
    """
    if rule.companion is not None:
        with naming_flags():
            routing = route(model, matrices=rule.name, others=rule.companion, target_modules=target_modules)
            # Refuses a model without a matrix.
            routing([{"params": [p for p in model.parameters() if p.requires_grad]}])
        return routing
    routes = []
    for name, p in model.named_parameters():
        algorithm, reason = (rule.name, "every parameter") if p.requires_grad else (None, "frozen")
        routes.append((p, Route(name, tuple(p.shape), algorithm, reason)))
    return Routing(type(model).__name__, None, routes)


def _row(r: Route, rates: dict[str | None, float], weight_decay: float) -> Row:
    if r.algorithm is None:
        return Row(r.name, 1, r.shape, "-", None, None, r.reason)
    return Row(r.name, 1, r.shape, r.algorithm, rates[r.algorithm], weight_decay, r.reason)


def fold(rows: Sequence[Row]) -> list[Row]:
    """Merges rows that differ only in numbers in their names into one, such as ``layers.{0-31}.mlp.weight``."""
    folded: dict[tuple, list[Row]] = {}
    for row in rows:
        folded.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name), *row[2:]), []).append(row)
    return [
        same[0]._replace(name=_folded_name([row.name for row in same]), count=len(same)) for same in folded.values()
    ]


def _folded_name(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(
        column[0] if len(set(column)) == 1 else f"{{{cost_table.ranges(set(map(int, column)))}}}" for column in columns
    )


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [("parameter", "x", "shape", "rule", "lr", "weight_decay", "reason")]
    for row in rows:
        values = ("-" if value is None else f"{value:g}" for value in (row.lr, row.weight_decay))
        cells.append((row.name, str(row.count), "x".join(map(str, row.shape)) or "1", row.rule, *values, row.reason))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in cells
    ]


def _totals(routing: Routing, arguments: dict[str, Any]) -> list[str]:
    """The totals of each rule, and the size of the optimizer states."""
    states = sum(r.numel * _states(r, arguments) for r in routing.routes)
    total = sum(r.numel for r in routing.routes)
    return [routing.summary(), f"{total:,} parameters; optimizer states: {states:,} elements"]


def _states(r: Route, arguments: dict[str, Any]) -> int:
    """The number of state tensors that a parameter has."""
    if r.algorithm is None:
        return 0
    rule = RULES[r.algorithm]
    return len(rule.state_keys(rule.defaults() | arguments))


def state_bytes(r: Route, arguments: dict[str, Any], dtype: torch.dtype) -> int:
    """The bytes of optimizer state for each element of a parameter of ``dtype``."""
    group = {name: declared.default for name, declared in COMMON.items()} | arguments
    remainder = dtype.itemsize if r.algorithm is not None and has_remainder(group, dtype) else 0
    return _states(r, arguments) * state_dtype(group, dtype).itemsize + remainder
