import json
import logging
import re
import runpy
import shutil

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from test_layouts import write_devkit
from test_preprocess import ROOT, draw, names

from carflavor.audit import AuditConfig, write_audit
from carflavor.data import sample
from carflavor.data.audit import KINDS, parse_fail_on
from carflavor.image import encode_jpeg
from carflavor.preprocess import PreprocessConfig, preprocess, write_records

RAM = "<b>Ram</b> C/V"
BOX = (1, 1, 60, 40)


def encode_png(photo):
    return cv2.imencode(".png", photo[..., ::-1])[1].tobytes()


@pytest.fixture
def spoiled(tmp_path):
    """A devkit with one of each: three classes, twelve training photos and three test photos."""
    folder, height, width = tmp_path / "cars", *draw(7).shape[:2]
    train = [
        (*BOX, 1, "01.jpg"),
        (*BOX, 2, "02.jpg"),
        (*BOX, 1, "03 cut off.jpg"),
        (*BOX, 2, "04 png.jpg"),
        (1, 1, 5, 5, 1, "05 tiny.jpg"),
        (*BOX, 2, "06 grey.jpg"),
        (1, 1, width + 7, height, 1, "07 beyond.jpg"),
        (60, 30, 20, 30, 1, "08 no area.jpg"),
        (*BOX, 2, "09 missing.jpg"),
        (*BOX, 1, "10 <i>no photo.jpg"),
        (*BOX, 3, "11.jpg"),
        (*BOX, 3, "12 damaged.png"),
    ]
    test = [(*BOX, 1, "1.jpg"), (*BOX, 1, "2.jpg"), (*BOX, 2, "3.jpg")]
    write_devkit(folder, ["Škoda", RAM, "Lada"], train, test)
    for *_, name in train:
        (folder / "cars_train" / name).write_bytes(encode_jpeg(draw(int(name[:2]))))
    grey = cv2.cvtColor(draw(6), cv2.COLOR_RGB2GRAY)
    content = {
        "cars_train/03 cut off.jpg": encode_jpeg(draw(3))[:2000],
        "cars_train/04 png.jpg": encode_png(draw(4)),
        "cars_train/05 tiny.jpg": encode_jpeg(cv2.resize(draw(5), (5, 5), interpolation=cv2.INTER_AREA)),
        "cars_train/06 grey.jpg": encode_jpeg(np.repeat(grey[..., None], 3, axis=2)),
        "cars_train/10 <i>no photo.jpg": b"no photo",
        "cars_train/12 damaged.png": encode_png(draw(12))[:-2000],
        "cars_train/<i>extra.jpg": encode_jpeg(draw(20)),
        "cars_test/1.jpg": encode_jpeg(draw(1)),
        "cars_test/2.jpg": encode_jpeg(np.ascontiguousarray(draw(2)[:, ::-1]), 60),
        "cars_test/3.jpg": encode_jpeg(draw(21)),
        "figure.png": encode_png(draw(22)),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "cars_train" / "09 missing.jpg").unlink()
    return folder


def photo(name, class_name, **details):
    return {"photo": name, "split": name[5:].split("/")[0], "class": class_name, **details}


def find(source, out, **options):
    """Returns what was found as the file has it, without kinds that were not."""
    write_audit(AuditConfig(source=str(source), out=str(out), **options))
    summary = json.loads((out / "report.json").read_text("utf-8"))
    assert list(summary["findings"]) == list(KINDS)
    assert all(found["count"] == len(found["items"]) for found in summary["findings"].values())
    return {kind: found["items"] for kind, found in summary["findings"].items() if found["items"]}


