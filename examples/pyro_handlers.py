"""The VAE is a Pyro program: Predictive, effect handlers, NUTS and a drawing of its graph.

    python examples/pyro_handlers.py

The drawing needs `pip install graphviz`.
"""

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors

pyro.set_rng_seed(0)
digits = data.load("digits", view=data.dynamic)
vae = VAE(
    prior=priors.Normal(2),
    likelihood=likelihoods.Bernoulli(MLP(2, [200], (1, 8, 8))),
    posterior=posteriors.Normal(MLP((1, 8, 8), [200], (2, 2))),
)
fit(vae, digits, epochs=60)
(x,) = digits.test[:5].batch(torch.Generator().manual_seed(0))

# Without data the model is the generative program.
drawn = Predictive(vae.model, num_samples=100)(size=5)
print("from the prior:", {name: tuple(value.shape) for name, value in drawn.items()})

# An observed site keeps its value; `uncondition` makes it a latent one, to draw x anew.
posterior = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=100)
print("posterior predictive mean of five digits:", posterior(x)["x"].mean(0).shape)

# `condition` fixes z: what does the decoder say at the origin?
at_origin = poutine.condition(vae.model, data={"z": torch.zeros(1, 2)})
print("pixels on at z = 0:", int(at_origin(size=1).sum()))

# The encoder's q(z|x) against the exact posterior of one digit, by NUTS on the model itself.
chain = MCMC(NUTS(vae.model), num_samples=300, warmup_steps=100, disable_progbar=True)
chain.run(x[:1])
z, q = chain.get_samples()["z"][:, 0], vae.encode(x[:1])
print("NUTS      mean", z.mean(0).tolist(), "scale", z.std(0).tolist())
print("amortised mean", q.mean[0].tolist(), "scale", q.stddev[0].tolist())

# The graph, to be drawn by `.render("model")` where Graphviz's program `dot` is installed.
try:
    print(pyro.render_model(vae.model, model_args=(x,)))
except ImportError as reason:
    print(f"no drawing: {reason}")
