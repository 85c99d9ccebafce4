"""The arguments of `compare.py`. Any Python can read them, so that `quickstart` does it before it installs anything."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from common.usage import TRACEBACK, OneLineErrors, check_writable, command

ROOT = Path(__file__).resolve().parent.parent
# What a decay does in a run is about learning rate * weight decay * steps: a run of minutes needs a large one for the
# difference to be seen. Lion's updates are signs: it wants a smaller learning rate and, for the same product, a larger
# weight decay. Muon's updates are scaled to the size of AdamW's, whose values therefore carry over.
RECIPES = {
    "cwd_adamw": {"learning_rate": 3e-3, "weight_decay": 1.0, "flags": ["--adam_beta2", "0.95"]},
    "cwd_lion": {"learning_rate": 5e-4, "weight_decay": 6.0, "flags": []},
    "cwd_muon": {
        "learning_rate": 3e-3,
        "weight_decay": 1.0,
        "flags": ["--adam_beta2", "0.95"],
    },
    "cwd_sgd": {"learning_rate": 0.3, "weight_decay": 0.01, "flags": [], "optim_args": "momentum=0.9"},
}


DESCRIPTION = """Train a small language model twice, with and without Cautious Weight Decay, and compare the two runs.
Both start from the same weights and see the same batches with the same learning rate and weight decay. Other flags go
to pretrain.py, so every flag of TrainingArguments works."""


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The values, those of the recipe where none was given, and the flags that are `pretrain.py`'s."""
    parser = OneLineErrors(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--optim", default="cwd_adamw", choices=RECIPES)
    parser.add_argument("--optim_args", help="options of the optimizer, for both runs")
    parser.add_argument("--steps", type=int, default=360, help="optimizer steps a run (%(default)s)")
    parser.add_argument(
        "--model", default=str(ROOT / "configs/models/llama-1m.json"), help="config: file, dir or Hub id"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--learning_rate", type=float, help="by default the optimizer's own recipe")
    parser.add_argument("--weight_decay", type=float, help="by default the optimizer's own recipe")
    parser.add_argument("--output_dir", help="runs/quickstart-OPTIM by default")
    parser.add_argument(TRACEBACK, action="store_true", help="show the traceback of a mistake, not one line")
    args, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        parser.error(f"{rest[0]!r} is no flag, nor the value of one")
    recipe = RECIPES[args.optim]
    args.optim_args = recipe.get("optim_args", "") if args.optim_args is None else args.optim_args
    args.learning_rate = recipe["learning_rate"] if args.learning_rate is None else args.learning_rate
    args.weight_decay = recipe["weight_decay"] if args.weight_decay is None else args.weight_decay
    args.output_dir = Path(args.output_dir or ROOT / f"runs/quickstart-{args.optim}")
    _check(parser, args)
    return args, rest


def _check(parser: OneLineErrors, args: argparse.Namespace) -> None:
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: give 0 or more")
    if args.model.endswith(".json") and not Path(args.model).is_file():
        parser.error(f"--model {args.model}: no such file")
    if "cautious" in (part.split("=")[0].strip() for part in args.optim_args.split(",")):
        parser.error(
            "--optim_args cautious=...: the comparison itself turns it off in the baseline and on in the other"
        )
    if not 0 <= args.learning_rate < math.inf:
        parser.error(f"--learning_rate {args.learning_rate}: give a finite number, 0 or more")
    if not 0 < args.weight_decay < math.inf:
        parser.error(f"--weight_decay {args.weight_decay}: give more than 0, or there is nothing to be cautious about")
    check_writable(args.output_dir)


if __name__ == "__main__":
    sys.argv[0] = "quickstart"
    command(parse)
