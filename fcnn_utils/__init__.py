"""Factorized convolutional networks in Keras: the support module of the notebook series.

Import the module you need (`from fcnn_utils import convert, cost`); this file imports none of them, so that the command
line answers at once and a notebook loads only what it uses.

For networks of your own:

    convert         a trained network -> a factorized one; batch norms folded
    calibrate       what images without labels do for it: sensitivities, ranks, corrected factors
    decompose       a kernel -> its factors, without Keras
    ranks           which ranks there are, what they cost, which to take
    blocks          a factorized convolution as a chain of stock layers, and its weights
    cost            parameters, MACs and activation bytes by layer
    engines         networks exported, and run in ONNX Runtime, OpenVINO, LiteRT
    speed           latencies measured in turn; the roofline
    models, zoo     the thesis's networks, ours, and published ones, by name
    graph           layers in their places

For training and for images:

    recipes         how a network is trained, as data
    training        fit, time, evaluate -> a record
    feed            images on their way
    checkpoint      what a killed training goes on from
    training_speed  a training step taken apart on the clock
    data            images by name: splits, subsets, fingerprints
    cifar100, medmnist, standin   the files of CIFAR-100 and MedMNIST; generated images
    download        downloads that have a time limit

Behind the numbers of the course:

    records         run records: write, read, find; whole files or none
    predictions     what a trained network says of each image, kept beside its record
    metrics         AUC, calibration, bootstrap intervals
    ensembles       networks that answer together
    thesis          the thesis's published tables
    machine         device, backend, precision, versions, commit; throughputs in turn
    plots           figures from records and tables
    parameters      what a notebook's parameter may be
    pipeline        the notebooks through papermill
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
