"""Rows on disk: the data that they are in memory, shuffled, and a few of them read at a time."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from test_data import Marker
from test_progress import stopped

from pyro_vae import MLP, VAE, data, fit, likelihoods, mapped, parts, posteriors, priors, splits
from pyro_vae.cli import main
from pyro_vae.mapped import Mapped
from pyro_vae.parts import Blueprint, Part
from pyro_vae.splits import Split, dynamic, levels

WHOLE = {"validation": 0, "test": 0}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Blocks of 64 bytes and windows of 512."""
    monkeypatch.setattr(mapped, "_BLOCK", 64)
    monkeypatch.setattr(mapped, "_WINDOW", 512)


@pytest.fixture
def opened(monkeypatch):
    """Every read as the file and the number of its rows."""
    found, pieces = [], Mapped._pieces

    def noting(self, spans):
        for piece in pieces(self, spans):
            found.append((piece.path.name, piece.stop - piece.start))
            yield piece

    monkeypatch.setattr(Mapped, "_pieces", noting)
    return found


def numbers(rows=1000, width=4):
    """Rows whose values tell their number."""
    return np.arange(rows * width, dtype=np.float32).reshape(rows, width)


def saved(folder, array, sizes=None):
    """Write an array to a file, or to a folder of some files of those sizes."""
    folder.mkdir(exist_ok=True)
    if sizes is None:
        np.save(folder / "x.npy", array)
        return folder / "x.npy"
    for number, part in enumerate(np.split(array, np.cumsum(sizes)[:-1])):
        np.save(folder / f"{number}.npy", part)
    return folder


def rows(array, folder, sizes=None):
    """All rows of an array as a split on disk."""
    return data.load(saved(folder, array, sizes), mapped=True, **WHOLE).train


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


def order(part, seed=0, size=16, **options):
    """Numbers of the rows in the order of an epoch."""
    batches = part.stored(size, fixed(seed), **{"shuffle": True, **options})
    return [int(n) for (x,) in batches for n in x[:, 0] / x.shape[1]]


# The same rows as in memory


@pytest.mark.parametrize("sizes", [None, [1000], [300, 1, 0, 699]])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_splits_are_those_in_memory(tmp_path, sizes, ordered):
    path = saved(tmp_path / "d", numbers(), sizes)
    disk, memory = (data.load(path, mapped=m, ordered=ordered, seed=3) for m in (True, False))
    for one, other in zip(disk.splits, memory.splits, strict=True):
        assert isinstance(one.x, Mapped)
        assert isinstance(other.x, torch.Tensor)
        assert one.x.read().equal(other.x)
        assert one.batch()[0].equal(other.batch()[0])
        assert (one.x.shape, one.x.dtype, repr(one)) == (other.x.shape, other.x.dtype, repr(other))
    assert disk.span == memory.span
    assert disk.missing == memory.missing == 0
    assert disk.train.mean().equal(memory.train.mean())


def test_many_rows_are_divided_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_BLOCKS", 90)  # of 12 rows, and one of 4
    loaded = data.load(saved(tmp_path, numbers()), mapped=True, validation=0.2, test=0.1)
    found = [(part.x.read()[:, 0] / 4).int() for part in loaded.splits]
    assert torch.cat(found).sort().values.tolist() == list(range(1000))
    assert [len(part) for part in found][1:] == pytest.approx([200, 100], abs=12)
    for part in found[1:]:
        starts = part[part % 12 == 0]
        assert len(starts) >= 8
        assert all(n in part for start in starts for n in range(start, min(start + 12, 1000)))


@pytest.mark.parametrize("act", [
    lambda x: x[10:20], lambda x: x[-7:], lambda x: x[:0], lambda x: x[900:100],
    lambda x: x[torch.tensor([7, 3, 3, -1])], lambda x: x[torch.arange(1000) % 3 == 0],
    lambda x: x[5:900][100:][:50],
])  # fmt: skip
def test_slices_and_indices_are_those_of_a_tensor(tmp_path, act):
    part = rows(numbers(), tmp_path / "d", [300, 1, 699])
    found, expected = act(part.x), act(torch.from_numpy(numbers()))
    assert len(found) == len(expected)
    assert (found.read() if isinstance(found, Mapped) else found).equal(expected)


