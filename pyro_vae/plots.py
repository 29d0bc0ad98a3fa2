"""Pictures: arrays in, matplotlib figures out; nothing is computed here."""

from __future__ import annotations

__all__ = [
    "curves",
    "dimensions",
    "grid",
    "k_hat",
    "manifold",
    "ranks",
    "save",
    "scatter",
    "strip",
]

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from pyro_vae.checkpoints import write

Array = npt.NDArray[Any]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure to a PNG file, whole or not at all, and return its path."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write(path, content.getvalue())
    return path


_BAND = 16


def curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw training curves: the loss and the bound, and the two halves of the bound.

    Args:
        rows: Metrics of each epoch, as `pyro_vae.training.fit` returns them.
    """
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    samples = [row["samples"] for row in rows]
    mark = "o" if len(rows) == 1 else ""
    left.plot(samples, [-row["loss"] for row in rows], mark + "-", label="training objective")
    if "elbo" in rows[0]:
        left.plot(samples, [row["elbo"] for row in rows], mark + "-", label="validation ELBO")
        right.plot(samples, [-row["reconstruction"] for row in rows], mark + "-", color="C2")
        right.set_ylabel("minus reconstruction, nats", color="C2")
        twin = right.twinx()
        cross = mark and "x"  # on a single epoch both scales put their mark in the middle
        twin.plot(samples, [row["kl"] for row in rows], cross + "-", color="C3")
        twin.set_ylabel("KL, nats", color="C3")
        right.set_title("halves of the validation bound")
    else:
        right.set_axis_off()
    left.set_ylim(_limits([value for row in rows for value in (row.get("elbo"), -row["loss"])]))
    left.set_ylabel("nats per datum")
    left.set_title("training objective and validation bound")
    warming = [row["samples"] for row in rows if row["weight"] < 1]
    if warming:
        left.axvspan(0, warming[-1], color="0.9", label="warm-up: the objective is no bound")
    left.legend()
    for axes in (left, right):
        axes.set_xlabel("training samples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    return figure


def grid(x: Tensor, columns: int | None = None) -> Figure:
    """Draw data ``(N, *shape)`` as tiles, row by row; vectors as rows of a heat map.

    Args:
        x: Images ``(N, 1, 3 or 4, H, W)`` with values in [0, 1], the fourth channel their opacity,
            or vectors; what is missing (NaN) is drawn grey in an image.
        columns: Tiles in a row; a square by default.
    """
    if not _are_images(x):
        return _heat_map(x)
    columns = columns or math.ceil(math.sqrt(len(x)))
    return _drawn(_tiled(x, columns))


def strip(rows: Mapping[str, Tensor]) -> Figure:
    """Draw rows of equally many tiles under each other, each with its name, 16 to a band."""
    first = next(iter(rows.values()))
    if not _are_images(first):
        figure = Figure(figsize=(7, 1 + 2 * len(rows)), dpi=120, layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(rows), sharex=True))
        arrays = [x.flatten(1).numpy(force=True) for x in rows.values()]
        values = np.concatenate([array.flatten() for array in arrays])
        finite = values[np.isfinite(values)]
        ends = {"vmin": finite.min(initial=np.inf), "vmax": finite.max(initial=-np.inf)}
        for axes, name, array in zip(panels, rows, arrays, strict=True):
            drawn = axes.imshow(array, aspect="auto", interpolation="nearest", **ends)
            axes.set_ylabel(name)
        axes.set_xlabel("element")
        figure.colorbar(drawn, ax=list(panels))
        return figure
    bands = [
        (name, _tiled(x[start : start + _BAND], min(_BAND, len(x))))
        for start in range(0, len(first), _BAND)
        for name, x in rows.items()
    ]
    height, width = bands[0][1].shape[:2]
    tall, wide, margin = 9 * height / width, 9.0, 1.3
    figure = Figure(figsize=(margin + wide, len(bands) * (tall + 0.08)), dpi=120)
    total = figure.get_figheight()
    for number, (name, tiles) in enumerate(bands):
        bottom = (total - (number + 1) * (tall + 0.08)) / total
        place = (margin / (margin + wide), bottom, wide / (margin + wide), tall / total)
        axes = figure.add_axes(place)
        axes.imshow(tiles, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        middle = (margin - 0.1) / (margin + wide), bottom + tall / total / 2
        figure.text(*middle, name, ha="right", va="center")
    return figure


def manifold(x: Tensor, side: int) -> Figure:
    """Draw a square of decoded images, `side` in a row, without space between them."""
    return _drawn(_tiled(x, side, gap=0)) if _are_images(x) else _heat_map(x)


def dimensions(kl: Array) -> Figure:
    """Draw the KL of each latent dimension ``(latent,)``, largest first."""
    figure, axes = _axes()
    order = np.argsort(-kl, kind="stable")
    axes.bar(np.arange(len(kl)), kl[order], color="C3")
    if len(kl) <= 40:
        axes.set_xticks(np.arange(len(kl)), [str(each) for each in order])
    axes.set_xlabel("latent dimension" if len(kl) <= 40 else "latent dimensions, by their KL")
    axes.set_ylabel("KL(q(z_i|x) || p(z_i)), nats")
    return figure


def k_hat(values: Array, threshold: float) -> Figure:
    """Draw a histogram of Pareto k-hats ``(N,)`` and the threshold of reliable ones."""
    figure, axes = _axes()
    finite = values[np.isfinite(values)]
    axes.hist(finite, bins=40, color="C0")
    axes.axvline(threshold, color="C3", label=f"reliable below {threshold:.2f}")
    share = float((values > threshold).mean()) if len(values) else 0.0
    few = "too few draws for a k-hat"
    axes.set_title(f"above: {share:.1%} of the data" if len(finite) else few)
    axes.set_xlabel("Pareto k-hat of the importance weights")
    axes.set_ylabel("data")
    axes.legend()
    return figure


def ranks(values: Array, draws: int, *, most: int = 11) -> Figure:
    """Draw histograms of ranks ``(simulations, latent + 1)``, the last those of log p(x,z).

    The band holds a bar of a uniform histogram with a probability of 99 %.

    Args:
        values: Ranks from 0 to `draws`.
        draws: Greatest rank.
        most: Greatest number of latents to draw.
    """
    shown = [*range(min(values.shape[1] - 1, most)), values.shape[1] - 1]
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    size = (2.4 * columns + 0.4, 1.9 * rows + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    bins = 20
    mean = len(values) / bins
    half = 2.58 * (mean * (1 - 1 / bins)) ** 0.5
    for axes, column in zip(grid, shown, strict=False):
        axes.axhspan(mean - half, mean + half, color="0.85")
        axes.hist(values[:, column], bins=np.linspace(-0.5, draws + 0.5, bins + 1), color="C0")
        last = column == values.shape[1] - 1
        axes.set_title("log p(x,z)" if last else f"z, dimension {column}", fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    said = "rank among draws of q(z|x); in grey 99 % of the bars of an exact q"
    figure.supxlabel(said if columns > 2 else said.replace("; ", ";\n"), fontsize=9)
    figure.supylabel("simulated data", fontsize=9)
    return figure


def scatter(z: Array, labels: Array | None = None) -> Figure:
    """Draw latents ``(N, latent)``, their two directions of greatest variance, by label."""
    figure, axes = _axes(square=True)
    names = ["latent dimension 0", "latent dimension 1"]
    if z.shape[1] == 1:
        z, names[1] = np.concatenate([z, np.zeros_like(z)], 1), ""
    if z.shape[1] > 2:
        centred = z - z.mean(0)
        z = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        names = ["first principal direction", "second principal direction"]
    size = 7 if len(z) < 1000 else 3
    classes = [None] if labels is None else list(np.unique(labels))
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    for index, label in enumerate(classes):
        chosen = z if label is None else z[labels == label]
        colour = {
            "color": colours(index % colours.N),
            "label": None if label is None else str(label),
        }
        axes.plot(chosen[:, 0], chosen[:, 1], ".", markersize=size, alpha=0.5, **colour)
    if labels is not None and len(classes) <= 20:
        axes.legend(markerscale=4, fontsize=8)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    return figure


def _axes(*, square: bool = False) -> tuple[Figure, Any]:
    size = (5.4, 5.0) if square else (6.4, 3.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.subplots()


def _are_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] in (1, 3, 4)


def _tiled(x: Tensor, columns: int, gap: int = 1) -> Array:
    """One image ``(H, W)`` or ``(H, W, 3)`` of all tiles, white between them."""
    images = np.nan_to_num(x.numpy(force=True), nan=0.5).clip(0, 1)
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = np.ones((channels, rows * (height + gap) - gap, columns * (width + gap) - gap))
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas[0] if channels == 1 else canvas.transpose(1, 2, 0)


def _drawn(canvas: Array) -> Figure:
    height, width = canvas.shape[:2]
    longest = max(height, width)
    figure = Figure(figsize=(6.4 * width / longest, 6.4 * height / longest), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return figure


def _heat_map(x: Tensor) -> Figure:
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(x.flatten(1).numpy(force=True), aspect="auto", interpolation="nearest")
    axes.set_xlabel("element")
    axes.set_ylabel("datum")
    figure.colorbar(drawn)
    return figure


def _limits(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Where to cut the axis, so that the first epochs do not flatten the rest."""
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    if len(finite) < 10:
        return None
    low, high = finite[len(finite) // 10], finite[-1]
    span = high - low or 1.0
    return low - 0.5 * span, high + 0.1 * span
