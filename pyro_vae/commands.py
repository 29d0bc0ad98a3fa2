"""The commands that begin something: train, and data."""

from __future__ import annotations

__all__ = ["data", "train"]

import contextlib
import inspect
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
import yaml
from torch import Tensor
from torch.distributions import constraints
from torch.optim import Optimizer

from pyro_vae import checkpoints
from pyro_vae.data import SOURCES, Data, folder, load
from pyro_vae.distributed import Ranks, job
from pyro_vae.optimizers import fused
from pyro_vae.parts import Blueprint, Part, find, make
from pyro_vae.runs import (
    VIEWS,
    Run,
    bounds,
    check_threads,
    dataset_of,
    device_of,
    in_threads,
    pictures,
    print_paths,
    score,
    support,
)
from pyro_vae.svi import Mode, mode_for
from pyro_vae.training import check_settings, fit
from pyro_vae.vae import VAE

Binarisation = Literal["dynamic", "threshold", "levels", "dequantised", "none"]
Activation = Literal["ELU", "GELU", "Identity", "LeakyReLU", "ReLU", "SiLU", "Softplus", "Tanh"]
_NORMAL, _BERNOULLI, _ELBO, _ADAM = map(Part, ("Normal", "Bernoulli", "Trace_ELBO", "Adam"))


