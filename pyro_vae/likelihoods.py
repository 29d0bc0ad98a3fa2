"""Likelihoods p(x|z): modules whose call returns a distribution over one datum."""

from __future__ import annotations

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Laplace",
    "Likelihood",
    "Missing",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]

import abc
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from typing_extensions import override

from pyro_vae import distributions as laws

# Where learned scales begin, above their floor. While a scale is much wider than the noise,
# x says little about z, and the KL switches the latents off before the scale has come down.
_START = 0.1

# Where a decoder begins that is centred at a mean count of 0, whose logarithm is minus infinity.
_RARE = 1e-4

_NO_SIZE = (
    "a {} with a size factor takes it as its last context (N, 1), and got none: give batches "
    "(x, *context, size), or size_factor=False"
)


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

    @classmethod
    def features(cls, context: int) -> int:
        """Number of context features that the decoder takes, of `context` in all."""
        return context

    @staticmethod
    def encoded(x: Tensor) -> Tensor:
        """Return data as an encoder should see them: on a scale around 1, none missing."""
        return x

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
        family = laws.GreyscaleBernoulli if self.greyscale else laws.Bernoulli
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
            _check_width(self, output, z, 2, "per_element=True")
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
        return laws.ContinuousBernoulli(logits).to_event(logits.dim() - z.dim() + 1)


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


class Categorical(Likelihood):
    """Grey levels ``0, ..., K - 1``, ``p(x|z) = prod_d softmax(f_d(z))[x_d]``, in no order.

    Van den Oord et al. (2016), Pixel Recurrent Neural Networks, section 2.2.

    Args:
        decoder: Network from ``(..., latent)`` to logits ``(..., levels, *shape)``.
        levels: Number of levels K.

    Raises:
        ValueError: Fewer than two levels.

    Example:
        >>> likelihood = Categorical(nn.Unflatten(-1, (4, 3)), levels=4)
        >>> likelihood(torch.zeros(5, 12)).mean[0]
        tensor([1.5000, 1.5000, 1.5000])
    """

    def __init__(self, decoder: nn.Module, *, levels: int = 256) -> None:
        super().__init__(decoder)
        if levels < 2:
            raise ValueError(f"a Categorical has at least 2 levels, not {levels}")
        self.levels = levels

    @classmethod
    @override
    def outputs(cls, shape: tuple[int, ...], *, levels: int = 256) -> tuple[int, ...]:
        return (levels, *shape)

    @staticmethod
    @override
    def encoded(x: Tensor) -> Tensor:
        return _centred(x)

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        output = self.network(z, *context)
        _check_width(self, output, z, self.levels, f"levels={self.levels}")
        logits = output.movedim(z.dim() - 1, -1)
        return laws.Categorical(logits=logits).to_event(logits.dim() - z.dim())


class DiscretizedLogistic(Likelihood):
    """Grey levels 0 to 255, ``P(k) = sigma((k + 1/2 - m) / s) - sigma((k - 1/2 - m) / s)``.

    A logistic variable rounded, its tails counted to the levels 0 and 255; a decoder output
    of 0 is the location 127.5, and of 1 half the range more. Equations 1 and 2 of
    Salimans et al. (2017), PixelCNN++, each element on its own.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., 2, *shape)``, locations and log
            scales, these in tenths of half the range, or to ``(..., 3 * components, *shape)``:
            logits of the mixture, locations and log scales.
        components: Number of logistics mixed in each element.

    Raises:
        ValueError: No components.

    Example:
        >>> likelihood = DiscretizedLogistic(nn.Unflatten(-1, (2, 3)))
        >>> likelihood(torch.zeros(5, 6)).mean[0]
        tensor([127.5000, 127.5000, 127.5000])
    """

    def __init__(self, decoder: nn.Module, *, components: int = 1) -> None:
        super().__init__(decoder)
        if components < 1:
            raise ValueError(f"a DiscretizedLogistic has at least 1 component, not {components}")
        self.components = components

    @classmethod
    @override
    def outputs(cls, shape: tuple[int, ...], *, components: int = 1) -> tuple[int, ...]:
        return (2 if components == 1 else 3 * components, *shape)

    @staticmethod
    @override
    def encoded(x: Tensor) -> Tensor:
        return _centred(x)

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        output, axis = self.network(z, *context), z.dim() - 1
        width = self.outputs((), components=self.components)[0]
        _check_width(self, output, z, width, f"components={self.components}")
        if self.components == 1:
            law = _logistic(*output.unbind(axis))
        else:
            grouped = output.unflatten(axis, (3, self.components)).movedim(axis + 1, -1)
            logits, loc, log_scale = grouped.unbind(axis)
            law = laws.DiscretizedLogisticMixture(
                dist.Categorical(logits=logits), _logistic(loc, log_scale)
            )
        return law.to_event(output.dim() - z.dim())

    @override
    def link(self, mean: Tensor) -> Tensor:
        if self.components > 1:
            return super().link(mean)
        # Near the edges approximate, where the tail that is cut off pulls the mean inwards.
        return torch.stack([_centred(mean), torch.zeros_like(mean)])


