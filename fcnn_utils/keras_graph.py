"""The layers of a Keras model in their places: what calls them, what they read, what reads them; and a model rebuilt.

Functional and Sequential models, with models within them; a layer of an inner model has a path, `inner/conv1`.
"""

import dataclasses

import keras


@dataclasses.dataclass(eq=False)
class LayerNode:
    """A layer in a model, with all its calls.

    Attributes:
        path: its name, behind the names of the models that it lies in.
        layer: the layer.
        calls: (input shapes, output shape) of each call, as tuples with the batch axis.
        before: operations that make what it reads.
        after: operations that read what it makes; None for the end of the model that it lies in.
        training: what each call was told of `training`; None where nothing.
    """

    path: str
    layer: object
    calls: list
    before: list
    after: list
    training: list

    @property
    def is_channel_norm(self):
        """Whether it is a batch normalisation of channels, the last axis, called once."""
        is_norm = isinstance(self.layer, keras.layers.BatchNormalization)
        return is_norm and len(self.calls) == 1 and self.layer.axis in (-1, len(self.calls[0][1]) - 1)


def check_graph(model):
    """`model` if it is a built functional or sequential model; else ValueError."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"model must be a built keras.Model; got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model {model.name!r} is not built: call it on images once, or give it an Input")
    if not hasattr(_graph(model), "operations"):
        raise ValueError(
            f"model {model.name!r} is not a graph of layers (Sequential or functional), so its layers can't be told"
        )
    return model


def layer_nodes(model):
    """Every layer with its calls, in the order of the model; inner models are replaced by their layers.

    Returns:
        list of `Place`.

    Raises:
        ValueError: the model, or one within it, is not as `check` wants it.
    """
    found = {}
    for place in _places(check_graph(model), ""):
        if id(place.layer) in found:  # shared by two of the models
            first = found[id(place.layer)]
            first.calls += place.calls
            first.before += place.before
            first.after += place.after
            first.training += place.training
        else:
            found[id(place.layer)] = place
    return list(found.values())


def rebuild(model, chains, dtype=None):
    """A copy of a model with its weights, some of its layers replaced; it shares nothing with the original.

    Args:
        model: functional or sequential.
        chains: dict id(layer) -> list of new layers, built and with their weights, which are called one after another
            in its place; an empty one takes it out.
        dtype: dtype policy of the copied layers; default: each its own.

    Raises:
        ValueError: the model is not as `check` wants it, or a layer can't be copied (see `copied`).
    """
    return _rebuilt(check_graph(model), {key: list(chain) for key, chain in chains.items()}, dtype)


def is_linear(operation):
    """Whether it has an activation, and that is none: what it makes is what is read after it."""
    return getattr(operation, "activation", None) is keras.activations.linear


def copy_layer(layer, **changes):
    """A layer of the same configuration, but for `changes`; it is not built and has no weights.

    Its activation may be a function that Keras does not know by name, or a layer, which is copied, too.

    Raises:
        ValueError: Keras can't make the layer from its configuration, as with a Lambda; or its activation has weights,
            which Keras would not save.
    """
    activation = getattr(layer, "activation", None)
    if isinstance(activation, keras.layers.Layer):
        if activation.variables:
            raise ValueError(
                f"layer {layer.name!r} has an activation with weights of its own, {type(activation).__name__}: make "
                "that a layer of the model"
            )
        activation = copy_layer(activation, **{key: changes[key] for key in changes if key == "dtype"})
    try:
        config = layer.get_config() | changes
        if not isinstance(config.get("activation", ""), str):  # no name that Keras knows
            config["activation"] = activation
        return type(layer).from_config(config)
    except Exception as error:  # whatever its class raises
        raise ValueError(
            f"layer {layer.name!r} can't be copied: Keras can't make its class, {type(layer).__name__}, from its "
            f"configuration ({str(error).splitlines()[0]})"
        ) from error


def _graph(model):
    return getattr(model, "_functional", None) or model  # a Sequential holds its graph inside


def _places(model, prefix):
    graph = _graph(model)
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    ends = {id(tensor) for tensor in graph.outputs}
    readers = {}
    for node in nodes:
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node.operation)
    for layer in graph.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        calls = [node for node in nodes if node.operation is layer]
        if isinstance(layer, keras.Model):
            for place in _places(check_graph(layer), f"{prefix}{layer.name}/"):
                yield dataclasses.replace(place, calls=place.calls * len(calls))
            continue
        after = [readers.get(id(tensor), []) for node in calls for tensor in node.outputs]
        end = [None for node in calls for tensor in node.outputs if id(tensor) in ends]
        yield LayerNode(
            prefix + layer.name,
            layer,
            [([tuple(x.shape) for x in node.input_tensors], tuple(node.outputs[0].shape)) for node in calls],
            [x._keras_history.operation for node in calls for x in node.input_tensors],
            [operation for group in after for operation in group] + end,
            [node.arguments.kwargs.get("training") for node in calls],
        )


def _rebuilt(model, copies, dtype):
    to = {} if dtype is None else {"dtype": dtype}

    def copy(layer):
        if id(layer) not in copies:
            if isinstance(layer, keras.Model):
                copies[id(layer)] = _rebuilt(layer, copies, dtype)
            else:
                copies[id(layer)] = copy_layer(layer, **(to if isinstance(layer, keras.layers.Layer) else {}))
        return copies[id(layer)]

    def call(layer, *args, **kwargs):
        if not isinstance(layer, list):
            return layer(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        for part in layer:
            x = part(x)
        return x

    if isinstance(model, keras.Sequential):
        parts = [copy(layer) for layer in model.layers]
        flat = [layer for part in parts for layer in (part if isinstance(part, list) else [part])]
        first = model.inputs[0]
        inputs = keras.Input(batch_shape=first.shape, dtype=first.dtype, name=first.name)
        new = keras.Sequential([inputs, *flat], name=model.name)
    else:
        new = keras.models.clone_model(model, clone_function=copy, call_function=call)
    _carry_over(model, copies)
    return new


def _carry_over(model, copies):
    """Weights and `trainable` of the layers that were copied; inner models did so for theirs."""
    if not model.trainable:  # set on the whole, it holds for all; those thawed since follow one by one
        for layer in model.layers:
            for part in _listed(copies[id(layer)]) if id(layer) in copies else []:
                part.trainable = False
    for layer in model.layers:
        new = copies.get(id(layer))
        if isinstance(layer, keras.Model) or new is None:
            continue
        if layer.weights and not isinstance(new, list):  # a chain has its own
            new.set_weights(layer.get_weights())
            if hasattr(new, "finalize_state"):  # what an adapted Normalization computes with comes from its weights
                new.finalize_state()
        for part in _listed(new):
            part.trainable = layer.trainable


def _listed(value):
    return value if isinstance(value, list) else [value]
