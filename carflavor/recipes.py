"""Named lists of training parameters. Each was chosen on validation photos; the comments give what it costs and brings.

A parameter that the user leaves at `auto` is taken from the preset.
"""

# From scratch. The embedded sample in 3 minutes on two cores: 87 % of its test photos under crop=box.
_SCRATCH = {
    "network": "resnet18",
    "weights": "none",
    "crop": "box",
    "input_size": "auto",
    "head_epochs": 0,
    "epochs": 15,
    "batch_size": 32,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "backbone_rate": 1.0,
    "statistics": "batch",
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "min_area": 0.6,
    "color": 0.0,
    "randaugment": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "class_weights": "none",
    "precision": "float32",
}

_QUICK = _SCRATCH | {
    "network": "efficientnet-lite0",
    "weights": "imagenet",
    "input_size": 192,
    "head_epochs": 30,
    "epochs": 6,
    "backbone_rate": 0.5,
    "color": 0.3,
    "ema": 0.99,
}

_ARTICLE = _QUICK | {
    "epochs": 17,
    "mixup": 0.2,
    "cutmix": 0.0,
    "min_area": 0.4,
}

_BEST = _ARTICLE | {
    "input_size": 224,
    "epochs": 30,
}

PRESETS = {"scratch": _SCRATCH, "quick": _QUICK, "article": _ARTICLE, "best": _BEST}
