"""Run folders: what a training run leaves behind, and how it is opened again.

A run holds ``config.yaml`` (the command that made it, resolved), ``model.json`` (the
blueprint of its VAE), ``metrics.jsonl`` (a line for each epoch), weights and checkpoints as
safetensors and pictures. Nothing in it is pickled, and opening it runs no code that it names.

A checkpoint is one safetensors file: tensors under the path by which they are reached in a
tree of plain values, and that tree as JSON in the metadata, under a checksum of the whole file.
"""

from __future__ import annotations

__all__ = [
    "FORMAT",
    "HEADER",
    "allowing",
    "began",
    "blueprint",
    "check_header",
    "create",
    "decode",
    "describe",
    "encode",
    "keep",
    "load",
    "newest",
    "of_python",
    "restore",
    "save",
    "save_state",
    "write",
]

import contextlib
import copy
import hashlib
import json
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pyro_vae.parts import KINDS, Blueprint
from pyro_vae.vae import VAE

FORMAT = 1  # of every file of a run; a later one may hold what this version does not know
HEADER = f"# A run of pyro_vae, format {FORMAT}"  # first line of its configuration
_KEPT = 2  # checkpoints of a run, besides its best weights
_BLANK = "0" * 64  # where the checksum stands, while it is computed
_SEAL = re.compile(rb'"format":"\d+, sha256 ([0-9a-f]{64})"')


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
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # none of another process
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that can no longer be written to
            part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # where folders are not files
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may not outlive a power cut
        finally:
            os.close(folder)


