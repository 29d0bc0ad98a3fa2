"""Objectives: Pyro's own that suit minibatches, and more of the ELBO family, for `SVI`."""

from __future__ import annotations

__all__ = ["BetaELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "Trace_ELBO"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from typing_extensions import override

Program = Callable[..., Any]


class BetaELBO(ELBO):
    """Any ELBO with its KL weighted, ``E_q[log p(x|z) + b (log p(z) - log q(z|x))]``.

    The weight b multiplies the log-density of every latent site in model and guide alike,
    so it is right for each of Pyro's ELBOs. Below 1 the value is no lower bound. Higgins et
    al. (2017), beta-VAE, equation 4; annealing as in Bowman et al. (2016), section 3.1.

    Args:
        weight: The weight b, at least 0. Change it between steps, for annealing, by
            ``objective.weight.fill_(b)``.
        elbo: The ELBO to weight, `pyro.infer.Trace_ELBO` where it is left out.

    Raises:
        ValueError: A negative or non-finite weight.

    Example:
        >>> BetaELBO(4.0).weight
        tensor(4.)
    """

    def __init__(self, weight: float = 1.0, *, elbo: ELBO | None = None) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of the KL is finite and at least 0, not {weight}")
        self.elbo = Trace_ELBO(max_plate_nesting=1) if elbo is None else elbo
        self.weight = torch.tensor(float(weight))
        super().__init__(
            num_particles=self.elbo.num_particles,
            max_plate_nesting=self.elbo.max_plate_nesting,
            vectorize_particles=self.elbo.vectorize_particles,
        )

    @override
    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(*self._weighted(model, guide), args, kwargs)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Minus the weighted bound, summed over the batch, in nats."""
        return self.elbo.loss(*self._weighted(model, guide), *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Any:
        """As `loss`, a tensor to differentiate."""
        return self.elbo.differentiable_loss(*self._weighted(model, guide), *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """As `loss`; gradients are added to the parameters'."""
        return self.elbo.loss_and_grads(*self._weighted(model, guide), *args, **kwargs)

    def _weighted(self, model: Program, guide: Program) -> tuple[Program, Program]:
        weigh = _Weigh(self.weight)
        return weigh(model), weigh(guide)


class _Weigh(Messenger):
    """Scales the log-density of latent sites; unlike `poutine.scale` also by 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
