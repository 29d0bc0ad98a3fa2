"""What a prior, a posterior, an objective and a layer are worth, on static binarised MNIST.

    python examples/benchmarks/comparisons.py --data-dir DATA --workers 2

Each variant changes one part of one VAE (50 latents, two hidden layers of 200 tanh units, output
bias from the training mean; Adam at 1e-3, batches of 100, a warm-up of 10 %, best weights by the
bound on the validation images) and is trained from the same five seeds. The table has the paired
differences in L_200, the importance-weighted bound of 200 draws, on 2,000 test images drawn at
random, with 95 % t-intervals over the seeds. The budget is small beside that of the published
figures, so that only sign and size of differences compare, not values. Runs that the results
file holds already are not repeated.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyro
import torch
from scipy import stats
from torch import nn

from pyro_vae import MLP, VAE, HierarchicalVAE, bound, data, fit, likelihoods, posteriors, priors
from pyro_vae.objectives import IWAE, Trace_ELBO

LATENT, HIDDEN, SHAPE, DRAWS = 50, [200, 200], (1, 28, 28), 200
network = partial(MLP, activation=nn.Tanh)

# Published differences in test log-likelihood: who, variant and baseline, binarisation.
PUBLISHED = {
    "VampPrior": (88.56 - 85.57, "Tomczak & Welling 2018, static"),
    "flow posterior": (86.55 - 84.20, "IAF, bound, Sylvester flows' table, dynamic"),
    "IWAE, k = 5": (88.71 - 87.63, "Burda et al. 2016, static"),
    "two layers": (88.71 - 88.08, "Burda et al. 2016, static"),
}


def decoder(latent):
    return likelihoods.Bernoulli(network(latent, HIDDEN, SHAPE))


def encoder():
    return posteriors.Normal(network(SHAPE, HIDDEN, (2, LATENT)))


def standard(x):
    return VAE(priors.Normal(LATENT), decoder(LATENT), encoder())


def vamp(x):
    posterior = encoder()
    return VAE(priors.VampPrior(posterior, x, components=500), decoder(LATENT), posterior)


def flow(x):
    family = posteriors.Flow
    posterior = family(network(SHAPE, HIDDEN, family.outputs(LATENT)), LATENT, hidden=[200])
    return VAE(priors.Normal(LATENT), decoder(LATENT), posterior)


def layers(x):
    """As Burda et al.: 100 latents next to the data and 50 above, inferred from below."""
    return HierarchicalVAE(
        [priors.Normal(LATENT), posteriors.Normal(network(LATENT, [100, 100], (2, 100)))],
        decoder(100),
        [
            posteriors.Normal(network(100, [100, 100], (2, LATENT))),
            posteriors.Normal(network(SHAPE, HIDDEN, (2, 100))),
        ],
        bottom_up=True,
    )


VARIANTS = {
    "standard": (standard, Trace_ELBO(max_plate_nesting=1)),
    "VampPrior": (vamp, Trace_ELBO(max_plate_nesting=1)),
    "flow posterior": (flow, Trace_ELBO(max_plate_nesting=1)),
    "IWAE, k = 5": (standard, IWAE(5)),
    "two layers": (layers, Trace_ELBO(max_plate_nesting=1)),
}


def run(variant, seed, epochs, directory, rows):
    """Train one variant from one seed, and return what the test says of it."""
    torch.set_num_threads(1)
    make, objective = VARIANTS[variant]
    mnist = data.load("binarized-mnist", directory=directory).map(lambda part: part[:rows])
    pyro.set_rng_seed(seed)
    vae = make(mnist.train.batch()[0])
    vae.likelihood.centre(mnist.train.mean())
    options = {"epochs": epochs, "batch_size": 100, "seed": seed, "progress": False}
    metrics = fit(vae, mnist, objective=objective, **options)
    # The same images for all runs; their numbers in the test split are in the results.
    chosen = np.sort(np.random.default_rng(0).permutation(len(mnist.test))[:2000])
    test = mnist.test[torch.as_tensor(chosen)]
    pyro.set_rng_seed(1000 + seed)
    weighted = IWAE(DRAWS)
    total = sum(weighted.loss(vae.model, vae.guide, *batch) for batch in test.batches(50))
    summary = bound(vae, test.batches(500), particles=10).summary()
    return {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "rows": rows,
        "samples": metrics[-1]["samples"],
        "binarisation": "static",
        f"L_{DRAWS}": -total / len(test),
        **{f"test_{key}": value for key, value in summary.items()},
        "best_epoch": max(metrics, key=lambda row: row["elbo"])["epoch"],
    }


def table(results):
    """Markdown of the mean of each variant and of its paired differences to the first."""
    values = {
        name: {row["seed"]: row for row in results if row["variant"] == name} for name in VARIANTS
    }
    key, base = f"L_{DRAWS}", values["standard"]
    lines = [
        f"| variant | seeds | {key} | ELBO | {key} against standard, paired | published |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in values.items():
        seeds = sorted(runs.keys() & base.keys())
        if not seeds:
            continue
        mean = np.mean([runs[seed][key] for seed in seeds])
        elbo = np.mean([runs[seed]["test_elbo"] for seed in seeds])
        gain, known = "", ""
        if name in PUBLISHED:
            gains = [runs[seed][key] - base[seed][key] for seed in seeds]
            gain = f"{np.mean(gains):+.2f}"
            if len(gains) > 1:
                half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
                gain += f" ({np.mean(gains) - half:+.2f} to {np.mean(gains) + half:+.2f})"
            known = "{:+.2f}: {}".format(*PUBLISHED[name])
        lines.append(f"| {name} | {len(seeds)} | {mean:.2f} | {elbo:.2f} | {gain} | {known} |")
    return "\n".join(lines)


def alike(row, options):
    """Whether a result is of so many epochs and images; one that does not say is of all."""
    return (row["epochs"], row.get("rows")) == (options.epochs, options.rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--epochs", type=int, default=20, help="passes over 50,000 images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rows", type=int, help="use the first so many images only, for a trial")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "comparisons.json"

    results = json.loads(file.read_text()) if file.exists() else []
    done = {(row["variant"], row["seed"]) for row in results if alike(row, options)}
    wanted = itertools.product(
        options.seeds, {"standard": None, **dict.fromkeys(options.variants)}
    )
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        runs = [
            pool.submit(run, variant, seed, options.epochs, options.data_dir, options.rows)
            for seed, variant in wanted
            if (variant, seed) not in done
        ]
        for finished in as_completed(runs):
            row = finished.result()
            results.append(row)
            file.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{row['variant']}, seed {row['seed']}: {row[f'L_{DRAWS}']:.2f}", flush=True)
    print(table([row for row in results if alike(row, options)]))


if __name__ == "__main__":
    main()
