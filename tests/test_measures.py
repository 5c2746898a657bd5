import numpy as np
import pytest

from carflavor.measures import (
    NO_CLASS,
    Predictions,
    Share,
    choose_min_prob,
    compare,
    count_confusions,
    find_hardest,
    find_makes,
    measure,
    measure_calibration,
    reject,
    rejection_curve,
    share_of,
)

# Four photos of three classes; the second class is taken for the first once, the third has no photo.
LABELS = np.array([0, 1, 1, 0])
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])


def bools(text):
    return np.array([mark == "1" for mark in text])


def test_share_has_the_interval_of_wilson():
    share = share_of(bools("1111111110"))
    assert (share.count, share.of, share.value) == (9, 10, 0.9)
    # (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.96
    assert (share.low, share.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert str(share) == "90.0 % (59.6 to 98.2)"


def test_share_of_nothing():
    assert share_of(bools("")) == Share(0, 0, None, None, None)
    assert str(share_of(bools(""))) == "none"


def test_measure_by_hand():
    measurement = measure(LABELS, Predictions.of_probabilities(PROBABILITIES), ["a", "b", "c"])
    assert (measurement.photos, measurement.top_1.value, measurement.top_5.value) == (4, 0.5, 1.0)
    assert (measurement.make, measurement.without_near_duplicates) == (None, None)
    assert measurement.by_class == [
        {
            "class": "a",
            "photos": 2,
            "right": 1,
            "recall": 0.5,
            "predicted": 2,
            "precision": 0.5,
            "most often taken for": "c",
        },
        {
            "class": "b",
            "photos": 2,
            "right": 1,
            "recall": 0.5,
            "predicted": 1,
            "precision": 1.0,
            "most often taken for": "a",
        },
        {
            "class": "c",
            "photos": 0,
            "right": 0,
            "recall": None,
            "predicted": 1,
            "precision": 0.0,
            "most often taken for": None,
        },
    ]
    assert measurement.confused == [
        {"class": "a", "taken for": "c", "photos": 1, "of": 2},
        {"class": "b", "taken for": "a", "photos": 1, "of": 2},
    ]


def test_top_5_counts_the_fifth_and_not_the_sixth():
    probabilities = np.array([[0.3, 0.25, 0.2, 0.1, 0.08, 0.07]] * 2)
    measurement = measure(np.array([4, 5]), Predictions.of_probabilities(probabilities), list("abcdef"))
    assert (measurement.top_1.value, measurement.top_5.value) == (0.0, 0.5)


def test_labels_alone_leave_out_what_needs_probabilities():
    measurement = measure(np.array([0, 1]), Predictions(np.array([0, 0])), ["a", "b"])
    assert measurement.top_1.value == 0.5
    assert (measurement.top_5, measurement.calibration, measurement.rejections) == (None, None, None)


def test_an_answer_that_is_no_class_is_wrong_and_no_confusion():
    names = ["Audi A1", "Audi A2", "BMW 1"]
    # Index -1 would be the last class, and its make that of the third photo.
    measurement = measure(np.array([0, 1, 2]), Predictions(np.array([0, NO_CLASS, NO_CLASS])), names)
    assert (measurement.top_1.count, measurement.make.count, measurement.confused) == (1, 1, [])
    assert count_confusions(np.array([0, 1]), np.array([0, NO_CLASS]), 2).tolist() == [[1, 0], [0, 0]]


def test_without_near_duplicates_the_other_photos_count():
    measurement = measure(
        LABELS, Predictions.of_probabilities(PROBABILITIES), ["a", "b", "c"], near_duplicates=bools("1001")
    )
    # Of the four photos the first and third are right; the first has a near-duplicate.
    assert (measurement.without_near_duplicates.count, measurement.without_near_duplicates.of) == (1, 2)


def test_makes_of_stanford_cars():
    names = [
        "AM General Hummer SUV 2000",
        "HUMMER H2 SUT Crew Cab 2009",
        "Aston Martin Virage Coupe 2012",
        "Aston Martin V8 Vantage Coupe 2012",
        "Land Rover LR2 SUV 2012",
        "Lamborghini Aventador Coupe 2012",
        "Ram C/V Cargo Van Minivan 2012",
        "Mercedes-Benz C-Class Sedan 2012",
        "smart fortwo Convertible 2012",
    ]
    # In the order of the makes: AM General, Aston Martin, HUMMER, Lamborghini, Land Rover, ...
    assert find_makes(names).tolist() == [0, 2, 1, 1, 4, 3, 6, 5, 7]


@pytest.mark.parametrize(
    "names", [["Audi A1", "Audi A2"], ["Audi A1", "BMW 1"], ["大众帕萨特", "丰田卡罗拉"], ["Audi A1"]]
)
def test_names_without_makes_to_tell_apart(names):
    assert find_makes(names) is None


def test_make_is_right_where_the_class_is_not():
    names = ["Audi A1", "Audi A2", "BMW 1"]
    measurement = measure(np.array([0, 1, 2]), Predictions(np.array([1, 1, 0])), names)
    assert (measurement.top_1.count, measurement.make.count) == (1, 2)


def test_calibration_by_hand():
    # Two photos in the bin from 14/15 to 1, half of them right; two in that from 9/15 to 10/15, both right.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    labels = np.array([0, 1, 1, 1])
    calibration = measure_calibration(labels, Predictions.of_probabilities(probabilities))
    assert calibration.mean_prob == pytest.approx(0.8)
    assert calibration.ece == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)
    # -(ln 0.95 + ln 0.05 + 2 ln 0.65) / 4
    assert calibration.nll == pytest.approx(0.97715, abs=1e-5)
    # (2 * 0.05^2 + 2 * 0.95^2 + 2 * 2 * 0.35^2) / 4
    assert calibration.brier == pytest.approx(0.575)
    assert [row["photos"] for row in calibration.bins] == [0] * 9 + [2] + [0] * 4 + [2]
    last = calibration.bins[-1]
    assert (last["to"], last["mean_prob"], last["accuracy"]) == (1.0, pytest.approx(0.95), 0.5)
    assert calibration.bins[0]["accuracy"] is None