def test_what_is_found(spoiled, tmp_path):
    height, width = draw(7).shape[:2]
    found = find(spoiled, tmp_path / "out")
    # Of the mirrored copy, which is coded anew, some bits differ, perhaps others with another decoder.
    copies = [found["leak"][1], found["conflict"][1], found["near_duplicate"][3]]
    assert all(0 < item.pop("bits") <= 36 for item in copies)
    cut_off = "expected a whole JPEG, got 2,000 bytes of one that was cut off"
    png = f"expected a whole PNG, got {len(encode_png(draw(12))) - 2000:,} bytes of one that is cut off, damaged or of "
    png += "a rare kind"
    no_photo = "expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got 8 bytes of something else"
    same, mirrored = {"mirrored": False, "equal": True}, {"mirrored": True, "equal": False}
    sha256 = found["duplicate"][0]["sha256"]
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    assert found == {
        "leak": [
            photo("cars_test/1.jpg", "Škoda", group=1, bits=0, **same, copy_of=photo("cars_train/01.jpg", "Škoda")),
            photo("cars_test/2.jpg", "Škoda", group=2, **mirrored, copy_of=photo("cars_train/02.jpg", RAM)),
        ],
        "conflict": [
            photo("cars_train/02.jpg", RAM, group=2, bits=0, **same),
            photo("cars_test/2.jpg", "Škoda", group=2, **mirrored),
        ],
        "unreadable": [
            photo("cars_train/03 cut off.jpg", "Škoda", detail=cut_off),
            photo("cars_train/10 <i>no photo.jpg", "Škoda", detail=no_photo),
            photo("cars_train/12 damaged.png", "Lada", detail=png),
        ],
        "truncated": [
            photo("cars_train/03 cut off.jpg", "Škoda", detail=cut_off),
            photo("cars_train/12 damaged.png", "Lada", detail=png),
        ],
        "missing": [photo("cars_train/09 missing.jpg", RAM)],
        "unlabelled": [{"photo": "cars_train/<i>extra.jpg"}],
        "box": [
            photo(
                "cars_train/07 beyond.jpg",
                "Škoda",
                detail=f"reaches 7 px beyond the photo of {width} x {height} px",
                box=[0, 0, width + 7, height],
                size=[height, width],
            ),
            photo(
                "cars_train/08 no area.jpg",
                "Škoda",
                detail="has no area, from (59, 29) to (20, 30)",
                box=[59, 29, 20, 30],
                size=list(draw(8).shape[:2]),
            ),
        ],
        "absent_class": [{"class": "Lada", "split": "test", "detail": "no photo has its label"}],
        "duplicate": [
            photo("cars_train/01.jpg", "Škoda", group=1, sha256=sha256),
            photo("cars_test/1.jpg", "Škoda", group=1, sha256=sha256),
        ],
        "near_duplicate": [
            photo("cars_train/01.jpg", "Škoda", group=1, bits=0, **same),
            photo("cars_test/1.jpg", "Škoda", group=1, bits=0, **same),
            photo("cars_train/02.jpg", RAM, group=2, bits=0, **same),
            photo("cars_test/2.jpg", "Škoda", group=2, **mirrored),
        ],
        "extension": [photo("cars_train/04 png.jpg", RAM, detail="is in fact PNG")],
        "tiny": [photo("cars_train/05 tiny.jpg", "Škoda", detail="5 x 5 px")],
        "grey": [photo("cars_train/06 grey.jpg", RAM, detail="1 of 5 of its class")],
    }


