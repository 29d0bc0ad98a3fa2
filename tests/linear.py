"""A linear-Gaussian VAE, whose bound, gradient and posterior are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae import MLP, VAE, likelihoods, posteriors, priors

FALSE_ALARM = 1e-3  # of each statistical test, after Bonferroni's correction


def linear_vae(features, latent, scale=None, floor=1e-4):
    """p(x|z) = N(Wz + b, scale^2), q(z|x) = N(Vx + c, diag d^2), d the same for every x."""
    encoder = MLP(features, [], (2, latent))
    with torch.no_grad():
        encoder.last.weight[latent:] = 0
    return VAE(
        prior=priors.Normal(latent),
        likelihood=likelihoods.Normal(MLP(latent, [], features), scale=scale, floor=floor),
        posterior=posteriors.Normal(encoder),
    )


def exact_halves(vae, x):
    """Reconstruction and KL of each datum, by the moments of Gaussians."""
    decoder, encoder = vae.likelihood.network.last, vae.posterior.network
    loc, log_scale = encoder(x).unbind(-2)
    variance = vae.decode(loc).base_dist.variance
    spread = (decoder.weight**2 * (2 * log_scale).exp()[:, None]).sum(-1)
    squares = (x - nn.functional.linear(loc, decoder.weight, decoder.bias)) ** 2 + spread
    reconstruction = -0.5 * (squares / variance + (2 * math.pi * variance).log()).sum(-1)
    kl = 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)
    return reconstruction, kl


class Scalar(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), both numbers, and q the posterior."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))
