"""The table of Importance Weighted Autoencoders (Burda et al., 2016) for one stochastic layer.

    python examples/paper/iwae_table.py --data-dir DATA

784-200-200-50 with tanh units and Glorot's initial weights, the output bias at the training mean,
minibatches of 20, Adam (epsilon 1e-4) at 0.001 * 10^(-i/7) for 3^i passes, i = 0, 1, ...; static
binarisation, 50,000 training images. Published are 8 stages (3,280 passes); the reduced protocol
has 5 (121 passes) for k = 1 and 5, and 4 (40) for k = 50. Every model is evaluated after its last
stages, so that models are compared at equal budgets: L_5000 on test images drawn at random and the
number of active units. Differences are paired by seed. `--stages 8` is the full protocol.
"""

import itertools
from functools import partial

import numpy as np
import protocol
import pyro
import reporting
import torch
from torch import nn
from tqdm import tqdm

from pyro_vae import MLP, VAE, CompiledSVI, likelihoods, posteriors, priors
from pyro_vae.diagnostics import decompose
from pyro_vae.objectives import IWAE
from pyro_vae.svi import mode_for

LATENT, HIDDEN, BATCH = 50, [200, 200], 20
STAGES = {1: 5, 5: 5, 50: 4}  # of the reduced protocol
# Test NLL and active units after 8 stages, static binarisation.
PUBLISHED = {1: (88.71, 19), 5: (87.63, 22), 50: (87.10, 24)}


def build(shape, mean):
    """The VAE of the paper's table with one layer."""
    network = partial(MLP, activation=nn.Tanh)
    vae = VAE(
        priors.Normal(LATENT),
        likelihoods.Bernoulli(network(LATENT, HIDDEN, shape)),
        posteriors.Normal(network(shape, HIDDEN, (2, LATENT))),
    )
    for layer in vae.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    vae.likelihood.centre(mean)
    return vae


def train(vae, k, split, stages, seed):
    """Train, and yield the number of each stage at its end."""
    adam = partial(torch.optim.Adam, lr=1e-3, eps=1e-4)
    steps = len(split) // BATCH
    budget = steps * sum(3**i for i in range(stages))
    svi = CompiledSVI(vae.model, vae.guide, adam, IWAE(k), mode=mode_for(budget))
    order = torch.Generator(split.x.device).manual_seed(seed)
    with tqdm(total=budget, desc=f"k = {k}, seed {seed}", mininterval=10) as bar:
        for stage in range(stages):
            for group in svi.optimizer.param_groups if stage else []:
                group["lr"] = 1e-3 * 10 ** (-stage / 7)
            for _ in range(3**stage):
                for batch in split.batches(BATCH, order, shuffle=True):
                    svi.step(*batch)
                bar.update(steps)
            yield stage + 1


def evaluated(vae, split, options):
    """L_5000 on some images, and how many units are active."""
    active = decompose(vae, protocol.some(split, options.images), draws=10, particles=1).active
    return {**protocol.likelihood(vae, split, options), "active_units": active}


def report(results, options):
    """A line for each k and number of stages."""
    chosen = reporting.chosen(results.rows, options)
    lines = [
        f"| k | passes | seeds | {reporting.bounds(chosen)} | active "
        "| against k = 1, paired | published, after 3,280 passes (active) |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = sorted({(row["stages"], row["k"]) for row in chosen})
    for stages, k in cells:
        own, single = (
            [row for row in chosen if (row["stages"], row["k"]) == (stages, n)] for n in (k, 1)
        )
        nats = np.mean([row["value_nats"] for row in own])
        units = np.mean([row["active_units"] for row in own])
        gain = reporting.gain(own, single) if k > 1 else ""
        published = "-{:.2f} ({})".format(*PUBLISHED[k])
        passes = sum(3**i for i in range(stages))
        lines.append(
            f"| {k} | {passes} | {len(own)} | {nats:.2f} | {units:.1f} | {gain} | {published} |"
        )
    reporting.write("iwae", "\n".join(lines) if cells else "", options)


def main():
    parser = protocol.arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--k", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stages", type=int, help="stages of the learning rate, 8 for all")
    parser.add_argument("--images", type=int, default=2000, help="test images for L_5000")
    options = protocol.ready(parser)
    results = protocol.Results(options.out / "iwae_table.json")
    wanted = itertools.product(options.seeds, options.k)
    for seed, k in [] if options.report else wanted:
        stages = options.stages or STAGES[k]
        about = {"figure": "IWAE", "k": k, "seed": seed, **protocol.asked(options)}
        if results.has(**about, budget=stages):
            continue
        data = protocol.load("static", options)
        pyro.set_rng_seed(seed)
        vae = build(data.shape, data.train.mean().cpu()).to(options.device)
        rows = [
            {**about, "method": f"k = {k}", "stages": stage, "budget": stages}
            | evaluated(vae, data.test, options)
            for stage in train(vae, k, data.train, stages, seed)
            if stage >= min(4, stages)
        ]
        results.add(rows)
    report(results, options)


if __name__ == "__main__":
    main()
