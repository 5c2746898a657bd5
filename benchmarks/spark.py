"""How fast photos become record files on Spark, beside loops that only decode and resize them.

    python benchmarks/spark.py

It takes some ten minutes and needs Java 17. Nothing else should run on the machine, which should have two cores: all
contestants work on the same photos, in turns, and none has more of the machine than two processes that decode.

- bare_2: two loops of `cv2.imdecode` and `cv2.resize`, started together, one thread each, nothing is written
- single: the whole step without its MLflow run, from the listing to the reports, with workers=1 and crop=full
- spark_1: the same on a standalone cluster of a master and one worker with one core
- spark_2: the same with two such workers. The driver, which gathers, has no core of its own

Sessions are open and have done some other photos before they are measured. The photos are drawn ones of 700 pixels,
each under several names. The first keys of the JSON line at the end are of photos a second

- two_over_parallel_bare: spark_2 over bare_2. At least 0.8.
- two_over_one: spark_2 over spark_1
- spark_over_single: spark_1 over single, that is, what Spark costs

In `decoding` they are of the time from the first to the last photo alone, without the listing, the search for
near-duplicates and the reports, which the driver makes. Figures are medians of the rounds.
"""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
from clusters import one_and_two_workers
from drawn_photos import draw_photos
from measuring import Contestant, describe_machine
from preprocess import IMAGE_SIZE, SIZES, contestant, say

_WARM_UP_PHOTOS = 400
_DRAWN = SIZES["medium"][1] // 16
_NAMES = 16  # of a photo, which takes thirty times as long to draw as to decode


def link_photos(folder, target, copies):
    """Gives each photo of a folder several names in another one."""
    for path in folder.rglob("*.jpg"):
        for copy in range(copies):
            link = target / path.relative_to(folder).with_stem(f"{path.stem}-{copy}")
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)


def measure(folder, source, warm_up, number, rounds):
    """Returns a dict of lists of photos a second: of a round of each contestant, and of its decoding alone."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:

        def start(kind, script="spark_contestants.py", **settings):
            process = contestant(kind, script, source=str(source), image_size=IMAGE_SIZE, **settings)
            stack.callback(process.close)
            return process

        masters = stack.enter_context(one_and_two_workers(folder))
        loops = [start("bare", "preprocess_contestants.py") for _ in range(2)]
        ours = {"single": start("single", warm_up=str(warm_up), workers=1)}
        for workers, master in masters.items():
            ours[f"spark_{workers}"] = start("spark", warm_up=str(warm_up), master=master)
        rates = {}
        for turn in range(rounds + 1):
            found = {"bare_2": sum(threads.map(Contestant.measure_round, loops))}
            for name, process in ours.items():
                seconds, decoding = process.measure_round()
                found |= {name: number / seconds, f"{name}_decoding": number / decoding}
            say(", ".join(f"{name} {rate:.0f} photos/s" for name, rate in found.items()))
            if turn:  # the first one reads the photos from the disk
                for name, rate in found.items():
                    rates.setdefault(name, []).append(rate)
    return rates


def compare(figures, ending=""):
    """Returns the ratios of the figures whose names have an ending."""
    single, one, two = (figures[f"{name}{ending}"] for name in ("single", "spark_1", "spark_2"))
    return {
        "two_over_parallel_bare": two / figures["bare_2"],
        "two_over_one": two / one,
        "spark_over_single": one / single,
    }


@click.command()
@click.option(
    "--number", default=SIZES["medium"][1] // _NAMES, show_default=True, type=click.IntRange(100), help="Drawn photos."
)
@click.option("--names", default=_NAMES, show_default=True, type=click.IntRange(1), help="Names of each of them.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(number, names, rounds):
    """Measures photos a second of preprocess on Spark."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_photos(folder / "drawn", number, SIZES["medium"][0])
        draw_photos(folder / "warm up", _WARM_UP_PHOTOS, SIZES["small"][0])
        link_photos(folder / "drawn", folder / "photos", names)
        rates = measure(folder, folder / "photos", folder / "warm up", number * names, rounds)
    figures = {name: median(values) for name, values in rates.items()}
    line = compare(figures) | {"decoding": compare(figures, "_decoding"), "figures": figures}
    click.echo(json.dumps(line | {"photos": number * names, "rounds": rounds, "machine": machine}))


if __name__ == "__main__":
    main()
