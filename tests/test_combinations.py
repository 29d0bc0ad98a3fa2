"""What the page of combinations says of each is so, and 100 random ones train."""

import random
import re
import sys
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch

from pyro_vae import CompiledSVI

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import combinations  # noqa: E402

CELLS = combinations.cells()
PAGE = (EXAMPLES / "combinations.md").read_text()
NOTES = ["", *re.findall(r"^\d+\. (.*)$", PAGE, re.M)]


def shown(table, row, column):
    """What the page says of a cell: nothing, or the sentence by which it is refused."""
    lines = PAGE.partition(f"## {table}\n")[2].partition("\n## ")[0].strip().splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")]
    (marks,) = [line.split("|") for line in lines if line.startswith(f"| {row} |")]
    mark = marks[columns.index(column)].strip()
    return NOTES[0 if mark == "✓" else int(mark)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: ", ".join(cell[:3]))
def test_the_page_is_right(cell):
    table, row, column, parts = cell
    assert combinations.general(combinations.outcome(*parts)) == shown(table, row, column)


def draws():
    """100 combinations of all four parts that the tables do not refuse in pairs."""
    chance = random.Random(0)
    while True:
        parts = (
            chance.choice([p for p in combinations.PRIORS if "your own" not in p]),
            chance.choice(list(combinations.LIKELIHOODS)),
            chance.choice([p for p in combinations.POSTERIORS if "your own" not in p]),
            chance.choice(list(combinations.OBJECTIVES)),
        )
        yield (*parts, combinations.SUITS[parts[1]])


@pytest.mark.parametrize(
    "parts", [each for _, each in zip(range(100), draws(), strict=False)], ids=", ".join
)
def test_random_combinations_train(parts):
    assert combinations.outcome(*parts) == ""


@pytest.mark.parametrize("kind", ["Prior", "Likelihood", "Posterior"])
def test_every_export_is_in_the_tables(kind):
    module, table = {
        "Prior": (combinations.priors, combinations.PRIORS),
        "Likelihood": (combinations.likelihoods, combinations.LIKELIHOODS),
        "Posterior": (combinations.posteriors, combinations.POSTERIORS),
    }[kind]
    assert {name.split(",")[0] for name in table} >= set(module.__all__) - {kind}


def test_what_lies_outside_the_support_is_refused():
    integral = {"binary", "levels 0 to 255", "counts"}
    unit = {"binary", "grey in [0, 1]"}
    takes = {
        "Bernoulli": {"binary"},
        "ContinuousBernoulli": unit,
        **dict.fromkeys(
            ["Categorical", "DiscretizedLogistic", "Poisson", "Multinomial"], integral
        ),
        **dict.fromkeys(["NegativeBinomial", "ZeroInflatedNegativeBinomial"], integral),
    }
    for likelihood, kinds in takes.items():
        for kind in combinations.kinds():
            trains = shown("Likelihood and data", likelihood, kind) == ""
            assert trains == (kind in kinds), (likelihood, kind)


def test_the_readme_counts_them():
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert f"{len(CELLS)} pairs and 100 random fours" in readme


@pytest.mark.parametrize("likelihood", combinations.LIKELIHOODS)
def test_every_likelihood_has_the_same_steps_where_it_is_captured(likelihood):
    x = combinations.kinds()[combinations.SUITS[likelihood]][:50]
    losses = []
    for mode in ("captured", "eager"):
        pyro.set_rng_seed(0)
        vae = combinations.built("Normal", likelihood, "Normal", x)
        svi = CompiledSVI(
            vae.model,
            vae.guide,
            partial(torch.optim.SGD, lr=1e-5),
            combinations.Trace_ELBO(max_plate_nesting=1),
            mode=mode,
        )
        losses.append([svi.step(x).item() for _ in range(3)])
        assert svi.mode == mode
    assert losses[0] == losses[1]
