"""The commands of the command line, each a typed function."""

from __future__ import annotations

__all__ = [
    "Run",
    "data",
    "encode",
    "evaluate",
    "interpolate",
    "manifold",
    "reconstruct",
    "sample",
    "train",
]

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
import yaml
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.nn.functional import one_hot

from pyro_vae import checkpoints, plots
from pyro_vae.data import SOURCES, Data, Split, dynamic, folder, load, plain, threshold
from pyro_vae.evaluation import bound
from pyro_vae.parts import Blueprint, Part, make
from pyro_vae.testing import elementary
from pyro_vae.training import fit
from pyro_vae.vae import VAE, as_pyro

Binarisation = Literal["dynamic", "threshold", "none"]
Activation = Literal["ELU", "GELU", "LeakyReLU", "ReLU", "SiLU", "Softplus", "Tanh"]
SplitName = Literal["train", "validation", "test"]
_VIEWS = {"dynamic": dynamic, "threshold": threshold, "none": plain}
_NORMAL, _BERNOULLI, _ELBO, _ADAM = map(Part, ("Normal", "Bernoulli", "Trace_ELBO", "Adam"))


@dataclass(frozen=True)
class Run:
    """A finished run, and how it is opened.

    Attributes:
        run: Folder of the run.
        weights: Weights to use.
        data: Other data than the run was trained on, of the same shape.
        data_dir: Folder of the named data sets.
        seed: Seed of every draw.
        device: cpu, cuda or cuda:N (default: a GPU where there is one).
        allow: Modules of your own that the run may import.
    """

    run: str
    weights: Literal["best", "last"] = "best"
    data: str | None = None
    data_dir: str | None = None
    seed: int = 0
    device: str | None = None
    allow: Sequence[str] = ()

    @property
    def blueprint(self) -> Blueprint:
        """What the run's VAE is made of."""
        return checkpoints.blueprint(self.run)

    def vae(self) -> VAE:
        """The run's VAE on its device, with all random generators seeded."""
        vae = checkpoints.load(self.run, weights=self.weights, allow=self.allow)
        pyro.set_rng_seed(self.seed)
        return vae.to(_device(self.device))

    def split(self, name: SplitName) -> Split:
        """One split of the run's data, or of others of the same shape, on its device."""
        path = Path(self.run) / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"'{self.run}' has no config.yaml, which names its data")
        try:
            settings = {**yaml.safe_load(path.read_text())}
            view = _VIEWS[settings["binarisation"]]
            settings["data"] = self.data or settings["data"]
            settings["data_dir"] = self.data_dir or settings["data_dir"]
            dataset = _dataset(settings).viewed(view)
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' is damaged: {error!r}") from error
        if dataset.shape != self.blueprint.shape:
            raise ValueError(
                f"'{self.run}' was trained on data of shape {self.blueprint.shape} and "
                f"'{dataset.name}' has {dataset.shape}"
            )
        part: Split = getattr(dataset, name)
        if not len(part):
            raise ValueError(f"'{dataset.name}' has no {name} data here; choose another --split")
        return part.to(_device(self.device))

    def labels(self, count: int, label: int | None) -> tuple[Tensor, ...]:
        """One-hot labels for a conditional run, of one class or of each in turn."""
        classes = self.blueprint.context
        if not classes:
            if label is not None:
                raise ValueError(f"'{self.run}' is not conditional: it has no --label to choose")
            return ()
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"there is no label {label}; they are 0 to {classes - 1}")
        chosen = torch.arange(count) % classes if label is None else torch.full([count], label)
        return (one_hot(chosen, classes).float().to(_device(self.device)),)

    def path(self, out: str | None, name: str, *, also: Sequence[str] = ()) -> Path:
        """Where to write: the path that the user gave, or a name in the run's folder."""
        path = Path(out) if out else Path(self.run) / name
        endings = [Path(name).suffix, *also]
        if path.suffix not in endings:
            raise ValueError(
                f"give --out a name that ends in {' or '.join(endings)}, not '{path}'"
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder '{path.parent}' to write to; make it")
        return path


def train(
    *,
    data: str = "digits",
    data_dir: str | None = None,
    binarisation: Binarisation | None = None,
    top: float | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    ordered: bool = False,
    conditional: bool = False,
    latent: int = 20,
    hidden: Sequence[int] = (400,),
    channels: Sequence[int] = (),
    activation: Activation = "ReLU",
    output_bias: bool = False,
    prior: Part = _NORMAL,
    likelihood: Part = _BERNOULLI,
    posterior: Part = _NORMAL,
    objective: Part = _ELBO,
    optimizer: Part = _ADAM,
    schedule: Part | None = None,
    lr: float = 1e-3,
    epochs: int = 100,
    batch_size: int = 128,
    warmup: float = 0.1,
    clip: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str | None = None,
    out: str | None = None,
) -> None:
    """Train a VAE and draw its pictures.

    Args:
        data: Data set: a name (see `pyro-vae data`), a .npy or .npz file, or a folder of images.
        data_dir: Folder of the named data sets (default: $PYRO_VAE_DATA or ~/.cache/pyro_vae).
        binarisation: dynamic (drawn anew each epoch), threshold (at one half) or none;
            dynamic for a likelihood on {0, 1} and none for others by default.
        top: Stored value that counts as 1 (default: 255 for bytes, 1 for other types).
        validation: Fraction of the training data to set aside, 0 for none.
        test: Likewise for the test, where there is no official one.
        ordered: Take validation and test from the end, for data such as frames of a video.
        conditional: Give the label, one-hot, to encoder and decoder.
        latent: Size of the latent vector z.
        hidden: Widths of the encoder's hidden layers; the decoder has them reversed.
        channels: Channels of a convolutional encoder and decoder, in place of the MLPs.
        activation: Module between layers.
        output_bias: Start the decoder's output bias at the training mean.
        prior: Prior p(z).
        likelihood: Likelihood p(x|z).
        posterior: Approximate posterior q(z|x).
        objective: Objective.
        optimizer: Optimiser from torch.optim.
        schedule: Learning-rate schedule from torch.optim.lr_scheduler, advanced each epoch.
        lr: Learning rate.
        epochs: Passes over the training data.
        batch_size: Data in a step.
        warmup: Fraction of all steps over which the weight of the KL rises from 0 to 1.
        clip: Greatest norm of all gradients together.
        patience: Stop after so many epochs without a better bound on the validation data.
        seed: Seed of the split, the initial weights, the order and all draws.
        device: cpu, cuda or cuda:N (default: a GPU where there is one).
        out: Folder of the run (default: the first free of runs/DATA-1, runs/DATA-2, ...).
    """
    place = _device(device)
    settings: dict[str, Any] = {
        "data": str(Path(data).resolve()) if data not in SOURCES and Path(data).exists() else data,
        "data_dir": data_dir and str(Path(data_dir).expanduser().resolve()), "top": top,
        "validation": validation, "test": test, "ordered": ordered, "seed": seed,
        "conditional": conditional,
    }  # fmt: skip
    dataset = _dataset(settings)
    pyro.set_rng_seed(seed)
    blueprint = Blueprint(
        shape=dataset.shape,
        latent=latent,
        hidden=list(hidden),
        channels=list(channels),
        activation=activation,
        context=sum(c.shape[-1] for c in dataset.train.context),
        rows=len(dataset.train),
        prior=prior,
        likelihood=likelihood,
        posterior=posterior,
    )
    vae = blueprint.build(dataset.train.batch()[0])
    binarisation = binarisation or ("dynamic" if _is_binary(vae, dataset.train) else "none")
    dataset = dataset.viewed(_VIEWS[binarisation])
    if output_bias:
        vae.likelihood.centre(dataset.train.mean())  # type: ignore[operator]
    vae.to(place)
    target = make(objective, "objective")
    run = Path(out or _free(dataset.name))
    settings |= {
        "binarisation": binarisation, "latent": latent, "hidden": list(hidden),
        "channels": list(channels), "activation": activation, "output_bias": output_bias,
        "prior": prior.plain(), "likelihood": likelihood.plain(), "posterior": posterior.plain(),
        "objective": objective.plain(), "optimizer": optimizer.plain(),
        "schedule": schedule and schedule.plain(), "lr": lr, "epochs": epochs,
        "batch_size": batch_size, "warmup": warmup, "clip": clip, "patience": patience,
        "device": device, "out": str(run),
    }  # fmt: skip
    config = _dumped(settings)
    created = [path for path in (run, *run.parents) if not path.exists()]
    checkpoints.create(run)
    print(f"{_summary(dataset)}, binarisation: {binarisation}\n{_parts(vae, blueprint)}")
    try:
        checkpoints.write(run / "config.yaml", config)
        checkpoints.describe(run, blueprint)
        rows = fit(
            vae,
            dataset,
            objective=target,
            optimizer=lambda parameters: make(optimizer, "optimizer", params=parameters, lr=lr),
            schedule=None
            if schedule is None
            else lambda o: make(schedule, "schedule", optimizer=o),
            epochs=epochs,
            batch_size=batch_size,
            warmup=warmup,
            clip=math.inf if clip is None else clip,
            patience=patience,
            seed=seed,
            run=run,
        )
    finally:
        if not (run / "metrics.jsonl").exists():  # refused before the first step
            _withdraw(run, created)
    vae.eval()
    shown = (dataset.test if len(dataset.test) else dataset.train).to(place)
    if len(dataset.test):
        print(_score(vae, shown, "test", 10))
    paths = _pictures(run, vae, shown, rows)
    if latent == 2:
        context = Run(str(run), device=device).labels(400, 0 if conditional else None)
        paths.append(
            plots.save(plots.manifold(_grid(vae, 20, *context), 20), run / "manifold.png")
        )
    _print_paths(paths)


def evaluate(run: Run, *, split: SplitName = "test", particles: int = 10) -> None:
    """Print the evidence lower bound of a run and its two halves, in nats per datum.

    Args:
        run: The run.
        split: Split to evaluate.
        particles: Draws of z for each datum.
    """
    vae = run.vae()
    print(_score(vae, run.split(split), split, particles))


def sample(run: Run, *, count: int = 64, label: int | None = None, out: str | None = None) -> None:
    """Draw new data from a run: a picture of means, or values from p(x) to a .npy file.

    Args:
        run: The run.
        count: Number of data.
        label: Class to draw, where the run is conditional (default: each in turn).
        out: File to write, .png or .npy (default: samples.png in the run's folder).
    """
    _check_count(count)
    target = run.path(out, "samples.png", also=[".npy"])
    vae, context = run.vae(), run.labels(count, label)
    if target.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, vae.sample(count, *context).numpy(force=True))
        checkpoints.write(target, content.getvalue())
        print(target)
        return
    x = vae.sample(count, *context, mean=True)
    columns = context[0].shape[-1] if context and label is None else None
    _print_paths([plots.save(plots.grid(x, columns), target)])


