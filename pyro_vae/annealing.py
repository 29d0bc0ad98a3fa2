"""Estimates of log p(x) by Hamiltonian Monte Carlo: annealed, bidirectional, and Appendix D."""

from __future__ import annotations

__all__ = [
    "Annealed",
    "Bracket",
    "Settled",
    "annealed_importance_sampling",
    "bidirectional",
    "hmc_likelihood",
]

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.scoring import (
    Batch,
    Pair,
    Programs,
    Rows,
    at_a_time,
    batches,
    checked,
    validation,
    whole,
)

_TARGET = 0.65  # acceptance that step sizes are tuned to, as by Wu et al. (2017)
_PILOTS = 8  # chains that tune them
_SETTLING = 100, 50  # moves of chains on their way to the posterior, and then there, not kept
_HELD = 2**24  # numbers that the fit of Appendix D has at a time: 128 MiB
_APART = 1.2  # split R-hat, above which chains do not reach each other


class Annealed(NamedTuple):
    """Estimates of log p(x) by Hamiltonian Monte Carlo, one for each datum, in nats.

    Attributes:
        log_likelihood: The estimate, ``(N,)``.
        monte_carlo_error: Its standard error by the chains, ``(N,)``.
        acceptance: Mean acceptance of the moves, ``(N,)``; 1 where there were none.
        effective_sample_size: ``(sum_k w_k)^2 / sum_k w_k^2`` of the chains' weights, ``(N,)``.
    """

    log_likelihood: Tensor
    monte_carlo_error: Tensor
    acceptance: Tensor
    effective_sample_size: Tensor

    @property
    def unreliable(self) -> Tensor:
        """Whether one chain outweighs all others, where the error is none, ``(N,)``."""
        return ~(self.effective_sample_size >= 2)


class Settled(NamedTuple):
    """Estimates of log p(x) by draws of p(z|x), one for each datum, in nats.

    Attributes:
        log_likelihood: The estimate, ``(N,)``.
        monte_carlo_error: Its standard error by the chains, ``(N,)``.
        acceptance: Mean acceptance of the moves, ``(N,)``.
        r_hat: Greatest split R-hat of the latents, chains counted by what their part of the
            posterior holds, ``(N,)``.
    """

    log_likelihood: Tensor
    monte_carlo_error: Tensor
    acceptance: Tensor
    r_hat: Tensor

    @property
    def apart(self) -> Tensor:
        """Whether chains do not reach each other, as between modes, or do not move, ``(N,)``.

        The estimate then is of those parts of the posterior that some chain began in, and too
        low by what lies elsewhere.
        """
        return ~(self.r_hat <= _APART)


class Bracket(NamedTuple):
    """Bounds of log p(x) for data that were simulated from the model, in nats.

    Each holds in expectation. What lies between them says how well chains of this length do
    under this model, and nothing about real data, which the model may explain less well.

    Attributes:
        lower: By annealing forward, ``(N,)``.
        upper: By annealing backward from the latents that gave the data, ``(N,)``.
    """

    lower: Tensor
    upper: Tensor

    @property
    def gap(self) -> float:
        """Mean of upper minus lower."""
        return float((self.upper - self.lower).mean())

    @property
    def verdict(self) -> str:
        """What the gap says and what not, in words."""
        return (
            f"on data that the model draws, log p(x) lies between {float(self.lower.mean()):.2f} "
            f"and {float(self.upper.mean()):.2f} in the mean, a gap of {self.gap:.2f} nats; it "
            f"says nothing about real data"
        )


