"""How fast photos in files become Parquet files of predictions, beside bare loops that read, decode and infer.

    python benchmarks/scoring.py

It takes some forty minutes and needs Java 17. Nothing else should run on the machine, which should have two cores: all
contestants score the same photos, in turns, and none has more of the machine than two threads that work on photos.

- bare_1: a loop in one process and one thread that reads a batch of files, decodes them with carflavor's own image
  code, and has OpenVINO infer; without Spark, without a model directory, nothing is written. The fastest batch of 8, 16
  and 32, each compiled for its size, is taken
- bare_2: two such loops, started together, each on half of the photos
- spark_1: the step without its MLflow run, from the listing to the published files, on a standalone cluster of a master
  and one worker with one core, and so one thread
- spark_2: the same with two such workers

The network is EfficientNet-Lite0 with random weights, 196 classes, 224 px, in float32 or, where the CPU has it,
bfloat16. Sessions are open and have scored some other photos before they are measured; the model is loaded anew in each
round. The photos are drawn ones of 700 pixels, each under several names. The first keys of the JSON line at the end are

- two_over_parallel_bare: photos a second, spark_2 over bare_2. At least 0.8.
- over_bare: photos a second, spark_1 over bare_1. At least 0.7.
- cost_growth: seconds a photo of spark_2 with 100,000 photos over that with 1,000. At most 1.15.

`sizes` has, for each number of photos, the seconds of the step and those a photo, and the most memory in millions of
bytes that the driver's Python and the Pythons of both workers took. What a step takes whatever the number of photos,
its start-up, is left out of the seconds a photo: it is `start_up_s`, the seconds with 32 photos less what these cost.
Figures are medians of the rounds; of the largest size there is one.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import click
from clusters import Cluster, one_and_two_workers
from drawn_photos import draw_photos
from measuring import Contestant, describe_machine, memory_of
from preprocess import FOLDER, contestant, say

_SIDE = 700  # pixels
_DRAWN = 250
_NAMES = 48  # of each, for the photos that contestants take turns at: start-up, which ours have, counts little
_FEW = 32  # photos, that cost next to nothing beside start-up
_ROUNDS = 5  # of these and of the smallest size; each larger size has fewer
_SECONDS_A_SAMPLE = 1  # to look at it takes milliseconds
_SCRIPT = "scoring_contestants.py"


def link_photos(drawn, target, number):
    """Gives photos some number of names, in folders of a thousand."""
    paths = sorted(drawn.rglob("*.jpg"))
    for index in range(number):
        link = target / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(paths[index % len(paths)], link)


def pack(photos, precision, folder):
    """Packs the network with random weights; returns the path of the model directory."""
    settings = {
        "network": "efficientnet-lite0",
        "model": None,
        "precision": precision,
        "photos": [str(path) for path in sorted(photos.rglob("*.jpg"))[:32]],
        "folder": str(folder),
    }
    command = [sys.executable, str(FOLDER / "serving_models.py"), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "TF_CPP_MIN_LOG_LEVEL": "2"}
    packed = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=folder)
    if packed.returncode:
        raise click.ClickException(f"{packed.stderr}the network could not be packed")
    return folder / "ours"


def measure(folder, model, precision, photos, warm_up, rounds):
    """Returns a dict of lists of photos a second, a round of each contestant."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:

        def start(kind, **settings):
            process = contestant(kind, _SCRIPT, model=str(model), photos=str(photos), **settings)
            stack.callback(process.close)
            return process

        masters = stack.enter_context(one_and_two_workers(folder))
        alone = start("bare", precision=precision, half=None)
        halves = [start("bare", precision=precision, half=half) for half in (0, 1)]
        ours = {workers: start("spark", warm_up=str(warm_up), master=master) for workers, master in masters.items()}
        rates = {}
        for turn in range(rounds + 1):
            found = {"bare_1": alone.measure_round(), "bare_2": sum(threads.map(Contestant.measure_round, halves))}
            found |= {f"spark_{workers}": process.measure_round()["per_second"] for workers, process in ours.items()}
            say(", ".join(f"{name} {rate:.1f} photos/s" for name, rate in found.items()))
            if turn:  # the first one reads the photos from the disk
                for name, rate in found.items():
                    rates.setdefault(name, []).append(rate)
    return rates


