"""Signal and noise of the encoder's gradient under IWAE as particles are added, by two estimators.

    python examples/benchmarks/signal_to_noise.py

A VAE (5 latents, 50 hidden units) is trained on binarised digits for 20 epochs, by the ELBO or by
the IWAE of 5 particles; its weights and one batch of 64 digits then stay fixed, and the gradient
of the IWAE of K particles in all of the encoder's weights is drawn many times, pathwise and doubly
reparameterised. The signal to noise ratio is ||E g|| / sqrt(tr Cov g). Rainforth et al. (2018),
Tighter Variational Bounds are Not Necessarily Better, show that the pathwise one falls as K^-1/2
in the end. That of Tucker et al. (2019), Doubly Reparameterized Gradient Estimators, would grow as
K^1/2 if the importance weights had enough moments, which those of a posterior narrower than the
true one have not. Intervals are 95 % bootstrap ones over the draws: they speak of this model and
this batch, and are too narrow where a few draws hold most of the variance.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae import MLP, VAE, bound, data, fit, likelihoods, plots, posteriors, priors
from pyro_vae.objectives import IWAE, Trace_ELBO

WAYS = {"pathwise": False, "doubly reparameterised": True}
TRAINED = {
    "ELBO": Trace_ELBO(max_plate_nesting=1),
    "IWAE, K = 5": IWAE(5, doubly_reparameterised=True),
}


def train(objective, seed, epochs):
    """A VAE early in its training, the data it has not seen, and a batch of those it has."""
    pyro.set_rng_seed(seed)
    digits = data.load("digits", view=data.dynamic)
    vae = VAE(
        prior=priors.Normal(5),
        likelihood=likelihoods.Bernoulli(MLP(5, [50], digits.shape)),
        posterior=posteriors.Normal(MLP(digits.shape, [50], (2, 5))),
    )
    options = {"epochs": epochs, "warmup": 0, "seed": seed, "progress": False}
    fit(vae, digits, objective=objective, **options)
    rows = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))[:64]
    return vae, digits.test, digits.train[rows].batch(torch.Generator().manual_seed(seed))


def gradients(vae, batch, objective, draws):
    """Gradients ``(draws, P)`` in the encoder's weights."""
    rows = []
    for _ in range(draws):
        vae.zero_grad()
        objective.loss_and_grads(vae.model, vae.guide, *batch)
        rows.append(torch.cat([p.grad.flatten() for p in vae.posterior.parameters()]))
    return torch.stack(rows).double()


def signal_to_noise(gradients, bootstrap=2000, seed=0):
    """The ratio and its interval, from the products of each two of the draws.

    Products of different draws give ``||E g||^2`` without bias; the norm of their mean would not
    fall below ``sqrt(tr Cov g / draws)``. A resampled draw meets itself in no product either.
    """
    count = len(gradients)
    products = (gradients @ gradients.T).numpy()
    squares = products.diagonal()
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, bootstrap)
    ratios = []
    for n in (np.ones((1, count)), weights):
        pairs = ((n @ products) * n).sum(1) - (n**2 * squares).sum(1)
        # The counts of two draws have a mean product of 1 - 1/count under resampling.
        signal = pairs / (count * (count - 1)) * (count / (count - 1) if len(n) > 1 else 1)
        noise = np.maximum((n * squares).mean(1) - signal, np.finfo(float).tiny)
        ratios.append(np.sqrt(np.maximum(signal, 0) / noise))
    low, high = np.quantile(ratios[1], [0.025, 0.975])
    return float(ratios[0][0]), float(low), float(high)


def draw(results, particles):
    figure = Figure(figsize=(8.5, 3.6), dpi=120, layout="constrained")
    for axes, trained in zip(figure.subplots(1, 2, sharey=True), TRAINED, strict=True):
        for way in WAYS:
            rows = [r for r in results if (r["trained"], r["gradient"]) == (trained, way)]
            values = np.array([row["signal_to_noise"] for row in rows])
            errors = np.abs(np.array([row["interval"] for row in rows]).T - values)
            axes.errorbar(particles, values, errors, marker="o", capsize=3, label=way)
        rate = 0.7 * np.array(particles) ** -0.5
        axes.plot(particles, rate, ":", color="0.5", label="slope of $K^{-1/2}$")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(particles, [str(count) for count in particles])
        axes.set_xlabel("particles K")
        axes.set_title(f"trained by the {trained}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("signal to noise of the\nencoder's gradient under IWAE")
    figure.axes[0].legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--draws", type=int, default=400, help="gradients for each estimate")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    results = []
    print("| trained by | test ELBO | K | gradient | signal to noise | 95 % interval | ms |")
    print("|---|---|---|---|---|---|---|")
    for trained, objective in TRAINED.items():
        vae, test, batch = train(objective, options.seed, options.epochs)
        generator = torch.Generator().manual_seed(0)
        elbo = bound(vae, test.batches(128, generator), particles=10).summary()["elbo"]
        for count, way in itertools.product(options.particles, WAYS):
            began = time.perf_counter()
            measured = IWAE(count, doubly_reparameterised=WAYS[way])
            drawn = gradients(vae, batch, measured, options.draws)
            cost = 1e3 * (time.perf_counter() - began) / options.draws
            ratio, low, high = signal_to_noise(drawn)
            print(
                f"| {trained} | {elbo:.2f} | {count} | {way} | {ratio:.3f} | {low:.3f} to "
                f"{high:.3f} | {cost:.1f} |"
            )
            results.append(
                {
                    "trained": trained,
                    "particles": count,
                    "gradient": way,
                    "signal_to_noise": ratio,
                    "interval": [low, high],
                    "milliseconds": cost,
                    "draws": options.draws,
                    "epochs": options.epochs,
                    "seed": options.seed,
                    "test_elbo": elbo,
                    "torch": torch.__version__,
                }
            )
    content = json.dumps(results, indent=2) + "\n"
    (options.out / "signal_to_noise.json").write_text(content)
    plots.save(draw(results, options.particles), options.out / "signal_to_noise.png")


if __name__ == "__main__":
    main()
