import click

from carflavor.command import StepCommand
from carflavor.engines import ENGINES
from carflavor.package import PRECISIONS, PackageConfig, package


@click.command(cls=StepCommand)
@click.option("--model", required=True, help="Model as path, runs:/... or models:/...")
@click.option("--register-as", default=PackageConfig.register_as, show_default=True, help="Name in the registry.")
@click.option("--alias", default=PackageConfig.alias, show_default=True, help="Alias of the new version.")
@click.option("--engine", default=PackageConfig.engine, show_default=True, type=click.Choice(ENGINES))
@click.option("--precision", default=PackageConfig.precision, show_default=True, type=click.Choice(PRECISIONS))
@click.option("--data", default=PackageConfig.data, show_default=True, help="Record files to compare the engine on.")
@click.option("--licence", default=PackageConfig.licence, help="Licence of the model, for its card.")
def main(**options):
    """Packs a model with an engine and registers it as a version with an alias."""
    package(PackageConfig(**options))


if __name__ == "__main__":
    main()
