"""Priors p(z): modules whose call returns a distribution over one latent vector."""

from __future__ import annotations

__all__ = ["Flow", "Laplace", "MixtureOfNormals", "Normal", "Prior", "StudentT", "VampPrior"]

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from typing_extensions import Self, override

from pyro_vae import distributions as laws
from pyro_vae.flows import zuko

_State = tuple[list[Any], list[Tensor]]  # settings and weights of a posterior


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
        _whole(components=components)
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))
        self.logits = nn.Parameter(torch.zeros(components))

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return laws.Mixture(
            dist.Categorical(logits=self.logits),
            dist.Normal(self.loc, self.log_scale.exp()).to_event(1),
        )


class VampPrior(Prior):
    """Mixture of the posterior at learned pseudo-inputs, ``p(z) = 1/K sum_k q(z|u_k)``.

    Tomczak & Welling (2018), VAE with a VampPrior, equation 9. The pseudo-inputs begin at
    training data drawn at random and are reflected at the ends of the range of these, where
    binary ones begin: clamped, they would have no gradient beyond. They pass the encoder as in
    evaluation, so that batch normalisation keeps its statistics and dropout rests. A draw takes
    a component at random, and then z from it. The encoder's weights belong to the posterior and
    are not registered here a second time.

    Args:
        posterior: The posterior of the same VAE, without context.
        data: Training values ``(N, *shape)`` as they are scored, ``data.train.batch()[0]``.
        components: Number K of pseudo-inputs.

    Attributes:
        pseudo_inputs: The pseudo-inputs ``(K, *shape)``, parameters.

    Raises:
        ValueError: No components, or data that are bytes or that the posterior does not take.

    Example:
        >>> from pyro_vae import MLP, posteriors
        >>> posterior = posteriors.Normal(MLP(9, [8], (2, 3)))
        >>> VampPrior(posterior, torch.rand(100, 9), components=10)().sample().shape
        torch.Size([3])
    """

    low: Tensor
    high: Tensor

    def __init__(self, posterior: nn.Module, data: Tensor, *, components: int = 500) -> None:
        super().__init__()
        _check(1, components=components)
        _whole(components=components)
        if data.dtype == torch.uint8:
            raise ValueError(
                "a VampPrior takes data as they are scored, and these are bytes: give it floats, "
                "such as data.train.batch()[0]"
            )
        few = components > len(data)
        rows = torch.randint(len(data), [components]) if few else torch.randperm(len(data))
        values = data[rows[:components].to(data.device)].clone().nan_to_num()
        self.pseudo_inputs = nn.Parameter(values.to(torch.get_default_dtype()))
        self.register_buffer("low", self.pseudo_inputs.detach().min())
        self.register_buffer("high", self.pseudo_inputs.detach().max())
        self._posterior = (posterior,)  # within a tuple, so that it is no submodule of this one
        self._encoded: tuple[_State, Distribution] | None = None
        try:
            with torch.no_grad():
                self._encode(self.pseudo_inputs[:2])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the posterior takes no pseudo-inputs of shape {tuple(data.shape[1:])}: {error}"
            ) from error

    @property
    def posterior(self) -> nn.Module:
        """The posterior whose mixture this is."""
        return self._posterior[0]

    @override
    def forward(self, *context: Tensor) -> Distribution:
        if context:
            raise ValueError(
                "a VampPrior has no context for its pseudo-inputs: leave the context away, or "
                "choose another prior"
            )
        return laws.Aggregate(self._components(), self._draw)

    def _components(self) -> Distribution:
        """The laws q(z|u_k), kept in evaluation until a weight or a setting changes."""
        if self.training or torch.is_grad_enabled() or get_proxy_mode():  # captured, not kept
            return self._encode(self.pseudo_inputs)
        own = self.pseudo_inputs, self.low, self.high
        weights = chain(self.posterior.parameters(), self.posterior.buffers(), own)
        # By their values, since what is written through `.data` leaves no trace. To compare them
        # takes an eighth of the time of encoding, for 500 components and 400 hidden units.
        state = _settings(self.posterior), [weight.detach() for weight in weights]
        if self._encoded is None or not _alike(self._encoded[0], state):
            kept = state[0], [weight.clone() for weight in state[1]]
            self._encoded = kept, self._encode(self.pseudo_inputs)
        return self._encoded[1]

    def _draw(self, components: Tensor) -> Tensor:
        return self._encode(self.pseudo_inputs[components]).sample()

    def _encode(self, x: Tensor) -> Distribution:
        inside = torch.where(x > self.high, 2 * self.high - x, x)
        inside = torch.where(inside < self.low, 2 * self.low - inside, inside)
        with _resting(self.posterior):
            law: Distribution = self.posterior(inside.clamp(self.low, self.high))
            return law

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # To another precision or device prior and posterior can only go together.
        self.posterior._apply(fn)
        return super()._apply(fn, recurse)


