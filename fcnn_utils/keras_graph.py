"""Inspect and rebuild the layer graph of a Keras model, and fold batch normalisations into the layers before.

The functions take functional and Sequential models, with models nested in them. A layer of a nested
model has a path, such as `inner/conv1`. This is the only module that touches Keras internals.
"""

import dataclasses

import keras
import numpy as np
from keras import layers

from fcnn_utils._checks import check_choice

_FOLDABLE = (  # layers whose kernel has the output channels last or, if it is depthwise, in its last two axes
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.DepthwiseConv2D,
    layers.SeparableConv2D,
    layers.Dense,
)


@dataclasses.dataclass(eq=False, repr=False)
class LayerNode:
    """A layer of a model, with all its calls.

    Attributes:
        path: name of the layer, after the names of the nested models that contain it.
        layer: the layer.
        calls: list of (input shapes, output shape), one for each call in the order of the model; shapes
            have the batch axis.
        producers: operations that produce what the layer reads.
        consumers: operations that read what the layer produces; None stands for an output of the model
            that contains the layer.
        training: the `training` argument of each call; None where it has none.
    """

    path: str
    layer: keras.Layer
    calls: list
    producers: list
    consumers: list
    training: list

    def __repr__(self):
        inputs, output = self.calls[0]
        shapes = f"{', '.join(map(str, inputs))} -> {output}"
        return f"<LayerNode {self.path}: {type(self.layer).__name__}, {shapes}, calls: {len(self.calls)}>"

    @property
    def is_channel_norm(self):
        """Whether the layer is a batch normalisation over the last axis that is called once."""
        is_norm = isinstance(self.layer, layers.BatchNormalization)
        return is_norm and len(self.calls) == 1 and self.layer.axis in (-1, len(self.calls[0][1]) - 1)


