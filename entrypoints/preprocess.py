import click

from carflavor.command import StepCommand
from carflavor.data.layouts import LAYOUTS
from carflavor.preprocess import CROP_CHOICES, PreprocessConfig, preprocess


@click.command(cls=StepCommand)
@click.option("--source", default=PreprocessConfig.source, show_default=True, help="Folder of photos, or sample.")
@click.option("--layout", default=PreprocessConfig.layout, show_default=True, type=click.Choice(LAYOUTS))
@click.option("--crop", default=PreprocessConfig.crop, show_default=True, type=click.Choice(list(CROP_CHOICES)))
@click.option(
    "--image-size",
    default=PreprocessConfig.image_size,
    show_default=True,
    type=click.IntRange(16, 2048),
    help="Side of the stored squares in pixels.",
)
@click.option(
    "--skip-unreadable",
    default=PreprocessConfig.skip_unreadable,
    show_default=True,
    type=bool,
    help="Leave out photos that cannot be read, and list them.",
)
@click.option(
    "--fail-on",
    default=PreprocessConfig.fail_on,
    help="Kinds of findings of the audit at which nothing is written, as leak,grey; none if empty.",
)
@click.option("--seed", default=PreprocessConfig.seed, show_default=True, type=click.IntRange(0))
@click.option(
    "--workers",
    default=PreprocessConfig.workers,
    show_default=True,
    type=click.IntRange(0, 256),
    help="Processes that decode; 0: one a core.",
)
@click.option("--master", default=PreprocessConfig.master, help="Spark master to decode on.")
@click.option(
    "--gather",
    default=PreprocessConfig.gather,
    show_default=True,
    type=bool,
    help="Gather what Spark's tasks write in self-contained files.",
)
@click.option("--out", default=PreprocessConfig.out, help="Folder to write to; one under ~/.carflavor if empty.")
def main(**options):
    """Writes a dataset's photos as HDF5 record files."""
    preprocess(PreprocessConfig(**options))


if __name__ == "__main__":
    main()
