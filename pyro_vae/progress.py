"""Progress: where a training run stands, kept in its folder so that it goes on bit for bit."""

from __future__ import annotations

__all__ = ["Metrics", "Progress", "Standing", "Stopped"]

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import checkpoints
from pyro_vae.distributed import Ranks
from pyro_vae.identity import (
    generators,
    numbers,
    set_generators,
    set_numbers,
    tensors,
    versions,
)
from pyro_vae.splits import Data
from pyro_vae.svi import Mode

if sys.platform != "win32":
    import fcntl

Metrics = dict[str, float]

_TORCHRUN = "torchrun --nproc-per-node"
_WEIGHTS = ("best.safetensors", "last.safetensors")
_PART = "*.????????.part"  # of `checkpoints.write`, where it was stopped


class Stopped(SystemExit):
    """A run was asked to end, by SIGTERM; the message says how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


@dataclass
class Standing:
    """The numbers that training goes on from, besides tensors and random generators.

    Attributes:
        planned: Epochs that the run began with, by which its warm-up is reckoned.
        mode: How the programs run.
        epoch: The epoch under way.
        batch: Batches of it that are done.
        step: Batches of all epochs that are done.
        loss: Sum of the losses of the epoch, over its data that were `seen`.
        seen: Data of the epoch that a step was taken for.
        weight: Sum of the KL's weights over the data of the epoch.
        skipped: Steps of the epoch that were left out.
        seconds: Time that the epoch has taken.
        best_elbo: The best bound on the validation split so far.
        best_epoch: The epoch that had it.
        rows: The metrics of the epochs that are done.
    """

    planned: int
    mode: Mode
    epoch: int = 1
    batch: int = 0
    step: int = 0
    loss: Any = 0.0
    seen: int = 0
    weight: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    best_elbo: float = -math.inf
    best_epoch: int = 0
    rows: list[Metrics] = field(default_factory=list)

    @property
    def skips(self) -> int:
        """Steps of all epochs that were left out."""
        return self.skipped + int(sum(row.get("skipped", 0) for row in self.rows))

    def count(self, weight: float) -> None:
        """Add a batch that is done, whether or not a step was taken for it."""
        self.step, self.batch, self.weight = self.step + 1, self.batch + 1, self.weight + weight

    def close(self, row: Metrics) -> None:
        """Add an epoch that is done, and begin the next one."""
        self.rows.append(row)
        self.epoch, self.batch, self.seen, self.skipped = self.epoch + 1, 0, 0, 0
        self.loss, self.weight, self.seconds = 0.0, 0.0, 0.0


class Progress:
    """Training as it goes on: its best weights and, in a run's folder, all it takes to resume.

    Within ``with``, rows are written to ``metrics.jsonl`` (and for TensorBoard, where that is
    installed), weights to ``best.safetensors`` and, at the end, ``last.safetensors``, and
    checkpoints to ``checkpoints``, named by their step: at the beginning, after the first step,
    every so many seconds, at the end, and where SIGINT or SIGTERM asks to stop. Without a folder
    only the best weights are kept, in memory. At the end without an error the pair has its best
    weights.

    A checkpoint has weights, buffers, optimiser, schedule, objective, the best weights, every
    random generator under the rank of its process, and a `Standing`. Of several processes the
    first alone reads and writes, and what each does not have it is sent.

    Args:
        pair: What is trained.
        optimizer: Its optimiser, new.
        schedule: The optimiser's schedule, new.
        objective: The objective, whose numbers and tensors may change in training.
        generator: The source of the order of data.
        now: Where training begins.
        settings: What must be the same in a run that is gone on with.
        epochs: Epochs after which training is over.
        run: Folder of the run.
        resume: Whether to go on with the run in that folder; without one it begins.
        interval: Seconds between checkpoints.
        ranks: The processes that train together.
    """

    def __init__(
        self,
        pair: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        objective: ELBO,
        generator: torch.Generator,
        *,
        now: Standing,
        settings: Mapping[str, Any],
        epochs: int,
        run: str | Path | None,
        resume: bool,
        interval: float,
        ranks: Ranks,
    ) -> None:
        self.pair, self.optimizer, self.schedule, self.objective = (
            pair, optimizer, schedule, objective,
        )  # fmt: skip
        self.generator, self.now, self.settings, self.epochs = generator, now, settings, epochs
        self.folder, self.resume, self.interval = Path(run) if run else None, resume, interval
        self.ranks, self.device = ranks, generator.device
        self.best: dict[str, Tensor] = {}
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._order = generator.get_state()
        self._began = self._saved = -math.inf
        self._closing = contextlib.ExitStack()
        self._write: Callable[[Metrics], None] = lambda row: None

    @property
    def due(self) -> bool:
        """Whether it is time to `pause`, which all processes then do together."""
        overdue = self.ranks.first and time.monotonic() - self._saved >= self.interval
        return self.folder is not None and (self.signal is not None or overdue)

    def batches(self, data: Data, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Return the batches of the epoch that are not done yet, in its order."""
        self._order = self.generator.get_state()
        self._began = time.perf_counter() - self.now.seconds
        yield from data.train.stored(size, self.generator, shuffle=True, skip=self.now.batch)

    @property
    def seconds(self) -> float:
        """Time that the epoch has taken, in whatever processes."""
        return time.perf_counter() - self._began

    def pause(self) -> None:
        """Write a checkpoint, and stop where a signal asked for it.

        Raises:
            KeyboardInterrupt: It was SIGINT.
            Stopped: It was SIGTERM.
            OSError: The folder cannot be written to; earlier checkpoints stay.
            TypeError: The optimiser or the schedule has a state that a file cannot have.
        """
        self.now.seconds = self.seconds
        self._save()
        self._stop()

    def offer(self, row: Metrics) -> None:
        """Keep the pair's weights where the row has a better bound than any before.

        Raises:
            FloatingPointError: The bound is NaN.
        """
        elbo = row.get("elbo", math.inf)
        if math.isnan(elbo):
            raise FloatingPointError(
                f"the bound on the validation data is NaN in epoch {row['epoch']:.0f}; a smaller "
                f"learning rate or clipping usually helps"
            )
        if not self.best or elbo > self.now.best_elbo or elbo == math.inf:
            self.now.best_elbo, self.now.best_epoch = elbo, int(row["epoch"])
            self.best = {key: value.clone() for key, value in self.pair.state_dict().items()}
            if self.folder and self.ranks.first:
                checkpoints.save(self.pair, self.folder / "best.safetensors")

    def close(self, row: Metrics) -> None:
        """Add an epoch that is done, and begin the next one."""
        self._write(row)
        self.now.close(row)

    def __enter__(self) -> Progress:
        with contextlib.ExitStack() as stack:
            if self.folder:
                self._open(self.folder, stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None
        with self._closing:
            if self.folder:
                # Where a disk is full, that it is so is said once, by the first to notice.
                with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                    if self.ranks.first:
                        checkpoints.save(self.pair, self.folder / "last.safetensors")
                    if not failed:
                        self._save()
            if self.best and not failed:
                self.pair.load_state_dict(self.best)
        if not failed:
            self._stop()

    def _open(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Take possession of the folder, and go on with what is in it."""
        states, found = folder / "checkpoints", None
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            before = sorted(states.glob("*.safetensors"))
            held = before + [path for path in map(folder.joinpath, _WEIGHTS) if path.exists()]
            begun = (folder / "metrics.jsonl").exists() or (self.resume and before)
            if held and not begun:
                raise FileExistsError(
                    f"'{folder}' holds weights or checkpoints, {held[0].name} for one; choose "
                    f"another folder, so that nothing is lost"
                )
            file = stack.enter_context(_claimed(folder, self.resume))
            for leftover in (*folder.glob(_PART), *states.glob(_PART)):
                leftover.unlink()
            found = checkpoints.newest(states) if self.resume else None
            if found is None and file.read(1):
                raise ValueError(
                    f"'{folder}' has no checkpoint to go on from; train anew in another folder, "
                    f"from the command line by --config {folder / 'config.yaml'}"
                )
        if found := self._sent(found):
            self._restore(found)
        if not self.ranks.first:
            self._save()
            self._listen(stack)
            return
        if self.best:
            checkpoints.save_state(self.best, folder / "best.safetensors")
        states.mkdir(exist_ok=True)
        try:
            self._save()
        except BaseException:
            if found is None:
                file.close()
                for path in (states / f"{self.now.step:09}.safetensors", folder / "metrics.jsonl"):
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # where it is not empty
                    states.rmdir()
            raise
        self._saved = -math.inf  # the optimiser has its state from the first step on
        self._write = stack.enter_context(_rows(file, folder, self.now))
        self._listen(stack)

    def _sent(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the first process has found, in all of them."""
        if self.ranks.size == 1:
            return state
        raw = self.ranks.send(checkpoints.encode(state) if state else b"")
        return checkpoints.decode(raw) if raw else None

    def _listen(self, stack: contextlib.ExitStack) -> None:
        """Let SIGINT and SIGTERM be heeded at the end of the step."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # as a shell ignores SIGINT in a job
                self._handlers[number] = before
                stack.callback(signal.signal, number, before)
                signal.signal(number, self._heed)

    def _heed(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._handlers[number])  # the second time it is not waited for

    def _stop(self) -> None:
        number = max(self.ranks.collect(bytes([self.signal or 0])))[0]
        if not number:
            return
        way = f"fit(..., run='{self.folder}', resume=True)"
        if self.folder and (self.folder / "config.yaml").exists():
            count = self.ranks.size
            program = "pyro-vae" if count == 1 else f"{_TORCHRUN} {count} -m pyro_vae"
            options = f"{self.folder}{checkpoints.allowing(self.folder)}"
            way = f"`{program} train --resume {options}`, in Python by {way}"
        said = f"stopped after step {self.now.step}; go on by {way}"
        raise Stopped(said) if number == signal.SIGTERM else KeyboardInterrupt(said)

    def _save(self) -> None:
        assert self.folder is not None
        state = self._state()
        if not self.ranks.first:
            return
        try:
            checkpoints.keep(self.folder / "checkpoints", self.now.step, state)
        except TypeError as error:
            raise TypeError(
                f"this run could not be resumed: {error}; choose another optimizer, schedule or "
                f"objective, in Python leave out `run`"
            ) from error
        self._saved = time.monotonic()

    def _state(self) -> dict[str, Any]:
        known = {id(each) for each in self.pair.parameters()}
        if any(id(p) not in known for g in self.optimizer.param_groups for p in g["params"]):
            raise TypeError("a parameter in Pyro's param store is none of the pair's own")
        order = self._order if self.now.batch else self.generator.get_state()
        return {
            "epochs": self.epochs,
            "settings": dict(self.settings),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "now": vars(self.now),
            "weights": {name: each.detach() for name, each in tensors(self.pair).items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "objective": numbers(self.objective),
            "generators": self._collected({"order": order, **generators(self.device)}),
        }

    def _collected(self, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The states of the generators of every process, by its rank."""
        if self.ranks.size == 1:
            return {"0": own}
        raw = self.ranks.collect(checkpoints.encode({"format": checkpoints.FORMAT, **own}))
        return {str(rank): checkpoints.decode(each) for rank, each in enumerate(raw)}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is that of another run, or on another device.
        """
        amiss = (LookupError, TypeError, AttributeError, RuntimeError)
        words = f"'{self.folder}' has a checkpoint of another run"
        try:
            self._check(state)
        except amiss as error:
            raise ValueError(f"{words}: {error!r}") from error
        try:
            self._take(state)
        except (ValueError, *amiss) as error:
            raise ValueError(f"{words}: {error!r}") from error

    def _take(self, state: Mapping[str, Any]) -> None:
        now = Standing(**state["now"])
        with torch.no_grad():
            for name, each in tensors(self.pair).items():
                each.copy_(state["weights"][name])
        groups = [_keys(each) for each in self.optimizer.state_dict()["param_groups"]]
        if groups != [_keys(each) for each in state["optimizer"]["param_groups"]]:
            raise ValueError("the options of its optimizer are others")
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        if self.schedule:
            if _keys(self.schedule.state_dict()) != _keys(state["schedule"]):
                raise ValueError("its schedule is another one")
            self.schedule.load_state_dict(state["schedule"])
        set_numbers(self.objective, state["objective"])
        self.best = {key: value.to(self.device) for key, value in state["best"].items()}
        if isinstance(now.loss, Tensor):
            now.loss = now.loss.to(self.device)
        vars(self.now).update(vars(now))
        own = state["generators"][str(self.ranks.rank)]
        self._order = own["order"]
        self.generator.set_state(self._order)
        set_generators(own, self.device)

    def _check(self, state: Mapping[str, Any]) -> None:
        """Refuse what would not be the same run, and say what cannot be exactly the same."""
        # What earlier versions do not name.
        added = {key: self.settings[key] for key in ("parts", "view")}
        began = {"processes": 1, **added, **state["settings"]}
        for key, new in self.settings.items():
            if new is None and key == "mode":  # that which the run has
                continue
            where, was, is_now = _apart(key, began.get(key), new)
            if was != is_now and key == "processes":
                raise ValueError(
                    f"'{self.folder}' began with {was} process{'es' * (was > 1)} and cannot go on "
                    f"with {is_now}, whose random numbers and batches are others; "
                    f"{_TORCHRUN} says how many"
                )
            if was != is_now:
                hidden = where in ("data", "view", "weights", "parts")
                shown = "" if hidden else f": it was {was} and is {is_now}"
                raise ValueError(
                    f"'{self.folder}' cannot go on with other {where}{shown}; only epochs, "
                    f"checkpoint and skip_nonfinite may change"
                )
        if state["device"] != self.device.type:
            raise ValueError(
                f"'{self.folder}' was trained on {state['device']} and cannot go on on "
                f"{self.device.type}, whose random numbers are others"
            )
        if self.epochs < len(state["now"]["rows"]):
            raise ValueError(
                f"'{self.folder}' has {len(state['now']['rows'])} epochs, more than {self.epochs}"
            )
        now = {**versions(), "threads": torch.get_num_threads()}
        before = {**state["versions"], "threads": state["threads"]}
        changed = [f"{key} {before.get(key)}" for key in now if now[key] != before.get(key)]
        if changed:
            warnings.warn(
                f"'{self.folder}' began under {', '.join(changed)}, which is another now: it goes "
                f"on, though not to the last digit as it would have done",
                stacklevel=5,
            )


def _apart(where: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first place, and the two values in it, in which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        pairs = [(key, old[key], new[key]) for key in old]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(index, *both) for index, both in enumerate(zip(old, new, strict=True))]
    else:
        return where, old, new
    for key, first, second in pairs:
        if first != second and not (first != first and second != second):
            return _apart(f"{where}.{key}", first, second)
    return where, None, None


def _keys(values: Any) -> list[str]:
    return sorted(map(str, values))


@contextlib.contextmanager
def _claimed(folder: Path, resume: bool) -> Iterator[TextIO]:
    """The file of a run's metrics, which one process has at a time, to append to."""
    path = folder / "metrics.jsonl"
    try:
        file = path.open("a+" if resume else "x+")
    except FileExistsError as error:
        raise FileExistsError(
            f"'{folder}' holds another run; choose another folder, or go on with it by --resume, "
            f"in Python resume=True"
        ) from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process
            except BlockingIOError as error:
                raise FileExistsError(
                    f"another process trains in '{folder}'; let it end, or choose another folder"
                ) from error
            except OSError:  # of a file system that has no locks
                pass
        file.seek(0)
        yield file


@contextlib.contextmanager
def _rows(file: TextIO, folder: Path, now: Standing) -> Iterator[Callable[[Metrics], None]]:
    """Write rows, after those that are done, and for TensorBoard where that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        board = None
    else:
        board = SummaryWriter(str(folder), purge_step=now.epoch if now.rows else None)
    file.truncate(0)
    file.writelines(json.dumps(row) + "\n" for row in now.rows)
    file.flush()

    def write(row: Metrics) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()
        if board:
            for key, value in row.items():
                board.add_scalar(key, value, int(row["epoch"]))

    try:
        yield write
    finally:
        if board:
            board.close()
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
