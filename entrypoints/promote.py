import click

from carflavor.command import StepCommand
from carflavor.promote import CROP_CHOICES, PromoteConfig, promote


@click.command(cls=StepCommand)
@click.option("--data", required=True, help="Folder with test.h5, or sample.")
@click.option("--name", default=PromoteConfig.name, show_default=True, help="Name in the registry.")
@click.option(
    "--challenger", default=PromoteConfig.challenger, show_default=True, help="Version to promote: number or alias."
)
@click.option(
    "--crop",
    default=PromoteConfig.crop,
    show_default=True,
    type=click.Choice(CROP_CHOICES),
    help="Protocol that decides: the one that callers use.",
)
@click.option(
    "--margin",
    default=PromoteConfig.margin,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Accuracy that may be lost, as share; 0: it must be better.",
)
@click.option(
    "--dry-run", default=PromoteConfig.dry_run, show_default=True, type=bool, help="Say it, and change nothing."
)
def main(**options):
    """Makes a version the champion if evaluation finds it better than the one that is."""
    promote(PromoteConfig(**options))


if __name__ == "__main__":
    main()