def reconstruct(
    run: Run, *, count: int = 16, split: SplitName = "test", out: str | None = None
) -> None:
    """Draw data, chosen at random, above their reconstructions.

    Args:
        run: The run.
        count: Number of data.
        split: Split to take them from.
        out: File to write (default: reconstructions.png in the run's folder).
    """
    target = run.path(out, "reconstructions.png")
    vae = run.vae()
    x, *context = _some(run.split(split), count, run.seed)
    rows = {"data": x, "reconstruction": vae.reconstruct(x, *context)}
    _print_paths([plots.save(plots.strip(rows), target)])


def interpolate(
    run: Run,
    *,
    count: int = 8,
    steps: int = 11,
    split: SplitName = "test",
    out: str | None = None,
) -> None:
    """Draw straight lines in latent space between pairs of data, chosen at random.

    Args:
        run: The run.
        count: Number of pairs, a row for each.
        steps: Pictures from one to the other.
        split: Split to take them from.
        out: File to write (default: interpolations.png in the run's folder).
    """
    if steps < 2:
        raise ValueError(f"a line has at least 2 steps, not {steps}")
    _check_count(count)
    target = run.path(out, "interpolations.png")
    vae = run.vae()
    x, *context = _some(run.split(split), 2 * count, run.seed)
    with torch.no_grad():
        start, end = _code(vae.encode(x, *context)).unflatten(0, (2, count))
        line = torch.linspace(0, 1, steps, device=x.device)[:, None]
        z = torch.lerp(start[:, None], end[:, None], line)
        between = [c[:count, None].expand(-1, steps, -1) for c in context]
        means = vae.decode(z, *between).mean.flatten(0, 1)
    _print_paths([plots.save(plots.grid(means, steps), target)])


