"""Factorize the layers of trained Keras models, and measure parameters, MACs and latency before and after.

    import fcnn_utils as fcnn

    small, report = fcnn.factorize(model, macs=fcnn.total_costs(model)["macs"] / 4, images=images)
    fcnn.export(fcnn.fold_batch_norm(small), "small.onnx")

The functions and classes below are imported when they are first used, so that importing the package is fast.

    factorize         a trained model -> a factorized one, and a report                        compress
    fold_batch_norm   a model for inference without batch norms                               batch_norm
    reestimate        batch-norm statistics from unlabelled images                            calibration
    fine_tune         training of a factorized model, on labels or on the dense model          fine_tuning
    layer_costs       parameters, MACs and activation bytes, layer by layer                   cost
    total_costs       the same for the whole model                                            cost
    latency           times of several models, measured in turn                               benchmark
    export            write a model as .onnx, .xml (OpenVINO) or .tflite (LiteRT)             deploy
    load              a function that runs a model in one of these engines                    deploy
    quantize          a model -> a file in int8 for one of these engines                      quantization
    decompose         a kernel -> its factors                                                 factorizations
    CP, CP4, ...      one class for each factorization                                        factorizations

Two more modules are imported by name, `from fcnn_utils import blocks, rank_selection`: factorized convolutions as Keras
layers, and ranks for a cost, a budget or a noise level. `fcnn_utils.course` holds what only the notebooks need.
"""

import importlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its C++ start-up lines are noise

__version__ = "0.2.0"

_MODULE_OF = {
    "factorize": "compress",
    "fold_batch_norm": "batch_norm",
    "reestimate": "calibration",
    "fine_tune": "fine_tuning",
    "layer_costs": "cost",
    "total_costs": "cost",
    "latency": "benchmark",
    "export": "deploy",
    "load": "deploy",
    "quantize": "quantization",
    "decompose": "factorizations",
    "CP": "factorizations",
    "CP4": "factorizations",
    "Tucker2": "factorizations",
    "TensorTrain": "factorizations",
    "SVD": "factorizations",
    "SpatialSVD": "factorizations",
    "DepthwiseSeparable": "factorizations",
}
__all__ = list(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
