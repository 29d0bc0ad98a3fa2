"""Training: one loop from data to metrics, for any model/guide pair."""

from __future__ import annotations

__all__ = ["check_settings", "fit"]

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from pyro_vae.distributed import Exchange, Ranks, warn_alone
from pyro_vae.evaluation import bound
from pyro_vae.identity import settings
from pyro_vae.mapped import Mapped
from pyro_vae.objectives import BetaELBO
from pyro_vae.optimizers import optimizer_of, update
from pyro_vae.pairs import check_objective, check_pair
from pyro_vae.parts import check_step
from pyro_vae.progress import Metrics, Progress, Standing
from pyro_vae.scoring import validation, whole
from pyro_vae.splits import Data, Split
from pyro_vae.svi import CompiledSVI, Mode, check_mode, mode_for

ADAM = partial(torch.optim.Adam, lr=1e-3)
# Of rows on disk, those that are held against the pair before the first step: no value of the
# others is NaN or infinite, which loading them has found out.
_CHECKED = 100_000


def fit(
    pair: Any,
    data: Data,
    *,
    objective: ELBO | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAM,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    warmup: float = 0.1,
    clip: float = math.inf,
    patience: int | None = None,
    seed: int = 0,
    mode: Mode | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    checkpoint: float = 5.0,
    skip_nonfinite: int = 0,
    progress: bool = True,
) -> list[Metrics]:
    """Train a pair by stochastic variational inference, and return the metrics of each epoch.

    Each step ascends the objective summed over its batch, so clipping and the step sizes of
    plain SGD depend on the batch size. After the last epoch the pair has its best weights
    by the bound on the validation split, or its last ones where that split is empty, and is
    in evaluation mode. Without warm-up the steps are those of `pyro.infer.SVI`. Data stay as they
    are stored, and are scaled and binarised as a part of the step.

    Every row of the metrics has ``epoch``, ``samples`` (training data seen), ``loss`` (what
    was optimised, per datum), ``weight`` (of the KL in the warm-up, the epoch's mean; while
    it is below 1, minus the loss is no lower bound), ``learning_rate``,
    ``images_per_second`` and, in nats per datum on the validation split at weight 1,
    ``elbo`` with its halves ``reconstruction`` and ``kl`` and the ``standard_error`` of its
    mean; where steps may be left out, ``skipped``, how many were.

    A run with a folder can be stopped and gone on with: on one processor, under the same versions
    and number of threads, its weights are bit for bit those of a run that never was. Give the
    same arguments and ``resume``; more `epochs` are allowed, while the warm-up keeps its
    length. SIGINT (Ctrl-C) and SIGTERM end the step that is under way and leave a checkpoint,
    SIGKILL loses what came after the last one. What programs keep in attributes that are no
    parameters or buffers, and generators of their own, are not kept.

    Args:
        pair: An `nn.Module` with methods ``model`` and ``guide``, such as a `VAE`.
        data: Its splits are moved to the pair's device, batch by batch where rows are on disk, of
            which 100,000 are held against the pair's support before the first step.
        objective: A member of Pyro's ELBO family; `pyro.infer.Trace_ELBO` by default.
        optimizer: From parameters to a torch optimiser.
        schedule: From the optimiser to its learning-rate schedule, advanced each epoch.
        epochs: Passes over the training split.
        batch_size: Data in a step; the last batch of an epoch may be smaller.
        warmup: Fraction of all steps over which the weight of the KL rises from 0 to 1.
        clip: Greatest Euclidean norm of all gradients together.
        patience: Stop after so many epochs, counted from the end of the warm-up, without a
            better bound on the validation split.
        seed: Seed of the order; z and the binarisation are drawn from torch's own generator.
        mode: How the programs run, as for `CompiledSVI`; by default what is soonest done with so
            many steps, which is eager for few hundreds and compiled from ten thousand on.
        run: Folder to write metrics, checkpoints and weights to; `pyro_vae.restore` reads these
            into a pair that was made alike, by ``restore(pair, "RUN/best.safetensors")``.
        resume: Whether to go on with the run in that folder; where there is none, one begins.
        checkpoint: Minutes between checkpoints, 0 for one after each step. The newest two are
            kept.
        skip_nonfinite: Greatest number of steps to leave out, in the whole run, since their loss
            or a gradient is NaN or infinite: weights, buffers and optimiser stay as they were.
            Every gradient is then looked at, which costs a tenth of a step.
        progress: Whether to show a bar.

    Raises:
        TypeError: An argument of another kind, or an optimiser or a schedule whose state is
            neither tensors nor plain values, so that a run could not be resumed.
        ValueError: Settings or data that do not fit, found before the first step; a run that
            was begun otherwise, or whose checkpoints are damaged.
        FileExistsError: The folder holds another run, or another process trains in it.
        OSError: The folder cannot be written to, or another process of the job has ended.
            Earlier checkpoints stay.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
        SystemExit: SIGTERM, likewise, with exit status 143.
        FloatingPointError: The loss or a gradient is NaN or infinite. The weights are those
            before that step, or before that epoch where the step before it had spoiled them.

    Example:
        >>> from pyro_vae import data
        >>> from pyro_vae.parts import Blueprint
        >>> digits = data.load("digits", view=data.dynamic)
        >>> vae = Blueprint(digits.shape, latent=2).build()
        >>> rows = fit(vae, digits, epochs=2, progress=False)
        >>> [row["samples"] for row in rows]
        [1437, 2874]
    """
    _check_kinds(data, objective, optimizer)
    check_settings(epochs, batch_size, warmup, clip, patience, checkpoint, skip_nonfinite)
    check_mode(mode)
    ranks = Ranks.here()
    warn_alone()
    _check_room(len(data.train) // ranks.size, batch_size)
    if resume and run is None:
        raise ValueError("there is no run to resume; give its folder as `run`")
    if patience and not len(data.validation):
        raise ValueError("patience needs a validation split, whose bound it watches")
    parameters = [each for each in pair.parameters() if each.requires_grad]
    if not parameters:
        raise ValueError("there is nothing to train: every parameter is frozen")
    device = parameters[0].device
    ranks.align(pair)
    given, data = data, ranks.shard(data).map(lambda part: part.to(device))
    generator = torch.Generator(device).manual_seed(seed)
    for part in data.splits[:2]:
        for batch in _fixed(part[:_CHECKED] if isinstance(part.x, Mapped) else part):
            check_pair(pair, *batch)
    objective = objective or Trace_ELBO(max_plate_nesting=1)
    check_objective(objective, pair, *next(_fixed(data.train[:2])))

    annealed = BetaELBO(elbo=objective)
    annealed.weight = annealed.weight.to(device)
    optim = optimizer_of(optimizer, parameters)
    scheduler = schedule(optim) if schedule else None
    check_step(type(optim), "optimizer")
    check_step(type(scheduler), "schedule")
    batches = math.ceil(len(data.train) / batch_size)
    plain = {"batch_size": batch_size, "warmup": warmup, "clip": clip, "patience": patience}
    plain["processes"] = ranks.size
    chosen = settings(pair, given, objective, optim, scheduler, seed=seed, mode=mode, **plain)
    ranks.agree({"epochs": epochs, "skip_nonfinite": skip_nonfinite, **chosen})
    state = Progress(
        pair, optim, scheduler, objective, generator,
        now=Standing(epochs, mode or mode_for(epochs * batches)),
        settings=chosen, epochs=epochs, run=run, resume=resume, interval=60 * checkpoint,
        ranks=ranks,
    )  # fmt: skip
    rows = ranks.size * len(data.train)
    with contextlib.ExitStack() as stack:
        now = stack.enter_context(state).now
        begun = (now.epoch - 1) * rows + ranks.size * min(now.batch * batch_size, len(data.train))
        bar = stack.enter_context(_bar(epochs * rows, begun, progress and ranks.first))
        stack.enter_context(_quiet())
        stored = _Stored(annealed if warmup else objective, data.train)
        # Pair and objective are checked already, and a run that goes on may skip its next step.
        svi = CompiledSVI(
            pair.model, pair.guide, lambda _: optim, stored, mode=now.mode, validate=False
        )
        waits = device.type != "cpu" and not skip_nonfinite
        buffers = list(pair.buffers())
        watch = _Watch(parameters, buffers, waits=waits, keeps=skip_nonfinite > 0)
        exchange = Exchange(ranks, parameters, buffers)
        budget = now.planned * batches  # of which the warm-up is a part, however long it goes on
        for epoch in range(now.epoch, epochs + 1):
            calm = epoch - 1 - max(now.best_epoch, math.ceil(warmup * now.planned))
            if patience and calm >= patience:
                break
            pair.train()
            watch.begin()
            for x, *context in state.batches(data, batch_size):
                weight = 1.0
                if warmup:
                    weight = min(now.step / (warmup * budget), 1.0)
                    annealed.weight.fill_(weight)
                loss = svi.loss_and_grads(x, *context)
                now.mode = svi.mode
                now.count(weight * len(x))
                seen = ranks.size * len(x)
                loss, due = exchange(loss, state.due)
                clipped = clip < math.inf
                norm = (
                    get_total_norm(_gradients(parameters)) if clipped or skip_nonfinite else None
                )
                if watch.passes(loss, norm):
                    if clipped and norm is not None:  # which by now is known to be a number
                        clip_grads_with_norm_(parameters, clip, norm)
                    update(optim)
                    now.loss, now.seen = now.loss + loss, now.seen + seen
                elif now.skips < skip_nonfinite:
                    now.skipped += 1
                    watch.undo()
                else:
                    batch = data.train.scored(x), *context
                    raise watch.failed(_diagnosis(pair, batch, now, exact=True))
                bar.update(seen)
                if due:
                    watch.check(
                        now.loss, lambda: _diagnosis(pair, data.train[:batch_size].batch(), now)
                    )
                    state.pause()
            watch.check(now.loss, lambda: _diagnosis(pair, data.train[:batch_size].batch(), now))
            row: Metrics = {
                "epoch": epoch,
                "samples": epoch * rows,
                "loss": float(now.loss) / now.seen if now.seen else math.nan,
                "weight": now.weight / len(data.train),
                "learning_rate": float(optim.param_groups[0]["lr"]),
                "images_per_second": rows / state.seconds,
            }
            if skip_nonfinite:
                row["skipped"] = now.skipped
            if len(data.validation):
                pair.eval()
                row |= bound(pair, _fixed(data.validation), ranks=ranks).summary()
            state.close(row)
            state.offer(row)
            bar.set_postfix(
                {key: f"{row[key]:.2f}" for key in ("loss", "elbo") if key in row}, refresh=False
            )
            if scheduler:
                scheduler.step()
    pair.eval()
    pair.zero_grad()
    return now.rows


def check_settings(
    epochs: int,
    batch_size: int,
    warmup: float,
    clip: float,
    patience: int | None,
    checkpoint: float,
    skip_nonfinite: int,
) -> None:
    """Refuse settings of `fit` that no data would fit.

    Raises:
        ValueError: One is out of its range.
    """
    whole(epochs=epochs, batch_size=batch_size, skip_nonfinite=skip_nonfinite)
    if epochs < 1:
        raise ValueError(f"training takes at least 1 epoch, not {epochs}")
    if batch_size < 1:
        raise ValueError(f"a batch has at least 1 datum, not {batch_size}")
    if not 0 <= warmup < 1:
        raise ValueError(f"the warm-up is a fraction of the budget, 0 to below 1, not {warmup}")
    if not clip > 0:
        raise ValueError(f"gradients are clipped to a norm above 0, not {clip}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is at least 1 epoch, not {patience}")
    if not checkpoint >= 0:
        raise ValueError(f"the minutes between checkpoints are 0 or more, not {checkpoint}")
    if skip_nonfinite < 0:
        raise ValueError(f"the steps that may be left out are 0 or more, not {skip_nonfinite}")


class _Stored(ELBO):
    """An objective of data as they are stored, which it turns into what is scored."""

    def __init__(self, elbo: ELBO, split: Split) -> None:
        super().__init__(max_plate_nesting=elbo.max_plate_nesting)
        self.elbo, self.scored = elbo, split[:0].scored

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        x, *context = args
        return self.elbo._get_trace(model, guide, (self.scored(x), *context), kwargs)

    def loss(self, model: Any, guide: Any, x: Tensor, *context: Tensor) -> Any:
        return self.elbo.loss(model, guide, self.scored(x), *context)

    def loss_and_grads(self, model: Any, guide: Any, x: Tensor, *context: Tensor) -> Any:
        return self.elbo.loss_and_grads(model, guide, self.scored(x), *context)


class _Watch:
    """Whether losses and gradients are finite, and what is put back where they are not.

    The norm of gradients takes a tenth of a step, so that where none is asked for, a gradient
    that is no number shows in the next loss, or in the parameters when the epoch is over. A device
    that works behind the program's back is not asked before that either.

    Args:
        parameters: What is trained.
        buffers: What else a step changes.
        waits: Whether to ask only at a `check`.
        keeps: Whether to `undo` is asked for.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        *,
        waits: bool,
        keeps: bool = False,
    ) -> None:
        self.parameters, self.buffers, self.waits, self.keeps = parameters, buffers, waits, keeps
        self.kept = [each.clone() for each in buffers]
        self.begin()

    def begin(self) -> None:
        """Begin an epoch, to whose parameters to go back."""
        self.before = [each.detach().clone() for each in (*self.parameters, *self.buffers)]
        self.norms: Tensor | float = 0.0

    def passes(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Whether to take the step."""
        if self.waits:
            self.norms = self.norms if norm is None else self.norms + norm
            return True
        passed = all(math.isfinite(float(each)) for each in (loss, norm) if each is not None)
        if passed and self.keeps:
            _put(self.buffers, self.kept)
        return passed

    def undo(self) -> None:
        """Put back what the loss of a step that is left out has changed."""
        _put(self.kept, self.buffers)

    def check(self, total: Tensor | float, diagnosis: Callable[[], str]) -> None:
        """Raise the diagnosis unless the sum of all losses is finite, and so all of them were."""
        sums = float(total), float(self.norms)
        if not (all(map(math.isfinite, sums)) and self._sound()):
            raise self.failed(diagnosis())

    def failed(self, reason: str) -> FloatingPointError:
        """Put back what is no number where it was, and return the error."""
        count = len(self.parameters)
        if self.keeps:
            self.undo()
        if not self._sound():
            _put(self.before[:count], self.parameters)
        for value, each in zip(self.before[count:], self.buffers, strict=True):
            if not each.isfinite().all() and value.isfinite().all():
                _put([value], [each])
        return FloatingPointError(reason)

    def _sound(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.parameters)


@torch.no_grad()
def _put(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]


def _check_kinds(data: Any, objective: Any, optimizer: Any) -> None:
    if not isinstance(data, Data):
        raise TypeError(
            f"fit takes data in splits, as from data.load or data.split, not a "
            f"{type(data).__name__}"
        )
    if not (objective is None or isinstance(objective, ELBO)):
        raise TypeError(f"the objective must be an ELBO, such as Trace_ELBO(), not {objective!r}")
    if isinstance(optimizer, (Optimizer, PyroOptim)) or not callable(optimizer):
        raise TypeError(
            "the optimizer must be a function of the parameters, such as "
            "partial(torch.optim.Adam, lr=1e-3)"
        )


def _check_room(rows: int, batch_size: int) -> None:
    if batch_size > rows:
        raise ValueError(
            f"a batch size of {batch_size} does not fit the {rows} training data; give 1 to {rows}"
        )


def _fixed(part: Split) -> Iterator[tuple[Tensor, ...]]:
    """Batches for evaluation: in order, and binarised alike each time; less of large rows."""
    size = max(min(2**23 // max(part.x.shape[1:].numel(), 1), 8192), 1)
    return part.batches(size, torch.Generator(part.x.device).manual_seed(0))


def _diagnosis(pair: Any, batch: tuple[Tensor, ...], now: Standing, *, exact: bool = False) -> str:
    """One sentence on where a non-finite loss or gradient comes from."""
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(*batch)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    culprits = list[str]()
    for program, trace in (("guide", guide), ("model", model)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["log_prob"].isfinite().all():
                culprits = [f"the log-density of site '{name}' in the {program}"]
    for name, parameter in pair.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            culprits.append(f"the gradient of '{name}'")
            break
    place = f"epoch {now.epoch}, step {now.step}" if exact else f"epoch {now.epoch}"
    many = f", after {now.skips} that were left out" if now.skips else ""
    return (
        f"the loss or a gradient is NaN or infinite in {place}{many}, first in "
        f"{' and in '.join(culprits) or 'the objective'}; a smaller learning rate, clipping, "
        f"warm-up or a larger floor of the scales usually helps"
        f"{'' if many else ', and skip_nonfinite leaves out single steps'}"
    )


@contextlib.contextmanager
def _bar(total: int, begun: int, shown: bool) -> Iterator[tqdm[Any]]:
    """A bar in images, whose rate is of those from now on, redrawn seldom where it is a file."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=begun, unit="img", unit_scale=True, mininterval=pace,
        disable=not shown,
    ) as bar:  # fmt: skip
        yield bar


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the validation that `check_pair` has done, and Pyro's warning of what is raised."""
    with validation(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        yield
