"""Approximate posteriors q(z|x): modules whose call returns a distribution over z."""

from __future__ import annotations

__all__ = ["Flow", "FullRankNormal", "LowRankNormal", "Normal", "Posterior"]

import abc
from collections.abc import Sequence
from numbers import Integral

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution
from typing_extensions import override

from pyro_vae import distributions as laws
from pyro_vae.flows import zuko


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
        output = self.network(x, *context)
        _check_width(self, output, 2)
        loc, log_scale = output.unbind(-2)
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
        _check_width(self, output, 1 + output.shape[-1])
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
        ValueError: A rank below 1, or no whole number.

    Example:
        >>> import torch
        >>> posterior = LowRankNormal(nn.Unflatten(-1, (3, 4)), rank=1)
        >>> posterior(torch.zeros(5, 12)).covariance_matrix.shape
        torch.Size([5, 4, 4])
    """

    def __init__(self, encoder: nn.Module, *, rank: int = 2) -> None:
        super().__init__(encoder)
        _check_sizes("a LowRankNormal", rank=rank)
        self.rank = rank

    @classmethod
    @override
    def outputs(cls, latent: int, *, rank: int = 2) -> tuple[int, ...]:
        return (2 + rank, latent)

    @override
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        output = self.network(x, *context)
        _check_width(self, output, 2 + self.rank, f", rank={self.rank}")
        loc, log_scale, factor = output[..., 0, :], output[..., 1, :], output[..., 2:, :]
        return laws.LowRankNormal(loc, factor.mT, (2 * log_scale).exp())


class Flow(Posterior):
    """Normalising flow ``z = m(x) + s(x) f(e; h(x)), e ~ N(0, I)``, f inverse autoregressive.

    Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow,
    section 3, as zuko's masked networks. f begins as the identity, where q is the diagonal
    Gaussian. Draws and their density take one pass; the density of another z takes one for
    each latent dimension.

    Args:
        encoder: Network from ``(..., *shape)`` to ``(..., 2 * latent + features)``: location,
            log scale and the features h that f depends on.
        latent: Size of z.
        spline: Make each transformation a monotonic spline (Durkan et al., 2019, Neural
            Spline Flows) in place of an affine map.
        features: Number of features h.
        transforms: Number of transformations that f is composed of, in alternating orders.
        hidden: Widths of the hidden layers of each.

    Raises:
        ValueError: No latents, no features or no transformations, or no whole numbers of them.

    Example:
        >>> posterior = Flow(nn.Linear(6, 2 * 3 + 5), 3, features=5)
        >>> posterior(torch.zeros(4, 6)).sample().shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent: int,
        *,
        spline: bool = False,
        features: int = 32,
        transforms: int = 2,
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__(encoder)
        _check_sizes("a Flow posterior", latent=latent, features=features, transforms=transforms)
        family = zuko().flows.NSF if spline else zuko().flows.MAF
        self.sizes = latent, latent, features
        self.transform = family(
            latent, features, transforms=transforms, hidden_features=list(hidden)
        ).transform
        for each in self.transform.transforms:
            last = each.hyper[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @classmethod
    @override
    def outputs(cls, latent: int, *, features: int = 32) -> tuple[int, ...]:
        return (2 * latent + features,)

    @override
    def forward(self, x: Tensor, *context: Tensor) -> Distribution:
        output = self.network(x, *context)
        if output.shape[-1:] != (sum(self.sizes),):
            latent, _, features = self.sizes
            raise ValueError(
                f"a Flow posterior takes (..., {sum(self.sizes)}) from its encoder, and got "
                f"{tuple(output.shape)}: make the encoder's output of shape "
                f"Flow.outputs({latent}, features={features})"
            )
        loc, log_scale, features = output.split(self.sizes, -1)
        noise = zuko().distributions.DiagNormal(torch.zeros_like(loc), torch.ones_like(loc))
        moved = _Affine(loc, log_scale.exp(), event_dim=1)
        # Between z and the noise, in the direction in which zuko writes a flow down.
        back = [moved.inv, *(each.inv for each in reversed(self.transform(features).transforms))]
        flow: Distribution = zuko().distributions.NormalizingFlow(
            zuko().transforms.ComposedTransform(*back), noise
        )
        return flow


class _Affine(AffineTransform):
    """An affine map for each datum, whose batch is no part of the event."""

    @override
    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    @override
    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return shape


def _check_sizes(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral):
            raise ValueError(f"the {name} of {owner} must be a whole number, not {size!r}")
        if size < 1:
            raise ValueError(f"the {name} of {owner} must be at least 1, not {size}")


def _check_width(part: Posterior, output: Tensor, width: int, options: str = "") -> None:
    """An encoder gives as many vectors of parameters as its posterior takes."""
    if output.shape[-2:-1] != (width,):
        name = type(part).__name__
        raise ValueError(
            f"a {name} posterior takes (..., {width}, latent) from its encoder, and got "
            f"{tuple(output.shape)}: make the encoder's output of shape "
            f"{name}.outputs(latent{options})"
        )
