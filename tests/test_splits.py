"""Splits: which row lands where, and the values of a batch against NumPy and simulation."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pyro_vae.splits import Split, dequantised, divide, dynamic, levels, plain, split, threshold

WHOLE = {"validation": 0, "test": 0}


class Items(Dataset):
    """A data set of whatever items it is given."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Endless(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter([torch.zeros(1)])


def numbered(rows=50, **options):
    """Data whose x, context and label all tell the row's number."""
    number = torch.arange(rows)
    return split(number[:, None].float(), 2.0 * number, labels=number, **options)


def rows(part):
    """Numbers of the rows in a part of `numbered`, which its context and labels must share."""
    number = part.x.flatten().tolist()
    assert part.context[0].flatten().tolist() == [2 * n for n in number]
    assert part.labels.tolist() == number
    return number


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


# Which row lands where


@pytest.mark.parametrize(
    ("count", "validation", "test", "sizes"),
    [
        (100, 0.1, 0.1, [80, 10, 10]),
        (100, 0.25, 0.5, [25, 25, 50]),
        (10, 0, 0.2, [8, 0, 2]),
        (10, 0.3, 0, [7, 3, 0]),
        (10, 0, 0, [10, 0, 0]),
        (7, 0.01, 0.01, [5, 1, 1]),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_fractions_give_the_sizes_and_each_row_one_split(count, validation, test, sizes, ordered):
    data = numbered(count, validation=validation, test=test, ordered=ordered)
    assert [len(part) for part in data.splits] == sizes
    found = [number for part in data.splits for number in rows(part)]
    assert sorted(found) == list(range(count))


def test_a_seed_fixes_the_split_and_another_changes_it():
    first, again, other = ([rows(p) for p in numbered(seed=s).splits] for s in (0, 0, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_every_row_is_as_likely_to_be_held_out():
    held = [rows(numbered(10, seed=seed).test)[0] for seed in range(600)]
    counts = np.bincount(np.array(held, dtype=int), minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-6  # the rate of false alarms


def test_ordered_holds_out_the_end():
    train, validation, test = (rows(part) for part in numbered(50, ordered=True).splits)
    assert train == list(range(40))
    assert validation == list(range(40, 45))
    assert test == list(range(45, 50))


def test_rows_stay_in_file_order_within_a_random_split():
    for part in numbered().splits:
        assert rows(part) == sorted(rows(part))


@pytest.mark.parametrize("official", [["test"], ["validation"], ["validation", "test"]])
def test_official_splits_are_kept(official):
    parts = {
        key: Split(torch.full((n, 1), float(n)), (torch.zeros(n, 1),))
        for key, n in [("validation", 7), ("test", 9)]
    }
    given = {key: parts[key] for key in official}
    data = divide({"train": numbered(20, **WHOLE).train, **given}, validation=0.1, test=0.1)
    for key in ("validation", "test"):
        part = getattr(data, key)
        assert part.x.equal(parts[key].x) if key in official else len(part) == 2
    assert len(data.train) == 20 - 2 * (2 - len(official))


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda part: part[10:20], list(range(10, 20))),
        (lambda part: part[torch.tensor([7, 3, 3])], [7, 3, 3]),
        (lambda part: part.map(lambda column: column.flip(0)), list(range(49, -1, -1))),
        (lambda part: part.to("cpu"), list(range(50))),
    ],
    ids=["slice", "index", "map", "to"],
)
def test_context_and_labels_follow_their_rows(act, expected):
    assert rows(act(numbered(**WHOLE).train)) == expected


def test_to_moves_every_tensor():
    part = numbered(**WHOLE).train.to("meta")
    assert [t.device.type for t in (part.x, *part.context, part.labels)] == ["meta"] * 3


def test_map_of_data_reaches_every_split():
    data = numbered(50, ordered=True, name="numbers").map(lambda part: part[1:])
    assert [rows(part)[0] for part in data.splits] == [1, 41, 46]
    assert data.name == "numbers"


# Batches


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_cover_the_rows_once_and_the_last_is_smaller(shuffle):
    batches = list(numbered(**WHOLE).train.batches(16, fixed(), shuffle=shuffle))
    assert [len(x) for x, _ in batches] == [16, 16, 16, 2]
    x, context = (torch.cat(column).flatten() for column in zip(*batches, strict=True))
    assert context.equal(2 * x)
    assert x.sort().values.tolist() == list(range(50))
    assert (x.tolist() == list(range(50))) is not shuffle


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 2, 3, 10])  # batches that are gathered at once
def test_shuffled_batches_are_rows_of_one_permutation(ahead, skip, monkeypatch):
    part = numbered(**WHOLE).train
    datum = sum(column[0].numel() * column.element_size() for column in (part.x, *part.context))
    monkeypatch.setattr("pyro_vae.splits._GATHERED", 16 * datum * ahead)
    batches = list(part.stored(16, fixed(), shuffle=True, skip=skip))
    order = torch.randperm(50, generator=fixed())
    assert len(batches) == 4 - skip
    for index, (x, context) in enumerate(batches, skip):
        rows = order[16 * index : 16 * (index + 1)]
        assert x.equal(part.x[rows])
        assert context.equal(part.context[0][rows])


