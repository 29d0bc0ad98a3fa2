"""Evaluation: the evidence lower bound and its two halves, of any model/guide pair."""

from __future__ import annotations

__all__ = ["Bound", "Pair", "bound"]

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor


class Pair(Protocol):
    """A Pyro model and guide over a batch ``(x, *context)``, as methods of one module."""

    def model(self, *batch: Any) -> Any:
        """The generative program."""

    def guide(self, *batch: Any) -> Any:
        """The approximate posterior of its latent sites."""


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
def bound(pair: Pair, batches: Iterable[tuple[Tensor, ...]], *, particles: int = 1) -> Bound:
    """Estimate the evidence lower bound, weight 1, of each datum.

    Equation 7 of Auto-Encoding Variational Bayes (Kingma & Welling, 2013): an unbiased
    estimate with `particles` draws ``z ~ q(z|x)`` for each datum. A latent site outside the
    data plate counts 1/N in each datum. Networks are used as they are: call ``eval()``
    before, where dropout or batch normalisation should rest.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        batches: Batches ``(x, *context)`` that cover the data once.
        particles: Draws for each datum.

    Raises:
        ValueError: Fewer than one particle, or no data.
    """
    if particles < 1:
        raise ValueError(f"a bound takes at least 1 particle, not {particles}")
    halves: list[Tensor] = []
    shared: list[Tensor] = []
    for batch in batches:
        draws = [_halves(pair, batch) for _ in range(particles)]
        halves.append(torch.stack([local for local, _ in draws]).mean(0))
        shared.append(torch.stack([total for _, total in draws]).mean(0))
    if not halves:
        raise ValueError("there are no data to evaluate")
    local = torch.cat(halves, -1)
    reconstruction, kl = local + torch.stack(shared).mean(0)[:, None] / local.shape[-1]
    return Bound(reconstruction, kl)


def _halves(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each datum ``(2, N)``, and of sites outside the plate ``(2,)``."""
    guide = poutine.trace(pair.guide).get_trace(*batch)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    local = batch[0].new_zeros(2, len(batch[0]), dtype=torch.float64)
    total = local.new_zeros(2)
    for trace, sign in ((model, -1), (guide, 1)):
        trace.compute_log_prob()
        for site in prune_subsample_sites(trace).nodes.values():
            if site["type"] != "sample":
                continue
            half, value = (0, 1) if site["is_observed"] else (1, sign)
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            if any(frame.name == "data" for frame in frames):
                dim = next(frame.dim for frame in frames if frame.name == "data")
                score = site["unscaled_log_prob"].movedim(dim, -1)
                local[half] += value * score.reshape(-1, score.shape[-1]).sum(0)
            else:
                total[half] += value * site["unscaled_log_prob"].sum()
    return local, total
