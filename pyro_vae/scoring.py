"""Scoring: draws of a pair's latents, and the log-densities of each datum at them."""

from __future__ import annotations

__all__ = [
    "Batch",
    "Pair",
    "Programs",
    "Rows",
    "at_a_time",
    "batches",
    "check_plate",
    "check_sites",
    "checked",
    "joined",
    "validation",
    "whole",
    "worded",
]

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, Protocol, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, constraints
from typing_extensions import override

from pyro_vae.importance import (
    Site,
    Spread,
    data_dim,
    each_datum,
    latents,
    observations,
    unscaled,
)
from pyro_vae.splits import Data, Split

Batch = tuple[Tensor, ...]
Rows = Split | Tensor | Batch | Iterable[Batch | Tensor]

_ROWS = 1000  # of a split that become floating-point numbers at a time
_ELEMENTS = 2**21  # of x that are decoded at a time: 8 MiB, which a processor's cache holds
# glibc gives memory back to the system where a block of some MiB is freed, and has every page of
# the next one faulted in, a fifth of the time here, until it has freed a block as large as this.
_FREED = 31 * 2**20


class Pair(Protocol):
    """A Pyro model and guide over a batch ``(x, *context)``, as methods of one module."""

    def model(self, *batch: Any) -> Any:
        """The generative program."""

    def guide(self, *batch: Any) -> Any:
        """The approximate posterior of its latent sites."""


def batches(data: Rows) -> Iterator[Batch]:
    """Cut data into batches ``(x, *context)``.

    Args:
        data: A split, a tensor ``(N, *shape)``, one batch, or batches, which may be of x alone.

    Raises:
        TypeError: Data of several splits, or batches that are not of tensors.
        ValueError: There are no data, or a batch has more rows of one tensor than of another.
    """
    if isinstance(data, Data) or not isinstance(data, (Split, Iterable)):
        kind = type(data).__name__
        raise TypeError(
            f"evaluation takes one split, such as data.test, a tensor or batches, not a {kind}"
        )
    if isinstance(data, Tensor):
        data = (data,)
    single = isinstance(data, tuple) and data and isinstance(data[0], Tensor)
    parts = data.batches(_ROWS) if isinstance(data, Split) else [data] if single else data
    empty = True
    for batch in map(_tensors, cast("Iterable[object]", parts)):
        if wrong := [len(each) for each in batch[1:] if len(each) != len(batch[0])]:
            raise ValueError(
                f"x has {len(batch[0])} rows and its context {wrong[0]}: give a row of context, "
                f"such as a label, for each datum"
            )
        if len(batch[0]):
            empty = False
            yield batch
    if empty:
        raise ValueError("there are no data to evaluate")


