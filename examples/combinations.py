"""Which prior, likelihood, posterior, objective and data go together: trained, or refused.

    python examples/combinations.py             # writes combinations.md

Every pair is built, checked and trained for 30 steps on the embedded digits, in the guise that
its likelihood needs; it counts as trained where the bound is finite and better than before. Two
parts of a user's own are among them, a prior over the simplex and a discrete prior with its
posterior, since those are what most objectives and posteriors must refuse.
"""

import itertools
import re
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import zuko
from torch import nn

from pyro_vae import MLP, VAE, bound, data, fit, likelihoods, networks, posteriors, priors
from pyro_vae.objectives import (
    IWAE,
    BetaELBO,
    FreeBits,
    Renyi,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    WakeSleep,
)
from pyro_vae.posteriors import Posterior
from pyro_vae.priors import Prior
from pyro_vae.testing import check_pair

LATENT, WORDS, FEATURES = 3, 64, 8
FILL = partial(networks.fill, dims=1)  # from x with NaN to values and mask


class Simplex(Prior):
    """A Dirichlet, whose z lies in the simplex."""

    def forward(self, *context: torch.Tensor) -> dist.TorchDistribution:
        return dist.Dirichlet(torch.ones(LATENT))


class Discrete(Prior):
    """One of LATENT classes, one-hot."""

    def forward(self, *context: torch.Tensor) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=torch.zeros(LATENT))


class OneHot(Posterior):
    """The posterior for `Discrete`."""

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=self.network(x)[..., 0, :])


def flow(spline: bool) -> Posterior:
    encoder = MLP(WORDS, [16], posteriors.Flow.outputs(LATENT, features=FEATURES))
    return posteriors.Flow(encoder, LATENT, spline=spline, features=FEATURES, hidden=[16])


def gaussian(family: type[Posterior]) -> Posterior:
    return family(MLP(WORDS, [16], family.outputs(LATENT)))


PRIORS = {
    "Normal": lambda x, q: priors.Normal(LATENT),
    "Normal, learned": lambda x, q: priors.Normal(LATENT, learned=True),
    "Laplace": lambda x, q: priors.Laplace(LATENT),
    "StudentT": lambda x, q: priors.StudentT(LATENT),
    "MixtureOfNormals": lambda x, q: priors.MixtureOfNormals(LATENT, components=5),
    "VampPrior": lambda x, q: priors.VampPrior(q, x, components=5),
    "Flow": lambda x, q: priors.Flow(LATENT, transforms=2, hidden=[16]),
    "zuko's MAF": lambda x, q: zuko.flows.MAF(LATENT, transforms=1, hidden_features=[16]),
    "your own over the simplex": lambda x, q: Simplex(),
    "your own, discrete": lambda x, q: Discrete(),
}
POSTERIORS = {
    "Normal": partial(gaussian, posteriors.Normal),
    "LowRankNormal": partial(gaussian, posteriors.LowRankNormal),
    "FullRankNormal": partial(gaussian, posteriors.FullRankNormal),
    "Flow": partial(flow, spline=False),
    "Flow, spline": partial(flow, spline=True),
    "your own, discrete": partial(gaussian, OneHot),
}
OBJECTIVES = {
    "Trace_ELBO": lambda: Trace_ELBO(max_plate_nesting=1),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(max_plate_nesting=1),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(max_plate_nesting=1),
    "BetaELBO": lambda: BetaELBO(0.5),
    "BetaELBO from 0": lambda: BetaELBO(1.0, start=0.0, steps=10),
    "FreeBits": lambda: FreeBits(0.1),
    "IWAE": lambda: IWAE(5),
    "IWAE, doubly": lambda: IWAE(5, doubly_reparameterised=True),
    "Renyi": lambda: Renyi(0.5),
    "Renyi, doubly": lambda: Renyi(0.5, doubly_reparameterised=True),
    "WakeSleep": lambda: WakeSleep(),
}


def decoder(*outputs: int) -> nn.Module:
    return MLP(LATENT, [16], (*outputs, WORDS))


LIKELIHOODS = {
    "Bernoulli": lambda: likelihoods.Bernoulli(decoder()),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(decoder()),
    "Normal": lambda: likelihoods.Normal(decoder()),
    "Laplace": lambda: likelihoods.Laplace(decoder()),
    "StudentT": lambda: likelihoods.StudentT(decoder()),
    "Categorical": lambda: likelihoods.Categorical(decoder(256)),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(decoder(2)),
    "DiscretizedLogistic, 3 components": lambda: likelihoods.DiscretizedLogistic(
        decoder(9), components=3
    ),
    "Poisson": lambda: likelihoods.Poisson(decoder()),
    "NegativeBinomial": lambda: likelihoods.NegativeBinomial(decoder(), WORDS),
    "ZeroInflatedNegativeBinomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(
        decoder(2), WORDS
    ),
    "Multinomial": lambda: likelihoods.Multinomial(decoder()),
    "Missing, of Normal": lambda: likelihoods.Missing(likelihoods.Normal(decoder())),
    "Missing, of Bernoulli": lambda: likelihoods.Missing(likelihoods.Bernoulli(decoder())),
}


