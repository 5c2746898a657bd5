import base64
import configparser
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from carflavor import report
from carflavor.measures import compare
from carflavor.report import style

HOSTILE = [
    "Ram C/V Cargo Van Minivan 2012",
    r"cost $\frac$ and $5",  # As mathtext the first would be an error, the second a formula with it.
    "<script>alert('x')</script>",
    'Citroën "Ç" Škoda',
    "Chevrolet Silverado 1500 Hybrid Crew Cab 2012 " * 3,
    "W" * 80,
    "two\nlines",
]
PHOTO = np.full((60, 80, 3), 128, np.uint8)


def class_names(count):
    return [f"{HOSTILE[index % len(HOSTILE)]} {index}" for index in range(count)]


def render(figure):
    """Draws a figure and checks that nothing of it is cut off at the edges."""
    png = io.BytesIO()
    # Compressing takes most of the time otherwise.
    figure.savefig(png, format="png", pil_kwargs={"compress_level": 1})
    assert png.getvalue().startswith(b"\x89PNG")
    drawn = figure.get_tightbbox()
    assert drawn.x0 >= 0 and drawn.y0 >= 0
    assert drawn.x1 <= figure.get_figwidth() and drawn.y1 <= figure.get_figheight()
    return figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def row_names_overlap(axes):
    boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
    return any(lower.y1 > upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("count", [1, 8, 36, 196])
def test_figures_by_class_show_every_name(count):
    confusion = np.eye(count, dtype=int)
    for figure in (
        report.confusion_figure(confusion, class_names(count)),
        report.class_bars_figure(class_names(count), np.linspace(0, 1, count), np.full(count, 12)),
    ):
        panels = render(figure).axes
        assert sum(len(axes.get_yticklabels()) for axes in panels) == count
        assert not any(row_names_overlap(axes) for axes in panels)


def test_names_of_many_classes_are_thinned_out():
    figure = report.confusion_figure(np.eye(500, dtype=int), class_names(500))
    assert figure.axes[0].get_yticks().tolist()[:3] == [0, 3, 6]


@pytest.mark.filterwarnings("error")
def test_confusion_writes_counts_and_leaves_a_class_without_photos_empty():
    figure = render(report.confusion_figure([[3, 1, 0], [0, 0, 0], [0, 0, 20]], ["a", "b", "c"]))
    right, wrong = figure.axes[0].images
    assert texts(figure.axes[0]) == ["3", "1", "20"]
    assert right.get_array().filled(-1).tolist() == [[0.75, -1, -1], [-1, -1, -1], [-1, -1, 1]]
    assert wrong.get_array().filled(-1).tolist() == [[-1, 0.25, -1], [-1, -1, -1], [-1, -1, -1]]


def test_confusion_must_fit_the_names():
    with pytest.raises(ValueError, match=r"a row and a column for 3 names. Received: \(2, 2\)"):
        report.confusion_figure(np.eye(2), ["a", "b", "c"])


def test_curves_mark_the_best_epoch():
    history = {
        "loss": [2.0, 1.0, 0.5],
        "val_loss": [2.1, 1.4, 1.5],
        "accuracy": [0.2, 0.7, 0.9],
        "val_accuracy": [0.1, 0.6125, 0.6],
        "learning_rate": [1e-3, 1e-3, 1e-4],
    }
    loss, accuracy, rate = render(report.curves_figure(history, 2)).axes
    assert accuracy.get_title("right") == "best: 0.613 in epoch 2"
    assert accuracy.lines[-1].get_xydata().tolist() == [[2, 0.6125]]
    assert rate.get_title("left") == "learning rate"


def test_curves_of_one_epoch():
    history = {"loss": [2.0], "val_loss": [2.1], "accuracy": [0.2], "val_accuracy": [0.25]}
    loss, accuracy = render(report.curves_figure(history, 1)).axes
    assert accuracy.get_title("right") == "best: 0.250 in epoch 1"
    assert loss.lines[0].get_marker() == "o"


def test_curves_without_validation():
    loss, accuracy = render(report.curves_figure({"loss": [2.0, 1.0], "accuracy": [0.2, 0.5]}, 2)).axes
    assert [len(axes.lines) for axes in (loss, accuracy)] == [1, 1]
    assert accuracy.get_title("right") == ""


def test_photo_grid_of_different_sizes():
    photos = [PHOTO, PHOTO[:, :20], np.zeros((3000, 4000, 3), np.uint8)]
    figure = render(report.photo_grid_figure(photos, HOSTILE[:3], columns=2))
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "Ram C/V Cargo Van Minivan 2012",
        r"cost $\frac$ and $5",
        "<script>alert('x')</script>",
        "",
    ]
    assert figure.axes[0].images[0].get_array().shape == (60, 80, 3)
    assert figure.axes[2].images[0].get_array().shape == (216, 288, 3)


