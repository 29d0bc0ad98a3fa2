"""Evaluation: the evidence lower bound, and estimates of log p(x) with their errors."""

from __future__ import annotations

__all__ = ["Bound", "Estimate", "Integral", "Pair", "bound", "log_likelihood", "quadrature"]

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.distributed import Ranks
from pyro_vae.importance import unscaled
from pyro_vae.scoring import (
    Batch,
    Pair,
    Programs,
    Rows,
    at_a_time,
    batches,
    check_plate,
    check_sites,
    checked,
    validation,
    whole,
    worded,
)
from pyro_vae.splits import Split

_ALONE = Ranks()


class Bound(NamedTuple):
    """The evidence lower bound of each datum, ``elbo = reconstruction - kl``, in nats.

    Attributes:
        reconstruction: ``log p(x|z)`` of each datum, ``(N,)``.
        kl: ``log q(z|x) - log p(z)`` of each datum, ``(N,)``.
    """

    reconstruction: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """The bound of each datum, ``(N,)``."""
        return self.reconstruction - self.kl

    def summary(self) -> dict[str, float]:
        """Means over the data of the bound and its halves, the bound's standard error too."""
        elbo = self.elbo
        error = elbo.std() / len(elbo) ** 0.5 if len(elbo) > 1 else torch.tensor(torch.nan)
        return {
            "elbo": float(elbo.mean()),
            "reconstruction": float(self.reconstruction.mean()),
            "kl": float(self.kl.mean()),
            "standard_error": float(error),
        }


@torch.no_grad()
def bound(
    pair: Pair,
    data: Rows,
    *,
    particles: int = 1,
    ranks: Ranks = _ALONE,
) -> Bound:
    """Estimate the evidence lower bound, weight 1, of each datum.

    Equation 7 of Auto-Encoding Variational Bayes (Kingma & Welling, 2013): an unbiased
    estimate with `particles` draws ``z ~ q(z|x)`` for each datum. A latent site outside the
    data plate counts 1/N in each datum. Networks are used as they are: call ``eval()``
    before, where dropout or batch normalisation should rest.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches that cover
            the data once.
        particles: Draws for each datum.
        ranks: Processes that have data of their own each; every one gets the bound of all.

    Raises:
        ValueError: Fewer than one particle, no data, data that the programs do not take, or a
            latent that only one of them has.
    """
    whole(particles=particles)
    if particles < 1:
        raise ValueError(f"a bound takes at least 1 particle, not {particles}")
    halves: list[Tensor] = []
    shared: list[Tensor] = []
    for batch in batches(data):
        draws = [_halves(pair, batch) for _ in range(particles)]
        halves.append(torch.stack([local for local, _ in draws]).mean(0))
        shared.append(torch.stack([total for _, total in draws]).mean(0))
    local = ranks.gather(torch.cat(halves, -1).T).T
    total = ranks.gather(torch.stack(shared)).mean(0)
    reconstruction, kl = local + total[:, None] / local.shape[-1]
    return Bound(reconstruction, kl)


