"""Likelihoods p(x|z): modules whose call returns a distribution over one datum."""

from __future__ import annotations

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "Laplace",
    "Likelihood",
    "Normal",
    "StudentT",
]

import abc
import math
from typing import Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from typing_extensions import override

# Where learned scales begin, above their floor. While a scale is much wider than the noise,
# x says little about z, and the KL switches the latents off before the scale has come down.
_START = 0.1


@runtime_checkable
class SetsBias(Protocol):
    """A decoder whose output bias can be set."""

    def set_bias(self, value: Tensor) -> None:
        """Set the output's bias to `value`, of the output's shape."""


class Likelihood(nn.Module, abc.ABC):
    """The decoder's distribution p(x|z): ``likelihood(z, *context)`` is over x.

    A new one needs a `forward`; batch shape is that of z without its last dimension,
    event shape the natural shape of one datum.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., *outputs(shape))``.

    Attributes:
        unit: Unit of the score, to print beside it.
    """

    unit = "nats"

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.network = decoder

    @classmethod
    def outputs(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the decoder's output for data of shape `shape`."""
        return shape

    @abc.abstractmethod
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        """Return p(x|z) for latents ``(..., latent)`` and whatever else each datum brings."""

    def link(self, mean: Tensor) -> Tensor:
        """Return the decoder's output at which p(x|z) has this `mean`; optional.

        Raises:
            TypeError: The class does not define it.
        """
        raise TypeError(f"{type(self).__name__} defines no `link` from a mean to its decoder")

    def centre(self, mean: Tensor) -> None:
        """Set the decoder's output bias so that p(x|z) starts near the data's `mean`.

        Raises:
            TypeError: The decoder has no ``set_bias``, or the likelihood no `link`.
        """
        if not isinstance(self.network, SetsBias):
            raise TypeError(f"a {type(self.network).__name__} decoder has no method set_bias")
        self.network.set_bias(self.link(mean))


class Bernoulli(Likelihood):
    """Binary data, ``p(x|z) = prod_d y_d(z)^x_d (1 - y_d(z))^(1 - x_d)``, y a sigmoid.

    Equation 11 of Auto-Encoding Variational Bayes (Kingma & Welling, 2013).

    Args:
        decoder: Network from ``(..., latent)`` to logits ``(..., *shape)``.
        greyscale: Accept any x in [0, 1]. The score is then minus a cross-entropy in nats
            and no log-likelihood: for comparison with code that trains that way.

    Example:
        >>> likelihood = Bernoulli(nn.Linear(2, 6))
        >>> likelihood(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module, *, greyscale: bool = False) -> None:
        super().__init__(decoder)
        self.greyscale = greyscale
        if greyscale:
            self.unit = "nats, cross-entropy of grey levels and not a likelihood"

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        logits = self.network(z, *context)
        family = GreyscaleBernoulli if self.greyscale else dist.Bernoulli
        return family(logits=logits).to_event(logits.dim() - z.dim() + 1)

    @override
    def link(self, mean: Tensor) -> Tensor:
        return mean.clamp(1e-3, 1 - 1e-3).logit()


class Normal(Likelihood):
    """Real data, ``p(x|z) = N(x; m(z), scale^2)`` with independent elements.

    A learned scale is ``floor + exp(log_scale)``, since a density without a floor is
    unbounded as soon as one element of the data is constant. It begins at ``floor + 0.1``, or
    with `per_element` near ``floor + 1``.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., *shape)``, or with `per_element`
            to ``(..., 2, *shape)``.
        scale: Fixed scale in the data's units; learned, one for all, where it is left out.
        per_element: Let the decoder give every element of every datum its scale, as in
            equation 12 of Auto-Encoding Variational Bayes (Kingma & Welling, 2013).
        bounded: Squash the mean into (0, 1) by a sigmoid, as there for Frey Face.
        floor: Smallest learned scale.

    Example:
        >>> likelihood = Normal(nn.Linear(2, 6), scale=0.1)
        >>> likelihood(torch.zeros(5, 2)).stddev.unique()
        tensor([0.1000])
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        scale: float | None = None,
        per_element: bool = False,
        bounded: bool = False,
        floor: float = 0.01,
    ) -> None:
        super().__init__(decoder)
        if scale is not None and per_element:
            raise ValueError("Normal takes a fixed scale or per_element=True, not both")
        self.scale = None if scale is None else _positive(scale, "scale of a Normal")
        self.per_element, self.bounded = per_element, bounded
        self.floor = _positive(floor, "floor of a scale")
        if scale is None and not per_element:
            self.log_scale = nn.Parameter(torch.tensor(_START).log())

    @override
    @classmethod
    def outputs(cls, shape: tuple[int, ...], *, per_element: bool = False) -> tuple[int, ...]:
        return (2, *shape) if per_element else shape

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        output = self.network(z, *context)
        if self.per_element:
            loc, log_scale = output.unbind(z.dim() - 1)
            scale = self.floor + log_scale.exp()
        else:
            loc = output
            scale = self.floor + self.log_scale.exp() if self.scale is None else self.scale
        loc = loc.sigmoid() if self.bounded else loc
        return dist.Normal(loc, scale).to_event(loc.dim() - z.dim() + 1)

    @override
    def link(self, mean: Tensor) -> Tensor:
        loc = mean.clamp(1e-3, 1 - 1e-3).logit() if self.bounded else mean
        return torch.stack([loc, torch.zeros_like(loc)]) if self.per_element else loc


