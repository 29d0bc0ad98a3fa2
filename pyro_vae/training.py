"""Training: one loop from data to metrics, for any model/guide pair."""

from __future__ import annotations

__all__ = ["fit"]

import contextlib
import json
import math
import sys
import time
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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from pyro_vae import checkpoints
from pyro_vae.evaluation import bound
from pyro_vae.objectives import BetaELBO
from pyro_vae.optimizers import optimizer_of
from pyro_vae.pairs import check_objective, check_pair
from pyro_vae.scoring import validation
from pyro_vae.splits import Data, Split
from pyro_vae.svi import CompiledSVI, Mode, mode_for

Metrics = dict[str, float]
ADAM = partial(torch.optim.Adam, lr=1e-3)


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
    mean.

    Args:
        pair: An `nn.Module` with methods ``model`` and ``guide``, such as a `VAE`.
        data: Its splits are moved whole to the pair's device.
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
        run: Folder to write metrics and weights to, which `pyro_vae.restore` reads.
        progress: Whether to show a bar.

    Raises:
        TypeError: An argument of another kind.
        ValueError: Settings or data that do not fit, found before the first step.
        FileExistsError: The folder holds another run.
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
    _check_settings(len(data.train), epochs, batch_size, warmup, clip, patience)
    if patience and not len(data.validation):
        raise ValueError("patience needs a validation split, whose bound it watches")
    parameters = [each for each in pair.parameters() if each.requires_grad]
    if not parameters:
        raise ValueError("there is nothing to train: every parameter is frozen")
    device = parameters[0].device
    data = data.map(lambda part: part.to(device))
    generator = torch.Generator(device).manual_seed(seed)
    for part in data.splits[:2]:
        for batch in _fixed(part):
            check_pair(pair, *batch)
    objective = objective or Trace_ELBO(max_plate_nesting=1)
    check_objective(objective, pair, *next(_fixed(data.train[:2])))

    annealed = BetaELBO(elbo=objective)
    annealed.weight = annealed.weight.to(device)
    optim = optimizer_of(optimizer, parameters)
    scheduler = schedule(optim) if schedule else None
    budget = epochs * math.ceil(len(data.train) / batch_size)
    svi = CompiledSVI(
        pair.model,
        pair.guide,
        lambda _: optim,
        _Stored(annealed if warmup else objective, data.train),
        mode=mode or mode_for(budget),
    )
    step, rows, best = 0, list[Metrics](), _Best(pair, run)
    with _bar(epochs * len(data.train), progress) as bar, _log(run) as log, best, _quiet():
        for epoch in range(1, epochs + 1):
            pair.train()
            weights, began = 0.0, time.perf_counter()
            watch = _Watch(parameters, waits=device.type != "cpu")
            for x, *context in data.train.stored(batch_size, generator, shuffle=True):
                weight = min(step / (warmup * budget), 1.0) if warmup else 1.0
                annealed.weight.fill_(weight)
                loss = svi.loss_and_grads(x, *context)
                norm = nn.utils.clip_grad_norm_(parameters, clip) if clip < math.inf else None
                if not watch.passes(loss, norm):
                    batch = data.train.scored(x), *context
                    raise watch.failed(_diagnosis(pair, batch, epoch, step + 1))
                optim.step()
                step, weights = step + 1, weights + weight * len(x)
                bar.update(len(x))
            if not watch.passed():
                raise watch.failed(_diagnosis(pair, data.train[:batch_size].batch(), epoch))
            row: Metrics = {
                "epoch": epoch,
                "samples": epoch * len(data.train),
                "loss": float(watch.total) / len(data.train),
                "weight": weights / len(data.train),
                "learning_rate": optim.param_groups[0]["lr"],
                "images_per_second": len(data.train) / (time.perf_counter() - began),
            }
            if len(data.validation):
                pair.eval()
                row |= bound(pair, _fixed(data.validation)).summary()
            rows.append(row)
            log(row)
            bar.set_postfix(
                {key: f"{row[key]:.2f}" for key in ("loss", "elbo") if key in row}, refresh=False
            )
            best.offer(row)
            if scheduler:
                scheduler.step()
            if patience and epoch - max(best.epoch, math.ceil(warmup * epochs)) >= patience:
                break
    pair.eval()
    return rows


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
    """The losses of an epoch, and whether they and the gradients were finite.

    The norm of gradients takes a tenth of a step, so that where none is asked for, a gradient
    that is no number shows in the next loss, or in the parameters when the epoch is over. A device
    that works behind the program's back is not asked before that either.
    """

    def __init__(self, parameters: Sequence[Tensor], *, waits: bool) -> None:
        self.parameters, self.waits = parameters, waits
        self.before = [each.detach().clone() for each in parameters]
        self.total: Any = 0.0
        self.finite: Any = True

    def passes(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Add a loss; whether to go on."""
        self.total = self.total + loss
        finite = loss.isfinite() if norm is None else loss.isfinite() & norm.isfinite()
        if not self.waits:
            return bool(finite)
        self.finite = finite & self.finite
        return True

    def passed(self) -> bool:
        """Whether all was finite."""
        return bool(self.finite) and self._sound()

    def failed(self, reason: str) -> FloatingPointError:
        """Put parameters that are no numbers back where they were, and return the error."""
        if not self._sound():
            with torch.no_grad():
                for each, value in zip(self.parameters, self.before, strict=True):
                    each.copy_(value)
        return FloatingPointError(reason)

    def _sound(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.parameters)


class _Best:
    """The weights of the best epoch so far; puts them back when training ends well."""

    def __init__(self, pair: nn.Module, run: str | Path | None) -> None:
        self.pair, self.run = pair, Path(run) if run else None
        self.elbo, self.epoch = -math.inf, 0
        self.weights: dict[str, Tensor] = {}

    def offer(self, row: Metrics) -> None:
        """Keep the pair's weights where the row has a better bound than any before."""
        elbo = row.get("elbo", math.inf)
        if math.isnan(elbo):
            raise FloatingPointError(
                f"the bound on the validation data is NaN in epoch {row['epoch']:.0f}; a smaller "
                f"learning rate or clipping usually helps"
            )
        if not self.weights or elbo > self.elbo or elbo == math.inf:
            self.elbo, self.epoch = elbo, int(row["epoch"])
            self.weights = {key: value.clone() for key, value in self.pair.state_dict().items()}
            if self.run:
                checkpoints.save(self.pair, self.run / "best.safetensors")

    def __enter__(self) -> _Best:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.run:
            checkpoints.save(self.pair, self.run / "last.safetensors")
        if kind is None:
            self.pair.load_state_dict(self.weights)


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


def _check_settings(
    rows: int, epochs: int, batch_size: int, warmup: float, clip: float, patience: int | None
) -> None:
    if epochs < 1:
        raise ValueError(f"training takes at least 1 epoch, not {epochs}")
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"a batch size of {batch_size} does not fit the {rows} training data; give 1 to {rows}"
        )
    if not 0 <= warmup < 1:
        raise ValueError(f"the warm-up is a fraction of the budget, 0 to below 1, not {warmup}")
    if not clip > 0:
        raise ValueError(f"gradients are clipped to a norm above 0, not {clip}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is at least 1 epoch, not {patience}")


