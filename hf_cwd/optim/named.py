"""The named optimizers: :class:`hf_cwd.optim.optimizer.CWDOptimizer` with the arguments and defaults of one rule."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor

from hf_cwd.optim.optimizer import CommonOptions, CWDOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CWDAdamW(CWDOptimizer):
    """AdamW with cautious weight decay (arXiv 2510.12402, Algorithm 6).

    The recursion is that of :func:`hf_cwd.rules.adamw.direction`; arguments, their order and defaults are
    torch.optim.AdamW's, and state dicts are interchangeable with it. States: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Example:
        >>> import torch
        >>> from hf_cwd import CWDAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = CWDAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool | None = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params, lr, algorithm="adamw", betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **options
        )


class CWDLion(CWDOptimizer):
    """Lion with cautious weight decay (arXiv 2510.12402, Algorithm 4).

    The recursion is that of :func:`hf_cwd.rules.lion.direction`; the order of arguments is lion-pytorch's and timm's.
    Lion's updates have the size of the learning rate itself: use a learning rate 3 to 10 times smaller, and a weight
    decay as much larger, than AdamW's. States: ``step``, ``exp_avg``.

    Example:
        >>> import torch
        >>> from hf_cwd import CWDLion
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> x.grad = torch.ones(2)
        >>> CWDLion([x], lr=0.1, weight_decay=0.5).step()
        >>> [round(v, 4) for v in x.tolist()]  # pushed towards zero: decayed; pushed away from zero: left alone
        [0.85, -1.1]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-1,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, lr, algorithm="lion", betas=betas, weight_decay=weight_decay, **options)


class CWDMuon(CWDOptimizer):
    """Muon with cautious weight decay for matrices (arXiv 2510.12402, Algorithm 5), CWD-AdamW for the rest.

    The recursion is that of :mod:`hf_cwd.rules.muon`; argument names and their order are torch.optim.Muon's, whose
    state dicts load here. A Muon group takes 2-D parameters, and with a ``layout`` those that hold several matrices
    (:class:`hf_cwd.newton_schulz.matrices.MatrixLayout`); ``routing=hf_cwd.route(model)`` makes the groups, and gives
    embeddings, heads and vectors to some with ``algorithm="adamw"``. States: ``step``, ``exp_avg``; those of AdamW in
    its groups.

    Args:
        ns_coefficients: name in :data:`hf_cwd.newton_schulz.orthogonalize.COEFFICIENTS`, one ``(a, b, c)`` or a
            sequence of them.
        ns: form of the Newton-Schulz iteration, ``"standard"`` or ``"gram"``; ``"auto"`` is the one of fewer
            operations, see :func:`hf_cwd.newton_schulz.orthogonalize.newton_schulz`.
        ns_dtype: dtype of the Newton-Schulz iteration: ``"bfloat16"``, ``"float32"``, ``"float64"``; ``"auto"`` is
            bfloat16, on a CPU float32, and float64 for float64 parameters.
        adjust_lr_fn: the shape factor on the update, see :func:`hf_cwd.rules.muon.scale`; None is ``"original"``, as in
            torch.
        share: ``"always"`` says that plain tensors are replicas with equal gradients on all ranks, and has one rank
            work for all; ``"never"`` has every replica work for itself; ``"auto"`` takes what costs less where
            replication is known: by ``Replicate`` placements, and from the Trainer, which knows what it wraps in DDP.
            Other plain tensors are then their rank's own, as in torch.optim.Muon.
        process_group: the ranks that hold plain tensors as replicas; None is the world.
        exchange_bytes: about what a rank receives in a round, see :func:`hf_cwd.distributed.plan.plan`.
        adamw_lr: learning rate of the AdamW groups; None is ``lr``.

    Example:
        >>> import torch
        >>> from hf_cwd import CWDMuon, route
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10))
        >>> optimizer = CWDMuon(model.parameters(), lr=1e-3, routing=route(model))
        >>> [(group["algorithm"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 1), ('adamw', 4)]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 1e-1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = "quintic",
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        ns: str = "auto",
        ns_dtype: str = "auto",
        share: str = "auto",
        exchange_bytes: int = 1 << 28,
        process_group: "ProcessGroup | None" = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        **options: Unpack[CommonOptions],
    ) -> None:
        companion = {"betas": adamw_betas, "eps": adamw_eps} | ({} if adamw_lr is None else {"lr": adamw_lr})
        super().__init__(
            params,
            lr,
            algorithm="muon",
            companions={"adamw": companion},
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            ns_steps=ns_steps,
            ns=ns,
            ns_dtype=ns_dtype,
            eps=eps,
            adjust_lr_fn=adjust_lr_fn,
            share=share,
            exchange_bytes=exchange_bytes,
            process_group=process_group,
            weight_decay=weight_decay,
            **options,
        )


class CWDSGD(CWDOptimizer):
    """SGD with momentum and cautious weight decay (arXiv 2510.12402, Algorithm 2 with ``ema=True``).

    The recursion is that of :func:`hf_cwd.rules.sgd.direction`, torch.optim.SGD's by default, as is the order of
    arguments. The decay is decoupled,
    unlike torch.optim.SGD's, which adds ``weight_decay * x`` to the gradient. States: ``step``, and
    ``momentum_buffer`` where ``momentum`` is not 0.

    Args:
        ema: True is the paper's momentum, ``m <- momentum m + (1 - momentum) g``.

    Example:
        >>> import torch
        >>> from hf_cwd import CWDSGD
        >>> x = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
        >>> x.grad = torch.ones(2)
        >>> CWDSGD([x], lr=0.5, weight_decay=0.5).step()
        >>> x.tolist()
        [1.0, -2.5]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 1e-2,
        nesterov: bool = False,
        *,
        ema: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            algorithm="sgd",
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            ema=ema,
            weight_decay=weight_decay,
            **options,
        )
