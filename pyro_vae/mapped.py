"""Mapped rows: data that stay in ``.npy`` files, and are read a window at a time.

Nothing here holds a file open, or its pages in memory, longer than it takes to copy a window.
"""

from __future__ import annotations

__all__ = ["Array", "Facts", "Mapped", "unreadable"]

import dataclasses
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Window = tuple[Tensor, Tensor, Tensor]  # rows as they lie, their numbers, and the order to take

_CPU = torch.device("cpu")
_BLOCK = 2**20  # bytes that lie together: what a disk reads as fast as if it read in order
_WINDOW = 2**26  # bytes that are shuffled together, of which there are two in memory


class Segment(NamedTuple):
    """Rows `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


@dataclass
class Facts:
    """What one pass over the values of rows finds.

    Attributes:
        values: How many there are.
        low: The least of those that are not NaN.
        high: The greatest of them.
        missing: How many are NaN.
        infinite: How many are infinite.
        empty: How many rows have nothing but NaN.
        first: The first row with a value that is ``missing`` or ``infinite``, and the first that
            is ``empty``.
    """

    values: int = 0
    low: float = math.inf
    high: float = -math.inf
    missing: int = 0
    infinite: int = 0
    empty: int = 0
    first: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest value."""
        return self.low, self.high

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows, the first of which has the number `start`."""
        self.values += rows.numel()
        if not rows.numel():
            return
        rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
        low, high = rows.aminmax()
        if not (low.isfinite() and high.isfinite()):  # NaN is the least and the greatest
            gaps, infinite = rows.isnan(), rows.isinf()
            empty = gaps.all(1)
            self.missing += int(gaps.sum())
            self.infinite += int(infinite.sum())
            self.empty += int(empty.sum())
            found = {"missing": gaps.any(1), "infinite": infinite.any(1), "empty": empty}
            for key, where in found.items():
                if key not in self.first and where.any():
                    self.first[key] = start + int(where.nonzero()[0])
            if empty.all():
                return
            low, high = rows[~gaps].aminmax()
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())


@dataclass(frozen=True, eq=False)
class Mapped:
    """Rows that lie in ``.npy`` files on disk, where a split else has a tensor.

    A slice is another `Mapped` and reads nothing, an index gives the rows as a tensor, and
    `batches` goes through them in windows of 64 MiB, whatever their number. Its order is shuffled
    on two levels: blocks of a MiB, each of which lies together, are drawn in a new order, and
    the rows of the 64 blocks of a window are shuffled among each other. That is the order of
    a full shuffle where all rows fit into one window, and else as good where those that lie
    together are not alike.

    Attributes:
        segments: Where the rows lie, none of them empty.
        convert: From an array of rows, as a file has them, to a tensor of as many.
        like: What it makes of no rows.
        device: Where batches go to.
        origin: What these rows were divided from, whose `facts` stand for theirs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.arange(6.0).reshape(3, 2))
        ...     rows = Mapped.of([Path(folder, "x.npy")], torch.tensor)
        ...     rows.shape, rows[1:].read()[0].tolist(), rows[torch.tensor([2])].tolist()
        (torch.Size([3, 2]), [2.0, 3.0], [[4.0, 5.0]])
    """

    segments: tuple[Segment, ...]
    convert: Callable[[Array], Tensor]
    like: Tensor
    device: torch.device = _CPU
    origin: Mapped | None = None

    @staticmethod
    def of(paths: Sequence[Path], convert: Callable[[Array], Tensor]) -> Mapped:
        """Return the rows of some files, one after the other, and look at their headers only.

        Raises:
            ValueError: No files, or one that is damaged, holds no rows of numbers, has its rows
                not together (Fortran order), or others than the first.
        """
        if not paths:
            raise ValueError("there are no files to map; name one .npy file or more")
        first, segments = _opened(paths[0]), list[Segment]()
        for path in paths:
            array = _opened(path)
            if (array.shape[1:], array.dtype) != (first.shape[1:], first.dtype):
                raise ValueError(
                    f"'{path}' has rows of shape {array.shape[1:]} and type {array.dtype}, and "
                    f"'{paths[0]}' of {first.shape[1:]} and {first.dtype}; make all files alike"
                )
            if len(array):
                segments.append(Segment(path.absolute(), 0, len(array)))
        return Mapped(tuple(segments), convert, convert(first[:0]))

    @cached_property
    def _ends(self) -> list[int]:
        """After how many rows each segment ends."""
        return list(accumulate(stop - start for _, start, stop in self.segments))

    def __len__(self) -> int:
        return self._ends[-1] if self.segments else 0

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor in whose place they are."""
        return torch.Size((len(self), *self.like.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of that tensor."""
        return self.like.dtype

    def dim(self) -> int:
        """Return the number of its dimensions."""
        return self.like.dim()

    def numel(self) -> int:
        """Return the number of its elements."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether its values are floats."""
        return self.like.is_floating_point()

    @cached_property
    def facts(self) -> Facts:
        """What a pass over the values finds, once, of all rows that these were divided from.

        Of bytes it goes no further than to where both 0 and 255 were seen.
        """
        if self.origin:
            return self.origin.facts
        facts = Facts()
        # Shown where it takes longer than a moment.
        with tqdm(total=len(self), desc="looking at values", unit="row", unit_scale=True,
                  delay=3, mininterval=0.2 if sys.stderr.isatty() else 10.0,
                  leave=False) as bar:  # fmt: skip
            for x, numbers, _ in _ahead(self._windows()):
                facts.add(x, int(numbers[0]))
                bar.update(len(x))
                if self.dtype == torch.uint8 and facts.span == (0, 255):
                    break
        return facts

    def to(self, device: torch.device | str) -> Mapped:
        """Return the same rows, whose batches go to another device."""
        place = torch.device(device)
        return dataclasses.replace(self, device=place, origin=self.origin or self)

    def map(self, function: Callable[[Tensor], Tensor]) -> Mapped:
        """Return the rows as `function` makes them, some at a time, when they are read."""

        def convert(array: Array) -> Tensor:
            return function(self.convert(array))

        return dataclasses.replace(self, convert=convert, like=function(self.like), origin=None)

    @overload
    def __getitem__(self, index: slice) -> Mapped: ...
    @overload
    def __getitem__(self, index: Tensor) -> Tensor: ...
    def __getitem__(self, index: slice | Tensor) -> Mapped | Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"rows on disk are sliced one after the other, not by {step}")
            return self._cut([(start, max(start, stop))])
        rows = (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist()
        if any(not -len(self) <= row < len(self) for row in rows):
            raise IndexError(f"there are {len(self)} rows, and one of the index is none of them")
        rows = [row % len(self) for row in rows]
        return self._rows([(row, row + 1) for row in rows]).to(self.device)

    def blocks(self, numbers: Tensor, size: int) -> Mapped:
        """Return some of the blocks of `size` rows that these begin with, with their `facts`."""
        spans = [(n * size, min((n + 1) * size, len(self))) for n in numbers.tolist()]
        return dataclasses.replace(self._cut(spans), origin=self.origin or self)

    def read(self) -> Tensor:
        """Return all rows as a tensor in memory."""
        size = self._block
        spans = [(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        return self._rows(spans).to(self.device)

    def place(self, row: int) -> str:
        """Say in words where a row lies."""
        ((path, start, _),) = self._pieces([(row, row + 1)])
        return f"row {start} of '{path.name}'"

    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        shuffle: bool = False,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut the rows into batches, each with the numbers of its rows.

        While a window is used, the next one is read in a thread, which ends with the iteration.

        Args:
            size: Rows in a batch; only the last one may be smaller.
            generator: Source of the order, from which one number is drawn; torch's own by default.
            shuffle: Whether to draw a new order.
            skip: Batches to leave out at the beginning. Windows of nothing else are not read.
        """
        seed = None
        if shuffle:
            place = generator.device if generator else None
            seed = int(torch.randint(2**62, (), generator=generator, device=place))
        for x, numbers in _batches(_ahead(self._windows(seed, skip * size)), size):
            yield x.to(self.device), numbers.to(self.device)

    @property
    def _block(self) -> int:
        """Rows that are read together."""
        return max(_BLOCK // self._width, 1)

    @property
    def _width(self) -> int:
        """Bytes of a row."""
        return max(math.prod(self.shape[1:]) * self.like.element_size(), 1)

    def _windows(self, seed: int | None = None, skip: int = 0) -> Iterator[Window]:
        """Windows of rows, in a new order where there is a seed, but for the first `skip` rows."""
        size, count = self._block, len(self)
        starts = torch.arange(0, count, size)
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
            starts = starts[torch.randperm(len(starts), generator=generator)]
        for some in starts.split(max(_WINDOW // (size * self._width), 1)):
            spans = [(start, min(start + size, count)) for start in some.tolist()]
            numbers = torch.cat([torch.arange(*span) for span in spans] or [starts])
            order = torch.arange(len(numbers))
            if seed is not None:
                order = torch.randperm(len(numbers), generator=generator)
            if skip < len(numbers):
                yield self._rows(spans), numbers, order[skip:]
            skip = max(skip - len(numbers), 0)

    def _rows(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        """The rows of some spans, in memory."""
        count = sum(stop - start for start, stop in spans)
        rows = self.like.new_empty(count, *self.shape[1:])
        begin, files = 0, dict[Path, Array]()  # which are let go of, with their pages, at the end
        for path, start, stop in self._pieces(spans):
            if path not in files:
                files[path] = _opened(path)
            if stop > len(files[path]):
                raise ValueError(
                    f"'{path}' has fewer rows than before; put it back, or begin anew"
                )
            end = begin + stop - start
            rows[begin:end] = self.convert(files[path][start:stop])
            begin = end
        return rows

    def _cut(self, spans: Sequence[tuple[int, int]]) -> Mapped:
        """The rows of some spans, with neighbouring segments joined."""
        joined = list[Segment]()
        for each in self._pieces(spans):
            if joined and (each.path, each.start) == (joined[-1].path, joined[-1].stop):
                joined[-1] = joined[-1]._replace(stop=each.stop)
            else:
                joined.append(each)
        return dataclasses.replace(self, segments=tuple(joined), origin=None)

    def _pieces(self, spans: Iterable[tuple[int, int]]) -> Iterator[Segment]:
        """Where the rows of some spans lie."""
        for start, stop in spans:
            number = bisect_right(self._ends, start)
            while start < stop:
                segment, end = self.segments[number], self._ends[number]
                until, shift = min(stop, end), segment.stop - end
                yield Segment(segment.path, start + shift, until + shift)
                start, number = until, number + 1


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return in a sentence what NumPy's reader says of a file."""
    objects = "Object arrays" in str(error) or "Python objects" in str(error)
    fault = "holds Python objects" if objects else "is damaged or no NumPy file"
    return ValueError(
        f"'{path}' {fault}; save numbers with numpy.save or numpy.savez, or delete it if it was "
        f"downloaded"
    )


def _opened(path: Path) -> Array:
    """The array in a file, whose values are not read until they are used."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # tokenize, for one, lets through its own
        raise unreadable(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"'{path}' is an archive; unpack it, or give it the ending .npz")
    if array.ndim < 1:
        raise ValueError(f"'{path}' holds one number and no rows; give an array (N, *shape)")
    if not array.flags.c_contiguous:
        raise ValueError(
            f"'{path}' holds its columns together (Fortran order), so that no row can be read "
            f"alone; save it anew by numpy.save(path, numpy.ascontiguousarray(array)), or load it "
            f"whole by mapped=False"
        )
    return np.asarray(array)


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each of which is made in a thread while the one before is used."""
    with ThreadPoolExecutor(1, "reading") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _batches(windows: Iterable[Window], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` rows with their numbers, across windows, the last one smaller."""
    held, wanted = list[tuple[Tensor, Tensor]](), size
    for x, numbers, order in windows:
        while len(order):
            taken, order = order[:wanted], order[wanted:]
            held.append((x.index_select(0, taken), numbers[taken]))
            wanted -= len(taken)
            if not wanted:
                yield _joined(held)
                held, wanted = [], size
    if held:
        yield _joined(held)


def _joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pieces) == 1:
        return pieces[0]
    x, rows = (torch.cat(column) for column in zip(*pieces, strict=True))
    return x, rows
