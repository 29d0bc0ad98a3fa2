"""Approximate posteriors q(z|x): modules whose call returns a distribution over z."""

from __future__ import annotations

__all__ = ["Normal", "Posterior"]

import abc

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override


class Posterior(nn.Module, abc.ABC):
    """The recognition model q(z|x): ``posterior(x, *context)`` is a distribution over z.

    A new one needs a `forward`; batch shape is the data's, event shape ``(latent,)``.

    Args:
        encoder: Network from ``(..., *shape)`` to ``(..., *outputs(latent))``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.network = encoder

    @classmethod
    def outputs(cls, latent: int) -> tuple[int, ...]:
        """Shape of the encoder's output for a latent vector of size `latent`."""
        return (2, latent)

    @abc.abstractmethod
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        """Return q(z|x) for data ``(..., *shape)`` and whatever else each datum brings."""


class Normal(Posterior):
    """Diagonal Gaussian ``q(z|x) = N(z; m(x), diag s(x)^2)``, the encoder giving m and log s.

    Equation 9 of Auto-Encoding Variational Bayes (Kingma & Welling, 2013).

    Args:
        encoder: Network from ``(..., *shape)`` to ``(..., 2, latent)``: location, log scale.

    Example:
        >>> import torch
        >>> posterior = Normal(nn.Unflatten(-1, (2, 3)))
        >>> posterior(torch.zeros(5, 6)).mean.shape
        torch.Size([5, 3])
    """

    @override
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        loc, log_scale = self.network(x, *context).unbind(-2)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
