"""Data by name or by path: what is embedded, downloaded, or lies in your own files.

Example:
    >>> digits = load("digits", view=dynamic)
    >>> len(digits.train), digits.shape
    (1437, (1, 8, 8))
"""

from __future__ import annotations

__all__ = [
    "SOURCES",
    "Data",
    "Source",
    "Split",
    "dequantised",
    "dynamic",
    "folder",
    "levels",
    "load",
    "plain",
    "split",
    "threshold",
]

import difflib
import hashlib
import http.client
import io
import math
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pyro_vae.mapped import Array, Mapped, unreadable
from pyro_vae.splits import (
    Data,
    Split,
    dequantised,
    divide,
    dynamic,
    levels,
    plain,
    split,
    tensor,
    threshold,
)

# Elements of a sparse matrix that are worth unpacking: 32 GiB of them.
_MOST = 2**33
# Bytes of a .npy file that stays on disk.
_LARGE = 2**30
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def load(
    source: str | Path,
    *,
    directory: str | Path | None = None,
    download: bool = True,
    mapped: bool | None = None,
    **options: Any,
) -> Data:
    """Load a data set by name, or from a ``.npy``/``.npz`` file or a folder of either or images.

    Official splits are kept. An ``.npz`` file holds ``x`` (or one array of any name) with
    ``labels`` and ``context``, whatever else a datum brings as ``(N, features)`` or ``(N,)``,
    where there are any; or ``train``, with ``valid``/``validation`` and ``test`` and likewise
    ``train_labels``, ``train_context``; or a sparse matrix of ``scipy.sparse.save_npz``, which
    becomes its dense rows. Images in subfolders are labelled by their subfolder. A folder that
    holds ``.npy`` files and nothing else is one data set, their rows in the order of their names.

    Args:
        source: A name in `SOURCES`, or a path.
        directory: Folder that holds or receives the named sets; by default `folder`.
        download: Whether to fetch what is not there.
        mapped: Whether the rows of ``.npy`` files stay on disk, to be read when they are needed
            (`pyro_vae.mapped.Mapped`); by default those of a file of 1 GiB and more, and of a
            folder.
        options: How to divide it, as for `pyro_vae.splits.divide`.

    Raises:
        ValueError: An unknown name, a damaged file, values that cannot be used.
        FileNotFoundError: A path that is not there.
        ConnectionError: A download that failed.

    Warns:
        UserWarning: An ``.npz`` file holds arrays that look like data and are not read.
    """
    where = Path(directory).expanduser() if directory else folder()
    named, path = str(source) in SOURCES, Path(source).expanduser()
    if not named and not path.exists():
        raise _missing(str(source))
    files = [] if named else _files(path)
    if mapped and not files:
        raise ValueError(
            f"'{source}' cannot stay on disk, as .npy files can; save it as one, or leave out "
            f"`mapped`"
        )
    if mapped is None:
        mapped = bool(files) and (path.is_dir() or path.stat().st_size >= _LARGE)
    if named:
        parts = SOURCES[str(source)].read(where, download)
    elif files and (mapped or path.is_dir()):
        rows = Mapped.of(files, partial(_channels, path=path))
        parts = {"train": Split(rows if mapped else rows.read())}
    else:
        parts = {"train": _images(path)} if path.is_dir() else _arrays(path)
    return divide(parts, **{"name": str(source) if named else path.stem, **options})


def folder() -> Path:
    """The data folder: the environment's ``PYRO_VAE_DATA``, else ``~/.cache/pyro_vae``."""
    return Path(os.environ.get("PYRO_VAE_DATA") or Path.home() / ".cache" / "pyro_vae")


@dataclass(frozen=True)
class Source:
    """A data set that has a name.

    Attributes:
        about: What it holds.
        files: Its files within the data folder; none where it is embedded.
        read: From the data folder, and whether to download, to its official splits.
    """

    about: str
    files: tuple[str, ...]
    read: Callable[[Path, bool], dict[str, Split]]


