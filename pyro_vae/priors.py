"""Priors p(z): modules whose call returns a distribution over one latent vector."""

from __future__ import annotations

__all__ = ["Normal", "Prior"]

import abc

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override


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
        if latent < 1:
            raise ValueError(f"a latent vector has at least 1 dimension, not {latent}")
        for name in ("loc", "log_scale"):
            value = torch.zeros(latent)
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @override
    def forward(self, *context: Tensor) -> Distribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
