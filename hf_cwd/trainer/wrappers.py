"""What Accelerate and DeepSpeed put around an optimizer."""

from typing import Any


def layers(optimizer: Any) -> list[Any]:
    """An optimizer and all that it wraps, the outermost first."""
    result = [optimizer]
    while hasattr(result[-1], "optimizer"):
        result.append(result[-1].optimizer)
    return result


def innermost(optimizer: Any) -> Any:
    """The optimizer without the wrappers of Accelerate and DeepSpeed."""
    return layers(optimizer)[-1]
