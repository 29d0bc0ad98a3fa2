"""Distributions over one element or one vector of data, where torch and Pyro have none."""

from __future__ import annotations

__all__ = [
    "Aggregate",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Counts",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "GreyscaleBernoulli",
    "LowRankNormal",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "Observed",
    "OrMissing",
    "ZeroInflatedNegativeBinomial",
]

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints
from typing_extensions import override


class Aggregate(dist.TorchDistribution):
    """Equal mixture of a batch of laws over vectors, one of which is drawn from at a time.

    Args:
        components: The laws, of batch shape ``(K,)``.
        draw: From indices ``(n,)`` of components to a draw of each, ``(n, latent)``.
        batch_shape: Shape of the batch, all alike.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        components: Distribution,
        draw: Callable[[Tensor], Tensor],
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.components, self.draw = components, draw
        super().__init__(torch.Size(batch_shape), components.event_shape, validate_args=False)

    @override
    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Aggregate:
        return Aggregate(self.components, self.draw, batch_shape)

    @override
    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        count = self.components.batch_shape[0]
        return self.draw(torch.randint(count, [shape.numel()])).reshape(shape + self.event_shape)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        count = self.components.batch_shape[0]
        rows = value.reshape(-1, *self.event_shape)
        law = self.components
        if isinstance(law, Independent) and isinstance(law.base_dist, dist.Normal):
            scores = _normal_scores(law.base_dist, rows).logsumexp(-1).to(value)
        else:
            # In parts of 64 MiB, since each row meets every component.
            parts = rows.unsqueeze(-2).split(max(2**24 // (count * self.event_shape[0]), 1))
            scores = torch.cat([law.log_prob(part).logsumexp(-1) for part in parts])
        return scores.reshape(value.shape[:-1]) - math.log(count)


def _normal_scores(law: Any, z: Tensor) -> Tensor:
    """Log-densities ``(M, K)`` of vectors ``(M, latent)`` under K diagonal Gaussians.

    The square is multiplied out, for three matrix products in place of M x K x latent
    differences. Its terms cancel, so that it takes double precision to lose nothing.
    """
    z, loc, precision = z.double(), law.loc.double(), law.scale.double() ** -2
    square = z**2 @ precision.mT - 2 * z @ (loc * precision).mT + (loc**2 * precision).sum(-1)
    normaliser = precision.log().sum(-1) - z.shape[-1] * math.log(2 * math.pi)
    return (normaliser - square) / 2


class Mixture(dist.MixtureSameFamily):
    """A mixture over real vectors, whose support NUTS can transform."""

    support = constraints.real_vector


class Bernoulli(dist.Bernoulli):
    """A Bernoulli whose elements, declared as event, are quick to score without a gradient.

    Where a probability is no number the draw is none either; `torch.bernoulli` would end the
    process on a GPU.
    """

    @override
    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        probs = self.probs.expand(self._extended_shape(torch.Size(sample_shape)))
        drawn = torch.rand(probs.shape, device=probs.device) < probs
        return drawn.to(probs.dtype).where(~probs.isnan(), probs)

    @override
    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        dims = reinterpreted_batch_ndims
        dims = len(self.batch_shape) if dims is None else dims
        return _Bernoullis(self, dims) if dims > 0 else super().to_event(dims)


class _Bernoullis(dist.Independent):
    """Independent Bernoullis, whose log-density takes a logarithm for up to 100 of them at once.

    Of ``log p(x) = sum_d x_d l_d - max(l_d, 0) - log(1 + exp(-|l_d|))`` the last part is what
    costs. Its arguments lie between 1 and 2, so that 100 of them can be multiplied before.
    """

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        logits, dims = self.base_dist.logits, self.reinterpreted_batch_ndims
        few_digits = logits.dtype not in (torch.float32, torch.float64)
        if torch.is_grad_enabled() or few_digits:
            return super().log_prob(value)
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(value)
        logits, value = torch.broadcast_tensors(logits.flatten(-dims), value.flatten(-dims))
        if logits.dim() == 1:
            return _bernoulli_scores(logits, value)
        # In parts of 1 MiB, which stay in the processor's cache between one pass and the next.
        rows = max(2**18 // max(logits[:1].numel(), 1), 1)
        parts = zip(logits.split(rows), value.split(rows), strict=True)
        return torch.cat([_bernoulli_scores(*part) for part in parts])


def _bernoulli_scores(logits: Tensor, value: Tensor) -> Tensor:
    """Log-densities of vectors, the last dimension, summed over their elements."""
    width = logits.shape[-1]
    together = max(count for count in range(1, 101) if width % count == 0)
    # 1 / (1 + exp(-|l|)) lies between 1/2 and 1; passes over memory are what costs here.
    factors = logits.abs().sigmoid_().unflatten(-1, (width // together, together))
    tails = factors.prod(-1).log_().sum(-1)
    return tails - logits.clamp(min=0).addcmul_(value, logits, value=-1).sum(-1)


class GreyscaleBernoulli(Bernoulli):
    """A Bernoulli that scores any x in [0, 1] by ``x log y + (1 - x) log(1 - y)``."""

    support = constraints.unit_interval


class Counts(constraints.Constraint):
    """Vectors of counts that are not all 0."""

    is_discrete, event_dim = True, 1

    @override
    def check(self, value: Tensor) -> Tensor:
        return ((value >= 0) & (value % 1 == 0)).all(-1) & (value > 0).any(-1)

    def __repr__(self) -> str:
        return "vectors of whole numbers from 0, at least one of them positive"


class OrMissing(constraints.Constraint):
    """A support of single elements, or NaN."""

    event_dim = 0

    def __init__(self, complete: constraints.Constraint) -> None:
        self.complete = complete

    @property
    @override
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.complete.is_discrete

    @override
    def check(self, value: Tensor) -> Tensor:
        return value.isnan() | self.complete.check(value)

    def __repr__(self) -> str:
        return f"{self.complete}, or NaN where it is missing"


class Categorical(dist.Categorical):
    """A categorical over numbers 0 to K - 1, so that it has a mean; draws are floats as data."""

    @property
    @override
    def mean(self) -> Tensor:
        return (self.probs * self._levels).sum(-1)

    @property
    @override
    def variance(self) -> Tensor:
        return (self.probs * (self._levels - self.mean[..., None]) ** 2).sum(-1)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self._num_events, device=self.logits.device).to(self.logits)

    @override
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.logits)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        # torch's, since torch.compile cannot follow how Pyro's knows its own enumeration.
        return torch.distributions.Categorical.log_prob(self, value)


class ContinuousBernoulli(dist.TorchDistribution):
    """Values in [0, 1] of density ``l exp(l x) / (exp(l) - 1)``, normalised for every logit l.

    torch's own computes the constant from a probability that is kept away from 0 and 1: in
    single precision its mass is 0.8 at a logit of 20. Here the distance y from the likelier
    edge has density ``a exp(-a y) / (1 - exp(-a))``, a = abs(l), and near l = 0, where that
    cancels, all is a series in l.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    @override
    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ContinuousBernoulli:
        expanded = ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    @override
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        u = torch.rand_like(logits)
        from_edge = torch.where(logits > 0, 1 - u, u).clamp(max=1 - torch.finfo(u.dtype).eps)
        rate = self._rate.expand_as(logits)
        y = -(from_edge * (-rate).expm1()).log1p() / rate
        # log(1 + u (exp(l) - 1)) generates the cumulants of a Bernoulli of probability u.
        v, skew = u * (1 - u), 1 - 2 * u
        near = (u, v / 2, v * skew / 6, v * (1 - 6 * v) / 24, v * skew * (1 - 12 * v) / 120)
        x = torch.where(self._central, _polynomial(logits, near), self._oriented(y))
        return x.clamp(0, 1)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        rate, square = self._rate, self.logits**2
        far = rate.log() - (-(-rate).expm1()).log() - rate * self._oriented(value)
        near = self.logits * (value - 0.5) - square * _polynomial(square, _LOG_SINH)
        return torch.where(self._central, near, far)

    @property
    @override
    def mean(self) -> Tensor:
        far = 1 / self._rate + (-self._rate).exp() / (-self._rate).expm1()
        slope = [2 * (n + 1) * each for n, each in enumerate(_LOG_SINH)]
        near = 0.5 + self.logits * _polynomial(self.logits**2, slope)
        return torch.where(self._central, near, self._oriented(far))

    @property
    @override
    def variance(self) -> Tensor:
        far = self._rate**-2 - (-self._rate).exp() / (-self._rate).expm1() ** 2
        curvature = [2 * (n + 1) * (2 * n + 1) * each for n, each in enumerate(_LOG_SINH)]
        near = _polynomial(self.logits**2, curvature)
        return torch.where(self._central, near, far)

    @property
    def _central(self) -> Tensor:
        return self.logits.abs() < _CENTRAL

    @property
    def _rate(self) -> Tensor:
        # Clamped for the gradient: that of a branch not taken must be finite too.
        return self.logits.abs().clamp(min=_CENTRAL)

    def _oriented(self, x: Tensor) -> Tensor:
        """From x to its distance from the likelier edge, and back."""
        return torch.where(self.logits > 0, 1 - x, x)


