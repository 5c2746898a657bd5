import click

from carflavor.command import StepCommand
from carflavor.parameters import train_types
from carflavor.train import TrainConfig, train

_HELP = {
    "data": "Folder of record files, or sample.",
    "augmented": "Learn from train-augmented.h5, as augment writes it.",
}


def train_options(function):
    """Adds an option for each parameter of the step, with the default that its dataclass has."""
    for name, click_type in reversed(train_types().items()):
        option = click.option(
            "--" + name.replace("_", "-"),
            default=getattr(TrainConfig, name),
            show_default=True,
            type=click_type,
            help=_HELP.get(name),
        )
        function = option(function)
    return function


@click.command(cls=StepCommand)
@train_options
def main(**options):
    """Trains a network and logs it as a carflavor model. What is `auto` is taken from the preset."""
    train(TrainConfig(**options))


if __name__ == "__main__":
    main()