def annealed_importance_sampling(
    pair: Pair,
    data: Rows,
    *,
    distributions: int = 500,
    chains: int = 16,
    leapfrog: int = 10,
    from_prior: bool = False,
) -> Annealed:
    """Estimate log p(x) of each datum by annealing from q(z|x), or from the prior, to p(x,z).

    Neal (2001), Annealed Importance Sampling, along ``q(z|x)^(1-t) p(x,z)^t`` with t on a
    sigmoid schedule, as in Wu et al. (2017), On the Quantitative Analysis of Decoder-Based
    Generative Models. Moves are Hamiltonian with Metropolis correction; their step sizes come
    from a pilot run and are then frozen for each t and datum. In expectation a lower bound.
    Without intermediate distributions it is importance sampling. Chains from q(z|x) seldom find
    a mode that q has missed, and no error tells of it; those from p(z) do, and take several times
    as many distributions.

    Args:
        pair: Module with methods ``model`` and ``guide``, latents being real vectors.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        distributions: Number of intermediate distributions.
        chains: Chains for each datum, whose weights are averaged.
        leapfrog: Leapfrog steps of a move.
        from_prior: Start from p(z) in place of q(z|x).

    Raises:
        ValueError: Latents that are not real vectors, numbers that are too small, no data, data
            that the programs do not take, or weights that are not a number or infinite.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> x = (torch.rand(4, 9) > 0.5).float()
        >>> annealed_importance_sampling(vae, x, distributions=5).log_likelihood.shape
        torch.Size([4])
    """
    _check(distributions=(distributions, 0), chains=(chains, 1), leapfrog=(leapfrog, 1))
    times = _schedule(distributions)
    parts = []
    for path in _paths(pair, data, chains, from_prior, "annealed_importance_sampling"):
        steps = path.tuned(times, leapfrog)
        log_w, accepted = path.forward(times, steps, leapfrog, chains)
        parts.append(_averaged(log_w, accepted))
    return Annealed(*(torch.cat(each) for each in zip(*parts, strict=True)))


def bidirectional(
    pair: Pair,
    data: Rows,
    *,
    distributions: int = 500,
    chains: int = 16,
    leapfrog: int = 10,
    from_prior: bool = False,
) -> Bracket:
    """Bound log p(x) from both sides for data that are simulated from the model.

    Grosse et al. (2015), Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo:
    the latents that gave a datum are an exact draw of its posterior, from which the chains of
    `annealed_importance_sampling` also run backward. As many data are simulated as are given,
    under their context; their x is not looked at.

    Args:
        pair: As for `annealed_importance_sampling`, as are the others.
        data: Data whose number, shape and context the simulated ones have.
        distributions: Number of intermediate distributions.
        chains: Chains for each datum in each direction.
        leapfrog: Leapfrog steps of a move.
        from_prior: Start from p(z) in place of q(z|x).

    Raises:
        ValueError: As for `annealed_importance_sampling`, or a model that observes more of each
            datum than x.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [], 9)),
        ...     posterior=posteriors.Normal(MLP(9, [], (2, 2))),
        ... )
        >>> bidirectional(vae, torch.zeros(4, 9), distributions=5).lower.shape
        torch.Size([4])
    """
    _check(distributions=(distributions, 0), chains=(chains, 1), leapfrog=(leapfrog, 1))
    times = _schedule(distributions)
    lower, upper = [], []
    for given in _paths(pair, data, chains, from_prior, "bidirectional Monte Carlo"):
        given.programs.need_alone("bidirectional Monte Carlo")
        x, z = given.programs.simulate(given.batch)
        path = _Path(given.programs, x, from_prior)
        steps = path.tuned(times, leapfrog)
        log_w = path.forward(times, steps, leapfrog, chains)[0]
        lower.append(log_w.logsumexp(0) - math.log(chains))
        back = path.backward(times, steps, leapfrog, z.expand(chains, -1, -1))
        upper.append(math.log(chains) - (-back).logsumexp(0))
    return Bracket(torch.cat(lower), torch.cat(upper))


