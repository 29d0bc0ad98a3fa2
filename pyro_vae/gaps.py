"""What the bound loses to amortisation, and what to the family of q."""

from __future__ import annotations

__all__ = ["InferenceGap", "inference_gap"]

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyro_vae.evaluation import log_likelihood
from pyro_vae.scoring import Batch, Pair, Programs, Rows, joined, validation, whole

_FULL = MultivariateNormal, LowRankMultivariateNormal
_TRIES = 20  # draws of the prior, of which a component begins at the likeliest


class InferenceGap(NamedTuple):
    """What the bound of each datum loses, ``(N,)`` each, in nats.

    Attributes:
        log_likelihood: The best estimate of log p(x).
        amortized: The bound under q(z|x).
        optimized: The bound under a diagonal Gaussian that was fitted to the datum alone.
        richer: Likewise under a Gaussian with full covariance, or a mixture of such.
        components: Number of components of that mixture.
        diagonal: Whether q(z|x) is a diagonal Gaussian itself.
    """

    log_likelihood: Tensor
    amortized: Tensor
    optimized: Tensor
    richer: Tensor
    components: int = 1
    diagonal: bool = True

    @property
    def amortization(self) -> float:
        """Mean of what is lost because one network serves all data.

        NaN where q(z|x) is no diagonal Gaussian, whose own family was not fitted.
        """
        return float((self.optimized - self.amortized).mean()) if self.diagonal else math.nan

    @property
    def family(self) -> float:
        """Mean of what a diagonal Gaussian loses because the posterior is none."""
        return float((self.log_likelihood - self.optimized).mean())

    @property
    def regained(self) -> float:
        """Mean of that part of the family's loss that the richer family regains."""
        return float((self.richer - self.optimized).mean())

    @property
    def verdict(self) -> str:
        """Which of the two loses more, in words."""
        richer = "a full covariance"
        if self.components > 1:
            richer = f"a mixture of {self.components} such with full covariance"
        if not self.diagonal:
            lost = float((self.log_likelihood - self.amortized).mean())
            return (
                f"no verdict: q is no diagonal Gaussian and loses {lost:.2f} nats, where one that "
                f"is fitted to each datum loses {self.family:.2f}, of which {richer} regains "
                f"{self.regained:.2f}"
            )
        larger = "amortisation" if self.amortization > self.family else "the family"
        return (
            f"more is lost to {larger}: {self.amortization:.2f} nats to amortisation and "
            f"{self.family:.2f} to the family, of which {richer} regains {self.regained:.2f}"
        )


def inference_gap(
    pair: Pair,
    data: Rows,
    *,
    steps: int = 300,
    particles: int = 16,
    samples: int = 5000,
    components: int = 1,
    log_p: Tensor | None = None,
) -> InferenceGap:
    """Say how much of log p(x) the bound loses to amortisation, and how much to q's family.

    Cremer et al. (2018), Inference Suboptimality in Variational Autoencoders: beside q(z|x),
    Gaussians with diagonal and with full covariance are fitted to each datum alone, by Adam,
    from the mean and scale of q(z|x).

    Args:
        pair: Module with methods ``model`` and ``guide``, latents being real vectors.
        data: A split, a tensor ``(N, *shape)``, a batch ``(x, *context)``, or batches; all of
            it is fitted at once, so give a few hundred.
        steps: Steps of Adam.
        particles: Draws for each datum in a step.
        samples: Draws for each datum in the estimate of log p(x).
        components: Gaussians with full covariance that the richest family mixes, for a posterior
            with several modes; all but the first begin at the likeliest of some draws of p(z).
        log_p: That estimate ``(N,)``, where there is a better one at hand.

    Raises:
        ValueError: Latents that are not real vectors, no components, or as for `log_likelihood`.

    Example:
        >>> from pyro_vae import MLP, VAE, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(1),
        ...     likelihood=likelihoods.Normal(MLP(1, [], 2), scale=1.0),
        ...     posterior=posteriors.Normal(MLP(2, [], (2, 1))),
        ... )
        >>> inference_gap(vae, torch.zeros(3, 2), steps=5, samples=20).amortized.shape
        torch.Size([3])
    """
    whole(steps=steps, particles=particles, samples=samples, components=components)
    if steps < 0 or min(particles, components) < 1:
        raise ValueError(
            f"a fit takes 0 steps or more, of at least 1 particle and 1 component, not {steps}, "
            f"{particles} and {components}"
        )
    batch = joined(data)
    if log_p is not None and log_p.shape != batch[0].shape[:1]:
        raise ValueError(
            f"log_p has shape {tuple(log_p.shape)} and there are {len(batch[0])} data: give an "
            f"estimate for each"
        )
    programs = Programs(pair, batch)
    latent = programs.need_real("inference_gap")
    if log_p is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the importance weights")
            log_p = log_likelihood(pair, batch, samples=samples).log_likelihood
    with torch.no_grad():
        z = programs.draw(batch, 100)
        loc, scale = z.mean(0), z.std(0).clamp(min=1e-4)
        amortized = _twice(lambda: programs.weights(batch, 50).mean(0))
    fit = partial(_fitted, steps=steps, particles=particles)
    single = partial(_gaussian_bound, programs, batch, loc, scale)
    diagonal = fit(single, [torch.zeros_like(loc), torch.zeros_like(loc)])
    richer = fit(single, [*diagonal[1], loc.new_zeros(*loc.shape, latent)])
    # A fit that went astray has not found the best of its family: what it began from is in it.
    is_diagonal, is_full = _is(programs, Normal), _is(programs, *_FULL)
    optimized = _better(diagonal[0], amortized) if is_diagonal else diagonal[0]
    best = _better(richer[0], optimized)
    best = _better(best, amortized) if is_full else best
    if components > 1:
        with torch.no_grad():
            far = (_likely(programs, batch, components - 1) - loc) / scale
        others = far, torch.zeros_like(far), far.new_zeros(*far.shape, latent)
        own = [torch.cat([one[None], more]) for one, more in zip(richer[1], others, strict=True)]
        own.append(loc.new_zeros(components, len(loc)))
        mixed = fit(partial(_mixture_bound, programs, batch, loc, scale), own)
        best = _better(mixed[0], best)
    return InferenceGap(log_p, amortized[1], optimized[1], best[1], components, is_diagonal)


