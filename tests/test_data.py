"""Data by name and by path: what was put in must come out, from files, folders and a server."""

import gc
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import struct
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from pyro_vae import data

WHOLE = {"validation": 0, "test": 0}


def whole(path):
    """All rows of a file or folder."""
    return data.load(path, **WHOLE).train


# Names and paths


def test_digits_are_scikit_learns():
    images, labels = load_digits(return_X_y=True)
    train = data.load("digits", **WHOLE).train
    assert train.x.shape == (1797, 1, 8, 8)
    assert train.x.flatten(1).double().numpy().tolist() == (images / 16).tolist()
    assert train.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mnits", "did you mean 'mnist'?"),
        ("MNIST", "did you mean 'mnist'?"),
        ("fashion_mnist", "did you mean 'fashion-mnist'?"),
        ("xyzzy", "there are digits, mnist, fashion-mnist"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(ValueError, match=re.escape(f"unknown data set '{name}': {near}")):
        data.load(name)


@pytest.mark.parametrize("name", ["none.npy", "none/", "none.npz"])
def test_a_missing_path_is_named(tmp_path, name):
    path = f"{tmp_path}/{name}"
    with pytest.raises(FileNotFoundError, match=f"no file or folder '{re.escape(path)}'"):
        data.load(path)


def test_the_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert data.folder() == tmp_path
    pixels = np.arange(20 * 560).reshape(20, 28, 20).astype(np.uint8)
    np.savez(tmp_path / "frey_face.npz", images=pixels)
    train = data.load("frey-face", download=False, **WHOLE).train
    assert train.x.tolist() == pixels[:, None].tolist()


def test_the_folder_is_in_the_users_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path)
    assert data.folder() == tmp_path / ".cache" / "pyro_vae"


def test_options_divide_and_name_the_data(tmp_path):
    np.save(tmp_path / "faces.npy", np.arange(40).reshape(20, 2))
    faces = data.load(tmp_path / "faces.npy", ordered=True, test=0.25, top=39, view=data.threshold)
    assert faces.name == "faces"
    assert faces.test.x.tolist() == np.arange(30, 40).reshape(5, 2).tolist()
    assert faces.test.batch()[0].unique().tolist() == [1]


# Files of arrays


def test_an_npy_file_is_its_array(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    assert whole(tmp_path / "x.npy").x.tolist() == values.tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["x", "images"])
@pytest.mark.parametrize("labels", [[2, 0, 1], np.array([2, 0, 1], np.uint16), [2.0, 0.0, 1.0]])
def test_an_npz_file_holds_one_array_and_labels(tmp_path, save, key, labels):
    save(tmp_path / "x.npz", **{key: np.arange(6.0).reshape(3, 2), "labels": labels})
    train = whole(tmp_path / "x.npz")
    assert train.x.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert train.labels.tolist() == [2, 0, 1]


def test_x_is_taken_where_there_are_other_arrays(tmp_path):
    x = np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "x.npz", genes=np.array(["a", "b"]), x=x, weights=np.ones(5))
    assert whole(tmp_path / "x.npz").x.tolist() == x.tolist()