def test_the_files_say_the_same(spoiled, tmp_path):
    out, summary, _ = write_audit(AuditConfig(source=str(spoiled), out=str(tmp_path / "out")))
    assert out == tmp_path / "out"
    assert names(out) == ["report.html", "report.json"]
    assert json.loads((out / "report.json").read_text("utf-8")) == summary
    assert {name: summary[name] for name in ("source", "layout", "labelled_photos", "photos", "photos_by_split")} == {
        "source": "cars",
        "layout": "devkit",
        "labelled_photos": 15,
        "photos": 11,
        "photos_by_split": {"train": 8, "test": 3},
    }
    assert summary["photos_by_class"] == [
        {"class": "Škoda", "train": 4, "test": 2},
        {"class": RAM, "train": 3, "test": 1},
        {"class": "Lada", "train": 1, "test": 0},
    ]
    page = (out / "report.html").read_text("utf-8")
    # Leaks, and of each photo by itself: what no label names, boxes, endings, tiny and grey ones. All others are shown
    # among the leaks, or cannot be.
    assert page.count('src="data:image/webp;base64,') == 6
    assert "&lt;b&gt;Ram&lt;/b&gt; C/V" in page and "10 &lt;i&gt;no photo.jpg" in page
    assert not re.search(r"<[ib]>", page)
    assert re.search(r'<td class="text">leak</td>\s*<td class="number">2</td>', page)
    assert "Looked for and not found: huge, imbalance." in page
    assert "cars_train/09 missing.jpg" in page
    assert "1 of 15 labelled photos have no file: cars_train/09 missing.jpg" in page


@pytest.mark.parametrize("pack", ["zip", "gztar"])
def test_archives_are_the_same_photos(spoiled, tmp_path, pack):
    archive = shutil.make_archive(tmp_path / "cars", pack, spoiled)
    assert find(archive, tmp_path / "packed", workers=1) == find(spoiled, tmp_path / "out", workers=1)
    # The thumbnails, too.
    pages = [(tmp_path / name / "report.html").read_text("utf-8") for name in ("packed", "out")]
    assert pages[0] == pages[1]


def test_a_clean_dataset_has_no_findings(tmp_path):
    sample.write_sample(tmp_path / "cars", train_per_class=2, test_per_class=1)
    out, summary, refusal = write_audit(
        AuditConfig(source=str(tmp_path / "cars"), out=str(tmp_path / "out"), fail_on=",".join(KINDS))
    )
    assert {kind: found["items"] for kind, found in summary["findings"].items()} == dict.fromkeys(KINDS, [])
    assert refusal is None
    assert f"Looked for and not found: {', '.join(KINDS)}." in (out / "report.html").read_text("utf-8")


def write_folders(folder, photos):
    for name, data in photos.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_huge_photos_equal_ones_and_few_of_a_class(tmp_path):
    large = np.full((5001, 5000, 3), 90, np.uint8)
    photos = {f"cars/train/a/{number}.jpg": encode_jpeg(draw(number)) for number in range(21)}
    photos |= {f"cars/train/b/{number}.jpg": encode_jpeg(draw(number)) for number in (30, 31)}
    photos |= {f"cars/train/c/{number}.jpg": encode_jpeg(draw(number)) for number in (32, 33, 34)}
    # All of one grey, so near nothing, and equal.
    photos |= {"cars/train/c/large.jpg": encode_jpeg(large), "cars/test/c/large.jpg": encode_jpeg(large)}
    write_folders(tmp_path, photos)
    found = find(tmp_path / "cars", tmp_path / "out")
    assert {kind: len(items) for kind, items in found.items()} == {
        "leak": 1,
        "absent_class": 2,
        "duplicate": 2,
        "huge": 2,
        "grey": 2,
        "imbalance": 1,
    }
    train, test = ({"photo": f"{split}/c/large.jpg", "split": split, "class": "c"} for split in ("train", "test"))
    assert found["leak"] == [test | {"group": 1, "bits": 0, "mirrored": False, "equal": True, "copy_of": train}]
    assert found["huge"] == [train | {"detail": "5,000 x 5,001 px"}, test | {"detail": "5,000 x 5,001 px"}]
    # c has four, which is enough.
    assert found["imbalance"] == [{"class": "b", "photos": 2, "detail": "a has 21"}]


