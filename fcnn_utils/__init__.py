"""Factorized convolutional networks in Keras: the support module of the notebook series.

Import the module you need (`from fcnn_utils import data, models`); this file imports none of them, so that
the command line answers at once and a notebook loads only what it uses.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its C++ start-up lines are noise

__version__ = "0.1.0"
__all__ = [
    "blocks",
    "calibrate",
    "checkpoint",
    "cifar100",
    "convert",
    "cost",
    "data",
    "decompose",
    "download",
    "engines",
    "ensembles",
    "feed",
    "graph",
    "machine",
    "medmnist",
    "metrics",
    "models",
    "parameters",
    "pipeline",
    "plots",
    "predictions",
    "ranks",
    "recipes",
    "records",
    "speed",
    "standin",
    "thesis",
    "training",
    "training_speed",
    "zoo",
]
