"""Variational autoencoders as probabilistic programs in Pyro."""

from pyro_vae import data, likelihoods, networks, objectives, posteriors, priors, testing
from pyro_vae.checkpoints import load, restore
from pyro_vae.evaluation import bound, log_likelihood
from pyro_vae.hierarchy import HierarchicalVAE
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder
from pyro_vae.svi import CompiledSVI
from pyro_vae.training import fit
from pyro_vae.vae import VAE

__all__ = [
    "MLP",
    "VAE",
    "CompiledSVI",
    "ConvDecoder",
    "ConvEncoder",
    "HierarchicalVAE",
    "bound",
    "data",
    "fit",
    "likelihoods",
    "load",
    "log_likelihood",
    "networks",
    "objectives",
    "posteriors",
    "priors",
    "restore",
    "testing",
]
