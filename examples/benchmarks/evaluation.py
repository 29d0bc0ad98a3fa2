"""What an estimate of log p(x) costs, and whether four estimators agree, on binarised MNIST.

    python examples/benchmarks/evaluation.py --data-dir DATA

*estimators* trains a VAE with 2 latents and holds importance sampling, annealed importance
sampling, Appendix D of Auto-Encoding Variational Bayes and quadrature beside each other on test
images drawn at random. *speed* times `log_likelihood` at 784-400-20 against the matrix products of
the decoder alone and, where pythae is installed, against its estimator on the same weights; the
three take turns in one process. *full* is L_5000 of all 10,000 test images.
"""

import argparse
import json
import resource
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import pyro
import torch
from torch import nn

from pyro_vae import MLP, VAE, data, fit, likelihoods, log_likelihood, posteriors, priors
from pyro_vae.annealing import annealed_importance_sampling, bidirectional, hmc_likelihood
from pyro_vae.evaluation import quadrature

SHAPE = (1, 28, 28)


def trained(mnist, latent, epochs):
    """A VAE with one hidden layer of 400 units."""
    pyro.set_rng_seed(0)
    vae = VAE(
        prior=priors.Normal(latent),
        likelihood=likelihoods.Bernoulli(MLP(latent, [400], SHAPE)),
        posterior=posteriors.Normal(MLP(SHAPE, [400], (2, latent))),
    )
    fit(vae, mnist, epochs=epochs, seed=0, progress=False)
    return vae.eval()


def subset(mnist, count):
    """Test images drawn at random, binarised at a threshold of one half."""
    rows = np.sort(np.random.default_rng(0).permutation(len(mnist.test))[:count])
    return mnist.test[torch.as_tensor(rows)].batch()


