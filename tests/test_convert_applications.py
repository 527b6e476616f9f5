"""fcnn_utils.convert on networks of keras.applications; a file of its own, so that it runs beside the others."""

import time

import keras
import numpy as np
import pytest
from keras import layers
from test_convert import full_ranks, outputs, outputs_in_a_fresh_process, peak_memory

from fcnn_utils import convert, keras_graph

NETWORKS = {"ResNet50": 17, "VGG16": 13, "MobileNetV2": 1, "DenseNet121": 59, "EfficientNetB0": 1}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network of keras.applications, random weights, and the number of its k×k convolutions."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, request.param)(weights=None, input_shape=(64, 64, 3), classes=10)
    return model, NETWORKS[request.param]


@pytest.mark.parametrize("method", ["spatial", "tucker", "tt"])
def test_networks_of_others_at_full_rank(network, method):
    model, count = network
    given = full_ranks(model, method)
    assert len(given) == count
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    new, report = convert.factorize(model, method, ranks=given)
    before, after = (
        outputs(keras.Model(one.inputs, one.layers[-1].input), x) for one in (model, new)
    )  # what the last layer reads: probabilities of random weights hardly differ
    assert np.abs(before - after).max() < 1e-3 * np.abs(before).max()
    left = report[report["reason"] != ""]
    assert set(left["reason"]) <= {"1×1: nothing to separate", "depthwise", "grouped"}


@pytest.mark.timed
def test_networks_of_others_at_a_quarter(network, tmp_path):
    """In five minutes and 8 GB each, which is for ResNet50; the others are smaller."""
    model, count = network
    x = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    start = time.perf_counter()
    named = None if count > 1 else list(full_ranks(model, "cp"))  # the only one reads three channels
    new, report = convert.factorize(model, "cp", ratio=0.25, layers=named)
    assert time.perf_counter() - start < 300
    assert peak_memory() < 8e9
    assert (report["reason"] == "").sum() == count - (count > 1)
    assert np.allclose(outputs_in_a_fresh_process(new, x, tmp_path), outputs(new, x), rtol=1e-4, atol=1e-6)
    folded = convert.fold_batch_norm(new)
    y, z = outputs(new, x), outputs(folded, x)
    assert np.abs(y - z).max() < 1e-4 * np.abs(y).max() + 1e-6
    norms = [
        sum(isinstance(p.layer, layers.BatchNormalization) for p in keras_graph.layer_nodes(m)) for m in (new, folded)
    ]
    assert norms[1] < norms[0] or not norms[0]