def train(
    *,
    data: str = "digits",
    data_dir: str | None = None,
    binarisation: Binarisation | None = None,
    top: float | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    ordered: bool = False,
    conditional: bool = False,
    missing: bool = False,
    latent: int = 20,
    hidden: Sequence[int] = (400,),
    channels: Sequence[int] = (),
    activation: Activation = "ReLU",
    gated: bool = False,
    blocks: int = 0,
    bfloat16: bool = False,
    output_bias: bool = False,
    prior: Part = _NORMAL,
    likelihood: Part = _BERNOULLI,
    posterior: Part = _NORMAL,
    objective: Part = _ELBO,
    optimizer: Part = _ADAM,
    schedule: Part | None = None,
    lr: float = 1e-3,
    epochs: int = 100,
    batch_size: int = 128,
    warmup: float = 0.1,
    clip: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    mode: Mode | None = None,
    device: str | None = None,
    threads: int | None = None,
    checkpoint: float = 5.0,
    skip_nonfinite: int = 0,
    out: str | None = None,
    resume: str | None = None,
) -> None:
    """Train a VAE and draw its pictures.

    Args:
        data: Data set: a name (see `pyro-vae data`), a .npy or .npz file, or a folder of .npy
            files or images. Files of 1 GiB and more, and folders of .npy files, stay on disk.
        data_dir: Folder of the named data sets (default: $PYRO_VAE_DATA or ~/.cache/pyro_vae).
        binarisation: dynamic (drawn anew each epoch), threshold (at one half), levels (none,
            but whole grey levels 0 to 255), dequantised (these with uniform noise, over 256, for
            a density that bounds bits per pixel where pixels are stored as whole numbers up to
            255) or none; by default dynamic for a likelihood on {0, 1}, levels for one on
            {0, ..., 255} and none for others.
        top: Stored value that counts as 1 (default: 255 for bytes, 1 for other types).
        validation: Fraction of the training data to set aside, 0 for none.
        test: Likewise for the test, where there is no official one.
        ordered: Take validation and test from the end, for data such as frames of a video.
        conditional: Give the label, one-hot, to encoder and decoder.
        missing: Accept NaN in the data for what was not observed: it is not scored, and the
            encoder is told where it is.
        latent: Size of the latent vector z.
        hidden: Widths of the encoder's hidden layers; the decoder has them reversed. With channels
            the last one counts.
        channels: Channels of a convolutional encoder and decoder, in place of the MLPs.
        activation: Module between layers.
        gated: Gate the hidden layers of the MLPs; with the activation Identity, as in the
            VampPrior's paper.
        blocks: Residual blocks at each resolution of a convolutional encoder and decoder.
        bfloat16: Train the networks in bfloat16, faster on a GPU where they are thousands wide;
            densities, weights and evaluation stay in float32.
        output_bias: Start the decoder's output bias at the training mean.
        prior: Prior p(z).
        likelihood: Likelihood p(x|z).
        posterior: Approximate posterior q(z|x).
        objective: Objective.
        optimizer: Optimiser from torch.optim.
        schedule: Learning-rate schedule from torch.optim.lr_scheduler, advanced each epoch.
        lr: Learning rate.
        epochs: Passes over the training data.
        batch_size: Data in a step, of each process where there are several.
        warmup: Fraction of all steps over which the weight of the KL rises from 0 to 1.
        clip: Greatest norm of all gradients together.
        patience: Stop after so many epochs without a better bound on the validation data.
        seed: Seed of the split, the initial weights, the order and all draws.
        mode: eager, captured (as a graph of tensor operations) or compiled (by torch.compile);
            by default what is soonest done with so many steps.
        device: cpu, cuda or cuda:N (default: a GPU where there is one).
        threads: Threads of the processor (default: 1 where a step is too small to be shared
            out, else as many as torch takes).
        checkpoint: Minutes between checkpoints, from which --resume goes on; 0 for one after each
            step.
        skip_nonfinite: Greatest number of steps to leave out where the loss or a gradient is NaN
            or infinite.
        out: Folder of the run (default: the first free of runs/DATA-1, runs/DATA-2, ...).
        resume: Folder of a run that was stopped, to go on with bit for bit, as it was configured;
            --epochs may be more.
    """
    settings: dict[str, Any] = dict(locals())
    del settings["resume"]
    norm = math.inf if clip is None else clip
    check_settings(epochs, batch_size, warmup, norm, patience, checkpoint, skip_nonfinite)
    if threads is not None:
        check_threads(threads)
    if data not in SOURCES and Path(data).exists():
        settings["data"] = str(Path(data).resolve())
    settings["data_dir"] = data_dir and str(Path(data_dir).expanduser().resolve())
    done = 0
    if resume is not None:
        epochs, done = _same(Path(resume), settings)
        settings["epochs"] = epochs
    ranks, place = Ranks.here(), device_of(device)
    if ranks.size > 1 and place.index is not None:
        raise ValueError(
            f"--device {device} is one GPU for all processes; give cuda, and each takes its own"
        )
    dataset = dataset_of(settings)
    blueprint = Blueprint(
        shape=dataset.shape,
        latent=latent,
        hidden=list(hidden),
        channels=list(channels),
        activation=activation,
        gated=gated,
        blocks=blocks,
        bfloat16=bfloat16,
        missing=missing,
        context=sum(c.shape[-1] for c in dataset.train.context),
        rows=len(dataset.train),
        prior=prior,
        likelihood=likelihood,
        posterior=posterior,
    )
    view = binarisation or _default_view(blueprint.build(dataset.train), dataset)
    settings["binarisation"] = view
    dataset = dataset.viewed(VIEWS[view])
    pyro.set_rng_seed(seed)
    vae = blueprint.build(dataset.train)  # anew, from data as they are scored
    if output_bias:
        vae.likelihood.centre(dataset.train.mean())  # type: ignore[operator]
    vae.to(place)
    chosen = resume or settings["out"] or _free(dataset.name)
    run = Path(os.fsdecode(ranks.send(os.fsencode(chosen))))
    del settings["out"]
    settings["threads"] = _default_threads(vae, batch_size) if threads is None else threads
    if mode is None:  # one mode for one run, and for those that repeat it
        settings["mode"] = mode_for(
            epochs * math.ceil(len(dataset.train) // ranks.size / batch_size)
        )
    begins = ranks.first and resume is None
    begun = _begun(run, settings, blueprint) if begins else contextlib.nullcontext()
    with in_threads(settings["threads"]), begun:
        if ranks.first and not (run / "model.json").exists():  # stopped as soon as it had begun
            checkpoints.describe(run, blueprint)
        print(f"{_summary(dataset)}, binarisation: {settings['binarisation']}")
        print(_described(vae, blueprint))
        if ranks.size > 1:
            print(f"{ranks.size} processes, each with batches of {batch_size} of its own data")
        aim = make(objective, "objective")
        if not getattr(aim, "is_bound", True):
            print(
                f"this {type(aim).__name__} is no lower bound on log p(x); the ELBO below is one"
            )
        rows = fit(
            vae,
            dataset,
            objective=aim,
            optimizer=partial(_optimizer, optimizer, lr),
            schedule=None
            if schedule is None
            else lambda optim: make(schedule, "schedule", optimizer=optim),
            epochs=epochs,
            batch_size=batch_size,
            warmup=warmup,
            clip=norm,
            patience=patience,
            seed=seed,
            mode=settings["mode"],
            run=run,
            resume=resume is not None,
            checkpoint=checkpoint,
            skip_nonfinite=skip_nonfinite,
            progress=done < epochs,
        )
    if not ranks.first:
        return
    if done and len(rows) == done:
        print(_finished(run, done, epochs, patience))
    shown = (dataset.test if len(dataset.test) else dataset.train).to(place)
    finished = Run(str(run), device=device)
    if len(dataset.test):
        pyro.set_rng_seed(finished.seed)  # so that `evaluate RUN` says the same
        print(score(vae, shown, "test"))
    print_paths(pictures(finished, vae, shown, rows))


def data(name: str | None = None, *, data_dir: str | None = None, download: bool = True) -> None:
    """Say which data sets there are, or fetch one and say what it holds.

    Args:
        name: A name, a .npy or .npz file, or a folder of .npy files or images.
        data_dir: Folder of the named data sets.
        download: Whether to fetch what is not there.
    """
    where = Path(data_dir).expanduser() if data_dir else folder()
    if name:
        print(_summary(load(name, directory=where, download=download, missing=True)))
        return
    print(f"data folder: {where}")
    for key, source in SOURCES.items():
        there = all((where / file).exists() for file in source.files)
        state = "embedded" if not source.files else "there" if there else "to be downloaded"
        print(f"  {key:16} {state:17} {source.about}")


@contextlib.contextmanager
def _begun(run: Path, settings: Mapping[str, Any], blueprint: Blueprint) -> Iterator[None]:
    """Make the folder of a run; take it back where the run is refused before its first step."""
    config = f"{checkpoints.HEADER}\n{_by()}".encode() + _dumped(settings)
    created = [path for path in (run, *run.parents) if not path.exists()]
    checkpoints.create(run)
    try:
        # Anew or not at all, in case that another run takes the folder at the same time.
        (run / "config.yaml").touch(exist_ok=False)
    except FileExistsError as error:
        raise FileExistsError(f"another run has just begun in '{run}'") from error
    try:
        checkpoints.write(run / "config.yaml", config)
        checkpoints.describe(run, blueprint)
        yield
    finally:
        if not (run / "metrics.jsonl").exists():
            for name in ("config.yaml", "model.json"):
                (run / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of a folder that another run uses meanwhile
                for path in created:
                    path.rmdir()


def begun_here(run: Path) -> bool:
    """Whether a run was begun by the same torchrun that has started this process."""
    path = run / "config.yaml"
    return path.is_file() and path.read_text().startswith(f"{checkpoints.HEADER}\n{_by()}")


def _by() -> str:
    """A comment on the processes that begin a run, none where it is this one alone."""
    size = Ranks.here().size
    return f"# By {size} processes, of torchrun {job()}\n" if size > 1 else ""


def _same(run: Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Refuse to go on otherwise than a run began; return the epochs it is to have, and has."""
    path = run / "config.yaml"
    began = {**yaml.safe_load(path.read_text())}
    now = yaml.safe_load(_dumped(settings))
    free = {"epochs", "checkpoint", "skip_nonfinite", "data", "data_dir", "out"}
    changed = list[str]()
    for key, new in now.items():
        # An option that the run's version did not know had its default.
        old = began.get(key, inspect.signature(train).parameters[key].default)
        if key not in free and new != old:
            changed.append(f"another --{key.replace('_', '-')}: it was {old} and is {new}")
    if changed:
        raise ValueError(
            f"'{run}' cannot go on with {', '.join(changed)}; train anew by --config {path} into "
            f"another folder"
        )
    if settings["out"]:
        raise ValueError(f"--resume goes on in '{run}'; leave out --out")
    state = checkpoints.newest(run / "checkpoints") or {}
    epochs = settings["epochs"]
    if epochs == began.get("epochs"):  # which an earlier --resume may have extended
        epochs = state.get("epochs", epochs)
    return int(epochs), len(state.get("now", {}).get("rows", ()))


def _finished(run: Path, done: int, epochs: int, patience: int | None) -> str:
    if done < epochs:
        return f"'{run}' is finished: a patience of {patience} ended it after {done} epochs"
    return (
        f"'{run}' is finished: it has all of its {done} epochs; `pyro-vae train --resume "
        f"{run}{checkpoints.allowing(run)} --epochs N` extends it to N of them"
    )


def _optimizer(part: Part, lr: float, parameters: Iterable[Tensor]) -> Optimizer:
    parameters = list(parameters)
    options = fused(find(part.name, "optimizer"), part.options, parameters)
    made: Optimizer = make(Part(part.name, options), "optimizer", params=parameters, lr=lr)
    return made


def _dumped(settings: Mapping[str, Any]) -> bytes:
    """Settings as YAML: parts as classes with their options, sequences as lists."""
    plain = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Part):
            plain[key] = value.plain()
        elif isinstance(value, tuple):
            plain[key] = list(value)
    try:
        return yaml.safe_dump(plain, sort_keys=False).encode()
    except yaml.YAMLError as error:
        raise ValueError(
            f"config.yaml holds numbers, words and lists, which {error.args[-1]!r} is none of; "
            f"put it into a class of your own"
        ) from error


def _free(name: str) -> Path:
    """The first free of runs/NAME-1, runs/NAME-2, ..."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _default_view(vae: VAE, dataset: Data) -> str:
    """Name of the view for the VAE's likelihood: dynamic, levels or none."""
    element = support(vae, *dataset.train.context)
    if element is constraints.boolean:
        return "dynamic"
    # Whole numbers up to 255 that are not divided by it are levels as they are.
    low, high = dataset.span
    fits = low >= 0 and high <= 1
    return "levels" if fits and element.is_discrete and bounds(element)[1] == 255 else "none"


def _default_threads(vae: VAE, batch_size: int) -> int:
    """One thread where a step's products are too small for several to wait for each other."""
    multiplications = batch_size * sum(parameter.numel() for parameter in vae.parameters())
    return 1 if multiplications < 2e7 else torch.get_num_threads()


def _summary(dataset: Data) -> str:
    names = ("training", "validation", "test")
    counts = [f"{len(part):,} {name}" for name, part in zip(names, dataset.splits, strict=True)]
    shape = "x".join(map(str, dataset.shape))
    share = dataset.missing
    missing = f", {share:.1%} of their values missing" if share else ""
    return f"{dataset.name}: {', '.join(counts)} data of shape {shape}{missing}"


def _described(vae: VAE, blueprint: Blueprint) -> str:
    kinds = ("prior", "likelihood", "posterior")
    names = [f"{getattr(blueprint, kind).name.split('.')[-1]} {kind}" for kind in kinds]
    count = sum(parameter.numel() for parameter in vae.parameters())
    return f"{', '.join(names)}, {blueprint.latent} latents, {count:,} parameters"
