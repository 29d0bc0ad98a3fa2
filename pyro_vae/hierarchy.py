"""Variational autoencoders with several stochastic layers, of the same parts as `VAE`."""

from __future__ import annotations

__all__ = ["HierarchicalVAE", "check_layers"]

from collections.abc import Sequence
from typing import cast

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.vae import as_pyro, check_plain, check_shared, declare


class HierarchicalVAE(nn.Module):
    """``p(z1) p(z2|z1) ... p(x|zL)`` and its recognition model over z1, ..., zL.

    Latents are sites ``z1``, the top, to ``zL``, on which x depends. A conditional prior
    ``p(z2|z1)`` is any module from z1 to a distribution, such as ``posteriors.Normal`` of a
    network over z1. Recognition is top-down, ``q(z1|x) q(z2|x,z1) ...``, where each posterior
    takes the layer above as its first context; or bottom-up, ``q(zL|x) ... q(z1|z2)``, where
    each takes the layer below in place of x, as in Burda et al. (2016), Importance Weighted
    Autoencoders, section 3. Top-down: Sønderby et al. (2016), Ladder Variational
    Autoencoders.

    Args:
        priors: ``priors[0](*context)`` is p(z1), ``priors[i](z, *context)`` that of the next
            layer given z, the one above.
        likelihood: ``likelihood(z, *context)`` is p(x|z) for z of the last layer.
        posteriors: In the order of the priors. Top-down ``posteriors[0](x, *context)`` and
            ``posteriors[i](x, z, *context)`` with z the layer above; bottom-up
            ``posteriors[-1](x, *context)`` and ``posteriors[i](z, *context)`` with z the
            layer below.
        bottom_up: Whether recognition goes from x upwards.

    Raises:
        TypeError: A part is no module, or a `PyroModule`.
        ValueError: There is no layer, or not one posterior for each prior, or a prior made of a
            posterior of another model, such as a `VampPrior`.

    Example:
        >>> from pyro_vae import MLP, likelihoods, posteriors, priors
        >>> vae = HierarchicalVAE(
        ...     [priors.Normal(2), posteriors.Normal(MLP(2, [16], (2, 5)))],
        ...     likelihoods.Bernoulli(MLP(5, [16], (1, 8, 8))),
        ...     [
        ...         posteriors.Normal(MLP((1, 8, 8), [16], (2, 2))),
        ...         posteriors.Normal(MLP((1, 8, 8), [16], (2, 5), context=2)),
        ...     ],
        ... )
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        priors: Sequence[nn.Module],
        likelihood: nn.Module,
        posteriors: Sequence[nn.Module],
        *,
        bottom_up: bool = False,
    ) -> None:
        super().__init__()
        if not priors or len(priors) != len(posteriors):
            raise ValueError(
                f"a hierarchy has 1 layer or more and a posterior for each prior; there are "
                f"{len(priors)} priors and {len(posteriors)} posteriors"
            )
        for index, (prior, posterior) in enumerate(zip(priors, posteriors, strict=True), 1):
            check_plain(**{f"prior of z{index}": prior, f"posterior of z{index}": posterior})
        check_plain(likelihood=likelihood)
        self.priors, self.posteriors = nn.ModuleList(priors), nn.ModuleList(posteriors)
        self.likelihood, self.bottom_up = likelihood, bottom_up
        check_layers(self)

    def model(self, x: Tensor | None = None, *context: Tensor, size: int = 1) -> Tensor:
        """``z1 ~ p(z1), z2 ~ p(z2|z1), ..., x ~ p(x|zL)``; without `x`, `size` data are drawn."""
        declare(self)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            above: tuple[Tensor, ...] = ()
            for index, prior in enumerate(self.priors, 1):
                above = (pyro.sample(f"z{index}", as_pyro(prior(*above, *context))),)
            return pyro.sample("x", as_pyro(self.likelihood(*above, *context)), obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> Tensor:
        """``z1 ~ q(z1|x), z2 ~ q(z2|x,z1), ...``, or ``zL ~ q(zL|x), ..., z1 ~ q(z1|z2)``."""
        declare(self)
        layers = list(enumerate(self.posteriors, 1))
        given: tuple[Tensor, ...] = (x,)
        with pyro.plate("data", len(x), dim=-1):
            for index, posterior in reversed(layers) if self.bottom_up else layers:
                z = pyro.sample(f"z{index}", as_pyro(posterior(*given, *context)))
                given = (z,) if self.bottom_up else (x, z)
        return z

    def decode(self, z: Tensor, *context: Tensor) -> Distribution:
        """Return the likelihood p(x|z) at latents ``(..., latent)`` of the last layer."""
        return cast("Distribution", self.likelihood(z, *context))

    @torch.no_grad()
    def sample(self, size: int, *context: Tensor, mean: bool = False) -> Tensor:
        """Draw `size` data ``x ~ p(x)``, given context of `size` rows where there is any.

        With `mean`, draw only the latents and return the mean of p(x|zL).
        """
        above: tuple[Tensor, ...] = ()
        for prior in self.priors:
            # To the size also where a conditional prior does not depend on the layer above.
            above = (as_pyro(prior(*above, *context)).expand([size]).sample(),)
        likelihood = self.decode(*above, *context)
        return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return the mean of p(x'|zL) at one draw of the latents of each datum."""
        trace = pyro.poutine.trace(self.guide).get_trace(x, *context)
        return self.decode(trace.nodes[f"z{len(self.priors)}"]["value"], *context).mean


def check_layers(vae: HierarchicalVAE) -> None:
    """Refuse a prior that is made of a posterior of another model.

    Raises:
        ValueError: It is, so that the weights of that posterior would never train.
    """
    for prior in vae.priors:
        check_shared(prior, *vae.posteriors)