def _digits(where: Path, download: bool) -> dict[str, Split]:
    from sklearn.datasets import load_digits  # half a second to import, for one of the sources

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16, dtype=torch.float32).unflatten(1, (1, 8, 8))
    return {"train": Split(x, labels=torch.as_tensor(labels))}


def _torchvision(name: str, where: Path, download: bool) -> dict[str, Split]:
    """MNIST or a set in its format, by torchvision, which checks and unpacks the archives."""
    from torchvision import datasets  # two seconds to import

    family, raw = getattr(datasets, name), where / name / "raw"
    try:
        sets = [family(str(where), train=train, download=download) for train in (True, False)]
    except PermissionError:
        raise
    except Exception as error:  # its readers let through what damage does to them
        files = [file for file, _ in family.resources]
        if all((raw / file).with_suffix("").exists() for file in files):
            raise ValueError(
                f"the files in {raw} are damaged; delete that folder and run again"
            ) from error
        raise ConnectionError(
            _undelivered(name, str(family.mirrors[0]), ", ".join(files), raw, error)
        ) from error
    train, test = (Split(each.data.unsqueeze(1), labels=each.targets) for each in sets)
    return {"train": train, "test": test}


_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_AMAT_SHA256 = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}


def _binarized_mnist(where: Path, download: bool) -> dict[str, Split]:
    path = where / "binarized_mnist.npz"
    if not path.exists():
        arrays = {}
        for key, digest in _AMAT_SHA256.items():
            name = f"binarized_mnist_{key}.amat"
            text = np.frombuffer(_fetch(_AMAT + name, where / name, digest, download), np.uint8)
            arrays[key] = (text[text > ord(" ")] - ord("0")).reshape(-1, 784)
        _keep(path, arrays)
    parts = _arrays(path)
    return {key: part.map(lambda x: x.reshape(-1, 1, 28, 28)) for key, part in parts.items()}


_FREY = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
_FREY_SHA256 = "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78"


def _frey_face(where: Path, download: bool) -> dict[str, Split]:
    path, original = where / "frey_face.npz", where / "frey_rawface.mat"
    if not path.exists():
        from scipy.io import loadmat

        raw = _fetch(_FREY, original, None, download)
        origin = original if original.exists() else _FREY
        try:
            images = np.ascontiguousarray(loadmat(io.BytesIO(raw))["ff"].T).astype(np.uint8)
        except Exception as error:
            raise ValueError(f"{origin} is no MATLAB file; fetch it anew") from error
        if hashlib.sha256(images.tobytes()).hexdigest() != _FREY_SHA256:
            raise ValueError(f"{origin} holds other pixels than the Frey Face; fetch it anew")
        _keep(path, {"images": images.reshape(-1, 28, 20)})
    return _arrays(path)


SOURCES: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits, 8x8, embedded in scikit-learn", (), _digits),
    "mnist": Source(
        "70,000 handwritten digits, 28x28",
        ("MNIST/raw",),
        partial(_torchvision, "MNIST"),
    ),
    "fashion-mnist": Source(
        "70,000 pieces of clothing, 28x28",
        ("FashionMNIST/raw",),
        partial(_torchvision, "FashionMNIST"),
    ),
    "kmnist": Source(
        "70,000 cursive Japanese characters, 28x28",
        ("KMNIST/raw",),
        partial(_torchvision, "KMNIST"),
    ),
    "binarized-mnist": Source(
        "70,000 digits in Larochelle's fixed binarisation, no labels",
        ("binarized_mnist.npz",),
        _binarized_mnist,
    ),
    "frey-face": Source(
        "1,965 frames of a face, 28x20, in the order of the video",
        ("frey_face.npz",),
        _frey_face,
    ),
}


def _missing(source: str) -> Exception:
    if Path(source).suffix or os.sep in source:
        return FileNotFoundError(f"there is no file or folder '{source}'; check the path")
    near = difflib.get_close_matches(source.lower(), SOURCES, n=1)
    hint = f"did you mean '{near[0]}'? There are" if near else "there are"
    return ValueError(
        f"unknown data set '{source}': {hint} {', '.join(SOURCES)}, or give a .npy or .npz "
        f"file or a folder of .npy files or images"
    )