def save(module: nn.Module, path: Path) -> None:
    """Write weights and buffers of `module` to a safetensors file."""
    save_state(module.state_dict(), path)


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights and buffers, given by name, to a safetensors file."""
    # Each in memory of its own, also where two parts of a model share weights.
    whole = torch.contiguous_format
    tensors = {key: value.detach().clone(memory_format=whole) for key, value in state.items()}
    # In one entry, since several of them come in any order, and equal weights are equal files.
    metadata = {"format": f"{FORMAT}, sha256 {_BLANK}"}
    write(path, _sealed(safetensors.torch.save(tensors, metadata)))


def restore(module: nn.Module, path: str | Path) -> None:
    """Read weights and buffers of `module` from a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of a later format, or holds the weights of another
            model.
    """
    if not Path(path).is_file():
        others = ", ".join(sorted(each.name for each in Path(path).parent.glob("*.safetensors")))
        hint = f"; there are {others}, see --weights" if others else ""
        raise FileNotFoundError(f"there are no weights at '{path}'{hint}")
    raw = Path(path).read_bytes()
    if _whole(raw) is False:  # None where another tool, or an earlier version, wrote it
        raise ValueError(f"'{path}' is damaged: its checksum differs")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            number = re.match(r"\d+", (file.metadata() or {}).get("format", ""))
        state = safetensors.torch.load(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    if number:
        _check_format(int(number[0]), path)
    before = copy.deepcopy(module.state_dict())
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        module.load_state_dict(before)  # since those that fitted were taken
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
        ValueError: A file is damaged, or of a later format, or the weights are no plain name.
        PermissionError: The run names a class in a module that is not allowed.
    """
    if not re.fullmatch(r"[\w-]+", weights):
        raise ValueError(f"weights are a name in the run's folder, such as best, not '{weights}'")
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
        if of_python(run):
            raise FileNotFoundError(
                f"'{run}' was trained from Python, and has weights but no description of their "
                f"VAE; make it there as before, and give it its weights by "
                f"pyro_vae.restore(vae, '{Path(run) / 'best.safetensors'}')"
            )
        raise FileNotFoundError(f"'{run}' is no run: there is no file '{path.name}' in it")
    try:
        content: Mapping[str, Any] = json.loads(path.read_text())
        number = content["format"]
        values = {key: value for key, value in content.items() if key != "format"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    _check_format(number, path)
    try:
        return Blueprint.of(values)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error


def of_python(run: str | Path) -> bool:
    """Whether a folder holds what `pyro_vae.fit` has written, and nothing of the command line."""
    path = Path(run)
    return (path / "metrics.jsonl").is_file() and not (path / "config.yaml").exists()


def allowing(run: str | Path) -> str:
    """Return the options `` --allow MODULE`` by which a command goes on with a run, if any."""
    path = Path(run) / "config.yaml"
    text = path.read_text(errors="replace") if path.is_file() else ""
    homes = {home.__name__ for _, *homes in KINDS.values() for home in homes}
    modules = dict.fromkeys(re.findall(r"class_path: ([\w.]+)\.\w+$", text, re.M))
    return "".join(f" --allow {module}" for module in modules if module not in homes)


def check_header(content: str, path: Path) -> None:
    """Refuse a configuration of a later format; an earlier one may not say which it has.

    Raises:
        ValueError: It is of a later format.
    """
    if found := re.match(r"# A run of pyro_vae, format (\d{1,9})\n", content):
        _check_format(int(found[1]), path)


def encode(tree: Mapping[str, Any]) -> bytes:
    """Return a tree of plain values and tensors as a safetensors file with a checksum.

    Args:
        tree: Numbers, words, None, tensors, and dictionaries, lists and tuples of them.

    Raises:
        TypeError: It holds something else; the message says where.

    Example:
        >>> decode(encode({"format": 1, "pair": (1, torch.ones(2))}))
        {'format': 1, 'pair': (1, tensor([1., 1.]))}
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_packed(tree, "", tensors))
    metadata = {"content": content, "format": f"{FORMAT}, sha256 {_BLANK}"}
    return _sealed(safetensors.torch.save(tensors, metadata))


def decode(raw: bytes) -> dict[str, Any]:
    """Return the tree that `encode` was given.

    Raises:
        ValueError: It is damaged, in whatever byte, or of a later format.
    """
    if not (whole := _whole(raw)):
        raise ValueError("its checksum differs" if whole is False else "it is no checkpoint")
    size = int.from_bytes(raw[:8], "little")
    try:
        content = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["content"])
        number = content["format"]
        if type(number) is int and number <= FORMAT:
            return _unpacked(content, safetensors.torch.load(raw))
    except Exception as error:  # whatever a file that was made to mislead may cause
        raise ValueError(f"it holds no state of a run ({error})") from error
    raise _later(number, "it")


def keep(folder: Path, step: int, tree: Mapping[str, Any]) -> None:
    """Write a checkpoint, and remove all but the newest ones.

    Args:
        folder: Where a run has its checkpoints.
        step: The step after which it is, by which it is named.
        tree: As for `encode`.
    """
    write(folder / f"{step:09}.safetensors", encode({"format": FORMAT, **tree}))
    for path in _checkpoints(folder)[_KEPT:]:
        path.unlink()


def newest(folder: Path) -> dict[str, Any] | None:
    """Return what the newest checkpoint that is whole holds; None where there is none at all.

    A damaged one is told of, and put aside.

    Raises:
        ValueError: All are damaged, or one is of a later format.
    """
    paths = _checkpoints(folder)
    for path, *older in (paths[index:] for index in range(len(paths))):
        try:
            return decode(path.read_bytes())
        except ValueError as error:
            if isinstance(error, _LaterError):
                raise _LaterError(f"'{path}' is not read: {error}") from error
            if not older:
                raise ValueError(
                    f"'{path}' is damaged: {error}; there is no other checkpoint to go on "
                    f"from; train anew into another folder"
                ) from error
            warnings.warn(
                f"'{path}' is damaged: {error}; it is put aside, and '{older[0].name}' before it "
                f"is taken",
                stacklevel=2,
            )
            path.replace(path.with_suffix(".damaged"))
    return None


def began(folder: Path) -> Mapping[str, Any]:
    """Return the settings in the head of the newest checkpoint; none where it has none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        path = _checkpoints(folder)[0]
        with path.open("rb") as file:
            size = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            content = json.loads(json.loads(file.read(size))["__metadata__"]["content"])
        return {**content["settings"]}
    return {}


def _sealed(raw: bytes) -> bytes:
    """A safetensors file with the checksum of all of its bytes in its place."""
    found = _SEAL.search(raw)
    assert found, "no place for a checksum"
    digest = hashlib.sha256(raw).hexdigest().encode()
    return b"".join([raw[: found.start(1)], digest, raw[found.end(1) :]])


def _whole(raw: bytes) -> bool | None:
    """Whether a file has the checksum that it says; None where it says none."""
    size = int.from_bytes(raw[:8], "little")
    found = _SEAL.search(raw, 8, min(8 + size, len(raw)))
    if not found:
        return None
    digest = hashlib.sha256(raw[: found.start(1)])
    digest.update(_BLANK.encode())
    digest.update(memoryview(raw)[found.end(1) :])
    return digest.hexdigest().encode() == found[1]


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("*.safetensors") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def _packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON has it, its tensors put into `tensors` by their place."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and not value.is_sparse:
        each = value.detach()
        # A copy, since a safetensors file has no two tensors in one memory.
        tensors[where] = each.cpu().contiguous().clone()
        ordered = each.is_contiguous() or not _filled(each.shape, each.stride())
        return {"$tensor": where, "$strides": None if ordered else list(each.stride())}
    if isinstance(value, float):  # NumPy's, for one
        return float(value)
    if type(value) in (list, tuple):
        items = [_packed(each, f"{where}.{i}", tensors) for i, each in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) in (dict, Counter):
        if not all(type(key) in (str, int) for key in value):
            raise TypeError(f"'{where[1:]}' has keys that are neither words nor whole numbers")
        pairs = [[key, _packed(each, f"{where}.{key}", tensors)] for key, each in value.items()]
        if type(value) is dict and all(type(k) is str and k[:1] != "$" for k in value):
            return dict(pairs)
        return {"$dict" if type(value) is dict else "$counter": pairs}
    raise TypeError(
        f"'{where[1:]}' is a {type(value).__name__}, which is neither a tensor nor plain values"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        stored, strides = tensors[value["$tensor"]], value["$strides"]
        # Anew, aligned as torch does it: on where a tensor begins the last digits may depend.
        if strides is None:
            return stored.clone()
        if not _filled(stored.shape, strides):
            raise ValueError("strides that leave gaps")
        return torch.empty_strided(stored.shape, strides, dtype=stored.dtype).copy_(stored)
    if "$tuple" in value:
        return tuple(_unpacked(each, tensors) for each in value["$tuple"])
    if "$dict" in value or "$counter" in value:
        pairs = {k: _unpacked(v, tensors) for k, v in next(iter(value.values()))}
        return pairs if "$dict" in value else Counter(pairs)
    return {key: _unpacked(each, tensors) for key, each in value.items()}


def _filled(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides fill their memory, in whatever order."""
    room = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != room:
                return False
            room *= size
    return True


def _check_format(number: Any, path: str | Path) -> None:
    if type(number) is not int:
        raise ValueError(f"'{path}' is damaged: its format is {number!r}, no number")
    if number > FORMAT:
        raise _later(number, f"'{path}'")


class _LaterError(ValueError):
    """A file of a later version."""


def _later(number: Any, name: str) -> _LaterError:
    return _LaterError(
        f"{name} has format {number} and this version reads formats up to {FORMAT}; upgrade "
        f"pyro_vae"
    )