@pytest.mark.parametrize(
    ("arrays", "unread"),
    [
        ({"x": np.eye(4), "y": np.arange(4)}, "y"),
        ({"x": np.eye(4), "test": np.ones((2, 4))}, "test"),
        ({"train": np.eye(4), "val": np.ones((2, 4)), "labels": np.arange(4)}, "labels, val"),
        ({"train": np.eye(4), "valid": np.ones((2, 4)), "validation": np.zeros((3, 4))}, "valid"),
    ],
)
def test_arrays_that_look_like_data_and_are_not_read_are_named(arrays, unread, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.warns(UserWarning, match=rf"x\.npz' also holds {unread}, which is not read"):
        data.load(tmp_path / "x.npz")


@pytest.mark.parametrize("context", [np.arange(3), np.arange(6.0).reshape(3, 2)])
@pytest.mark.parametrize("key", ["x", "images"])
def test_an_npz_file_may_hold_a_context(tmp_path, key, context):
    np.savez(tmp_path / "x.npz", context=context, **{key: np.eye(3)}, labels=[2, 0, 1])
    train = whole(tmp_path / "x.npz")
    assert train.x.tolist() == np.eye(3).tolist()
    assert [c.tolist() for c in train.context] == [context.reshape(3, -1).tolist()]
    assert train.context[0].dtype == torch.float32
    assert train.labels.tolist() == [2, 0, 1]


def test_official_splits_may_hold_a_context_each(tmp_path):
    arrays = {}
    for key, n in {"train": 5, "valid": 3, "test": 4}.items():
        arrays |= {key: np.full((n, 2), n), f"{key}_context": np.arange(n)}
    np.savez(tmp_path / "x.npz", **arrays)
    for part in data.load(tmp_path / "x.npz").splits:
        assert part.context[0].flatten().tolist() == list(range(len(part)))


def test_missing_values_of_a_file_are_kept_where_they_are_accepted(tmp_path):
    x = np.arange(40, dtype=float).reshape(20, 2)
    x[3, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(
        ValueError, match=r"1 NaN or infinite values, the first in row 3; .*missing"
    ):
        data.load(tmp_path / "x.npy")
    loaded = data.load(tmp_path / "x.npy", missing=True, **WHOLE).train.x
    np.testing.assert_array_equal(loaded.numpy(), x)


@pytest.mark.parametrize("validation", ["valid", "validation"])
def test_official_splits_of_an_npz_file_are_kept(tmp_path, validation):
    sizes = {"train": 5, validation: 3, "test": 4}
    arrays = {key: np.full((n, 2), n) for key, n in sizes.items()}
    labels = {f"{key}_labels": np.arange(n) for key, n in sizes.items()}
    np.savez(tmp_path / "x.npz", **arrays, **labels)
    for part, n in zip(data.load(tmp_path / "x.npz").splits, sizes.values(), strict=True):
        assert part.x.tolist() == [[n, n]] * n
        assert part.labels.tolist() == list(range(n))


def test_a_split_that_an_npz_file_lacks_is_cut_from_train(tmp_path):
    np.savez(tmp_path / "x.npz", train=np.zeros((20, 1)), test=np.ones((3, 1)), notes=np.ones(7))
    parts = data.load(tmp_path / "x.npz", validation=0.25).splits
    assert [part.x.flatten().tolist() for part in parts] == [[0] * 15, [0] * 5, [1] * 3]


@pytest.mark.parametrize(
    ("shape", "axes", "stored"),
    [
        ((5, 7), (0, 1), (5, 7)),
        ((5, 4, 6), (0, 1, 2), (5, 1, 4, 6)),
        ((5, 4, 6, 3), (0, 3, 1, 2), (5, 3, 4, 6)),
        ((5, 4, 6, 1), (0, 3, 1, 2), (5, 1, 4, 6)),
        ((5, 6, 7, 4), (0, 1, 2, 3), (5, 6, 7, 4)),
        ((5, 3, 4, 6), (0, 1, 2, 3), (5, 3, 4, 6)),
        ((5, 1, 4, 3), (0, 1, 2, 3), (5, 1, 4, 3)),
        ((5, 2, 3, 4, 3), (0, 1, 2, 3, 4), (5, 2, 3, 4, 3)),
    ],
)
def test_images_are_stored_channel_first(tmp_path, shape, axes, stored):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.save(tmp_path / "x.npy", array)
    x = whole(tmp_path / "x.npy").x
    assert x.tolist() == array.transpose(axes).reshape(stored).tolist()


@pytest.mark.parametrize(
    ("shape", "stored"), [((5, 6, 7, 4), (5, 4, 6, 7)), ((5, 4, 6, 7), (5, 4, 6, 7))]
)
def test_pixels_may_have_an_alpha_channel(tmp_path, shape, stored):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    assert whole(tmp_path / "x.npy").x.shape == stored


@pytest.mark.parametrize("dtype", ["?", "u1", "<u2", ">u4", ">i2", "<i8", "f2", ">f4", "f8", "g"])
def test_every_real_type_is_read(tmp_path, dtype):
    array = np.array([[0, 1], [1, 0]] if dtype == "?" else [[0, 100], [7, 3]]).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    assert whole(tmp_path / "x.npy").x.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"a": np.eye(3), "b": np.eye(3)}, "holds the arrays a, b; name the data x, or train"),
        ({"labels": np.arange(3)}, "holds the arrays labels; name the data x"),
        ({"x": np.array([["a"], ["b"]])}, r"x.npz' holds values of type <U1, not real numbers"),
        ({"x": np.full((3, 2), 1j)}, r"x.npz' holds values of type complex128, not real"),
        ({"x": np.eye(3), "labels": np.array(["cat"] * 3)}, "array 'labels' of .* type <U3"),
        ({"x": np.eye(3), "labels": np.arange(4)}, "3 rows of data and 4 of labels"),
        ({"x": np.eye(3), "labels": np.eye(3)}, "labels that are no classes"),
        ({"x": np.eye(3), "context": np.arange(4)}, "3 rows of data and 4 of labels or context"),
        ({"x": np.eye(3), "context": np.ones((3, 2, 2))}, r"'context' of .* \(3, 2, 2\); give"),
        ({"x": np.eye(3), "context": np.array(["a"] * 3)}, "array 'context' of .* type <U1"),
        (
            {"train": np.eye(3), "train_context": np.ones(3), "test": np.eye(3)},
            r"train has \(3,\) .* and 1 context features, test has \(3,\) .*; make them alike",
        ),
        (
            {"train": np.eye(3), "test": np.eye(2)},
            r"train has \(3,\) .*, test has \(2,\) .* alike",
        ),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        data.load(tmp_path / "x.npz")


