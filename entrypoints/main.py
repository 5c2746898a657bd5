from pathlib import Path

import click

from carflavor.command import StepCommand
from carflavor.pipeline import PipelineConfig, run_pipeline


@click.command(cls=StepCommand)
def main(**options):
    """Runs every step on the embedded sample."""
    run_pipeline(PipelineConfig(**options), project=Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    main()
