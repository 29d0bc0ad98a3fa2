"""Appendix F of Auto-Encoding Variational Bayes: weights and latents inferred together.

    python examples/paper/appendix_f_full_vb.py --data-dir DATA

The paper derives it and shows no experiment. Here the networks of its Figure 3 (100 hidden units,
3 latents) learn 1,000 images of MNIST, once by a point estimate of all weights (AEVB) and once
with a Gaussian q(w) over the weights of the decoder, whose prior is N(0, I). Both are seen in the
bound of training and of test images; with weights inferred it is that at draws of q(w), without
the KL of the weights, which "train, with weights" has: a bound on log p(x_1, ..., x_N)/N. At some
points log p(x|w) of test images, by Appendix D, says what of a bound the encoder loses. Adam in
place of Adagrad for both, which takes the logarithms of scales down faster.
"""

import copy
from functools import partial

import protocol
import pyro
import pyro.distributions as dist
import reporting
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call

from pyro_vae import VAE, likelihoods, priors
from pyro_vae.objectives import Trace_ELBO
from pyro_vae.vae import declare

LATENT, HIDDEN, ROWS, DRAWS = 3, 100, 1000, 10
STEP_SIZE = 1e-3  # of Adam, where none is given
METHODS = ["point estimate", "weights inferred"]
STYLES = {"train": "--", "test": "-", "test, log p(x)": "o", "train, with weights": ":"}
MARGINAL = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]  # where log p(x|w) is estimated


class Inferred(nn.Module):
    """``w ~ p(w)``, and of each datum ``z ~ p(z), x ~ p(x|z,w)``, with Gaussian q(w) q(z|x)."""

    def __init__(self, shape, rows, scale):
        super().__init__()
        vae = protocol.build("static", shape, LATENT, HIDDEN, scale)
        self.rows, self.posterior = rows, vae.posterior
        self.network = vae.likelihood.network.requires_grad_(False)  # w stands in for its weights
        named = dict(self.network.named_parameters())
        self.names = list(named)
        self.loc = nn.ParameterList([value.clone() for value in named.values()])
        self.log_scale = nn.ParameterList([torch.full_like(v, -4.0) for v in named.values()])

    def model(self, x):
        declare(self)
        weights = {
            name: pyro.sample(name, dist.Normal(torch.zeros_like(loc), 1.0).to_event(loc.dim()))
            for name, loc in zip(self.names, self.loc, strict=True)
        }
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            logits = functional_call(self.network, weights, (z,))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(x.dim() - 1), obs=x)

    def guide(self, x):
        declare(self)
        for name, loc, log_scale in zip(self.names, self.loc, self.log_scale, strict=True):
            pyro.sample(name, dist.Normal(loc, log_scale.exp()).to_event(loc.dim()))
        with self.plate(x):
            pyro.sample("z", self.posterior(x))

    def plate(self, x):
        """The data, of which each row of a minibatch stands for N/M, and the weights for 1."""
        return pyro.plate("data", self.rows, subsample=torch.arange(len(x)), dim=-1)

    @torch.no_grad()
    def drawn(self):
        """A VAE with a draw of the weights."""
        network = copy.deepcopy(self.network)
        for weight, loc, log_scale in zip(
            network.parameters(), self.loc, self.log_scale, strict=True
        ):
            weight.copy_(dist.Normal(loc, log_scale.exp()).sample())
        prior = priors.Normal(LATENT).to(self.loc[0].device)
        return VAE(prior, likelihoods.Bernoulli(network), self.posterior)

    @torch.no_grad()
    def weights_kl(self):
        """KL of q(w) from the prior, in nats."""
        return sum(
            float(0.5 * (loc**2 + (2 * s).exp() - 1 - 2 * s).sum())
            for loc, s in zip(self.loc, self.log_scale, strict=True)
        )


