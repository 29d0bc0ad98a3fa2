"""A conditional VAE needs no new class: digits by label, the label being context.

    python examples/conditional.py

A batch is a tuple (x, *context), and the context is handed to prior, likelihood and
posterior alike. From the command line: pyro-vae train --conditional
"""

from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import MLP, VAE, data, likelihoods, plots, posteriors, priors

pyro.set_rng_seed(0)
digits = data.load("digits", view=data.dynamic).conditioned()  # batches (x, one-hot label)
vae = VAE(
    prior=priors.Normal(5),
    likelihood=likelihoods.Bernoulli(MLP(5, [200], (1, 8, 8), context=10)),
    posterior=posteriors.Normal(MLP((1, 8, 8), [200], (2, 5), context=10)),
)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())

generator = torch.Generator().manual_seed(0)
for epoch in range(1, 101):
    loss = sum(svi.step(*batch) for batch in digits.train.batches(128, generator, shuffle=True))
    if epoch % 10 == 0:
        print(f"epoch {epoch:3}: ELBO {-loss / len(digits.train):.2f} nats per digit")

labels = torch.eye(10).repeat(8, 1)  # eight rows of 0 to 9
picture = plots.grid(vae.sample(80, labels, mean=True), columns=10)
print(plots.save(picture, Path("conditional.png")))
