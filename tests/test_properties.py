"""Whatever a user or a disk may hand over: used as it is, or refused in a documented way."""

import contextlib
import io
import math
import random
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pyro_vae import checkpoints, data

# The same examples in every run, so that a failure is one of the code and not of luck.
bounded = settings(max_examples=100, deadline=None, derandomize=True, database=None)

STATE = {
    "format": 1,
    "now": {"epoch": 3, "rows": [{"loss": 0.1, "epoch": 1}], "best": -math.inf, "mode": None},
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor(3), "": torch.ones(0)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "betas": (0.9, 0.999)},
    "odd": {"$tensor": "no tensor", "nested": [(1, [2, (3,)])]},
    "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
}
WHOLE = checkpoints.encode(STATE)


def equal(first, second):
    """Whether two trees are the same, types and the order of tensors in memory included."""
    if isinstance(first, torch.Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype
        return alike and torch.equal(memory(first), memory(second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        alike = type(first) is type(second) and len(first) == len(second)
        return alike and all(map(equal, first, second))
    return type(first) is type(second) and first == second


def memory(tensor):
    """The elements of a dense tensor in the order in which they lie in memory."""
    return torch.as_strided(tensor, [tensor.numel()], [1]) if tensor.numel() else tensor


def test_a_state_comes_back_as_it_was():
    assert equal(checkpoints.decode(WHOLE), STATE)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | arrays.arrays(
        np.float32,
        arrays.array_shapes(max_dims=3, max_side=3),
        elements=st.floats(-1, 1, width=32),
    ).map(lambda x: torch.from_numpy(x).movedim(0, -1)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@bounded
@given(trees)
def test_any_state_comes_back_as_it_was(tree):
    assert equal(checkpoints.decode(checkpoints.encode({"format": 1, "tree": tree}))["tree"], tree)


@bounded
@given(st.integers(0, len(WHOLE) - 1))
@example(0)
@example(8)
@example(len(WHOLE) - 1)
def test_every_beginning_of_a_checkpoint_is_refused(length):
    with pytest.raises(ValueError, match=r"no checkpoint|checksum"):
        checkpoints.decode(WHOLE[:length])


@bounded
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1))
def test_changed_bytes_of_a_checkpoint_are_noticed(changes):
    raw = bytearray(WHOLE)
    for place, change in changes:
        raw[place] ^= change
    assume(raw != WHOLE)
    with pytest.raises(ValueError, match=r"no checkpoint|checksum"):
        checkpoints.decode(bytes(raw))


def test_every_byte_of_a_checkpoint_counts():
    for place in range(len(WHOLE)):
        raw = bytearray(WHOLE)
        raw[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"no checkpoint|checksum"):
            checkpoints.decode(bytes(raw))


@bounded
@given(st.binary(max_size=200))
def test_no_other_file_is_a_checkpoint(raw):
    with pytest.raises(ValueError, match=r"no checkpoint|checksum"):
        checkpoints.decode(raw)


# Arrays from a user

KINDS = ["?", "i1", "u1", "<i2", ">i4", "<i8", "<u2", "<u4", ">u8", "<f2", ">f4", "<f8", "<c8"]
KINDS += ["S3", "<U2", "<M8[s]", "<m8[s]"]
kinds = st.sampled_from(KINDS).map(np.dtype)
shapes = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5) | st.tuples(
    st.integers(3, 12), st.integers(1, 3)
)
values = kinds.flatmap(lambda kind: arrays.arrays(kind, shapes))
small = kinds.flatmap(lambda kind: arrays.arrays(kind, shapes, elements=plain_elements(kind)))
views = st.sampled_from([data.plain, data.dynamic, data.threshold])
fractions = st.sampled_from([0, 0.1, 0.5, 0.99]) | st.floats(-1, 2)
tops = st.none() | st.floats(allow_nan=True) | st.sampled_from([1, 255, 1e-40])


def plain_elements(kind):
    """Numbers in [0, 1], which every view takes, and rarely one that is missing."""
    if kind.kind == "f":
        return st.sampled_from([0.0, 0.25, 1.0, math.nan])
    return st.integers(0, 1) if kind.kind in "iu" else None


@contextlib.contextmanager
def refused():
    """Lets pass what is documented: a ValueError that says in one sentence what is wrong."""
    caught = None
    try:
        yield
    except ValueError as error:
        caught = error
    if caught:
        # Raised where it is documented, and not let through from whatever was called.
        raised = traceback.extract_tb(caught.__traceback__)[-1]
        assert Path(raised.filename).parent == Path(data.__file__).parent, caught
        assert "\n" not in str(caught)


def check(loaded, x, missing):
    """All that was given is there, in one split each, and finite."""
    parts = [part.x.double().numpy() for part in loaded.splits]
    assert sum(map(len, parts)) == len(x)
    given = np.sort(np.asarray(x).astype(np.float64).ravel())
    found = np.sort(np.concatenate([part.ravel() for part in parts]))
    np.testing.assert_allclose(found, given, rtol=1e-6, atol=1e-37)
    for part in loaded.splits:
        scored, *context = part.batch(torch.Generator().manual_seed(0))
        assert scored.isfinite().logical_or(scored.isnan() & missing).all()
        assert all(each.isfinite().all() for each in context)
        assert sum(len(batch[0]) for batch in part.batches(2)) == len(part)
    assert loaded.train.mean().isfinite().all()
    if loaded.train.x.dtype != torch.bool:
        sized = loaded.sized()
        assert all(part.context[-1].isfinite().all() for part in sized.splits)


@bounded
@given(values | small, views, fractions, fractions, tops, st.booleans(), st.booleans())
@example(np.full((3, 2), 2**63 + 5, ">u8"), data.plain, 0, 0, None, False, False)
@example(np.ones((3, 2), "i1"), data.plain, 0, 0, 1e-40, False, False)
@example(np.zeros((3, 2), "i1"), data.plain, 0, 0, 1e-91, False, False)
@example(np.array([[1e-38], [3e38]], "f4"), data.plain, 0.5, 0, None, False, True)
@example(np.array([[3e38], [1e-38]], "f4"), data.plain, 0.5, 0, None, False, True)
@example(np.ones((3, 2), "f4"), data.plain, 0, 0, math.inf, False, False)
def test_any_array_is_split_or_refused(x, view, validation, test, top, missing, ordered):
    options = {"view": view, "validation": validation, "test": test, "top": top}
    with refused():
        check(data.split(x, missing=missing, ordered=ordered, **options), x, missing)


@bounded
@given(st.data(), st.integers(1, 8))
def test_any_context_and_labels_are_taken_or_refused(drawn, count):
    rows = st.just((count,)) | st.just((count, 2)) | shapes
    context, labels = (
        drawn.draw(kinds.flatmap(lambda kind: arrays.arrays(kind, rows))) for _ in range(2)
    )
    x = np.zeros((count, 3), np.float32)
    labels = drawn.draw(st.just(labels) | st.none())
    with refused():
        loaded = data.split(x, context, labels=labels)
        check(loaded, x, False)
        check(loaded.conditioned(), x, False)


@pytest.mark.filterwarnings("ignore:.*also holds")
@bounded
@given(
    st.dictionaries(st.sampled_from(["x", "train", "test", "labels", "y"]), small), st.booleans()
)
def test_any_archive_is_read_or_refused(content, packed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        (np.savez_compressed if packed else np.savez)(path, **content)
        with refused():
            loaded = data.load(path)
            assert all(part.batch()[0].isfinite().all() for part in loaded.splits)


@pytest.mark.parametrize("labels", [[0, 2**40, 1], [0, 5000, 1]])
def test_labels_far_above_the_count_of_data_are_no_classes(labels):
    loaded = data.split(np.zeros((3, 2)), labels=np.array(labels), validation=0, test=0)
    with pytest.raises(ValueError, match="number the classes from 0"):
        loaded.conditioned()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..\\x"])
def test_an_archive_whose_names_are_paths_is_refused(name, tmp_path):
    np.savez(tmp_path / "x.npz", **{name: NUMBERS})
    with pytest.raises(ValueError, match=r"x\.npz' is damaged or no NumPy file"):
        data.load(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def saved(save, *arguments, **named):
    file = io.BytesIO()
    save(file, *arguments, **named)
    return file.getvalue()


NUMBERS = np.linspace(0, 1, 60, dtype=np.float32).reshape(20, 3)
FILES = {
    "x.npy": saved(np.save, NUMBERS),
    "x.npz": saved(np.savez, x=NUMBERS, labels=np.arange(20)),
    "y.npz": saved(np.savez_compressed, train=NUMBERS, test=NUMBERS),
}


@bounded
@given(st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False), st.booleans())
def test_any_damage_to_a_file_of_arrays_is_read_or_refused(name, rng: random.Random, cut):
    raw = bytearray(FILES[name])
    for _ in range(rng.randint(1, 4)):
        # Mostly where the format is described, and not the numbers.
        place = rng.randrange(min(128, len(raw)) if rng.random() < 0.7 else len(raw))
        raw[place] = rng.randrange(256)
    if cut:
        del raw[rng.randrange(len(raw)) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        with refused():
            loaded = data.load(path)
            assert all(part.batch()[0].isfinite().all() for part in loaded.splits)