def hmc_likelihood(
    pair: Pair,
    data: Rows,
    *,
    samples: int = 200,
    chains: int = 16,
    leapfrog: int = 10,
) -> Settled:
    """Estimate log p(x) of each datum from draws of its posterior, for fewer than 5 latents.

    Appendix D of Auto-Encoding Variational Bayes (Kingma & Welling, 2013): a density g is
    fitted to half of the draws of each chain, and the others give
    ``-log mean[g(z) / (p(z) p(x|z))]``. The mean is unbiased for 1/p(x) once the chains have
    settled, so that in expectation this is at least log p(x): pair it with `log_likelihood`.

    Chains seldom cross between modes, and where all begin in one this gives the mass of that
    mode alone, as if it were p(x). So half of them are annealed from p(z) and half from q(z|x); g
    has a Gaussian for each chain, weighted by the mass that the chain finds around it, since
    chains are not in each mode as often as its mass asks for.

    Args:
        pair: Module with methods ``model`` and ``guide``, of at most 4 real latents.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches.
        samples: Draws of each chain, after a hundred moves that anneal it and fifty more.
        chains: Chains for each datum.
        leapfrog: Leapfrog steps of a move.

    Raises:
        ValueError: 5 latents or more, latents that are not real vectors, numbers that are too
            small, no data, data that the programs do not take, or a density that is not a number
            or infinite.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(1),
        ...     likelihood=likelihoods.Normal(MLP(1, [], 2), scale=1.0),
        ...     posterior=posteriors.Normal(MLP(2, [], (2, 1))),
        ... )
        >>> hmc_likelihood(vae, torch.zeros(3, 2), samples=20).log_likelihood.shape
        torch.Size([3])
    """
    _check(samples=(samples, 20), chains=(chains, 2), leapfrog=(leapfrog, 1))
    parts = []
    held = samples * chains**2
    for path in _paths(pair, data, chains, False, "hmc_likelihood", held):
        if path.scale.shape[-1] > 4:
            raise ValueError(
                f"the estimator of Appendix D takes fewer than 5 latents and there are "
                f"{path.scale.shape[-1]}: use log_likelihood, or annealed_importance_sampling"
            )
        parts.append(_appendix(path, samples, chains, leapfrog))
    return Settled(*(torch.cat(each) for each in zip(*parts, strict=True)))


class _Point(NamedTuple):
    """Latents ``(K, N, latent)`` with both log-densities ``(K, N)`` and their gradients."""

    z: Tensor
    start: Tensor
    joint: Tensor
    start_slope: Tensor
    joint_slope: Tensor

    def score(self, t: float) -> Tensor:
        return _between(self.start, self.joint, t)

    def slope(self, t: float) -> Tensor:
        return _between(self.start_slope, self.joint_slope, t)


def _between(start: Tensor, joint: Tensor, t: float) -> Tensor:
    """``(1 - t) start + t joint``, where what counts nothing may be infinite or NaN."""
    if t in (0, 1):
        return joint if t else start
    return (1 - t) * start + t * joint


def _slope(score: Tensor, z: Tensor) -> Tensor:
    """Gradient of log-densities, which is 0 where they do not depend on the latents."""
    if not score.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(score.sum(), z, retain_graph=True, materialize_grads=True)[0]


