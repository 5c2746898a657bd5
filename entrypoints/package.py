import click

from carflavor.command import StepCommand
from carflavor.package import PackageConfig, package


@click.command(cls=StepCommand)
@click.option("--model", required=True, help="Model as path, runs:/... or models:/...")
@click.option("--register-as", default=PackageConfig.register_as, show_default=True, help="Name in the registry.")
@click.option("--alias", default=PackageConfig.alias, show_default=True, help="Alias of the new version.")
def main(**options):
    """Registers a model as a version with an alias."""
    package(PackageConfig(**options))


if __name__ == "__main__":
    main()
