"""VAE with a VampPrior (Tomczak & Welling, 2018): the prior against a standard normal one.

    python examples/paper/vampprior_table.py --data-dir DATA

Two hidden layers of 300 gated units, 40 latents, 500 pseudo-inputs, static binarisation, Adam at
5e-4, minibatches of 100, the KL warmed up. Published are at most 2,000 passes with a patience of
50 and a warm-up over 100; the reduced protocol has 100 passes, patience 50 and a warm-up over 10.
Unlike there, the encoder's log-variance is not clamped to [-6, 2]. L_5000 is on test images drawn
at random; differences are paired by seed. `--epochs 2000 --images 10000` is the full protocol.
"""

import itertools
from functools import partial

import numpy as np
import protocol
import pyro
import reporting
import torch
from torch import nn

from pyro_vae import MLP, VAE, fit, likelihoods, posteriors, priors

LATENT, HIDDEN, COMPONENTS, PATIENCE = 40, [300, 300], 500, 50
PUBLISHED = {"standard": 88.56, "VampPrior": 85.57}  # test NLL, static binarisation


def build(prior, x):
    """The VAE with either prior."""
    network = partial(MLP, activation=nn.Identity, gated=True)
    shape = tuple(x.shape[1:])
    posterior = posteriors.Normal(network(shape, HIDDEN, (2, LATENT)))
    components = min(COMPONENTS, len(x))
    return VAE(
        priors.VampPrior(posterior, x, components=components)
        if prior == "VampPrior"
        else priors.Normal(LATENT),
        likelihoods.Bernoulli(network(LATENT, HIDDEN, shape)),
        posterior,
    )


def run(about, splits, options):
    """Train the one that it is about, and return its row."""
    pyro.set_rng_seed(about["seed"])
    vae = build(about["method"], splits.train.batch()[0].cpu()).to(options.device)
    metrics = fit(
        vae,
        splits,
        optimizer=partial(torch.optim.Adam, lr=5e-4),
        epochs=options.epochs,
        batch_size=protocol.BATCH,
        warmup=min(100 / options.epochs, 0.1),
        patience=PATIENCE,
        seed=about["seed"],
    )
    spent = {"budget": options.epochs, "passes": len(metrics)}
    return {**about, **spent, **protocol.likelihood(vae, splits.test, options)}


def report(results, options):
    """A line for either prior."""
    chosen = reporting.chosen(results.rows, options)
    lines = [
        f"| prior | passes | seeds | {reporting.bounds(chosen)} "
        "| against standard, paired | published |",
        "|---|---|---|---|---|---|",
    ]
    own = {prior: [row for row in chosen if row["method"] == prior] for prior in PUBLISHED}
    for prior, rows in own.items():
        if rows:
            nats = np.mean([row["value_nats"] for row in rows])
            gain = reporting.gain(rows, own["standard"]) if prior != "standard" else ""
            passes = max(row["passes"] for row in rows)
            lines.append(
                f"| {prior} | {passes} | {len(rows)} | {nats:.2f} | {gain} "
                f"| -{PUBLISHED[prior]:.2f} |"
            )
    reporting.write("vampprior", "\n".join(lines) if chosen else "", options)


def main():
    parser = protocol.arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=100, help="passes over 50,000 images")
    parser.add_argument("--images", type=int, default=2000, help="test images for L_5000")
    options = protocol.ready(parser)
    results = protocol.Results(options.out / "vampprior_table.json")
    wanted = itertools.product(options.seeds, PUBLISHED)
    for seed, prior in [] if options.report else wanted:
        about = {"figure": "VampPrior", "method": prior, "seed": seed, **protocol.asked(options)}
        if results.has(**about, budget=options.epochs):
            continue
        splits = protocol.load("static", options, validation=0.1)
        results.add([run(about, splits, options)])
    report(results, options)


if __name__ == "__main__":
    main()