class _Path:
    """The densities from q(z|x), or p(z), to p(x,z) for a few data, and moves under them."""

    def __init__(self, programs: Programs, batch: Batch, from_prior: bool) -> None:
        self.programs, self.batch, self.from_prior = programs, batch, from_prior
        with torch.no_grad():
            self.scale = programs.draw(batch, 64).std(0).clamp(min=1e-6)
            self.wide = programs.draw(batch, 64, prior=True).std(0).clamp(min=1e-6)

    def at(self, z: Tensor) -> _Point:
        with torch.enable_grad(), validation(False):
            z = z.detach().requires_grad_()
            prior, observed = self.programs.log_parts(self.batch, z)
            start = prior if self.from_prior else self.programs.log_guide(self.batch, z)
            joint = prior + observed
            slopes = _slope(start, z), _slope(joint, z)
        return _Point(z.detach(), start.detach(), joint.detach(), *slopes)

    def begin(self, chains: int) -> _Point:
        with torch.no_grad():
            z = self.programs.draw(self.batch, chains, prior=self.from_prior)
        return self.at(z)

    def move(self, point: _Point, t: float, step: Tensor, leapfrog: int) -> tuple[_Point, Tensor]:
        """One Hamiltonian move that leaves the density at t as it is, and its acceptance.

        Steps are ``(N,)``, or ``(K, N)`` as are acceptances.
        """
        scale = self.scale
        if self.from_prior:  # whose scale gives way to that of q as precisions are added
            scale = ((1 - t) / self.wide**2 + t / scale**2) ** -0.5
        # Of random length, since trajectories of one length may come back to where they began.
        step = step * (0.5 + 0.5 * torch.rand_like(step))
        reach = step[..., None].to(scale) * scale
        momentum = torch.randn_like(point.z)
        before = point.score(t) - momentum.double().square().sum(-1) / 2
        new = point
        momentum = momentum + reach / 2 * point.slope(t)
        for number in range(leapfrog):
            new = self.at(new.z + reach * momentum)
            half = 2 if number == leapfrog - 1 else 1
            momentum = momentum + reach / half * new.slope(t)
        after = new.score(t) - momentum.double().square().sum(-1) / 2
        chance = (after - before).nan_to_num(-math.inf).exp().clamp(max=1)
        accepted = torch.rand_like(chance) < chance
        pairs = zip(new, point, strict=True)
        kept = [
            torch.where(accepted if a.dim() == 2 else accepted[..., None], a, b) for a, b in pairs
        ]
        return _Point(*kept), chance

    def tuned(self, times: Sequence[float], leapfrog: int) -> list[Tensor]:
        """Step sizes for each intermediate t, ``(N,)`` each, from a run of their own."""
        point = self.begin(_PILOTS)
        step, steps = point.joint.new_full(point.joint.shape[1:], 0.5), []
        for number, t in enumerate(times[1:-1]):
            tries = 20 if number == 0 else 1  # since the first one is far off
            for _ in range(tries):
                point, chance = self.move(point, t, step, leapfrog)
                step = step * (0.5 * (chance.mean(0) - _TARGET)).exp()
            steps.append(step)
        return steps

    def settled(self, chains: int, leapfrog: int) -> tuple[_Point, Tensor]:
        """Chains that are brought to p(x,z), and a step size for each, ``(K, N)``."""
        point = self.begin(chains)
        step = torch.full_like(point.joint, 0.5)
        for t in [*_schedule(_SETTLING[0] - 2), *[1.0] * _SETTLING[1]]:
            point, chance = self.move(point, t, step, leapfrog)
            step = step * ((0.5 if t < 1 else 0.1) * (chance - _TARGET)).exp()
        return point, step

    def forward(
        self, times: Sequence[float], steps: Sequence[Tensor], leapfrog: int, chains: int
    ) -> tuple[Tensor, Tensor]:
        """Log-weights ``(K, N)`` and mean acceptance ``(N,)``."""
        point = self.begin(chains)
        log_w = torch.zeros_like(point.joint)
        accepted = [torch.ones_like(log_w[0])] if not steps else []
        for number in range(1, len(times)):
            log_w = log_w + (times[number] - times[number - 1]) * (point.joint - point.start)
            if number < len(times) - 1:
                point, chance = self.move(point, times[number], steps[number - 1], leapfrog)
                accepted.append(chance.mean(0))
        return log_w, torch.stack(accepted).mean(0)

    def backward(
        self, times: Sequence[float], steps: Sequence[Tensor], leapfrog: int, z: Tensor
    ) -> Tensor:
        """Log-weights ``(K, N)`` of chains from draws of p(z|x) back to the start."""
        point = self.at(z)
        log_w = torch.zeros_like(point.joint)
        for number in range(len(times) - 1, 0, -1):
            log_w = log_w + (times[number] - times[number - 1]) * (point.joint - point.start)
            if number > 1:
                point, _ = self.move(point, times[number - 1], steps[number - 2], leapfrog)
        return log_w


