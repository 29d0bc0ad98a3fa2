"""The variational autoencoder of Kingma & Welling (2013) as a Pyro model and guide."""

from __future__ import annotations

__all__ = ["VAE", "as_pyro", "check_parts", "check_plain", "check_shared", "declare"]

import copy
import functools
from collections.abc import Sequence
from typing import Any, cast

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, constraints


class VAE(nn.Module):
    """Auto-Encoding Variational Bayes: ``p(z) p(x|z)`` and its recognition model ``q(z|x)``.

    Each part is a module whose call returns a distribution, from this package, from zuko
    or your own. A batch is ``x`` of shape ``(N, *shape)`` followed by its context: whatever
    else a datum brings, labels for instance, in tensors of N rows handed to all three parts.

    Args:
        prior: ``prior(*context)`` is p(z), or p(z|context).
        likelihood: ``likelihood(z, *context)`` is p(x|z).
        posterior: ``posterior(x, *context)`` is q(z|x).

    Raises:
        TypeError: A part is no module, or a `PyroModule`, which would register its
            parameters twice.
        ValueError: A prior made of another posterior, such as a `VampPrior`.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vae import MLP, likelihoods, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.Normal(2),
        ...     likelihood=likelihoods.Bernoulli(MLP(2, [16], (1, 8, 8))),
        ...     posterior=posteriors.Normal(MLP((1, 8, 8), [16], (2, 2))),
        ... )
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
        >>> loss = svi.step(torch.ones(5, 1, 8, 8))  # minus the bound, summed over 5 data
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module) -> None:
        super().__init__()
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        check_parts(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "posterior":
            check_shared(self.prior, self.posterior)

    def model(self, x: Tensor | None = None, *context: Tensor, size: int = 1) -> Tensor:
        """``z ~ p(z), x ~ p(x|z)`` for each datum; without `x`, `size` data are drawn."""
        declare(self)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", as_pyro(self.prior(*context)))
            return pyro.sample("x", as_pyro(self.likelihood(z, *context)), obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> Tensor:
        """``z ~ q(z|x)`` for each datum."""
        declare(self)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", as_pyro(self.posterior(x, *context)))

    def encode(self, x: Tensor, *context: Tensor) -> Distribution:
        """Return the approximate posterior q(z|x) of data ``(..., *shape)``."""
        return self.posterior(x, *context)

    def decode(self, z: Tensor, *context: Tensor) -> Distribution:
        """Return the likelihood p(x|z) at latents ``(..., latent)``."""
        return self.likelihood(z, *context)

    @torch.no_grad()
    def sample(self, size: int, *context: Tensor, mean: bool = False) -> Tensor:
        """Draw `size` data ``x ~ p(x)``, given context of `size` rows where there is any.

        With `mean`, draw only z and return the mean of p(x|z), which is easier on the eye.
        """
        z = as_pyro(self.prior(*context)).expand([size]).sample()
        likelihood = self.decode(z, *context)
        return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return the mean of p(x'|z) at one draw ``z ~ q(z|x)`` for each datum."""
        return self.decode(self.encode(x, *context).sample(), *context).mean


def check_parts(vae: VAE) -> None:
    """Refuse parts that are no plain modules or do not belong together.

    Raises:
        TypeError: A part is no module, or a `PyroModule`.
        ValueError: The prior is made of another posterior than the VAE's.
    """
    check_plain(prior=vae.prior, likelihood=vae.likelihood, posterior=vae.posterior)
    check_shared(vae.prior, vae.posterior)


def check_plain(**parts: Any) -> None:
    """Refuse parts that are no plain modules, by their names.

    Raises:
        TypeError: A part is no module, or a `PyroModule`.
    """
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            raise TypeError(f"the {name} must be a torch.nn.Module, not a {type(part).__name__}")
        for inner, module in part.named_modules(prefix=name):
            if isinstance(module, PyroModule):
                raise TypeError(
                    f"'{inner}' is a PyroModule, whose parameters would be registered twice; make "
                    f"it a plain torch.nn.Module"
                )


def check_shared(prior: nn.Module, *posteriors: nn.Module) -> None:
    """Refuse a prior that is made of another posterior than those of the model.

    Raises:
        ValueError: It is, so that the weights of that other one would never train.
    """
    own = getattr(prior, "posterior", None)
    if isinstance(own, nn.Module) and not any(own is each for each in posteriors):
        raise ValueError(
            f"this {type(prior).__name__} is made of another posterior than the VAE's: make "
            f"one of the new posterior, and set the prior before the posterior"
        )


def declare(module: nn.Module) -> None:
    """Emit every trainable parameter of `module` as a Pyro ``param`` site.

    The sites belong to the module itself, so the global param store is neither read nor
    written: several modules in one process, their copies, loaded weights and frozen
    parts train as they would in plain PyTorch.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _param(parameter, name=name, constraint=constraints.real)


def as_pyro(distribution: Distribution) -> Any:
    """Return `distribution` as one of Pyro's, of the same class, so that KLs still dispatch.

    Pyro's distributions pass through; torch's and zuko's get Pyro's methods mixed in.

    Raises:
        TypeError: The argument is no distribution.
    """
    if isinstance(distribution, TorchDistributionMixin):
        return distribution
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"a part of a VAE must return a distribution, not a {type(distribution).__name__}"
        )
    coerced = copy.copy(distribution)
    coerced.__class__ = _mixed(cast("Any", type(distribution)))
    return coerced


@functools.cache
def _mixed(family: Any) -> Any:
    """`family` with Pyro's methods, and what zuko's distributions leave out of torch's.

    These take sizes as `torch.Size` only, which Pyro does not promise, and have no support,
    which Pyro needs to initialise and transform a site.
    """

    class Mixed(family, TorchDistributionMixin):
        def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
            if not hasattr(family, "rsample_and_log_prob"):
                return TorchDistributionMixin.__call__(self, torch.Size(sample_shape))
            # A flow knows the density of its own draw; inverting it again may be slow.
            value, score = self.rsample_and_log_prob(torch.Size(sample_shape))
            self._drawn = value, score
            return value

        def log_prob(self, value: Tensor) -> Tensor:
            drawn, score = self.__dict__.get("_drawn", (None, None))
            return score if drawn is value else super().log_prob(value)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return super().expand(torch.Size(batch_shape), _instance)

        @property
        def support(self) -> constraints.Constraint:
            try:
                return super().support
            except NotImplementedError:
                base = self.transform.domain if hasattr(self, "transform") else constraints.real
                extra = len(self.event_shape) - base.event_dim
                return constraints.independent(base, extra) if extra else base

    Mixed.__name__, Mixed.__qualname__ = family.__name__, family.__qualname__
    return Mixed


def _site(parameter: nn.Parameter, *, constraint: constraints.Constraint) -> Tensor:
    # Pyro's optimisers ask a site's value for the unconstrained leaf that they should step.
    value = parameter.view_as(parameter)
    value.unconstrained = lambda: parameter  # type: ignore[attr-defined]
    return value


_param = effectful(_site, type="param")
