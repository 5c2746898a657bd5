import click

from carflavor.audit import AuditConfig, audit
from carflavor.command import StepCommand
from carflavor.data.layouts import LAYOUTS


@click.command(cls=StepCommand)
@click.option("--source", default=AuditConfig.source, show_default=True, help="Folder of photos, or sample.")
@click.option("--layout", default=AuditConfig.layout, show_default=True, type=click.Choice(LAYOUTS))
@click.option(
    "--fail-on",
    default=AuditConfig.fail_on,
    help="Kinds of findings at which the step fails, as leak,unreadable; none if empty.",
)
@click.option(
    "--workers",
    default=AuditConfig.workers,
    show_default=True,
    type=click.IntRange(0, 256),
    help="Processes that decode; 0: one a core.",
)
@click.option("--out", default=AuditConfig.out, help="Folder to write to; one under ~/.carflavor if empty.")
def main(**options):
    """Looks for what is wrong with a dataset's photos and labels."""
    audit(AuditConfig(**options))


if __name__ == "__main__":
    main()
