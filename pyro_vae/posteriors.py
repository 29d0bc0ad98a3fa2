"""Approximate posteriors q(z|x): modules whose call returns a distribution over z."""

from __future__ import annotations

__all__ = ["FullRankNormal", "LowRankNormal", "Normal", "Posterior"]

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


class FullRankNormal(Posterior):
    """Gaussian with full covariance, ``q(z|x) = N(z; m(x), L(x) L(x)^T)``, L lower triangular.

    Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.1.

    Args:
        encoder: Network from ``(..., *shape)`` to ``(..., 1 + latent, latent)``: location,
            then L with the logarithms of its diagonal, what lies above it unused.

    Example:
        >>> import torch
        >>> posterior = FullRankNormal(nn.Unflatten(-1, (4, 3)))
        >>> posterior(torch.zeros(5, 12)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    @classmethod
    @override
    def outputs(cls, latent: int) -> tuple[int, ...]:
        return (1 + latent, latent)

    @override
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        output = self.network(x, *context)
        loc, scale = output[..., 0, :], output[..., 1:, :]
        diagonal = scale.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return dist.MultivariateNormal(loc, scale_tril=scale.tril(-1) + diagonal)


class LowRankNormal(Posterior):
    """Gaussian ``q(z|x) = N(z; m(x), diag s(x)^2 + F(x) F(x)^T)`` with F of a few columns.

    Ong et al. (2018), Gaussian Variational Approximation With a Factor Covariance Structure.

    Args:
        encoder: Network from ``(..., *shape)`` to ``(..., 2 + rank, latent)``: location, log
            scale, then the columns of F.
        rank: Number of columns of F.

    Raises:
        ValueError: A rank below 1.

    Example:
        >>> import torch
        >>> posterior = LowRankNormal(nn.Unflatten(-1, (3, 4)), rank=1)
        >>> posterior(torch.zeros(5, 12)).covariance_matrix.shape
        torch.Size([5, 4, 4])
    """

    def __init__(self, encoder: nn.Module, *, rank: int = 2) -> None:
        super().__init__(encoder)
        if rank < 1:
            raise ValueError(f"the rank of a LowRankNormal is at least 1, not {rank}")

    @classmethod
    @override
    def outputs(cls, latent: int, *, rank: int = 2) -> tuple[int, ...]:
        return (2 + rank, latent)

    @override
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        output = self.network(x, *context)
        loc, log_scale, factor = output[..., 0, :], output[..., 1, :], output[..., 2:, :]
        return dist.LowRankMultivariateNormal(loc, factor.mT, (2 * log_scale).exp())
