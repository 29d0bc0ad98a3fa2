"""The values that pytorch/examples and Pyro's tutorial print, from this package.

Both train on grey levels scored by a Bernoulli, which is minus a cross-entropy and not a
likelihood: a regression check between implementations, to be compared with nothing else.

    python examples/benchmarks/reference_values.py --data-dir DATA

Both report one draw of z for each of the 10,000 test images. The tutorial counts its epochs
from 0, so its epoch 5 is what six passes give.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import pyro
import torch
from torch import nn

from pyro_vae import MLP, VAE, data, fit, likelihoods, posteriors, priors

SETUPS = {
    "pytorch/examples": {
        "latent": 20,
        "activation": nn.ReLU,
        "batch_size": 128,
        "published": {10: (105.57, 0.3)},
    },
    "Pyro tutorial": {
        "latent": 50,
        "activation": nn.Softplus,
        "batch_size": 256,
        "published": {6: (113.3, 0.7), 11: (107.8, 0.7), 21: (104.7, 0.7)},
    },
}


def train(setup, mnist, seed):
    """Minus the test value after each epoch."""
    pyro.set_rng_seed(seed)
    latent, activation = setup["latent"], setup["activation"]
    vae = VAE(
        prior=priors.Normal(latent),
        likelihood=likelihoods.Bernoulli(
            MLP(latent, [400], mnist.shape, activation=activation), greyscale=True
        ),
        posterior=posteriors.Normal(MLP(mnist.shape, [400], (2, latent), activation=activation)),
    )
    rows = fit(
        vae,
        mnist,
        epochs=max(setup["published"]),
        batch_size=setup["batch_size"],
        warmup=0,
        seed=seed,
    )
    return [-row["elbo"] for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="train on so many images only, for a trial")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    mnist = data.load("mnist", directory=options.data_dir, validation=0)
    mnist = dataclasses.replace(mnist, validation=mnist.test)  # each epoch reports the test value
    if options.rows:
        mnist = mnist.map(lambda part: part[: options.rows])

    results = []
    print("| set-up | passes | published | ours, mean | by seed | within |")
    print("|---|---|---|---|---|---|")
    for name, setup in SETUPS.items():
        curves = [train(setup, mnist, seed) for seed in options.seeds]
        for epoch, (published, tolerance) in setup["published"].items():
            values = [curve[epoch - 1] for curve in curves]
            mean = statistics.mean(values)
            within = "yes" if abs(mean - published) <= tolerance else "NO"
            each = ", ".join(f"{value:.2f}" for value in values)
            print(
                f"| {name} | {epoch} | {published} | {mean:.2f} | {each} | {tolerance}: {within} |"
            )
            results.append(
                {
                    "setup": name,
                    "passes": epoch,
                    "published": published,
                    "tolerance": tolerance,
                    "values": values,
                    "seeds": options.seeds,
                    "score": "cross-entropy of grey levels, nats per test image",
                    "torch": torch.__version__,
                }
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reference_values.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
