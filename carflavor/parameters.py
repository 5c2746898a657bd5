"""What each parameter of `train` may be, as click types: for its command, and for what a sweep fixes and varies."""

import click

from carflavor.command import OrWord
from carflavor.networks import NETWORKS
from carflavor.recipes import PRESETS
from carflavor.train import (
    CLASS_WEIGHT_CHOICES,
    CROP_CHOICES,
    OPTIMIZER_CHOICES,
    PRECISION_CHOICES,
    STATISTICS_CHOICES,
    VALIDATION_CHOICES,
)


def train_types():
    """Returns a dict of parameter name to click type, in the order of `carflavor.train.TrainConfig`."""
    recipe = {
        "network": click.Choice(list(NETWORKS)),
        "weights": click.STRING,
        "crop": click.Choice(list(CROP_CHOICES)),
        "input_size": click.IntRange(32, 1024),
        "train_scale": click.FloatRange(0.25, 1),
        "head_epochs": click.IntRange(0),
        "epochs": click.IntRange(1),
        "batch_size": click.IntRange(1),
        "optimizer": click.Choice(OPTIMIZER_CHOICES),
        "learning_rate": click.FloatRange(0, min_open=True),
        "backbone_rate": click.FloatRange(0, 1, min_open=True),
        "statistics": click.Choice(STATISTICS_CHOICES),
        "weight_decay": click.FloatRange(0),
        "label_smoothing": click.FloatRange(0, 1),
        "min_area": click.FloatRange(0, 1, min_open=True),
        "color": click.FloatRange(0, 1),
        "randaugment": click.FloatRange(0, 1),
        "mixup": click.FloatRange(0),
        "cutmix": click.FloatRange(0),
        "ema": click.FloatRange(0, 1, max_open=True),
        "class_weights": click.Choice(CLASS_WEIGHT_CHOICES),
        "precision": click.Choice(PRECISION_CHOICES),
    }
    return {
        "data": click.STRING,
        "preset": click.Choice(list(PRESETS)),
        # What is auto is taken from the preset.
        **{name: OrWord("auto", click_type) for name, click_type in recipe.items()},
        "validation": click.Choice(VALIDATION_CHOICES),
        "temperature": OrWord("fit", click.FloatRange(0, min_open=True)),
        "devices": click.IntRange(1),
        "resume": click.BOOL,
        "seed": click.IntRange(0),
    }
