"""Parts by name: from classes and their options to a VAE, in memory or in a file."""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "KINDS", "Blueprint", "Part", "check_step", "find", "make", "named"]

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast, get_origin

import pyro.infer
import torch
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import importance, likelihoods, objectives, posteriors, priors
from pyro_vae.mapped import Mapped
from pyro_vae.networks import MLP, BFloat16, ConvDecoder, ConvEncoder, fill
from pyro_vae.splits import Split
from pyro_vae.vae import VAE

# What has a name: the interface of each kind, and the modules where its classes live.
KINDS: dict[str, tuple[Any, ...]] = {
    "prior": (priors.Prior, priors),
    "likelihood": (likelihoods.Likelihood, likelihoods),
    "posterior": (posteriors.Posterior, posteriors),
    "objective": (ELBO, objectives, importance, pyro.infer),
    "optimizer": (Optimizer, torch.optim),
    "schedule": (LRScheduler, torch.optim.lr_scheduler),
}
_PARTS = ("prior", "likelihood", "posterior")
# Rows on disk that parts may look at.
_ROWS = 10_000
# Classes that need a function or other schedules, gradients of another kind, or matrices alone.
_BEYOND = {"ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR"}
_BEYOND |= {"Muon", "SparseAdam"}
ACTIVATIONS = ("ELU", "GELU", "Identity", "LeakyReLU", "ReLU", "SiLU", "Softplus", "Tanh")


@dataclass(frozen=True)
class Part:
    """A class by its name within the package, or by its import path, and its options.

    Attributes:
        name: ``Normal``, or ``my_file.MyPrior``.
        options: Arguments of its constructor, plain values.
    """

    name: str = "Normal"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Part:
        """Return the part that a configuration gives as ``class_path`` and ``init_args``.

        Raises:
            ValueError: There is something else.
        """
        part = cls(values["class_path"], dict(values.get("init_args") or {}))
        if unknown := sorted(set(values) - {"class_path", "init_args"}):
            raise ValueError(f"'{part.name}' has class_path and init_args, and no '{unknown[0]}'")
        return part

    def plain(self) -> dict[str, Any]:
        """Return ``class_path`` and ``init_args``, for a configuration."""
        return {"class_path": self.name, "init_args": dict(self.options)}