def test_the_generator_fixes_the_order():
    part = numbered(**WHOLE).train
    orders = [
        torch.cat([x for x, _ in part.batches(16, generator, shuffle=True)]).tolist()
        for generator in (fixed(1), fixed(1), fixed(2))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_each_epoch_has_a_new_order():
    part, generator = numbered(**WHOLE).train, fixed()
    first, second = (
        [x.tolist() for x, _ in part.batches(50, generator, shuffle=True)] for _ in "ab"
    )
    assert first != second


# Values


@pytest.mark.parametrize(
    ("values", "stored", "top"),
    [
        (np.array([[0], [3], [255]], np.uint8), torch.uint8, 255),
        (np.array([[0], [1], [1]], np.uint8), torch.uint8, 1),
        (np.array([[False], [True], [True]]), torch.uint8, 1),
        (np.array([[0], [3], [300]], np.int64), torch.int64, 1),
        (np.array([[-1.5], [0.25], [3]], np.float64), torch.float32, 1),
        (np.array([[0.5], [0.25], [1]], np.float16), torch.float32, 1),
    ],
    ids=["pixels", "bits", "bool", "counts", "float64", "float16"],
)
def test_values_are_stored_in_their_own_width_and_scaled_by_top(values, stored, top):
    train = split(values, **WHOLE).train
    assert (train.x.dtype, train.top) == (stored, top)
    np.testing.assert_allclose(train.batch()[0].numpy(), values.astype(np.float32) / top)


@pytest.mark.parametrize("top", [16, 255, 0.5])
def test_top_can_be_given(top):
    values = np.arange(17, dtype=np.uint8)[:, None]
    (batch,) = split(values, top=top, **WHOLE).train.batch()
    np.testing.assert_allclose(batch.numpy(), values / top, rtol=1e-6)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (plain, [0, 127 / 255, 128 / 255, 1]),
        (threshold, [0, 0, 1, 1]),
        (levels, [0, 127, 128, 255]),
        (lambda values, generator: 1 - values, [1, 128 / 255, 127 / 255, 0]),
    ],
    ids=["plain", "threshold", "levels", "own"],
)
def test_a_view_says_what_is_scored(view, expected):
    pixels = torch.tensor([[0], [127], [128], [255]], dtype=torch.uint8)
    (batch,) = split(pixels, view=view, **WHOLE).train.batch()
    assert batch.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("byte", [0, 1, 51, 128, 250, 255])
def test_dynamic_binarisation_has_the_pixels_probability(byte):
    pixels = torch.full((20_000, 1), byte, dtype=torch.uint8)
    (batch,) = split(pixels, top=255, view=dynamic, **WHOLE).train.batch(fixed())
    assert batch.unique().tolist() == ([byte / 255] if byte in (0, 255) else [0, 1])
    # one false alarm in a million runs, were the seed not fixed
    assert stats.binomtest(int(batch.sum()), len(batch), byte / 255).pvalue > 1e-6


def test_dynamic_binarisation_is_fresh_each_epoch():
    part = split(torch.full((20_000, 1), 0.3), view=dynamic, **WHOLE).train
    generator = fixed()
    first, second = (torch.cat([x for (x,) in part.batches(64, generator)]) for _ in "ab")
    agree = int((first == second).sum())  # with probability .3 x .3 + .7 x .7
    assert stats.binomtest(agree, len(first), 0.58).pvalue > 1e-6


