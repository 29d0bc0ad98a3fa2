"""A likelihood of your own: grey levels with logistic noise, trained at once.

python examples/new_likelihood.py
cd examples && pyro-vae train --likelihood new_likelihood.Logistic --likelihood.floor 0.02
"""

from functools import partial

import torch
from pyro import distributions as dist
from torch import nn

from pyro_vae import MLP, VAE, data, fit, posteriors, priors
from pyro_vae.likelihoods import Likelihood


class Logistic(Likelihood):
    """p(x|z) = Logistic(x; m(z), scale) with the mean in (0, 1) and one learned scale."""

    def __init__(self, decoder: nn.Module, floor: float = 0.01) -> None:
        super().__init__(decoder)
        self.floor, self.log_scale = floor, nn.Parameter(torch.zeros(()))

    def forward(self, z: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        loc = self.network(z, *context).sigmoid()
        noise = dist.Logistic(loc, self.floor + self.log_scale.exp())
        return noise.to_event(loc.dim() - z.dim() + 1)


if __name__ == "__main__":
    digits = data.load("digits")
    vae = VAE(
        prior=priors.Normal(10),
        likelihood=Logistic(MLP(10, [200], digits.shape)),
        posterior=posteriors.Normal(MLP(digits.shape, [200], (2, 10))),
    )
    # While the scale is still wide, x says little about z: a long warm-up keeps the KL from
    # switching the latents off meanwhile.
    adam = partial(torch.optim.Adam, lr=5e-3)
    rows = fit(vae, digits, epochs=100, optimizer=adam, warmup=0.5)
    scale = vae.likelihood.floor + vae.likelihood.log_scale.exp()
    print(f"validation ELBO {rows[-1]['elbo']:.2f} nats per digit, scale {scale:.3f}")
