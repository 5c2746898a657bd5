"""How fast training is, beside what it was and beside what others do.

    pip install -e '.[benchmark]'
    python benchmarks/training.py

or, with torch in another environment than TensorFlow (it needs torch and efficientnet-lite-pytorch, no more):

    python benchmarks/training.py --torch-python ~/torch/bin/python

It takes about ten minutes on two cores, and 12 GB of memory. Linux only.

The last line is JSON. Its ratios are of photos a second, and mean something only where nothing else runs:

- over_keras_applications: ResNet-152 with Scale in mixed_bfloat16, over keras.applications.ResNet152, which has no
  Scale, with a plain `fit` in float32. At least 2.5.
- over_torch_bf16: the same, over the same network in plain torch in bfloat16. At least 0.5.
- lite0_over_torch: EfficientNet-Lite0 with Scale in float32, over the model of efficientnet-lite-pytorch, which has no
  Scale, in plain torch in float32. At least 0.8.
- pipeline_over_arrays: EfficientNet-Lite0 with the augmentation of preset `quick`, from a record file, over the same
  `fit` from the same photos as an array in memory. At least 0.95.
- over_keras_applications_float32: the first one with ours in float32, too.
- resnet152_over_before, lite0_over_before: each network in the form and precision above, over the same network in
  float32 layer by layer, as Keras computes it and as it was trained before.

The two sides take turns on the machine, in processes of their own (but for over_keras_applications_float32 and
resnet152_over_before, whose sides come one after the other: all four together would need more than 16 GB).

All its other numbers are photos a second: medians of steps or, from records and arrays, of epochs. ResNet-152 takes 8
photos of 224 px a step, EfficientNet-Lite0 32 of 192 px; both have 196 classes, random weights, AdamW and label
smoothing. But for pipeline_over_arrays photos lie in memory and are not augmented, on both sides.

torch gets its best plain settings (see torch_training.py), and MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_, with
which glibc keeps the memory that a step gives back: without, its EfficientNet-Lite0 is a quarter slower, and on some
machines several times. What runs in TensorFlow, ours and keras.applications, takes the environment as it finds it.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import click
import cv2
import numpy as np
from measuring import describe_machine, take_turns

from carflavor.data.records import RecordWriter

# A ratio's two sides: photos a second of the first, over those of the second.
RATIOS = {
    "over_keras_applications": ("resnet152_bfloat16", "keras_applications_resnet152"),
    "over_torch_bf16": ("resnet152_bfloat16", "torch_resnet152_bfloat16"),
    "lite0_over_torch": ("lite0", "torch_lite0"),
    "pipeline_over_arrays": ("lite0_from_records", "lite0_from_arrays"),
    "over_keras_applications_float32": ("resnet152_float32", "keras_applications_resnet152"),
    "resnet152_over_before": ("resnet152_bfloat16", "resnet152_before"),
    "lite0_over_before": ("lite0", "lite0_before"),
}
NUM_CLASSES = 196
RESNET152 = {"batch_size": 8, "input_size": 224}
LITE0 = {"batch_size": 32, "input_size": 192}
# Those of a group take turns, in this order. Each keeps its memory until its group is done: a ResNet-152 about 5 GB.
GROUPS = [
    {
        "keras_applications_resnet152": RESNET152,
        "resnet152_bfloat16": RESNET152,
        "torch_resnet152_bfloat16": RESNET152,
    },
    {"resnet152_float32": RESNET152, "resnet152_before": RESNET152},
    {"torch_lite0": LITE0, "lite0": LITE0, "lite0_before": LITE0},
    {"lite0_from_arrays": LITE0, "lite0_from_records": LITE0},
]
STORED_SIZE = 256
EPOCH_PHOTOS = 384
BUSY_LOAD = 0.5
FOLDER = Path(__file__).parent
TORCH_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "10000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000"}


def write_records(path):
    """Writes a record file of coloured clouds. Its photos are stored uncompressed: any pixels take the same time."""
    random = np.random.default_rng(0)
    size = (STORED_SIZE, STORED_SIZE)
    class_names = [f"class {index}" for index in range(NUM_CLASSES)]
    with RecordWriter(path, ("box",), STORED_SIZE, class_names, {"source": "random"}) as writer:
        for row in range(EPOCH_PHOTOS):
            photo = cv2.resize(random.integers(0, 256, (16, 16, 3), "uint8"), size, interpolation=cv2.INTER_CUBIC)
            writer.append({"box": photo}, row % NUM_CLASSES, f"{row}.jpg", size, (0, 0, *size))


def check_torch(python):
    """Refuses a Python that cannot import torch."""
    imports = "import torch, efficientnet_lite_pytorch"
    tried = subprocess.run([python, "-c", imports], capture_output=True, text=True)
    if tried.returncode:
        raise click.ClickException(
            f"{python}: {tried.stderr.strip().splitlines()[-1]}; run pip install -e '.[benchmark]', "
            f"or give --torch-python a Python that has torch and efficientnet-lite-pytorch"
        )


def command_of(contestant, settings, torch_python):
    """Returns the command that answers a contestant's rounds, and the environment it needs."""
    if contestant.startswith("torch_"):
        python, script, environment = torch_python, "torch_training.py", TORCH_ENVIRONMENT
    else:
        python, script, environment = sys.executable, "keras_training.py", {"TF_CPP_MIN_LOG_LEVEL": "2"}
    return [python, str(FOLDER / script), contestant, json.dumps(settings)], environment


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Turns of each contestant.")
@click.option("--steps", default=4, show_default=True, type=click.IntRange(1), help="Steps a turn, or else one epoch.")
@click.option("--only", multiple=True, type=click.Choice(list(RATIOS)), help="May be given several times.")
@click.option(
    "--torch-python",
    default=sys.executable,
    type=click.Path(exists=True, dir_okay=False),
    help="Python that has torch.  [default: this one]",
)
def main(rounds, steps, only, torch_python):
    """Measures photos a second in training, of ours and of what it is compared with."""
    ratios = {name: RATIOS[name] for name in only or RATIOS}
    wanted = set(itertools.chain(*ratios.values()))
    if any(name.startswith("torch_") for name in wanted):
        check_torch(torch_python)
    machine = describe_machine()
    if machine["load_before"] > BUSY_LOAD:
        click.echo(f"Something else is running here (load {machine['load_before']}): do not trust the ratios", err=True)
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        records = str(Path(folder) / "train.h5")
        write_records(records)
        for group in GROUPS:
            commands = {
                name: command_of(
                    name, {**settings, "steps": steps, "num_classes": NUM_CLASSES, "records": records}, torch_python
                )
                for name, settings in group.items()
                if name in wanted
            }
            try:
                group_rates, about = take_turns(commands, rounds, partial(click.echo, err=True))
            except ChildProcessError as error:
                raise click.ClickException(str(error)) from None
            rates |= group_rates
            machine |= about
    medians = {name: median(values) for name, values in rates.items()}
    click.echo(f"{'photos a second':30}  median  slowest  fastest")
    for name, values in rates.items():
        click.echo(f"{name:30}  {medians[name]:6.2f}  {min(values):7.2f}  {max(values):7.2f}")
    result = {ratio: medians[ours] / medians[other] for ratio, (ours, other) in ratios.items()} | medians
    click.echo(json.dumps({key: round(value, 3) for key, value in result.items()} | {"machine": machine}))


if __name__ == "__main__":
    main()