def test_nothing_is_read_before_it_is_needed(tmp_path, opened):
    part = rows(numbers().astype(np.int32), tmp_path / "d", [300, 700])
    part[100:][torch.arange(3)]
    assert sum(count for _, count in opened[-3:]) == 3
    assert len(opened) < 10


def test_files_are_found_from_another_folder(tmp_path, monkeypatch):
    path = saved(tmp_path, numbers())
    monkeypatch.chdir(tmp_path)
    part = data.load(path.name, mapped=True, **WHOLE).train
    monkeypatch.chdir("/")
    assert part.x.read().equal(torch.from_numpy(numbers()))


def test_steps_and_rows_that_are_not_there_are_refused(tmp_path):
    x = rows(numbers(10), tmp_path).x
    with pytest.raises(ValueError, match="sliced one after the other, not by 2"):
        x[::2]
    with pytest.raises(IndexError, match="there are 10 rows"):
        x[torch.tensor([10])]


@pytest.mark.parametrize("dtype", ["?", "u1", "<u2", ">u4", ">i2", "<i8", "f2", ">f4", "f8", "g"])
@pytest.mark.parametrize("shape", [(20, 7), (20, 2, 3), (20, 4, 5, 3), (20, 3, 4, 5)])
def test_every_type_and_shape_is_read_as_in_memory(tmp_path, dtype, shape):
    values = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)
    path = saved(tmp_path, values)
    disk, memory = (data.load(path, mapped=m, **WHOLE).train for m in (True, False))
    assert (disk.x.dtype, disk.x.shape, disk.top) == (memory.x.dtype, memory.x.shape, memory.top)
    assert disk.x.read().equal(memory.x)


