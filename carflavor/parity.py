"""Whether an engine answers like the network that was trained, run by Keras: the gate that packaging goes through."""

from dataclasses import dataclass

import numpy as np

from carflavor.measures import Comparison, compare

MIN_AGREEMENT = 0.985
MAX_LOSS = 0.003  # of accuracy, where it is no chance


@dataclass(frozen=True)
class Parity:
    """An engine beside Keras on the same photos.

    Attributes:
        photos: How many the agreement and the differences are of.
        agreement: Share of the photos that both take for the same class.
        max_difference: Largest difference between two probabilities of one photo and class.
        mean_difference: Mean over the photos of the difference in the probability of the class that Keras names.
        comparison: `carflavor.measures.Comparison` of their accuracy, the engine first; maybe of other photos.
    """

    photos: int
    agreement: float
    max_difference: float
    mean_difference: float
    comparison: Comparison

    @property
    def refusal(self):
        """Why the engine may not serve the model, or an empty text."""
        if not np.isfinite(self.max_difference):
            return "it answers with what is no number"
        if self.agreement < MIN_AGREEMENT:
            return f"it agrees with Keras on less than {MIN_AGREEMENT:.1%} of the photos"
        if -self.comparison.difference > MAX_LOSS and self.comparison.high < 0:
            return f"it costs more than {100 * MAX_LOSS:.1f} points of accuracy, and not by chance"
        return ""

    def describe(self):
        """Returns the figures in one line."""
        accuracy = self.comparison
        return (
            f"{self.agreement:.2%} of {self.photos:,} photos get the same answer; accuracy {accuracy.first.value:.2%}, "
            f"by Keras {accuracy.second.value:.2%} (difference {100 * accuracy.difference:+.2f} points, 95 % interval "
            f"{100 * accuracy.low:+.2f} to {100 * accuracy.high:+.2f}); probabilities differ by "
            f"{self.mean_difference:.4f} on average and by {self.max_difference:.4f} at most"
        )

    def to_dict(self):
        """Returns the figures as a flat dict of numbers, for a manifest and for metrics."""
        return {
            "photos": self.photos,
            "agreement": self.agreement,
            "max_difference": self.max_difference,
            "mean_difference": self.mean_difference,
            "accuracy": self.comparison.first.value,
            "keras_accuracy": self.comparison.second.value,
            "accuracy_difference": self.comparison.difference,
            "accuracy_difference_low": self.comparison.low,
            "accuracy_difference_high": self.comparison.high,
        }


def measure_parity(labels, probabilities, keras_probabilities, class_names, unseen=None):
    """Compares two engines.

    Args:
        labels: (N,) int, the true classes.
        probabilities: (N, C) float, of the engine.
        keras_probabilities: (N, C) float, of Keras in float32.
        class_names: C names.
        unseen: The same two arrays of other photos, for agreement and differences where the network has learned the
            N photos: it is sure of those, and engines agree on what a network is sure of. Those where they agree less
            count.

    Returns:
        `Parity`.
    """
    comparison = compare(labels, probabilities.argmax(axis=1), keras_probabilities.argmax(axis=1), class_names)
    pairs = [*([unseen] if unseen else []), (probabilities, keras_probabilities)]
    probabilities, keras_probabilities = min(pairs, key=lambda pair: _agreement(*pair))
    predicted, keras_predicted = probabilities.argmax(axis=1), keras_probabilities.argmax(axis=1)
    differences = np.abs(probabilities - keras_probabilities)
    return Parity(
        photos=len(predicted),
        agreement=_agreement(probabilities, keras_probabilities),
        max_difference=float(np.max([np.abs(first - second).max() for first, second in pairs])),
        mean_difference=float(differences[np.arange(len(predicted)), keras_predicted].mean()),
        comparison=comparison,
    )


def _agreement(probabilities, keras_probabilities):
    return float(np.mean(probabilities.argmax(axis=1) == keras_probabilities.argmax(axis=1)))
