"""What the Triton kernels become on an H100, without one.

    python -m tests.kernels.triton_compiled RESULTS

compiles variants of ``walk`` for sm_90 and writes a JSON file: by variant, the PTX; also of SUMMED with its sums.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_cwd.kernels import triton

# Operation, dtypes of x, g and states, number of states, whether there is a remainder, whether addresses are aligned.
F, B, I = torch.float32, torch.bfloat16, torch.int16  # noqa: E741
VARIANTS: dict[str, tuple[Any, ...]] = {
    "adamw float32": ("adamw", F, F, F, 2, False, True),
    "adamw float32 anywhere": ("adamw", F, F, F, 2, False, False),
    "adamw bfloat16": ("adamw", B, B, B, 2, False, True),
    "adamw bfloat16, states float32": ("adamw", B, B, F, 2, False, True),
    "adamw remainder": ("adamw", I, B, F, 2, True, True),
    "lion float32": ("lion", F, F, F, 1, False, True),
    "momentum float32": ("momentum", F, F, F, 1, False, True),
    "directions to bfloat16": ("directions", B, F, F, 1, False, True),
    "apply bfloat16": ("apply", F, B, F, 0, False, True),
}

SUMMED = "adamw bfloat16, states float32"


def ptx(variant: tuple[Any, ...], *, sums: bool = False) -> str:
    import triton as compiler
    from triton.backends.compiler import GPUTarget

    (operation, x, g, s, states, rest, aligned), walk = variant, triton.kernels().walk
    constants = {
        **{"OP": operation, "STATES": states, "REMAINDER": rest, "SUM": sums} | ({} if sums else {"sums": None}),
        **{name: triton._type(dtype) for name, dtype in (("X", x), ("G", g), ("S", s))},
        **{"VECTOR": triton.vector((x, g, s)) if aligned else 1, "BLOCK": triton.BLOCK},
    }
    pointers = {"tensors": "*i64", "places": "*i32", "rows": "*fp32"} | ({"sums": "*fp64"} if sums else {})
    source = compiler.compiler.ASTSource(
        walk,
        {name: pointers.get(name, "constexpr") for name in walk.arg_names},
        constexprs={(walk.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(walk.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": triton.WARPS, **triton._EXACT}
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    found = {name: ptx(variant) for name, variant in VARIANTS.items()}
    found["sums"] = ptx(VARIANTS[SUMMED], sums=True)
    Path(sys.argv[1]).write_text(json.dumps(found))