def manifold(
    run: Run, *, side: int = 20, label: int | None = None, out: str | None = None
) -> None:
    """Draw the manifold of a run with two latents.

    Figure 4 of Auto-Encoding Variational Bayes: a grid on the unit square, through the
    inverse cumulative distribution function of the prior.

    Args:
        run: The run.
        side: Pictures in a row and in a column.
        label: Class to draw, where the run is conditional (default: 0).
        out: File to write (default: manifold.png in the run's folder).
    """
    _check_count(side)
    if run.blueprint.latent != 2:
        raise ValueError(
            f"a manifold needs 2 latents and '{run.run}' has {run.blueprint.latent}; "
            f"try interpolate"
        )
    target = run.path(out, "manifold.png")
    label = 0 if label is None and run.blueprint.context else label
    vae, context = run.vae(), run.labels(side**2, label)
    _print_paths([plots.save(plots.manifold(_grid(vae, side, *context), side), target)])


def encode(run: Run, *, split: SplitName = "test", out: str | None = None) -> None:
    """Write codes (the means of q(z|x)), their scales and the labels to an .npz file.

    Args:
        run: The run.
        split: Split to encode.
        out: File to write (default: codes.npz in the run's folder).
    """
    target = run.path(out, "codes.npz")
    vae, part = run.vae(), run.split(split)
    with torch.no_grad():
        codes = [vae.encode(*batch) for batch in _batches(part)]
    arrays = {"z": torch.cat([_code(q) for q in codes])}
    if all(_knows(q, "stddev") for q in codes):
        arrays["scale"] = torch.cat([q.stddev for q in codes])
    if part.labels is not None:
        arrays["labels"] = part.labels
    values: dict[str, Any] = {key: value.numpy(force=True) for key, value in arrays.items()}
    content = io.BytesIO()
    np.savez(content, **values)
    checkpoints.write(target, content.getvalue())
    print(f"{target}: " + ", ".join(f"{key} {each.shape}" for key, each in values.items()))


