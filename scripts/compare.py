#!/usr/bin/env python
"""Train a small language model twice, with and without Cautious Weight Decay, and compare the two runs.

Both runs start from the same weights and see the same batches with the same learning rate and weight decay. What this
script does not know goes to `pretrain.py`, so every flag of TrainingArguments works.
"""

import argparse
import json
import time
from collections.abc import Sequence

import pretrain
from common.usage import command
from compare_args import RECIPES, ROOT, parse
from transformers import TrainerCallback

from hf_cwd.report import page
from hf_cwd.report.figures import figures
from hf_cwd.report.measures import FRACTION
from hf_cwd.report.read import Run, read
from hf_cwd.trainer.callbacks import run_record

CORPUS = ROOT / "scripts/corpus/sotu.jsonl.xz"
VOCABULARY = 4096
CAVEAT = "One small run each, with one seed, proves nothing about which of the two is better."


def optimizers(optim: str, optim_args: str) -> dict[str, tuple[str, list[str]]]:
    """Label and flags of either run's optimizer: torch's AdamW against CWD's, else the same one with plain decay.

    With --optim_args the baseline of cwd_adamw is cwd_adamw too, since torch's AdamW would ignore them.
    """
    own = ["--optim_args", optim_args] if optim_args else []
    cwd = optim, ["--optim", optim, *own]
    if optim == "cwd_adamw" and not optim_args:
        return {"baseline": ("adamw_torch", ["--optim", "adamw_torch"]), "cwd": cwd}
    plain = ",".join(filter(None, [optim_args, "cautious=false"]))
    return {"baseline": (f"{optim}, plain decay", ["--optim", optim, "--optim_args", plain]), "cwd": cwd}


def common_flags(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """What both runs share; the caller's own flags come last and win."""
    given = {flag.split("=")[0] for flag in rest}
    flags = {
        "--config_name": args.model,
        "--seed": args.seed,
        "--max_steps": args.steps,
        "--learning_rate": args.learning_rate,
        "--weight_decay": args.weight_decay,
        "--lr_scheduler_type": "cosine",
        "--warmup_steps": max(1, args.steps // 20),
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 16,
        "--logging_steps": max(1, args.steps // 50),
        "--eval_strategy": "steps",
        "--eval_steps": args.steps // 4 + 1,  # three times on the way; the fourth evaluation is pretrain.py's last
        "--max_eval_samples": 256,
        "--save_strategy": "no",
        "--report_to": "none",
        "--dataloader_pin_memory": "false",
    }
    if not given & {"--train_file", "--dataset_name"}:
        flags["--train_file"] = CORPUS
    own = [str(part) for item in flags.items() if item[0] not in given for part in item]
    return [*own, *RECIPES[args.optim]["flags"], *rest]


class Record(TrainerCallback):
    """Records what trained, also torch's AdamW, of which hf_cwd by itself leaves no record."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        run_record.write(args, model, optimizer)


def summarise(run: Run, metrics: dict, *, plain: bool) -> dict:
    """The numbers of one run; with `plain` decay all elements are decayed, whether or not they were counted."""
    found = {figure.key: figure.values[0] for figure in figures([run])}
    seconds = found["train_runtime"] - found["evaluating"]
    return {
        "train_loss": found["loss"],
        "eval_loss": metrics["eval_loss"],
        "perplexity": metrics["perplexity"],
        "eval_token_accuracy": metrics["eval_token_accuracy"],
        "decayed_fraction": found.get(FRACTION, 1.0 if plain else None),
        "train_seconds": seconds,
        "train_tokens_per_second": metrics["train_tokens"] / seconds,
        "train_tokens": metrics["train_tokens"],
        "num_parameters": metrics["num_parameters"],
    }


ROWS = {
    "train_loss": ("train loss (last 10 % of the log)", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "perplexity": ("held-out perplexity", "{:.2f}"),
    "eval_token_accuracy": ("held-out token accuracy", "{:.2%}"),
    "decayed_fraction": ("weights decayed a step (mean)", "{:.1%}"),
    "train_seconds": ("training time (s)", "{:.1f}"),
    "train_tokens_per_second": ("training tokens/s", "{:,.0f}"),
}


def table(runs: dict[str, dict]) -> str:
    """The summaries side by side."""
    lines = [["", *(run["label"] for run in runs.values())]]
    for key, (name, form) in ROWS.items():
        lines.append([name, *("-" if run[key] is None else form.format(run[key]) for run in runs.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def main(argv: Sequence[str] | None = None) -> dict:
    """Both runs and their report; the summary that is written as JSON."""
    args, rest = parse(argv)
    started = time.perf_counter()
    common = common_flags(args, rest)
    # Trained by the first run and used by both: one tokenizer, and one cache of tokenised documents.
    tokenizer = {
        "baseline": ["--train_tokenizer_vocab_size", str(VOCABULARY)],
        "cwd": ["--tokenizer_name", str(args.output_dir / "baseline/tokenizer")],
    }
    if any(flag.split("=")[0] in ("--tokenizer_name", "--train_tokenizer_vocab_size") for flag in rest):
        tokenizer = {"baseline": [], "cwd": []}
    runs, folders = {}, []
    for number, (name, (label, own)) in enumerate(optimizers(args.optim, args.optim_args).items(), 1):
        rates = f"learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}"
        print(f"\n[{number}/2] {label}: {' '.join(own)}, {rates}, {args.steps} steps", flush=True)
        folders.append(args.output_dir / name)
        flags = [*common, *tokenizer[name], *own]
        metrics = pretrain.main([*flags, "--output_dir", str(folders[-1])], [Record()])
        numbers = summarise(*read(folders[-1:]), metrics, plain=name == "baseline")
        runs[name] = {"label": label, "flags": flags, **numbers}
    report, numbers = page.write(read(folders), args.output_dir / "report"), args.output_dir / "summary.json"
    summary = {"runs": runs, "seconds": time.perf_counter() - started, "report": "report/report.html", "note": CAVEAT}
    numbers.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(runs)}\n\n{CAVEAT}")
    print(f"Both runs with their evaluations took {summary['seconds']:.0f} s.")
    print(f"Curves, and all that differs: {report}\nNumbers: {numbers}")
    return summary


if __name__ == "__main__":
    command(main)
