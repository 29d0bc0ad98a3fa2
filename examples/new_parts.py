"""All four parts of your own in one VAE, from Python.

    python examples/new_parts.py

Each is a file beside this one, which trains from the command line too, as its first line says.
"""

from functools import partial

import pyro
import torch
from new_likelihood import Logistic
from new_objective import Capacity
from new_posterior import Laplace
from new_prior import Gumbel

from pyro_vae import MLP, VAE, data, fit, testing

pyro.set_rng_seed(0)
testing.check_prior(Gumbel(3))
testing.check_likelihood(Logistic(MLP(2, [8], (1, 2, 2))), torch.randn(3, 2))
testing.check_posterior(Laplace(MLP(4, [8], (2, 3))), torch.randn(3, 4))

digits = data.load("digits")
vae = VAE(
    prior=Gumbel(10),
    likelihood=Logistic(MLP(10, [200], digits.shape)),
    posterior=Laplace(MLP(digits.shape, [200], (2, 10))),
)
adam = partial(torch.optim.Adam, lr=3e-3)
rows = fit(vae, digits, objective=Capacity(nats=15.0), epochs=60, optimizer=adam)
print(f"validation ELBO {rows[-1]['elbo']:.2f} and KL {rows[-1]['kl']:.2f} nats per digit")
