"""Variational autoencoders as probabilistic programs in Pyro."""

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder
from pyro_vae.vae import VAE

__all__ = [
    "MLP",
    "VAE",
    "ConvDecoder",
    "ConvEncoder",
    "likelihoods",
    "networks",
    "posteriors",
    "priors",
]