def estimators(mnist, epochs, count):
    """The four estimates of each image, and the bounds of bidirectional Monte Carlo."""
    vae, batch = trained(mnist, 2, epochs), subset(mnist, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the many small steps would wait for each other
    truth = quadrature(vae, batch)
    found = {
        "L_5000": log_likelihood(vae, batch, samples=5000),
        "AIS from q": annealed_importance_sampling(vae, batch, distributions=50, leapfrog=5),
        "AIS from p(z)": annealed_importance_sampling(
            vae, batch, distributions=300, leapfrog=5, from_prior=True
        ),
        "Appendix D": hmc_likelihood(vae, batch, samples=100),
    }
    flags = {
        "L_5000": found["L_5000"].unreliable,
        "AIS from q": found["AIS from q"].unreliable,
        "AIS from p(z)": found["AIS from p(z)"].unreliable,
        "Appendix D": found["Appendix D"].apart,
    }
    rows = []
    for name, each in found.items():
        apart = each.log_likelihood - truth.log_likelihood
        far = apart.abs() > 3 * each.monte_carlo_error
        rows.append(
            {
                "estimator": name,
                "mean": float(each.log_likelihood.mean()),
                "apart": float(apart.mean()),
                "largest_in_errors": float((apart / each.monte_carlo_error).abs().max()),
                "within_3_errors": float((~far).double().mean()),
                "flagged": float(flags[name].double().mean()),
                "far_and_not_flagged": float((far & ~flags[name]).double().mean()),
            }
        )
    gaps = {
        count: bidirectional(vae, batch, distributions=count, leapfrog=5).gap
        for count in (0, 10, 50)
    }
    torch.set_num_threads(threads)
    return {
        "images": count,
        "epochs": epochs,
        "quadrature": float(truth.log_likelihood.mean()),
        "quadrature_error": float(truth.error.max()),
        "unreliable": float(found["L_5000"].unreliable.double().mean()),
        "estimators": rows,
        "bidirectional_gaps": gaps,
    }


def products(draws):
    """Seconds of the decoder's two matrix products for so many draws."""
    first, second = torch.randn(20, 400), torch.randn(400, 784)
    z = torch.randn(1300, 20)
    began = time.perf_counter()
    for _ in range(0, draws, len(z)):
        z @ first @ second
    return (time.perf_counter() - began) * draws / (-(-draws // len(z)) * len(z))


def as_pythae(vae):
    """The same weights as a model of pythae's."""
    from pythae import models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            BaseEncoder.__init__(self)
            self.inner = vae.posterior.network

        def forward(self, x):
            loc, log_scale = self.inner(x).unbind(-2)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self):
            BaseDecoder.__init__(self)
            self.inner = nn.Sequential(vae.likelihood.network, nn.Sigmoid())

        def forward(self, z):
            return ModelOutput(reconstruction=self.inner(z))

    config = models.VAEConfig(input_dim=SHAPE, latent_dim=20, reconstruction_loss="bce")
    return models.VAE(config, Encoder(), Decoder()).eval()


def agreement(vae, theirs, x, *, draws=100, repeats=100):
    """Ours and pythae's mean of many L_100 of each image, which estimate the same number.

    The weights of single draws have no variance where k-hat is high, so that the Monte Carlo
    error of one L_5000 says little; L_100 itself has one, and shows it from one to the next.
    pythae draws whole batches of 100, the least number of draws that it makes.
    """
    ours = log_likelihood(vae, x.repeat(repeats, 1, 1, 1), samples=draws).log_likelihood
    ours = ours.reshape(repeats, len(x))
    values = [[theirs.get_nll(each[None], n_samples=draws) for each in x] for _ in range(repeats)]
    others = torch.tensor(values, dtype=torch.float64)
    apart = ours.mean(0) - others.mean(0)
    errors = ((ours.var(0) + others.var(0)) / repeats).sqrt()
    return {
        "images": len(x),
        "repeats": repeats,
        "ours": float(ours.mean()),
        "pythae": float(others.mean()),
        "apart": float(apart.mean()),
        "error": float(errors.square().sum().sqrt() / len(x)),
        "largest_in_errors": float((apart / errors).abs().max()),
    }


def speed(mnist, epochs, rounds):
    """Draws a second of each, the median over rounds in which they take turns."""
    vae = trained(mnist, 20, epochs)
    (x,) = subset(mnist, 40)
    try:
        theirs = as_pythae(vae)
    except ImportError:
        theirs = None
    seconds = {"products": [], "ours": [], "pythae": []}
    draws = 5000
    with torch.no_grad():
        log_likelihood(vae, x, samples=500)
        products(100_000)
        for _ in range(rounds):
            seconds["products"].append(products(len(x) * draws) / len(x) / draws)
            began = time.perf_counter()
            log_likelihood(vae, x, samples=draws)
            seconds["ours"].append((time.perf_counter() - began) / len(x) / draws)
            if theirs is not None:
                few = x[:10]
                began = time.perf_counter()
                theirs.get_nll(few, n_samples=draws)
                seconds["pythae"].append((time.perf_counter() - began) / len(few) / draws)
        agreed = agreement(vae, theirs, x) if theirs is not None else None
    rate = {name: 1 / median(each) for name, each in seconds.items() if each}
    pairs = list(zip(seconds["ours"], seconds["products"], strict=True))
    return {
        "threads": torch.get_num_threads(),
        "draws_per_second": rate,
        "ours_over_products": median(ours / floor for ours, floor in pairs),
        "throughput_over_pythae": rate["ours"] / rate["pythae"] if theirs else None,
        "mean_of_L_100": agreed,
    }


def full(mnist, epochs, count):
    """Time and memory of L_5000 of the test images."""
    vae = trained(mnist, 20, epochs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    estimate = log_likelihood(vae, mnist.test[:count], samples=5000)
    return {
        "images": len(estimate.log_likelihood),
        "seconds": time.perf_counter() - began,
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_before_GiB": before,
        **estimate.summary(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--epochs", type=int, default=5, help="passes over 54,000 images")
    parser.add_argument("--count", type=int, default=60, help="images for the estimators")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the timings")
    parser.add_argument("--rows", type=int, help="use the first so many images only, for a trial")
    parts = ["estimators", "speed", "full"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "the importance weights")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "evaluation.json"
    mnist = data.load("mnist", directory=options.data_dir, view=data.threshold)
    mnist = mnist.map(lambda part: part[: options.rows])
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in options.parts:
        if part == "estimators":
            results[part] = estimators(mnist, options.epochs, options.count)
        elif part == "speed":
            results[part] = speed(mnist, options.epochs, options.rounds)
        else:
            results[part] = full(mnist, options.epochs, options.rows)
        file.write_text(json.dumps(results, indent=2) + "\n")
        print(part, json.dumps(results[part], indent=2), flush=True)


if __name__ == "__main__":
    main()
