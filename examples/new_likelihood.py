"""A likelihood of your own: pyro-vae train --likelihood new_likelihood.Logistic."""

from pyro import distributions as dist

from pyro_vae.likelihoods import Likelihood


class Logistic(Likelihood):
    def __init__(self, decoder, scale=0.1):
        super().__init__(decoder)
        self.scale = scale

    def forward(self, z, *context):
        loc = self.network(z, *context)
        return dist.Logistic(loc, self.scale).to_event(loc.dim() - z.dim() + 1)
