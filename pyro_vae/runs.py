"""Finished runs: how one is opened, and the commands that look at it."""

from __future__ import annotations

__all__ = [
    "VIEWS",
    "Run",
    "dataset_of",
    "device_of",
    "encode",
    "evaluate",
    "interpolate",
    "manifold",
    "pictures",
    "print_paths",
    "reconstruct",
    "sample",
    "score",
]

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.nn.functional import one_hot

from pyro_vae import checkpoints, plots
from pyro_vae.data import Data, Split, dynamic, load, plain, threshold
from pyro_vae.evaluation import bound
from pyro_vae.parts import Blueprint
from pyro_vae.vae import VAE, as_pyro

SplitName = Literal["train", "validation", "test"]
VIEWS = {"dynamic": dynamic, "threshold": threshold, "none": plain}


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
        allow: Module of your own, one for each --allow, that the run may import.
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
        return vae.to(device_of(self.device))

    def split(self, name: SplitName) -> Split:
        """One split of the run's data, or of others of the same shape, on its device."""
        path = Path(self.run) / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"'{self.run}' has no config.yaml, which names its data")
        try:
            settings = {**yaml.safe_load(path.read_text())}
            view = VIEWS[settings["binarisation"]]
            settings["data"] = self.data or settings["data"]
            settings["data_dir"] = self.data_dir or settings["data_dir"]
            dataset = dataset_of(settings).viewed(view)
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
        return part.to(device_of(self.device))

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
        return (one_hot(chosen, classes).float().to(device_of(self.device)),)

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


def evaluate(run: Run, *, split: SplitName = "test", particles: int = 10) -> None:
    """Print the evidence lower bound of a run and its two halves, in nats per datum.

    Args:
        run: The run.
        split: Split to evaluate.
        particles: Draws of z for each datum, whose bounds are averaged (without importance
            weights).
    """
    vae = run.vae()
    print(score(vae, run.split(split), split, particles=particles))


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
    print_paths([plots.save(_samples(vae, count, context, label), target)])


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
    print_paths([plots.save(plots.strip(rows), target)])


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
        between = [torch.lerp(c[:count, None], c[count:, None], line) for c in context]
        means = vae.decode(z, *between).mean.flatten(0, 1)
    print_paths([plots.save(plots.grid(means, steps), target)])


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
    print_paths([plots.save(plots.manifold(_grid(vae, side, *context), side), target)])


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


def pictures(run: Run, vae: VAE, part: Split, rows: Sequence[Mapping[str, float]]) -> list[Path]:
    """Draw what a new run is looked at for, its VAE and a split of its data being at hand."""
    pyro.set_rng_seed(run.seed)
    x, *context = _some(part, min(16, len(part)), run.seed)
    samples = vae.sample(len(x), *context, mean=True)
    reconstructions = {"data": x, "reconstruction": vae.reconstruct(x, *context)}
    figures = {
        "curves": plots.curves(rows),
        "samples": _samples(vae, 64, run.labels(64, None), None),
        "reconstructions": plots.strip(reconstructions),
        "strip": plots.strip({**reconstructions, "sample": samples}),
    }
    if run.blueprint.latent == 2:
        labels = run.labels(400, 0 if run.blueprint.context else None)
        figures["manifold"] = plots.manifold(_grid(vae, 20, *labels), 20)
    return [plots.save(figure, Path(run.run) / f"{name}.png") for name, figure in figures.items()]


def dataset_of(settings: Mapping[str, Any]) -> Data:
    """The data that the settings of a run name, as plain values."""
    keys = ("top", "validation", "test", "ordered", "seed")
    options = {key: settings[key] for key in keys}
    loaded = load(settings["data"], directory=settings["data_dir"], **options)
    return loaded.conditioned() if settings["conditional"] else loaded


def device_of(name: str | None) -> torch.device:
    """The device of that name, or a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.zeros((), device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device '{name}' here; use --device cpu") from error
    return place


def _batches(part: Split) -> Iterator[tuple[Tensor, ...]]:
    return part.batches(1000, torch.Generator(part.x.device).manual_seed(0))


def score(vae: VAE, part: Split, name: str, *, particles: int = 10) -> str:
    """Say the bound of a split and its halves in a line."""
    values = bound(vae, _batches(part), particles=particles).summary()
    return (
        f"{name}: ELBO {values['elbo']:.2f} ± {values['standard_error']:.2f}, reconstruction "
        f"{values['reconstruction']:.2f}, KL {values['kl']:.2f} "
        f"({getattr(vae.likelihood, 'unit', 'nats')}, per datum, mean and standard error over "
        f"{len(part):,} data)"
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


def _samples(vae: VAE, count: int, context: tuple[Tensor, ...], label: int | None) -> Figure:
    """Means of new data, those of a conditional run with a column for each label."""
    columns = context[0].shape[-1] if context and label is None else None
    return plots.grid(vae.sample(count, *context, mean=True), columns)


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
    except NotImplementedError:  # quantiles of draws along each of the two dimensions
        draws = as_pyro(prior).sample((10_000,)).reshape(-1, 2)
        z = torch.stack([draws[:, d].quantile(square[:, d]) for d in (0, 1)], -1)
    return vae.decode(z, *context).mean


def print_paths(paths: Sequence[Path]) -> None:
    """Say where the pictures are."""
    print("\n".join(["pictures:", *(f"  {path}" for path in paths)]))
