"""Export the three networks of the book's page "The networks in your browser", and describe them in networks.json.

    python book/browser/export_networks.py results/DATASET/MODEL/RECIPE/seed0.keras results/…/seed0.keras

The first file is the dense network, the second one the factorized network. The third network is the factorized one in
int8. Each accuracy is measured here, in ONNX Runtime, on all test images of CIFAR-100. If the record of the training,
`seed0.json`, is beside a network, it is cited.
"""

import argparse
import hashlib
import json
from pathlib import Path

import keras
import numpy as np

import fcnn_utils as fcnn
from fcnn_utils.course import augmentation, data, paths, records

FOLDER = Path(__file__).resolve().parent / "networks"
CALIBRATION_IMAGES = 500  # for int8, from the training images


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path, help="Keras file of the dense network")
    parser.add_argument("factorized", type=Path, help="Keras file of the factorized network")
    options = parser.parse_args()
    dataset = data.load("cifar100")
    scale = augmentation.channel_statistics(dataset)
    images = augmentation.normalize(dataset.train.sample(CALIBRATION_IMAGES, seed=0).images, scale)
    FOLDER.mkdir(exist_ok=True)
    networks = []
    for name, source in (("dense", options.dense), ("factorized", options.factorized)):
        folded = fcnn.fold_batch_norm(keras.saving.load_model(source, compile=False), "float32")
        path = fcnn.export(folded, FOLDER / f"{name}.onnx")
        networks.append({"name": name, "precision": "float32", **origin(source), **describe(path, folded)})
    path = fcnn.quantize(folded, images, FOLDER / "int8.onnx").path
    networks.append({"name": "int8", "precision": "int8", **origin(options.factorized), **describe(path, folded)})
    for network in networks:
        network["top1"] = accuracy(FOLDER / network["file"], dataset.test, scale)
        print(f"{network['name']}: top-1 {network['top1']:.2%} on {len(dataset.test):,} test images")
    text = json.dumps(contents(dataset, scale, networks), indent=1, ensure_ascii=False)
    (FOLDER / "networks.json").write_text(f"{text}\n", encoding="utf-8")


def contents(dataset, scale, networks):
    """Return the contents of networks.json: the classes, the normalisation, and the networks."""
    mean, deviation = (values.tolist() for values in scale)
    return {
        "dataset": dataset.name,
        "test_images": len(dataset.test),
        "calibration_images": CALIBRATION_IMAGES,
        "input": list(dataset.test.images.shape[1:]),
        "mean": mean,
        "deviation": deviation,
        "classes": list(dataset.fine_names),
        "networks": networks,
    }


def origin(source):
    """Return the run that a Keras file comes from, by the record beside it; only the file's name without one."""
    path = source.with_suffix(".json")
    if not path.exists():
        return {"model": source.name, "run": None}
    record = records.read(path)
    folders = path.resolve().relative_to(paths.root()) if path.resolve().is_relative_to(paths.root()) else path.name
    return {
        "model": record["model"],
        "run": str(folders),
        "recipe": record["recipe"]["name"],
        "epochs": len(record["epochs"]),
    }


def describe(path, network):
    """Return the size of an exported network, and its costs per image."""
    costs = fcnn.total_costs(network)
    content = path.read_bytes()
    return {
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "params": costs["params"],
        "macs": costs["macs"],
    }


def accuracy(path, split, scale):
    """Compute the top-1 accuracy of an exported network."""
    run, right = fcnn.load(path, threads=1), 0
    for start in range(0, len(split), 100):
        part = slice(start, start + 100)
        probabilities = run(augmentation.normalize(split.images[part], scale))
        right += int(np.sum(probabilities.argmax(axis=1) == split.fine[part]))
    return right / len(split)


if __name__ == "__main__":
    main()