class ContinuousBernoulli(Likelihood):
    """Values in [0, 1], ``p(x|z) = prod_d C(y_d) y_d(z)^x_d (1 - y_d(z))^(1 - x_d)``.

    The normalised density that a Bernoulli on grey levels lacks: Loaiza-Ganem & Cunningham
    (2019), The Continuous Bernoulli.

    Args:
        decoder: Network from ``(..., latent)`` to logits ``(..., *shape)``.

    Example:
        >>> ContinuousBernoulli(nn.Linear(2, 6))(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        logits = self.network(z, *context)
        return dist.ContinuousBernoulli(logits=logits).to_event(logits.dim() - z.dim() + 1)


class Laplace(Likelihood):
    """Real data, ``p(x|z) = Laplace(x; m(z), scale)``, whose score is an absolute error.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., *shape)``.
        floor: Smallest scale; one scale for all elements is learned above it.
        bounded: Squash the location into (0, 1) by a sigmoid.

    Raises:
        ValueError: A floor that is not positive.

    Example:
        >>> Laplace(nn.Linear(2, 6), floor=0.5)(torch.zeros(5, 2)).base_dist.scale.unique()
        tensor([0.6000], grad_fn=<Unique2Backward0>)
    """

    def __init__(self, decoder: nn.Module, *, floor: float = 0.01, bounded: bool = False) -> None:
        super().__init__(decoder)
        self.floor, self.bounded = _positive(floor, "floor of a scale"), bounded
        self.log_scale = nn.Parameter(torch.tensor(_START).log())

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        loc = self.network(z, *context)
        loc = loc.sigmoid() if self.bounded else loc
        noise = dist.Laplace(loc, self.floor + self.log_scale.exp())
        return noise.to_event(loc.dim() - z.dim() + 1)

    @override
    def link(self, mean: Tensor) -> Tensor:
        return mean.clamp(1e-3, 1 - 1e-3).logit() if self.bounded else mean


class StudentT(Likelihood):
    """Real data with outliers, ``p(x|z) = t(x; df, m(z), scale)``, Student's t.

    Takahashi et al. (2018), Student-t Variational Autoencoder for Robust Density Estimation.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., *shape)``.
        df: Degrees of freedom; the mean exists above 1.
        floor: Smallest scale; one scale for all elements is learned above it.

    Raises:
        ValueError: `df` or a floor that are not positive.

    Example:
        >>> StudentT(nn.Linear(2, 6), df=3.0)(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module, *, df: float = 5.0, floor: float = 0.01) -> None:
        super().__init__(decoder)
        self.df, self.floor = _positive(df, "df"), _positive(floor, "floor of a scale")
        self.log_scale = nn.Parameter(torch.tensor(_START).log())

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        loc = self.network(z, *context)
        noise = dist.StudentT(self.df, loc, self.floor + self.log_scale.exp())
        return noise.to_event(loc.dim() - z.dim() + 1)

    @override
    def link(self, mean: Tensor) -> Tensor:
        return mean


class GreyscaleBernoulli(dist.Bernoulli):
    """A Bernoulli that scores any x in [0, 1] by ``x log y + (1 - x) log(1 - y)``."""

    support = constraints.unit_interval


def _positive(value: float, name: str) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"the {name} must be positive and finite, not {value}")
    return value