def test_calibration_of_predictions_that_give_their_own_probability_only():
    calibration = measure_calibration(np.array([0, 1]), Predictions(np.array([0, 0]), prob=np.array([1.0, 0.0])))
    assert (calibration.ece, calibration.nll, calibration.brier) == (0.0, None, None)
    assert [calibration.bins[place]["photos"] for place in (0, 14)] == [1, 1]


PROB, RIGHT = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), bools("11010")


@pytest.mark.parametrize(
    ("target", "expected"),
    # Answered from 0.9, 0.8, ... on: 1/1, 2/2, 2/3, 3/4, 3/5 are right.
    [(0.6, 0.0), (0.7, 0.6), (0.75, 0.6), (0.76, 0.8), (1.0, 0.8)],
)
def test_threshold_is_the_smallest_that_reaches_the_target(target, expected):
    assert choose_min_prob(PROB, RIGHT, target) == expected
    assert choose_min_prob(PROB.astype("float32"), RIGHT, target) == pytest.approx(expected, abs=1.1e-4)


def test_threshold_that_does_not_exist():
    assert choose_min_prob(PROB, bools("01111"), 0.95) is None


def test_threshold_answers_the_photo_that_it_was_taken_from():
    prob = np.array([0.12345678, 0.5], np.float32)
    min_prob = choose_min_prob(prob, bools("11"), 1.0)
    assert min_prob == 0.0
    min_prob = choose_min_prob(np.append(prob, np.float32(0.1)), bools("110"), 1.0)
    assert min_prob == 0.1234
    assert reject(prob, bools("11"), min_prob).answered.count == 2


def test_reject_by_hand():
    rejection = reject(PROB, RIGHT, 0.7)
    assert (rejection.answered.count, rejection.answered.of) == (3, 5)
    assert (rejection.accuracy.count, rejection.accuracy.of) == (2, 3)
    assert reject(PROB, RIGHT, 0.95).accuracy.value is None


def test_rejection_curve_answers_equal_probabilities_together():
    answered, accuracy = rejection_curve(np.array([0.5, 0.9, 0.5, 0.2]), bools("0110"))
    assert answered.tolist() == [0.25, 0.75, 1.0]
    assert accuracy.tolist() == [1.0, pytest.approx(2 / 3), 0.5]


def test_hardest_photos_are_wrong_with_the_highest_probability():
    predictions = Predictions(np.array([1, 0, 1, 1]), prob=np.array([0.6, 0.99, 0.9, 0.7]))
    assert find_hardest(np.array([0, 0, 0, 0]), predictions, 2).tolist() == [2, 3]


def test_comparison_by_hand():
    labels = np.array([0] * 10 + [1] * 10)
    first, second = labels.copy(), labels.copy()
    second[:6] = 1  # six photos of the first class that only the first model recognises
    first[10] = 0  # and one of the other class that only the second one does
    comparison = compare(labels, first, second, ["a", "b"])
    assert (comparison.first.count, comparison.second.count) == (19, 14)
    assert (comparison.only_first, comparison.only_second) == (6, 1)
    assert comparison.difference == 0.25
    # Two-sided: of seven coins at most one shows tails, 2 (1 + 7) / 2^7
    assert comparison.p_value == pytest.approx(0.125)
    # d = 5/22, sqrt((8/22 - d^2) / 22) * 1.96 to both sides
    assert (comparison.low, comparison.high) == (pytest.approx(-0.00613, abs=1e-5), pytest.approx(0.46068, abs=1e-5))
    assert comparison.by_class == [
        {"class": "a", "photos": 10, "first": 10, "second": 4},
        {"class": "b", "photos": 10, "first": 9, "second": 10},
    ]


def test_comparison_of_a_model_with_itself():
    comparison = compare(np.array([0, 1]), np.array([0, 0]), np.array([0, 0]), ["a", "b"])
    assert (comparison.difference, comparison.p_value, comparison.by_class) == (0.0, 1.0, [])
    assert comparison.low < 0 < comparison.high
