"""Run folders: what a training run leaves behind, and how it is opened again.

A run holds ``config.yaml`` (the command that made it, resolved), ``model.json`` (the
blueprint of its VAE), ``metrics.jsonl`` (a line for each epoch), weights as safetensors and
pictures. Nothing in it is pickled, and opening it runs no code that it names.
"""

from __future__ import annotations

__all__ = ["blueprint", "create", "describe", "load", "restore", "save", "write"]

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from pyro_vae.parts import Blueprint
from pyro_vae.vae import VAE

FORMAT = 1


def create(folder: str | Path) -> Path:
    """Make the folder of a new run.

    Raises:
        FileExistsError: It exists and is no empty folder.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"'{path}' exists and is no empty folder; choose another one, so that nothing is lost"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file, flushed to the disk and renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def save(module: nn.Module, path: Path) -> None:
    """Write weights and buffers of `module` to a safetensors file."""
    state = {key: value.detach().contiguous() for key, value in module.state_dict().items()}
    write(path, safetensors.torch.save(state, {"format": str(FORMAT)}))


def restore(module: nn.Module, path: str | Path) -> None:
    """Read weights and buffers of `module` from a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds the weights of another model.
    """
    if not Path(path).is_file():
        others = ", ".join(sorted(each.name for each in Path(path).parent.glob("*.safetensors")))
        hint = f"; there are {others}, see --weights" if others else ""
        raise FileNotFoundError(f"there are no weights at '{path}'{hint}")
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"'{path}' holds the weights of another model: {reason}") from error


def describe(folder: Path, blueprint: Blueprint) -> None:
    """Write the blueprint of a run's VAE."""
    content = {"format": FORMAT, **blueprint.plain()}
    write(folder / "model.json", (json.dumps(content, indent=2) + "\n").encode())


def load(run: str | Path, *, weights: str = "best", allow: Collection[str] = ()) -> VAE:
    """Open a run: the VAE with its weights, in evaluation mode, on the CPU.

    Args:
        run: The run's folder.
        weights: ``best`` by the bound on the validation split, or ``last``.
        allow: Modules whose classes the run may use besides this package's; they are
            imported, so allow only what you trust.

    Raises:
        FileNotFoundError: The folder or one of its files is not there.
        ValueError: A file is damaged, or of a later format.
        PermissionError: The run names a class in a module that is not allowed.
    """
    vae = blueprint(run).build(allow=allow)
    restore(vae, Path(run) / f"{weights}.safetensors")
    return vae.eval()


def blueprint(run: str | Path) -> Blueprint:
    """Read the description of a run's VAE.

    Raises:
        FileNotFoundError: The folder or the file is not there.
        ValueError: The file is damaged, or of a later format.
    """
    path = Path(run) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{run}' is no run: there is no file '{path.name}' in it")
    try:
        content: Mapping[str, Any] = json.loads(path.read_text())
        number = content["format"]
        values = {key: value for key, value in content.items() if key != "format"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if number != FORMAT:
        raise ValueError(
            f"'{path}' has format {number} and this version reads format {FORMAT}; open it with "
            f"the version of pyro_vae that wrote it"
        )
    try:
        return Blueprint.of(values)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