def test_photo_grid_of_a_strip_one_pixel_high():
    figure = render(report.photo_grid_figure([np.zeros((1, 600, 3), np.uint8)], ["strip"], columns=4))
    assert figure.axes[0].images[0].get_array().shape == (1, 288, 3)


def test_confused_pairs():
    pair = report.ConfusedPair("Audi S4 2012", HOSTILE[4], 7, 43, PHOTO, PHOTO[:30])
    left, middle, right = render(report.confused_pairs_figure([pair])).axes
    assert left.get_xlabel() == "Audi S4 2012"
    assert texts(middle) == ["7 of 43\ntaken for\n→"]
    assert right.get_xlabel().startswith("Chevrolet Silverado 1500\nHybrid Crew Cab 2012")


def test_no_confused_pairs():
    figure = render(report.confused_pairs_figure([]))
    assert texts(figure) == ["No photo was taken for another class."]


def test_more_than_three_confused_pairs_stand_two_on_a_line():
    pairs = [report.ConfusedPair(f"a{row}", f"b{row}", 1, 2, PHOTO, PHOTO) for row in range(5)]
    figure = render(report.confused_pairs_figure(pairs))
    lines = [line for line in np.reshape(figure.axes, (3, 7))]
    assert [axes.get_xlabel() for axes in lines[0]] == ["a0", "", "b0", "", "a1", "", "b1"]
    assert [axes.get_xlabel() for axes in lines[2]] == ["a4", "", "b4", "", "", "", ""]


BINS = [
    {"from": 0.0, "to": 0.5, "photos": 0, "mean_prob": None, "accuracy": None, "low": None, "high": None},
    {"from": 0.5, "to": 1.0, "photos": 8, "mean_prob": 0.75, "accuracy": 1.0, "low": 0.7, "high": 1.0},
]


def test_reliability_leaves_out_bins_without_photos():
    accuracy, photos = render(report.reliability_figure(BINS)).axes
    assert accuracy.lines[1].get_xydata().tolist() == [[0.75, 1.0]]
    assert [bar.get_height() for bar in photos.patches] == [0, 8]


