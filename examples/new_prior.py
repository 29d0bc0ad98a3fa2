"""A prior of your own: Gaussians on a circle, trained at once.

python examples/new_prior.py
cd examples && pyro-vae train --prior new_prior.Ring --prior.components 10 --latent 2
"""

import math

import torch
from pyro import distributions as dist

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors
from pyro_vae.priors import Prior


class Ring(Prior):
    """Equally weighted Gaussians around a circle in the first two dimensions of z."""

    def __init__(self, latent: int, components: int = 10, radius: float = 3.0) -> None:
        super().__init__()
        angle = torch.arange(components) * 2 * math.pi / components
        self.register_buffer("loc", torch.zeros(components, latent))
        self.loc[:, 0], self.loc[:, 1] = radius * angle.cos(), radius * angle.sin()

    def forward(self, *context: torch.Tensor) -> dist.TorchDistribution:
        component = dist.Normal(self.loc, 0.5).to_event(1)
        return dist.MixtureSameFamily(
            dist.Categorical(self.loc.new_ones(len(self.loc))), component
        )


if __name__ == "__main__":
    digits = data.load("digits", view=data.dynamic)
    vae = VAE(
        prior=Ring(2),
        likelihood=likelihoods.Bernoulli(MLP(2, [200], digits.shape)),
        posterior=posteriors.Normal(MLP(digits.shape, [200], (2, 2))),
    )
    rows = fit(vae, digits, epochs=60)
    print(f"validation ELBO {rows[-1]['elbo']:.2f} nats per digit")
