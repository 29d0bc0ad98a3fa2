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
import warnings
from functools import partial

import numpy as np
import protocol
import pyro
import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from pyro_vae import MLP, VAE, CompiledSVI, likelihoods, log_likelihood, posteriors, priors
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


def train(vae, k, split, stages, options):
    """Train, and yield the number of each stage at its end."""
    adam = partial(torch.optim.Adam, lr=1e-3, eps=1e-4)
    steps = len(split) // BATCH
    budget = steps * sum(3**i for i in range(stages))
    svi = CompiledSVI(vae.model, vae.guide, adam, IWAE(k), mode=mode_for(budget))
    order = torch.Generator(options.device).manual_seed(options.seed)
    with tqdm(total=budget, desc=f"k = {k}, seed {options.seed}", mininterval=10) as bar:
        for stage in range(stages):
            for _ in range(3**stage):
                for batch in split.batches(BATCH, order, shuffle=True):
                    svi.step(*batch)
                    for group in svi.optimizer.param_groups:
                        group["lr"] = 1e-3 * 10 ** (-stage / 7)
                bar.update(steps)
            yield stage + 1


def evaluated(vae, split, options):
    """L_5000 on some images, and how many units are active."""
    test = protocol.some(split, options.images)
    draws = 100 if options.small else 5000
    estimate = log_likelihood(vae.eval(), test, samples=draws)
    return {
        "device": options.device.type,
        "draws": draws,
        "value_nats": estimate.mean,
        "standard_error": estimate.standard_error,
        "active_units": decompose(vae, test, draws=10, particles=1).active,
    }


def interval(differences):
    """Mean of some differences with a 95 % t-interval."""
    mean = np.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def report(results, options):
    """A line for each k and number of stages."""
    lines = [
        "| k | passes | seeds | L_5000 | active | against k = 1, paired | published (3,280) |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = sorted({(row["stages"], row["k"]) for row in results.rows})
    for stages, k in cells:
        own = {
            n: {r["seed"]: r for r in results.rows if (r["stages"], r["k"]) == (stages, n)}
            for n in (1, k)
        }
        seeds = sorted(own[k])
        nats = np.mean([own[k][seed]["value_nats"] for seed in seeds])
        units = np.mean([own[k][seed]["active_units"] for seed in seeds])
        pairs = [
            own[k][seed]["value_nats"] - own[1][seed]["value_nats"]
            for seed in seeds
            if seed in own[1]
        ]
        gain = interval(pairs) if k > 1 and pairs else ""
        published = "-{:.2f} ({})".format(*PUBLISHED[k])
        passes = sum(3**i for i in range(stages))
        lines.append(
            f"| {k} | {passes} | {len(seeds)} | {nats:.2f} | {units:.1f} | {gain} | {published} |"
        )
    protocol.write("iwae", "\n".join(lines), options)


def main():
    parser = protocol.arguments(__doc__, None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--k", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stages", type=int, help="stages of the learning rate, 8 for all")
    parser.add_argument("--images", type=int, default=2000, help="test images for L_5000")
    options = protocol.ready(parser)
    warnings.filterwarnings("ignore", "the importance weights")
    results = protocol.Results(options.out / "iwae_table.json")
    wanted = itertools.product(options.seeds, options.k)
    for seed, k in [] if options.report else wanted:
        options.seed, stages = seed, options.stages or STAGES[k]
        about = {"figure": "IWAE", "k": k, "binarisation": "static", "seed": seed}
        if results.has(**about, budget=stages):
            continue
        data = protocol.load("static", options)
        pyro.set_rng_seed(seed)
        vae = build(data.shape, data.train.mean().cpu()).to(options.device)
        rows = [
            {**about, "method": f"k = {k}", "stages": stage, "budget": stages}
            | evaluated(vae, data.test, options)
            for stage in train(vae, k, data.train, stages, options)
            if stage >= min(4, stages)
        ]
        results.add(rows)
    report(results, options)


if __name__ == "__main__":
    main()
