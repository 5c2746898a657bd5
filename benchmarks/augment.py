"""How fast photos are changed, one by one on one core, beside Keras's own layers for the same operations.

    python benchmarks/augment.py

It takes a minute. Nothing else should run on the machine. Contestants, on the same squares, in turns, each with one
thread and a seed of its own for each photo:

- ours: `carflavor.data.operations`, with the operations that `augment` does without being told
- keras: the layers RandomZoom, RandomFlip, RandomRotation, RandomColorJitter, RandomGaussianBlur and RandomErasing, on
  one photo at a time; the box is carried by those that move the car

The first keys of the JSON line at the end are

- ours_over_keras: ours over keras, photos a second. At least 5.
- start_seconds: what a worker waits before its first photo, of each.

Figures are medians of the rounds.
"""

import json
import sys
from pathlib import Path
from statistics import median

import click
from measuring import describe_machine, take_turns

FOLDER = Path(__file__).parent
KINDS = ("ours", "keras")


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(rounds):
    """Measures photos a second of augmentation on one core."""
    machine = describe_machine()
    environment = {"PYTHONPATH": str(FOLDER.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    script = str(FOLDER / "augment_contestants.py")
    commands = {kind: ([sys.executable, script, kind], environment) for kind in KINDS}
    numbers, about = take_turns(commands, rounds, lambda line: click.echo(line, err=True))
    rates = {kind: median(numbers[kind]) for kind in KINDS}
    line = {
        "ours_over_keras": rates["ours"] / rates["keras"],
        "start_seconds": {kind: about[f"{kind}_start_seconds"] for kind in KINDS},
        "photos_per_second": rates,
        "rounds": rounds,
        "machine": machine,
    }
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