# Sparse matrices


def counts(dtype=np.int32):
    values = np.random.default_rng(0).poisson(0.3, (30, 8)).astype(dtype)
    values[:, 0] = 120
    return values


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("array", ["matrix", "array"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float64])
def test_a_sparse_matrix_is_its_dense_counts(tmp_path, kind, array, dtype):
    matrix = getattr(sparse, f"{kind}_{array}")(counts(dtype))
    sparse.save_npz(tmp_path / "x.npz", matrix)
    train = whole(tmp_path / "x.npz")
    assert train.x.tolist() == counts().tolist()
    assert train.batch()[0].tolist() == counts().tolist()  # bytes too are counts


def spoil_sparse(path, **changes):
    """Save a sparse matrix some of whose arrays are others, or left out."""
    file = io.BytesIO()
    sparse.save_npz(file, sparse.csr_matrix(counts()))
    file.seek(0)
    arrays = {**np.load(file), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": np.full(30, 7)},
        {"indices": np.full(sparse.csr_matrix(counts()).nnz, 10**6)},
        {"indices": np.full(sparse.csr_matrix(counts()).nnz, -(10**6))},
        {"indptr": np.full(31, 5)},
        {"indptr": np.array([0, *[10**9] * 29, 0])},
        {"indptr": np.arange(31)[::-1]},
        {"indptr": None},
        {"shape": np.array([30])},
        {"shape": np.array([31, 8])},
        {"shape": np.array([-30, -8])},
        {"shape": np.array(["a", "b"])},
        {"format": np.array("xyz")},
        {"format": np.array(3)},
        {"data": np.ones(3)},
    ],
    ids=str,
)
def test_a_damaged_sparse_matrix_is_refused(tmp_path, changes):
    spoil_sparse(tmp_path / "x.npz", **changes)
    with pytest.raises(ValueError, match=r"x.npz' is damaged or no sparse matrix; save it by"):
        data.load(tmp_path / "x.npz")


def test_a_sparse_matrix_that_no_memory_holds_is_refused(tmp_path):
    spoil_sparse(tmp_path / "x.npz", shape=np.array([30, 10**12]))
    match = r"would take 111,759 GiB as the dense 30 x 1000000000000 that training needs; keep"
    with pytest.raises(ValueError, match=match):
        data.load(tmp_path / "x.npz")


def test_a_sparse_matrix_of_no_real_numbers_is_refused(tmp_path):
    sparse.save_npz(tmp_path / "x.npz", sparse.csr_matrix(1j * counts()))
    with pytest.raises(ValueError, match=r"x.npz' holds values of type complex128, not real"):
        data.load(tmp_path / "x.npz")


