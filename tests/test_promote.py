import logging

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import CLASS_NAMES
from mlflow.store._unity_catalog.registry.rest_store import UcModelRegistryStore

import carflavor
from carflavor import promote as promote_module
from carflavor.data.records import RecordWriter
from carflavor.image import squash
from carflavor.measures import compare
from carflavor.package import PackageConfig, package
from carflavor.promote import PromoteConfig, judge, promote

PHOTOS = 24


def right_for(*rows):
    """Answers for `PHOTOS` photos of class 0 that are right in these rows."""
    return np.where(np.isin(np.arange(PHOTOS), rows), 0, 1)


def comparison(only_first, only_second, photos=1000):
    """A comparison in which each model alone recognises so many photos, and both the others."""
    labels = np.zeros(photos, int)
    first, second = labels.copy(), labels.copy()
    second[:only_first] = 1
    first[only_first : only_first + only_second] = 1
    return compare(labels, first, second, ["a", "b"])


@pytest.mark.parametrize(
    ("pairs", "margin", "verdict"),
    [
        # Exact binomial, two-sided: 6 to 0 is 2/64 = 0.031, 5 to 0 is 2/32 = 0.063, 20 to 8 is 0.036, 20 to 9 is 0.061.
        ([(6, 0)], 0.0, "better"),
        ([(5, 0)], 0.0, "not better"),
        ([(20, 8)], 0.0, "better"),
        ([(20, 9)], 0.0, "not better"),
        ([(0, 0)], 0.0, "not better"),
        ([(0, 6)], 0.0, "worse"),
        # On two crops: better on one is enough, worse on one is too much.
        ([(6, 0), (3, 3)], 0.0, "better"),
        ([(6, 0), (0, 6)], 0.0, "worse"),
        ([(5, 0), (5, 0)], 0.0, "not better"),
        # From -0.90 to +0.90 points.
        ([(10, 10)], 0.0, "not better"),
        ([(10, 10)], 0.0095, "not worse"),
        ([(10, 10)], 0.0085, "not better"),
        ([(10, 10), (0, 6)], 0.0095, "worse"),
        # Surely worse, by 0.6 points and by less than 1.3 of them.
        ([(0, 6)], 0.013, "not worse"),
        ([(0, 6)], 0.006, "worse"),
    ],
)
def test_judge(pairs, margin, verdict):
    assert judge([comparison(*pair) for pair in pairs], margin) == verdict


class Fixed(mlflow.pyfunc.PythonModel):
    """A real model of another flavor that answers the same, whatever it is asked."""

    def __init__(self, answers):
        self.answers = answers

    def predict(self, context, model_input: pd.DataFrame, params=None):
        return self.answers


@pytest.fixture
def register(store):
    """A function that registers a model with fixed answers as the next version of `cars`."""

    def register(answers):
        with mlflow.start_run():
            info = mlflow.pyfunc.log_model(name="model", python_model=Fixed(answers), pip_requirements=[])
        return mlflow.register_model(info.model_uri, "cars").version

    return register


def write_test_split(folder, crops):
    """Writes test photos of class 0 alone."""
    settings = {"source": "cars", "crop_margin": 4}
    with RecordWriter(folder / "test.h5", crops, 16, CLASS_NAMES, settings) as writer:
        for row in range(PHOTOS):
            square = np.full((16, 16, 3), row, "uint8")
            writer.append(dict.fromkeys(crops, square), 0, f"{row}.jpg", (16, 16), (0, 0, 16, 16))
    return str(folder)


@pytest.fixture
def records(tmp_path):
    return write_test_split(tmp_path / "records", ("box",))


@pytest.fixture
def both(tmp_path):
    """The same photos stored under both crops."""
    return write_test_split(tmp_path / "both", ("box", "full"))


GOOD, BAD = right_for(*range(20)), right_for(*range(8))


def aliases(store):
    return {alias: str(version) for alias, version in store.get_registered_model("cars").aliases.items()}


def tags(store, version):
    found = store.get_model_version("cars", version).tags
    start = "carflavor_evaluation_"
    return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}


def test_first_version_becomes_champion_without_a_comparison(store, register, both, caplog):
    register(BAD)
    store.set_registered_model_alias("cars", "challenger", "1")
    with caplog.at_level(logging.INFO, logger="carflavor"):
        assert promote(PromoteConfig(both, name="cars")) == "first"
    assert aliases(store) == {"champion": "1"}
    assert caplog.messages[-1] == (
        "models:/cars/1 is the champion now, the first one: crop=box top-1 33.3 % (18.0 to 53.3) of 24 photos; "
        "crop=full top-1 33.3 % (18.0 to 53.3) of 24 photos"
    )
    (run,) = store.search_runs(["0"], "tags.`carflavor.step` = 'promote'")
    assert tags(store, "1") == {
        "run": run.info.run_id,
        "data": "cars",
        "verdict": "first",
        **{
            f"{crop}_{name}": value
            for crop in ("box", "full")
            for name, value in {
                "photos": "24",
                "top_1": "0.3333",
                "top_1_low": "0.1797",
                "top_1_high": "0.5329",
            }.items()
        },
    }
    assert {"report.html", "evaluation.json", "predictions_box.csv"} <= {
        file.path for file in store.list_artifacts(run.info.run_id)
    }