def check_graph(model):
    """Return `model` if it is a built functional or Sequential model; else raise ValueError."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"model must be a built keras.Model; got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model {model.name!r} is not built: call it on images once, or give it an Input")
    if not hasattr(_graph(model), "operations"):
        raise ValueError(f"model {model.name!r} is not a graph of layers: make it Sequential or functional")
    return model


def layer_nodes(model):
    """List every layer of a model with its calls, in the model's order; nested models give their layers.

    Input layers are left out, and so are operations of `keras.ops` between layers.

    Args:
        model: built, functional or Sequential.

    Returns:
        list of `LayerNode`.

    Raises:
        ValueError: `check_graph` refuses the model or a model nested in it.
    """
    found = {}
    for node in _layer_nodes(model, ""):
        first = found.setdefault(id(node.layer), node)
        if first is not node:  # two of the models share the layer
            for name in ("calls", "producers", "consumers", "training"):
                setattr(first, name, getattr(first, name) + getattr(node, name))
    return list(found.values())


def input_model(model, path):
    """Build the model that computes what one layer of `model` reads.

    The new model shares its layers with `model`, which does not change. Run it with `training=False`
    to get exactly what the layer is given at inference, before it casts that to its compute dtype.

    Args:
        model: built, functional or Sequential.
        path: path of the layer, as in `LayerNode.path`.

    Returns:
        keras.Model with the inputs of `model` and a list of outputs, one for each call of the layer in
        the order of `LayerNode.calls` (for a layer of several inputs: one for each of them, call by
        call). Keras returns a single output without the list: use `keras.tree.flatten`.

    Raises:
        ValueError: `check_graph` refuses the model, or it has no layer at `path`.
    """
    found = {node.path: node.layer for node in layer_nodes(model)}
    return _input_model(model, found[check_choice("path of the layer", path, found)])


def has_linear_activation(operation):
    """Return whether an operation has the activation "linear", so that its output is not transformed."""
    return getattr(operation, "activation", None) is keras.activations.linear


def copy_layer(layer, **changes):
    """Make a layer with the configuration of `layer`, except for `changes`. It is not built and has no weights.

    The activation may be a function that Keras does not know by name. If it is a layer, it is copied too.

    Raises:
        ValueError: Keras cannot make the layer from its configuration, as with a Lambda; or its activation
            has weights, which Keras would not save.
    """
    activation = getattr(layer, "activation", None)
    if isinstance(activation, keras.Layer):
        if activation.variables:
            raise ValueError(
                f"layer {layer.name!r} has an activation with its own weights, {type(activation).__name__}: "
                "make the activation a layer of the model"
            )
        activation = copy_layer(activation, **{key: changes[key] for key in changes if key == "dtype"})
    try:
        config = layer.get_config() | changes
        if not isinstance(config.get("activation", ""), str):  # not a name that Keras knows
            config["activation"] = activation
        return type(layer).from_config(config)
    except Exception as error:  # a user's class may raise anything
        raise ValueError(
            f"layer {layer.name!r} cannot be copied: Keras cannot make its class, {type(layer).__name__}, from its "
            f"configuration ({str(error).splitlines()[0]})"
        ) from error


def rebuild(model, chains, dtype=None):
    """Copy a model with its weights and replace some of its layers. The copy shares nothing with `model`.

    Args:
        model: built, functional or Sequential.
        chains: dict id(layer) -> list of new layers that replace it, called one after another. They must be
            built; their weights and dtypes are used as they are. An empty list removes the layer.
        dtype: dtype policy of the copied layers; default: each keeps its own.

    Returns:
        keras.Model of the same kind and name, not compiled.

    Raises:
        ValueError: `check_graph` refuses the model, or `copy_layer` cannot copy a layer.
    """
    return _rebuild(check_graph(model), {key: list(chain) for key, chain in chains.items()}, dtype)


def fold_batch_norm(model, dtype=None):
    """Copy a model for inference, with each batch normalisation folded into the layer before it.

    A normalisation after a convolution or a dense layer becomes part of that layer's weights:

        y = γ (W x + b − μ) / √(σ² + ε) + β  =  (γ / √(σ² + ε)) W x + γ (b − μ) / √(σ² + ε) + β

    This needs a channels-last layer without activation and LoRA whose output only the normalisation reads,
    one call of each, and no call with `training=True`. Other normalisations stay. The outputs are equal up to
    rounding. Do not train the new model.

    Args:
        model: built, functional or Sequential.
        dtype: dtype policy of the new layers, such as "float32" to leave mixed precision; default: each
            keeps its own.

    Returns:
        keras.Model, not compiled, that shares nothing with `model`.

    Raises:
        ValueError: `check_graph` refuses the model, or `copy_layer` cannot copy a layer.
    """
    if dtype is not None:
        model = rebuild(model, {}, dtype=dtype)
    chains, nodes = {}, {id(node.layer): node for node in layer_nodes(model)}
    for norm in nodes.values():
        before = nodes.get(id(norm.producers[0])) if norm.is_channel_norm else None
        if before is not None and _folds(before, norm):
            chains |= {id(before.layer): [_fold(before, norm.layer)], id(norm.layer): []}
    return rebuild(model, chains)


# --- reading the graph -------------------------------------------------------------------------------------------


def _graph(model):
    """Return the Functional that holds the nodes; a Sequential keeps one inside."""
    return getattr(model, "_functional", None) or model


def _keras_nodes(graph):
    """Return Keras's own nodes, one for each call of an operation, from the inputs to the outputs."""
    return [node for depth in sorted(graph._nodes_by_depth, reverse=True) for node in graph._nodes_by_depth[depth]]


def _calls_by_layer(graph):
    """Yield (layer, its Keras nodes), without the input layers."""
    nodes = _keras_nodes(graph)
    for layer in graph.layers:
        if not isinstance(layer, layers.InputLayer):
            yield layer, [node for node in nodes if node.operation is layer]


def _layer_nodes(model, prefix):
    graph = _graph(check_graph(model))
    consumers = {}
    for node in _keras_nodes(graph):
        for tensor in node.input_tensors:
            consumers.setdefault(id(tensor), []).append(node.operation)
    for tensor in {id(tensor) for tensor in graph.outputs}:
        consumers.setdefault(tensor, []).append(None)
    for layer, calls in _calls_by_layer(graph):
        if isinstance(layer, keras.Model):
            for inner in _layer_nodes(layer, f"{prefix}{layer.name}/"):
                yield dataclasses.replace(inner, calls=inner.calls * len(calls))
        else:
            yield LayerNode(
                path=prefix + layer.name,
                layer=layer,
                calls=[([tuple(x.shape) for x in call.input_tensors], tuple(call.outputs[0].shape)) for call in calls],
                producers=[x._keras_history.operation for call in calls for x in call.input_tensors],
                consumers=[reader for call in calls for x in call.outputs for reader in consumers.get(id(x), [])],
                training=[call.arguments.kwargs.get("training") for call in calls],
            )