def data(name: str | None = None, *, data_dir: str | None = None, download: bool = True) -> None:
    """Say which data sets there are, or fetch one and say what it holds.

    Args:
        name: A name, a .npy or .npz file, or a folder of images.
        data_dir: Folder of the named data sets.
        download: Whether to fetch what is not there.
    """
    where = Path(data_dir).expanduser() if data_dir else folder()
    if name:
        print(_summary(load(name, directory=where, download=download)))
        return
    print(f"data folder: {where}")
    for key, source in SOURCES.items():
        there = all((where / file).exists() for file in source.files)
        state = "embedded" if not source.files else "there" if there else "to be downloaded"
        print(f"  {key:16} {state:17} {source.about}")


def _dataset(settings: Mapping[str, Any]) -> Data:
    """The data that the settings of a run name, as plain values."""
    keys = ("top", "validation", "test", "ordered", "seed")
    options = {key: settings[key] for key in keys}
    loaded = load(settings["data"], directory=settings["data_dir"], **options)
    return loaded.conditioned() if settings["conditional"] else loaded


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.zeros((), device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device '{name}' here; use --device cpu") from error
    return place


def _free(name: str) -> Path:
    """The first free of runs/NAME-1, runs/NAME-2, ..."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _dumped(settings: Mapping[str, Any]) -> bytes:
    try:
        return yaml.safe_dump(settings, sort_keys=False).encode()
    except yaml.YAMLError as error:
        raise ValueError(
            f"config.yaml holds numbers, words and lists, which {error.args[-1]!r} is none of; "
            f"put it into a class of your own"
        ) from error


def _withdraw(run: Path, created: Sequence[Path]) -> None:
    """Leave things as they were before a run that was refused."""
    for name in ("config.yaml", "model.json"):
        (run / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # of a folder that another run uses meanwhile
        for path in created:
            path.rmdir()


@torch.no_grad()
def _is_binary(vae: VAE, part: Split) -> bool:
    """Whether the likelihood of the VAE takes nothing but 0 and 1; random state stays."""
    context = [c[:1] for c in part.context]
    with torch.random.fork_rng(devices=[]):
        z = as_pyro(vae.prior(*context)).sample().reshape(1, -1)
        likelihood = as_pyro(vae.decode(z, *context))
    return elementary(likelihood.support) is constraints.boolean


def _summary(dataset: Data) -> str:
    names = ("training", "validation", "test")
    counts = [f"{len(part):,} {name}" for name, part in zip(names, dataset.splits, strict=True)]
    return f"{dataset.name}: {', '.join(counts)} data of shape {'x'.join(map(str, dataset.shape))}"


def _parts(vae: VAE, blueprint: Blueprint) -> str:
    kinds = ("prior", "likelihood", "posterior")
    names = [f"{getattr(blueprint, kind).name.split('.')[-1]} {kind}" for kind in kinds]
    count = sum(parameter.numel() for parameter in vae.parameters())
    return f"{', '.join(names)}, {blueprint.latent} latents, {count:,} parameters"


def _batches(part: Split) -> Iterator[tuple[Tensor, ...]]:
    return part.batches(1000, torch.Generator(part.x.device).manual_seed(0))


def _score(vae: VAE, part: Split, name: str, particles: int) -> str:
    values = bound(vae, _batches(part), particles=particles).summary()
    return (
        f"{name}: ELBO {values['elbo']:.2f} ± {values['standard_error']:.2f}, reconstruction "
        f"{values['reconstruction']:.2f}, KL {values['kl']:.2f} "
        f"({getattr(vae.likelihood, 'unit', 'nats')}, per datum, {len(part):,} data)"
    )


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"there is nothing to draw with a count of {count}; give 1 or more")


def _some(part: Split, count: int, seed: int) -> tuple[Tensor, ...]:
    """A batch of data chosen at random."""
    _check_count(count)
    if count > len(part):
        raise ValueError(f"the split has {len(part)} data, too few to draw {count}")
    generator = torch.Generator(part.x.device).manual_seed(seed)
    return next(part.batches(count, generator, shuffle=True))


def _code(posterior: Distribution) -> Tensor:
    return posterior.mean if _knows(posterior, "mean") else posterior.sample()


def _knows(distribution: Distribution, moment: str) -> bool:
    try:
        return bool(torch.isfinite(getattr(distribution, moment)).all())
    except (NotImplementedError, AttributeError):
        return False


@torch.no_grad()
def _grid(vae: VAE, side: int, *context: Tensor) -> Tensor:
    """Means of p(x|z) on a square of z, the first latent to the right, the second upwards."""
    prior = vae.prior(*context)
    prior = prior.base_dist if isinstance(prior, Independent) else prior
    unit = (torch.arange(side, device=next(vae.parameters()).device) + 0.5) / side
    right, up = torch.meshgrid(unit, unit.flip(0), indexing="xy")
    square = torch.stack([right, up], -1).flatten(0, 1)
    try:
        z = prior.icdf(square)
    except NotImplementedError:
        z = torch.distributions.Normal(0.0, 1.0).icdf(square)
    return vae.decode(z, *context).mean


def _pictures(run: Path, vae: VAE, part: Split, rows: Sequence[Mapping[str, float]]) -> list[Path]:
    """Draw what a run is looked at for."""
    x, *context = _some(part, min(16, len(part)), 0)
    samples = vae.sample(4 * len(x), *(c.repeat(4, 1) for c in context), mean=True)
    reconstructions = {"data": x, "reconstruction": vae.reconstruct(x, *context)}
    figures = {
        "curves": plots.curves(rows),
        "samples": plots.grid(samples),
        "reconstructions": plots.strip(reconstructions),
        "strip": plots.strip({**reconstructions, "sample": samples[: len(x)]}),
    }
    return [plots.save(figure, run / f"{name}.png") for name, figure in figures.items()]


def _print_paths(paths: Sequence[Path]) -> None:
    print("\n".join(["pictures:", *(f"  {path}" for path in paths)]))
