import click

from carflavor.command import StepCommand
from carflavor.score import ScoreConfig, score
from carflavor.scoring import ON_ERROR


@click.command(cls=StepCommand)
@click.option("--model", required=True, help="Model directory, runs:/... or models:/...")
@click.option(
    "--photos", default=ScoreConfig.photos, show_default=True, help="Folder, archive, table or URL; or sample."
)
@click.option("--top-k", default=ScoreConfig.top_k, show_default=True, type=click.IntRange(1), help="Classes in top_k.")
@click.option(
    "--min-prob",
    default=ScoreConfig.min_prob,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Probability under which the label is unknown.",
)
@click.option(
    "--on-error",
    default=ScoreConfig.on_error,
    show_default=True,
    type=click.Choice(ON_ERROR),
    help="Have photos that cannot be read as rows with an error, or end at the first one.",
)
@click.option(
    "--workers",
    default=ScoreConfig.workers,
    show_default=True,
    type=click.IntRange(0, 256),
    help="Processes that score; 0: one a core.",
)
@click.option("--master", default=ScoreConfig.master, help="Spark master to score on.")
@click.option("--out", default=ScoreConfig.out, help="Folder to write to; one under ~/.carflavor if empty.")
def main(**options):
    """Writes predictions for photos as Parquet files."""
    score(ScoreConfig(**options))


if __name__ == "__main__":
    main()