def _tensors(batch: object) -> Batch:
    """A batch as the tuple of its tensors."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    for each in parts or (batch,):
        if not isinstance(each, Tensor) or not each.dim():
            kind = "tensor of one number" if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(
                f"a batch is a tensor or a tuple (x, *context) of tensors, with a row for each "
                f"datum, and here is a {kind}"
            )
    return parts


def joined(data: Rows) -> Batch:
    """All data as one batch."""
    data = data.read() if isinstance(data, Split) else data
    return tuple(torch.cat(columns) for columns in zip(*batches(data), strict=True))


def at_a_time(batch: Batch) -> int:
    """How many draws to decode at a time, for data like those of a batch."""
    return max(_ELEMENTS // max(batch[0][0].numel(), 1), 1)


def checked(scores: Tensor) -> Tensor:
    """Return log-densities, or logarithms of their ratios, which may be minus infinity.

    Raises:
        ValueError: One is no number, or infinite as at a pole.
    """
    if scores.isnan().any():
        raise ValueError(
            "log p(x,z) - log q(z|x) is not a number for a draw of z: check the weights of the "
            "networks, and the data for values that are no numbers"
        )
    if (scores == math.inf).any():
        raise ValueError(
            "log p(x,z) - log q(z|x) is infinite for a draw of z: check the weights of the "
            "networks, and the data for values at which the likelihood has a pole"
        )
    return scores


def check_sites(modelled: Trace, guided: Trace) -> None:
    """Refuse latents that only one of two programs has.

    Raises:
        ValueError: There are some, or the model observes nothing.
    """
    latent, drawn = set(modelled.stochastic_nodes), set(guided.stochastic_nodes)
    drawn -= {name for name in drawn if guided.nodes[name]["infer"].get("is_auxiliary")}
    if missing := sorted(latent - drawn):
        raise ValueError(f"the guide draws no site '{missing[0]}', which is latent in the model")
    if extra := sorted(drawn - latent):
        raise ValueError(f"the guide draws a site '{extra[0]}' that is not latent in the model")
    if not modelled.observation_nodes:
        raise ValueError("the model observes no data: none of its sites has obs=x")


def check_plate(site: Site, size: int) -> None:
    """Refuse a site whose plate ``data`` has another size than the batch.

    Raises:
        ValueError: It does, as where the plate draws a subsample by itself.
    """
    for frame in site["cond_indep_stack"]:
        if frame.name == "data" and frame.vectorized and frame.size != size:
            raise ValueError(
                f"the plate 'data' of '{site['name']}' has {frame.size} rows where the batch has "
                f"{size}: let it have len(x) of them, or all that there are and subsample=x"
            )


class Programs:
    """A pair, made ready to draw and to score several latents for each datum.

    Latents outside the plate ``data`` are drawn once, here, under all of the batch. Where
    networks take no leading dimensions, or give another density under them, particles are scored
    one by one.

    Args:
        pair: Module with methods ``model`` and ``guide``.
        batch: A batch ``(x, *context)``, on the first rows of which it is tried.

    Attributes:
        pair: The pair.
        sites: The latents of each datum by name, as the model has them on the batch.
        observed: The observed site of each datum, that named ``x`` where there are several.
        alone: Whether it is the only one.
        ordered: Whether the guide draws the latents of each datum in the model's order.
        vectorized: Whether particles are scored together.
        probe: The first data of the batch.
        shared: ``log p - log q`` of the latents outside the plate, and the log-density of
            what is observed there.

    Raises:
        ValueError: A program cannot run on the batch, draws a latent that the other has not, or
            observes nothing of each datum.
    """

    def __init__(self, pair: Pair, batch: Batch) -> None:
        torch.empty(_FREED, dtype=torch.uint8)
        self.pair = pair
        self._rank, self._shared = 9, Trace()  # more than plates nest, until that is known
        self.probe = rows = tuple(tensor[:3] for tensor in batch)
        with torch.no_grad():
            self._check(*(traces := self._scored_both(rows)))
            outside = any(data_dim(site) is None for each in traces for site in _samples(each))
            self._keep(*self._scored_both(batch) if outside else traces)
            self.vectorized = self._vectorizes(rows) and self._vectorizes(rows, 2)

    def redraw(self, batch: Batch) -> None:
        """Draw the latents outside the plate ``data`` anew, under a whole batch."""
        if self._shared.nodes:
            self._shared = Trace()
            self._keep(*self._scored_both(batch))

    def _scored_both(self, batch: Batch) -> tuple[Trace, Trace]:
        """Scored traces of the model and of the guide that it replays."""
        with worded("guide", batch):
            guided = self._scored(self.pair.guide, batch, 1)
        with worded("model", batch):
            return self._scored(self.pair.model, batch, 1, guided), guided

    def _keep(self, modelled: Trace, guided: Trace) -> None:
        """Keep the latents outside the plate ``data``, and the density of what lies there."""
        self.shared = sum(
            (sign * unscaled(site)["log_prob"].sum())
            for trace, sign in ((modelled, 1), (guided, -1))
            for site in _samples(trace)
            if data_dim(site) is None
        )
        for name, site in latents(guided):
            if data_dim(site) is None:
                self._shared.add_node(name, **site)

    def _check(self, modelled: Trace, guided: Trace) -> None:
        check_sites(modelled, guided)
        frames = [f for site in _samples(modelled) for f in site["cond_indep_stack"]]
        self._rank = 1 + max([1, *(-frame.dim for frame in frames if frame.vectorized)])
        self.sites = {name: site for name, site in latents(modelled) if data_dim(site) is not None}
        seen = [site for _, site in observations(modelled)]
        if not seen:
            raise ValueError("the model observes no data: none of its sites has obs=x")
        seen = [site for site in seen if data_dim(site) is not None]
        if not seen:
            raise ValueError(
                "the model observes nothing of each datum: put the site with obs=x into a plate "
                "named 'data'"
            )
        self.observed = next((site for site in seen if site["name"] == "x"), seen[0])
        self._beside = [site["name"] for site in seen if site is not self.observed]
        self.alone = not self._beside
        drawn = [name for name, _ in latents(guided) if name in self.sites]
        self.ordered = drawn == list(self.sites)

    def _vectorizes(self, rows: Batch, count: int = 5) -> bool:
        """Whether some particles at once have the densities that they have one by one."""
        rows = tuple(tensor[:count] for tensor in rows)
        try:
            guided = self._scored(self.pair.guide, rows, count)
            together = self._sum(self._scored(self.pair.model, rows, count, guided), rows, count)
            together = torch.stack([together, self._sum(guided, rows, count)])
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        for k in range(count):
            one = self._one(guided, k, count)
            scores = [
                self._sum(self._scored(program, rows, 1, one), rows, 1)
                for program in (self.pair.model, self.pair.guide)
            ]
            if not torch.allclose(torch.cat(scores), together[:, k], 1e-3, 1e-3, True):
                return False
        return True

    def _one(self, trace: Trace, k: int, count: int) -> Trace:
        """The trace with one of several particles."""
        trace = trace.copy()
        for name, site in latents(trace):
            value = site["value"]
            if value.dim() - len(site["fn"].event_shape) == self._rank and len(value) == count:
                value = value[k].reshape(value.shape[1:])
            trace.nodes[name] = {**site, "value": value}
        return trace

    def weights(self, batch: Batch, count: int) -> Tensor:
        """Log-weights ``log p(x,z) - log q(z|x)`` of draws ``z ~ q(z|x)``, ``(count, N)``.

        Raises:
            ValueError: One is no number, or infinite.
        """
        if not self.vectorized and count > 1:
            return torch.cat([self.weights(batch, 1) for _ in range(count)])
        guided = self._scored(self.pair.guide, batch, count)
        modelled = self._scored(self.pair.model, batch, count, guided)
        return checked(self._sum(modelled, batch, count) - self._sum(guided, batch, count))

    def draw(self, batch: Batch, count: int, *, prior: bool = False) -> Tensor:
        """Latents ``(count, N, latent)`` of q(z|x), or of the prior, all sites side by side."""
        if not self.vectorized and count > 1:
            return torch.cat([self.draw(batch, 1, prior=prior) for _ in range(count)])
        program = self.pair.model if prior else self.pair.guide
        trace = self._trace(program, batch, count)
        return self._flat({name: trace.nodes[name]["value"] for name in self.sites}, batch, count)

    def log_joint(self, batch: Batch, z: Tensor) -> Tensor:
        """``log p(x,z)`` ``(K, N)`` at latents ``(K, N, latent)``."""
        latent, observed = self.log_parts(batch, z)
        return latent + observed

    def log_parts(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(z)`` and ``log p(x|z)``, each ``(K, N)``, at latents ``(K, N, latent)``."""
        latent, observed = self._at(self.pair.model, batch, z)
        return latent, observed

    def log_guide(self, batch: Batch, z: Tensor) -> Tensor:
        """``log q(z|x)`` ``(K, N)`` at latents ``(K, N, latent)``."""
        return self._at(self.pair.guide, batch, z).sum(0)

    def simulate(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Data of the model with the context of a batch, and their latents ``(1, N, latent)``."""
        with torch.no_grad():
            trace = self._freed(batch)
        z = self._flat({name: trace.nodes[name]["value"] for name in self.sites}, batch, 1)
        return (self._drawn(trace, batch), *batch[1:]), z

    def predict(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Draws ``x ~ p(x|z)`` at latents ``(1, N, latent)``, or else draws of p(z)."""
        return self._drawn(self._freed(batch, None if z is None else self._given(z)), batch)

    def laws(self, batch: Batch) -> list[tuple[Any, Any]]:
        """The distributions of each latent site of the data, in the model and in the guide."""
        guided = self._trace(self.pair.guide, batch, 1)
        modelled = self._trace(self.pair.model, batch, 1, guided)
        return [(modelled.nodes[name]["fn"], guided.nodes[name]["fn"]) for name in self.sites]

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Latents ``(K, N, latent)`` by the names of their sites, ``(K, N, *shape)`` each."""
        values, start = dict[str, Tensor](), 0
        for name, site in self.sites.items():
            shape = site["fn"].event_shape
            value = z[..., start : start + shape.numel()]
            values[name] = value.reshape(*z.shape[:-1], *shape).to(site["value"].dtype)
            start += shape.numel()
        return values

    def need_alone(self, what: str) -> None:
        """Refuse a model that observes more of each datum than x.

        Raises:
            ValueError: It does, so that x alone is no draw of what is observed.
        """
        if not self.alone:
            raise ValueError(
                f"{what} needs a model that observes x alone of each datum, and this one observes "
                f"'{self._beside[0]}' too: make that context"
            )

    def need_unmasked(self, batch: Batch, what: str) -> None:
        """Refuse latents that are masked for some data of a batch.

        Raises:
            ValueError: There are some, whose density is left out.
        """
        trace = self._trace(self.pair.guide, batch, 1)
        for name in self.sites:
            mask = trace.nodes[name]["mask"]
            if mask is not None and not torch.as_tensor(mask).all():
                raise ValueError(
                    f"{what} needs the latents of all data, and '{name}' is masked for some: "
                    f"leave these data out"
                )

    def need_vectors(self, what: str) -> int:
        """Return the number of latents of each datum.

        Raises:
            ValueError: There are none, or they lie in further plates or left of one, or some are
                shared by all data, which `what` cannot do with.
        """
        advice = "use log_likelihood, which needs draws only"
        for name, site in self.sites.items():
            if len([f for f in site["cond_indep_stack"] if f.vectorized]) > 1:
                raise ValueError(f"{what} needs latents in one plate, '{name}' has more: {advice}")
            if data_dim(site) != -1:
                raise ValueError(
                    f"{what} needs the plate 'data' of '{name}' at dim=-1, right of all others: "
                    f"{advice}"
                )
        if names := list(self._shared.nodes):
            raise ValueError(
                f"{what} needs latents of each datum, and '{names[0]}' is one for all: {advice}"
            )
        if not self.sites:
            raise ValueError(f"{what} needs latents, and the model has none")
        return sum(site["fn"].event_shape.numel() for site in self.sites.values())

    def need_real(self, what: str) -> int:
        """As `need_vectors`, of real latents only.

        Raises:
            ValueError: As there, or some are discrete or constrained.
        """
        for name, site in self.sites.items():
            if not _unbounded(site["fn"].support):
                kind = "discrete" if site["fn"].support.is_discrete else "constrained"
                raise ValueError(
                    f"{what} needs real latents, and '{name}' is {kind}: use log_likelihood, "
                    f"which needs draws only"
                )
        return self.need_vectors(what)

    def _at(self, program: Callable[..., Any], batch: Batch, z: Tensor) -> Tensor:
        """Log-densities ``(2, K, N)`` of latents and of what is observed."""
        count = len(z)
        if not self.vectorized and count > 1:
            return torch.cat([self._at(program, batch, one) for one in z.split(1)], 1)
        trace = self._scored(program, batch, count, self._given(z))
        return self._halves(trace, batch, count)

    def _given(self, z: Tensor) -> Trace:
        """Latents ``(K, N, latent)`` as a trace to replay."""
        given = Trace()
        for name, value in self.split(z).items():
            own = value[0] if len(z) == 1 else value
            given.add_node(name, **{**self.sites[name], "value": own})
        return given

    def _flat(self, values: dict[str, Tensor], batch: Batch, count: int) -> Tensor:
        parts = []
        for name, site in self.sites.items():
            shape = site["fn"].event_shape
            value = values[name].expand(count, len(batch[0]), *shape)
            parts.append(value.reshape(count, len(batch[0]), shape.numel()))
        return torch.cat(parts, -1) if parts else batch[0].new_zeros(count, len(batch[0]), 0)

    def _freed(self, batch: Batch, given: Trace | None = None) -> Trace:
        """A trace of the model in which x is drawn and what else is observed keeps its value."""
        return self._trace(_Freed(self.observed["name"])(self.pair.model), batch, 1, given)

    def _drawn(self, trace: Trace, batch: Batch) -> Tensor:
        x: Tensor = trace.nodes[self.observed["name"]]["value"]
        if x.shape != batch[0].shape:
            raise ValueError(
                f"the model draws data of shape {tuple(x.shape)} where the batch has "
                f"{tuple(batch[0].shape)}: x must be its observed site"
            )
        return x

    def _trace(
        self, program: Callable[..., Any], batch: Batch, count: int, given: Trace | None = None
    ) -> Trace:
        program = Spread(count, -self._rank)(program)
        for trace in (self._shared, given):
            program = poutine.replay(program, trace=trace) if trace else program
        return prune_subsample_sites(poutine.trace(program).get_trace(*batch))

    def _scored(
        self, program: Callable[..., Any], batch: Batch, count: int, given: Trace | None = None
    ) -> Trace:
        trace = self._trace(program, batch, count, given)
        trace.compute_log_prob()
        return trace

    def _sum(self, trace: Trace, batch: Batch, count: int) -> Tensor:
        """The log-densities of all sites of each datum ``(count, N)``, in double precision."""
        return self._halves(trace, batch, count).sum(0)

    def _halves(self, trace: Trace, batch: Batch, count: int) -> Tensor:
        """The sums ``(2, count, N)`` over latents and over what is observed."""
        shape = count, len(batch[0])
        halves = [batch[0].new_zeros(shape, dtype=torch.float64) for _ in range(2)]
        for site in _samples(trace):
            check_plate(site, len(batch[0]))
            if data_dim(site) is not None:
                half = int(site["is_observed"])
                halves[half] = halves[half] + each_datum(unscaled(site), self._rank, count)
        return torch.stack(halves)


class _Freed(UnconditionMessenger):
    """Has an observed site drawn, and leaves the others observed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            super()._pyro_sample(msg)


def _samples(trace: Trace) -> list[dict[str, Any]]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _unbounded(support: constraints.Constraint) -> bool:
    while hasattr(support, "base_constraint"):  # of independent elements, or of a mixture
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


@contextlib.contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Set the validation of Pyro and torch for a while, and leave both as they were."""
    before = Distribution._validate_args
    try:
        with pyro.validation_enabled(enabled):
            yield
    finally:
        Distribution.set_default_validate_args(before)


def whole(**numbers: int) -> None:
    """Refuse numbers that count something and are not whole.

    Raises:
        ValueError: One of them has a fraction, or is no number.
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name} must be a whole number, not {number!r}")


@contextlib.contextmanager
def worded(program: str, rows: Batch) -> Iterator[None]:
    """Say in one sentence that a program does not run on data of this shape."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).partition("Trace Shapes")[0].partition(", but found invalid values")[0]
        reason = " ".join(reason.split())
        raise ValueError(
            f"the {program} cannot run on data of shape {tuple(rows[0].shape[1:])}: {reason}"
        ) from error