def _input_model(model, layer):
    """Build the model from the inputs of `model` to what `layer` reads; None if `model` does not contain it."""
    graph = _graph(model)
    calls = []  # (call of the layer, None) or (call of a nested model, the nested model up to the layer)
    for inner, nodes in _calls_by_layer(graph):
        part = _input_model(inner, layer) if isinstance(inner, keras.Model) else None
        if part is not None or inner is layer:
            calls += [(node, part) for node in nodes]
    if not calls:
        return None
    tensors = [x for node, _ in calls for x in node.input_tensors]
    name = f"{model.name}_before_{layer.name}"  # its own name leaves Keras's counter of model names alone
    head = keras.Model(graph.input, tensors, name=name)  # ends at the tensors: it makes no new node in the layers
    if all(part is None for _, part in calls):
        return head
    # New inputs, since the nodes that call `head` and the parts must not be linked to the layers of `model`.
    inputs = keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name), graph.input
    )
    values = {id(x): value for x, value in zip(tensors, _as_list(head(inputs)), strict=True)}
    outputs = []
    for node, part in calls:
        if part is None:
            outputs += [values[id(x)] for x in node.input_tensors]
        else:
            args, kwargs = node.arguments.fill_in(values)  # the arguments of the call, such as `training`
            outputs += _as_list(part(*args, **kwargs))
    return keras.Model(inputs, outputs, name=f"{name}_nested")


# --- rebuilding --------------------------------------------------------------------------------------------------


def _rebuild(model, copies, dtype):
    """Rebuild `model`; `copies`, id(layer) -> its copy or a chain, grows by the layers copied here."""
    policy = {} if dtype is None else {"dtype": dtype}

    def copy(operation):
        if id(operation) not in copies:
            if isinstance(operation, keras.Model):
                copies[id(operation)] = _rebuild(operation, copies, dtype)
            else:
                copies[id(operation)] = copy_layer(operation, **policy if isinstance(operation, keras.Layer) else {})
        return copies[id(operation)]

    def call(copied, *args, **kwargs):
        if not isinstance(copied, list):
            return copied(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        for part in copied:
            x = part(x)
        return x

    if isinstance(model, keras.Sequential):
        first = model.inputs[0]
        stack = [keras.Input(batch_shape=first.shape, dtype=first.dtype, name=first.name)]
        stack += [part for layer in model.layers for part in _as_list(copy(layer))]
        new = keras.Sequential(stack, name=model.name)
    else:
        new = keras.models.clone_model(model, clone_function=copy, call_function=call)
    _carry_over(model, copies)
    return new


def _carry_over(model, copies):
    """Give the copies of the model's layers their weights and `trainable`; nested models have done so already."""
    pairs = [(layer, copies[id(layer)]) for layer in model.layers if id(layer) in copies]
    if not model.trainable:  # it freezes all layers within; those that were unfrozen later follow one by one
        for _, new in pairs:
            for part in _as_list(new):
                part.trainable = False
    for layer, new in pairs:
        if isinstance(layer, keras.Model):
            continue
        if layer.weights and not isinstance(new, list):  # a chain has its own weights
            new.set_weights(layer.get_weights())
            if hasattr(new, "finalize_state"):  # a Normalization computes with values derived from its weights
                new.finalize_state()
        for part in _as_list(new):
            part.trainable = layer.trainable


def _as_list(value):
    return value if isinstance(value, list) else [value]


# --- folding -----------------------------------------------------------------------------------------------------


def _folds(before, norm):
    """Return whether the batch normalisation of node `norm` can be folded into the layer of node `before`."""
    layer = before.layer
    return (
        isinstance(layer, _FOLDABLE)
        and has_linear_activation(layer)
        and getattr(layer, "data_format", "channels_last") == "channels_last"
        and not getattr(layer, "lora_enabled", False)
        and len(before.calls) == len(before.consumers) == 1
        and not any(norm.training)  # with training=True it normalises by the batch, not by its moving statistics
    )


def _fold(node, norm):
    """Return a copy of the node's layer with the batch normalisation `norm` in its weights."""
    mean, variance = (np.asarray(value, np.float64) for value in (norm.moving_mean, norm.moving_variance))
    gamma, beta = (1.0 if norm.gamma is None else norm.gamma), (0.0 if norm.beta is None else norm.beta)
    scale = np.asarray(gamma, np.float64) / np.sqrt(variance + norm.epsilon)
    kernels = node.layer.get_weights()
    bias = kernels.pop() if node.layer.use_bias else 0.0
    last = np.asarray(kernels[-1], np.float64)
    kernels[-1] = last * scale.reshape(last.shape[2:] if isinstance(node.layer, layers.DepthwiseConv2D) else -1)
    copy = copy_layer(node.layer, use_bias=True)
    copy.build(node.calls[0][0][0])
    copy.set_weights([*kernels, (np.asarray(bias, np.float64) - mean) * scale + np.asarray(beta, np.float64)])
    return copy