@pytest.mark.parametrize("shuffle", [False, True])
def test_equal_seeds_give_equal_dynamic_binarisation(shuffle):
    part = split(torch.rand(200, 5), view=dynamic, **WHOLE).train
    first, again, other = (
        torch.cat([x for (x,) in part.batches(64, fixed(seed), shuffle=shuffle)])
        for seed in (3, 3, 4)
    )
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    ("dtype", "top", "level"),
    [
        (torch.uint8, None, 1 / 256),
        (torch.int32, 255, 1 / 256),
        (torch.uint8, 254, None),
        (torch.float32, 255, None),
    ],
)
def test_dequantised_values_have_a_level_where_they_are_stored_as_256(dtype, top, level):
    stored = torch.tensor([[0, 3], [254, 1]]).to(dtype)
    whole = split(stored, top=top, **WHOLE)
    assert whole.viewed(dequantised).train.level == level
    assert whole.train.level is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_levels_are_the_bytes_of_an_image(dtype):
    pixels = torch.arange(256)[:, None]
    stored = pixels.byte() if dtype is torch.uint8 else pixels.to(dtype) / 255
    (batch,) = split(stored, view=levels, **WHOLE).train.batch()
    assert batch.equal(pixels.float())


def test_one_half_is_below_the_threshold():
    assert threshold(torch.tensor([0.0, 0.5, 0.5001, 1.0])).tolist() == [0, 0, 1, 1]


def test_viewed_changes_the_view_of_every_split():
    data = split(torch.rand(50, 4)).viewed(threshold)
    for part in data.splits:
        assert part.batch()[0].equal((part.x > 0.5).float())


@pytest.mark.parametrize("top", [None, 16])
def test_mean_is_numpys(top):
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 2, 3), dtype=np.uint8)
    mean = split(pixels, top=top, **WHOLE).train.mean()
    np.testing.assert_allclose(mean.numpy(), pixels.mean(0) / (top or 255), rtol=1e-6)


@pytest.mark.parametrize(
    ("view", "scored"),
    [
        (dynamic, lambda x: x),
        (threshold, lambda x: x > 0.5),
        (levels, lambda x: np.round(255 * x)),
        (lambda values, generator: 3 * values, lambda x: 3 * x),
    ],
    ids=["dynamic", "threshold", "levels", "own"],
)
def test_mean_is_that_of_what_is_scored(view, scored):
    x = np.random.default_rng(0).random((9000, 2, 3))
    mean = split(x, view=view, **WHOLE).train.mean()
    np.testing.assert_allclose(mean.numpy(), scored(x).mean(0), rtol=1e-5)


def test_conditioned_appends_one_hot_labels_to_the_context():
    data = split(torch.rand(20, 3), torch.rand(20), labels=torch.arange(20) % 4)
    for before, after in zip(data.splits, data.conditioned().splits, strict=True):
        assert after.context[0].equal(before.context[0])
        np.testing.assert_array_equal(after.context[1].numpy(), np.eye(4)[before.labels.numpy()])


def test_conditioned_counts_the_classes_of_all_splits():
    parts = {
        "train": Split(torch.rand(3, 1), labels=torch.tensor([0, 1, 0])),
        "test": Split(torch.rand(2, 1), labels=torch.tensor([4, 1])),
    }
    data = divide(parts, validation=0).conditioned()
    assert data.train.context[0].tolist() == np.eye(5)[[0, 1, 0]].tolist()
    assert data.test.context[0].tolist() == np.eye(5)[[4, 1]].tolist()


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_size_factor_is_a_rows_total_over_the_mean_of_training(shape, dtype):
    counts = torch.randint(0, 9, (50, *shape)).to(dtype)
    counts[:, 0] += 1
    before = split(counts, torch.rand(50), ordered=True)
    total = counts.double().flatten(1).sum(1)
    places = (slice(40), slice(40, 45), slice(45, 50))
    for place, part, plainer in zip(places, before.sized().splits, before.splits, strict=True):
        first, size = part.context
        assert first.equal(plainer.context[0])
        assert size.shape == (len(part), 1)
        expected = total[place] / total[:40].mean()
        np.testing.assert_allclose(size[:, 0].numpy(), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("row", "name", "within"), [(3, "training", 3), (46, "test", 1)])
@pytest.mark.parametrize("total", [0, -2])
def test_a_row_without_a_size_is_named(row, name, within, total):
    counts = torch.ones(50, 2)
    counts[row] = total / 2
    data = split(counts, ordered=True, name="cells")
    match = f"row {within} of the {name} split of 'cells' has a total of {total}, of which no size"
    with pytest.raises(ValueError, match=match):
        data.sized()


# Missing values


def gappy(rows=2000, share=0.3):
    """Numbers in [0, 1] of which that share is missing, but none in the first column."""
    x = torch.rand(rows, 4)
    x[:, 1:][torch.rand(rows, 3) < share] = torch.nan
    return x


