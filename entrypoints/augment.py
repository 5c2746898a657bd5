import click

from carflavor.augment import AugmentConfig, augment
from carflavor.command import StepCommand


@click.command(cls=StepCommand)
@click.option("--data", default=AugmentConfig.data, show_default=True, help="Folder of record files, or sample.")
@click.option(
    "--copies", default=AugmentConfig.copies, show_default=True, type=click.IntRange(1, 100), help="Of each photo."
)
@click.option(
    "--operations",
    default=AugmentConfig.operations,
    show_default=True,
    help="What is done to each copy: names, each perhaps with the most that it does, as in rotate:5.",
)
@click.option("--seed", default=AugmentConfig.seed, show_default=True, type=click.IntRange(0))
@click.option(
    "--workers",
    default=AugmentConfig.workers,
    show_default=True,
    type=click.IntRange(0, 256),
    help="Processes that make copies; 0: one a core.",
)
@click.option("--master", default=AugmentConfig.master, help="Spark master.")
def main(**options):
    """Writes changed copies of the training photos beside these."""
    augment(AugmentConfig(**options))


if __name__ == "__main__":
    main()
