"""Operations on one photo, with numbers drawn by hand, and the box that goes with the car."""

import numpy as np
import pytest

from carflavor.data.operations import MOST, Change, Operations

NAMES = ["crop", "pad", "flip", "rotate", "shift", "zoom", "color", "blur", "erase", "randaugment"]
DIGITS = np.repeat(np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], np.uint8)[..., None], 3, 2)


class Drawn:
    """What draws for operations, without chance: the same place in every range.

    Args:
        place: 0 for the lower end of a range, 1 for the upper one.
        index: Which of several.
    """

    def __init__(self, place, index=0):
        self.place = place
        self.index = index

    def uniform(self, low, high, size=None):
        value = low + (high - low) * self.place
        return value if size is None else np.full(size, value)

    def random(self, size=None):
        return 0.0 if size is None else np.zeros(size)

    def choice(self, values):
        return values[self.index]

    def integers(self, high, size=None):
        return self.index if size is None else np.full(size, self.index)


def change(text, place=1, index=0):
    return Operations(text).draw(Drawn(place, index))


def shades(picture):
    assert (picture == picture[..., :1]).all()
    return picture[..., 0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip", [[4, 3, 2, 1], [8, 7, 6, 5], [12, 11, 10, 9], [16, 15, 14, 13]]),
        # Clockwise.
        ("rotate:90", [[13, 9, 5, 1], [14, 10, 6, 2], [15, 11, 7, 3], [16, 12, 8, 4]]),
        ("flip,rotate:90", [[16, 12, 8, 4], [15, 11, 7, 3], [14, 10, 6, 2], [13, 9, 5, 1]]),
        ("rotate:180", [[16, 15, 14, 13], [12, 11, 10, 9], [8, 7, 6, 5], [4, 3, 2, 1]]),
        # To the right and down; what comes in repeats the border.
        ("shift:0.25", [[1, 1, 2, 3], [1, 1, 2, 3], [5, 5, 6, 7], [9, 9, 10, 11]]),
    ],
)
def test_where_pixels_go(text, expected):
    assert shades(change(text).apply(DIGITS, (4, 4))) == expected


@pytest.mark.parametrize(
    ("text", "place", "size", "box", "expected"),
    [
        ("flip", 1, (40, 100), (10, 5, 30, 20), (70, 5, 90, 20)),
        ("rotate:90", 1, (100, 100), (10, 20, 30, 50), (50, 10, 80, 30)),
        # About the centre, 100, 50.
        ("rotate:90", 1, (100, 200), (90, 20, 120, 40), (110, 40, 130, 70)),
        # Half a diagonal is 14.1 pixels.
        ("rotate:45", 1, (100, 100), (40, 40, 60, 60), (35, 35, 65, 65)),
        ("shift:0.1", 1, (100, 200), (10, 20, 30, 40), (30, 30, 50, 50)),
        ("shift:0.1", 0, (100, 200), (10, 20, 50, 40), (0, 10, 30, 30)),
        # To twice the size, and to half of it.
        ("zoom:1", 1, (100, 200), (90, 40, 120, 60), (80, 30, 140, 70)),
        ("zoom:1", 0, (100, 200), (80, 30, 140, 70), (90, 40, 120, 60)),
        # Half a side more on each of four sides.
        ("pad:0.5", 1, (100, 200), (80, 30, 140, 70), (90, 40, 120, 60)),
        # A quarter of the area, from the upper left: 0.433 of the width and 0.577 of the height.
        ("crop:0.75", 0, (200, 200), (0, 0, 40, 40), (0, 0, 93, 70)),
        ("color", 1, (100, 200), (10, 20, 30, 40), (10, 20, 30, 40)),
        ("blur", 1, (100, 200), (10, 20, 30, 40), (10, 20, 30, 40)),
        ("erase", 1, (100, 200), (10, 20, 30, 40), (10, 20, 30, 40)),
        ("shift:0.5", 1, (100, 200), (110, 60, 130, 80), None),
    ],
)
def test_where_the_box_goes(text, place, size, box, expected):
    assert change(text, place).move_box(box, size) == expected


def test_visible_share():
    # 20 of 40 pixels of the width, 15 of 20 of the height.
    assert change("shift:0.1", 0).visible_share((0, 5, 40, 25), (100, 200)) == pytest.approx(0.375)
    assert change("shift:0.1", 1).visible_share((0, 5, 40, 25), (100, 200)) == pytest.approx(1)
    assert change("shift:0.5", 1).visible_share((110, 60, 130, 80), (100, 200)) == 0
    # A square that is turned in itself loses its corners: an octagon is left.
    assert change("rotate:45").visible_share((0, 0, 100, 100), (100, 100)) == pytest.approx(2 * 2**0.5 - 2, abs=0.02)


def test_a_squashed_photo_turns_in_its_own_proportions():
    # Four rows of one shade each, 16 pixels wide, squashed to 4 x 4. A quarter of a turn makes columns of them, one
    # pixel wide, of which the two in the middle lie on the border of columns of the square; around them the border.
    rows = np.repeat(np.array([[[10]], [[20]], [[30]], [[40]]], np.uint8), 4, 1).repeat(3, 2)
    turned = change("rotate:90")
    np.testing.assert_allclose(shades(turned.apply(rows, (4, 16))), [[40, 40, 10, 10]] * 4, atol=1)
    assert shades(turned.apply(rows, (4, 4))) == [[40, 30, 20, 10]] * 4


