"""Lion (Chen et al., arXiv 2302.06675); Algorithm 4 of arXiv 2510.12402 with its decay left to decay.py."""

from torch import Tensor

from hf_cwd.rules.base import Rule
from hf_cwd.rules.hyperparameters import Betas


def direction(grad: Tensor, exp_avg: Tensor, *, step: int, betas: tuple[float, float]) -> Tensor:
    """The sign of an interpolated momentum::

        u  = sign(b1 m + (1 - b1) g)
        m <- b2 m + (1 - b2) g

    Args:
        grad: g, any shape.
        exp_avg: m, same shape, mutated after u is computed.
        step: unused; Lion has no bias correction.

    Returns:
        u in {-1, 0, 1}, a new tensor.
    """
    beta1, beta2 = betas
    u = exp_avg.lerp(grad, 1 - beta1).sign_()
    exp_avg.lerp_(grad, 1 - beta2)
    return u


RULE = Rule(
    name="lion",
    direction=direction,
    state_keys=lambda group: ("exp_avg",),
    # The betas of the CWD paper's experiments; Lion's own paper has (0.9, 0.99).
    hyperparameters={"betas": Betas((0.9, 0.95))},
    aliases={"state1": "exp_avg"},  # bitsandbytes'
)
