"""Several processes: which of them this one is, its share of the data, and what they add up."""

from __future__ import annotations

__all__ = ["Exchange", "Ranks", "job", "joined", "restarted", "warn_alone"]

import contextlib
import hashlib
import importlib
import json
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from pyro_vae.splits import Data, Split

_WAIT = timedelta(minutes=30)  # for a process that neither answers nor has ended
_MEMORY, _FEW = "/dev/shm", 4  # where files lie in memory, and processes that use one
_ASKED = 64  # steps between looks at a GPU's buffer, each of which waits for the GPU


@dataclass(frozen=True)
class Ranks:
    """The processes that do one piece of work together, and which of them this one is.

    Attributes:
        rank: Number of this process, from 0; the first alone writes files.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Ranks:
        """Those of `torch.distributed`, where a process group was made; else this one alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Ranks()
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shard(self, data: Data) -> Data:
        """This process's share of the data.

        Shares are consecutive rows. Those of the training split are of one length, so that all
        processes take the same steps, and the last ``N % size`` rows are in none of them.

        Raises:
            ValueError: A split has fewer rows than there are processes.
        """
        if self.size == 1:
            return data
        for name, part in zip(("training", "validation"), data.splits, strict=False):
            if 0 < len(part) < self.size:
                raise ValueError(
                    f"{len(part)} {name} data cannot be shared out among {self.size} processes; "
                    f"use fewer"
                )
        each = len(data.train) // self.size
        train = data.train[self.rank * each : (self.rank + 1) * each]
        return Data(train, self._share(data.validation), self._share(data.test), data.name)

    def _share(self, part: Split) -> Split:
        """This process's share of all rows."""
        begin, end = (len(part) * k // self.size for k in (self.rank, self.rank + 1))
        return part[begin:end]

    def agree(self, values: Mapping[str, Any]) -> None:
        """Refuse values, all of them plain, that are not the same in all processes.

        Raises:
            ValueError: One differs; raised in all processes.
        """
        if self.size == 1:
            return
        given = [json.loads(each) for each in self.collect(json.dumps(values).encode())]
        for rank, other in enumerate(given):
            for key, value in given[0].items():
                if other.get(key) != value:
                    raise ValueError(
                        f"processes 0 and {rank} of this job were given other {key}; give the "
                        f"same to all"
                    )

    def align(self, pair: nn.Module) -> None:
        """Give every process the first one's weights and buffers, and draws of its own.

        The first draws a seed from torch's generator; rank r seeds all of its generators by that
        number plus r, while the first goes on with its own.

        Raises:
            ValueError: Weights or buffers of other shapes or types.
        """
        if self.size == 1:
            return
        shapes = [[*each.shape, str(each.dtype)] for each in (*pair.parameters(), *pair.buffers())]
        self.agree({"networks": shapes})
        with torch.no_grad(), _answering():
            for tensor in (*pair.parameters(), *pair.buffers()):
                value = tensor.contiguous()
                distributed.broadcast(value, 0)
                tensor.copy_(value)
        seed = int.from_bytes(self.send(int(torch.randint(2**31, ())).to_bytes(4, "big")), "big")
        if not self.first:
            pyro.set_rng_seed(seed + self.rank)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes one after the other, whose numbers may differ.

        Args:
            rows: Those of this process, ``(n, *shape)``.
        """
        if self.size == 1:
            return rows
        counts = self._sizes(len(rows), rows.device)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with _answering():
            distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def send(self, content: bytes) -> bytes:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return content
        sizes = self._sizes(len(content), _device())
        rows = _packed(content) if self.first else torch.zeros(sizes[0], dtype=torch.uint8)
        rows = rows.to(_device())
        with _answering():
            distributed.broadcast(rows, 0)
        return rows.cpu().numpy().tobytes()

    def collect(self, content: bytes) -> list[bytes]:
        """What each process gives, in all of them, by rank."""
        if self.size == 1:
            return [content]
        rows = _packed(content).to(_device())
        sizes = self._sizes(len(rows), rows.device)
        return [part.numpy().tobytes() for part in self.gather(rows).cpu().split(sizes)]

    def _sizes(self, size: int, device: torch.device) -> list[int]:
        sizes = torch.zeros(self.size, dtype=torch.long, device=device)
        sizes[self.rank] = size
        with _answering():
            distributed.all_reduce(sizes)
        return [int(each) for each in sizes]


class Exchange:
    """What the processes tell each other after each step, in one buffer.

    Gradients become their means over the processes and the loss their sum. Buffers, such as the
    statistics of batch normalisation, become those of the first process, so that weights and
    buffers are always the same in all. One process alone leaves all as it is.

    Args:
        ranks: The processes.
        parameters: Whose gradients are averaged; one that has none counts as 0.
        buffers: Whatever else a step may change.

    Example:
        >>> loss, due = Exchange(Ranks(), [], [])(torch.tensor(2.0), False)
        >>> float(loss), due
        (2.0, False)
    """

    def __init__(
        self, ranks: Ranks, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> None:
        self.ranks, self.parameters, self._steps = ranks, parameters, 0
        if ranks.size == 1:
            return
        self.buffers = [each for each in buffers if each.is_floating_point()]
        shared = [*parameters, *self.buffers]
        dtype = torch.float32
        for each in shared:
            dtype = torch.promote_types(dtype, each.dtype)
        count = sum(each.numel() for each in shared) + 2  # with the loss, and what is due
        self.sum = torch.zeros(count, dtype=dtype, device=parameters[0].device)
        self.seen = _seen_by_all(ranks, self.sum)
        written = [self.sum] if self.seen is None else [each[ranks.rank] for each in self.seen]
        self._own = [_views(each, shared) for each in written]
        self._all = _views(self.sum, shared)
        self._slopes = self.sum[: sum(each.numel() for each in parameters)]

    @torch.no_grad()
    def __call__(self, loss: Tensor, due: bool) -> tuple[Tensor, bool]:
        """Return the sum of the losses, and whether something is due in any process.

        On a GPU the latter is asked for at every 64th step only, since the answer is waited for.

        Raises:
            ConnectionError: Another process has ended, or is out of reach.
        """
        if self.ranks.size == 1:
            return loss, due
        *own, ends = self._own[self._steps % len(self._own)]
        held = [each.grad for each in self.parameters]
        held += self.buffers if self.ranks.first else [None] * len(self.buffers)
        for view, value in zip(own, held, strict=True):
            view.zero_() if value is None else view.copy_(value)
        ends[0], ends[1] = loss, float(due)
        self._add()
        self._slopes /= self.ranks.size
        *views, (total, asked) = self._all
        for view, each in zip(views, self.parameters, strict=False):
            each.grad = view.to(each.dtype)
        for view, each in zip(views[len(self.parameters) :], self.buffers, strict=True):
            each.copy_(view)
        self._steps += 1
        looks = self.sum.device.type == "cpu" or self._steps % _ASKED == 0
        return total.to(torch.float64, copy=True), looks and bool(asked > 0)

    def _add(self) -> None:
        """Add up what the processes have written, in one order, so that all have the same sum."""
        with _answering():
            if self.seen is None:
                distributed.all_reduce(self.sum)
                return
            distributed.all_reduce(torch.zeros(1))  # when all have written
        first, second, *others = self.seen[self._steps % 2]
        torch.add(first, second, out=self.sum)
        for each in others:
            self.sum += each


def _views(flat: Tensor, shared: Sequence[Tensor]) -> list[Tensor]:
    """What stands for each tensor in a buffer, with its strides, on which fused optimisers rely.

    The rest is the last of them.
    """
    sizes = [each.numel() for each in shared]
    *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
    strides = [torch.empty_like(each, device="meta").stride() for each in shared]
    views = [
        part.as_strided(each.shape, stride)
        for part, each, stride in zip(parts, shared, strides, strict=True)
    ]
    return [*views, rest]


def _seen_by_all(ranks: Ranks, buffer: Tensor) -> Tensor | None:
    """Memory ``(2, size, n)`` for each process's buffer, which those of one machine all see.

    Adding buffers up where they are takes a quarter of the time that sending them through the
    machine's network does, while there are few. There are two for each, in turn: what one step
    has written is read until the next one is written by all. None where there can be none.
    """
    if buffer.device.type != "cpu" or ranks.size > _FEW:
        return None
    size, path = 2 * ranks.size * len(buffer), ""
    if ranks.first and os.path.isdir(_MEMORY):
        path = _made(size * buffer.element_size())
    found = os.fsdecode(ranks.send(os.fsencode(path)))
    seen = None
    if all(each == b"\1" for each in ranks.collect(bytes([os.path.isfile(found)]))):
        seen = torch.from_file(found, shared=True, size=size, dtype=buffer.dtype)
        seen = seen.view(2, ranks.size, len(buffer))
    ranks.collect(b"")  # when all have opened it
    if path:
        os.unlink(path)
    return seen


def _made(size: int) -> str:
    """The path of a new file of so many bytes in memory, or none where there is no room."""
    handle, path = tempfile.mkstemp(prefix="pyro_vae-", dir=_MEMORY)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError:
        os.unlink(path)
        return ""
    finally:
        os.close(handle)
    return path


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, by NCCL on GPUs and by Gloo on CPUs.

    Outside of torchrun, or of a group of processes that exists already, nothing is done. The
    first GPU of `torch` is that of this process's place on its machine.

    Raises:
        ConnectionError: The others cannot be reached.

    Example:
        >>> with joined() as ranks:
        ...     print(ranks)
        Ranks(rank=0, size=1)
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ
    if alone or distributed.is_initialized():
        yield Ranks.here()
        return
    # Functions there have the group that exists at their first import as a default, and so keep
    # it and its threads alive to the exit of Python. Imported now, before it exists, they do not.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _answering():
        store, rank, size = next(rendezvous("env://", timeout=_WAIT))
        # torchrun may keep its store from one start to the next, with the addresses of before.
        store = PrefixStore(f"start {_starts()}", store)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_WAIT
        )
    failed = True
    try:
        yield Ranks.here()
        failed = False
    except (KeyboardInterrupt, SystemExit):  # to which all processes come together
        failed = False
        raise
    finally:
        if backend == "gloo" or not failed:  # NCCL waits for what a failing process never sends
            distributed.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of the job had died."""
    return _starts() > 0


def job() -> str:
    """Name the torchrun that started this process, as it is named when it starts it again."""
    parent = os.getppid()
    name = f"{socket.gethostname()} {parent}"
    with contextlib.suppress(OSError):  # when it began, since numbers of processes come again
        name += Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def warn_alone() -> None:
    """Warn where torchrun has started several processes, and each trains by itself."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and Ranks.here().size == 1:
        warnings.warn(
            f"this is one of {count} processes, and each trains by itself: for one training of "
            f"all call fit within `with pyro_vae.distributed.joined():`",
            stacklevel=3,
        )


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _device() -> torch.device:
    """Where messages lie: in CPU memory, if the group can send from there."""
    cpu = "gloo" in str(distributed.get_backend_config())
    return torch.device("cpu" if cpu else "cuda")


def _packed(content: bytes) -> Tensor:
    array = np.frombuffer(content, np.uint8).copy()  # which torch may write to
    return torch.from_numpy(array)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn what torch says of a process that does not answer into one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise ConnectionError(
            f"another process of this job has ended or is out of reach, and says why if it "
            f"could; what a run has kept can be gone on with ({reason})"
        ) from error