@pytest.mark.parametrize("seed", range(40))
def test_the_box_goes_where_the_car_goes(seed):
    photo, box = np.zeros((300, 400, 3), np.uint8), (150, 120, 260, 190)
    photo[box[1] : box[3], box[0] : box[2]] = 255
    drawn = Operations("crop,pad,flip,rotate,shift,zoom").draw(np.random.default_rng(seed))
    rows, columns = np.nonzero(drawn.apply(photo, (300, 400))[..., 0] > 127)
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_allclose(drawn.move_box(box, (300, 400)), found, atol=1.01)


def test_all_geometry_is_read_in_one_interpolation():
    # Two shifts of half a pixel are one of a whole pixel.
    half = change("shift:0.125").maps
    assert shades(Change(half + half).apply(DIGITS, (4, 4)))[1] == [1, 1, 2, 3]


def test_colors_of_a_grey_photo_are_its_brightness():
    # Of one grey there is no contrast, saturation or hue to change.
    assert shades(change("color:0.5").apply(np.full((2, 2, 3), 100, np.uint8), (2, 2))) == [[150, 150]] * 2


def test_colors_in_the_middle_of_their_ranges_stay():
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    changed = change("color", 0.5).apply(photo, (8, 8))
    difference = np.abs(changed.astype(int) - photo)
    assert difference.max() <= 8 and difference.mean() < 1  # a hue of 8 bits


def test_hues_turn():
    # From brightness, contrast and saturation of 1 by a quarter of the circle, from red to between yellow and green.
    (turn_hue,) = change("color:1").edits[-1:]
    red = np.full((1, 1, 3), (200, 0, 0), np.uint8)
    np.testing.assert_allclose(turn_hue(red)[0, 0].astype(int), (100, 200, 0), atol=3)


def test_blur_spreads_an_edge():
    photo = np.zeros((40, 40, 3), np.uint8)
    photo[:, 20:] = 200
    row = shades(change("blur:0.05").apply(photo, (40, 40)))[7]
    assert row[:8] == [0] * 8 and row[32:] == [200] * 8
    assert row == sorted(row) and 60 < row[19] < 100 < row[20] < 140


def test_erase_puts_noise_in_a_rectangle():
    photo = np.full((10, 10, 3), 7, np.uint8)
    # Half of the area, 1.83 times as wide as high: all of the width, 0.387 of the height.
    erased = change("erase:0.5", index=3).apply(photo, (10, 10))
    assert (erased[4:] == 7).all()
    assert len(np.unique(erased[:4])) > 50
    assert (photo == 7).all()


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (4, [75, 150, 225]),  # brightness, 1.224 times, twice
        (9, [0, 127, 255]),  # autocontrast
    ],
)
def test_randaugment_does_two_of_its_operations(index, expected):
    photo = np.repeat(np.array([[50, 100, 150]], np.uint8)[..., None], 3, 2)
    drawn = change("randaugment:0.56", index=index)
    assert len(drawn.edits) == 2 and not drawn.maps
    np.testing.assert_allclose(shades(drawn.apply(photo, (1, 3)))[0], expected, atol=2)  # Pillow cuts decimals off


def test_randaugment_reaches_all_its_operations():
    drawn = [Operations("randaugment").draw(np.random.default_rng(seed)) for seed in range(200)]
    assert {(len(one.maps), len(one.edits)) for one in drawn} == {(0, 2), (1, 1), (2, 0)}
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for one in drawn:
        changed = one.apply(photo, (16, 16))
        assert changed.shape == photo.shape and changed.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_draws_the_same(name):
    photo = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    before = photo.copy()
    first, again, *others = (
        Operations(name).draw(np.random.default_rng(seed)).apply(photo, (128, 128)) for seed in [1, 1, 2, 3, 4, 5]
    )
    np.testing.assert_array_equal(first, again)
    assert any((first != other).any() for other in others)
    np.testing.assert_array_equal(photo, before)


def test_the_most_that_operations_do():
    assert str(Operations("crop, flip,rotate:5 ,color:0.50")) == "crop:0.3,flip,rotate:5,color:0.5"
    assert set(MOST) == set(NAMES) - {"flip"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected operations among crop, pad, flip, rotate, shift, zoom, color, blur, erase, randaugment, "),
        ("flip,", "separated by commas. Received: operations='flip,'"),
        ("mirror", "separated by commas. Received: operations='mirror'"),
        ("flip crop", "separated by commas. Received: operations='flip crop'"),
        ("flip:0.5", "Expected flip without a number. Received: operations='flip:0.5'"),
        ("flip,crop,flip", "Expected each of the operations once. Received: operations='flip,crop,flip'"),
        ("rotate:181", "Expected rotate:<number above 0, up to 180>. Received: operations='rotate:181'"),
        ("color:0", "Expected color:<number above 0, up to 1>. Received: operations='color:0'"),
        ("color:-1", "Expected color:<number above 0, up to 1>. Received: operations='color:-1'"),
        ("color:nan", "Expected color:<number above 0, up to 1>. Received: operations='color:nan'"),
        ("color:", "Expected color:<number above 0, up to 1>. Received: operations='color:'"),
        ("color:much", "Expected color:<number above 0, up to 1>. Received: operations='color:much'"),
    ],
)
def test_what_are_no_operations(text, message):
    with pytest.raises(ValueError) as error:
        Operations(text)
    assert message in str(error.value)
