"""Pictures: the pixels that are drawn are those of the data, in their order."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from pyro_vae import plots

BLACK, GREY, WHITE = 0.0, 0.6, 1.0


def tiles(*values, channels=1, height=4, width=4):
    """Images of one value each, or of one colour."""
    flat = torch.tensor(values).reshape(len(values), -1, 1, 1)
    return flat.expand(-1, channels, height, width)


def pixels(figure, path):
    """The figure as it comes back from a PNG file, bytes `(height, width, 3)`."""
    assert plots.save(figure, path) == path
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def centres(picture, rows, columns):
    """The pixels in the middle of the tiles of a picture that is nothing but tiles."""
    height, width = picture.shape[:2]
    down = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    right = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return picture[down][:, right]


def test_tiles_land_row_by_row_with_white_between():
    x = torch.stack([torch.full((1, 2, 3), value) for value in (0.0, 0.25, 0.5)])
    canvas = np.ones((5, 7))
    canvas[:2, :3], canvas[:2, 4:], canvas[3:, :3] = 0.0, 0.25, 0.5
    assert_array_equal(plots._tiled(x, 2), canvas)


def test_tiles_keep_the_pixels_of_an_image_in_place():
    image = torch.arange(6.0).reshape(1, 1, 2, 3) / 5
    assert_array_equal(plots._tiled(image, 1), image[0, 0])
    assert_array_equal(plots._tiled(image.expand(2, -1, -1, -1), 2, gap=0)[:, 3:], image[0, 0])


def test_colours_go_last_in_a_canvas():
    x = torch.rand(2, 3, 2, 2)
    canvas = np.ones((2, 5, 3))
    canvas[:, :2], canvas[:, 3:] = x.permute(0, 2, 3, 1).numpy()
    assert_array_equal(plots._tiled(x, 2), canvas)


def test_values_outside_the_range_are_drawn_at_its_ends():
    assert_array_equal(plots._tiled(tiles(-3.0, 7.0, height=1, width=1), 2), [[0, 1, 1]])


def test_what_is_missing_is_drawn_grey():
    x = torch.tensor([torch.nan, 0.0, 1.0]).reshape(3, 1, 1, 1)
    assert_array_equal(plots._tiled(x, 3, gap=0), [[0.5, 0, 1]])
    assert_array_equal(plots._tiled(x.expand(-1, 3, -1, -1), 3, gap=0)[0, 0], [0.5] * 3)


def colours_of(axes):
    """The colours of the lines, as bytes."""
    drawn = [to_rgb(line.get_color()) for line in axes.lines]
    return {tuple(round(255 * part) for part in colour) for colour in drawn}


def colours_within(axes, picture):
    """The colours of all pixels within the axes, once the figure is drawn."""
    box = axes.get_window_extent()
    right, up = (slice(int(a), int(b)) for a, b in (box.intervalx, box.intervaly))
    return {tuple(colour) for colour in picture[::-1][up, right].reshape(-1, 3).tolist()}


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ([BLACK, WHITE, WHITE, BLACK], None),
        ([WHITE, BLACK, BLACK, BLACK], None),
        ([BLACK, WHITE, BLACK, WHITE, WHITE, BLACK], 3),
        ([BLACK, WHITE, BLACK, WHITE, WHITE, BLACK], 2),
        ([BLACK], 1),
    ],
)
def test_a_grid_shows_each_tile_in_its_place(values, columns, tmp_path):
    picture = pixels(plots.grid(tiles(*values, height=20, width=20), columns), tmp_path / "a.png")
    columns = columns or 2
    shown = centres(picture, len(values) // columns, columns)[..., 0]
    assert_array_equal(shown.flatten(), 255 * np.array(values))


def test_a_grid_shows_colours(tmp_path):
    colours = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    figure = plots.grid(tiles(*colours, channels=3, height=20, width=20))
    shown = centres(pixels(figure, tmp_path / "a.png"), 2, 2)
    assert_array_equal(shown.reshape(4, 3), 255 * np.array(colours))


def test_a_manifold_shows_its_rows_from_the_top_without_gaps(tmp_path):
    values = np.arange(9.0) / 10
    picture = pixels(plots.manifold(tiles(*values), 3), tmp_path / "a.png")
    shown = centres(picture, 3, 3)[..., 0].flatten()
    assert_array_equal(np.abs(shown - 255 * values).round() <= 1, True)
    assert set(np.unique(picture)) == set(shown)


@pytest.mark.parametrize("names", [["data"], ["data", "reconstruction"], ["c", "a", "b"]])
def test_a_strip_shows_its_rows_under_each_other_by_name(names, tmp_path):
    brightness = [BLACK, WHITE, GREY][: len(names)]
    rows = {name: tiles(*[value] * 5) for name, value in zip(names, brightness, strict=True)}
    figure = plots.strip(rows)
    picture = pixels(figure, tmp_path / "a.png")
    assert [text.get_text() for text in figure.texts] == names
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert [box.y0 for box in boxes] == sorted((box.y0 for box in boxes), reverse=True)
    for box, value in zip(boxes, brightness, strict=True):
        middle = picture[len(picture) - int((box.y0 + box.y1) / 2), int((box.x0 + box.x1) / 2)]
        assert abs(int(middle[0]) - 255 * value) <= 1


def test_a_strip_keeps_the_order_within_a_row():
    values = [BLACK, WHITE, GREY, WHITE]
    (axes,) = plots.strip({"data": tiles(*values, height=1, width=1)}).axes
    assert_array_equal(axes.images[0].get_array()[0, ::2], np.float32(values))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
def test_what_is_no_image_is_drawn_as_a_heat_map(shape, tmp_path):
    x = torch.randn(5, *shape)
    for figure in (plots.grid(x), plots.manifold(x, 1), plots.strip({"one": x, "two": 2 * x})):
        picture = pixels(figure, tmp_path / "a.png")
        assert len(colours_within(figure.axes[0], picture)) > x.numel() // 2
        assert_array_equal(figure.axes[0].images[0].get_array(), x.flatten(1))
    assert_array_equal(figure.axes[1].images[0].get_array(), 2 * x.flatten(1))


def row(epoch, **values):
    fixed = {"epoch": epoch, "samples": 100.0 * epoch, "loss": 50.0 / epoch, "weight": 1.0}
    return {**fixed, **values}


def validated(epoch):
    kl, reconstruction = float(epoch), -30.0 / epoch
    return row(epoch, elbo=reconstruction - kl, reconstruction=reconstruction, kl=kl)


def lines(axes):
    return [line.get_ydata() for line in axes.get_lines()]


@pytest.mark.parametrize("epochs", [1, 2, 12])
def test_curves_go_through_the_metrics(epochs, tmp_path):
    figure = plots.curves([validated(epoch) for epoch in range(1, epochs + 1)])
    left, right, twin = figure.axes
    n = np.arange(1.0, epochs + 1)
    assert_allclose(lines(left), [-50 / n, -30 / n - n])
    assert_allclose(lines(right), [30 / n])
    assert_allclose(lines(twin), [n])
    picture = pixels(figure, tmp_path / "a.png")
    for axes in figure.axes:
        assert_array_equal([line.get_xdata() for line in axes.lines], [100 * n] * len(axes.lines))
        assert colours_of(axes) <= colours_within(axes, picture)


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_without_validation_show_the_objective_alone(epochs, tmp_path):
    figure = plots.curves([row(epoch) for epoch in range(1, epochs + 1)])
    left, right = figure.axes
    assert_allclose(lines(left), [-50 / np.arange(1.0, epochs + 1)])
    assert not right.axison
    picture = pixels(figure, tmp_path / "a.png")
    assert colours_of(left) <= colours_within(left, picture)
    assert (picture[:, 2 * picture.shape[1] // 3 :] == 255).all()


def test_a_single_epoch_is_a_mark_and_not_an_invisible_line():
    (one,), (two,) = (plots.curves([row(n) for n in ns]).axes[0].lines for ns in ([1], [1, 2]))
    assert (one.get_marker(), two.get_marker()) == ("o", "None")


def test_a_bad_first_epoch_does_not_flatten_the_curve():
    rows = [row(1, elbo=-1e6, reconstruction=-1e6, kl=0.0), *map(validated, range(2, 30))]
    low, high = plots.curves(rows).axes[0].get_ylim()
    assert -100 < low < min(each["elbo"] for each in rows[1:])
    assert max(each["elbo"] for each in rows) < high < 100


def test_a_curve_that_stands_still_is_drawn():
    rows = [{**validated(1), "samples": 100.0 * n, "loss": 31.0} for n in range(1, 20)]
    low, high = plots.curves(rows).axes[0].get_ylim()
    assert low < -31 < high


@pytest.mark.parametrize(("weights", "until"), [([0.2, 0.9, 1, 1], 200.0), ([1, 1, 1], None)])
def test_the_warm_up_is_shaded_since_its_objective_is_no_bound(weights, until):
    rows = [row(n, weight=weight) for n, weight in enumerate(weights, 1)]
    shades = plots.curves(rows).axes[0].patches
    assert [shade.get_x() + shade.get_width() for shade in shades] == ([until] if until else [])
    assert all("no bound" in shade.get_label() for shade in shades)


def test_dimensions_are_drawn_from_the_largest_kl_on(tmp_path):
    figure = plots.dimensions(np.array([0.5, 2.0, 1.0]))
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 1.0, 0.5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "0"]
    pixels(figure, tmp_path / "a.png")


def test_k_hats_are_counted_beside_their_threshold(tmp_path):
    figure = plots.k_hat(np.array([0.1, 0.2, 0.9, -np.inf, np.nan]), 0.7)
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert_allclose(axes.lines[0].get_xdata(), [0.7, 0.7])
    assert "20.0%" in axes.get_title()
    pixels(figure, tmp_path / "a.png")


@pytest.mark.parametrize(("latent", "panels"), [(1, 2), (3, 4), (30, 12)])
def test_ranks_have_a_panel_for_each_dimension_and_the_joint(latent, panels, tmp_path):
    values = np.random.default_rng(0).integers(0, 100, (400, latent + 1))
    values[:, -1] = 99
    figure = plots.ranks(values, 99)
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == panels
    assert shown[-1].get_title() == "log p(x,z)"
    heights = [bar.get_height() for bar in shown[-1].patches[-20:]]
    assert heights == [0] * 19 + [400]
    assert sum(bar.get_height() for bar in shown[0].patches[-20:]) == 400
    pixels(figure, tmp_path / "a.png")


@pytest.mark.parametrize("latent", [1, 2, 5])
@pytest.mark.parametrize("labels", [None, np.arange(60) % 3])
def test_latents_are_scattered_by_label(latent, labels, tmp_path):
    z = np.random.default_rng(0).normal(size=(60, latent)) * np.arange(1, latent + 1)
    (axes,) = plots.scatter(z, labels).axes
    assert len(axes.lines) == (1 if labels is None else 3)
    drawn = np.concatenate([line.get_xydata() for line in axes.lines])
    if latent == 2 and labels is None:
        assert_allclose(drawn, z)
    if latent == 5:  # the first direction has the greatest variance there is
        greatest = np.linalg.eigvalsh(np.cov(z.T))[-1]
        assert_allclose(drawn[:, 0].var(ddof=1), greatest)
    pixels(plots.scatter(z, labels), tmp_path / "a.png")


def test_rows_of_vectors_share_their_colours():
    figure = plots.strip({"data": torch.zeros(3, 4), "reconstruction": torch.full((3, 4), 0.5)})
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert [image.get_clim() for image in images] == [(0, 0.5), (0, 0.5)]
    assert figure.axes[1].get_xlabel() == "element"


def test_no_share_is_said_where_no_k_hat_is_known():
    (axes,) = plots.k_hat(np.full(5, np.nan), 0.7).axes
    assert axes.get_title() == "too few draws for a k-hat"


def test_more_classes_than_ten_have_colours_of_their_own():
    (axes,) = plots.scatter(np.random.default_rng(0).random((60, 2)), np.arange(60) % 12).axes
    assert len({tuple(line.get_color()) for line in axes.lines}) == 12
