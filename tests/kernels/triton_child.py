"""The truth table with Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported.

    python -m tests.kernels.triton_child RESULTS

writes a JSON file: what is wrong by case, and which cases noticed which mutants.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from hf_cwd.kernels import triton
from tests.kernels import by_hand, mutants, truth
from tests.support.reference import arithmetic


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The interpreter's own tl.fma rounds the product, unlike every GPU."""
    del self
    data = arithmetic.fma(x.data, y.data, z.data)
    return interpreter.TensorHandle(data, z.dtype.scalar)


def converted(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """The interpreter's own conversion cuts bits off instead of rounding, and loses bfloat16's denormals."""
    del rounding
    if source == tl.bfloat16:
        assert target == tl.float32
        return arithmetic.widen(data, "bfloat16").view(np.uint32)
    assert (source, target) == (tl.float32, tl.bfloat16)
    return arithmetic.narrow(np.asarray(data), "bfloat16")


def main(results: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # overflows are among the cases
    interpreter.InterpreterBuilder.create_fma = fused
    interpreter._convert_float = converted
    began = time.perf_counter()
    cases = truth.cases(few=True)
    found = {
        "table": truth.run(triton, "cpu", cases),
        "capturable": truth.run(triton, "cpu", truth.for_capturable(cases), capturable=True),
        "by hand": truth.run(triton, "cpu", by_hand.CASES),
        "mutants": mutants.noticed(triton, cases),
    }
    results.write_text(json.dumps(found))
    print(f"{len(cases)} cases, {time.perf_counter() - began:.1f} s, numpy {np.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