def _files(path: Path) -> list[Path]:
    """The ``.npy`` files that a path is, or is a folder of and of nothing else."""
    found = [path]
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    return found if all(each.suffix == ".npy" and each.is_file() for each in found) else []


def _arrays(path: Path) -> dict[str, Split]:
    """The splits in a ``.npy`` or ``.npz`` file."""
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else _members(loaded)
        except Exception as error:  # zipfile, zlib and tokenize let through their own
            raise unreadable(path, error) from error
    if {"data", "format", "shape"} <= set(arrays):
        return {"train": Split(_dense(path))}
    if "train" in arrays:
        names = {
            "train": "train",
            "validation": "validation",
            "valid": "validation",
            "test": "test",
        }
        keys = [key for key in names if key in arrays]
        keys = [key for key in keys if key != "valid" or "validation" not in keys]
        ends = ("", "_labels", "_context")
        _warn_unused(arrays, [f"{key}{end}" for key in keys for end in ends], path)
        return {names[key]: _rows(arrays, key, f"{key}_", path) for key in keys}
    found = [key for key in arrays if key not in ("labels", "context")]
    key = "x" if "x" in arrays else found[0] if len(found) == 1 else None
    if key is None:
        raise ValueError(
            f"'{path}' holds the arrays {', '.join(arrays)}; name the data x, or "
            f"train, validation and test, as by numpy.savez('x.npz', x=...)"
        )
    _warn_unused(arrays, [key, "labels", "context"], path)
    return {"train": _rows(arrays, key, "", path)}


def _warn_unused(arrays: dict[str, Array], used: Sequence[str], path: Path) -> None:
    """Say which arrays that look like data, or have a value for each, are not read."""
    shape = np.shape(arrays[used[0]])
    unused = [
        name
        for name in arrays.keys() - set(used)
        if (found := np.shape(arrays[name]))
        if found[:1] == shape[:1] or (len(found) > 1 and found[1:] == shape[1:])
    ]
    if unused:
        warnings.warn(
            f"'{path}' also holds {', '.join(sorted(unused))}, which is not read; what is read is "
            f"x, or train, validation and test, with their labels and context",
            stacklevel=2,
        )


def _members(archive: Any) -> dict[str, Array]:
    """The arrays of an archive by name, unless a name would be a path."""
    for name in archive.files:
        if set(name) & {"/", "\\"}:
            raise ValueError(f"it has a member '{name}'")
    return dict(archive)


def _rows(arrays: dict[str, Array], key: str, prefix: str, path: Path) -> Split:
    """The array `key` with the labels and the context that belong to it."""
    labels, context = (
        tensor(arrays[name], f"the array '{name}' of '{path}'") if name in arrays else None
        for name in (f"{prefix}labels", f"{prefix}context")
    )
    if context is None:
        return Split(_channels(arrays[key], path), labels=labels)
    if context.dim() not in (1, 2):
        raise ValueError(
            f"the array '{prefix}context' of '{path}' has shape {tuple(context.shape)}; give "
            f"(N, features) or (N,)"
        )
    column = context.float().reshape(len(context), -1)
    return Split(_channels(arrays[key], path), (column,), labels)


def _dense(path: Path) -> torch.Tensor:
    """The dense rows of a sparse matrix, as float32: bytes in it are counts and no pixels."""
    from scipy import sparse

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            matrix = sparse.load_npz(path)
            if hasattr(matrix, "indptr"):  # or unpacking would read and write anywhere
                matrix.check_format(full_check=True)
                if (np.diff(matrix.indptr) < 0).any():
                    raise ValueError("the pointers decrease")
    except Exception as error:  # damage may raise anything
        raise ValueError(
            f"'{path}' is damaged or no sparse matrix; save it by scipy.sparse.save_npz"
        ) from error
    tensor(matrix.data, f"'{path}'")
    if (elements := math.prod(matrix.shape)) > _MOST:
        raise ValueError(
            f"'{path}' is sparse and would take {elements * 4 / 2**30:,.0f} GiB as the dense "
            f"{' x '.join(map(str, matrix.shape))} that training needs; keep fewer rows or columns"
        )
    return torch.from_numpy(matrix.astype(np.float32).toarray())