def test_objects_in_a_sparse_matrix_are_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    spoil_sparse(tmp_path / "x.npz", data=np.array([Marker(mark)], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects; save numbers with"):
        data.load(tmp_path / "x.npz")
    assert not mark.exists()


class Marker:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [np.save, lambda path, array: np.savez(path, x=array)])
def test_objects_are_refused_and_not_unpickled(tmp_path, save):
    path, mark = tmp_path / "x.npz", tmp_path / "mark"
    with path.open("wb") as file:
        save(file, np.array([Marker(mark)], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects; save numbers with"):
        data.load(path)
    assert not mark.exists()
    loaded = np.load(path, allow_pickle=True)  # as a reader who trusts the file would have it
    assert (loaded if isinstance(loaded, np.ndarray) else loaded["x"]).shape == (1,)
    assert mark.exists()


def test_a_pickle_is_refused_and_not_unpickled(tmp_path):
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Marker(tmp_path / "mark")))
    with pytest.raises(ValueError, match="is damaged or no NumPy file"):
        data.load(tmp_path / "x.npy")
    assert not (tmp_path / "mark").exists()


def saved(save):
    """Bytes of a file of 20 x 20 numbers."""
    file = io.BytesIO()
    save(file, np.random.default_rng(0).normal(size=(20, 20)))
    return file.getvalue()


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
@pytest.mark.parametrize("kept", [0, 3, 40, 100, 1500, -1])
def test_a_truncated_file_is_refused(tmp_path, save, kept):
    (tmp_path / "x.npz").write_bytes(saved(save)[:kept])
    with pytest.raises(ValueError, match=r"x.npz' is damaged or no NumPy file; save numbers"):
        data.load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"1,2\n3,4\n",
        saved(np.save).replace(b"}", b" "),
        saved(np.savez_compressed)[:500] + b"\xff" * 500 + saved(np.savez_compressed)[1000:],
    ],
    ids=["garbage", "csv", "header", "deflated"],
)
def test_damage_within_a_file_is_refused(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no NumPy file"):
        data.load(tmp_path / "x.npy")


# Folders of images


def paint(path, mode="L", size=(6, 5), seed=0):
    """Write an image of random pixels, width by height, and return them, channel first."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    array = np.array(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", [".png", ".BMP", ".ppm", ".tif"])
def test_a_folder_of_images_is_their_pixels_in_the_order_of_names(tmp_path, mode, ending):
    pixels = {f"{i}{ending}": paint(tmp_path / f"{i}{ending}", mode, seed=i) for i in (2, 0, 1)}
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    train = whole(tmp_path)
    assert (train.x.dtype, train.top, train.labels) == (torch.uint8, 255, None)
    assert train.x.tolist() == [pixels[name].tolist() for name in sorted(pixels)]


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("LA", 1), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_other_kinds_of_image_become_grey_or_colour(tmp_path, mode, channels):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    paint(path, mode)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB")).transpose(2, 0, 1)[:channels]
    assert whole(tmp_path).x[0].tolist() == expected.tolist()


def test_subfolders_are_labels(tmp_path):
    names = ["cats/0.png", "cats/1.png", "dogs/0.png"]
    pixels = [paint(tmp_path / name, seed=i).tolist() for i, name in enumerate(names)]
    train = whole(tmp_path)
    assert train.x.tolist() == pixels
    assert train.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"size": (4, 5)}, "has 1 channels, 5x4 pixels and"),
        ({"mode": "RGB"}, "has 3 channels, 5x6 pixels and"),
    ],
)
def test_unlike_images_are_refused_by_name(tmp_path, other, found):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    paint(tmp_path / "c.png", **other)
    match = f"c.png' {found} '.*a.png' has 1 and 5x6; make all images alike"
    with pytest.raises(ValueError, match=match):
        data.load(tmp_path)


def test_what_programs_keep_beside_images_is_no_data(tmp_path):
    for name in ("a.png", "b.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paint(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"no image")
    found = whole(tmp_path)
    assert len(found) == 2
    assert found.labels is None


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("kept", [0, 6, -30])
def test_a_damaged_image_is_refused_by_name(tmp_path, ending, kept):
    path = tmp_path / f"b.{ending}"
    paint(tmp_path / "a.png", size=(20, 20))
    paint(path, size=(20, 20))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"b.{ending}' is damaged or no image; remove"):
        data.load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [10, 40])  # an error above twice the limit, a warning below
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    paint(tmp_path / "a.png", size=(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"a.png' unpacks to more pixels than is sane"):
        data.load(tmp_path)


def test_deep_images_are_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png' has more than 8 bits a pixel; save it with 8"):
        data.load(tmp_path)


@pytest.mark.parametrize("ending", ["gif", "tif"])
def test_files_of_several_images_are_refused(tmp_path, ending):
    pages = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (0, 100, 200)]
    pages[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=rf"a.{ending}' holds 3 images; save each in a file of"):
        data.load(tmp_path)


def test_previews_of_a_photograph_are_no_images(tmp_path):
    pages = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (100, 200)]
    pages[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert whole(tmp_path).x.flatten().tolist() == [100] * 48


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds neither images \(.bmp, .gif, .jpeg"):
        data.load(tmp_path)


# Downloads


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what it was asked, or answers nonsense."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.nonsense:
            self.wfile.write(b"nonsense\r\n")
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine, whose files lie in its `folder`."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(Handler, directory=str(folder))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.asked, server.nonsense = folder, [], False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        stop(server)
        thread.join()


@pytest.fixture
def collected():
    """torchvision leaves the sockets of failed downloads to the garbage collector."""
    yield
    gc.collect()


def stop(server):
    """Refuse connections from here on."""
    server.shutdown()
    server.server_close()


def address(server):
    return f"http://127.0.0.1:{server.server_port}/"


def serve_mnist(server, monkeypatch):
    """A few rows in the four archives of MNIST; return the official splits."""
    arrays, resources = {"train": pixels(10, 28, 28), "test": pixels(5, 28, 28)}, []
    for prefix, x in zip(("train", "t10k"), arrays.values(), strict=True):
        labels = np.arange(len(x), dtype=np.uint8)
        for name, array in (("images-idx3", x), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            raw = gzip.compress(head + array.tobytes())
            (server.folder / f"{prefix}-{name}-ubyte.gz").write_bytes(raw)
            resources.append((f"{prefix}-{name}-ubyte.gz", hashlib.md5(raw).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address(server)])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return arrays


def serve_binarized(server, monkeypatch):
    """A few rows of bits in the three text files of Larochelle's MNIST."""
    arrays = {}
    for key, rows in (("train", 10), ("valid", 4), ("test", 5)):
        bits, path = pixels(rows, 28, 28) % 2, server.folder / f"binarized_mnist_{key}.amat"
        np.savetxt(path, bits.reshape(rows, 784), fmt="%d")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(data._AMAT_SHA256, key, digest)
        arrays["validation" if key == "valid" else key] = bits
    monkeypatch.setattr(data, "_AMAT", address(server))
    return arrays


def serve_frey(server, monkeypatch):
    """A few frames in the MATLAB file of the Frey Face, a column each."""
    frames = pixels(10, 28, 20)
    savemat(server.folder / "frey_rawface.mat", {"ff": frames.reshape(10, 560).T})
    monkeypatch.setattr(data, "_FREY", f"{address(server)}frey_rawface.mat")
    monkeypatch.setattr(data, "_FREY_SHA256", hashlib.sha256(frames.tobytes()).hexdigest())
    return {"train": frames}


def pixels(*shape):
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(params=["mnist", "binarized-mnist", "frey-face"])
def named(request, server, monkeypatch, tmp_path):
    """A named set on the local server: its name, its arrays and the folder for its files."""
    serve = {"mnist": serve_mnist, "binarized-mnist": serve_binarized, "frey-face": serve_frey}
    place = tmp_path / "MNIST" / "raw" if request.param == "mnist" else tmp_path
    return request.param, serve[request.param](server, monkeypatch), place


def check(name, arrays, directory, **options):
    """The set loads, and holds exactly what was published."""
    loaded = data.load(name, directory=directory, **WHOLE, **options)
    for key, part in zip(("train", "validation", "test"), loaded.splits, strict=True):
        assert part.x.tolist() == (arrays[key][:, None].tolist() if key in arrays else [])
        if name == "mnist":
            assert part.labels.tolist() == list(range(len(part)))


def test_a_download_is_what_was_published_and_is_kept(named, server, tmp_path):
    name, arrays, _ = named
    check(name, arrays, tmp_path)
    assert {path[1:] for path in server.asked} == {file.name for file in server.folder.iterdir()}
    stop(server)
    check(name, arrays, tmp_path)
    check(name, arrays, tmp_path, download=False)


def test_files_put_in_place_by_hand_need_no_server(named, server, tmp_path):
    name, arrays, place = named
    stop(server)
    shutil.copytree(server.folder, place, dirs_exist_ok=True)
    check(name, arrays, tmp_path)


FAILURES = {
    "missing": lambda server: shutil.rmtree(server.folder),
    "gone": stop,
    "nonsense": lambda server: setattr(server, "nonsense", True),
}


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_failed_download_says_what_to_put_where(named, server, tmp_path, fail):
    name, _, place = named
    files = [file.name for file in server.folder.iterdir()]
    fail(server)
    with pytest.raises(ConnectionError) as caught:
        data.load(name, directory=tmp_path)
    said = str(caught.value)
    assert f"could not be had from {address(server)}" in said
    assert f" into {place} by hand, or use --data digits" in said
    assert any(file in said for file in files)
    assert "\n" not in said


def test_nothing_is_asked_where_downloads_are_forbidden(named, server, tmp_path):
    name, _, place = named
    with pytest.raises(ConnectionError, match=f" into {re.escape(str(place))} by hand"):
        data.load(name, directory=tmp_path, download=False)
    assert server.asked == []


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_failed_download_of_mnist_names_all_archives_and_the_reason(
    server, monkeypatch, tmp_path
):
    serve_mnist(server, monkeypatch)
    files = ", ".join(name for name, _ in datasets.MNIST.resources)
    shutil.rmtree(server.folder)
    with pytest.raises(ConnectionError, match=rf"404.*put {files} into"):
        data.load("mnist", directory=tmp_path)


def test_a_wrong_file_is_refused_and_not_kept(named, server, tmp_path):
    name, arrays, _ = named
    file = min(server.folder.iterdir())
    right = file.read_bytes()
    file.write_bytes(b"wrong")
    match = {"mnist": "corrupted", "binarized-mnist": "SHA-256 differs", "frey-face": "no MATLAB"}
    with pytest.raises((ConnectionError, ValueError), match=match[name]):
        data.load(name, directory=tmp_path)
    assert name == "mnist" or list(tmp_path.iterdir()) == [server.folder]
    file.write_bytes(right)
    check(name, arrays, tmp_path)


@pytest.mark.parametrize("local", [False, True])
def test_other_pixels_than_the_frey_face_are_refused(server, monkeypatch, tmp_path, local):
    serve_frey(server, monkeypatch)
    place = tmp_path if local else server.folder
    savemat(place / "frey_rawface.mat", {"ff": pixels(560, 9)})
    origin = re.escape(f"{place if local else address(server)[:-1]}/frey_rawface.mat")
    with pytest.raises(ValueError, match=f"^{origin} holds other pixels than the Frey Face"):
        data.load("frey-face", directory=tmp_path)
    assert not (tmp_path / "frey_face.npz").exists()


def test_a_wrong_file_put_in_place_is_named(server, monkeypatch, tmp_path):
    serve_binarized(server, monkeypatch)
    file = tmp_path / "binarized_mnist_valid.amat"
    file.write_text("0 1 0")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is not the published file"):
        data.load("binarized-mnist", directory=tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 10, 500])