# Of log(sinh(l / 2) / (l / 2)) in powers of l^2, from l^2 on. Below the bound less than 1e-12 is
# left out of the density and its gradient, and 1e-6 of draws; above it no more than 1e-6 cancels.
_LOG_SINH = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800)
_CENTRAL = 0.2


def _polynomial(x: Tensor, coefficients: Sequence[Any]) -> Tensor:
    """``c_0 + c_1 x + c_2 x^2 + ...``, by Horner's rule."""
    total = torch.zeros_like(x)
    for each in reversed(coefficients):
        total = total * x + each
    return total


class LowRankNormal(dist.LowRankMultivariateNormal):
    """A Gaussian of low rank that scores in double precision.

    Its quadratic form is the difference of two terms of the size of factor^2 / diagonal, which
    in single precision costs nats where a law is tight and its elements correlate.
    """

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, factor, diagonal = self.loc, self.cov_factor, self.cov_diag
        law = torch.distributions.LowRankMultivariateNormal(
            loc.double(), factor.double(), diagonal.double(), validate_args=False
        )
        score: Tensor = law.log_prob(value.double())
        return score.to(value.dtype)


class DiscretizedLogistic(dist.TorchDistribution):
    """A logistic variable rounded to 0, ..., 255; location and scale are in grey levels."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.integer_interval(0, 255)

    def __init__(self, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @override
    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedLogistic:
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        expanded = DiscretizedLogistic(loc, scale, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    @override
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            loc = self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
            return (loc + self.scale * torch.rand_like(loc).logit()).round().clamp(0, 255)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        upper = nn.functional.logsigmoid((value + 0.5 - self.loc) / self.scale)
        lower = nn.functional.logsigmoid((self.loc - value + 0.5) / self.scale)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)), which nowhere cancels.
        inner = upper + lower + (-(-1 / self.scale).expm1()).log()
        return torch.where(value <= 0, upper, torch.where(value >= 255, lower, inner))

    @property
    @override
    def mean(self) -> Tensor:
        # The sum of P(x > k), level by level: all at once would take 255 times the memory.
        return sum(((self.loc - k - 0.5) / self.scale).sigmoid() for k in range(255))


class DiscretizedLogisticMixture(dist.MixtureSameFamily):
    """A mixture of rounded logistics."""

    support = constraints.integer_interval(0, 255)


class NegativeBinomial(dist.NegativeBinomial):
    """A negative binomial that keeps its digits where theta is large, near a Poisson."""

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        theta, logsigmoid = self.total_count, nn.functional.logsigmoid
        rising = _log_rising(theta, value) - (value + 1).lgamma()
        return rising + theta * logsigmoid(-self.logits) + value * logsigmoid(self.logits)


class ZeroInflatedNegativeBinomial(dist.ZeroInflatedDistribution):
    """Zero inflation by logits. Pyro's own, once it has drawn, scores less exactly by its gate."""

    @property
    @override
    def gate(self) -> Tensor:
        return self.gate_logits.sigmoid()