def _twice(value: Callable[[], Tensor]) -> Tensor:
    """Two estimates ``(2, N)``, each the mean of ten: one to choose by, and one to report.

    The larger of two estimates that also chose is too large by what was luck.
    """
    return torch.stack([value() for _ in range(20)]).unflatten(0, (2, 10)).mean(1)


def _better(one: Tensor, other: Tensor) -> Tensor:
    """For each datum the better of two bounds ``(2, N)``, and of these one that is no NaN."""
    return one.where((one[0] >= other[0]) | other[0].isnan(), other)


def _is(programs: Programs, *kinds: type) -> bool:
    """Whether q is one of these laws: of one site, since a later one may depend on it."""
    laws = [posterior for _, posterior in programs.laws(programs.probe)]
    inner = [law.base_dist if isinstance(law, Independent) else law for law in laws]
    return len(inner) == 1 and isinstance(inner[0], kinds)


def _fitted(
    value: Callable[[list[Tensor], int], Tensor],
    start: Sequence[Tensor],
    *,
    steps: int,
    particles: int,
) -> tuple[Tensor, list[Tensor]]:
    """The bound ``(2, N)`` of laws that are fitted to each datum, `_twice`, and their numbers.

    `value` gives it from the numbers, which begin at `start`, and a count of draws.
    """
    own = [each.detach().clone().requires_grad_() for each in start]
    adam = torch.optim.Adam(own, lr=0.05)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    with torch.enable_grad(), validation(False):
        for _ in range(steps):
            gradients = torch.autograd.grad(-value(own, particles).sum(), own)
            for each, gradient in zip(own, gradients, strict=True):
                each.grad = gradient
            adam.step()
            falling.step()
    with torch.no_grad():
        found = _twice(lambda: value(own, 50))
    return found, [each.detach() for each in own]


def _gaussian_bound(
    programs: Programs, batch: Batch, loc: Tensor, scale: Tensor, own: list[Tensor], count: int
) -> Tensor:
    """Bound ``(N,)`` of Gaussians ``loc + scale (m + L e)``, by so many draws.

    `own` holds m, the logarithms of the diagonal of L and, for a full covariance, what lies
    below it.
    """
    centre, log_diagonal, *below = own
    noise = torch.randn(count, *loc.shape, dtype=loc.dtype, device=loc.device)
    moved = log_diagonal.exp() * noise
    for each in below:
        moved = moved + torch.einsum("nij,knj->kni", each.tril(-1), noise)
    z = loc + scale * (centre + moved)
    entropy = (log_diagonal + scale.log()).sum(-1) + (1 + math.log(2 * math.pi)) / 2 * loc.shape[
        -1
    ]
    return programs.log_joint(batch, z).mean(0) + entropy


def _likely(programs: Programs, batch: Batch, count: int) -> Tensor:
    """For each datum and component the likeliest of some draws of p(z), ``(C, N, latent)``."""
    z = programs.draw(batch, _TRIES * count, prior=True)
    scores = programs.log_joint(batch, z).unflatten(0, (_TRIES, count))
    best = scores.argmax(0)[None, ..., None].expand(1, *scores.shape[1:], z.shape[-1])
    return z.unflatten(0, (_TRIES, count)).gather(0, best)[0]


def _mixture_bound(
    programs: Programs, batch: Batch, loc: Tensor, scale: Tensor, own: list[Tensor], count: int
) -> Tensor:
    """Bound ``(N,)`` of a mixture of such, from so many draws of each of its components.

    `own` holds the three for each component, and the logarithms of their weights ``(C, N)``.
    """
    centre, log_diagonal, below, logits = own
    weight = logits.log_softmax(0)
    tril = below.tril(-1) + log_diagonal.exp().diag_embed()
    law = torch.distributions.MultivariateNormal(centre, scale_tril=tril, validate_args=False)
    unit = law.rsample((count,))  # (K, C, N, latent), in the units of q's scale
    mixed = (law.log_prob(unit[:, :, None]) + weight).logsumexp(2) - scale.log().sum(-1)
    z = (loc + scale * unit).flatten(0, 1)
    gained = programs.log_joint(batch, z).reshape(mixed.shape) - mixed
    return (weight.exp() * gained.mean(0)).sum(0)
