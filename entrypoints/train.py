import click

from carflavor.command import OrWord, StepCommand
from carflavor.networks import NETWORKS
from carflavor.recipes import PRESETS
from carflavor.train import (
    CLASS_WEIGHT_CHOICES,
    CROP_CHOICES,
    OPTIMIZER_CHOICES,
    PRECISION_CHOICES,
    STATISTICS_CHOICES,
    VALIDATION_CHOICES,
    TrainConfig,
    train,
)


def recipe_option(flag, click_type):
    """An option that is `auto` unless it is given: then the preset says it."""
    return click.option(flag, default="auto", show_default=True, type=OrWord("auto", click_type))


@click.command(cls=StepCommand)
@click.option("--data", default=TrainConfig.data, show_default=True, help="Folder of record files, or sample.")
@click.option("--preset", default=TrainConfig.preset, show_default=True, type=click.Choice(list(PRESETS)))
@recipe_option("--network", click.Choice(list(NETWORKS)))
@recipe_option("--weights", click.STRING)
@recipe_option("--crop", click.Choice(list(CROP_CHOICES)))
@recipe_option("--input-size", click.IntRange(32, 1024))
@recipe_option("--head-epochs", click.IntRange(0))
@recipe_option("--epochs", click.IntRange(1))
@recipe_option("--batch-size", click.IntRange(1))
@recipe_option("--optimizer", click.Choice(OPTIMIZER_CHOICES))
@recipe_option("--learning-rate", click.FloatRange(0, min_open=True))
@recipe_option("--backbone-rate", click.FloatRange(0, 1, min_open=True))
@recipe_option("--statistics", click.Choice(STATISTICS_CHOICES))
@recipe_option("--weight-decay", click.FloatRange(0))
@recipe_option("--label-smoothing", click.FloatRange(0, 1))
@recipe_option("--min-area", click.FloatRange(0, 1, min_open=True))
@recipe_option("--color", click.FloatRange(0, 1))
@recipe_option("--randaugment", click.FloatRange(0, 1))
@recipe_option("--mixup", click.FloatRange(0))
@recipe_option("--cutmix", click.FloatRange(0))
@recipe_option("--ema", click.FloatRange(0, 1, max_open=True))
@recipe_option("--class-weights", click.Choice(CLASS_WEIGHT_CHOICES))
@recipe_option("--precision", click.Choice(PRECISION_CHOICES))
@click.option("--validation", default=TrainConfig.validation, show_default=True, type=click.Choice(VALIDATION_CHOICES))
@click.option(
    "--temperature",
    default=TrainConfig.temperature,
    show_default=True,
    type=OrWord("fit", click.FloatRange(0, min_open=True)),
)
@click.option("--devices", default=TrainConfig.devices, show_default=True, type=click.IntRange(1))
@click.option("--resume", default=TrainConfig.resume, show_default=True, type=bool)
@click.option("--seed", default=TrainConfig.seed, show_default=True, type=click.IntRange(0))
def main(**options):
    """Trains a network and logs it as a carflavor model. What is `auto` is taken from the preset."""
    train(TrainConfig(**options))


if __name__ == "__main__":
    main()