def _paths(
    pair: Pair, data: Rows, chains: int, from_prior: bool, what: str, held: int = 1
) -> Iterator[_Path]:
    """The path of a few data at a time, of each of which so many numbers are held at once."""
    programs: Programs | None = None
    for batch in batches(data):
        if programs is None:
            programs = Programs(pair, batch)
            programs.need_real(what)
        size = max(min(at_a_time(batch) // chains, _HELD // held), 1)
        for start in range(0, len(batch[0]), size):
            rows = tuple(tensor[start : start + size] for tensor in batch)
            yield _Path(programs, rows, from_prior)


def _schedule(distributions: int) -> list[float]:
    """Times from 0 to 1, close to each other at both ends."""
    points = torch.linspace(-4, 4, distributions + 2, dtype=torch.float64).sigmoid()
    return ((points - points[0]) / (points[-1] - points[0])).tolist()


def _averaged(log_w: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chains = len(log_w)
    # Where all weights are 0, these stand for any finite peak.
    peak = checked(log_w).amax(0).clamp(min=torch.finfo(log_w.dtype).min)
    weights = (log_w - peak).exp()
    effective = (weights.sum(0).square() / weights.square().sum(0)).nan_to_num(0.0)
    error = (1 / effective - 1 / chains).clamp(min=0).sqrt()
    error = error if chains > 1 else torch.full_like(error, math.nan)
    return log_w.logsumexp(0) - math.log(chains), error, accepted, effective


def _appendix(
    path: _Path, samples: int, chains: int, leapfrog: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Appendix D for a few data."""
    wide = _Path(path.programs, path.batch, True)
    begun = wide.settled(chains // 2, leapfrog), path.settled(chains - chains // 2, leapfrog)
    step = torch.cat([each for _, each in begun])
    point = _Point(*map(torch.cat, zip(*(each for each, _ in begun), strict=True)))
    drawn, scores, accepted = [], [], []
    for _ in range(samples):
        point, chance = path.move(point, 1.0, step, leapfrog)
        drawn.append(point.z.double())
        scores.append(point.joint)
        accepted.append(chance.mean(0))
    z, half = torch.stack(drawn), samples // 2
    joint = checked(torch.stack(scores))
    ratios = _gaussians(z[:half], path.scale.double(), z) - joint
    share = torch.full_like(joint[0], -math.log(chains))
    for _ in range(3):
        # A chain that stays in one part of the posterior has mean[g(z) / p(x,z)] of g's share
        # there over that part's own mass, so that dividing by it leaves the mass.
        share = (share - _mean_ratio(ratios[:, :half], share)).log_softmax(0)
    found = _mean_ratio(ratios[:, half:], share)
    inverse = (share + found).logsumexp(0)
    share = share.exp()
    spread = (share * ((found - inverse).exp() - 1)).square().sum(0)
    error = (spread / (1 - share.square().sum(0))).sqrt()
    log_p = (-inverse).masked_fill((joint == -math.inf).flatten(0, 1).all(0), -math.inf)
    return log_p, error, torch.stack(accepted).mean(0), _r_hat(z[half:], share)


def _gaussians(fitted: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """Log-densities ``(J, S, K, N)`` at latents of Gaussians that are fitted to each chain."""
    centre = fitted.mean(0)
    apart = fitted - centre
    covariance = torch.einsum("skni,sknj->knij", apart, apart) / (len(apart) - 1)
    # Narrower than the posterior, so that the ratio is bounded in its tails; with a floor for a
    # chain that never moved.
    tril = torch.linalg.cholesky(0.8 * covariance + (1e-6 * scale**2).diag_embed())
    laws = [
        torch.distributions.MultivariateNormal(m, scale_tril=each, validate_args=False)
        for m, each in zip(centre, tril, strict=True)
    ]
    return torch.stack([law.log_prob(z) for law in laws])


def _mean_ratio(ratios: Tensor, share: Tensor) -> Tensor:
    """Logarithm of each chain's mean of a mixture over p(x,z), ``(K, N)``."""
    mixed = (ratios + share[:, None, None]).logsumexp(0)
    return mixed.logsumexp(0) - math.log(len(mixed))


def _r_hat(z: Tensor, share: Tensor) -> Tensor:
    """Greatest R-hat over the latents of half chains with these weights, ``(N,)``.

    Gelman et al. (2013), Bayesian Data Analysis, section 11.4.
    """
    half = len(z) // 2
    parts = torch.stack([z[:half], z[half : 2 * half]])
    means, weight = parts.mean(1), share[..., None] / 2
    within = (weight * parts.var(1)).sum((0, 1))
    between = (weight * (means - (weight * means).sum((0, 1))).square()).sum((0, 1))
    return (1 - 1 / half + between / within).sqrt().amax(-1)


def _check(**counts: tuple[int, int]) -> None:
    whole(**{name: count for name, (count, _) in counts.items()})
    for name, (count, least) in counts.items():
        if count < least:
            raise ValueError(f"the number of {name} is at least {least}, not {count}")