@pytest.mark.parametrize(
    ("view", "check"),
    [
        (plain, lambda drawn, x: drawn == x),
        (levels, lambda drawn, x: drawn == (255 * x).round()),
        (threshold, lambda drawn, x: drawn == (x > 0.5)),
        (dynamic, lambda drawn, x: (drawn == 0) | (drawn == 1)),
    ],
)
def test_every_view_keeps_what_is_missing(view, check):
    x = gappy()
    (batch,) = split(x, view=view, missing=True, **WHOLE).train.batch()
    assert batch.isnan().equal(x.isnan())
    assert check(batch, x)[~x.isnan()].all()


def test_what_is_not_missing_is_binarised_as_if_nothing_were():
    x = gappy()
    filled = split(x.nan_to_num(0.0), view=dynamic, **WHOLE).train.batch(fixed())[0]
    (batch,) = split(x, view=dynamic, missing=True, **WHOLE).train.batch(fixed())
    assert batch.nan_to_num(0.0).equal(filled)


@pytest.mark.parametrize("view", [plain, levels, dynamic])
def test_mean_leaves_out_what_is_missing(view):
    x = gappy(9000)
    mean = split(x, view=view, missing=True, **WHOLE).train.mean()
    seen = np.round(255 * x.numpy()) if view is levels else x.numpy()
    np.testing.assert_allclose(mean.numpy(), np.nanmean(seen, axis=0), rtol=1e-5)


def test_an_element_that_no_row_has_gets_the_mean_of_the_others():
    x = gappy()
    x[:, 2] = torch.nan
    mean = split(x, missing=True, **WHOLE).train.mean()
    assert float(mean[2]) == pytest.approx(np.nanmean(x.numpy()), rel=1e-5)


def test_missing_values_do_not_count_in_the_span_and_the_size():
    x = torch.tensor([[0.25, torch.nan], [1.0, 0.5]])
    data = split(x, view=levels, missing=True, **WHOLE)
    assert data.span == (0.25, 1.0)
    assert data.sized().train.context[0].flatten().tolist() == pytest.approx([0.4, 4 / 3])
    with pytest.raises(ValueError, match=r"has 1 to 1.5; give the stored value"):
        split(torch.tensor([[1.0, torch.nan], [1.0, 1.5]]), view=levels, missing=True, **WHOLE)


@pytest.mark.parametrize(
    ("value", "options", "match"),
    [
        (np.nan, {}, r"2 NaN or infinite .* row 7; remove or fill them, or .* by --missing, in"),
        (np.inf, {}, r"2 NaN or infinite values, the first in row 7; remove or fill them$"),
        (np.inf, {"missing": True}, "2 infinite values, the first in row 7; remove or fill them$"),
    ],
)
def test_what_may_be_missing_is_said(value, options, match):
    x = torch.rand(20, 3)
    x[7, 1] = x[12, 0] = value
    with pytest.raises(ValueError, match=match):
        split(x, **options)


def test_images_that_number_their_colours_are_their_colours():
    colours = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    images = [Image.fromarray(each).quantize(16) for each in colours]
    x = split(Items(*images), **WHOLE).train.x
    true = np.stack([np.asarray(each.convert("RGB")).transpose(2, 0, 1) for each in images])
    assert np.array_equal(x.numpy(), true)


def test_sparse_tensors_are_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"^the data is sparse; give it dense, by \.to_dense\(\)$"
    ):
        split(torch.eye(20).to_sparse())


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_what_a_masked_array_masks_is_missing(dtype):
    x = np.ma.masked_equal(np.arange(1, 25).reshape(6, 4).astype(dtype), 7)
    with pytest.raises(ValueError, match="1 NaN or infinite values, the first in row 1; remove"):
        split(x)
    (batch,) = split(x, missing=True, **WHOLE).train.batch()
    assert batch.isnan().nonzero().tolist() == [[1, 2]]
    assert batch[1, 1] == 6
    (batch,) = split(np.ma.asarray(x.data), **WHOLE).train.batch()  # nothing is masked
    assert batch[1, 2] == 7


def test_bytes_have_no_holes():
    with pytest.raises(ValueError, match="of bytes, which have no holes; give floats, as x / 255"):
        split(np.ma.masked_equal(np.arange(24, dtype=np.uint8).reshape(6, 4), 7), missing=True)


