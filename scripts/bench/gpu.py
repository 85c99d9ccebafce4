"""Checks hf_cwd on a GPU, in minutes: kernels, CUDA graphs, no waiting, training, ZeRO, and what a step costs.

Needs python3 with torch, triton, transformers and accelerate, and DeepSpeed for the part zero, which is left out
without it; hf_cwd is taken from this checkout. Every part is a process of its own with a time limit, so that no part
takes another one with it. Exit status: 0, 1 if a check failed, 2 without a GPU. A goal of speed that is missed is said,
and fails nothing.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts/bench/gpu_parts.py"
WIDTH = 150  # characters of a line


class Part(NamedTuple):
    """Limits. ``together``: beside others of the same number; what is timed runs alone.

    ``characters`` of its lines: all of them must fit into the last 8000 that some machines hand back.
    """

    seconds: int
    together: int
    characters: int


PARTS = {
    "versions": Part(60, 0, 500),
    "kernels": Part(170, 1, 600),
    "graph": Part(120, 1, 450),
    "waiting": Part(100, 1, 450),
    "training": Part(150, 1, 500),
    "zero": Part(170, 1, 1200),
    "step": Part(160, 2, 2900),
    "train": Part(120, 3, 850),
}


class Running(NamedTuple):
    name: str
    process: subprocess.Popen
    folder: Path
    started: float
    limit: float


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--seconds", type=float, default=460, help="for everything (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args(argv)


def no_gpu() -> str | None:
    """Why nothing can be checked here."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; PYTHON=/path/to/python3 names another interpreter"
    import torch

    return None if torch.cuda.is_available() else f"no GPU: torch {torch.__version__} finds no CUDA device"


def start(name: str, folder: Path, limit: float) -> Running:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = folder / name
    own.mkdir()
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), name, str(own), str(limit)],
            env=env,
            cwd=own,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(name, process, own, time.monotonic(), limit)


def stop(part: Running) -> None:
    if part.process.poll() is None:
        os.killpg(part.process.pid, signal.SIGKILL)  # it leads a group of its own: its children end with it
        part.process.wait()


def finish(part: Running) -> dict[str, Any]:
    """What a part found; its end, if that was not a good one, is a failed check."""
    try:
        status = part.process.wait(max(0.1, part.limit - (time.monotonic() - part.started)))
        problem = None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {part.limit:.0f} s"
    stop(part)
    file = part.folder / "checks.jsonl"
    checks = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    log = [line for line in (part.folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    if problem is None and not checks:
        problem = "it checked nothing"
    if problem is not None:
        checks.append({"name": "end of the part", "ok": False, "text": f"{problem}: {' | '.join(log[-2:])}"})
    return {"seconds": round(time.monotonic() - part.started, 1), "checks": checks, "log": log[-40:]}


def lines(part: str, checks: Sequence[dict[str, Any]]) -> list[str]:
    """What failed comes first, to be seen whatever else there is to say; passed checks without figures share a line."""
    marks = {False: "FAIL", None: "-", True: "ok"}
    silent = [check["name"] for check in checks if check["ok"] and not check["text"]]
    told = sorted(
        (check for check in checks if check["name"] not in silent), key=lambda check: check["ok"] is not False
    )
    texts = [f"{marks[check['ok']]:4} {part}: {check['name']}: {check['text']}" for check in told]
    texts += [f"ok   {part}: {len(silent)} checks: {', '.join(silent)}"] if silent else []
    texts = [text if len(text) <= WIDTH else text[: WIDTH - 3] + "..." for text in texts]
    shown, left = [], PARTS[part].characters
    for position, text in enumerate(texts):
        left -= len(text) + 1
        if left < 0 and position > 0:
            return [*shown, f"     {part}: {len(texts) - position} more lines are in --json"]
        shown.append(text)
    return shown


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts, those of one number side by side; prints the lines of each when it has ended."""
    found: dict[str, Any] = {}
    deadline, running = time.monotonic() + args.seconds, []
    try:
        for number in sorted({PARTS[name].together for name in args.parts}):
            left = deadline - time.monotonic()
            names = [name for name in args.parts if PARTS[name].together == number]
            running = [start(name, folder, min(left, PARTS[name].seconds)) for name in names if left >= 10]
            for name in names[len(running) :]:
                checks = [{"name": "not run", "ok": False, "text": f"{args.seconds:.0f} s are over"}]
                found[name] = {"seconds": 0.0, "checks": checks, "log": []}
            found |= {part.name: finish(part) for part in running}
            for name in names:
                print("\n".join(lines(name, found[name]["checks"])), flush=True)
    finally:
        for part in running:
            stop(part)
    return found


def table(found: dict[str, Any]) -> str:
    rows = [f"\n{'part':10} {'result':6} {'passed':>7} {'failed':>7} {'seconds':>8}"]
    for name, part in found.items():
        marks = [check["ok"] for check in part["checks"]]
        result = "FAIL" if False in marks else "ok"
        rows.append(f"{name:10} {result:6} {marks.count(True):7} {marks.count(False):7} {part['seconds']:8}")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if (reason := no_gpu()) is not None:
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts end too
    start_of_all = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    failed = [name for name, part in found.items() if any(check["ok"] is False for check in part["checks"])]
    print(table(found))
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'passed'} in {time.monotonic() - start_of_all:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