def test_the_nearest_copy_is_named(tmp_path):
    near, equal = encode_jpeg(draw(1), 30), encode_jpeg(draw(1))
    write_folders(
        tmp_path / "cars",
        {"train/a/1.jpg": near, "train/a/2.jpg": equal, "train/b/3.jpg": encode_jpeg(draw(3)), "test/a/4.jpg": equal},
    )
    (leak,) = find(tmp_path / "cars", tmp_path / "out")["leak"]
    assert (leak["photo"], leak["copy_of"]["photo"]) == ("test/a/4.jpg", "train/a/2.jpg")


def test_photos_elsewhere_are_not_unlabelled(spoiled, tmp_path):
    # Without labels for the test photos, these are no oversight.
    (spoiled / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    found = find(spoiled, tmp_path / "out")
    assert found["unlabelled"] == [{"photo": "cars_train/<i>extra.jpg"}]
    assert not {"leak", "absent_class"} & found.keys()


def write_table(folder, rows):
    folder.mkdir()
    (folder / "cars.csv").write_text("path,class,x1,y1,x2,y2\n" + "".join(rows))
    for number in range(1, 5):
        write_folders(folder, {f"{'ab'[number % 2]}/{number}.jpg": encode_jpeg(draw(number))})


def test_boxes_whose_corners_are_not_in_order(tmp_path, caplog):
    write_table(tmp_path / "cars", ["b/1.jpg,x,1,2,60,40\n", "a/2.jpg,x,60,2,20,40\n", "b/3.jpg,y,900,900,950,950\n"])
    found = find(tmp_path / "cars", tmp_path / "out")
    details = [(item["photo"], item["detail"]) for item in found["box"]]
    width, height = draw(3).shape[1::-1]
    assert details == [
        ("a/2.jpg", "has no area, from (60, 2) to (20, 40)"),
        ("b/3.jpg", f"lies outside the photo of {width} x {height} px"),
    ]
    # In whatever folder that lies beside those of the others.
    assert found["unlabelled"] == [{"photo": "a/4.jpg"}]
    with pytest.raises(ValueError, match="cars.csv, row 3: expected a box as x1, y1, x2, y2 with x1 < x2 and y1 < y2"):
        write_records(PreprocessConfig(source=str(tmp_path / "cars"), out=str(tmp_path / "records")))


def test_a_box_may_be_tiny_in_a_large_photo(tmp_path):
    write_table(tmp_path / "cars", ["b/1.jpg,x,1,2,60,33\n", "a/2.jpg,x,1,2,60,34\n"])
    found = find(tmp_path / "cars", tmp_path / "out")
    assert [(item["photo"], item["detail"]) for item in found["tiny"]] == [("b/1.jpg", "box of 59 x 31 px")]


def test_photos_inside_parquet_files(tmp_path):
    # Names that end otherwise than the photos are names alone.
    photos = [{"bytes": encode_jpeg(draw(number)), "path": f"{number}.png"} for number in (0, 1, 2, 0)]
    photos[1]["bytes"] = b"no photo"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, rows in (("train", slice(0, 3)), ("test", slice(3, 4))):
        (tmp_path / "cars").mkdir(exist_ok=True)
        columns = {"image": pa.array(photos[rows], image), "label": [0, 1, 1, 0][rows]}
        pq.write_table(pa.table(columns), tmp_path / "cars" / f"{split}.parquet")
    found = find(tmp_path / "cars", tmp_path / "out")
    assert {kind: len(items) for kind, items in found.items()} == {
        "leak": 1,
        "unreadable": 1,
        "absent_class": 1,
        "duplicate": 2,
        "near_duplicate": 2,
    }
    assert (tmp_path / "out" / "report.html").read_text("utf-8").count('src="data:image/webp;base64,') == 1


def test_an_unknown_kind_is_refused():
    assert parse_fail_on(" leak,, grey,leak") == ("leak", "grey")
    with pytest.raises(ValueError) as error:
        parse_fail_on("leak,blur")
    assert str(error.value) == (
        "Expected fail_on to be some of leak, conflict, unreadable, truncated, missing, unlabelled, box, absent_class, "
        "duplicate, near_duplicate, extension, tiny, huge, grey, imbalance, with commas. Received: fail_on='leak,blur'"
    )


def test_the_command_fails_once_all_is_written_and_logged(spoiled, tmp_path, store):
    out = tmp_path / "out"
    command = runpy.run_path(str(ROOT / "entrypoints" / "audit.py"))["main"]
    arguments = ["--source", str(spoiled), "--out", str(out), "--fail-on"]
    result = CliRunner().invoke(command, [*arguments, "huge,unreadable,leak"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: {spoiled}: expected no findings of fail_on=huge,unreadable,leak, got leak 2, unreadable 3; see "
        f"{out}/report.html"
    )
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert run.data.metrics["photos"] == 11
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("audit_") and value} == {
        "audit_leak": 2,
        "audit_conflict": 2,
        "audit_unreadable": 3,
        "audit_truncated": 2,
        "audit_missing": 1,
        "audit_unlabelled": 1,
        "audit_box": 2,
        "audit_absent_class": 1,
        "audit_duplicate": 2,
        "audit_near_duplicate": 4,
        "audit_extension": 1,
        "audit_tiny": 1,
        "audit_grey": 1,
    }
    assert run.data.metrics["audit_huge"] == 0
    artifacts = [artifact.path for artifact in store.list_artifacts(run.info.run_id)]
    assert sorted(artifacts) == ["config.json", "error.txt", "report.html", "report.json"]
    # Kinds that are not there do no harm. Without `out`, reports go to the project's home.
    assert CliRunner().invoke(command, ["--source", str(spoiled), "--fail-on", "huge"]).exit_code == 0
    (folder,) = (tmp_path / "home" / "audits").iterdir()
    assert (folder.name[:5], names(folder)) == ("cars-", ["report.html", "report.json"])


def test_preprocess_writes_no_record_files_then(spoiled, tmp_path, store, caplog):
    for name in ("03 cut off.jpg", "09 missing.jpg", "10 <i>no photo.jpg", "12 damaged.png"):
        (spoiled / "cars_train" / name).write_bytes(encode_jpeg(draw(40 + int(name[:2]))))
    out = tmp_path / "out"
    options = {"source": str(spoiled), "image_size": 32, "crop": "full", "out": str(out)}
    with pytest.raises(ValueError) as error:
        preprocess(PreprocessConfig(**options, fail_on="grey,leak,missing"))
    assert str(error.value) == (
        f"{spoiled}: expected no findings of fail_on=grey,leak,missing, got leak 2, grey 1; see {out}/report.html"
    )
    assert names(out) == ["report.html", "report.json"]
    assert "No record files were written" in (out / "report.html").read_text("utf-8")
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert (run.data.metrics["audit_leak"], run.data.metrics["near_duplicate_test_photos"]) == (2, 2)
    assert "carflavor.records" not in run.data.tags
    artifacts = [artifact.path for artifact in store.list_artifacts(run.info.run_id)]
    assert sorted(artifacts) == ["config.json", "error.txt", "report.html", "report.json"]
    # With other wishes, no photo is decoded again.
    caplog.clear()
    with caplog.at_level(logging.INFO, "carflavor"):
        _, summary = write_records(PreprocessConfig(**options, fail_on="missing"))
    assert "Going on after 15 of 15 photos" in caplog.messages
    assert names(out) == ["report.html", "report.json", "test.h5", "train.h5", "validation.h5"]
    assert summary["findings"]["leak"]["items"][1]["copy_of"]["split"] in ("train", "validation")


def test_preprocess_refuses_an_unknown_kind_before_anything_else(tmp_path):
    with pytest.raises(ValueError, match="^Expected fail_on to be some of leak, .* Received: fail_on='blur'$"):
        write_records(PreprocessConfig(source=str(tmp_path / "nothing"), fail_on="blur"))
