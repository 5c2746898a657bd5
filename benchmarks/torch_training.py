"""What `training.py` holds ours against in plain torch. It is started by that script, in a Python that has torch.

Each has its fastest plain setting, chosen by the CPU time of a step on one core with AMX, with torch 2.13:

- ResNet-152: converted to bfloat16 as a whole 2.3 s, under torch.autocast 2.5 to 3.0 s.
- EfficientNet-Lite0: channels_last 2.0 s, channels first 2.8 s.
- AdamW, of ResNet-152: fused=True 0.11 s, else 0.4 s, or 0.25 s where the weights are float32.
"""

import json
import sys
import time
from functools import partial

import torch
from efficientnet_lite_pytorch import EfficientNet
from measuring import answer_rounds
from torch import nn
from torch.nn import functional as F

WARM_UP_STEPS = 3


class Scale(nn.Module):
    """The `Scale` of carflavor, for channels first."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x * self.gamma.view(-1, 1, 1) + self.beta.view(-1, 1, 1)


def conv_bn_scale(in_channels, channels, kernel_size, stride):
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels, eps=1.1e-5),
        Scale(channels),
    )


class Bottleneck(nn.Module):
    """The block of `carflavor.networks.resnet`: its stride is in the first convolution, as in Caffe."""

    def __init__(self, in_channels, filters, stride):
        super().__init__()
        self.reduce = conv_bn_scale(in_channels, filters, 1, stride)
        self.convolve = conv_bn_scale(filters, filters, 3, 1)
        self.expand = conv_bn_scale(filters, 4 * filters, 1, 1)
        project = stride > 1 or in_channels != 4 * filters
        self.shortcut = conv_bn_scale(in_channels, 4 * filters, 1, stride) if project else nn.Identity()

    def forward(self, x):
        y = F.relu(self.reduce(x))
        y = F.relu(self.convolve(y))
        return F.relu(self.expand(y) + self.shortcut(x))


class ResNet152(nn.Module):
    """ResNet-152 with conv -> BN -> Scale, from RGB of -1 to 1 to logits."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = conv_bn_scale(3, 64, 7, 2)
        blocks, channels = [], 64
        for stage, num_blocks in enumerate([3, 8, 36, 3]):
            for position in range(num_blocks):
                stride = 2 if position == 0 and stage > 0 else 1
                blocks.append(Bottleneck(channels, 64 * 2**stage, stride))
                channels = 256 * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


def build_network(name, input_size, num_classes):
    """Returns a network and the dtype that it computes in."""
    if name == "torch_resnet152_bfloat16":
        return ResNet152(num_classes).to(torch.bfloat16), torch.bfloat16
    # Its default drops whole branches in training, which ours does not and which takes time.
    network = EfficientNet.from_name(
        "efficientnet-lite0", num_classes=num_classes, image_size=input_size, drop_connect_rate=0.0
    )
    return network, torch.float32


def prepare(name, batch_size, input_size, num_classes, steps, **_):
    """Prepares rounds of some steps; see `answer_rounds`."""
    network, dtype = build_network(name, input_size, num_classes)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.001, weight_decay=0.05, fused=True)
    photos = torch.randint(0, 256, (batch_size, input_size, input_size, 3), dtype=torch.uint8)
    targets = torch.randint(0, num_classes, (batch_size,))

    def train_step():
        # A view of bytes in which channels come last already.
        inputs = photos.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets, label_smoothing=0.1).backward()
        optimizer.step()

    def measure_round():
        rates = []
        for _ in range(steps):
            started = time.perf_counter()
            train_step()
            rates.append(batch_size / (time.perf_counter() - started))
        return rates

    for _ in range(WARM_UP_STEPS):
        train_step()
    return {"torch": torch.__version__}, measure_round


if __name__ == "__main__":
    answer_rounds(partial(prepare, sys.argv[1], **json.loads(sys.argv[2])))
