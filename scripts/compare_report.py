"""The report of `compare.py`: a table, a summary as JSON and a figure."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

FRACTION = "cwd/decayed_fraction"
COLOURS = {"baseline": "#7f7f7f", "cwd": "#0072b2"}
CAVEAT = "One small run each, with one seed, proves nothing about which of the two is better."


def series(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log entries that hold `key`."""
    entries = [entry for entry in history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def smooth(values: list[float], weight: float = 0.35) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def decayed_fraction(run: dict) -> tuple[list[int], list[float]]:
    """Share of the elements with a weight decay that a logged step decays; all of them where the decay is plain."""
    steps, values = series(run["history"], FRACTION)
    if steps or not run["plain"]:
        return steps, values
    steps, _ = series(run["history"], "loss")
    return steps, [1.0] * len(steps)


def summarise(run: dict) -> dict:
    """The numbers of one run."""
    metrics = run["metrics"]
    _, losses = series(run["history"], "loss")
    _, fractions = decayed_fraction(run)
    last = losses[-max(1, len(losses) // 10) :]
    # train_runtime includes the evaluations on the way; the last entry with eval_runtime came after training.
    _, evaluations = series(run["history"], "eval_runtime")
    seconds = metrics["train_runtime"] - sum(evaluations[:-1])
    return {
        "label": run["label"],
        "flags": run["flags"],
        "train_loss": sum(last) / len(last),
        "eval_loss": metrics["eval_loss"],
        "perplexity": metrics["perplexity"],
        "eval_token_accuracy": metrics["eval_token_accuracy"],
        "decayed_fraction": sum(fractions) / len(fractions) if fractions else None,
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


def figure(runs: dict[str, dict], summaries: dict[str, dict], path: Path) -> None:
    """Training and held-out loss above, the decayed share of the weights below."""
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 6.4), sharex=True, height_ratios=[2.4, 1], layout="constrained"
    )
    for name, run in runs.items():
        steps, losses = series(run["history"], "loss")
        top.plot(steps, losses, color=COLOURS[name], alpha=0.25, linewidth=1)
        top.plot(steps, smooth(losses), color=COLOURS[name], linewidth=1.8, label=f"{run['label']}: training")
        steps, losses = series(run["history"], "eval_loss")
        label = f"{run['label']}: held out ({summaries[name]['eval_loss']:.3f})"
        # Hollow squares around dots: both stay visible where they coincide.
        shape = {"marker": "o", "ms": 6} if name == "cwd" else {"marker": "s", "ms": 11, "mfc": "none", "mew": 1.5}
        top.plot(steps, losses, linestyle="none", color=COLOURS[name], label=label, **shape)
        bottom.plot(*decayed_fraction(run), color=COLOURS[name], linewidth=1.8, label=run["label"])
    top.set_ylabel("cross-entropy (nats per token)")
    bottom.set_ylabel("weights decayed")
    bottom.set_xlabel("optimizer step")
    bottom.set_ylim(-0.05, 1.1)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    one = summaries["cwd"]
    fig.suptitle(
        f"Same weights, same batches, same weight decay: {one['num_parameters'] / 1e6:.2f} M parameters, "
        f"{one['train_tokens'] / 1e6:.2f} M training tokens"
    )
    fig.savefig(path, dpi=150)
    plt.close(fig)


def write(runs: dict[str, dict], output_dir: Path, *, seconds: float) -> dict:
    """Print the table and write summary.json and comparison.png into `output_dir`; the summary."""
    summaries = {name: summarise(run) for name, run in runs.items()}
    image = output_dir / "comparison.png"
    figure(runs, summaries, image)
    summary = {"runs": summaries, "seconds": seconds, "figure": image.name, "note": CAVEAT}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(summaries)}\n\n{CAVEAT}")
    print(f"Both runs with their evaluations took {seconds:.0f} s.")
    print(f"Curves: {image}\nNumbers: {output_dir / 'summary.json'}")
    return summary
