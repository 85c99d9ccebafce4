"""The truth table on a device: ``python -m tests.kernels.on_device triton:cuda triton:cuda:capturable c:cpu``.

Prints a line of JSON for each KERNEL:DEVICE[:capturable]: its name, whether all cases are right, and a text. For
scripts/gpu_check, on machines without pytest.
"""

import contextlib
import importlib
import json
import sys
import time
from typing import Any

from tests.kernels import truth


def check(table: list[Any], kernel: str, device: str, *, capturable: bool) -> tuple[bool | None, str]:
    """Whether a kernel gets all cases of a table right; None where a difference is no mistake."""
    module, start = importlib.import_module(f"hf_cwd.kernels.{kernel}"), time.monotonic()
    chosen = truth.for_capturable(table) if capturable else table
    problems = truth.run(module, device, chosen, eager=kernel == "eager", capturable=capturable)
    wrong = {case: some for case, some in problems.items() if some}
    first = "".join(f"; {case}: {some[0]}" for case, some in list(wrong.items())[:2])
    seconds = time.monotonic() - start
    text = f"{len(problems) - len(wrong)} of {len(problems)} cases right in {seconds:.0f} s{first}"
    # torch's own operations on a GPU fuse what they like: the eager kernel is near there, and exact on CPUs only.
    return (None if (kernel, device) == ("eager", "cuda") else not wrong), text


def main(asked: list[str]) -> None:
    table = truth.cases(few=True)
    for each in asked:
        kernel, device, *capturable = each.split(":")
        name = f"{kernel} on {device}{', capturable' if capturable else ''}"
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a compiler prints is no line of JSON
                ok, text = check(table, kernel, device, capturable=bool(capturable))
        except Exception as error:  # the next one is looked at all the same
            ok, text = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps({"name": name, "ok": ok, "text": text}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