def test_rejection_marks_the_chosen_threshold():
    curve = np.array([0.25, 1.0]), np.array([1.0, 0.5])
    (axes,) = render(report.rejection_figure(curve, curve, (0.25, 1.0), 0.95)).axes
    validation, test, target, chosen = axes.lines
    assert test.get_xydata().tolist() == [[0.25, 1.0], [1.0, 0.5]]
    assert target.get_ydata() == [0.95, 0.95]
    assert chosen.get_xydata().tolist() == [[0.25, 1.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["validation", "test"]


def test_rejection_without_validation_photos():
    (axes,) = render(report.rejection_figure((np.array([1.0]), np.array([0.5])))).axes
    assert len(axes.lines) == 1


def test_comparison_names_the_classes_that_differ_most():
    labels = np.repeat(np.arange(30), 2)
    wrong = np.where(np.arange(60) % 2, labels, (labels + 1) % 30)
    wrong[:2] = 1  # the first class twice, all others once
    overall, classes = render(report.comparison_figure(compare(labels, labels, wrong, class_names(30)))).axes
    assert [label.get_text() for label in overall.get_yticklabels()] == ["this model", "the other"]
    assert len(classes.get_yticklabels()) == 20
    assert classes.get_yticklabels()[0].get_text() == "Ram C/V Cargo Van Minivan 2012 0 (2)"
    assert [line.get_xdata().tolist() for line in classes.lines[:3]] == [[1.0, 0.0], [0.0], [1.0]]


def test_comparison_of_equal_models():
    (overall,) = render(report.comparison_figure(compare(np.array([0]), np.array([0]), np.array([0]), ["a"]))).axes
    assert overall.get_title("left") == "all photos, 95 % intervals"


def test_heat_glows_where_it_is_and_leaves_the_rest():
    photo = np.full((40, 60, 3), 100, np.uint8)
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    overlay = report.overlay_heat(photo, heat)
    assert (overlay.shape, overlay.dtype) == ((40, 60, 3), np.uint8)
    assert overlay[-1, 0].tolist() == [100, 100, 100]
    # matplotlib's inferno ends in (252.0, 254.6, 164.5), of which 65 % are mixed in.
    assert overlay[0, -1].tolist() == [199, 200, 142]


def test_class_bars_start_with_the_worst_and_end_without_photos():
    figure = render(report.class_bars_figure(["a", "none", "b"], [0.75, np.nan, 0.5], [4, 0, 10]))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "none"]
    assert texts(axes) == ["50% of 10", "75% of 4", "no photos"]


def test_class_bars_of_very_many_classes_show_the_worst():
    figure = report.class_bars_figure(class_names(500), np.linspace(1, 0, 500), np.ones(500, int))
    assert figure.get_suptitle() == "accuracy by class, the worst 200 of 500"
    assert texts(figure.axes[0])[0] == "0% of 1"


def test_page_is_escaped_and_self_contained():
    figure = report.confused_pairs_figure([])
    page = report.render_report(
        "<script>title", [("top-1", "<script>0.9")], [report.Section('<script>"head', "<script>text", figure)]
    )
    assert "<script" not in page
    assert '<html lang="en">' in page
    assert "<title>&lt;script&gt;title</title>" in page
    assert "<dt>top-1</dt><dd>&lt;script&gt;0.9</dd>" in page
    uri = re.search(r'<img src="data:image/webp;base64,(UklGR[\w+/=]+)" width="480" alt="(.*?)">', page)
    assert uri[2] == "&lt;script&gt;&#34;head"
    assert "http" not in page.replace(uri[1], "")


def decode_figures(page):
    images = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(image), np.uint8), cv2.IMREAD_COLOR) for image in images]


