import click

from carflavor.command import StepCommand
from carflavor.recipes import PRESETS
from carflavor.sweep import SweepConfig, sweep


@click.command(cls=StepCommand)
@click.option("--data", default=SweepConfig.data, show_default=True, help="Folder of record files, or sample.")
@click.option("--preset", default=SweepConfig.preset, show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--settings", default=SweepConfig.settings, help="What is the same in all trials: YAML, or a file of it.")
@click.option("--ranges", default=SweepConfig.ranges, show_default=True, help="What differs: YAML, or a file of it.")
@click.option("--trials", default=SweepConfig.trials, show_default=True, type=click.IntRange(1))
@click.option("--prune", default=SweepConfig.prune, show_default=True, type=bool)
@click.option("--name", default=SweepConfig.name, show_default=True)
@click.option("--master", default=SweepConfig.master, help="Spark master.")
@click.option("--parallel", default=SweepConfig.parallel, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=SweepConfig.seed, show_default=True, type=click.IntRange(0))
def main(**options):
    """Trains many configurations and compares them."""
    sweep(SweepConfig(**options))


if __name__ == "__main__":
    main()