def test_a_truncated_file_on_disk_is_named(named, tmp_path, kept):
    name, arrays, place = named
    check(name, arrays, tmp_path)
    kind = "t10k-images-idx3-ubyte" if name == "mnist" else "*.npz"
    (file,) = place.glob(kind)
    file.write_bytes(file.read_bytes()[:kept])
    origin = re.escape(str(place if name == "mnist" else file))
    with pytest.raises(ValueError, match=rf"{origin}'? (are|is) damaged.* delete (that|it)"):
        data.load(name, directory=tmp_path)


def test_a_truncated_archive_is_fetched_anew(server, monkeypatch, tmp_path):
    arrays = serve_mnist(server, monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(server.folder, raw)
    file = raw / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    check("mnist", arrays, tmp_path)
    assert set(server.asked) == {"/t10k-images-idx3-ubyte.gz"}


# The published sets, where they have been downloaded


def published(name, directory):
    try:
        return data.load(name, directory=directory, download=False)
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("mnist", [54_000, 6_000, 10_000], (1, 28, 28)),
        ("binarized-mnist", [50_000, 10_000, 10_000], (1, 28, 28)),
        ("frey-face", [1_573, 196, 196], (1, 28, 20)),
    ],
)
def test_published_sets_have_their_sizes(data_dir, name, sizes, shape):
    loaded = published(name, data_dir)
    assert [len(part) for part in loaded.splits] == sizes
    assert loaded.shape == shape
    assert loaded.train.x.dtype == torch.uint8
    assert loaded.train.top == (1 if name == "binarized-mnist" else 255)


def test_mnist_is_mnist(data_dir):
    test = published("mnist", data_dir).test
    assert float(test.mean().mean()) == pytest.approx(0.133, abs=1e-3)
    assert test.labels.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


def test_binarized_mnist_is_bits_of_mnists_ink(data_dir):
    test = published("binarized-mnist", data_dir).test
    assert test.x.unique().tolist() == [0, 1]
    assert float(test.mean().mean()) == pytest.approx(0.133, abs=1e-3)
