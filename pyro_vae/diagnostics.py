"""Diagnostics: what the latents hold, where the bound loses, whether q is calibrated."""

from __future__ import annotations

__all__ = [
    "Calibration",
    "Decomposition",
    "InferenceGap",
    "PredictiveCheck",
    "calibration",
    "decompose",
    "inference_gap",
    "predictive_check",
    "to_arviz",
]

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import scipy
import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.distributions import GreyscaleBernoulli
from pyro_vae.evaluation import bound, log_likelihood
from pyro_vae.gaps import InferenceGap, inference_gap
from pyro_vae.scoring import Batch, Pair, Programs, Rows, at_a_time, joined, whole

_ACTIVE = 0.01  # variance over the data of a unit's mean, above which it is in use
_BINS = 20  # of ranks, in the test of calibration
_ELEMENTS = 2**22  # of latents, each draw against each datum, at a time: 32 MiB


@dataclass(frozen=True)
class Decomposition:
    """The bound of a data set in its parts, means over the data in nats.

    Hoffman & Johnson (2016), ELBO Surgery: ``kl = mutual_information + marginal_kl``, with q(z)
    the mixture of q(z|x) over the N given data, where p(z) is the same for all of them. Chen et
    al. (2018), Isolating Sources of Disentanglement in Variational Autoencoders: ``marginal_kl =
    total_correlation + sum(marginal_dimension_kl)``.

    Attributes:
        reconstruction: ``log p(x|z)``.
        kl: ``KL(q(z|x) || p(z))``.
        mutual_information: Of x and z under q, which is at most log N.
        without_itself: The same with each datum left out of its own mixture, from above.
        marginal_kl: ``KL(q(z) || p(z))``; NaN for a conditional prior.
        log_count: log N.
        dimension_kl: ``KL(q(z_i|x) || p(z_i))`` of each dimension, ``(latent,)``, where both
            factorise and it is known in closed form, later sites given the earlier; else None.
        unit_variance: Variance over the data of the mean of each unit, ``(latent,)``.
        total_correlation: ``KL(q(z) || prod_i q(z_i))``, where there is one site, and q(z|x)
            and the prior factorise; else None.
        marginal_dimension_kl: ``KL(q(z_i) || p(z_i))`` of each dimension, ``(latent,)``,
            likewise; None for a conditional prior.
        conditional: Whether the prior differs between data, as under context. The mutual
            information then counts what the context tells of z, which the prior has too.
    """

    reconstruction: float
    kl: float
    mutual_information: float
    without_itself: float
    marginal_kl: float
    log_count: float
    dimension_kl: Tensor | None
    unit_variance: Tensor
    total_correlation: float | None = None
    marginal_dimension_kl: Tensor | None = None
    conditional: bool = False

    @property
    def rate(self) -> float:
        """The KL, as a rate: nats that z needs."""
        return self.kl

    @property
    def distortion(self) -> float:
        """Minus the reconstruction: nats that x needs once z is known."""
        return -self.reconstruction

    @property
    def active(self) -> int:
        """Number of units whose mean varies over the data by more than 0.01."""
        return int((self.unit_variance > _ACTIVE).sum())

    @property
    def saturated(self) -> bool:
        """Whether mutual information lies within 1 nat of log N, the most it can show."""
        return self.mutual_information > self.log_count - 1

    @property
    def verdict(self) -> str:
        """What that says of posterior collapse, in words."""
        units = f"{self.active} of {len(self.unit_variance)} units are active"
        if self.conditional:
            return (
                f"no verdict: {units}, but the prior differs between data, so that they and the "
                f"mutual information count what it has of the context: look at the KL, "
                f"{self.kl:.2f} nats"
            )
        if self.saturated:
            return (
                f"no verdict: {units}, but the mutual information is within 1 nat of log N = "
                f"{self.log_count:.2f}, so that it, the marginal KL and the total correlation "
                f"need more data"
            )
        carried = f"the latents carry {self.mutual_information:.2f} nats about x"
        if self.active == 0:
            return f"posterior collapse: {units}, and {carried}"
        if self.active < len(self.unit_variance):
            return f"partial collapse: {units}, and {carried}"
        if self.mutual_information < math.log(2):
            return f"near collapse: {units}, but {carried}, less than one bit, log 2 = 0.69"
        return f"no collapse: {units}, and {carried}"

    def summary(self) -> dict[str, float]:
        """All numbers but those of single dimensions."""
        total = self.total_correlation
        correlated = {} if total is None else {"total_correlation": total}
        return {
            **correlated,
            "reconstruction": self.reconstruction,
            "kl": self.kl,
            "mutual_information": self.mutual_information,
            "mutual_information_without_itself": self.without_itself,
            "log_count": self.log_count,
            "marginal_kl": self.marginal_kl,
            "active_units": float(self.active),
            "units": float(len(self.unit_variance)),
        }


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated latents among draws of q, which are uniform if q is the posterior.

    Attributes:
        ranks: ``(simulations, latent + 1)``, each from 0 to `draws`, with ties, as of discrete
            latents, in random order; the last column ranks log p(x,z).
        draws: Draws of q for each simulation.
        alpha: Probability that an exact posterior fails the test, over all columns together.
    """

    ranks: Tensor
    draws: int
    alpha: float

    @property
    def p_values(self) -> Tensor:
        """Of a chi-squared test of uniformity in each column, ``(latent + 1,)``."""
        edges = torch.linspace(0, self.draws + 1, _BINS + 1).round().to(self.ranks)
        expected = edges.diff().double() / (self.draws + 1) * len(self.ranks)
        values = []
        for column in self.ranks.T.contiguous():
            counts = torch.bucketize(column, edges, right=True).sub(1).bincount(minlength=_BINS)
            found = counts.numpy(force=True), expected.numpy(force=True)
            values.append(scipy.stats.chisquare(*found).pvalue)
        return torch.tensor(values, dtype=torch.float64)

    @property
    def passed(self) -> bool:
        """Whether no column is rejected, by Bonferroni. A pass is necessary, not sufficient."""
        return bool(self.p_values.min() > self.alpha / self.ranks.shape[1])


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the data beside those of data sets that the model draws.

    Attributes:
        observed: Value of each statistic on the data.
        replicated: Its values on simulated data sets of the same size, ``(simulations,)`` each.
    """

    observed: dict[str, float]
    replicated: dict[str, Tensor]

    @property
    def p_values(self) -> dict[str, float]:
        """Two-sided tail probabilities of the observed values among the replicated.

        NaN where the observed value or a replicated one is NaN.
        """
        values = {}
        for name, draws in self.replicated.items():
            above = int((draws >= self.observed[name]).sum())
            below = int((draws <= self.observed[name]).sum())
            values[name] = min(1.0, 2 * (min(above, below) + 1) / (len(draws) + 1))
            if math.isnan(self.observed[name]) or draws.isnan().any():
                values[name] = math.nan
        return values


