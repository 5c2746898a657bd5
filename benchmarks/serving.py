"""How fast photos are served, beside the article's way, plain MLflow, and what the CPU can do without a server.

    python benchmarks/serving.py
    python benchmarks/serving.py --network resnet152 --precision int8

It takes about 15 minutes on two cores, and 8 GB of memory. Linux only. Nothing else should run on the machine: the
clients run on it, too, and take a few percent of a core (`clients_cpu`).

Contestants, of the same network with the same weights:

- article: the article's PythonModel (see article_serving.py) behind `mlflow models serve --env-manager local`
- mlflow: our model directory behind the same command
- ours: our model directory behind `python -m carflavor.server`
- bare: OpenVINO in a process without a server, with the model's own IR and precision (see bare_openvino.py). One photo
  at a time gives the latency. The best of batches of 8, 16 and 32 in one stream or one for each core gives the photos a
  second, the limit: for ResNet-152 of photos decoded before, for EfficientNet-Lite0 with decoding on the same cores.

Clients send one photo a request over a kept connection, and the next when it is answered; they send the same bytes to
every server. All servers are up while one of them is measured; those that wait take no CPU. Contestants take turns:
article with 1 client, with 16, mlflow with 1, ... and again. Figures are medians of the rounds.

The networks have random weights, made so that they tell the photos apart (see serving_models.py), 196 classes and 224
px; or give a packed model:

    python benchmarks/serving.py --resnet152 runs:/.../model --lite0 models:/car/3

The last line is JSON. Its first keys, which mean something only where nothing else runs:

- over_article_16: ResNet-152, 16 clients, photos a second of ours over article. At least 10.
- p50_over_bare_1: ResNet-152, one client, median latency of ours over bare. At most 1.5.
- over_limit_16: ResNet-152, 16 clients, photos a second of ours over the limit. At least 0.8.
- lite0_over_limit_16: the same of EfficientNet-Lite0. The aim is 0.6.
- lite0_p50_minus_bare_ms: EfficientNet-Lite0, one client, median latency of ours minus bare. At most 10.
  Bare does not decode here, which would add about a millisecond (`decoding_p50_ms`).
- lite0_over_article_16, lite0_p50_over_bare_1: as without `lite0_`.

Then all figures, for each network and contestant by number of clients. `memory_mb` is the resident memory of all
processes of the server after that load, in millions of bytes, with what they share counted once; `idle_memory_mb` that
before the first request; `startup_s` the seconds from the start of the command until /health answers 200, once (bare:
of reading and compiling). `labels` says for how many of the photos each server gives the label that ours gives, and
how many different ones those are. Answers other than 200 do not count as photos, and are told as `failures`.
"""

import base64
import contextlib
import http.client
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import click
import cv2
import mlflow
from measuring import Contestant, Server, describe_machine, find_free_port

from carflavor.data.drawing import CLASS_NAMES
from carflavor.data.sample import write_sample

NETWORKS = {"resnet152": "resnet152", "lite0": "efficientnet-lite0"}  # as in carflavor.networks
CLIENTS = {"article": (1, 16), "mlflow": (1, 16), "ours": (1, 4, 16, 64)}
CONTESTANTS = (*CLIENTS, "bare")
MODELS = {"article": "article", "mlflow": "ours", "ours": "ours"}
NUM_PHOTOS = 32
# Bare has seven or eight sizes of batch a round, and each is steadier than clients and servers are.
BARE_SHARE = 1 / 3
BUSY_LOAD = 0.5
FOLDER = Path(__file__).parent
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Servers run in another folder than this one.
    "PYTHONPATH": str(FOLDER.parent),
    # `mlflow models serve` looks for uvicorn there.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
}


def say(line):
    click.echo(line, err=True)