def _halves(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each datum ``(2, N)``, and of sites outside the plate ``(2,)``."""
    with worded("guide", batch):
        guide = poutine.trace(pair.guide).get_trace(*batch)
        guide.compute_log_prob()
    with worded("model", batch):
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
        model.compute_log_prob()
    guide, model = prune_subsample_sites(guide), prune_subsample_sites(model)
    check_sites(model, guide)
    local = batch[0].new_zeros(2, len(batch[0]), dtype=torch.float64)
    total = local.new_zeros(2)
    for trace, sign in ((model, -1), (guide, 1)):
        for site in trace.nodes.values():
            if site["type"] != "sample":
                continue
            # What the guide observes, a factor, belongs to log q.
            half, value = (0, 1) if trace is model and site["is_observed"] else (1, sign)
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            check_plate(site, len(batch[0]))
            if any(frame.name == "data" for frame in frames):
                dim = next(frame.dim for frame in frames if frame.name == "data")
                score = unscaled(site)["log_prob"].movedim(dim, -1)
                local[half] += value * score.reshape(-1, score.shape[-1]).sum(0)
            else:
                total[half] += value * unscaled(site)["log_prob"].sum()
    return local, total


@dataclass(frozen=True)
class Estimate:
    """Importance-sampling estimates L_K of log p(x), one for each datum, in nats.

    Attributes:
        log_likelihood: ``log 1/K sum_k p(x,z_k) / q(z_k|x)``, ``(N,)``.
        monte_carlo_error: Standard error of each by its draws, ``sqrt(1/ESS - 1/K)``, ``(N,)``;
            NaN for one draw. The one draw of latents outside the plate ``data`` is not in it.
        effective_sample_size: ``(sum_k w_k)^2 / sum_k w_k^2`` of its weights, ``(N,)``.
        pareto_k: Shape k-hat of the generalised Pareto distribution fitted to the largest of
            its weights, ``(N,)``. Infinity where all weights are 0, NaN for fewer than 25 draws,
            and minus infinity where these weights are all equal. Where nothing can be fitted to
            them, since most are ties or vanish beside the largest: infinity, or minus infinity
            where the effective sample size is larger than their number.
        samples: Number K of draws for each datum.
        dimensions: Number of elements of a datum where x is complete, and discrete or
            dequantised, else None.
        level: Width of a grey level in the units of a dequantised x, 1 for a discrete one.
    """

    log_likelihood: Tensor
    monte_carlo_error: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    samples: int
    dimensions: int | None = None
    level: float = 1.0

    @property
    def threshold(self) -> float:
        """Greatest k-hat at which an estimate from so many draws can be trusted."""
        return min(1 - 1 / math.log10(max(self.samples, 11)), 0.7)

    @property
    def unreliable(self) -> Tensor:
        """Whether k-hat is above the threshold, where the Monte Carlo error is none, ``(N,)``."""
        return self.pareto_k > self.threshold

    @property
    def mean(self) -> float:
        """Mean of the estimates over the data."""
        return float(self.log_likelihood.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of that mean over the data; NaN for one datum."""
        values = self.log_likelihood
        return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan

    @property
    def mean_error(self) -> float:
        """Standard error of that mean by the draws of each z, for these very data."""
        return float(self.monte_carlo_error.square().sum().sqrt() / len(self.log_likelihood))

    @property
    def bits_per_dimension(self) -> float | None:
        """``-(L_K / D + log level) / log 2`` of D elements; None where x has another density.

        For a dequantised x an upper bound, since noise within a level need not be uniform
        under the model.
        """
        if self.dimensions is None:
            return None
        return -(self.mean / self.dimensions + math.log(self.level)) / math.log(2)

    def summary(self) -> dict[str, float]:
        """Means over the data with their errors, and what the weights say of these."""
        return {
            f"L_{self.samples}": self.mean,
            "standard_error": self.standard_error,
            "monte_carlo_error": self.mean_error,
            "effective_sample_size": float(self.effective_sample_size.median()),
            "pareto_k": float(self.pareto_k.median()),
            "unreliable": float(self.unreliable.double().mean()),
        }

    @staticmethod
    def joined(parts: Sequence[Estimate]) -> Estimate:
        """The estimates of several parts of the data as one, complete if all of them are."""
        whole = all(part.dimensions is not None for part in parts)
        return Estimate(
            torch.cat([part.log_likelihood for part in parts]),
            torch.cat([part.monte_carlo_error for part in parts]),
            torch.cat([part.effective_sample_size for part in parts]),
            torch.cat([part.pareto_k for part in parts]),
            parts[0].samples,
            parts[0].dimensions if whole else None,
            parts[0].level,
        )


class Integral(NamedTuple):
    """log p(x) of each datum by quadrature, in nats.

    Attributes:
        log_likelihood: ``log of the integral of p(x,z) over z``, ``(N,)``.
        error: By how much the last refinement of the grid changed it, ``(N,)``; infinite where
            draws of q found a density that the grid has missed, the integrand has no end, or the
            grid has found none.
    """

    log_likelihood: Tensor
    error: Tensor


@torch.no_grad()
def log_likelihood(
    pair: Pair,
    data: Rows,
    *,
    samples: int = 5000,
    chunk: int | None = None,
    level: float | None = None,
) -> Estimate:
    """Estimate log p(x) of each datum by importance sampling, ``L_K`` with K draws of q(z|x).

    Equation 8 of Burda et al. (2016), Importance Weighted Autoencoders: in expectation a
    lower bound, which grows with K. How far below log p(x) it is depends on the tail of the
    weights, of which the Pareto k-hat of Vehtari et al. (2024), Pareto Smoothed Importance
    Sampling, tells; the estimate itself is not smoothed. Latents outside the plate ``data`` are
    drawn once, under the first batch, a thousand rows of a split, and what lies there counts 1/N
    in each datum; errors are given that draw. Networks are used as they are.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        samples: Draws for each datum.
        chunk: Draws that are decoded at a time, for some data together, on which the memory
            depends; by default as many as have two million elements of x.
        level: Width of a grey level in a dequantised x, for bits per dimension; a split under
            the view `dequantised` brings it along, if it is stored as whole numbers up to 255.

    Raises:
        ValueError: Fewer than one draw, no data, data that the programs do not take, a latent
            that only one of them has, a model that observes nothing, a level that is not
            positive, or weights that are not a number or infinite.

    Warns:
        UserWarning: k-hat is too large for some data, with the fraction of them.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> estimate = log_likelihood(vae, (torch.rand(4, 9) > 0.5).float(), samples=20)
        >>> estimate.log_likelihood.shape
        torch.Size([4])
    """
    whole(samples=samples, chunk=1 if chunk is None else chunk)
    for name, count in (("samples", samples), ("chunk", chunk)):
        if count is not None and count < 1:
            raise ValueError(
                f"an estimate of log p(x) takes at least 1 of its {name}, not {count}"
            )
    level = data.level if isinstance(data, Split) and level is None else level
    if level is not None and not 0 < level < math.inf:
        raise ValueError(f"a grey level has a width above 0, not {level}")
    programs: Programs | None = None
    parts: list[Estimate] = []
    complete = True
    for batch in batches(data):
        complete &= not batch[0].isnan().any()
        programs = programs or Programs(pair, batch)
        size = chunk or at_a_time(batch)
        # Several data at once, but with so many draws of each that encoding them is cheap.
        together = max(size // min(samples, 400), 1) if programs.vectorized else size
        for start in range(0, len(batch[0]), together):
            rows = tuple(tensor[start : start + together] for tensor in batch)
            with validation(False):  # what costs a pass over all that is decoded
                parts.append(_estimate(programs, rows, samples, max(size // len(rows[0]), 1)))
    assert programs is not None
    joined = Estimate.joined(parts)
    estimate = replace(
        joined,
        log_likelihood=joined.log_likelihood + programs.shared / len(joined.log_likelihood),
        dimensions=_dimensions(programs, level) if complete else None,
        level=1.0 if _discrete(programs) else level or 1.0,
    )
    share = float(estimate.unreliable.double().mean())
    if share:
        warnings.warn(
            f"the importance weights of {share:.1%} of the data have a Pareto k-hat above "
            f"{estimate.threshold:.2f}: their L_{samples} may be far below log p(x), and its "
            f"Monte Carlo error is unreliable; compare with annealed_importance_sampling",
            stacklevel=3,  # past the decorator
        )
    return estimate


def _estimate(programs: Programs, batch: Batch, samples: int, count: int) -> Estimate:
    """The estimates of a few data, with what is kept of their weights as these pass by."""
    size = len(batch[0])
    tail = _tail(samples)
    peak = batch[0].new_full((size,), -math.inf, dtype=torch.float64)
    total, squares = torch.zeros_like(peak), torch.zeros_like(peak)
    largest = peak.expand(0, size)
    for start in range(0, samples, count):
        log_w = programs.weights(batch, min(count, samples - start))
        before, peak = peak, torch.maximum(peak, log_w.amax(0))
        # Where all weights so far are 0, these stand for any finite peak.
        safe = peak.clamp(min=torch.finfo(peak.dtype).min)
        shrink, weights = (before - safe).exp(), (log_w - safe).exp()
        total = total * shrink + weights.sum(0)
        squares = squares * shrink**2 + weights.square().sum(0)
        largest = torch.cat([largest, log_w])
        largest = largest.topk(min(tail + 1, len(largest)), 0).values
    effective = (total.square() / squares).nan_to_num(0.0)
    error = (1 / effective - 1 / samples).clamp(min=0).sqrt()
    if samples == 1:
        error = torch.full_like(error, math.nan)
    log_p = peak + total.log() - math.log(samples)
    k = _pareto_k(largest, tail)
    if tail:  # of few values, as with discrete latents, or of one beside which others vanish
        k = k.where(~k.isnan(), torch.where(effective > tail, -math.inf, math.inf))
    k = k.masked_fill(peak == -math.inf, math.inf)
    return Estimate(log_p, error, effective, k, samples)


def _tail(samples: int) -> int:
    """Number of largest weights that k-hat is fitted to; 0 for too few samples."""
    count = math.ceil(min(samples / 5, 3 * samples**0.5))
    return count if count >= 5 else 0


def _pareto_k(largest: Tensor, tail: int) -> Tensor:
    """Shape of a generalised Pareto distribution over the tail of log-weights ``(tail+1, N)``.

    NaN where the tail is 0, or the smallest quarter of it is of ties.

    The profile posterior mean of Zhang & Stephens (2009), A New and Efficient Estimation Method
    for the Generalized Pareto Distribution, drawn a little to 1/2 as by Vehtari et al. (2024).
    """
    if not tail:
        return largest.new_full(largest.shape[1:], math.nan)
    weights = (largest - largest[0].clamp(min=torch.finfo(largest.dtype).min)).exp()
    excess = (weights[:tail] - weights[tail]).flip(0)  # ascending
    greatest, quarter = excess[-1], excess[int(tail / 4 + 0.5) - 1]
    points = 30 + int(tail**0.5)
    steps = torch.arange(1, points + 1).to(excess)[:, None]
    theta = 1 / greatest + (1 - (points / (steps - 0.5)).sqrt()) / (3 * quarter)
    shape = (-theta[:, None] * excess).log1p().mean(1)  # minus k in their sign, (points, N)
    profile = tail * ((-theta / shape).log() - shape - 1)
    weight = profile.nan_to_num(-math.inf).softmax(0)
    theta = (weight * theta.nan_to_num(0.0)).sum(0)
    k = (-theta * excess).log1p().mean(0)
    k = (tail * k + 10 * 0.5) / (tail + 10)
    # Ties within rounding make a tail of one value, which nothing can be fitted to.
    flat = greatest <= 16 * torch.finfo(excess.dtype).eps
    return k.masked_fill(flat, -math.inf)


def _discrete(programs: Programs) -> bool:
    return bool(programs.observed["fn"].support.is_discrete)


def _dimensions(programs: Programs, level: float | None) -> int | None:
    known = _discrete(programs) or level is not None
    alone = known and programs.alone
    return int(programs.observed["fn"].event_shape.numel()) if alone else None


@torch.no_grad()
def quadrature(pair: Pair, data: Rows, *, tolerance: float = 1e-3) -> Integral:
    """Integrate p(x,z) over a grid of latents, for each datum its own, where there are few.

    The grid spans the draws of prior and posterior, grows while the integrand is not negligible
    at its faces, closes in on where it is not, and is refined until the logarithm of the integral
    stays within `tolerance`.

    Args:
        pair: Module with methods ``model`` and ``guide``, of at most 3 real latents.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        tolerance: Change in nats at which the refinement ends; a grid has at most a million
            points.

    Raises:
        ValueError: More than 3 latents, latents that are not real vectors, no data, data that
            the programs do not take, or a density that is not a number or infinite.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(1),
        ...     likelihood=likelihoods.Normal(MLP(1, [], 2), scale=1.0),
        ...     posterior=posteriors.Normal(MLP(2, [], (2, 1))),
        ... )
        >>> quadrature(vae, torch.zeros(3, 2)).log_likelihood.shape
        torch.Size([3])
    """
    programs: Programs | None = None
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in batches(data):
        if programs is None:
            programs = Programs(pair, batch)
            latent = programs.need_real("quadrature")
            if latent > 3:
                raise ValueError(
                    f"quadrature takes at most 3 latents and there are {latent}: use "
                    f"log_likelihood, or annealed_importance_sampling"
                )
        for n in range(len(batch[0])):
            rows = tuple(tensor[n : n + 1] for tensor in batch)
            parts.append(_integral(programs, rows, latent, tolerance))
    values, errors = (torch.stack(each) for each in zip(*parts, strict=True))
    return Integral(values, errors)


def _integral(
    programs: Programs, batch: Batch, latent: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Log-integral of one datum and by how much it last changed."""
    draws = torch.cat([programs.draw(batch, 100), programs.draw(batch, 500, prior=True)])[:, 0]
    low, high = draws.amin(0).double(), draws.amax(0).double()
    low, high = low - (high - low) / 2, high + (high - low) / 2
    side = (257, 65, 33)[latent - 1]
    for _ in range(40):
        points, scores = _scored_grid(programs, batch, low, high, side)
        if scores.max() == -math.inf:
            return scores.max(), scores.new_tensor(math.inf)
        inside, large = (points[scores > scores.max() - nats] for nats in (40, 8))
        width = high - low
        step = width / (side - 1)
        below, above = large.amin(0) < low + step / 2, large.amax(0) > high - step / 2
        beyond = (below | above).any()
        low = inside.amin(0) - width.where(below, step)
        high = inside.amax(0) + width.where(above, step)
        if not beyond and ((high - low) / width).min() > 0.7:
            break
    before = _sum_grid(programs, batch, low, high, side)[0]
    while True:
        side = 2 * side - 1
        value, greatest = _sum_grid(programs, batch, low, high, side)
        change = (value - before).abs()
        if change <= tolerance or (2 * side - 1) ** latent > 1e6:
            break
        before = value
    missed = programs.log_joint(batch, draws[:100, None]).max() > greatest + 2
    return value, change.masked_fill(missed | beyond, math.inf)


def _sum_grid(
    programs: Programs, batch: Batch, low: Tensor, high: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Log-integral over a box by the trapezium rule, 0 at its faces, and the greatest value."""
    scores = _scored_grid(programs, batch, low, high, side)[1]
    volume = ((high - low) / (side - 1)).log().sum()
    return scores.logsumexp(0) + volume, scores.max()


def _scored_grid(
    programs: Programs, batch: Batch, low: Tensor, high: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Points of a box ``(M, latent)`` and ``log p(x,z)`` at each of them."""
    unit = torch.linspace(0, 1, side, dtype=torch.float64, device=low.device)
    points = low + (high - low) * torch.cartesian_prod(*[unit] * len(low)).reshape(-1, len(low))
    size = at_a_time(batch)
    parts = points[:, None].split(size)
    return points, checked(torch.cat([programs.log_joint(batch, part)[:, 0] for part in parts]))
