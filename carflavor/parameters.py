"""What each parameter of `train` may be, as click types: for its command, its config, and what a sweep varies."""

import click

from carflavor.command import OrWord
from carflavor.data.records import CROPS
from carflavor.networks import NETWORKS
from carflavor.recipes import PRESETS


def train_types():
    """Returns a dict of parameter name to click type, in the order of `carflavor.train.TrainConfig`."""
    recipe = {
        "network": click.Choice(list(NETWORKS)),
        "weights": click.STRING,
        "crop": click.Choice([*CROPS, "mixed"]),
        "input_size": click.IntRange(32, 1024),
        "train_scale": click.FloatRange(0.25, 1),
        "head_epochs": click.IntRange(0),
        "epochs": click.IntRange(1),
        "batch_size": click.IntRange(1),
        "optimizer": click.Choice(["adamw", "sgd"]),
        "learning_rate": click.FloatRange(0, min_open=True),
        "backbone_rate": click.FloatRange(0, 1, min_open=True),
        "statistics": click.Choice(["batch", "frozen"]),
        "weight_decay": click.FloatRange(0),
        "label_smoothing": click.FloatRange(0, 1),
        "min_area": click.FloatRange(0, 1, min_open=True),
        "color": click.FloatRange(0, 1),
        "randaugment": click.FloatRange(0, 1),
        "mixup": click.FloatRange(0),
        "cutmix": click.FloatRange(0, 1),
        "ema": click.FloatRange(0, 1, max_open=True),
        "class_weights": click.Choice(["none", "balanced"]),
        "precision": click.Choice(["float32", "mixed_bfloat16"]),
    }
    return {
        "data": click.STRING,
        "preset": click.Choice(list(PRESETS)),
        # What is auto is taken from the preset.
        **{name: OrWord("auto", click_type) for name, click_type in recipe.items()},
        "validation": click.Choice(["hold_out", "train"]),
        "augmented": click.BOOL,
        "temperature": OrWord("fit", click.FloatRange(0, min_open=True)),
        "devices": click.IntRange(1),
        "resume": click.BOOL,
        "seed": click.IntRange(0),
    }


def convert(values):
    """Returns values of parameters of `train`, a dict, as its command would take them from the command line.

    Raises:
        ValueError: If a parameter may not be this.
    """
    types = train_types()
    converted = {}
    for name, value in values.items():
        try:
            # As text, or click would cut the 2.5 of an int to 2.
            converted[name] = types[name].convert(str(value), None, None)
        except click.BadParameter as error:
            raise ValueError(f"{name}: {error.message}") from None
    return converted
