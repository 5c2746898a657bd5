import numpy as np
import pytest

from carflavor.parity import measure_parity

NAMES = ["a", "b", "c"]


def answers(classes, prob=0.8):
    """Probabilities of photos that are taken for these classes."""
    probabilities = np.full((len(classes), 3), (1 - prob) / 2)
    probabilities[np.arange(len(classes)), classes] = prob
    return probabilities


def test_figures_of_a_small_case_by_hand():
    labels = np.array([0, 1, 2, 0])
    keras = answers([0, 1, 2, 1], 0.8)
    engine = answers([0, 1, 1, 1], 0.7)
    parity = measure_parity(labels, engine, keras, NAMES)
    assert (parity.photos, parity.agreement) == (4, 0.75)
    # The third photo: class 2 has 0.8 by Keras and 0.15 by the engine; class 1 has 0.1 and 0.7.
    assert parity.max_difference == pytest.approx(0.65)
    assert parity.mean_difference == pytest.approx((0.1 + 0.1 + 0.65 + 0.1) / 4)
    figures = parity.to_dict()
    assert (figures["accuracy"], figures["keras_accuracy"], figures["accuracy_difference"]) == (0.5, 0.75, -0.25)
    assert figures["accuracy_difference_low"] < -0.25 < figures["accuracy_difference_high"]


def test_agreement_of_photos_that_were_not_learned():
    labels = np.array([0, 1])
    learned = answers([0, 1])
    unseen = answers([0, 1, 2, 0]), answers([0, 1, 1, 0])
    parity = measure_parity(labels, learned, learned, NAMES, unseen)
    assert (parity.photos, parity.agreement, parity.comparison.first.of) == (4, 0.75, 2)
    assert parity.max_difference == pytest.approx(0.7)
    assert parity.refusal == "it agrees with Keras on less than 98.5% of the photos"


def test_photos_that_agree_less_count():
    labels = np.array([0, 1])
    few = answers([2]), answers([2])
    parity = measure_parity(labels, answers([0, 1]), answers([0, 2]), NAMES, few)
    assert (parity.photos, parity.agreement) == (2, 0.5)


@pytest.mark.parametrize("unseen", [False, True])
def test_what_is_no_number_is_refused(unseen):
    good, bad = answers([0, 1]), answers([0, 1])
    bad[1] = np.nan
    engines = (good, (bad, good)) if unseen else (bad, None)
    assert measure_parity(np.array([0, 0]), engines[0], good, NAMES, engines[1]).refusal == (
        "it answers with what is no number"
    )


def cases(photos, worse, better=0, other_mistake=0):
    """An engine that errs where Keras is right, the other way round, and in another way."""
    labels = np.zeros(photos, int)
    keras, engine = np.zeros(photos, int), np.zeros(photos, int)
    engine[:worse] = 1
    keras[worse : worse + better] = 1
    changed = slice(worse + better, worse + better + other_mistake)
    keras[changed], engine[changed] = 1, 2
    return measure_parity(labels, answers(engine), answers(keras), NAMES)


@pytest.mark.parametrize(
    ("parity", "refusal"),
    [
        (cases(1000, worse=0), ""),
        # 0.7 points worse, and not by chance.
        (cases(1000, worse=7), "it costs more than 0.3 points of accuracy, and not by chance"),
        # As much worse, of which chance is a part: 11 photos lost and 4 won.
        (cases(1000, worse=11, better=4), ""),
        # Surely worse, and little: 0.28 points.
        (cases(10_000, worse=28), ""),
        (cases(10_000, worse=32), "it costs more than 0.3 points of accuracy, and not by chance"),
        (cases(1000, worse=0, better=14), ""),
        (cases(1000, worse=0, better=16), "it agrees with Keras on less than 98.5% of the photos"),
        (cases(1000, worse=0, other_mistake=15), ""),
        (cases(1000, worse=0, other_mistake=16), "it agrees with Keras on less than 98.5% of the photos"),
    ],
)
def test_the_gate(parity, refusal):
    assert parity.refusal == refusal


def test_it_describes_itself_in_one_line():
    assert cases(1000, worse=7).describe() == (
        "99.30% of 1,000 photos get the same answer; accuracy 99.30%, by Keras 100.00% (difference -0.70 points, 95 % "
        "interval -1.25 to -0.15); probabilities differ by 0.0049 on average and by 0.7000 at most"
    )
