import json

import pytest

from carflavor.card import shorten, write_card

TRAINING = {
    "preset": "article",
    "network": "efficientnet-lite0",
    "weights": "imagenet",
    "crop": "box",
    "validation": "hold_out",
    "best_epoch": 18,
    "validation_accuracy": 0.8841,
    "temperature": 1.0625,
    "data": {"source": "stanford cars", "source_digest": "1a2b"},
}
FIGURES = {"photos": 540, "agreement": 0.9963, "accuracy": 0.9074, "keras_accuracy": 0.9074}
MANIFEST = {
    "format_version": 2,
    "carflavor_version": "0.1.0",
    "input_size": 208,
    "image_size": 256,
    "crop_margin": 16,
    "training": TRAINING,
    "engine": {"name": "openvino", "precision": "bfloat16"},
    "parity": {"with": "keras in float32", "crops": {"box": FIGURES}},
}
EVALUATION = {
    "run": "7f3e",
    "data": {"source": "stanford cars", "digest": "00"},
    "crops": {
        "box": {
            "measurement": {
                "photos": 1635,
                "top_1": {"count": 1341, "of": 1635, "value": 0.8202, "low": 0.8008, "high": 0.8381},
                "top_5": {"count": 1586, "of": 1635, "value": 0.97, "low": 0.9606, "high": 0.9773},
                "make": None,
                "without_near_duplicates": {"count": 0, "of": 0, "value": None, "low": None, "high": None},
                "calibration": {"ece": 0.0217, "mean_prob": 0.8119},
            },
            "threshold": {
                "answered_accuracy": 0.95,
                "test": {
                    "min_prob": 0.6412,
                    "answered": {"count": 1226, "of": 1635, "value": 0.7498, "low": 0.7282, "high": 0.7702},
                    "accuracy": {"count": 1163, "of": 1226, "value": 0.9486, "low": 0.9348, "high": 0.9596},
                },
            },
        }
    },
}
NAMES = ["Ram C/V Cargo Van 2012", "BMW 1 | <b>M</b>_", "Citroën l'Ami\n# 1961"]

CARD = r"""# cars

Names the car in a photo: one of 3 classes, Ram C/V Cargo Van 2012, BMW 1 \| \<b\>M\</b\>\_, Citroën l'Ami \# 1961.

## How it came to be

| what | value |
|---|---|
| network | efficientnet-lite0 |
| input | 208 x 208 pixels |
| began with weights | imagenet |
| learned from | stanford cars |
| digest of that source | 1a2b |
| crop in training | box |
| preset | article |
| epoch kept, from 0 | 18 |
| validation accuracy, by which it was chosen | 88.4 % |
| temperature | 1.062 |
| engine | OpenVINO in bfloat16 |
| packed by carflavor | 0.1.0 |

`manifest.json` has every parameter of the training under `training`, and the SHA-256 of each file.

## How good it is

Measured by `evaluate` on 1,635 test photos of stanford cars, run `7f3e`,
before it was packed. `box`: the car is cut out by its annotated box, widened by 16 pixels. `full`: the
whole photo.

| crop | top-1 | top-5 | make | top-1 without near-duplicates |
|---|---|---|---|---|
| `box` | 82.0 % (80.1 to 83.8) | 97.0 % (96.1 to 97.7) | not known | none |

In brackets are 95 % intervals (Wilson). They say what chance in the choice of the test photos can do, and nothing of
how much your photos differ from these.

- With crop=box, the mean probability of its answers is 81.2 %, and the
  calibration error 0.022.
- With crop=box and `min_prob=0.6412` it answers for 75.0 % (72.8 to 77.0) of these photos; of its
  answers 94.9 % (93.5 to 96.0) are right.
- With so few classes the five likeliest are all: top-5 is always 100 %.

- With crop=box, OpenVINO in bfloat16 gives the same answer as Keras for 99.63 %
  of 540 photos; accuracy 90.74 %, by Keras
  90.74 %.

## Limits

- It always names one of its classes, also for another car or for no car at all; `min_prob` makes it say `unknown`.
- It has learned cars cut out by their boxes. Without a box in the request it does much worse.
- Nothing is known of photos unlike those that it has learned from: by night, in rain, of other cameras or countries.

## Licence

For research alone. The licence of the photos
that it has learned from (stanford cars) and of the weights that it began with (imagenet) may limit its
use, too. The code in `code/` is carflavor, under the Apache License 2.0.

## How to ask it

It is version <version> of `cars` in the registry, registered with the alias `champion`, which may be another
version's by now. Serve it and ask for one photo:

```bash
python -m carflavor.server --model "models:/cars/<version>" --port 5001 &
(printf '{"dataframe_records": [{"image": "'; base64 < car.jpg | tr -d '\n'; printf '"}]}') |
  curl -s -H 'Content-Type: application/json' --data-binary @- http://127.0.0.1:5001/invocations
```

In Python:

```python
import carflavor

answer = carflavor.load_model("models:/cars/<version>").predict(["car.jpg"], boxes=[(40, 30, 150, 100)])
print(answer["label"][0], answer["prob"][0])
```
"""


