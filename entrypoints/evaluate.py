import click

from carflavor.command import StepCommand
from carflavor.evaluate import EvaluateConfig, evaluate


@click.command(cls=StepCommand)
@click.option("--model", required=True, help="Model of any flavor as path, runs:/... or models:/...")
@click.option("--data", default=EvaluateConfig.data, show_default=True, help="Folder with test.h5, or sample.")
@click.option(
    "--against", default=EvaluateConfig.against, help="Model to compare with, or run of evaluate: runs:/<run id>."
)
@click.option(
    "--answered-accuracy",
    default=EvaluateConfig.answered_accuracy,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Accuracy of the answers that the threshold for unknown is chosen for.",
)
def main(**options):
    """Measures a model on the test photos, and compares it with another."""
    evaluate(EvaluateConfig(**options))


if __name__ == "__main__":
    main()