class _Counts(Likelihood, abc.ABC):
    """Counts whose log mean a decoder gives, with a size factor for each datum or without."""

    def __init__(self, decoder: nn.Module, *, size_factor: bool = False) -> None:
        super().__init__(decoder)
        self.size_factor = size_factor

    @classmethod
    @override
    def features(cls, context: int, *, size_factor: bool = False) -> int:
        if size_factor and context < 1:
            raise ValueError(_NO_SIZE.format(cls.__name__))
        return context - size_factor

    @staticmethod
    @override
    def encoded(x: Tensor) -> Tensor:
        return x.log1p()

    @override
    def link(self, mean: Tensor) -> Tensor:
        if self.size_factor:
            raise TypeError(
                f"a {type(self).__name__} with a size factor defines no `link`, since the mean "
                f"depends on the size: set the decoder's bias to the logarithm of the mean of x / "
                f"size"
            )
        return mean.clamp(min=_RARE).log()

    def _decoded(self, z: Tensor, context: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
        """The decoder's output, and the log size that its log mean ``(..., *shape)`` is due."""
        if not self.size_factor:
            return self.network(z, *context), 0.0
        name = type(self).__name__
        if not context:
            raise ValueError(_NO_SIZE.format(name))
        *others, size = context
        if size.shape[-1:] != (1,):
            raise ValueError(
                f"a {name} with a size factor takes it as its last context (N, 1), and got "
                f"{tuple(size.shape)}: give the size factor after any other context"
            )
        output = self.network(z, *others)
        # A size of 0 would give an empty datum probability 1. No branch: the density becomes NaN.
        log_size = torch.where(size > 0, size, math.nan).log()
        event = output.dim() - (z.dim() - 1) - len(self.outputs(()))
        return output, log_size[(..., *[None] * (event - 1))]


class Poisson(_Counts):
    """Counts, ``p(x|z) = prod_d Poisson(x_d; l exp f_d(z))``, l a size factor or 1.

    Args:
        decoder: Network from ``(..., latent)`` to log means ``(..., *shape)``.
        size_factor: Take the last context ``(N, 1)``, positive, as the size factor of each
            datum. It multiplies the mean, and the decoder gets the other contexts.

    Raises:
        ValueError: At a call, where the size factor is missing or of another shape.

    Example:
        >>> likelihood = Poisson(nn.Linear(2, 6), size_factor=True)
        >>> likelihood(torch.zeros(5, 2), torch.ones(5, 1)).sample().shape
        torch.Size([5, 6])
    """

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        output, log_size = self._decoded(z, context)
        log_mean = output + log_size
        # A mean that underflows to 0 would make the gradient NaN.
        rate = log_mean.exp().clamp(min=torch.finfo(log_mean.dtype).tiny)
        return dist.Poisson(rate).to_event(rate.dim() - z.dim() + 1)


class NegativeBinomial(_Counts):
    """Overdispersed counts of mean ``m = l exp f(z)`` and variance ``m + m^2 / theta``.

    l is a size factor or 1, and theta learned for each element, beginning at 1. Lopez et al.
    (2018), Deep Generative Modeling for Single-Cell Transcriptomics, without zero inflation and
    with an exponential where they have a softmax.

    Args:
        decoder: Network from ``(..., latent)`` to log means ``(..., *shape)``.
        shape: Shape of one datum, ``(2000,)`` or ``2000``.
        size_factor: Take the last context as the size factor, as in `Poisson`.

    Raises:
        ValueError: At a call, where the size factor is missing or of another shape.

    Example:
        >>> NegativeBinomial(nn.Linear(2, 6), 6)(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    def __init__(
        self, decoder: nn.Module, shape: int | Sequence[int], *, size_factor: bool = False
    ) -> None:
        super().__init__(decoder, size_factor=size_factor)
        self.log_dispersion = nn.Parameter(torch.zeros(shape))

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        output, log_size = self._decoded(z, context)
        law = _negative_binomial(self, output + log_size, self.log_dispersion, z)
        return law.to_event(output.dim() - z.dim() + 1)


class ZeroInflatedNegativeBinomial(_Counts):
    """Counts that are 0 with probability g(z), and otherwise those of a `NegativeBinomial`.

    ``p(x|z) = prod_d g_d(z) [x_d = 0] + (1 - g_d(z)) NB(x_d; l exp f_d(z), theta_d)``, with
    the mean ``(1 - g) l exp f``: Lopez et al. (2018), Deep Generative Modeling for
    Single-Cell Transcriptomics.

    Args:
        decoder: Network from ``(..., latent)`` to ``(..., 2, *shape)``: f, and the logit of g.
        shape: Shape of one datum, ``(2000,)`` or ``2000``.
        size_factor: Take the last context as the size factor, as in `Poisson`.

    Raises:
        ValueError: At a call, where the size factor is missing or of another shape.

    Example:
        >>> likelihood = ZeroInflatedNegativeBinomial(nn.Unflatten(-1, (2, 3)), 3)
        >>> likelihood(torch.zeros(5, 6)).mean[0]
        tensor([0.5000, 0.5000, 0.5000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self, decoder: nn.Module, shape: int | Sequence[int], *, size_factor: bool = False
    ) -> None:
        super().__init__(decoder, size_factor=size_factor)
        self.log_dispersion = nn.Parameter(torch.zeros(shape))

    @classmethod
    @override
    def outputs(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2, *shape)

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        decoded, log_size = self._decoded(z, context)
        _check_width(self, decoded, z, 2)
        output, gate = decoded.unbind(z.dim() - 1)
        law = _negative_binomial(self, output + log_size, self.log_dispersion, z)
        inflated = laws.ZeroInflatedNegativeBinomial(law, gate_logits=gate)
        return inflated.to_event(output.dim() - z.dim() + 1)

    @override
    def link(self, mean: Tensor) -> Tensor:
        log_mean = super().link(2 * mean)  # since half of all counts begin as extra zeros
        return torch.stack([log_mean, torch.zeros_like(log_mean)])


class Multinomial(Likelihood):
    """Bags of words, ``p(x|z) = n! / prod_d x_d! prod_d softmax(f(z))_d^x_d``, n = sum_d x_d.

    x counts the words of a document, whose length n is taken as given. The decoder of Miao
    et al. (2016), Neural Variational Inference for Text Processing, with its coefficient.

    Args:
        decoder: Network from ``(..., latent)`` to logits ``(..., words)``.
        length: Number of words in what is drawn, and in the mean.

    Raises:
        ValueError: A length below 1; at a call, logits that are no vectors.

    Example:
        >>> likelihood = Multinomial(nn.Linear(2, 3), length=10)
        >>> likelihood(torch.zeros(5, 2)).sample().sum(-1)
        tensor([10., 10., 10., 10., 10.])
    """

    def __init__(self, decoder: nn.Module, *, length: int = 100) -> None:
        super().__init__(decoder)
        if length < 1:
            raise ValueError(f"a document has at least 1 word, not {length}")
        self.length = length

    @staticmethod
    @override
    def encoded(x: Tensor) -> Tensor:
        return x.log1p()

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        logits = self.network(z, *context)
        if logits.dim() != z.dim():
            raise ValueError(
                f"a Multinomial is over one vector of counts, and its decoder gives logits of "
                f"shape {tuple(logits.shape[z.dim() - 1 :])}: flatten the data"
            )
        return laws.Multinomial(self.length, logits=logits)

    @override
    def link(self, mean: Tensor) -> Tensor:
        return mean.clamp(min=_RARE).log()


class Missing(Likelihood):
    """Any likelihood of independent elements, ``p(x_obs|z)``, where x is NaN if missing.

    What is missing is summed out, which for independent elements is to leave it out: Mattei
    & Frellsen (2019), MIWAE, section 2. Draws and means are those of complete data. Encoders
    see 0 for what is missing; `networks.fill` as their transform adds the mask.

    Args:
        likelihood: Likelihood of complete data, whose decoder is `network` here too.
        fill: A value in its support, which takes the place of NaN and is not scored.

    Raises:
        ValueError: A fill that is not finite.
        TypeError: At a call, where the elements of x are not independent.

    Example:
        >>> likelihood = Missing(Normal(nn.Identity(), scale=1.0))
        >>> x = torch.tensor([0.0, float("nan"), float("nan")])
        >>> likelihood(torch.zeros(3)).log_prob(x)  # of one standard normal
        tensor(-0.9189)
    """

    def __init__(self, likelihood: Likelihood, *, fill: float = 0.0) -> None:
        # Not Likelihood's own: the decoder is registered in the likelihood, once.
        nn.Module.__init__(self)
        if not math.isfinite(fill):
            raise ValueError(f"the value that fills the place of NaN is finite, not {fill}")
        self.likelihood, self.fill, self.unit = likelihood, fill, likelihood.unit

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The decoder of the likelihood."""
        return self.likelihood.network

    @staticmethod
    @override
    def encoded(x: Tensor) -> Tensor:
        return x.masked_fill(x.isnan(), 0.0)

    @override
    def forward(self, z: Tensor, *context: Tensor) -> Distribution:
        law: Any = self.likelihood(z, *context)
        dims = len(law.event_shape)
        while isinstance(law, Independent):
            law = law.base_dist
        if law.event_shape:
            raise TypeError(
                f"Missing leaves out single elements, and those of a {type(law).__name__} are not "
                f"independent given z: choose a likelihood whose elements are"
            )
        return laws.Observed(law, self.fill).to_event(dims)

    @override
    def link(self, mean: Tensor) -> Tensor:
        return self.likelihood.link(mean)

    @override
    def centre(self, mean: Tensor) -> None:
        self.likelihood.centre(mean)


def _centred(levels: Tensor) -> Tensor:
    """Grey levels 0 to 255 on a scale from -1 to 1."""
    return levels / 127.5 - 1


def _logistic(loc: Tensor, log_scale: Tensor) -> laws.DiscretizedLogistic:
    # Half the range times exp(-7), the floor of PixelCNN++, is 0.12 levels: at the centre of a
    # level it leaves 97 % there, so less could gain 0.03 nats, and cost a steeper slope. Above
    # the ceiling less than 1 % lies between the edges, and exp would soon overflow.
    scale = math.exp(-7) + _START * log_scale.clamp(max=7.0).exp()
    return laws.DiscretizedLogistic(127.5 * (1 + loc), 127.5 * scale)


def _positive(value: float, name: str) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"the {name} must be positive and finite, not {value}")
    return value


def _negative_binomial(
    part: Likelihood, log_mean: Tensor, log_dispersion: Tensor, z: Tensor
) -> laws.NegativeBinomial:
    shape = tuple(log_mean.shape[z.dim() - 1 :])
    if shape != tuple(log_dispersion.shape):
        raise ValueError(
            f"a {type(part).__name__} has a dispersion for each element of data of shape "
            f"{tuple(log_dispersion.shape)}, and its decoder gives log means of shape {shape}: "
            f"give both the shape of one datum"
        )
    return laws.NegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)


def _check_width(
    part: Likelihood, output: Tensor, z: Tensor, width: int, options: str = ""
) -> None:
    """A decoder gives as many parameters of each element as its likelihood takes."""
    shape = tuple(output.shape[z.dim() - 1 :])
    if shape[:1] != (width,):
        name, options = type(part).__name__, options and f", {options}"
        raise ValueError(
            f"a {name} takes ({width}, *shape) for each datum from its decoder, and got {shape}: "
            f"make the decoder's output of shape {name}.outputs(shape{options})"
        )
