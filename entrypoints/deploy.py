import click

from carflavor.command import StepCommand
from carflavor.deploy import ACTIONS, TARGETS, DeployConfig, deploy


@click.command(cls=StepCommand)
@click.option("--model", default=DeployConfig.model, help="Model as path, runs:/... or models:/...")
@click.option("--target", default=DeployConfig.target, show_default=True, type=click.Choice(TARGETS))
@click.option(
    "--port", default=DeployConfig.port, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@click.option("--workers", default=DeployConfig.workers, show_default=True, type=click.IntRange(1, 64))
@click.option(
    "--keep", default=DeployConfig.keep, show_default=True, type=bool, help="Serve until Ctrl-C, or end at once."
)
@click.option("--name", default=DeployConfig.name, show_default=True, help="Of the image, service or endpoint.")
@click.option("--out", default=DeployConfig.out, help="Folder to write; one under ~/.carflavor if empty.")
@click.option("--action", default=DeployConfig.action, show_default=True, type=click.Choice(ACTIONS))
@click.option("--config", default=DeployConfig.config, help="Config file for azureml; our defaults if empty.")
@click.option(
    "--workspace",
    default=DeployConfig.workspace,
    help="azureml://..., subscription/resource-group/name or a config.json; the one known from here if empty.",
)
@click.option("--traffic", default=DeployConfig.traffic, show_default=True, help="Steps at azureml, in percent.")
@click.option(
    "--dry-run", default=DeployConfig.dry_run, show_default=True, type=bool, help="Print what azureml would change."
)
def main(**options):
    """Serves a model and asks it for a photo of the sample, or writes what a server needs."""
    deploy(DeployConfig(**options))


if __name__ == "__main__":
    main()