def collect_photos(source, folder):
    """Returns the paths of the photos to send: of a folder, or of the drawn sample."""
    if source is None:
        write_sample(folder / "sample", train_per_class=math.ceil(NUM_PHOTOS / len(CLASS_NAMES)), test_per_class=1)
        source = folder / "sample" / "cars_train"
    found = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise click.ClickException(f"expected photos (.jpg) in {source}, got none")
    return [str(path.absolute()) for path in found[:: max(len(found) // NUM_PHOTOS, 1)][:NUM_PHOTOS]]


def describe_photos(paths):
    """Returns a dict of the photos' number and sizes, for JSON."""
    kilobytes = sorted(Path(path).stat().st_size / 1000 for path in paths)
    sizes = sorted(cv2.imread(path).shape[1::-1] for path in paths)
    return {
        "number": len(paths),
        "kilobytes": {"least": kilobytes[0], "median": median(kilobytes), "most": kilobytes[-1]},
        "pixels": {"narrowest": sizes[0], "median": sizes[len(sizes) // 2], "widest": sizes[-1]},
    }


def write_bodies(paths, path):
    """Writes the body of a request with each photo into the lines of a file; returns the bodies."""
    photos = [base64.b64encode(Path(photo).read_bytes()).decode() for photo in paths]
    bodies = [json.dumps({"dataframe_split": {"columns": ["image"], "data": [[photo]]}}) for photo in photos]
    path.write_text("\n".join(bodies))
    return bodies


def pack(name, uri, precision, photos, folder):
    """Packs the models of a network.

    Returns:
        Dict of `article` and `ours`, the paths of the model directories.
    """
    given = uri and mlflow.artifacts.download_artifacts(artifact_uri=uri)
    settings = {
        "network": NETWORKS[name],
        "model": given and str(Path(given).absolute()),
        "precision": precision,
        "photos": photos,
        "folder": str(folder),
    }
    command = [sys.executable, str(FOLDER / "serving_models.py"), json.dumps(settings)]
    packed = subprocess.run(
        command, env=os.environ | ENVIRONMENT, cwd=folder, text=True, capture_output=True, start_new_session=True
    )
    if packed.returncode:
        raise click.ClickException(f"{packed.stderr}{name} could not be packed")
    return {"article": str(folder / "article"), "ours": settings["model"] or str(folder / "ours")}


def read_engine(model):
    """Returns how a model was packed: a dict with `name` and `precision`."""
    return json.loads((Path(model) / "manifest.json").read_text(encoding="utf-8")).get("engine", {"name": "keras"})


def command_of(contestant, model, port, workers):
    """Returns the command that serves a model."""
    at = ["--host", "127.0.0.1", "--port", str(port)]
    if contestant != "ours":
        return [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", *at]
    options = ["--workers", workers] if workers else []
    return [sys.executable, "-m", "carflavor.server", "--model", model, *at, *options]


def ask_labels(url, bodies):
    """Sends each body once; returns the labels."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    labels = []
    for body in bodies:
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise ChildProcessError(f"expected labels of {url}, got status {response.status}: {answer[:1000]!r}")
        # The article answers for its one photo, we for a list of them.
        prediction = json.loads(answer)["predictions"]
        labels.append((prediction[0] if isinstance(prediction, list) else prediction)["label"])
    connection.close()
    return labels


def send_load(url, bodies, clients, seconds, warm_up):
    """Returns the figures of `load.py`, which runs in a process of its own."""
    command = [sys.executable, str(FOLDER / "load.py"), f"{url}/invocations", str(bodies)]
    command += ["--clients", str(clients), "--seconds", str(seconds), "--warm-up", str(warm_up)]
    # In a session of its own: Ctrl-C is for this process, which then ends the other.
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return json.loads(done.stdout)


def measure_network(name, models, photos, folder, contestants, rounds, seconds, warm_up, workers):
    """Measures all contestants of a network, in turns.

    Returns:
        Dict of figures, for JSON.
    """
    bodies = write_bodies(photos, folder / "bodies.jsonl")
    engine = read_engine(models["ours"])
    with contextlib.ExitStack() as stack:
        servers, startup, idle, labels = {}, {}, {}, {}
        for contestant in [contestant for contestant in contestants if contestant in CLIENTS]:
            say(f"{name}, {contestant}: starting")
            port = find_free_port()
            command = command_of(contestant, models[MODELS[contestant]], port, workers)
            server = Server(f"{name}, {contestant}", command, ENVIRONMENT, f"http://127.0.0.1:{port}", folder)
            stack.callback(server.close)
            startup[contestant] = server.wait_until_healthy()
            idle[contestant] = server.memory() / 1e6
            labels[contestant] = ask_labels(server.url, bodies)
            servers[contestant] = server
        bare = None
        if "bare" in contestants:
            if engine["name"] != "openvino":
                raise click.ClickException(f"{models['ours']} has no IR for bare: pack it with engine=openvino")
            say(f"{name}, bare: preparing")
            settings = {
                "model": models["ours"],
                "precision": engine["precision"],
                "decoding": name == "lite0",
                "seconds": seconds * BARE_SHARE,
                "photos": photos,
            }
            command = [sys.executable, str(FOLDER / "bare_openvino.py"), json.dumps(settings)]
            bare = Contestant(f"{name}, bare", command, ENVIRONMENT)
            stack.callback(bare.close)
            startup["bare"] = bare.wait_until_ready()["startup_s"]
        measured = {contestant: {} for contestant in contestants}
        for turn in range(rounds):
            for contestant, server in servers.items():
                for clients in CLIENTS[contestant]:
                    figures = send_load(server.url, folder / "bodies.jsonl", clients, seconds, warm_up)
                    figures["memory_mb"] = server.memory() / 1e6
                    measured[contestant].setdefault(clients, []).append(figures)
                    say(f"{name}, round {turn + 1} of {rounds}, {contestant}: {describe(clients, figures)}")
            if bare:
                figures = bare.measure_round()
                measured["bare"].setdefault(1, []).append(figures)
                say(f"{name}, round {turn + 1} of {rounds}, bare: {describe_bare(figures)}")
    return {
        "engine": engine,
        "labels": compare_labels(labels),
        "startup_s": startup,
        "idle_memory_mb": idle,
        **{
            contestant: {clients: summarize(figures) for clients, figures in by_clients.items()}
            for contestant, by_clients in measured.items()
        },
    }


def describe(clients, figures):
    """Returns a line on one measurement of a server."""
    line = f"{clients} client{'s' * (clients > 1)}, {figures['per_second']:.1f} photos/s, p50 {milliseconds(figures)}"
    for failure, count in figures["failures"].items():
        line += f"\n    {count} ANSWERS WERE NOT 200: {failure}"
    return line


def describe_bare(figures):
    """Returns a line on one measurement of bare."""
    best = max(figures["per_second"], key=figures["per_second"].get)
    return f"p50 {milliseconds(figures)}, {figures['per_second'][best]:.1f} photos/s ({best})"


def milliseconds(figures):
    return "none" if figures["p50_ms"] is None else f"{figures['p50_ms']:.1f} ms"


def compare_labels(labels):
    """Returns how many labels of each server are those of ours, or of the first one where ours is left out."""
    if not labels:
        return {}
    reference = "ours" if "ours" in labels else next(iter(labels))
    equal = {
        name: sum(label == expected for label, expected in zip(given, labels[reference], strict=True))
        for name, given in labels.items()
    }
    return {
        "as": reference,
        "photos": len(labels[reference]),
        "different": len(set(labels[reference])),
        "equal": equal,
    }


def summarize(rounds):
    """Returns the medians of dicts of figures, of nested ones too; of failures the sums, and of answers."""
    summary = {}
    for key, first in rounds[0].items():
        values = [figures[key] for figures in rounds]
        if key == "failures":
            names = sorted(set(itertools.chain(*values)))
            summary[key] = {name: sum(failures.get(name, 0) for failures in values) for name in names}
        elif isinstance(first, dict):
            summary[key] = summarize(values)
        elif key == "answers":
            summary[key] = sum(values)
        else:
            summary[key] = median(values) if None not in values else None
    return summary


def compare(name, figures):
    """Returns the ratios of a network, as far as both sides of them were measured."""
    prefix = "" if name == "resnet152" else f"{name}_"
    ours, article, bare = (figures.get(contestant) for contestant in ("ours", "article", "bare"))
    ratios = {}
    if ours and article:
        ratios["over_article_16"] = ours[16]["per_second"] / article[16]["per_second"]
    if ours and bare:
        ratios["p50_over_bare_1"] = ours[1]["p50_ms"] / bare[1]["p50_ms"]
        ratios["over_limit_16"] = ours[16]["per_second"] / max(bare[1]["per_second"].values())
        if name == "lite0":
            ratios["p50_minus_bare_ms"] = ours[1]["p50_ms"] - bare[1]["p50_ms"]
    return {prefix + ratio: value for ratio, value in ratios.items()}


def print_table(name, figures):
    """Prints the figures of a network for people."""
    columns = ("photos/s", "p50 ms", "p95 ms", "p99 ms", "MB", "start s", "clients' CPU")
    click.echo(f"\n{name:10}  clients  " + "  ".join(f"{column:>12}" for column in columns))
    for contestant in CONTESTANTS:
        for clients, row in figures.get(contestant, {}).items():
            rate = row["per_second"]
            values = [
                max(rate.values()) if contestant == "bare" else rate,
                *(row[key] for key in ("p50_ms", "p95_ms", "p99_ms", "memory_mb")),
                figures["startup_s"][contestant],
            ]
            cells = [f"{value:12.1f}" if value is not None else f"{'-':>12}" for value in values]
            cells.append(f"{row['clients_cpu']:12.1%}" if "clients_cpu" in row else f"{'':12}")
            click.echo(f"{contestant:10}  {clients if contestant != 'bare' else '-':>7}  " + "  ".join(cells))
    for contestant, count in figures["labels"].get("equal", {}).items():
        labels = figures["labels"]
        click.echo(
            f"{contestant}: {count} of {labels['photos']} labels as {labels['as']} gives "
            f"({labels['different']} different ones)"
        )


def rounded(value):
    """Rounds all numbers in nested dicts to four digits."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Turns of each contestant.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True), help="A turn.")
@click.option("--warm-up", default=2.0, show_default=True, type=click.FloatRange(0), help="Seconds before each turn.")
@click.option("--network", "names", multiple=True, type=click.Choice(list(NETWORKS)), help="May be repeated.")
@click.option("--only", multiple=True, type=click.Choice(CONTESTANTS), help="May be repeated.")
@click.option("--resnet152", default=None, help="URI or path of a packed ResNet-152.  [default: random weights]")
@click.option("--lite0", default=None, help="URI or path of a packed EfficientNet-Lite0.  [default: random weights]")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="Of the random networks.  [default: bfloat16 where the CPU has it]",
)
@click.option("--photos", type=click.Path(exists=True, file_okay=False), help="Folder.  [default: drawn ones]")
@click.option("--workers", help="Worker processes of our server.  [default: its own]")
def main(rounds, seconds, warm_up, names, only, resnet152, lite0, precision, photos, workers):
    """Measures photos a second, latency, memory and start-up of servers."""
    # Ended from outside, this process ends its servers too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe_machine()
    if machine["load_before"] > BUSY_LOAD:
        say(f"Something else is running here (load {machine['load_before']}): do not trust the ratios")
    precision = precision or ("bfloat16" if {"avx512_bf16", "amx_bf16"} & set(machine["cpu_flags"]) else "float32")
    uris = {"resnet152": resnet152, "lite0": lite0}
    contestants = [contestant for contestant in CONTESTANTS if not only or contestant in only]
    figures, ratios = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = collect_photos(photos, Path(folder))
        machine["photos"] = describe_photos(paths)
        for name in names or NETWORKS:
            own_folder = Path(folder) / name
            own_folder.mkdir()
            say(f"{name}: packing")
            try:
                models = pack(name, uris[name], precision, paths, own_folder)
                figures[name] = measure_network(
                    name, models, paths, own_folder, contestants, rounds, seconds, warm_up, workers
                )
            except ChildProcessError as error:
                raise click.ClickException(str(error)) from None
            ratios |= compare(name, figures[name])
    for name in figures:
        print_table(name, figures[name])
    settings = {"rounds": rounds, "seconds": seconds, "warm_up": warm_up, "machine": machine}
    click.echo(json.dumps(rounded(ratios | figures | settings)))


if __name__ == "__main__":
    main()