@torch.no_grad()
def decompose(pair: Pair, data: Rows, *, draws: int = 1000, particles: int = 10) -> Decomposition:
    """Split the bound of a data set into what x and z share, and what q(z) misses of p(z).

    Args:
        pair: Module with methods ``model`` and ``guide``, latents being vectors.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        draws: Data, chosen at random, a draw of whose z meets the mixture of all.
        particles: Draws of z for each datum in the bound.

    Raises:
        ValueError: As for `log_likelihood`, fewer than one draw, or latents that are masked for
            some data.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> decompose(vae, (torch.rand(40, 9) > 0.5).float()).unit_variance.shape
        torch.Size([2])
    """
    whole(draws=draws)
    if draws < 1:
        raise ValueError(f"a decomposition takes at least 1 draw, not {draws}")
    batch = joined(data)
    programs = Programs(pair, batch)
    latent = programs.need_vectors("decompose")
    for part in _cut(batch):
        programs.need_unmasked(part, "decompose")
    halves = bound(pair, _cut(batch), particles=particles)
    rows = torch.randperm(len(batch[0]), device=batch[0].device)[:draws]
    chosen = tuple(tensor[rows] for tensor in batch)
    z = programs.draw(chosen, 1)
    own = programs.log_guide(chosen, z)[0]
    prior = programs.log_parts(chosen, z)[0][0]
    others_prior = programs.log_parts(tuple(tensor.roll(1, 0) for tensor in chosen), z)[0][0]
    conditional = not torch.allclose(prior, others_prior, 1e-4, 1e-4, True)
    few = _rows(batch, max(_ELEMENTS // (len(rows) * latent), 1))  # data facing all draws
    scores = torch.cat([programs.log_guide(part, _facing(z, part)) for part in few], 1)
    mixture = scores.logsumexp(1) - math.log(scores.shape[1])
    scores[torch.arange(len(rows)), rows.to(scores.device)] = -math.inf
    others = scores.logsumexp(1) - math.log(max(scores.shape[1] - 1, 1))
    dimension = _dimension_kl(programs, batch)
    each = _marginals(programs, chosen, z, few)
    real = z.dtype if z.is_floating_point() else torch.float64
    means = [programs.draw(part, 100).to(real).mean(0) for part in _cut(batch, latent * 100)]
    # The mean of 100 draws varies by a hundredth of q's variance more than the mean does.
    noise = [programs.draw(part, 100).to(real).var(0) / 100 for part in _cut(batch, latent * 100)]
    variance = torch.cat(means).var(0) - torch.cat(noise).mean(0)
    return Decomposition(
        float(halves.reconstruction.mean()),
        float(halves.kl.mean()),
        float((own - mixture).mean()),
        float((own - others).mean()),
        math.nan if conditional else float((mixture - prior).mean()),
        math.log(len(batch[0])),
        dimension,
        variance,
        None if each is None else float((mixture - each[0].sum(-1)).mean()),
        None if each is None or conditional else (each[0] - each[1]).mean(0),
        conditional,
    )


@torch.no_grad()
def calibration(
    pair: Pair, data: Rows, *, simulations: int = 500, draws: int = 99, alpha: float = 0.01
) -> Calibration:
    """Rank the latents of simulated data among draws of q(z|x).

    Talts et al. (2018), Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration. Ranked are each latent and log p(x,z), without which q = p(z) would pass.

    Args:
        pair: Module with methods ``model`` and ``guide``, latents being vectors.
        data: Data whose shape and context the simulated ones have; their x is not looked at.
        simulations: Data to simulate, whose context repeats that of `data`, or is that of so many
            rows evenly spread over them.
        draws: Draws of q for each.
        alpha: Probability that an exact posterior fails, over all ranks together.

    Raises:
        ValueError: A likelihood that draws no data of the kind it scores, a model that observes
            more of each datum than x, or too few simulations or draws for the test.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> calibration(vae, torch.zeros(1, 9)).ranks.shape
        torch.Size([500, 3])
    """
    whole(simulations=simulations, draws=draws)
    if simulations < 5 * _BINS or draws < _BINS - 1:
        raise ValueError(
            f"the test of calibration needs at least {5 * _BINS} simulations and {_BINS - 1} "
            f"draws, not {simulations} and {draws}"
        )
    given = joined(data)
    programs = Programs(pair, given)
    latent = programs.need_vectors("calibration")
    programs.need_alone("calibration")
    _need_draws(programs, "calibration")
    step = max(len(given[0]) / simulations, 1.0)
    rows = (torch.arange(simulations, device=given[0].device) * step).long() % len(given[0])
    batch, z = programs.simulate(tuple(tensor[rows] for tensor in given))
    ranks = []
    size = max(at_a_time(batch) // draws, 1)
    for start in range(0, simulations, size):
        part = tuple(tensor[start : start + size] for tensor in batch)
        true, drawn = z[:, start : start + size], programs.draw(part, draws)
        scores = programs.log_joint(part, torch.cat([true, drawn]))
        columns = _rank(true, drawn), _rank(scores[:1], scores[1:])[:, None]
        ranks.append(torch.cat(columns, 1))
    assert ranks[0].shape[1] == latent + 1
    return Calibration(torch.cat(ranks), draws, alpha)


@torch.no_grad()
def predictive_check(
    pair: Pair,
    data: Rows,
    statistics: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    simulations: int = 100,
) -> PredictiveCheck:
    """Hold statistics of the data against those of data sets drawn from the model.

    Box (1980), Sampling and Bayes' Inference in Scientific Modelling and Robustness. Latents of
    each datum are draws of the prior, those of all data draws of the guide.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        statistics: By name, functions from data ``(N, *shape)`` to a number.
        simulations: Data sets to draw, each with as many data under the same context, what else
            is observed among it, and with holes (NaN) where the data have them.

    Raises:
        ValueError: No simulations, no data, or a likelihood that draws no data of the kind it
            scores.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> check = predictive_check(vae, torch.ones(40, 9), {"ink": torch.mean})
        >>> check.observed["ink"], check.p_values["ink"] < 0.05
        (1.0, True)
    """
    whole(simulations=simulations)
    if simulations < 1:
        raise ValueError(f"a predictive check takes at least 1 simulation, not {simulations}")
    batch = joined(data)
    programs = Programs(pair, batch)
    _need_draws(programs, "predictive checks")
    holes = batch[0].isnan()
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(simulations):
        programs.redraw(batch)
        x = programs.predict(batch).where(~holes, batch[0])
        for name, statistic in statistics.items():
            drawn[name].append(float(statistic(x)))
    observed = {name: float(statistic(batch[0])) for name, statistic in statistics.items()}
    values = {name: torch.tensor(each, dtype=torch.float64) for name, each in drawn.items()}
    return PredictiveCheck(observed, values)


@torch.no_grad()
def to_arviz(pair: Pair, data: Rows, *, draws: int = 100, samples: int = 1000) -> Any:
    """Export draws of prior, posterior and both predictives as ArviZ's ``InferenceData``.

    The integrated log p(x), estimated as by `log_likelihood`, is the constant datum
    ``integrated_log_likelihood``. It is no group ``log_likelihood``: leave-one-out
    cross-validation by importance sampling does not hold for latents of single data.

    Args:
        pair: Module with methods ``model`` and ``guide``, latents being vectors.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        draws: Draws for each datum.
        samples: Draws for each datum in the estimate of log p(x).

    Raises:
        ImportError: ArviZ is not installed; ``pip install 'pyro-vae[arviz]'`` does it.
        ValueError: Fewer than one draw, or as for `log_likelihood`.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'pyro-vae[arviz]'") from error
    whole(draws=draws, samples=samples)
    if draws < 1:
        raise ValueError(f"ArviZ takes at least 1 draw, not {draws}")
    batch = joined(data)
    programs = Programs(pair, batch)
    programs.need_vectors("to_arviz")
    name = programs.observed["name"]
    groups: dict[str, Any] = {}
    for group, prior in (("prior", True), ("posterior", False)):
        z = programs.draw(batch, draws, prior=prior)
        x = torch.stack([programs.predict(batch, each[None]) for each in z])
        groups[group] = {
            key: value[None].numpy(force=True) for key, value in programs.split(z).items()
        }
        groups[f"{group}_predictive"] = {name: x[None].numpy(force=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the importance weights")
        estimate = log_likelihood(pair, batch, samples=samples)
    groups["observed_data"] = {name: batch[0].numpy(force=True)}
    integrated = estimate.log_likelihood.numpy(force=True)
    groups["constant_data"] = {"integrated_log_likelihood": integrated}
    return arviz.from_dict(**groups)


def _need_draws(programs: Programs, what: str) -> None:
    """Refuse a likelihood that scores other data than it draws.

    Raises:
        ValueError: It is a Bernoulli of grey levels.
    """
    law = programs.observed["fn"]
    while not isinstance(law, GreyscaleBernoulli) and hasattr(law, "base_dist"):
        law = law.base_dist  # of independent elements, some of which may be missing
    if isinstance(law, GreyscaleBernoulli):
        raise ValueError(
            f"a Bernoulli of grey levels draws black and white where the data are grey: train on "
            f"binarised data for {what}"
        )


def _rank(true: Tensor, drawn: Tensor) -> Tensor:
    """How many of the draws ``(K, ...)`` lie below one ``(1, ...)``; of ties some, at random."""
    below, ties = (drawn < true).sum(0), (drawn == true).sum(0)
    return below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()


def _cut(batch: Batch, share: int = 1) -> list[Batch]:
    """Parts of a batch, each with as many data as are decoded at a time, and at least one."""
    return _rows(batch, max(at_a_time(batch) // share, 1))


def _rows(batch: Batch, size: int) -> list[Batch]:
    """Parts of a batch of so many data."""
    starts = range(0, len(batch[0]), size)
    return [tuple(tensor[start : start + size] for tensor in batch) for start in starts]


def _facing(z: Tensor, batch: Batch) -> Tensor:
    """Latents ``(1, M, latent)`` of M data against each of a batch, ``(M, N, latent)``."""
    return z.transpose(0, 1).expand(-1, len(batch[0]), -1)


def _dimension_kl(programs: Programs, batch: Batch) -> Tensor | None:
    """Mean over the data of the KL of each latent dimension, where it is in closed form."""
    if not programs.ordered:  # that of a later site is one given the earlier, in either program
        return None
    totals = []
    for part in _cut(batch):
        values = []
        for prior, posterior in programs.laws(part):
            if not (_factorises(prior) and _factorises(posterior)):
                return None
            try:
                each = kl_divergence(posterior.base_dist, prior.base_dist)
            except NotImplementedError:
                return None
            values.append(each.expand(len(part[0]), *posterior.event_shape).flatten(1))
        totals.append(torch.cat(values, 1))
    return torch.cat(totals).mean(0)


def _marginals(
    programs: Programs, batch: Batch, z: Tensor, parts: list[Batch]
) -> tuple[Tensor, Tensor] | None:
    """``log q(z_i)``, of the mixture over all parts, and ``log p(z_i)`` at draws for a batch.

    Both are ``(M, latent)``; None where prior or posterior do not factorise, as several sites
    may not.
    """
    if len(programs.sites) > 1:
        return None
    values = [value[0] for value in programs.split(z).values()]
    mixtures, priors = list[Tensor](), list[Tensor]()
    for prior, posterior in programs.laws(batch):
        if not (_factorises(prior) and _factorises(posterior)):
            return None
        value = values[len(priors)]
        priors.append(prior.base_dist.log_prob(value).expand_as(value).flatten(1))
    for part in parts:
        each = [
            law.base_dist.log_prob(value[:, None]).expand(-1, len(part[0]), *value.shape[1:])
            for value, (_, law) in zip(values, programs.laws(part), strict=True)
        ]
        mixtures.append(torch.cat([scores.flatten(2) for scores in each], 2).logsumexp(1))
    count = math.log(sum(len(part[0]) for part in parts))
    mixed = torch.stack(mixtures).logsumexp(0) - count
    return mixed.double(), torch.cat(priors, 1).double()


def _factorises(law: Any) -> bool:
    """Whether a distribution is one of independent dimensions."""
    return isinstance(law, Independent) and not law.base_dist.event_shape
