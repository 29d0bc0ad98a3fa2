"""What the experiments of Auto-Encoding Variational Bayes have in common.

Section 5 of the paper: one hidden layer of tanh units in either network, all weights and biases
drawn from N(0, 0.01), a N(0, I) prior on all of them, Adagrad with the step size of {0.01, 0.02,
0.1} that does best at first, minibatches of 100, one draw of z. Whether 0.01 is a variance or a
standard deviation the paper does not say; 0.01 as the standard deviation is closer to its curves
at 300,000 samples, and as the variance at 10 million. What else it leaves open is chosen in
`DATA` and in `tried`.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import nn
from tqdm import tqdm

from pyro_vae import (
    MLP,
    VAE,
    CompiledSVI,
    bound,
    checkpoints,
    data,
    likelihoods,
    log_likelihood,
    posteriors,
    priors,
)
from pyro_vae.annealing import hmc_likelihood
from pyro_vae.identity import generators, set_generators
from pyro_vae.objectives import Trace_ELBO, WakeSleep
from pyro_vae.optimizers import optimizer_of
from pyro_vae.runs import device_of
from pyro_vae.svi import mode_for

FOLDER = Path(__file__).resolve().parent
BATCH, STEP_SIZES, FIRST = 100, (0.01, 0.02, 0.1), 100_000
# Columns of the results that say what was asked for, and the options that ask.
ASKED = {
    "seed": "seed",
    "initial_scale": "initial_scale",
    "given": "step_size",
    "images": "images",
}
# Where curves are evaluated: the numbers of samples of the digitised ones, and some between.
POINTS = [
    round(mantissa * 10**power)
    for power in range(4, 9)
    for mantissa in (1, 1.8, 2, 3, 4, 5, 6, 8)
    if mantissa * 10**power <= 10**8
]
OBJECTIVES = {
    "AEVB": lambda: Trace_ELBO(max_plate_nesting=1),
    "wake-sleep": WakeSleep,
}
# By the name in the results' column "binarisation": data set, how to divide it, and its view.
# MNIST trains on 50,000 images, as the paper's Figure 3 does.
DATA = {
    "static": ("binarized-mnist", {}, data.plain),
    "dynamic": ("mnist", {"validation": 1 / 6}, data.dynamic),
    "greyscale": ("mnist", {"validation": 1 / 6}, data.plain),
    "none, random split": ("frey-face", {"validation": 0}, data.plain),
    "none, final block": ("frey-face", {"validation": 0, "ordered": True}, data.plain),
}


def arguments(about, samples=None):
    """The parser of the options that all scripts have, with those of a curve and its budget."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    if samples:
        parser.add_argument("--samples", type=float, default=samples, help="training samples seen")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--initial-scale", type=float, default=0.01, help="of all weights")
        parser.add_argument("--step-size", type=float, help="skip the search for one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--small", action="store_true", help="embedded digits, for a trial")
    parser.add_argument("--report", action="store_true", help="only write figures and README.md")
    parser.add_argument("--out", type=Path, help="folder of results (default: results/ here)")
    return parser