def test_a_row_in_which_all_is_missing_is_refused():
    x = torch.rand(20, 1, 2, 2)
    x[[4, 9]] = torch.nan
    with pytest.raises(ValueError, match=r"2 rows in which every value is missing.* is row 4;"):
        split(x, missing=True)


def test_a_context_of_a_split_may_be_one_number_a_row():
    part = Split(torch.rand(20, 2), (torch.arange(20.0),))
    assert divide({"train": part}, **WHOLE).train.context[0].tolist() == list(range(20))


def test_a_context_is_never_missing():
    with pytest.raises(ValueError, match=r"has 1 NaN or infinite .* row 3; remove or fill them$"):
        split(torch.rand(20, 2), spoilt(np.nan, (3, 0)), missing=True)


# Sources

GREY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
COLOUR = np.arange(72, dtype=np.uint8).reshape(2, 3, 4, 3)


SOURCES = {
    "tensor": torch.as_tensor,
    "array": np.array,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(">f4"),
    "uint16": lambda x: x.astype(np.uint16),
    "long double": lambda x: x.astype(np.longdouble),
    "items": lambda x: Items(*torch.as_tensor(x)),
    "dataset": lambda x: TensorDataset(torch.as_tensor(x)),
}


@pytest.mark.parametrize("convert", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_values(convert):
    train = split(convert(GREY), top=255, **WHOLE).train
    assert train.x.tolist() == GREY.tolist()
    assert train.context == ()
    assert train.labels is None


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [(GREY, GREY[:, None]), (COLOUR, COLOUR.transpose(0, 3, 1, 2))],
    ids=["grey", "colour"],
)
def test_images_with_labels_become_bytes_channel_first(pixels, expected):
    dataset = Items(*((Image.fromarray(image), i) for i, image in enumerate(pixels)))
    train = split(dataset, **WHOLE).train
    assert train.x.dtype == torch.uint8
    assert train.x.tolist() == expected.tolist()
    assert train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ([0.5, 1.5], [[0.5], [1.5]]),
        ([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [[1, 2], [3, 4]]),
        ([np.ones((2, 1)), np.zeros((2, 1))], [[1, 1], [0, 0]]),
    ],
    ids=["number", "vector", "matrix"],
)
def test_what_is_no_label_is_context(context, expected):
    items = Items((torch.zeros(3), context[0]), (torch.ones(3), context[1]))
    train = split(items, **WHOLE).train
    assert train.context[0].tolist() == expected
    assert train.labels is None


def test_context_and_labels_join_those_of_a_dataset():
    items = Items((torch.zeros(3), 0.5, 7.0), (torch.ones(3), 1.5, 8.0))
    train = split(items, np.array([[3.0], [4.0]]), labels=np.array([2, 5]), **WHOLE).train
    assert [c.flatten().tolist() for c in train.context] == [[0.5, 1.5], [7, 8], [3, 4]]
    assert train.labels.tolist() == [2, 5]
    assert split(
        Items((torch.zeros(3), 1)), labels=np.array([6]), **WHOLE
    ).train.labels.tolist() == [6]


# Errors


def spoilt(value, *places):
    x = torch.rand(20, 2)
    for place in places:
        x[place] = value
    return x


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (spoilt(np.nan, (7, 1), (12, 0)), "2 NaN or infinite values, the first in row 7; remove"),
        (spoilt(-np.inf, (0, 0)), "1 NaN or infinite values, the first in row 0"),
        (np.full((3, 2), 1e300), "6 NaN or infinite values, the first in row 0"),
        (torch.rand(0, 4), r"shape \(0, 4\) holds no rows"),
        (torch.rand(4, 0), r"shape \(4, 0\) holds no rows"),
        (torch.rand(9), r"shape \(9,\) holds no rows of data; give an array"),
        (torch.rand(1, 4), "has 1 sample, too few"),
        (torch.rand(2, 4), "has 2 samples, too few"),
        (torch.zeros(9, 2, dtype=torch.complex64), "complex numbers; give real"),
        (np.zeros((9, 2), np.complex128), "complex128, not real numbers"),
        (np.array([["a"], ["b"]]), "the data holds values of type <U1, not real numbers"),
        (Items(), "length above 0"),
        (Endless(), "length above 0"),
        (Items(torch.zeros(2), torch.zeros(3)), "items of the Dataset differ in shape"),
        (Items({"x": 1}), "item of the Dataset holds values of type object"),
    ],
)
def test_unusable_data_are_refused(x, match):
    with pytest.raises(ValueError, match=match):
        split(x)


