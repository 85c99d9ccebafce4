"""``hf-cwd report``: shows what the Trainer logged in one or several runs, as one HTML page."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="a Trainer's output_dir, or a directory with several below it; all runs are compared with the first",
    )
    parser.add_argument("--output", default="cwd_report", metavar="DIR", help="for report.html and PNGs (%(default)s)")


def main(args: argparse.Namespace) -> int:
    try:
        from hf_cwd.report import page, read
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("the charts need matplotlib: pip install 'hf_cwd[report]'") from None
    runs, left_out = read.read_whole(args.runs)
    for line in left_out:
        print(f"hf-cwd report: left out: {line}", file=sys.stderr)
    print(page.write(runs, Path(args.output), left_out=left_out))
    return 0
