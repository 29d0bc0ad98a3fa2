"""What `test_distributed.py` has several processes do: ``together.py FOLDER CASE``."""

import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from linear import linear_vae
from torch import nn

from pyro_vae import MLP, VAE, checkpoints, data, distributed, fit, likelihoods, posteriors, priors
from pyro_vae.distributed import Ranks, joined
from pyro_vae.progress import Standing

ROWS = torch.randn(53, 4, generator=torch.Generator().manual_seed(0))
WITH = {"epochs": 3, "batch_size": 7, "progress": False, "seed": 4, "mode": "eager"}


def rows():
    """40 training data, which neither 2 nor 3 processes with batches of 7 divide, and 13 more."""
    return data.split(ROWS, validation=0.25, test=0)


def normalised():
    """A VAE whose encoder has batch statistics, and a buffer that stays as it is."""
    encoder = nn.Sequential(nn.BatchNorm1d(4), MLP(4, [5], (2, 2)))
    encoder.register_buffer("constant", torch.tensor(1 / 3))
    return VAE(priors.Normal(2), likelihoods.Normal(MLP(2, [], (4,))), posteriors.Normal(encoder))


CASES = {
    "plain": (partial(linear_vae, 4, 2), {}),
    "captured": (partial(linear_vae, 4, 2), {"mode": "captured"}),
    "clipped": (partial(linear_vae, 4, 2), {"clip": 1.0}),
    "buffers": (normalised, {}),
}


def seeded(make):
    """A pair in one random state, before training in another."""
    pyro.set_rng_seed(1)
    pair = make()
    pyro.set_rng_seed(2)
    random.seed(3)
    return pair


def train(folder, ranks, cases=tuple(CASES)):
    """Every case, the weights and metrics of each process in a file."""
    found = {"format": checkpoints.FORMAT}
    for name in cases:
        make, options = CASES[name]
        pair = seeded(make)
        if not ranks.first:  # which takes the weights of the first
            pair.apply(lambda module: [p.data.add_(1) for p in module.parameters(False)])
        table = fit(pair, rows(), **{**WITH, **options})
        found[name] = {"weights": dict(pair.state_dict()), "rows": table}
    (folder / f"{ranks.rank}").write_bytes(checkpoints.encode(found))


def send(folder, ranks):
    """Two of them, with nothing in memory that both see."""
    distributed._MEMORY = "/nowhere"
    train(folder, ranks, ("plain", "buffers"))


def stop(folder, ranks, *, again=False):
    """A run that the second process alone is asked to stop, and that is gone on with."""
    count = Standing.count

    def counting(self, weight):
        count(self, weight)
        if self.step == 4 and ranks.rank == 1 and not again:
            os.kill(os.getpid(), signal.SIGTERM)

    Standing.count = counting
    fit(seeded(CASES["plain"][0]), rows(), **WITH, run=folder / "run", resume=again)


def exchange(folder, ranks):
    """Messages and rows of unlike length, by way of the group."""
    assert ranks == Ranks(ranks.rank, 3)
    assert ranks.collect(b"ab" * ranks.rank) == [b"", b"ab", b"abab"]
    assert ranks.send(b"from %d" % ranks.rank) == b"from 0"
    assert ranks.send(b"") == b""
    mine = torch.full((ranks.rank, 2), float(ranks.rank), dtype=torch.float64)
    assert ranks.gather(mine).tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    part = ranks.shard(rows())
    assert len(part.train) == 13
    parts = ranks.gather(part.validation.x)
    assert torch.equal(parts, rows().validation.x)
    (folder / f"{ranks.rank}").touch()


def differ(folder, ranks):
    """What is said of arguments that are not the same in both processes."""
    smaller, larger = (partial(linear_vae, 4, size) for size in (2, 2 + ranks.rank))
    step = partial(torch.optim.Adam, lr=1e-3 * (1 + ranks.rank))
    others = {
        "epochs": (smaller, {"epochs": 2 + ranks.rank}),
        "batch_size": (smaller, {"batch_size": 7 + ranks.rank}),
        "optimizer": (smaller, {"optimizer": step}),
        "networks": (larger, {}),
    }
    for name, (make, options) in others.items():
        with pytest.raises(ValueError, match=f"processes 0 and 1 .* given other {name};"):
            fit(make(), rows(), **{**WITH, **options})
    (folder / f"{ranks.rank}").touch()


def die(folder, ranks):
    """The second process ends without a word."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.collect(b"")


if __name__ == "__main__":
    torch.set_num_threads(1)
    case = {each.__name__: each for each in (train, send, stop, exchange, differ, die)}
    case["resume"] = partial(stop, again=True)
    with joined() as ranks:
        case[sys.argv[2]](Path(sys.argv[1]), ranks)
    # A thread of the group's that needs Python while it exits aborts the process.
    left = [each.read_text() for each in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in each for each in left), left