class Flow(Prior):
    """Normalising flow ``p(z) = N(f(z); 0, I) |det df/dz|``, a neural spline flow of zuko's.

    Durkan et al. (2019), Neural Spline Flows. Any other of zuko's flows is a prior as it is:
    ``VAE(prior=zuko.flows.MAF(20), ...)``.

    Args:
        latent: Size of z.
        context: Number of context features that f depends on, for p(z|context); at 0 the
            prior is one for all data.
        transforms: Number of autoregressive transformations.
        hidden: Widths of the hidden layers of each.

    Raises:
        ValueError: No latents, no transformations or a negative number of context features.

    Example:
        >>> Flow(2, transforms=1)().sample().shape
        torch.Size([2])
        >>> Flow(2, context=3)(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        latent: int,
        *,
        context: int = 0,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        _check(latent, transforms=transforms)
        _whole(transforms=transforms, context=context)
        if context < 0:
            raise ValueError(f"the context of a Flow prior has at least 0 features, not {context}")
        self.context = context
        self.flow = zuko().flows.NSF(
            latent, context, transforms=transforms, hidden_features=list(hidden)
        )

    @override
    def forward(self, *context: Tensor) -> Distribution:
        flow: Distribution
        if not self.context:
            flow = self.flow()
            return flow
        given = sum(c.shape[-1] for c in context)
        if given != self.context:
            raise ValueError(
                f"a Flow prior with context={self.context} was given {given} context features"
            )
        batch = torch.broadcast_shapes(*(c.shape[:-1] for c in context))
        flow = self.flow(torch.cat([c.expand(*batch, -1) for c in context], -1))
        return flow


def _settings(module: nn.Module) -> list[Any]:
    """The modules within one, and their numbers, such as the slope of an activation."""
    modules = list(module.modules())
    values = [(name, value) for each in modules for name, value in vars(each).items()]
    plain = [(n, v) for n, v in values if n != "training" and isinstance(v, (int, float, str))]
    return [*modules, *plain]


def _alike(one: _State, other: _State) -> bool:
    """Whether two states have the same settings and equal weights."""
    weights = list(zip(one[1], other[1], strict=False))
    return (
        one[0] == other[0]
        and len(one[1]) == len(other[1])
        and all((a.dtype, a.device) == (b.dtype, b.device) for a, b in weights)
        and all(torch.equal(a, b) for a, b in weights)
    )


@contextlib.contextmanager
def _resting(module: nn.Module) -> Iterator[None]:
    """Evaluate a module as in evaluation, whatever the mode of each of its parts."""
    active = [each for each in module.modules() if each.training]
    for each in active:
        each.training = False
    try:
        yield
    finally:
        for each in active:
            each.training = True


def _check(latent: int, **sizes: float) -> None:
    """Refuse sizes that are not positive."""
    if latent < 1:
        raise ValueError(f"a latent vector has at least 1 dimension, not {latent}")
    _whole(latent=latent)
    for name, size in sizes.items():
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"the {name} of a prior must be positive and finite, not {size}")


def _whole(**numbers: int) -> None:
    """Refuse numbers of things that are no integers."""
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"the {name} of a prior must be a whole number, not {number}")