def test_better_challenger_takes_the_place_of_the_champion(store, register, both, caplog):
    register(BAD), register(GOOD)
    store.set_registered_model_alias("cars", "champion", "1")
    store.set_registered_model_alias("cars", "challenger", "2")
    with caplog.at_level(logging.INFO, logger="carflavor"):
        assert promote(PromoteConfig(both, name="cars", crop="box")) == "better"
    assert aliases(store) == {"champion": "2"}
    # 12 photos that it alone recognises: 2 / 2^12, and 12/26 -+ 1.96 sqrt(13/26 - (12/26)^2) / sqrt(26).
    assert caplog.messages[-1] == (
        "models:/cars/2 is the champion now instead of version 1: crop=box +50.0 points (+25.6 to +66.7, p = 0.00049) "
        "on 24 photos"
    )
    found = tags(store, "2")
    assert (found["verdict"], found["against"]) == ("better", "1")
    assert (found["box_difference"], found["box_mcnemar_p"]) == ("0.5000", "0.0004883")
    assert (found["box_difference_low"], found["box_difference_high"]) == ("0.2556", "0.6675")
    assert tags(store, "1") == {}


def test_challenger_that_is_not_better_is_refused(store, register, records, both):
    register(GOOD), register(right_for(*range(22))), register(BAD)
    store.set_registered_model_alias("cars", "champion", "1")
    with pytest.raises(ValueError) as error:
        promote(PromoteConfig(both, name="cars", challenger="2", crop="full"))
    assert str(error.value) == (
        "models:/cars/2 is not promoted: evaluation did not find it better than models:/cars/1: crop=full +8.3 points "
        "(-5.0 to +20.4, p = 0.5) on 24 photos"
    )
    assert aliases(store) == {"champion": "1"}
    # Whoever looks at the registry sees why.
    assert (tags(store, "2")["verdict"], tags(store, "2")["full_top_1"]) == ("not better", "0.9167")
    with pytest.raises(ValueError, match="did not find it not worse by 10 points than models:/cars/1: crop=box -50.0"):
        promote(PromoteConfig(records, name="cars", challenger="3", margin=0.1))
    assert tags(store, "3")["verdict"] == "worse"
    assert promote(PromoteConfig(records, name="cars", challenger="2", margin=0.06)) == "not worse"
    assert aliases(store) == {"champion": "2"}
    assert [run.info.status for run in store.search_runs(["0"], "tags.`carflavor.step` = 'promote'")] == [
        "FINISHED",
        "FAILED",
        "FAILED",
    ]


def test_dry_run_changes_nothing(store, register, records, caplog):
    register(BAD), register(GOOD)
    store.set_registered_model_alias("cars", "champion", "1")
    with caplog.at_level(logging.INFO, logger="carflavor"):
        assert promote(PromoteConfig(records, name="cars", challenger="2", dry_run=True)) == "better"
    assert caplog.messages[-1].startswith(
        "models:/cars/2 would become the champion instead of version 1; nothing was changed: crop=box +50.0 points"
    )
    with pytest.raises(ValueError, match="models:/cars/1 is not promoted"):
        store.set_registered_model_alias("cars", "champion", "2")
        promote(PromoteConfig(records, name="cars", challenger="1", dry_run=True))
    assert aliases(store) == {"champion": "2"}
    assert tags(store, "1") == tags(store, "2") == {}


def test_tags_of_an_earlier_evaluation_go(store, register, records):
    register(BAD), register(GOOD)
    store.set_model_version_tag("cars", "2", "carflavor_manifest_sha256", "1a")
    store.set_model_version_tag("cars", "2", "carflavor_evaluation_full_make", "0.5")
    promote(PromoteConfig(records, name="cars", challenger="2"))
    assert "full_make" not in tags(store, "2")
    assert store.get_model_version("cars", "2").tags["carflavor_manifest_sha256"] == "1a"


def test_a_champion_that_came_meanwhile_stays(store, register, records, monkeypatch):
    register(BAD), register(GOOD), register(GOOD)
    store.set_registered_model_alias("cars", "champion", "1")
    evaluate = promote_module.evaluate_in_run

    def promote_another(config):
        store.set_registered_model_alias("cars", "champion", "3")
        return evaluate(config)

    monkeypatch.setattr(promote_module, "evaluate_in_run", promote_another)
    with pytest.raises(ValueError) as error:
        promote(PromoteConfig(records, name="cars", challenger="2"))
    assert str(error.value) == (
        "Expected models:/cars@champion to be version 1 still, got version 3: it was moved while photos were scored. "
        "Promote again"
    )
    assert aliases(store) == {"champion": "3"}


