"""Trace the `call` of a subclassed model or layer: it is called on Keras tensors, and becomes a graph."""

import warnings

import keras

from fcnn_utils._einsum import EinsumMatrix


def trace_model(model):
    """Return the functional model of what a subclassed, built model computes, with the same layers; and warn.

    Raises:
        ValueError: the call cannot be traced; the message gives the reason.
    """
    try:
        build = model.get_build_config()
        shapes = build.get("shapes_dict") or {"input_shape": build["input_shape"]}
        inputs = {
            name.removesuffix("_shape"): keras.tree.map_shape_structure(
                lambda shape: keras.Input(tuple(shape)[1:]), shape
            )
            for name, shape in shapes.items()
        }
        outputs = model.call(*inputs.values())
        read = list(inputs.values())
        traced = keras.Model(read[0] if len(read) == 1 else read, outputs, name=model.name)
    except Exception as error:  # a user's class may raise anything
        raise ValueError(
            f"model {model.name!r} is subclassed and can't be traced ({_first_line(error)}): write its call with "
            "layers and keras.ops, or make it functional"
        ) from error
    warnings.warn(
        f"model {model.name!r} is subclassed: it was traced, and the functional keras.Model(x, model.call(x)) is used",
        stacklevel=4,
    )
    return traced


def trace_layer(layer, args, kwargs):
    """Return the functional model of one call of a built layer; None if it cannot be traced.

    Args:
        layer: keras.Layer. It does not change.
        args, kwargs: of the call; Keras tensors stand for values.
    """
    inner = [part for part in layer._flatten_layers() if part is not layer]
    calls = [len(part._inbound_nodes) for part in inner]
    try:
        return model_of_call(layer.call, args, kwargs)
    except Exception:  # a user's class may raise anything, and then it is not known what it computes
        return None
    finally:
        for part, count in zip(inner, calls, strict=True):
            del part._inbound_nodes[count:]


def output_specs(operation, args, kwargs):
    """Return the list of Keras tensors that stand for the outputs of a call, with all sizes that are known."""
    outputs = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
    matrix = matrix_of(operation)
    if matrix:
        x = args[0] if args else kwargs["inputs"]
        shape = matrix.output_shape(x.shape, operation.kernel.shape)
        outputs = [keras.KerasTensor(shape, outputs[0].dtype)]
    return outputs


def matrix_of(operation):
    """Return the `EinsumMatrix` of an EinsumDense that is a product with one matrix, else None.

    Keras does not know all sizes of the output of such a layer: it forgets those that the layer takes from its input.
    """
    try:
        return EinsumMatrix.of(operation.equation) if type(operation) is keras.layers.EinsumDense else None
    except ValueError:
        return None


def model_of_call(function, args, kwargs):
    """Return the functional model of a call, whose inputs are the Keras tensors among its arguments."""
    read = []

    def fresh(value):
        if not isinstance(value, keras.KerasTensor):
            return value
        read.append(keras.Input(batch_shape=value.shape, dtype=value.dtype))
        return read[-1]

    args, kwargs = keras.tree.map_structure(fresh, (args, kwargs))
    return keras.Model(read, function(*args, **kwargs))


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
