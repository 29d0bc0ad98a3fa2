"""Frey Face with a Normal likelihood of per-element scale, as in Auto-Encoding Variational Bayes.

    python examples/benchmarks/frey_face.py --data-dir DATA

10 latents, 200 hidden tanh units, means in (0, 1), minibatches of 100; Adam and no prior on the
weights, where the paper has Adagrad and MAP. Three runs: the bound itself under a random split,
which leaks neighbouring frames into the test; the same with the final block of frames as the
test; and a KL of weight 8, whose samples are faces where those of weight 1 meet holes that the
aggregated posterior leaves in the prior. Every value printed is the bound of weight 1.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import nn

from pyro_vae import MLP, VAE, bound, data, fit, likelihoods, plots, posteriors, priors
from pyro_vae.objectives import BetaELBO

RUNS = {
    "random split": {"ordered": False, "weight": 1.0},
    "final block": {"ordered": True, "weight": 1.0},
    "random split, KL of weight 8": {"ordered": False, "weight": 8.0},
}


def build(shape):
    """The networks of the paper, with a floor under the scales."""
    network = partial(MLP, activation=nn.Tanh)
    return VAE(
        prior=priors.Normal(10),
        likelihood=likelihoods.Normal(
            network(10, [200], (2, *shape)), per_element=True, bounded=True, floor=0.02
        ),
        posterior=posteriors.Normal(network(shape, [200], (2, 10))),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--samples", type=float, default=1e6, help="training samples in a run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    results = []
    print("| run | passes 900 at | samples | test ELBO | reconstruction | KL |")
    print("|---|---|---|---|---|---|")
    for name, run in RUNS.items():
        pyro.set_rng_seed(0)
        faces = data.load("frey-face", directory=options.data_dir, ordered=run["ordered"])
        vae = build(faces.shape)
        epochs = max(round(options.samples / len(faces.train)), 1)
        rows = fit(
            vae,
            faces,
            objective=BetaELBO(run["weight"]),
            epochs=epochs,
            batch_size=100,
            warmup=0,
        )
        generator = torch.Generator().manual_seed(0)
        test = bound(vae.eval(), faces.test.batches(100, generator), particles=10).summary()
        passed = next((row["samples"] for row in rows if row["elbo"] > 900), None)
        samples = rows[-1]["samples"]
        print(
            f"| {name} | {passed or 'never'} | {samples} | {test['elbo']:.0f} ± "
            f"{test['standard_error']:.0f} | {test['reconstruction']:.0f} | {test['kl']:.1f} |"
        )
        results.append({"run": name, "passed": passed, "samples": samples, "seed": 0, **test})
        figure = plots.grid(vae.sample(64, mean=True), columns=16)
        plots.save(
            figure, options.out / f"frey_face_{'-'.join(name.replace(',', '').split())}.png"
        )
    (options.out / "frey_face.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