@settings(max_examples=40, deadline=None)
@given(
    values=arrays.arrays(
        st.sampled_from(["u1", "i4", "f4", ">f8"]),
        st.tuples(st.integers(1, 40), st.integers(1, 5)),
        elements=st.integers(0, 100),
    ),
    size=st.integers(1, 50),
    shuffle=st.booleans(),
    skip=st.integers(0, 3),
    block=st.sampled_from([1, 10, 64]),
    window=st.sampled_from([1, 64, 512]),
)
def test_batches_of_any_rows_are_whole_and_each_row_comes_once(
    tmp_path_factory, values, size, shuffle, skip, block, window
):
    values[:, 0] = np.arange(len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "_BLOCK", block)
        patch.setattr(mapped, "_WINDOW", window)
        part = rows(values, tmp_path_factory.mktemp("rows"))
        batches = [x for (x,) in part.stored(size, fixed(), shuffle=shuffle)]
        later = [x for (x,) in part.stored(size, fixed(), shuffle=shuffle, skip=skip)]
    assert [len(x) for x in batches[:-1]] == [size] * ((len(values) - 1) // size)
    found = torch.cat(batches)
    assert found[found[:, 0].argsort()].tolist() == values.tolist()
    assert [x.tolist() for x in later] == [x.tolist() for x in batches[skip:]]


# Orders


@pytest.mark.parametrize("sizes", [None, [300, 1, 699]])
def test_each_seed_and_each_epoch_has_an_order_of_its_own(tmp_path, sizes):
    part = rows(numbers(), tmp_path / "d", sizes)
    first, again, other = (order(part, seed) for seed in (0, 0, 1))
    assert sorted(first) == list(range(1000))
    assert first == again != other
    generator = fixed()
    epochs = [torch.cat([x for (x,) in part.stored(16, generator, shuffle=True)]) for _ in "ab"]
    assert not epochs[0].equal(epochs[1])
    assert order(part, shuffle=False) == list(range(1000))


def test_shards_have_the_order_of_the_whole(tmp_path):
    assert order(rows(numbers(), tmp_path / "a")) == order(
        rows(numbers(), tmp_path / "b", [300, 1, 699])
    )


def test_the_order_depends_on_one_draw_of_the_generator(tmp_path):
    part, one, other = rows(numbers(), tmp_path), fixed(), fixed()
    next(part.stored(16, one, shuffle=True))
    list(part.stored(7, other, shuffle=True))
    assert one.get_state().equal(other.get_state())


@pytest.mark.parametrize("skip", [0, 1, 2, 17, 61, 62, 63, 100])
def test_skipped_batches_are_left_out_and_their_windows_not_read(tmp_path, opened, skip):
    part = rows(numbers(), tmp_path)
    every = order(part)
    opened.clear()
    assert order(part, skip=skip) == every[16 * skip :]
    # A window has 8 blocks of 4 rows.
    left = 1000 - 16 * skip // 32 * 32 if 16 * skip < 1000 else 0
    assert sum(count for _, count in opened) == left


def test_in_memory_batches_are_skipped_alike():
    part = data.split(numbers(), **WHOLE).train
    assert order(part, skip=3) == order(part)[48:]


def test_the_rows_of_a_block_are_spread_over_its_window(tmp_path):
    """Where a block of 4 comes in a window of 8, and a row in it, is uniform."""
    part, places, windows = rows(numbers(64), tmp_path), [], []
    for seed in range(400):
        found = order(part, seed)
        places.append(found.index(5) % 32)
        windows.append(found.index(5) // 32)
    # each a false alarm in a million seeds
    assert stats.chisquare(np.bincount(places, minlength=32)).pvalue > 1e-6
    assert stats.binomtest(sum(windows), 400, 0.5).pvalue > 1e-6


def test_windows_are_of_blocks_from_everywhere(tmp_path):
    """The mean number of the first window's rows has the variance of 8 blocks of 250."""
    part = rows(numbers(), tmp_path)
    means = [np.mean(order(part, seed)[:32]) for seed in range(100)]
    variance = 1000**2 / 12 / 8 * (1 - 8 / 250)
    assert stats.kstest(means, stats.norm(499.5, variance**0.5).cdf).pvalue > 1e-6


def test_rows_of_one_window_are_shuffled_fully(tmp_path):
    part = rows(numbers(6, 1), tmp_path)
    found = [tuple(order(part, seed)) for seed in range(2160)]
    counts = [found.count(each) for each in itertools.permutations(range(6))]
    assert stats.chisquare(counts).pvalue > 1e-6


# Context, devices, views


def test_context_and_labels_follow_their_rows(tmp_path):
    x = Mapped.of([saved(tmp_path, numbers())], torch.tensor)
    n = torch.arange(1000)
    for whole in (True, False):
        options = WHOLE if whole else {"validation": 0.2, "test": 0.3}
        loaded = splits.divide({"train": Split(x, (2.0 * n[:, None],), n % 7)}, **options)
        for part in loaded.conditioned().splits:
            for rows, context, code in part.batches(100, fixed(), shuffle=True):
                assert context.equal(rows[:, :1] / 2)
                assert code.argmax(1).equal((rows[:, 0] / 4).long() % 7)
            if len(part):
                index = torch.arange(len(part))[-3:]
                assert part[index].context[0].equal(part[index].x[:, :1] / 2)
                assert part[1:].labels.equal((part[1:].x.read()[:, 0] / 4).long() % 7)


def test_batches_go_to_the_device(tmp_path):
    part = rows(numbers(), tmp_path).to("meta")
    assert part.x.device.type == "meta"
    assert next(iter(part.x.batches(8)))[0].device.type == "meta"


def test_views_are_those_in_memory(tmp_path):
    path = saved(tmp_path, np.random.default_rng(0).integers(0, 256, (90, 9), dtype=np.uint8))
    for view in (dynamic, levels):
        disk, memory = (data.load(path, mapped=m, view=view, **WHOLE).train for m in (True, False))
        for one, other in zip(disk.batches(8, fixed()), memory.batches(8, fixed()), strict=True):
            assert view is dynamic or one[0].equal(other[0])
        assert disk.expected().mean().allclose(memory.expected().mean())
    counts = saved(tmp_path / "counts", numbers(30).astype(np.uint16) + 1)
    disk, memory = (data.load(counts, mapped=m, **WHOLE).sized().train for m in (True, False))
    assert disk.context[0].equal(memory.context[0])


def test_only_whole_rows_that_fit_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_MOST", 3999)
    loaded = data.load(saved(tmp_path, numbers()), mapped=True, **WHOLE)
    for act in (loaded.train.batch, loaded.train.read, loaded.sized):
        with pytest.raises(ValueError, match=r"needs all 1,000 rows at once.* a smaller --test"):
            act()
    assert len(loaded.train[1:].read().x) == 999


# What is refused


def test_values_are_checked_where_they_lie(tmp_path):
    values = numbers()
    values[305, 2], values[700, 1], values[701] = np.nan, np.inf, np.nan
    path = saved(tmp_path / "d", values, [300, 700])
    with pytest.raises(ValueError, match=r"6 NaN or infinite.* in row 5 of '1.npy'; .*--missing"):
        data.load(path)
    with pytest.raises(ValueError, match=r"1 infinite values, the first in row 400 of '1.npy'"):
        data.load(path, missing=True)
    np.save(path / "1.npy", np.nan_to_num(values[300:], nan=np.nan, posinf=1))
    with pytest.raises(ValueError, match=r"1 rows in which every value.* is row 401 of '1.npy'"):
        data.load(path, missing=True)
    np.save(path / "1.npy", values[300:600])
    loaded = data.load(path, missing=True)
    assert loaded.missing == pytest.approx(1 / 2400)
    assert loaded.span == (0, 2399)
    with pytest.raises(ValueError, match="needs values between 0 and 1 and 'd' has 0 to 2399"):
        loaded.viewed(levels)


def test_values_are_looked_at_once(tmp_path, opened):
    path = saved(tmp_path, numbers())
    loaded = data.load(path, mapped=True, top=1e5, view=levels, **WHOLE)
    _ = loaded.span, loaded.missing, loaded.viewed(dynamic).map(lambda part: part.to("cpu")).span
    assert sum(count for _, count in opened) == 1000


@pytest.mark.parametrize("high", [1, 255])
def test_bytes_are_looked_at_until_nothing_can_change(tmp_path, high, opened):
    values = np.random.default_rng(0).integers(0, 2, (1000, 4), dtype=np.uint8) * high
    path = saved(tmp_path, values)
    opened.clear()
    loaded = data.load(path, mapped=True, **WHOLE)
    assert (loaded.train.top, loaded.span) == (high, (0, 1))
    # Windows have 128 rows; one more may have been read ahead.
    assert sum(count for _, count in opened) in ([1000] if high == 1 else [128, 256])


def archive(path):
    with path.open("wb") as file:
        np.savez(file, x=numbers())


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (damaged, r"1.npy' is damaged or no NumPy file; save numbers"),
        (lambda path: path.write_bytes(b""), r"1.npy' is damaged or no NumPy file"),
        (lambda path: path.write_bytes(b"garbage"), r"1.npy' is damaged or no NumPy file"),
        (lambda path: np.save(path, np.array(3)), r"1.npy' holds one number and no rows"),
        (lambda path: np.save(path, np.asfortranarray(numbers())), "columns together"),
        (lambda path: np.save(path, numbers(9, 3)), r"shape \(3,\) .*0.npy' of \(4,\) .* alike"),
        (lambda path: np.save(path, numbers().astype("f8")), "type float64, .* alike"),
        (lambda path: np.save(path, numbers()[:, 0]), r"of shape \(\) .* alike"),
        (archive, "1.npy' is an archive; unpack"),
    ],
)
def test_files_that_cannot_be_mapped_are_refused(tmp_path, spoil, match):
    path = saved(tmp_path / "d", numbers(), [500, 500])
    spoil(path / "1.npy")
    with pytest.raises(ValueError, match=match):
        data.load(path)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((5, 2), complex), "values of type complex128, not real"),
        (np.full((5, 2), "a"), "values of type <U1, not real"),
        (np.zeros((0, 2)), r"of shape \(0, 2\) holds no rows of data"),
        (np.zeros((5, 0)), r"of shape \(5, 0\) holds no rows of data"),
        (np.zeros(5), r"of shape \(5,\) holds no rows of data"),
        (np.zeros((2, 2)), "2 samples, too few to train on"),
    ],
)
def test_arrays_that_are_no_data_are_refused(tmp_path, array, match):
    with pytest.raises(ValueError, match=match):
        data.load(saved(tmp_path, array), mapped=True)


