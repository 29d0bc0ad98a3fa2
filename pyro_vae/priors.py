"""Priors p(z): modules whose call returns a distribution over one latent vector."""

from __future__ import annotations

__all__ = ["Flow", "Laplace", "MixtureOfNormals", "Normal", "Prior", "StudentT"]

import abc
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from typing_extensions import override


class Prior(nn.Module, abc.ABC):
    """The prior p(z): ``prior(*context)`` is a distribution over z.

    A new one needs a `forward`; batch shape is ``()``, or the data's where it depends on
    the context, and event shape ``(latent,)``.
    """

    @abc.abstractmethod
    def forward(self, *context: Tensor) -> Distribution:
        """Return p(z), or p(z|context)."""


class Normal(Prior):
    """Diagonal Gaussian ``p(z) = N(z; loc, diag scale^2)``, standard unless learned.

    Args:
        latent: Size of z.
        learned: Whether location and scale are parameters, beginning at 0 and 1.

    Example:
        >>> Normal(20)().log_prob(torch.zeros(20))
        tensor(-18.3788)
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latent: int, *, learned: bool = False) -> None:
        super().__init__()
        _check(latent)
        for name in ("loc", "log_scale"):
            value = torch.zeros(latent)
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class Laplace(Prior):
    """Independent Laplace, ``p(z) = prod_i Laplace(z_i; 0, scale)``, which favours sparse codes.

    Args:
        latent: Size of z.
        scale: Scale of each dimension.

    Raises:
        ValueError: No latents, or a scale that is not positive.

    Example:
        >>> Laplace(2)().log_prob(torch.zeros(2))
        tensor(-1.3863)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int, *, scale: float = 1.0) -> None:
        super().__init__()
        _check(latent, scale=scale)
        self.register_buffer("loc", torch.zeros(latent))
        self.register_buffer("scale", torch.full([latent], float(scale)))

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return dist.Laplace(self.loc, self.scale).to_event(1)


class StudentT(Prior):
    """Independent Student's t, ``p(z) = prod_i t(z_i; df, 0, scale)``, with heavy tails.

    Args:
        latent: Size of z.
        df: Degrees of freedom.
        scale: Scale of each dimension.

    Raises:
        ValueError: No latents, or `df` or a scale that are not positive.

    Example:
        >>> StudentT(2, df=1.0)().log_prob(torch.zeros(2))  # two Cauchys
        tensor(-2.2895)
    """

    df: Tensor
    scale: Tensor

    def __init__(self, latent: int, *, df: float = 5.0, scale: float = 1.0) -> None:
        super().__init__()
        _check(latent, df=df, scale=scale)
        self.register_buffer("df", torch.full([latent], float(df)))
        self.register_buffer("scale", torch.full([latent], float(scale)))

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return dist.StudentT(self.df, torch.zeros_like(self.scale), self.scale).to_event(1)


class MixtureOfNormals(Prior):
    """Learned mixture of diagonal Gaussians, ``p(z) = sum_k w_k N(z; m_k, diag s_k^2)``.

    Locations start at draws of a standard normal, scales at 1 and weights equal. The
    mixture of Dilokthanakul et al. (2016), Deep Unsupervised Clustering with Gaussian
    Mixture VAEs, with the component summed out.

    Args:
        latent: Size of z.
        components: Number of Gaussians K.

    Raises:
        ValueError: No latents or no components.

    Example:
        >>> MixtureOfNormals(2, components=10)().sample().shape
        torch.Size([2])
    """

    def __init__(self, latent: int, *, components: int = 10) -> None:
        super().__init__()
        _check(latent, components=components)
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))
        self.logits = nn.Parameter(torch.zeros(components))

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return _Mixture(
            dist.Categorical(logits=self.logits),
            dist.Normal(self.loc, self.log_scale.exp()).to_event(1),
        )


class Flow(Prior):
    """Normalising flow ``p(z) = N(f(z); 0, I) |det df/dz|``, a neural spline flow of zuko's.

    Durkan et al. (2019), Neural Spline Flows. Any other of zuko's flows is a prior as it is:
    ``VAE(prior=zuko.flows.MAF(20), ...)``.

    Args:
        latent: Size of z.
        transforms: Number of autoregressive transformations.
        hidden: Widths of the hidden layers of each.

    Raises:
        ValueError: No latents or no transformations.

    Example:
        >>> Flow(2, transforms=1)().sample().shape
        torch.Size([2])
    """

    def __init__(
        self, latent: int, *, transforms: int = 3, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        _check(latent, transforms=transforms)
        self.flow = _zuko().NSF(latent, transforms=transforms, hidden_features=list(hidden))

    @override
    def forward(self, *context: Tensor) -> Distribution:
        flow: Distribution = self.flow()
        return flow


class _Mixture(dist.MixtureSameFamily):
    """A mixture over real vectors, whose support NUTS can transform."""

    support = constraints.real_vector


def _zuko() -> Any:
    """The flows of zuko, imported without the global validation that it switches off."""
    before = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(before)
    return zuko.flows


def _check(latent: int, **sizes: float) -> None:
    """Refuse sizes that are not positive."""
    if latent < 1:
        raise ValueError(f"a latent vector has at least 1 dimension, not {latent}")
    for name, size in sizes.items():
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"the {name} of a prior must be positive and finite, not {size}")