class Multinomial(dist.Multinomial):
    """A multinomial that scores documents of any length, and draws those of its own."""

    support = Counts()

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        orders = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1)
        return orders + (value * self.logits).sum(-1)


class Observed(dist.TorchDistribution):
    """A law of single elements that scores what was observed; NaN is what was not."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base_dist: Any, fill: float, *, validate_args: bool | None = None) -> None:
        self.base_dist, self.fill = base_dist, fill
        super().__init__(base_dist.batch_shape, validate_args=validate_args)

    @property
    @override
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample

    @constraints.dependent_property
    @override
    def support(self) -> constraints.Constraint:
        return OrMissing(self.base_dist.support)

    @property
    @override
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    @override
    def variance(self) -> Tensor:
        return self.base_dist.variance

    @override
    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Observed:
        expanded = Observed(self.base_dist.expand(batch_shape), self.fill, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    @override
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape))

    @override
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.base_dist.rsample(torch.Size(sample_shape))

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
            if not self.base_dist.support.check(value.new_tensor(self.fill)).all():
                raise ValueError(
                    f"the fill {self.fill:g} of Missing lies outside the support of "
                    f"{type(self.base_dist).__name__}: give a value within it"
                )
        missing = value.isnan()
        # Masking alone gives a finite score, whose gradient is 0 times NaN.
        score = self.base_dist.log_prob(value.masked_fill(missing, self.fill))
        return score.masked_fill(missing, 0.0)


def _log_rising(theta: Tensor, x: Tensor) -> Tensor:
    """``log Gamma(theta + x) - log Gamma(theta)``, by Stirling's series where both are large.

    In single precision their difference is wrong by 0.01 at theta = 10^4, and by 1 at 10^6;
    the series is by less than 1e-13 above 100.
    """
    large = theta.clamp(min=100)
    ratio = x / large

    def remainder(at: Tensor) -> Tensor:
        return 1 / (12 * at) - 1 / (360 * at**3)

    series = (large + x - 0.5) * ratio.log1p() + x * (large.log() - 1)
    series = series + remainder(large + x) - remainder(large)
    return torch.where(theta > 100, series, (theta + x).lgamma() - theta.lgamma())