def values(pair, splits):
    """The bound of each split by its name, and where there is q(w), of the weights as well."""
    vaes = vaes_of(pair, DRAWS)
    found = {
        name: sum(protocol.elbo(vae, split)[0] for vae in vaes) / len(vaes)
        for name, split in splits.items()
    }
    if isinstance(pair, Inferred):
        found["train, with weights"] = found["train"] - pair.weights_kl() / pair.rows
    return found


def vaes_of(pair, draws):
    """The point estimate, or VAEs with draws of the weights."""
    return [pair.drawn() for _ in range(draws)] if isinstance(pair, Inferred) else [pair]


def marginal(pair, images):
    """Log p(x|w) of some images, at the point estimate or at two draws of the weights."""
    found = [protocol.appendix_d(vae, images) for vae in vaes_of(pair, 2)]
    return float(torch.stack(found).mean())


def curve(method, splits, options, about):
    """The rows of one curve."""
    pyro.set_rng_seed(options.seed)
    rows, shape = len(splits["train"]), splits["train"].x.shape[1:]
    if method == "point estimate":  # with the prior's share of a minibatch, as in Figure 2
        pair = protocol.build("static", shape, LATENT, HIDDEN, options.initial_scale)
        adam = {"weight_decay": protocol.BATCH / rows}
    else:
        pair, adam = Inferred(shape, rows, options.initial_scale), {}
    pair.to(options.device)
    lr = options.step_size or STEP_SIZE
    run = protocol.train(
        pair,
        Trace_ELBO(max_plate_nesting=1),
        splits["train"],
        samples=options.samples,
        seed=options.seed,
        make=partial(torch.optim.Adam, lr=lr, **adam),
        title=method,
    )
    about = {**about, "method": method, "device": options.device.type, "step_size": lr}
    images, kept = protocol.some(splits["test"], options.images), []
    for seen, _ in run:
        found = values(pair, splits)
        if seen in MARGINAL or seen >= options.samples:
            found["test, log p(x)"] = marginal(pair, images)
        kept += [
            {**about, "split": name, "training_samples": seen, "value_nats": value}
            for name, value in found.items()
        ]
    return kept


def report(results, options):
    """The picture, and a table of the ends of the curves."""
    chosen = reporting.chosen(results.rows, options)
    if not chosen:
        reporting.write("appendix_f", "", options)
        return
    picture = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = picture.subplots()
    lines = ["| method | split | best | at samples | at the end |", "|---|---|---|---|---|"]
    for color, method in enumerate(METHODS):
        rows = [row for row in chosen if row["method"] == method]
        for split, style in STYLES.items():
            points = reporting.line(rows, split=split)
            if not points:
                continue
            axes.plot(
                list(points), list(points.values()), style, color=f"C{color}",
                label=f"{method}, {split}",
            )  # fmt: skip
            best = max(points, key=points.get)
            lines.append(
                f"| {method} | {split} | {points[best]:.1f} | {best:.2g} "
                f"| {points[max(points)]:.1f} |"
            )
    axes.set_xscale("log")
    axes.set_xlabel("training samples seen")
    axes.set_ylabel("nats per image")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(picture).print_png(str(reporting.file_of("appendix_f", options)))
    reporting.write("appendix_f", "\n".join(lines), options)


def main():
    parser = protocol.arguments(__doc__, 1e7)
    parser.add_argument("--images", type=int, default=500, help="test images for log p(x|w)")
    options = protocol.ready(parser)
    results = protocol.Results(options.out / "appendix_f.json")
    about = {"figure": "F", "panel": f"Ntrain={ROWS}", "binarisation": "static"}
    about |= {**protocol.asked(options), "budget": round(options.samples)}
    for method in [] if options.report else METHODS:
        if results.has(**about, method=method):
            continue
        data = protocol.load("static", options)
        splits = {"train": protocol.some(data.train, ROWS), "test": data.test}
        results.add(curve(method, splits, options, about))
    report(results, options)


if __name__ == "__main__":
    main()