@pytest.mark.parametrize("broken", ["set_model_version_tag", "set_registered_model_alias"])
def test_a_registry_that_fails_leaves_the_champion_and_the_next_run_heals(
    store, register, records, monkeypatch, broken
):
    register(BAD), register(GOOD)
    store.set_registered_model_alias("cars", "champion", "1")
    store.set_registered_model_alias("cars", "challenger", "2")

    def fail(*arguments):
        raise mlflow.MlflowException("the registry has gone")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, broken, fail)
        with pytest.raises(mlflow.MlflowException, match="the registry has gone"):
            promote(PromoteConfig(records, name="cars"))
    assert aliases(store) == {"champion": "1", "challenger": "2"}
    assert promote(PromoteConfig(records, name="cars")) == "better"
    assert aliases(store) == {"champion": "2"}


def test_the_last_call_is_made_up_for(store, register, records, monkeypatch, caplog):
    register(BAD), register(GOOD)
    store.set_registered_model_alias("cars", "champion", "1")
    store.set_registered_model_alias("cars", "challenger", "2")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "delete_registered_model_alias", interrupt)
        with pytest.raises(KeyboardInterrupt):
            promote(PromoteConfig(records, name="cars"))
    assert aliases(store) == {"champion": "2", "challenger": "2"}
    with caplog.at_level(logging.INFO, logger="carflavor"):
        assert promote(PromoteConfig(records, name="cars")) == "champion"
    assert caplog.messages[-1] == "models:/cars/2 is the champion already: nothing was measured"
    assert aliases(store) == {"champion": "2"}


def test_what_cannot_be_promoted(store, register, records):
    with pytest.raises(mlflow.MlflowException, match="Registered Model with name=cars not found"):
        promote(PromoteConfig(records, name="cars"))
    register(GOOD)
    with pytest.raises(ValueError) as error:
        promote(PromoteConfig(records, name="cars"))
    assert str(error.value) == (
        "challenger: expected a version of cars, as number or alias (there are: none), got 'challenger'"
    )
    with pytest.raises(mlflow.MlflowException, match=r"Model Version \(name=cars, version=7\) not found"):
        promote(PromoteConfig(records, name="cars", challenger="7"))
    with pytest.raises(ValueError, match=r"crop: expected box, as .*test.h5 has it, got full"):
        promote(PromoteConfig(records, name="cars", challenger="1", crop="full"))
    assert aliases(store) == {}


def test_a_model_of_ours_against_another(store, register, packed_model, tiny_network, photos, tmp_path):
    """The packed model, whose files are those of a real version."""
    said = tiny_network.predict_on_batch(np.stack([squash(squash(photo, 48), 32) for photo in photos])).argmax(axis=1)
    settings = {"source": "cars", "crop_margin": 4}
    with RecordWriter(tmp_path / "records" / "test.h5", ("box",), 48, CLASS_NAMES, settings) as writer:
        for row, (photo, label) in enumerate(zip(photos, said, strict=True)):
            writer.append({"box": squash(photo, 48)}, label, f"{row}.jpg", photo.shape[:2], (0, 0, 5, 5))
    register((said + 1) % 3)
    with mlflow.start_run() as run:
        mlflow.log_artifacts(packed_model, "model")
    mlflow.register_model(f"runs:/{run.info.run_id}/model", "cars")
    store.set_registered_model_alias("cars", "champion", "1")
    assert promote(PromoteConfig(str(tmp_path / "records"), name="cars", challenger="2")) == "better"
    # Eight of eight photos: 2 / 2^8.
    assert tags(store, "2")["box_mcnemar_p"] == "0.007812"
    assert tags(store, "2")["box_top_5"] == "1.0000"
    assert carflavor.load_model("models:/cars@champion").class_names == CLASS_NAMES


def test_unity_catalog_takes_the_names_of_all_tags(store, packed_model, records):
    """`Tag name ... contains one or more of the reserved characters`, it says of others. Its names have three parts."""
    name = "main.cars.carflavor"
    package(PackageConfig(str(packed_model), register_as=name, alias="challenger", engine="keras"))
    assert promote(PromoteConfig(records, name=name)) == "first"
    assert store.get_registered_model(name).aliases["champion"] == 1
    names = store.get_model_version(name, "1").tags.keys()
    assert {"carflavor_manifest_sha256", "carflavor_evaluation_verdict"} <= names
    assert [tag for tag in names if set(tag) & set(".,-=/:")] == []
    # What MLflow demands of a model before it goes there.
    UcModelRegistryStore._validate_model_signature(None, str(packed_model))