def measure_sizes(folder, model, drawn, warm_up, sizes):
    """Returns a dict of number of photos -> dict of figures of two workers."""
    figures = {}
    with ExitStack() as stack:
        place = folder / "cluster for sizes"
        place.mkdir()
        cluster = stack.enter_context(Cluster(place, 2))
        for place, number in enumerate((_FEW, *sizes)):
            photos = folder / f"{number} photos"
            link_photos(drawn, photos, number)
            process = contestant(
                "spark", _SCRIPT, model=str(model), photos=str(photos), warm_up=str(warm_up), master=cluster.master
            )
            rounds = 1 if number == max(sizes) else max(_ROUNDS - place, 2)
            try:
                with watching_memory(cluster) as peaks:
                    found = [process.measure_round() for _ in range(rounds)]
            finally:
                process.close()
            seconds = median(one["seconds"] for one in found)
            peak = max(one["peak_bytes"] for one in found)
            figures[number] = {"seconds": seconds, "driver_mb": peak / 1e6, "workers_mb": max(peaks) / 1e6}
            say(f"{number:,} photos: {seconds:.1f} s, driver {peak / 1e6:.0f} MB, workers {max(peaks) / 1e6:.0f} MB")
    # What few photos cost beside start-up is known from the largest size.
    small, largest = figures.pop(_FEW), max(sizes)
    per_photo = (figures[largest]["seconds"] - small["seconds"]) / (largest - _FEW)
    start_up = small["seconds"] - _FEW * per_photo
    for number in sizes:
        figures[number]["seconds_a_photo"] = (figures[number]["seconds"] - start_up) / number
    return {"start_up_s": start_up, "sizes": figures}


@contextmanager
def watching_memory(cluster):
    """Yields a list that is filled with the bytes that the Pythons of all workers of a cluster take."""
    ended, found = threading.Event(), [0]

    def watch():
        while not ended.wait(_SECONDS_A_SAMPLE):
            found.append(memory_of([process for worker in cluster.workers for process in worker.pythons()]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


@click.command()
@click.option("--number", default=_DRAWN, show_default=True, type=click.IntRange(32), help="Drawn photos.")
@click.option("--names", default=_NAMES, show_default=True, type=click.IntRange(1), help="Names of each of them.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=click.IntRange(100),
    default=[1_000, 10_000, 100_000],
    show_default=True,
    help="Numbers of photos for the cost of each; may be repeated.",
)
def main(number, names, rounds, sizes):
    """Measures photos a second of batch scoring on Spark, and how its cost grows."""
    machine = describe_machine()
    has_bfloat16 = {"avx512_bf16", "amx_bf16"} & set(machine["cpu_flags"])
    precision = "bfloat16" if has_bfloat16 else "float32"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_photos(folder / "drawn", number, _SIDE)
        link_photos(folder / "drawn", folder / "photos", number * names)
        link_photos(folder / "drawn", folder / "warm up", 1024)
        model = pack(folder / "drawn", precision, folder)
        rates = measure(folder, model, precision, folder / "photos", folder / "warm up", rounds)
        growth = measure_sizes(folder, model, folder / "drawn", folder / "warm up", sorted(sizes))
    figures = {name: median(values) for name, values in rates.items()}
    by_size = growth["sizes"]
    line = {
        "two_over_parallel_bare": figures["spark_2"] / figures["bare_2"],
        "over_bare": figures["spark_1"] / figures["bare_1"],
        "cost_growth": by_size[max(sizes)]["seconds_a_photo"] / by_size[min(sizes)]["seconds_a_photo"],
        "figures": figures,
        **growth,
        "photos": number * names,
        "precision": precision,
        "rounds": rounds,
        "machine": machine,
    }
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