def test_lines_stay_sharp_and_photos_keep_their_colours_on_the_page():
    random = np.random.default_rng(0)
    colours = np.kron(random.integers(0, 256, (3, 4, 3), "uint8"), np.ones((20, 20, 1), np.uint8))
    figures = [
        report.confusion_figure(np.eye(3, dtype=int), list("abc")),
        report.photo_grid_figure([colours], ["x"], 1),
    ]
    drawing, photo = decode_figures(
        report.render_report("t", [], [report.Section("s", figure=figure) for figure in figures])
    )
    assert set(np.unique(drawing)) <= set(range(0, 256, 17))
    assert (drawing[0] == 255).all()
    # Of every colour field its middle, in BGR.
    height, width = photo.shape[:2]
    assert len(np.unique(photo)) > 100
    assert np.abs(photo[height // 3, width // 8].astype(int) - colours[30, 10, ::-1]).max() < 12


def test_lead_stands_before_the_figures():
    page = report.render_report("t", [("top-1", "0.9")], [], lead=["first <b>\nline", "second"])
    assert "<h1>t</h1>\n<p>first &lt;b&gt;\nline</p>\n<p>second</p>\n<dl>" in page


def test_percent_sign_stays_with_its_number():
    page = report.render_report("t", [], [report.Section("s", text="87.5 % and 5 %")], lead=["top-1 87.5 %"])
    assert page.count("87.5\N{NO-BREAK SPACE}%") == 2 and "5 %" not in page


def test_template_travels_with_the_package_and_the_model(packed_model):
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options.package_data"]["carflavor.report"] == "*.html"
    assert (packed_model / "code" / "carflavor" / "report" / "page.html").is_file()


def test_letters_of_east_asia_draw_without_a_warning():
    names = ["大众 帕萨特 2011", "トヨタ カローラ", "현대 쏘나타"]
    render(report.confusion_figure(np.eye(3, dtype=int), names))
    render(report.class_bars_figure(names, [0.5, 0.6, 0.7], [4, 4, 4]))
    render(report.photo_grid_figure([PHOTO] * 3, names, columns=3))


def test_fonts_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(style.font_manager, "get_font_names", lambda: ["SimHei", "DejaVu Sans", "Noto Sans CJK SC"])
    assert style.find_fonts() == ["DejaVu Sans", "Noto Sans CJK SC", "SimHei"]


def test_tables():
    rows = [
        {"class": "Ram C/V <van>", "photos": 1635, "top-1": 0.91234, "loss": 0.00012345},
        {"class": None, "photos": np.int64(0), "top-1": None, "loss": np.float32(12.3456)},
        {"class": "c", "photos": 3, "top-1": float("nan"), "loss": 1234.5},
    ]
    page = report.render_report("t", [], [report.Section("s", table=rows), report.Section("e", table=[])])
    assert re.findall(r"<t[hd].*?</t[hd]>", page) == [
        '<th class="text">class</th>',
        '<th class="number">photos</th>',
        '<th class="number">top-1</th>',
        '<th class="number">loss</th>',
        '<td class="text">Ram C/V &lt;van&gt;</td>',
        '<td class="number">1635</td>',
        '<td class="number">0.912</td>',
        '<td class="number">0.000123</td>',
        '<td class="text">—</td>',
        '<td class="number">0</td>',
        '<td class="number">—</td>',
        '<td class="number">12.35</td>',
        '<td class="text">c</td>',
        '<td class="number">3</td>',
        '<td class="number">—</td>',
        '<td class="number">1234</td>',
    ]
    assert "<p>None.</p>" in page


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, "old", [], [])
    report.write_report(path, "Škoda", [], [])
    assert "<h1>Škoda</h1>" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):
        report.write_report(tmp_path / "report.html", "t", [], [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("box", "shape", "first", "last"),
    [
        # Of a photo of 1440 x 1440 that was scaled down to 144: inside, beyond the right edge, beyond all of them.
        ((300, 400, 700, 900), (144, 144), (30, 40), (69, 89)),
        ((300, 400, 1540, 900), (144, 154), (30, 40), (153, 89)),
        ((-100, -200, 1540, 1640), (184, 164), (0, 0), (163, 183)),
        # Outside: the ground grows no more than by half a photo and a pixel.
        ((9000, 9000, 10**400, 9900), (217, 217), (216, 216), (216, 216)),
        # Corners that are not in order, and no area at all.
        ((700, 900, 300, 400), (144, 144), (30, 40), (69, 89)),
        ((300, 400, 300, 400), (144, 144), (30, 40), (30, 40)),
    ],
)
def test_a_box_is_outlined(box, shape, first, last):
    outlined = report.outline_box(np.full((144, 144, 3), 255, np.uint8), box, (1440, 1440))
    assert outlined.shape == (*shape, 3)
    for x, y in (first, last):
        assert outlined[y, x].tolist() == [216, 27, 96]
    colours = {tuple(pixel) for pixel in outlined.reshape(-1, 3).tolist()}
    assert colours == {(255, 255, 255), (216, 27, 96)} | ({(225, 225, 225)} if shape != (144, 144) else set())


def test_a_small_photo_is_enlarged_for_its_box():
    photo = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    outlined = report.outline_box(photo, (1, 1, 2, 2), (4, 4))
    assert outlined.shape == (144, 144, 3)
    assert outlined[143, 143].tolist() == [45, 46, 47]


def test_pairs_stand_side_by_side():
    pairs = [report.PhotoPair((PHOTO, PHOTO), (f"left {n}\nphoto", f"right {n}"), f"{n} bits") for n in range(5)]
    panels = render(report.photo_pairs_figure(pairs)).axes
    shown = [axes.get_xlabel() or "".join(texts(axes)) for axes in panels]
    assert [text for text in shown if text] == [
        text for n in range(5) for text in (f"left {n}\nphoto", f"{n} bits", f"right {n}")
    ]


def test_json_is_written_as_text_that_people_read(tmp_path):
    report.write_json(tmp_path / "report.json", {"class": "Škoda"})
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == '{\n  "class": "Škoda"\n}'
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