@dataclass(frozen=True)
class Blueprint:
    """All it takes to build a VAE: the shape of its data, its networks and its three parts.

    A constructor gets, by parameter name, what it asks of ``latent``, ``shape``,
    ``encoder``, ``decoder``, ``posterior`` and ``data``, the training values; the rest
    comes from the part's options.

    Attributes:
        shape: Shape of one datum.
        latent: Size of z.
        hidden: Widths of the encoder's hidden layers; the decoder has them reversed. With channels
            the last one counts, of the layer between convolutions and latents.
        channels: Channels of a convolutional pair, in the encoder's order; empty for MLPs.
        activation: Name of the module between layers, one of `ACTIVATIONS`.
        gated: Whether the hidden layers of the MLPs are gated.
        blocks: Residual blocks at each resolution of a convolutional pair.
        bfloat16: Whether the networks are trained in bfloat16.
        context: Number of context features that a datum brings.
        missing: Whether data may be NaN where they were not observed: the encoder gets them
            with the mask, and the likelihood scores the rest.
        rows: Number of training data.
        prior: The prior.
        likelihood: The likelihood.
        posterior: The posterior.

    Example:
        >>> vae = Blueprint(shape=(1, 8, 8), latent=2).build()
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    shape: tuple[int, ...]
    latent: int = 20
    hidden: Sequence[int] = (400,)
    channels: Sequence[int] = ()
    activation: str = "ReLU"
    gated: bool = False
    blocks: int = 0
    bfloat16: bool = False
    context: int = 0
    missing: bool = False
    rows: int = 1
    prior: Part = Part()
    likelihood: Part = Part("Bernoulli")
    posterior: Part = Part()

    def build(self, data: Split | None = None, *, allow: Collection[str] | None = None) -> VAE:
        """Build the VAE, its weights drawn anew.

        Args:
            data: The training split, whose values a constructor may ask for; zeros where it
                is left out, for a model whose weights come from a file.
            allow: Modules outside this package whose classes may be used; any by default.

        Raises:
            ValueError: An unknown class, an option that it does not take, a value that
                does not fit.
            TypeError: A class of another kind, or one that asks for what there is not.
            PermissionError: A class from a module that is not allowed.
        """
        if self.latent < 1:
            raise ValueError(f"a latent vector has at least 1 dimension, not {self.latent}")
        if any(width < 1 for width in (*self.hidden, *self.channels)):
            raise ValueError("a layer is at least 1 wide; check the hidden widths and channels")
        if self.gated and self.channels:
            raise ValueError("gated layers are those of MLPs; leave out gated, or the channels")
        if self.blocks < 0:
            raise ValueError(f"there are 0 residual blocks or more, not {self.blocks}")
        if self.blocks and not self.channels:
            raise ValueError(
                "residual blocks are those of a convolutional pair: give its channels"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation '{self.activation}': there are {', '.join(ACTIVATIONS)}"
            )
        parts = {key: getattr(self, key) for key in _PARTS}
        classes: dict[str, Any] = {
            key: find(part.name, key, allow=allow) for key, part in parts.items()
        }
        at_hand: dict[str, Callable[[], Any]] = {
            "latent": lambda: self.latent,
            "shape": lambda: self.shape,
            "data": lambda: self._nothing if data is None else _values(data),
            "encoder": cache(
                lambda: self._encoder(
                    _told(classes["posterior"].outputs, self.latent, self.posterior),
                    classes["likelihood"].encoded,
                )
            ),
            "decoder": cache(
                lambda: self._decoder(
                    _told(classes["likelihood"].outputs, self.shape, self.likelihood),
                    _told(classes["likelihood"].features, self.context, self.likelihood),
                )
            ),
        }
        posterior = _construct(classes["posterior"], self.posterior, at_hand)
        at_hand["posterior"] = lambda: posterior
        prior = _construct(classes["prior"], self.prior, at_hand)
        likelihood = _construct(classes["likelihood"], self.likelihood, at_hand)
        return VAE(
            prior, likelihoods.Missing(likelihood) if self.missing else likelihood, posterior
        )

    def plain(self) -> dict[str, Any]:
        """Return the blueprint as plain values, for a JSON file."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Blueprint:
        """Return the blueprint that `plain` wrote.

        Raises:
            ValueError: The values are not those of a blueprint.
        """
        try:
            parts = {key: Part(**values[key]) for key in _PARTS}
            found = cls(**{**values, **parts, "shape": tuple(values["shape"])})
            widths = (*found.shape, *found.hidden, *found.channels)
            sizes = (*widths, found.latent, found.blocks, found.context, found.rows)
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no description of a VAE: {error}") from error
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"this is no description of a VAE: its sizes are {sizes}")
        switches = {key: getattr(found, key) for key in ("gated", "bfloat16", "missing")}
        if not all(type(switch) is bool for switch in switches.values()):
            raise ValueError(
                f"this is no description of a VAE: {', '.join(switches)} are true or false"
            )
        for key, part in parts.items():
            if not (isinstance(part.name, str) and isinstance(part.options, Mapping)):
                raise ValueError(f"this is no description of a VAE: its {key} is {part}")
        return found

    def _encoder(self, output: tuple[int, ...], encoded: Callable[[Tensor], Tensor]) -> nn.Module:
        """The encoder of data as their likelihood wants them to be seen, all context joined."""
        shape, transform = self.shape, encoded
        if self.missing:
            shape = (2 * shape[0], *shape[1:])
            transform = partial(_filled, encoded=encoded, dims=len(shape))
        options: dict[str, Any] = {
            **self._options,
            "context": self.context,
            "transform": None if transform is likelihoods.Likelihood.encoded else transform,
        }
        if not self.channels:
            return self._trained(MLP(shape, self.hidden, output, **options))
        return self._trained(ConvEncoder(shape, self.channels, output, **options))

    def _decoder(self, output: tuple[int, ...], context: int) -> nn.Module:
        options: dict[str, Any] = {**self._options, "context": context}
        if not self.channels:
            return self._trained(MLP(self.latent, self.hidden[::-1], output, **options))
        return self._trained(ConvDecoder(self.latent, self.channels[::-1], output, **options))

    def _trained(self, network: nn.Module) -> nn.Module:
        """The network in the precision in which it is trained."""
        return BFloat16(network) if self.bfloat16 else network

    @property
    def _options(self) -> dict[str, Any]:
        """What encoder and decoder have in common."""
        activation = getattr(nn, self.activation)
        if not self.channels:
            return {"activation": activation, "gated": self.gated}
        width = self.hidden[-1] if self.hidden else 256
        return {"activation": activation, "blocks": self.blocks, "hidden": width}

    @property
    def _nothing(self) -> Tensor:
        """Values in the shape of the training data, in the memory of one number."""
        return torch.zeros(()).expand(self.rows, *self.shape)


