"""A posterior of your own: pyro-vae train --posterior new_posterior.Laplace."""

from pyro import distributions as dist

from pyro_vae.posteriors import Posterior


class Laplace(Posterior):
    def forward(self, x, *context):
        loc, log_scale = self.network(x, *context).unbind(-2)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)