def _channels(array: Array, path: Path) -> torch.Tensor:
    """Images channel first: ``(N, H, W)`` gets one, and those of ``(N, H, W, C)`` are moved.

    C is 1, 3 or, in bytes, 4; other last axes are widths.
    """
    x = tensor(array, f"'{path}'")
    if x.dim() == 3:
        return x.unsqueeze(1)
    counts = (1, 3, 4) if x.dtype == torch.uint8 else (1, 3)
    if x.dim() == 4 and x.shape[-1] in counts and x.shape[1] not in counts:
        return x.permute(0, 3, 1, 2).contiguous()
    return x


def _images(path: Path) -> Split:
    """All images under a folder, in the order of their names."""
    found = (file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
    hidden = (".", "__MACOSX")  # of programs that look at images, and keep their own there
    files = sorted(
        file
        for file in found
        if file.is_file()
        and not any(part.startswith(hidden) for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(
            f"the folder '{path}' holds neither images ({', '.join(sorted(_IMAGES))}) nor "
            f".npy files and nothing else"
        )
    first = _image(files[0])
    x = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    for row, file in enumerate(files):
        image = _image(file)
        if image.shape != first.shape:
            channels, height, width = image.shape
            raise ValueError(
                f"'{file}' has {channels} channels, {height}x{width} pixels and '{files[0]}' has "
                f"{first.shape[0]} and {first.shape[1]}x{first.shape[2]}; make all images alike"
            )
        x[row] = image
    classes = sorted({file.parent for file in files})
    labels = [classes.index(file.parent) for file in files] if len(classes) > 1 else None
    return Split(x, labels=None if labels is None else torch.tensor(labels))


def _image(file: Path) -> torch.Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                deep, grey = image.mode[0] in "IF", image.mode in ("1", "L", "LA")
                # A JPEG of several is a photograph with its previews.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                pixels = np.array(image.convert("L" if grey else "RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"'{file}' unpacks to more pixels than is sane; remove it") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"'{file}' is damaged or no image; remove or replace it") from error
    if deep:  # Pillow has clipped it at 255
        raise ValueError(f"'{file}' has more than 8 bits a pixel; save it with 8 bits or as .npy")
    if frames > 1:
        raise ValueError(f"'{file}' holds {frames} images; save each in a file of its own")
    return torch.from_numpy(pixels[None] if grey else pixels.transpose(2, 0, 1))


def _fetch(address: str, path: Path, digest: str | None, download: bool) -> bytes:
    """The bytes of `path`, from `address` where it is not there, of the given SHA-256."""
    try:
        if path.exists():
            raw = path.read_bytes()
        elif not download:
            raise FileNotFoundError(f"{path} is not there")
        else:
            with urllib.request.urlopen(address, timeout=30) as answer:
                size = int(answer.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(answer, "read", total=size, desc=path.name) as stream:
                    raw = b"".join(iter(partial(stream.read, 1 << 20), b""))
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        place, name = path.parent, path.name
        raise ConnectionError(_undelivered(name, address, name, place, error)) from error
    if digest and hashlib.sha256(raw).hexdigest() != digest:
        origin = path if path.exists() else address
        raise ValueError(
            f"{origin} is not the published file (its SHA-256 differs); fetch it anew"
        )
    return raw


def _undelivered(name: str, address: str, files: str, place: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{name} could not be had from {address} ({reason}); put {files} into {place} by hand, "
        f"or use --data digits, which needs no download"
    )


def _keep(path: Path, arrays: dict[str, Array]) -> None:
    """Write an ``.npz`` file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".part")
    with partial_path.open("wb") as file:
        np.savez_compressed(file, **cast("dict[str, Any]", arrays))
    partial_path.replace(path)