def _fixed(part: Split) -> Iterator[tuple[Tensor, ...]]:
    """Batches for evaluation: in order, and binarised alike each time."""
    return part.batches(8192, torch.Generator(part.x.device).manual_seed(0))


def _diagnosis(pair: Any, batch: tuple[Tensor, ...], epoch: int, step: int | None = None) -> str:
    """One sentence on where a non-finite loss or gradient comes from."""
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(*batch)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    culprit = "the objective"
    for name, parameter in reversed(list(pair.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            culprit = f"the gradient of '{name}'"
    for program, trace in (("model", model), ("guide", guide)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["log_prob"].isfinite().all():
                culprit = f"the log-density of site '{name}' in the {program}"
    place = f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}"
    return (
        f"the loss or a gradient is NaN or infinite in {place}, first in {culprit}; a smaller "
        f"learning rate, clipping, warm-up or a larger floor of the scales usually helps"
    )


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[tqdm[Any]]:
    """A bar in images, redrawn seldom where it goes to a file."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, unit="img", unit_scale=True, mininterval=pace, disable=not shown, leave=True
    ) as bar:
        yield bar


@contextlib.contextmanager
def _log(run: str | Path | None) -> Iterator[Callable[[Metrics], None]]:
    """Write rows to ``metrics.jsonl`` and, where it is installed, to TensorBoard."""
    if run is None:
        yield lambda row: None
        return
    Path(run).mkdir(parents=True, exist_ok=True)
    if (Path(run) / "metrics.jsonl").exists():
        raise FileExistsError(f"'{run}' holds another run; choose another folder")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        board = None
    else:
        board = SummaryWriter(str(run))
    with (Path(run) / "metrics.jsonl").open("x") as file:

        def log(row: Metrics) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if board:
                for key, value in row.items():
                    board.add_scalar(key, value, int(row["epoch"]))

        try:
            yield log
        finally:
            if board:
                board.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the validation that `check_pair` has done, and Pyro's warning of what is raised."""
    with validation(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        yield