def kinds() -> dict[str, torch.Tensor]:
    """300 of the digits in several guises, rows of 64 values."""
    grey = data.load("digits").train.x[:300].flatten(1)
    counts = (16 * grey).round()
    holes = torch.rand(grey.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return {
        "binary": (grey > 0.5).float(),
        "grey in [0, 1]": grey,
        "levels 0 to 255": (255 * grey).round(),
        "counts": counts,
        "real numbers": (grey - grey.mean()) / grey.std(),
        "binary, some missing": (grey > 0.5).float().masked_fill(holes, float("nan")),
    }


# What a likelihood is for, for the tables in which it does not matter.
SUITS = {
    **dict.fromkeys(LIKELIHOODS, "counts"),
    "Bernoulli": "binary",
    "ContinuousBernoulli": "grey in [0, 1]",
    "Normal": "real numbers",
    "Laplace": "real numbers",
    "StudentT": "real numbers",
    "Missing, of Normal": "binary, some missing",
    "Missing, of Bernoulli": "binary, some missing",
}


def built(prior: str, likelihood: str, posterior: str, x: torch.Tensor) -> VAE:
    """The VAE of these parts for x, its encoder fed as their likelihood and x need it."""
    q, p = POSTERIORS[posterior](), LIKELIHOODS[likelihood]()
    q.network.transform = p.encoded
    if x.isnan().any():
        q.network = MLP(2 * WORDS, [16], q.network.output, transform=FILL)
    return VAE(PRIORS[prior](x, q), p, q)


def outcome(prior: str, likelihood: str, posterior: str, objective: str, kind: str) -> str:
    """Train the combination: an empty string, or the sentence by which it is refused.

    Raises:
        AssertionError: The bound is not finite or has not improved, or a refusal came after
            the weights had changed.
    """
    pyro.set_rng_seed(0)
    x = kinds()[kind]
    try:
        vae = built(prior, likelihood, posterior, x)
    except (ValueError, TypeError) as error:
        return str(error)
    before = [parameter.clone() for parameter in vae.parameters()]
    try:
        split = data.split(x, test=0, missing=bool(x.isnan().any()))
        batches = [split.train.batch()]
        check_pair(vae, *batches[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # which fit refuses
            start = bound(vae, batches, particles=8).elbo.mean()
        fit(
            vae,
            split,
            objective=OBJECTIVES[objective](),
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            epochs=6,
            batch_size=54,
            warmup=0,
            progress=False,
        )
    except (ValueError, TypeError) as error:
        assert all(map(torch.equal, before, vae.parameters())), "refused after the first step"
        return str(error)
    end = bound(vae, batches, particles=8).elbo.mean()
    assert end.isfinite(), f"the bound is {end}"
    assert end > start, f"the bound went from {start:.2f} to {end:.2f}"
    return ""


def cells() -> list[tuple[str, str, str, tuple[str, str, str, str, str]]]:
    """Every cell of every table: its table, row and column, and what it trains."""
    found = []
    for prior, posterior in itertools.product(PRIORS, POSTERIORS):
        parts = (prior, "Bernoulli", posterior, "Trace_ELBO", "binary")
        found.append(("Prior and posterior", prior, posterior, parts))
    for objective, posterior in itertools.product(OBJECTIVES, POSTERIORS):
        prior = "your own, discrete" if posterior == "your own, discrete" else "Normal"
        parts = (prior, "Bernoulli", posterior, objective, "binary")
        found.append(("Objective and posterior", objective, posterior, parts))
    for likelihood, kind in itertools.product(LIKELIHOODS, kinds()):
        parts = ("Normal", likelihood, "Normal", "Trace_ELBO", kind)
        found.append(("Likelihood and data", likelihood, kind, parts))
    return found


def page(outcomes: dict[tuple[str, str, str], str]) -> str:
    """The tables as Markdown, with a note for each sentence of refusal."""
    notes: list[str] = []
    lines = [
        "# What goes together",
        "",
        "Generated by [`combinations.py`](combinations.py), which trains every cell for 30 steps",
        "on the embedded digits; the tests do it again. ✓: the bound is finite and has improved.",
        "A number: refused before the first step, by the sentence below.",
    ]
    for table in dict.fromkeys(table for table, _, _ in outcomes):
        columns = list(dict.fromkeys(c for t, _, c in outcomes if t == table))
        rows = list(dict.fromkeys(r for t, r, _ in outcomes if t == table))
        lines += ["", f"## {table}", "", f"| | {' | '.join(columns)} |"]
        lines.append("|---" * (1 + len(columns)) + "|")
        for row in rows:
            marks = []
            for column in columns:
                sentence = general(outcomes[table, row, column])
                if sentence and sentence not in notes:
                    notes.append(sentence)
                marks.append(str(1 + notes.index(sentence)) if sentence else "✓")
            lines.append(f"| {row} | {' | '.join(marks)} |")
    lines += ["", "## Why not", ""]
    lines += [f"{index}. {sentence}" for index, sentence in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def general(sentence: str) -> str:
    """A refusal without the figures and names in which it differs from cell to cell."""
    for pattern, general in (
        (r"^\d+ (values|data)", r"… \1"),
        (r", (row )?\S+( of a batch)? for one", ", … for one"),
        (r"support of \w+", "support of its law"),
        (r" \([A-Z]\w+\)", ""),
        (r"^(IWAE|Renyi) cannot", "the objective cannot"),
        (r"gradient of (IWAE|Renyi)", "gradient"),
    ):
        sentence = re.sub(pattern, general, sentence)
    return sentence


if __name__ == "__main__":
    found = {(table, row, column): outcome(*parts) for table, row, column, parts in cells()}
    text = page(found)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)