@pytest.fixture
def folder(tmp_path):
    """What of a model directory the card is made of; a function that writes it."""

    def write(names=NAMES, **changes):
        (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **changes}))
        (tmp_path / "classes.json").write_text(json.dumps(names))
        return tmp_path

    return write


def test_the_whole_card(folder):
    path = folder()
    card = write_card(path, "cars", "champion", "For research alone.", EVALUATION)
    assert (path / "README.md").read_text(encoding="utf-8") == card == CARD
    described = shorten(card, 4)
    assert "It is version 4 of `cars` in the registry" in described
    assert 'python -m carflavor.server --model "models:/cars/4" --port 5001 &\n' in described
    assert 'carflavor.load_model("models:/cars/4")' in described


def test_a_model_of_which_little_is_known(folder):
    path = folder(training={}, engine={"name": "keras", "precision": "float32"}, parity=None)
    card = write_card(path, "cars", "challenger")
    assert (
        "It was not measured on test photos before it was packed. "
        "`mlflow run . -e evaluate --env-manager local` does that.\n"
    ) in card
    assert "Not stated by who packed it: ask before you pass it on. The licence of the photos\n" in card
    assert "that it has learned from (not known) and of the weights that it began with (not known)" in card
    assert "- Its probabilities are not calibrated on photos that it has not learned from.\n" in card
    assert "| engine | Keras in float32 |" in card
    assert "None" not in card and "same answer as Keras" not in card and "epoch kept" not in card


@pytest.mark.parametrize(
    ("changes", "expected", "absent"),
    [
        ({"crop": "full"}, '.predict(["car.jpg"])\n', "cut out by their boxes"),
        ({"crop": "full"}, "- It has learned whole photos. With a box in the request it does worse.\n", "much worse"),
        ({"crop": "mixed"}, "boxes=[(40, 30, 150, 100)]", "in the request it does"),
        (
            {"validation": "train", "temperature": None},
            "- It has learned from the validation photos, too: nothing measured on these says how good it is.\n",
            "| temperature |",
        ),
        (
            {"data": {"source": "embedded sample"}},
            "**It has learned invented cars that carflavor draws. It knows no real car.**\n",
            "| digest of that source |",
        ),
    ],
)
def test_limits_follow_from_the_training(folder, changes, expected, absent):
    card = write_card(folder(training={**TRAINING, **changes}), "cars", "champion")
    assert expected in card
    assert absent not in card


def test_many_classes_are_counted(folder):
    card = write_card(folder([f"Make Car {number}" for number in range(196)]), "cars", "champion")
    assert "one of 196 classes, Make Car 0, Make Car 1, " in card
    assert "Make Car 7, and 188 more, listed in `classes.json`.\n" in card
    assert "Make Car 8" not in card


def test_a_registry_has_room_for_5000_characters(folder):
    path = folder()
    described = shorten(write_card(path, "cars", "champion", "Long. " * 450, EVALUATION), 4)
    assert len((path / "README.md").read_text(encoding="utf-8")) > 5000 >= len(described)
    assert described.endswith("\n\nThe rest stands in README.md of the model.")
    assert "## Licence" in described and "## How to ask it" not in described
    assert shorten("a" * 5000, 4) == "a" * 5000
    assert shorten("a" * 5001, 4) == "a" * 4956 + "\n\nThe rest stands in README.md of the model."