def find(name: str, kind: str, *, allow: Collection[str] | None = None) -> type:
    """Return the class of that kind and that name or import path.

    Args:
        name: ``Normal``, ``pyro_vae.priors.Normal`` or ``my_file.MyPrior``.
        kind: A key of `KINDS`.
        allow: Modules besides those of `KINDS` that may be imported; any by default.

    Raises:
        ValueError: There is no such class or module.
        TypeError: It is of another kind.
        PermissionError: Its module is not allowed; nothing was imported.
    """
    interface, *homes = KINDS[kind]
    module, _, last = name.rpartition(".")
    if kind == "likelihood" and name in ("Missing", "pyro_vae.likelihoods.Missing"):
        raise ValueError(
            "Missing is a likelihood around another one: name that one and give --missing, in "
            "Python Blueprint(missing=True)"
        )
    if not module or module in {home.__name__ for home in homes}:
        found = _classes(kind).get(last)
        if found is None and hasattr(sys.modules.get(module), last):
            raise ValueError(
                f"{kind} '{name}' is not for a VAE in minibatches; there are "
                f"{', '.join(named(kind))}, or give the import path of your own class"
            )
        if found is None:
            raise ValueError(_unknown(last, kind))
        return found
    if allow is not None and module not in allow:
        raise PermissionError(
            f"{kind} '{name}' lies outside this package and may run any code: if you trust it, "
            f"allow its module by `--allow {module}`, in Python by allow=['{module}']"
        )
    try:
        found = getattr(importlib.import_module(module), last)
    except Exception as error:  # whatever the user's own file raises
        raise ValueError(f"{kind} '{name}' cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, interface)):
        raise TypeError(
            f"'{name}' is no {kind}: it must be a subclass of "
            f"{interface.__module__}.{interface.__name__}"
        )
    return found


def make(part: Part, kind: str, *, allow: Collection[str] | None = None, **given: Any) -> Any:
    """Construct an objective, optimiser or schedule from its part and what it is `given`.

    Raises:
        ValueError: As for `find`, or an option that it does not take or refuses, or a class
            whose ``step`` needs an argument, which a training loop cannot know.
        TypeError: As for `find`, or something that it needs is missing.
        PermissionError: As for `find`.
    """
    options = {
        key: make(Part.of(value), kind, allow=allow)
        if isinstance(value, Mapping) and "class_path" in value
        else value
        for key, value in part.options.items()
    }
    at_hand = {key: cast("Callable[[], Any]", lambda v=value: v) for key, value in given.items()}
    found = find(part.name, kind, allow=allow)
    check_step(found, kind)
    return _construct(found, Part(part.name, options), at_hand)


def named(kind: str) -> list[str]:
    """Return the names of the classes of a kind that train by plain options, without a path."""
    known = {name: each for name, each in _classes(kind).items() if name not in _BEYOND}
    return sorted(name for name, each in known.items() if not _step_needs(each))


def _classes(kind: str) -> dict[str, type]:
    """The classes of a kind that have a name of their own, by that name."""
    interface, home, *_ = KINDS[kind]
    return {
        name: each
        for name, each in vars(home).items()
        if inspect.isclass(each) and get_origin(each) is None  # Python 3.10 calls aliases classes
        if issubclass(each, interface) and not inspect.isabstract(each) and each is not interface
        if not name.startswith("_") and each is not likelihoods.Missing
    }


def _unknown(name: str, kind: str) -> str:
    near = {each.lower(): each for each in named(kind)}
    match = difflib.get_close_matches(name.lower(), near, n=1)
    hint = f"did you mean '{near[match[0]]}'? There are" if match else "there are"
    return (
        f"unknown {kind} '{name}': {hint} {', '.join(sorted(near.values()))}, or give the import "
        f"path of your own class, as in my_file.MyClass"
    )


def _values(data: Split) -> Tensor:
    """Rows as they are scored: all that are in memory, and of more on disk some of everywhere."""
    if isinstance(data.x, Mapped) and len(data) > _ROWS:
        data = data[torch.arange(_ROWS) * len(data) // _ROWS]
    return data.expected().batch()[0]


def _told(method: Callable[..., Any], size: Any, part: Part) -> Any:
    """What a class says of its network, such as the output's shape, given the options it reads."""
    known = inspect.signature(method).parameters
    return method(size, **{key: value for key, value in part.options.items() if key in known})


def _filled(x: Tensor, *, encoded: Callable[[Tensor], Tensor], dims: int) -> Tensor:
    # In this order, so that a missing element is 0 on the scale that the encoder sees.
    return fill(encoded(x), dims=dims)


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that have no default."""
    parameters = inspect.signature(function).parameters.items()
    return [key for key, each in parameters if each.default is each.empty and not _is_rest(each)]


def check_step(part: type, kind: str) -> None:
    """Refuse an optimiser or a schedule whose ``step`` asks for what training cannot know.

    Raises:
        ValueError: It does.
    """
    if needs := _step_needs(part):
        raise ValueError(
            f"{part.__name__} cannot train here, since its step needs {', '.join(needs)}; choose "
            f"another {kind}"
        )


def _step_needs(part: type) -> list[str]:
    """What the ``step`` of an optimiser or a schedule asks for, which training cannot know."""
    return [key for key in _required(getattr(part, "step", lambda: None)) if key != "self"]


def _is_rest(parameter: inspect.Parameter) -> bool:
    """Whether it stands for any number of arguments, ``*args`` or ``**kwargs``."""
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _construct(part: type, options: Part, at_hand: Mapping[str, Callable[[], Any]]) -> Any:
    parameters = inspect.signature(part).parameters
    free = [key for key, each in parameters.items() if key not in at_hand and not _is_rest(each)]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key in options.options:
        if key in at_hand or not (key in free or takes_any):
            takes = f"it takes {', '.join(free)}" if free else "it takes none"
            raise ValueError(f"{options.name} takes no option '{key}'; {takes}")
    missing = [key for key in _required(part) if key in free and key not in options.options]
    if missing:
        raise TypeError(
            f"{options.name} needs {', '.join(missing)}: give it as an option; what it gets by "
            f"name are {', '.join(at_hand)}"
        )
    given = {key: value() for key, value in at_hand.items() if key in parameters}
    try:
        return part(**given, **options.options)
    except TypeError as error:
        raise TypeError(f"{options.name} cannot be set up: {error}") from error
