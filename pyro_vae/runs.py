"""Finished runs: how one is opened, and the commands that look at it."""

from __future__ import annotations

__all__ = [
    "VIEWS",
    "Run",
    "SplitName",
    "bounds",
    "check_threads",
    "dataset_batches",
    "dataset_of",
    "device_of",
    "encode",
    "in_threads",
    "interpolate",
    "manifold",
    "pictures",
    "print_paths",
    "reconstruct",
    "sample",
    "score",
    "support",
]

import contextlib
import io
import math
import warnings
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
from torch.distributions import Distribution, Independent, constraints
from torch.nn.functional import one_hot

from pyro_vae import checkpoints, plots
from pyro_vae.data import Data, Split, dequantised, dynamic, levels, load, plain, threshold
from pyro_vae.distributions import Observed
from pyro_vae.evaluation import bound
from pyro_vae.identity import digest
from pyro_vae.pairs import elementary
from pyro_vae.parts import Blueprint, Part
from pyro_vae.vae import VAE, as_pyro

SplitName = Literal["train", "validation", "test"]
VIEWS = {
    "dynamic": dynamic,
    "threshold": threshold,
    "levels": levels,
    "dequantised": dequantised,
    "none": plain,
}


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
        with self.settings() as settings:
            view = VIEWS[settings["binarisation"]]
            settings["data"] = self.data or settings["data"]
            settings["data_dir"] = self.data_dir or settings["data_dir"]
            dataset = dataset_of(settings).viewed(view)
        if dataset.shape != self.blueprint.shape:
            raise ValueError(
                f"'{self.run}' was trained on data of shape {self.blueprint.shape} and "
                f"'{dataset.name}' has {dataset.shape}"
            )
        before = self.blueprint.rows
        if self.data is None and len(dataset.train) != before > 1:
            raise ValueError(
                f"'{dataset.name}' has {len(dataset.train)} training data and had {before} when "
                f"'{self.run}' was trained, so that its splits are others: put back what it was, "
                f"or give it as --data"
            )
        had = checkpoints.began(Path(self.run) / "checkpoints").get("data")
        if self.data is None and had is not None and digest(dataset) != had:
            warnings.warn(
                f"'{dataset.name}' holds other values than when '{self.run}' was trained, so that "
                f"it may have been trained on some of this split: put back what it was, or give "
                f"it as --data",
                stacklevel=2,
            )
        part: Split = getattr(dataset, name)
        if not len(part):
            raise ValueError(f"'{dataset.name}' has no {name} data here; choose another --split")
        return part.to(device_of(self.device))

    @property
    def classes(self) -> int:
        """Number of classes that a conditional run is given, else 0."""
        blueprint = self.blueprint
        if not blueprint.context:
            return 0
        with self.settings() as settings:
            sized = bool(blueprint.likelihood.options.get("size_factor"))
            return blueprint.context - sized if settings["conditional"] else 0

    def context(self, count: int, label: int | None = None) -> tuple[Tensor, ...]:
        """Context for new data: labels, of one class or of each in turn, and what else there is.

        Anything else, size factors for one, is that of training data drawn at random.
        """
        classes, place = self.classes, device_of(self.device)
        if label is not None and not classes:
            raise ValueError(f"'{self.run}' is not conditional: it has no --label to choose")
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"there is no label {label}; they are 0 to {classes - 1}")
        others: tuple[Tensor, ...] = ()
        if self.blueprint.context > classes:
            train, generator = self.split("train"), torch.Generator().manual_seed(self.seed)
            rows = torch.randint(len(train), [count], generator=generator)
            others = train[rows.to(place)].context
        if not classes:
            return others
        chosen = torch.arange(count) % classes if label is None else torch.full([count], label)
        return one_hot(chosen, classes).float().to(place), *others[1:]

    def path(self, out: str | None, name: str, *, also: Sequence[str] = ()) -> Path:
        """Where to write: the path that the user gave, or a name in the run's folder."""
        checkpoints.blueprint(self.run)  # refuses a folder that is no run, or not there
        path = Path(out) if out else Path(self.run) / name
        endings = [Path(name).suffix, *also]
        if path.suffix not in endings:
            raise ValueError(
                f"give --out a name that ends in {' or '.join(endings)}, not '{path}'"
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder '{path.parent}' to write to; make it")
        return path

    @contextlib.contextmanager
    def settings(self) -> Iterator[dict[str, Any]]:
        """What the run's config.yaml says; what is amiss while it is used is said of that file."""
        path = Path(self.run) / "config.yaml"
        if not path.is_file():
            why = ", since it was trained from Python" if checkpoints.of_python(self.run) else ""
            raise FileNotFoundError(f"'{self.run}' has no config.yaml, which names its data{why}")
        try:
            content = path.read_text()
            checkpoints.check_header(content, path)
            yield {**yaml.safe_load(content)}
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' is damaged: {error!r}") from error


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
    vae = run.vae()
    if target.suffix == ".npy":
        context = run.context(count, label)
        content = io.BytesIO()
        np.save(content, vae.sample(count, *context).numpy(force=True))
        checkpoints.write(target, content.getvalue())
        print(target)
        return
    print_paths([plots.save(_samples(run, vae, count, label), target)])


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
    print_paths([plots.save(plots.strip(_toned(vae, context, rows)), target)])


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
    shown = _toned(vae, context, {"data": x, "means": means})["means"]
    print_paths([plots.save(plots.grid(shown, steps), target)])


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
    print_paths([plots.save(_manifold(run, run.vae(), side, label), target)])


def encode(run: Run, *, split: SplitName = "test", out: str | None = None) -> None:
    """Write codes (means of q(z|x), draws where it has none), scales, labels to an .npz file.

    Args:
        run: The run.
        split: Split to encode.
        out: File to write (default: codes.npz in the run's folder).
    """
    target = run.path(out, "codes.npz")
    vae, part = run.vae(), run.split(split)
    with torch.no_grad():
        codes = [vae.encode(*batch) for batch in dataset_batches(part)]
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
    if not all(_knows(q, "mean") for q in codes):
        print(f"z is one draw of q(z|x), by seed {run.seed}, where that has no mean")


def pictures(run: Run, vae: VAE, part: Split, rows: Sequence[Mapping[str, float]]) -> list[Path]:
    """Draw what a new run is looked at for, its VAE and a split of its data being at hand."""
    pyro.set_rng_seed(run.seed)
    x, *context = _some(part, min(16, len(part)), run.seed)
    samples = vae.sample(len(x), *context, mean=True)
    reconstructions = {"data": x, "reconstruction": vae.reconstruct(x, *context)}
    figures = {
        "curves": plots.curves(rows),
        "samples": _samples(run, vae, 64),
        "reconstructions": plots.strip(_toned(vae, context, reconstructions)),
        "strip": plots.strip(_toned(vae, context, {**reconstructions, "sample": samples})),
    }
    if run.blueprint.latent == 2:
        figures["manifold"] = _manifold(run, vae, 20)
    return [plots.save(figure, Path(run.run) / f"{name}.png") for name, figure in figures.items()]


def dataset_of(settings: Mapping[str, Any]) -> Data:
    """The data that the settings of a run name, with the context that its parts ask for.

    Raises:
        ValueError: As for `load`, or labels asked for beside a context of the data's own.
    """
    keys = ("top", "validation", "test", "ordered", "seed")
    options = {key: settings[key] for key in keys}
    options["missing"] = settings.get("missing", False)  # which older runs do not know
    loaded = load(settings["data"], directory=settings["data_dir"], **options)
    own = bool(loaded.train.context)
    if own and settings["conditional"]:
        raise ValueError(
            f"'{loaded.name}' has a context of its own; leave out --conditional, and put the "
            f"labels into that context where they belong there"
        )
    loaded = loaded.conditioned() if settings["conditional"] else loaded
    likelihood = settings["likelihood"]
    likelihood = likelihood if isinstance(likelihood, Part) else Part.of(likelihood)
    return loaded.sized() if likelihood.options.get("size_factor") and not own else loaded


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


def check_threads(count: int) -> None:
    """Refuse a number of threads that is none.

    Raises:
        ValueError: There is not even one.
    """
    if count < 1:
        raise ValueError(f"a command takes at least 1 thread, not {count}")


@contextlib.contextmanager
def in_threads(count: int) -> Iterator[None]:
    """Let torch share its work out to so many threads, and put back what there was.

    Raises:
        ValueError: As for `check_threads`.
    """
    check_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dataset_batches(part: Split) -> Iterator[tuple[Tensor, ...]]:
    """Cut a split into batches, dynamic binarisation being the same each time."""
    return part.batches(1000, torch.Generator(part.x.device).manual_seed(0))


def score(vae: VAE, part: Split, name: str, *, particles: int = 10) -> str:
    """Say the bound of a split and its halves in a line."""
    values = bound(vae, dataset_batches(part), particles=particles).summary()
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


def _samples(run: Run, vae: VAE, count: int, label: int | None = None) -> Figure:
    """Means of new data, those of a conditional run with a column for each label."""
    context = run.context(count, label)
    columns = run.classes if label is None else 0
    means = {"means": vae.sample(count, *context, mean=True)}
    return plots.grid(_toned(vae, context, means)["means"], columns or None)


def _manifold(run: Run, vae: VAE, side: int, label: int | None = None) -> Figure:
    """The manifold at one context, label 0 by default."""
    context = tuple(c.expand(side**2, -1) for c in run.context(1, label))
    means = {"means": _grid(vae, side, *context)}
    return plots.manifold(_toned(vae, context, means)["means"], side)


def _toned(vae: VAE, context: Sequence[Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Images with their black at 0 and their white at 1, by the support of the likelihood.

    Grey levels are drawn over the greatest of 255, counts over the greatest of them all, and
    values without such bounds, where they leave [0, 1], over the range of the first row.
    """
    element, first = support(vae, *context), next(iter(rows.values()))
    low, high = bounds(element)
    if element.is_discrete and math.isnan(high):
        high = max(float(x.nan_to_num(0.0).max()) for x in rows.values())
    elif math.isnan(low + high):
        values = first[first.isfinite()]
        slack = 0.0 if "data" in rows else 0.25  # means of data in [0, 1] leave it a little
        if ((values < -slack) | (values > 1 + slack)).any():
            low, high = float(values.min()), float(values.max())
    if not high > low or first.dim() != 4:
        return dict(rows)
    return {key: (x - low) / (high - low) for key, x in rows.items()}


@torch.no_grad()
def support(vae: VAE, *context: Tensor) -> constraints.Constraint:
    """The support of one element of complete data; random state stays as it was."""
    rows = [c[:1] for c in context]
    device = next(vae.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        law = vae.decode(as_pyro(vae.prior(*rows)).sample().reshape(1, -1), *rows)
    while isinstance(law, (Independent, Observed)):
        law = law.base_dist
    return elementary(as_pyro(law).support)


def _code(posterior: Distribution) -> Tensor:
    """Its mean, or a draw where that is not known."""
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


def bounds(element: constraints.Constraint) -> tuple[float, float]:
    """Least and greatest value of a support; NaN for one that it lacks or that varies."""
    ends = (getattr(element, f"{end}_bound", math.nan) for end in ("lower", "upper"))
    values = (torch.as_tensor(end, dtype=torch.float64).unique() for end in ends)
    low, high = (float(each) if each.numel() == 1 else math.nan for each in values)
    return low, high


def print_paths(paths: Sequence[Path]) -> None:
    """Say where the pictures are."""
    print("\n".join(["pictures:", *(f"  {path}" for path in paths)]))