def test_objects_are_refused_and_not_unpickled(tmp_path):
    path, mark = tmp_path / "x.npy", tmp_path / "mark"
    np.save(path, np.array([Marker(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects; save numbers with"):
        data.load(path, mapped=True)
    assert not mark.exists()


@pytest.mark.parametrize("source", ["digits", "x.npz", "images"])
def test_what_is_no_npy_file_is_not_mapped(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=numbers())
    Path("images").mkdir()
    with pytest.raises(ValueError, match=rf"'{source}' cannot stay on disk, as .npy files can"):
        data.load(source, mapped=True)


def test_files_and_folders_are_mapped_by_themselves(tmp_path, monkeypatch):
    file = saved(tmp_path / "a", numbers())
    assert isinstance(data.load(file).train.x, torch.Tensor)
    monkeypatch.setattr(data, "_LARGE", file.stat().st_size)
    assert isinstance(data.load(file).train.x, Mapped)
    assert isinstance(data.load(file, mapped=False).train.x, torch.Tensor)
    folder = saved(tmp_path / "b", numbers(), [500, 500])
    (folder / ".hidden").touch()
    assert isinstance(data.load(folder).train.x, Mapped)
    (folder / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds neither images .* nor .npy files and nothing else"
    ):
        data.load(folder)


# Reading ahead


def test_what_fails_in_the_thread_reaches_the_caller(tmp_path):
    folder = saved(tmp_path / "d", numbers(), [500, 500])
    part = data.load(folder, **WHOLE).train
    np.save(folder / "1.npy", numbers(400))
    with pytest.raises(ValueError, match=r"1.npy' has fewer rows than before; put it back"):
        list(part.batches(16))
    (folder / "1.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"1.npy"):
        list(part.batches(16))
    assert not reading()


def reading():
    return [each for each in threading.enumerate() if each.name.startswith("reading")]


def test_the_thread_ends_with_the_loop(tmp_path, opened):
    part = rows(numbers(), tmp_path)
    batches = part.batches(16, fixed(), shuffle=True)
    opened.clear()
    next(batches)
    assert len(reading()) == 1
    batches.close()
    assert not reading()
    assert sum(count for _, count in opened) == 64  # the window in use and the next one


LIMITED = """
import resource, sys
from pyro_vae import data, mapped
from pyro_vae.splits import Split

mapped._WINDOW, start = 2**22, 0
for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        start = 1024 * int(line.split()[1])
limit = start + 96 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "whole":
    data.load(sys.argv[1], mapped=False)
loaded = data.load(sys.argv[1], top=255, view=data.dynamic)
assert loaded.span == (0, 0)
print(sum(len(x) for x, in loaded.train.stored(1000, shuffle=True)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("what", ["mapped", "whole"])
def test_memory_does_not_grow_with_the_rows(tmp_path, what):
    """256 MiB of rows pass through 96 MiB of memory, where all at once they do not."""
    shape = 2**20, 2**7
    for name in "ab":  # zeros, which take no disk
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.uint8, shape)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), what],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if what == "whole":
        assert "allocate memory" in done.stderr
    else:
        assert int(done.stdout or 0) == pytest.approx(0.8 * 2**21, abs=210), done.stderr


# Training


def small(seed=0):
    """A VAE of numbers, and a run of few steps."""
    pyro.set_rng_seed(seed)
    return VAE(
        prior=priors.Normal(2),
        likelihood=likelihoods.Bernoulli(MLP(2, [8], 4)),
        posterior=posteriors.Normal(MLP(4, [8], (2, 2))),
    )


WITH = {"epochs": 3, "batch_size": 7, "progress": False, "mode": "eager"}


def images(folder, sizes=None, **options):
    """A hundred rows of four pixels, binarised anew each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 4), dtype=np.uint8)
    return data.load(saved(folder, pixels, sizes), mapped=True, view=dynamic, **options)


def test_a_run_on_disk_learns_what_one_in_memory_does(tmp_path):
    disk, memory = images(tmp_path), data.load(tmp_path / "x.npy", view=dynamic)
    found = [fit(small(), each, **WITH | {"epochs": 20})[-1]["elbo"] for each in (disk, memory)]
    before = fit(small(), disk, **WITH | {"epochs": 1})[-1]["elbo"]
    # the same rows in another order: nearer to each other than to the beginning
    assert abs(found[0] - found[1]) < (found[0] - before) / 2


@pytest.mark.parametrize("step", [1, 12, 17])
def test_a_run_on_disk_is_gone_on_with_bit_for_bit(tmp_path, step):
    whole = small()
    rows = fit(whole, images(tmp_path / "d"), **WITH)
    with stopped(step):
        fit(small(), images(tmp_path / "d"), run=tmp_path / "run", **WITH)
    again = small()
    found = fit(again, images(tmp_path / "d"), run=tmp_path / "run", resume=True, **WITH)
    for key, value in whole.state_dict().items():
        assert again.state_dict()[key].equal(value), key
    assert [row["loss"] for row in found] == [row["loss"] for row in rows]


def test_a_run_goes_on_with_the_same_rows_in_other_files(tmp_path):
    fit(small(), images(tmp_path / "a"), run=tmp_path / "run", **WITH)
    parts = images(tmp_path / "b", [30, 70])
    assert len(fit(small(), parts, run=tmp_path / "run", resume=True, **WITH)) == 3


def test_a_run_in_memory_does_not_go_on_on_disk(tmp_path):
    images(tmp_path / "d")
    memory = data.load(tmp_path / "d" / "x.npy", view=dynamic, ordered=True)
    fit(small(), memory, run=tmp_path / "run", **WITH)
    with pytest.raises(ValueError, match="cannot go on with other data"):
        fit(small(), images(tmp_path / "d", ordered=True), run=tmp_path / "run", resume=True,
            **WITH)  # fmt: skip


def test_all_values_are_held_against_the_support(tmp_path):
    values = np.zeros((100, 4), np.float32)
    values[70] = 0.5
    parts = data.load(saved(tmp_path, values), mapped=True, **WHOLE)
    with pytest.raises(ValueError, match="4 values of x lie outside the support of Bernoulli"):
        fit(small(), parts, **WITH)


def test_parts_get_some_rows_of_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ROWS", 10)
    train = rows(numbers(), tmp_path)
    blueprint = Blueprint((4,), latent=2, hidden=[4], prior=Part("VampPrior", {"components": 10}))
    found = blueprint.build(dataclasses.replace(train, top=4e3)).prior.pseudo_inputs[:, 0] * 1e3
    assert found.sort().values.tolist() == pytest.approx(list(range(0, 1000, 100)))


def test_the_command_line_trains_and_evaluates_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    saved(tmp_path / "shards", pixels, [50, 70])
    main(["data", "shards"])
    counts = "96 training, 12 validation, 12 test"
    assert capsys.readouterr().out == f"shards: {counts} data of shape 1x8x8\n"
    options = [
        "--epochs",
        "2",
        "--hidden",
        "8",
        "--latent",
        "2",
        "--mode",
        "eager",
        "--batch-size",
        "9",
    ]
    main(["train", "--data", "shards", "--output-bias", "--out", "run", *options])
    assert "over 12 data" in capsys.readouterr().out
    main(["evaluate", "run", "--samples", "20"])
    assert "means over 12 data" in capsys.readouterr().out
    for command in (["encode", "run"], ["reconstruct", "run", "--count", "5"]):
        main(command)
    assert np.load("run/codes.npz")["z"].shape == (12, 2)
    monkeypatch.setattr(splits, "_MOST", 100)
    assert main(["evaluate", "run"]) != 0
    assert "needs all 12 rows at once" in capsys.readouterr().err