def ready(parser):
    """The options, with threads set and the folders made."""
    options = parser.parse_args()
    usual = argparse.Namespace(**{name: parser.get_default(name) for name in vars(options)})
    for each in [options, usual] if options.small else []:  # whatever is asked for, in seconds
        limits = {"samples": 20_000, "threads": 1, "images": 20, "checked": 2}
        limits |= {"stages": 2, "epochs": 2}
        for name in limits.keys() & vars(each).keys():
            value, most = getattr(each, name), limits[name]
            setattr(each, name, most if value is None else min(value, most))
    options.usual = asked(usual)  # what the page's results have asked for
    for name in ("samples", "step_size", "threads", "images", "checked", "stages", "epochs"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, not {value}")
    torch.set_num_threads(options.threads)
    try:
        options.device = device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.out is None:  # a trial leaves the results alone
        options.out = Path(tempfile.mkdtemp()) if options.small else FOLDER / "results"
        print(f"results are kept in {options.out}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def load(binarisation, options, **how):
    """The data of that name on the device; in a trial, the embedded digits in their guise."""
    name, usual, view = DATA[binarisation]
    if options.small:
        view = data.threshold if name == "binarized-mnist" else view
        name, usual = "digits", {"validation": 0}
    found = data.load(name, directory=options.data_dir, view=view, **{**usual, **how})
    return found.map(lambda part: part.to(options.device))


def some(split, count):
    """Some rows of a split, drawn at random and always the same."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split[order[:count].sort().values.to(split.x.device)]


class LogVariance(nn.Module):
    """A network that gives means and log s^2, as in Appendix C, and here hands on log s."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("factor", torch.tensor([1.0, 0.5]))

    def forward(self, *inputs):
        """Map as the network does, with its second outputs halved."""
        factor = self.factor.unflatten(0, (2, *[1] * (len(self.network.output) - 1)))
        return self.network(*inputs) * factor


def build(binarisation, shape, latent, hidden, scale):
    """The networks of Appendix C and their distributions, with weights from N(0, scale^2)."""
    network = partial(MLP, activation=nn.Tanh)
    if binarisation.startswith("none"):
        decoder = LogVariance(network(latent, [hidden], (2, *shape)))
        likelihood = likelihoods.Normal(decoder, per_element=True, bounded=True)
    else:
        decoder = network(latent, [hidden], shape)
        likelihood = likelihoods.Bernoulli(decoder, greyscale=binarisation == "greyscale")
    encoder = LogVariance(network(shape, [hidden], (2, latent)))
    return initialised(VAE(priors.Normal(latent), likelihood, posteriors.Normal(encoder)), scale)


def initialised(module, scale):
    """The module with all parameters drawn from N(0, scale^2)."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, scale)
    return module


def adagrad(parameters, rows, lr):
    """Adagrad on the bound of a minibatch and its share M/N of log N(weights; 0, I).

    The paper scales the minibatch by N/M instead, by which Adagrad divides again.
    """
    parameters = list(parameters)
    fused = True if parameters[0].device.type == "cpu" else None  # not every torch has it on a GPU
    decay = BATCH / rows
    return torch.optim.Adagrad(parameters, lr=lr, weight_decay=decay, fused=fused)


def batches(split, seed):
    """Minibatches without end, in a new order each time through."""
    order = torch.Generator(split.x.device).manual_seed(seed)
    while True:
        for batch in split.batches(BATCH, order, shuffle=True):
            if len(batch[0]) == BATCH:
                yield batch


def train(
    pair,
    objective,
    split,
    *,
    samples,
    seed,
    lr=None,
    make=None,
    points=POINTS,
    title="",
    begun=None,
):
    """Train, and at each of the points yield the number of samples seen and what to go on from.

    Args:
        pair: What is trained.
        objective: What is optimised.
        split: The training data.
        samples: How many training samples to see.
        seed: Seed of the order.
        lr: Step size of Adagrad.
        make: From parameters to another optimiser.
        points: Numbers of samples at which to stop for a while.
        title: Of the bar.
        begun: What was yielded last by the run that this one goes on with.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    make = make or partial(adagrad, rows=len(split), lr=lr)
    optimizer = optimizer_of(make, [each for each in pair.parameters() if each.requires_grad])
    mode = mode_for(int(samples) // BATCH)
    svi = CompiledSVI(pair.model, pair.guide, lambda _: optimizer, objective, mode=mode)
    seen = 0
    if begun:
        seen = begun["seen"]
        optimizer.load_state_dict(begun["optimizer"])
    stream = itertools.islice(batches(split, seed), seen // BATCH, None)
    with progress(samples, title, seen) as bar:
        for point in ends(samples, points, seen):
            while seen < point:
                loss = svi.step(*next(stream))
                seen += BATCH
                bar.update(BATCH)
            if not loss.isfinite():
                raise FloatingPointError(f"{title} has diverged after {seen} samples")
            yield seen, {"seen": seen, "optimizer": optimizer.state_dict()}


def ends(samples, points, seen=0):
    """The points before so many samples, and that number, but for what is seen already."""
    return sorted(n for n in {*points, round(samples)} if seen < n <= round(samples))


def progress(samples, title, seen=0):
    """A bar in images, redrawn seldom where it goes to a file."""
    pace = 0.2 if sys.stderr.isatty() else 60.0
    how = {"unit": "img", "unit_scale": True, "mininterval": pace, "initial": seen}
    return tqdm(total=round(samples), desc=title, **how)


def elbo(pair, split):
    """The bound in nats per datum and its standard error, one draw of z for each datum."""
    order = torch.Generator(split.x.device).manual_seed(0)  # one binarisation, always the same
    summary = bound(pair.eval(), split.batches(1000, order)).summary()
    return summary["elbo"], summary["standard_error"]


def tried(make, objective, split, seed, *, first=FIRST, value=elbo, run=train):
    """The value on training data after some first samples by step size, or None if diverged."""
    found = {}
    for lr in STEP_SIZES:
        pyro.set_rng_seed(seed)
        pair = make().to(split.x.device)
        try:
            options = {"samples": first, "lr": lr, "seed": seed, "title": f"step size {lr}"}
            for _ in run(pair, objective(), split, points=[], **options):
                nats = value(pair, some(split, 5000))[0]
                found[str(lr)] = None if math.isnan(nats) else nats
        # It has diverged, or its next value has, of which torch may not be able to draw. What
        # else is amiss shows again where the curve is run.
        except (FloatingPointError, ValueError, RuntimeError):
            found[str(lr)] = None
    return found


def curve(make, method, splits, options, *, about, keep, points=POINTS, value=elbo, run=train):
    """Run one curve, and keep its rows and the trained pair.

    What the curve goes on from lies in a folder ``unfinished`` from point to point, until its
    results are kept.

    Args:
        make: Makes the pair, from the present random state.
        method: A key of `OBJECTIVES`.
        splits: By name, what to evaluate on; ``train`` is trained on.
        options: Those of `arguments`.
        about: Columns ``figure``, ``panel`` and ``binarisation`` of the rows.
        keep: What is done with rows and pair.
        points: Numbers of samples at which to evaluate.
        value: From pair and split to a value in nats per datum and its standard error.
        run: How to train, as `train` does.
    """
    objective, train = OBJECTIVES[method], splits["train"]
    key = named(options, about["panel"], method, about["binarisation"])
    place = options.device.type
    folder = options.out / "unfinished" / f"figure{about['figure']}-{place}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    begun = {"rows": [], "seconds": 0.0, "run": None, "tried": {}}
    before = {**begun, **(checkpoints.newest(folder) or {})}
    began = time.perf_counter() - before["seconds"]
    if options.step_size is not None:
        before["lr"] = options.step_size
    elif "lr" not in before:
        first = min(FIRST, options.samples / 2)
        how = {"first": first, "value": value, "run": run}
        before["tried"] = tried(make, objective, train, options.seed, **how)
        values = {lr: nats for lr, nats in before["tried"].items() if nats is not None}
        if not values:
            raise FloatingPointError(f"{key} diverges with every step size of {STEP_SIZES}")
        before["lr"] = float(max(values, key=values.get))
    pyro.set_rng_seed(options.seed)
    pair, rows, lr = make().to(options.device), before["rows"], before["lr"]
    if before["run"]:
        pair.load_state_dict(before["weights"])
        set_generators(before["generators"], options.device)
    how = {"samples": options.samples, "lr": lr, "seed": options.seed, "points": points}
    how["title"] = f"{about['panel']}, {method}, {about['binarisation']}"
    for seen, state in run(pair, objective(), train, begun=before["run"], **how):
        for name, split in splits.items():
            nats, error = value(pair, some(split, 10_000))
            row = {**about, "method": method, "split": name, "training_samples": seen}
            row |= {"value_nats": nats, "standard_error": error, **asked(options)}
            row |= {"device": place, "step_size": lr, "tried": before["tried"]}
            row["budget"] = round(options.samples)
            rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
        now = {"rows": rows, "seconds": rows[-1]["seconds"], "lr": lr, "tried": before["tried"]}
        now |= {"run": state, "weights": dict(pair.state_dict())}
        checkpoints.keep(folder, seen, {**now, "generators": generators(options.device)})
    keep(rows, pair)
    shutil.rmtree(folder)


class Results:
    """Rows in a JSON file, to which a finished curve is added, and which are read before."""

    def __init__(self, file):
        self.file = file
        self.rows = self.read()

    def read(self):
        """The rows that are in the file."""
        return json.loads(self.file.read_text()) if self.file.exists() else []

    def has(self, **columns):
        """Whether a row has these values, and at least this budget."""
        least = columns.pop("budget", 0)
        return any(
            all(row.get(key) == value for key, value in columns.items()) and row["budget"] >= least
            for row in self.rows
        )

    def add(self, rows):
        """Add rows in place of those of a smaller budget, and write the file."""
        curves = {identity(row) for row in rows}
        self.rows = [row for row in self.read() if identity(row) not in curves] + rows
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        self.file.write_text(f"[\n{lines}\n]\n")


def identity(row):
    """What a row and the others of its curve have in common."""
    keys = ("figure", "panel", "method", "binarisation", *ASKED)
    return tuple(row.get(key) for key in keys)


def named(options, panel, method, binarisation):
    """A name for the files of one curve."""
    about = [panel, method, binarisation, options.initial_scale, options.seed, options.samples]
    about += [options.step_size] if options.step_size is not None else []
    how = asked(options)
    about += [how["images"]] if how.get("images") != options.usual.get("images") else []
    return "-".join(str(each).replace(" ", "") for each in about)


def weights(options, panel, method, binarisation):
    """Where the weights of a trained pair are kept, for the pictures."""
    folder = options.out / "weights"
    folder.mkdir(exist_ok=True)
    return folder / f"{named(options, panel, method, binarisation)}.safetensors"


def trained(latent, hidden, options, *, panel, binarisation):
    """A VAE trained by AEVB: as it was kept, or anew."""
    splits = load(binarisation, options)
    pyro.set_rng_seed(options.seed)
    make = partial(build, binarisation, splits.shape, latent, hidden, options.initial_scale)
    file = weights(options, panel, "AEVB", binarisation)
    pair = make()
    if not file.exists():
        about = {"figure": "", "panel": panel, "binarisation": binarisation}
        parts = {"train": splits.train}
        how = {"about": about, "points": [], "keep": lambda _, pair: checkpoints.save(pair, file)}
        curve(make, "AEVB", parts, options, **how)
    checkpoints.restore(pair, file)
    return pair.eval()


def asked(options):
    """The columns of `ASKED`, of those options that a script has."""
    has = vars(options)
    return {column: has[name] for column, name in ASKED.items() if name in has}


def appendix_d(vae, images):
    """Estimate log p(x) of each image by Appendix D with few chains, where images are many."""
    found = hmc_likelihood(vae.eval(), images, samples=50, chains=4, leapfrog=4)
    return found.log_likelihood


def likelihood(vae, split, options):
    """L_5000 on some images as columns of a row: the value, its error, how it was had."""
    draws = 100 if options.small else 5000
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the importance weights")
        estimate = log_likelihood(vae.eval(), some(split, options.images), samples=draws)
    return {
        "binarisation": "static",
        "device": options.device.type,
        "draws": draws,
        "value_nats": estimate.mean,
        "standard_error": estimate.standard_error,
    }
