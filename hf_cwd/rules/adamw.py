"""AdamW (Loshchilov and Hutter, arXiv 1711.05101); Algorithm 6 of arXiv 2510.12402 with its decay left to decay.py."""

from torch import Tensor

from hf_cwd.rules.base import Rule
from hf_cwd.rules.hyperparameters import Betas, Real


def direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's direction, both moments bias-corrected::

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        grad: g, any shape.
        exp_avg: m, same shape, mutated.
        exp_avg_sq: v, same shape, mutated.
        step: t, from 1.

    Returns:
        u, a new tensor. The buffers are bit for bit those of torch.optim.AdamW's single-tensor path.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # Multiply by reciprocals. torch divides by a number that way on a GPU, but not on a CPU.
    denominator = exp_avg_sq.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    return exp_avg.div(denominator).mul_(1 / (1 - beta1**step))


RULE = Rule(
    name="adamw",
    direction=direction,
    state_keys=lambda group: ("exp_avg", "exp_avg_sq"),
    hyperparameters={"betas": Betas((0.9, 0.999)), "eps": Real(1e-8)},
    aliases={"state1": "exp_avg", "state2": "exp_avg_sq"},  # bitsandbytes' names
)
