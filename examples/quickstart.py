"""A variational autoencoder on handwritten digits, in plain Pyro.

    python examples/quickstart.py

Takes about five seconds and needs no download.
"""

from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import MLP, VAE, bound, data, likelihoods, plots, posteriors, priors

pyro.set_rng_seed(0)
digits = data.load("digits", view=data.dynamic)
vae = VAE(
    prior=priors.Normal(10),
    likelihood=likelihoods.Bernoulli(MLP(10, [200], (1, 8, 8))),
    posterior=posteriors.Normal(MLP((1, 8, 8), [200], (2, 10))),
)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())

generator = torch.Generator().manual_seed(0)
for epoch in range(1, 101):
    loss = sum(svi.step(*batch) for batch in digits.train.batches(128, generator, shuffle=True))
    if epoch % 10 == 0:
        print(f"epoch {epoch:3}: ELBO {-loss / len(digits.train):.2f} nats per digit")

test = bound(vae, digits.test.batches(128, generator), particles=10).summary()
print(f"test ELBO {test['elbo']:.2f} ± {test['standard_error']:.2f}", end=", ")
print(f"reconstruction {test['reconstruction']:.2f}, KL {test['kl']:.2f}")

(x,) = digits.test[:16].batch(generator)
rows = {"data": x, "reconstruction": vae.reconstruct(x), "sample": vae.sample(16, mean=True)}
print(plots.save(plots.strip(rows), Path("quickstart.png")))
