import click

from carflavor.command import StepCommand
from carflavor.evaluate import EvaluateConfig, evaluate


@click.command(cls=StepCommand)
@click.option("--model", required=True, help="Model as path, runs:/... or models:/...")
@click.option("--data", default=EvaluateConfig.data, show_default=True, help="Folder with test.h5, or sample.")
def main(**options):
    """Measures a model on the test photos."""
    evaluate(EvaluateConfig(**options))


if __name__ == "__main__":
    main()