@pytest.mark.parametrize(
    ("context", "labels", "match"),
    [
        (torch.ones(19), None, "20 rows of data and 19 of labels or context"),
        (None, torch.zeros(21), "20 rows of data and 21 of labels or context"),
        (spoilt(np.nan, (3, 0)), None, "1 NaN or infinite values, the first in row 3"),
        (spoilt(np.nan, (3, 0))[:, 0], None, "1 NaN or infinite values, the first in row 3"),
        (None, torch.full((20,), 0.5), "labels that are no classes"),
        (None, torch.full((20,), -1), "labels that are no classes"),
        (None, torch.zeros(20, 10), "labels that are no classes"),
        (None, np.full(20, "cat"), "array of labels holds values of type <U3"),
    ],
)
def test_unusable_context_and_labels_are_refused(context, labels, match):
    with pytest.raises(ValueError, match=match):
        split(torch.rand(20, 2), *([] if context is None else [context]), labels=labels)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"test": 1}, "fraction lies between 0 and 1, not at 1"),
        ({"test": 1.5}, "fraction lies between 0 and 1, not at 1.5"),
        ({"validation": -0.1}, "fraction lies between 0 and 1, not at -0.1"),
        ({"validation": float("nan")}, "fraction lies between 0 and 1, not at nan"),
        ({"validation": 0.6, "test": 0.6}, "20 samples, too few to train on"),
        ({"validation": 0.5, "test": 0.5}, "share of 0.5 and a test share of 0.5"),
        ({"top": 0}, "positive, not 0"),
        ({"top": -1.0}, "positive, not -1"),
        ({"top": float("nan")}, "positive, not nan"),
    ],
)
def test_unusable_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        split(torch.rand(20, 2), **options)


@pytest.mark.parametrize("view", [dynamic, threshold, levels])
@pytest.mark.parametrize("row", [0, 17, 19])
@pytest.mark.parametrize(("value", "span"), [(1.5, "0 to 1.5"), (-0.5, "-0.5 to 0")])
def test_binarisation_outside_the_unit_interval_is_refused_in_any_split(view, row, value, span):
    x = torch.zeros(20, 1)
    x[row] = value
    with pytest.raises(
        ValueError, match=rf"'it' has {span}; give the stored value that counts as 1"
    ):
        split(x, view=view, ordered=True, name="it")


def test_top_lets_larger_values_be_binarised():
    x = torch.tensor([[0.0], [0.1], [0.3]])
    assert split(x, top=0.3, view=dynamic, **WHOLE).train.batch()[0][[0, 2], 0].tolist() == [0, 1]


def test_splits_bring_the_same_context():
    parts = {
        "train": Split(torch.rand(20, 2), (torch.rand(20, 3),)),
        "test": Split(torch.rand(5, 2)),
    }
    with pytest.raises(ValueError, match=r"train has .* and 3 context features, test has"):
        divide(parts)


def test_conditioning_needs_labels_in_every_split():
    labelled = Split(torch.rand(20, 2), labels=torch.zeros(20))
    with pytest.raises(
        ValueError, match=r"no labels to condition on \(in train, validation, test"
    ):
        split(torch.rand(20, 2)).conditioned()
    with pytest.raises(ValueError, match=r"no labels to condition on \(in test\)"):
        divide({"train": labelled, "test": Split(torch.rand(5, 2))}).conditioned()


@pytest.mark.parametrize(
    ("test", "match"),
    [
        (torch.rand(5, 3), r"train has \(2,\) torch.float32, test has \(3,\) torch.float32"),
        (torch.zeros(5, 2, dtype=torch.uint8), r"test has \(2,\) torch.uint8; make them alike"),
    ],
)
def test_official_splits_must_be_alike(test, match):
    with pytest.raises(ValueError, match=match):
        divide({"train": Split(torch.rand(20, 2)), "test": Split(test)})


def test_size_factors_do_not_see_what_is_missing():
    # Rows of one size, half of them with most genes missing, by columns of unlike means.
    counts = torch.poisson(torch.tensor([50.0, 10.0, 100.0, 20.0]).expand(2000, 4).clone())
    counts[:1000, [0, 2]] = torch.nan
    sizes = (
        split(counts, validation=0, test=0, missing=True, ordered=True).sized().train.context[0]
    )
    sparse, full = sizes[:1000].mean(), sizes[1000:].mean()
    assert sparse == pytest.approx(1, abs=0.03)  # five standard errors, sqrt(1/30) / sqrt(1000)
    assert full == pytest.approx(1, abs=0.03)
