import click

from carflavor.command import StepCommand
from carflavor.networks import NETWORKS
from carflavor.train import CROP_CHOICES, TrainConfig, train


@click.command(cls=StepCommand)
@click.option("--data", default=TrainConfig.data, show_default=True, help="Folder of record files, or sample.")
@click.option("--network", default=TrainConfig.network, show_default=True, type=click.Choice(list(NETWORKS)))
@click.option("--crop", default=TrainConfig.crop, show_default=True, type=click.Choice(list(CROP_CHOICES)))
@click.option(
    "--input-size",
    default=TrainConfig.input_size,
    show_default=True,
    help="Side of the network's input in pixels, or auto.",
)
@click.option("--epochs", default=TrainConfig.epochs, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=TrainConfig.batch_size, show_default=True, type=click.IntRange(1))
@click.option(
    "--learning-rate",
    default=TrainConfig.learning_rate,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Highest learning rate.",
)
@click.option("--weight-decay", default=TrainConfig.weight_decay, show_default=True, type=click.FloatRange(0))
@click.option("--label-smoothing", default=TrainConfig.label_smoothing, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=TrainConfig.seed, show_default=True, type=click.IntRange(0))
def main(**options):
    """Trains a network and logs it as a carflavor model."""
    train(TrainConfig(**options))


if __name__ == "__main__":
    main()
