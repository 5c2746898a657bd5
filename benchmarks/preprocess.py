"""How fast photos become record files, beside a loop that only decodes and resizes them.

    python benchmarks/preprocess.py
    python benchmarks/preprocess.py --photos ../shared/data/stanford-cars-crops

It takes some minutes. Nothing else should run on the machine. Contestants, on the same photos, in turns:

- bare: `cv2.imdecode` and `cv2.resize`, one thread, nothing is written
- ours_1: the whole step without its MLflow run, from the listing to the reports, with workers=1 and crop=full
- ours_all: the same with a worker a core
- bare_all: as many bare loops as cores, started together

The photos are drawn ones in three sizes, with 0.2 to 0.3 bytes a pixel as real ones have, or a folder's. The first keys
of the JSON line at the end are, for photos of 700 pixels or the folder's,

- one_worker_over_bare: ours_1 over bare, photos a second. At least 0.9.
- all_over_parallel_bare: ours_all over bare_all. At least 0.9.
- peak_growth_4n: memory of ours_all, all processes, at its peak, with four times the photos over once. At most 1.1.

Figures are medians of the rounds.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
from drawn_photos import draw_photos
from measuring import Contestant, describe_machine

FOLDER = Path(__file__).parent
# Pixels of the longer side, and how many: enough for start-up and reports, two seconds or so, not to count. Stanford's
# photos are of the second size, 700 x 483 in the mean, and about as many; its crops are of the first.
SIZES = {"small": (288, 6000), "medium": (700, 16000), "large": (1200, 2000)}
IMAGE_SIZE = 256


def say(line):
    click.echo(line, err=True)


def contestant(kind, script="preprocess_contestants.py", **settings):
    """Returns a process that measures, ready for its first round."""
    command = [sys.executable, str(FOLDER / script), kind, json.dumps(settings)]
    process = Contestant(kind, command, {"PYTHONPATH": str(FOLDER.parent)})
    process.wait_until_ready()
    return process


def measure(source, rounds, cores):
    """Returns a dict of the medians of photos a second."""
    source = str(source)
    figures = {}
    with ExitStack() as stack, ThreadPoolExecutor(cores) as threads:

        def start(kind, **settings):
            process = contestant(kind, source=source, image_size=IMAGE_SIZE, **settings)
            stack.callback(process.close)
            return process

        loops = [start("bare") for _ in range(cores)]
        ours = {"ours_1": start("ours", workers=1), "ours_all": start("ours", workers=cores)}
        for turn in range(rounds + 1):
            found = {"bare": loops[0].measure_round()}
            for name, process in ours.items():
                found[name] = process.measure_round()
            found["bare_all"] = sum(threads.map(Contestant.measure_round, loops))
            if turn:  # the first one reads the photos from the disk
                for name, rate in found.items():
                    figures.setdefault(name, []).append(rate)
                say(", ".join(f"{name} {rate:.0f} photos/s" for name, rate in found.items()))
    return {name: median(rates) for name, rates in figures.items()}


def measure_peak(source, cores):
    """Returns the bytes of memory that ours takes at its peak, with a worker a core."""
    process = contestant("peak", source=str(source), image_size=IMAGE_SIZE, workers=cores)
    try:
        return process.measure_round()
    finally:
        process.close()


@click.command()
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: drawn ones]")
@click.option("--share", default=1.0, show_default=True, type=click.FloatRange(0.01, 1), help="Of the drawn photos.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(photos, share, rounds):
    """Measures photos a second and memory of preprocess."""
    machine = describe_machine()
    cores = machine["cores"]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = {"given": photos} if photos else {}
        if not photos:
            for name, (side, number) in SIZES.items():
                folders[name] = Path(folder) / name
                draw_photos(folders[name], round(share * number), side)
        for name, source in folders.items():
            say(f"{name}:")
            figures[name] = measure(source, rounds, cores)
        if not photos:
            say("memory, of four times as many:")
            side, number = SIZES["small"]
            draw_photos(Path(folder) / "4n", round(4 * share * number), side)
            peaks = {name: measure_peak(Path(folder) / name, cores) for name in ("small", "4n")}
    ratios = {
        name: {
            "one_worker_over_bare": found["ours_1"] / found["bare"],
            "all_over_parallel_bare": found["ours_all"] / found["bare_all"],
        }
        for name, found in figures.items()
    }
    first = ratios["given" if photos else "medium"]
    growth = {} if photos else {"peak_growth_4n": peaks["4n"] / peaks["small"], "peak_bytes": peaks}
    line = first | growth | {"by_size": ratios, "figures": figures, "rounds": rounds, "machine": machine}
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
