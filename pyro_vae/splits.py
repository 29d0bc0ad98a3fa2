"""Splits: tensors in three parts, cut into batches, and the views that say what is scored.

A split keeps its rows as they are stored, bytes for pixels, and turns each batch into
what is scored by its *view*: `plain` values, whole grey `levels`, these `dequantised` by noise,
a fixed `threshold`, or the `dynamic` binarisation that draws every pixel anew each time it is
seen. A value that is missing is NaN, under every view. Rows may lie on disk, as `Mapped` has them:
then batches are read as they are needed, and nothing here goes through them but in windows.
"""

from __future__ import annotations

__all__ = [
    "Data",
    "Split",
    "dequantised",
    "divide",
    "dynamic",
    "levels",
    "plain",
    "split",
    "threshold",
]

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.mapped import Array, Facts, Mapped

View = Callable[[Tensor, torch.Generator | None], Tensor]

# Values of rows on disk that are read into memory together: 2 GiB as they are scored.
_MOST = 2**29
# Bytes of shuffled rows that are gathered at once: reading scattered memory in one go is faster.
_GATHERED = 2**20
# Blocks that rows on disk are divided by.
_BLOCKS = 10_000


def plain(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the values as they are, pixels as grey levels in [0, 1]."""
    return values


def levels(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return values in [0, 1] as the nearest of the grey levels 0, 1, ... 255."""
    return (255 * values).round()


def dequantised(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return values in [0, 1] as grey levels plus noise, ``(255 v + u) / 256, u ~ U[0, 1)``.

    Theis et al. (2016), A Note on the Evaluation of Generative Models, section 3.1: their
    density bounds the probability of the levels from below.
    """
    noise = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    # As many digits as a number below 256 has left, and neither 0 nor 1, where densities may end.
    noise = ((2**15 * noise).floor() + 0.5) / 2**15
    return (levels(values) + noise) / 256


def threshold(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binarise values in [0, 1]: 1 above one half, else 0."""
    return (values > 0.5).to(values.dtype).where(~values.isnan(), values)


def dynamic(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binarise values in [0, 1]: draw each anew as 1 with its own probability.

    The protocol of Burda et al. (2016), Importance Weighted Autoencoders, section 5.1.
    """
    # Several times faster than torch.bernoulli, and as exact as numbers of 24 bits are.
    noise = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    return (noise < values).to(values.dtype).where(~values.isnan(), values)


@dataclass(frozen=True)
class Split:
    """Rows of data: x as stored, with the context and the label of each row.

    Attributes:
        x: Values ``(N, *shape)`` as stored, bytes where the source has bytes; a tensor, or rows
            on disk.
        context: Whatever else a datum brings to model and guide, tensors of N rows.
        labels: Classes ``(N,)``, which colour pictures and train nothing.
        top: The stored value that counts as 1, 255 for bytes of an image.
        view: From values, divided by `top`, to what is scored.
    """

    x: Tensor | Mapped
    context: tuple[Tensor, ...] = ()
    labels: Tensor | None = None
    top: float = 1.0
    view: View = plain

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"Split({len(self):,} data of shape {tuple(self.x.shape[1:])}, {dtype})"

    def __getitem__(self, index: slice | Tensor) -> Split:
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Any], Any]) -> Split:
        """Apply `function` to every tensor of the split, and to its rows on disk."""
        return dataclasses.replace(
            self,
            x=function(self.x),
            context=tuple(function(c) for c in self.context),
            labels=None if self.labels is None else function(self.labels),
        )

    def to(self, device: torch.device | str) -> Split:
        """Return the split on another device; rows on disk stay there, and their batches go."""
        return self.map(lambda tensor: tensor.to(device))

    def read(self) -> Split:
        """Return the split with its rows in memory.

        Raises:
            ValueError: They are on disk, and too many.
        """
        if not isinstance(self.x, Mapped):
            return self
        if self.x.numel() > _MOST:
            raise ValueError(
                f"this needs all {len(self):,} rows at once, which take "
                f"{self.x.numel() * 4 / 2**30:,.1f} GiB as floats and stay on disk above "
                f"{_MOST * 4 / 2**30:g} GiB; take fewer, as by a smaller --test, or go through "
                f"their batches"
            )
        return dataclasses.replace(self, x=self.x.read())

    def expected(self) -> Split:
        """Return the split with its plain values in place of draws that have them as mean."""
        return dataclasses.replace(self, view=plain) if self.view is dynamic else self

    @property
    def level(self) -> float | None:
        """Width of a grey level in what is scored, where these are dequantised; else None.

        Data have the 256 levels as whole numbers up to 255. Of others, 17 levels over 16 for one,
        a density knows fewer levels, or none, and its bits would not be those of 256.
        """
        stored = self.top == 255 and not self.x.is_floating_point()
        return 1 / 256 if self.view is dequantised and stored else None

    def mean(self) -> Tensor:
        """Mean of what is scored over the rows, of shape `shape`; dynamic binarisation keeps it.

        Missing values are left out; an element that no row has gets the mean of all others.
        """
        generator = torch.Generator(self.x.device).manual_seed(0)  # of a view of the user's own
        total, count = torch.zeros(2, *self.x.shape[1:], dtype=torch.float64)
        size = max(min(2**24 // max(total.numel(), 1), 8192), 1)  # whatever the size of a row
        for x, *_ in self.expected().batches(size, generator):
            total += x.nansum(0, dtype=torch.float64).cpu()
            count += (~x.isnan()).sum(0).cpu()
        mean = total / count
        return mean.where(count > 0, total.sum() / count.sum()).float().to(self.x.device)

    def scored(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return rows of x, given as they are stored, as what is scored."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return self.view(x.to(dtype) / self.top, generator)

    def batch(self, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return all rows as one batch ``(x, *context)`` of scored values.

        Raises:
            ValueError: As for `read`.
        """
        x: Any = self.read().x
        return self.scored(x, generator), *self.context

    def batches(
        self, size: int, generator: torch.Generator | None = None, *, shuffle: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """Cut the split into batches ``(x, *context)``, the last one smaller where need be.

        Args:
            size: Rows in a batch.
            generator: Source of the order and of dynamic binarisation, on the split's device;
                torch's own by default.
            shuffle: Whether to draw a new order.
        """
        for x, *context in self.stored(size, generator, shuffle=shuffle):
            yield self.scored(x, generator), *context

    def stored(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        shuffle: bool = False,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Cut the split as `batches` does, with x as it is stored, but for the first `skip`.

        Shuffled batches are views of some that are gathered together, 1 MiB at most unless one
        is larger: clone one to keep it without the others.
        """
        if isinstance(self.x, Mapped):
            for x, numbers in self.x.batches(size, generator, shuffle=shuffle, skip=skip):
                yield x, *(c[numbers] for c in self.context)
            return
        columns, device = (self.x, *self.context), self.x.device
        order = torch.randperm(len(self), generator=generator, device=device) if shuffle else None
        if order is None:
            for start in range(skip * size, len(self), size):
                yield tuple(column[start : start + size] for column in columns)
            return
        datum = sum(math.prod(each.shape[1:]) * each.element_size() for each in columns)
        ahead = size * max(_GATHERED // max(size * datum, 1), 1)
        for start in range(skip * size, len(self), ahead):
            rows = order[start : start + ahead]
            # An index in brackets takes several times as long.
            gathered = [column.index_select(0, rows) for column in columns]
            for first in range(0, len(rows), size):
                yield tuple(column[first : first + size] for column in gathered)


@dataclass(frozen=True)
class Data:
    """A data set in three splits, of which validation and test may be empty.

    Attributes:
        train: What is trained on.
        validation: What early stopping and the choice of weights look at.
        test: What neither has seen.
        name: For titles and folder names.
    """

    train: Split
    validation: Split
    test: Split
    name: str = "data"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.train.x.shape[1:])

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Train, validation and test."""
        return self.train, self.validation, self.test

    @property
    def span(self) -> tuple[float, float]:
        """Least and greatest of all values, as divided by `top`; missing ones are left out."""
        parts = [part for part in self.splits if len(part)]
        ends = [torch.tensor(_facts(part.x).span, dtype=part.x.dtype) / part.top for part in parts]
        return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)

    @property
    def missing(self) -> float:
        """Share of all values that are missing."""
        # Parts of rows on disk have what was found in all of them.
        floats = [part.x for part in self.splits if part.x.is_floating_point() and len(part)]
        found = [(_facts(x), x.numel()) for x in floats]
        gaps = sum(facts.missing / facts.values * count for facts, count in found)
        return gaps / sum(part.x.numel() for part in self.splits)

    def map(self, function: Callable[[Split], Split]) -> Data:
        """Apply `function` to every split."""
        train, validation, test = (function(part) for part in self.splits)
        return Data(train, validation, test, self.name)

    def viewed(self, view: View) -> Data:
        """Return the same data under another view.

        Raises:
            TypeError: The view is no function.
            ValueError: A binarisation or grey levels of values outside [0, 1].
        """
        if not callable(view):
            raise TypeError(f"a view is a function, such as data.dynamic, not {view!r}")
        if view is not plain:
            low, high = self.span
            if low < 0 or high > 1:
                raise ValueError(
                    f"the view {getattr(view, '__name__', 'given')} needs values between 0 and "
                    f"1 and '{self.name}' has {low:g} to {high:g}; give the stored value that "
                    f"counts as 1 (255 for pixels) as --top, in Python top=, or a likelihood for "
                    f"such values"
                )
        return self.map(lambda part: dataclasses.replace(part, view=view))

    def conditioned(self) -> Data:
        """Return the same data with one-hot labels as context, for a conditional VAE.

        Raises:
            ValueError: There are no labels, or not in every split, or they are numbers far above
                the count of data.
        """
        parts = zip(("train", "validation", "test"), self.splits, strict=True)
        bare = [key for key, part in parts if part.labels is None]
        if bare:
            raise ValueError(
                f"'{self.name}' has no labels to condition on (in {', '.join(bare)}); give them, "
                f"or train without"
            )
        labels = [part.labels for part in self.splits if part.labels is not None and len(part)]
        classes = 1 + max(int(part.max()) for part in labels)
        if classes > max(1000, sum(map(len, self.splits))):
            raise ValueError(
                f"'{self.name}' has a label {classes - 1}, which would make {classes} classes for "
                f"{sum(map(len, self.splits))} data; number the classes from 0"
            )

        def condition(part: Split) -> Split:
            assert part.labels is not None
            code = torch.nn.functional.one_hot(part.labels.long(), classes).float()
            return dataclasses.replace(part, context=(*part.context, code))

        return self.map(condition)

    def sized(self) -> Data:
        """Return the same counts with a size factor as last context, for their likelihoods.

        A row's size factor, ``(N, 1)``, is its total over what the training rows have on
        average, in those columns that are not missing, so that p(x|z) need not explain how deep
        each cell was sequenced.

        Raises:
            ValueError: A row whose total is not positive, or out of all proportion; rows on disk
                that are too many.

        Example:
            >>> counts = torch.tensor([[1, 1], [2, 4]])
            >>> split(counts, validation=0, test=0).sized().train.context[0].flatten()
            tensor([0.5000, 1.5000])
        """
        names = ("training", "validation", "test")
        parts: Any = [part.read() for part in self.splits]
        totals = [part.x.flatten(1).nansum(1, dtype=torch.float64) for part in parts]
        for name, total in zip(names, totals, strict=True):
            if not (total > 0).all():
                row = int((total <= 0).nonzero()[0])
                raise ValueError(
                    f"row {row} of the {name} split of '{self.name}' has a total of "
                    f"{float(total[row]):g}, of which no size factor can be made; remove such rows"
                )
        seen = [(~part.x.flatten(1).isnan()).double() for part in parts]
        means = parts[0].x.flatten(1).double().nanmean(0).nan_to_num()
        factors = [
            (total / (there @ means))[:, None].float()
            for total, there in zip(totals, seen, strict=True)
        ]
        if not all(((factor > 0) & factor.isfinite()).all() for factor in factors):
            raise ValueError(
                f"the totals of the rows of '{self.name}' lie too far apart for size factors; "
                f"remove the rows that are out of scale"
            )
        train, validation, test = (
            dataclasses.replace(part, context=(*part.context, factor))
            for part, factor in zip(self.splits, factors, strict=True)
        )
        return Data(train, validation, test, self.name)


def split(
    x: Tensor | Array | Dataset[Any],
    *context: Tensor | Array,
    labels: Tensor | Array | None = None,
    **options: Any,
) -> Data:
    """Split arrays, tensors or a torch `Dataset` into train, validation and test.

    Args:
        x: Data ``(N, *shape)``, or a map-style `Dataset` whose items are x, or a tuple
            ``(x, label)`` with an integer label, or ``(x, *context)``.
        context: Whatever else a datum brings, arrays ``(N, features)`` or ``(N,)``.
        labels: Integer classes ``(N,)``, instead of those of a `Dataset`.
        options: How, as for `divide`.

    Raises:
        ValueError: As for `divide`.

    Example:
        >>> data = split(torch.rand(100, 1, 8, 8), view=dynamic)
        >>> [len(part) for part in data.splits]
        [80, 10, 10]
    """
    if isinstance(x, Dataset):
        x, own, classes = _stack(x)
        context, labels = (*own, *context), classes if labels is None else labels
    columns = [tensor(c, "the context").float() for c in context]
    rows = Split(
        tensor(x, "the data"),
        tuple(column[:, None] if column.dim() == 1 else column for column in columns),
        None if labels is None else tensor(labels, "the array of labels"),
    )
    return divide({"train": rows}, **options)


def tensor(value: Any, name: str) -> Tensor:
    """Return a tensor, an array, a number or an image (as bytes, channel first) as a tensor.

    What a masked array masks is missing, and becomes NaN.

    Raises:
        ValueError: It holds no real numbers, or whole ones of 2^63 and more; `name` says what
            did.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise ValueError(f"{name} is sparse; give it dense, by .to_dense()")
        return value
    if getattr(value, "mode", None) in ("P", "PA"):  # an image whose values number colours
        value = value.convert("RGB")
    array = np.asarray(value)
    dtype = array.dtype
    if dtype.kind not in "buif":
        raise ValueError(
            f"{name} holds values of type {dtype}, not real numbers; give integers or floats"
        )
    if np.ma.is_masked(value):
        if dtype == np.uint8:
            raise ValueError(f"{name} is of bytes, which have no holes; give floats, as x / 255")
        array = np.where(np.ma.getmaskarray(value), np.nan, array)
        dtype = array.dtype
    long = dtype.kind == "u" and dtype.itemsize == 8 and array.size > 0
    if long and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds whole numbers of 2^63 and more; give them as floats")
    if dtype.itemsize > 8 or (dtype.kind == "u" and dtype.itemsize > 1):
        dtype = np.dtype(np.float64 if dtype.kind == "f" else np.int64)
    # torch takes neither read-only nor reversed arrays, nor another machine's order of bytes
    array = np.require(array, dtype.newbyteorder("="), ["C", "W"])
    if hasattr(value, "getbands"):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.as_tensor(array)


def divide(
    parts: Mapping[str, Split],
    *,
    name: str = "data",
    top: float | None = None,
    view: View = plain,
    validation: float = 0.1,
    test: float = 0.1,
    ordered: bool = False,
    missing: bool = False,
    seed: int = 0,
) -> Data:
    """Take the validation and the test split that `parts` lacks out of its ``train``.

    Rows on disk are divided by blocks of neighbours, 10,000 of them or as many as there are rows.

    Args:
        parts: Rows under ``train`` and, where there are official splits, ``validation``
            and ``test``.
        name: Name of the data set.
        top: The stored value that counts as 1; by default 255 for bytes (1 if they are all
            0 or 1) and 1 for other types.
        view: `plain`, `levels`, `dequantised`, `threshold` or `dynamic`.
        validation: Fraction of the given ``train`` for validation, 0 for none.
        test: Likewise for the test.
        ordered: Take them from the end, as a sequence of frames needs, and not at random.
        missing: Accept NaN in x, for an element that was not observed.
        seed: Seed of the random choice.

    Raises:
        ValueError: No rows or too few, unequal numbers of rows, splits of unlike shape or
            type, values that are not finite, labels that are no classes, fractions that
            leave nothing, binarisation or grey levels outside [0, 1], rows in which all is
            missing.
    """
    for fraction in (validation, test):
        if not 0 <= fraction < 1:
            raise ValueError(f"a split's fraction lies between 0 and 1, not at {fraction}")
    if top is not None and not 0 < top < math.inf:
        raise ValueError(f"`top`, the stored value that counts as 1, is positive, not {top}")
    parts = {key: _checked(part, name, missing) for key, part in parts.items()}
    kinds = {key: _kind(part) for key, part in parts.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{key} has {kind}" for key, kind in kinds.items())
        raise ValueError(f"the splits of '{name}' differ: {found}; make them alike")
    scale = _top(parts["train"]) if top is None else top
    parts = {key: dataclasses.replace(part, top=scale) for key, part in parts.items()}
    train = parts["train"]
    block = math.ceil(len(train) / _BLOCKS) if isinstance(train.x, Mapped) else 1
    blocks = math.ceil(len(train) / block)
    order = torch.arange(blocks)
    if not ordered:
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    for key, fraction in (("test", test), ("validation", validation)):
        if key not in parts:
            count = max(round(fraction * blocks), 1) if fraction else 0
            left = max(len(order) - count, 0)
            order, taken = order[:left], order[left:]
            parts[key] = _taken(train, taken.sort().values, block)
    if not len(order):
        raise ValueError(
            f"'{name}' has {len(train)} sample{'s' * (len(train) > 1)}, too few to train on "
            f"with a validation share of {validation} and a test share of {test}"
        )
    kept = train if len(order) == blocks else _taken(train, order.sort().values, block)
    whole = Data(kept, parts["validation"], parts["test"], name)
    if top is not None and not all(map(math.isfinite, whole.span)):
        raise ValueError(
            f"the values of '{name}' over a top of {top} are more than a float can be; give a "
            f"larger one"
        )
    return whole.viewed(view)


def _taken(part: Split, numbers: Tensor, size: int) -> Split:
    """Blocks of `size` rows by their numbers."""
    if not isinstance(part.x, Mapped):
        return part[numbers]
    rows = torch.arange(0)
    if part.context or part.labels is not None:
        rows = (numbers[:, None] * size + torch.arange(size)).flatten()
        rows = rows[rows < len(part)]
    others = dataclasses.replace(part, x=torch.zeros(len(part), 0))[rows]
    return dataclasses.replace(others, x=part.x.blocks(numbers, size))


def _facts(values: Tensor | Mapped) -> Facts:
    """What there is to know of values without looking at each."""
    if isinstance(values, Mapped):
        return values.facts
    facts = Facts()
    facts.add(values)
    return facts


def _kept(x: Tensor) -> Tensor:
    """Values in a width worth keeping."""
    return x.byte() if x.dtype == torch.bool else x.float() if x.is_floating_point() else x


def _checked(part: Split, name: str, missing: bool) -> Split:
    """`part` as numbers of a width worth keeping, all finite, one row for each datum."""
    x, labels = part.x, part.labels
    if x.dim() < 2 or not x.shape.numel():
        raise ValueError(
            f"'{name}' of shape {tuple(x.shape)} holds no rows of data; give an array (N, *shape)"
        )
    if x.dtype.is_complex:
        raise ValueError(f"'{name}' holds complex numbers; give real ones")
    x = x.map(_kept) if isinstance(x, Mapped) else _kept(x)
    _check_values(x, name, missing=missing, may_miss=True)
    for other in (*part.context, *(() if labels is None else (labels,))):
        count = len(other) if other.dim() else "no rows"
        if count != len(x):
            raise ValueError(
                f"'{name}' has {len(x)} rows of data and {count} of labels or context; give one "
                f"for each datum"
            )
    for values in part.context:
        _check_values(values, name, missing=False, may_miss=False)
    if labels is not None:
        if labels.dim() != 1 or (labels != labels.long()).any() or (labels < 0).any():
            raise ValueError(
                f"'{name}' has labels that are no classes; give whole numbers from 0, one a row"
            )
        labels = labels.long()
    return dataclasses.replace(part, x=x, labels=labels)


def _check_values(values: Tensor | Mapped, name: str, *, missing: bool, may_miss: bool) -> None:
    """Refuse infinite values, and NaN but for elements of data that may be missing."""
    if not values.is_floating_point():
        return
    facts = _facts(values)
    bad, kinds = facts.infinite, {"infinite"}
    if not missing:
        bad, kinds = bad + facts.missing, {"infinite", "missing"}
    if bad:
        hint = ", or accept NaN for what was not observed by --missing, in Python missing=True"
        raise ValueError(
            f"'{name}' has {bad} {'' if missing else 'NaN or '}infinite values, the first in "
            f"{_place(values, min(facts.first[kind] for kind in kinds & facts.first.keys()))}; "
            f"remove or fill them{hint if may_miss and not missing and facts.missing else ''}"
        )
    if facts.empty:
        raise ValueError(
            f"'{name}' has {facts.empty} rows in which every value is missing, the first is "
            f"{_place(values, facts.first['empty'])}; remove them"
        )


def _place(values: Tensor | Mapped, row: int) -> str:
    return values.place(row) if isinstance(values, Mapped) else f"row {row}"


def _kind(part: Split) -> str:
    """What the rows of all splits have in common, in words."""
    widths = "".join(f" and {c[0].numel()} context features" for c in part.context)
    return f"{tuple(part.x.shape[1:])} {part.x.dtype}{widths}"


def _top(part: Split) -> float:
    return 255.0 if part.x.dtype == torch.uint8 and _facts(part.x).high > 1 else 1.0


def _stack(dataset: Dataset[Any]) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """All items of a map-style data set, as x, context and labels."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError("a torch Dataset must have a length above 0 to be read into memory")
    items = [dataset[i] for i in range(len(dataset))]
    columns = list(zip(*items, strict=True)) if isinstance(items[0], tuple) else [tuple(items)]
    fields = [[tensor(value, "an item of the Dataset") for value in c] for c in columns]
    try:
        x, *others = (torch.stack(field) for field in fields)
    except RuntimeError as error:
        raise ValueError("the items of the Dataset differ in shape; make them alike") from error
    if len(others) == 1 and others[0].dim() == 1 and not others[0].is_floating_point():
        return x, (), others[0]
    return (
        x,
        tuple(other.flatten(1) if other.dim() > 1 else other[:, None] for other in others),
        None,
    )
