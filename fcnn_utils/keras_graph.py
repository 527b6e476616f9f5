"""Inspect and rebuild the layer graph of a Keras model.

The functions take functional and Sequential models, with models nested in them. A layer of a nested
model has a path, such as `inner/conv1`. A subclassed model is traced first, with a warning. This is the
only module that touches Keras internals.
"""

import dataclasses
import tempfile

import keras
from keras import layers

from fcnn_utils import _trace
from fcnn_utils._checks import check_choice


@dataclasses.dataclass(eq=False)
class Call:
    """One call of an operation in a model: of a layer, or of a function of `keras.ops`.

    Attributes:
        path: name of the operation, after the names of the nested models that contain it.
        operation: keras.Operation; a layer is one.
        args, kwargs: its arguments; Keras tensors stand for values.
        outputs: list of Keras tensors.
        training: the `training` argument, of the call itself or of the nested model around it; or None.
        node: Keras's own node, whose tensors are those of the model that contains the operation.
    """

    path: str
    operation: keras.Operation
    args: tuple
    kwargs: dict
    outputs: list
    training: bool | None
    node: object

    @property
    def inputs(self):
        """The Keras tensors among the arguments."""
        return [x for x in keras.tree.flatten((self.args, self.kwargs)) if isinstance(x, keras.KerasTensor)]


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
        training: the `training` argument of each call (`Call.training`).
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
        """Whether the layer is Keras's own batch normalisation over the last axis and is called once."""
        is_norm = type(self.layer) is layers.BatchNormalization  # a subclass may compute something else
        return is_norm and len(self.calls) == 1 and self.layer.axis in (-1, len(self.calls[0][1]) - 1)


def check_graph(model):
    """Return `model` if it is a built functional or Sequential model; trace it if it is a subclassed one.

    Tracing makes the functional model `keras.Model(x, model.call(x))` of the same layers, and warns.

    Raises:
        ValueError: it is not a built keras.Model, or it cannot be traced.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"model must be a built keras.Model; got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model {model.name!r} is not built: call it on images once, or give it an Input")
    return model if is_graph(model) else _trace.trace_model(model)


def is_graph(layer):
    """Return whether a layer is a functional or Sequential model, whose layers can be listed."""
    return isinstance(layer, keras.Model) and hasattr(graph_of(layer), "operations")


def operation_calls(model, inputs=None):
    """List every call of every operation of a model, layer by layer; nested models give theirs.

    Input layers are left out. The shapes in a nested model are those of the call of this model: they are
    known even if the nested model itself takes images of any size.

    Args:
        model: as in `check_graph`.
        inputs: list of Keras tensors that the model is called on; default: its own.

    Returns:
        list of `Call`.
    """
    return list(_operation_calls(check_graph(model), "", inputs, None))


def layer_nodes(model):
    """List every layer of a model with its calls, in the model's order; nested models give their layers.

    Input layers are left out, and so are operations of `keras.ops` between layers.

    Args:
        model: as in `check_graph`.

    Returns:
        list of `LayerNode`.
    """
    model = check_graph(model)
    consumers, found = _consumers(model), {}
    for call in _operation_calls(model, "", None, None):
        if not isinstance(call.operation, keras.Layer):
            continue
        shapes = [tuple(x.shape) for x in call.inputs], tuple(call.outputs[0].shape)
        node = found.setdefault(id(call.operation), LayerNode(call.path, call.operation, [], [], [], []))
        node.calls.append(shapes)
        node.producers += [x._keras_history.operation for x in call.node.input_tensors]
        node.consumers += [reader for x in call.node.outputs for reader in consumers.get(id(x), [])]
        node.training.append(call.training)
    return list(found.values())


def operation_names(model):
    """Return the names of all operations of a model: its inputs, layers, nested models and what these contain."""
    names = set()
    for operation in graph_of(model).operations:
        names |= {operation.name} | (operation_names(operation) if is_graph(operation) else set())
    return names


def pack_inputs(model, values):
    """Return a list of values, one for each input of a model, in the structure that its call takes."""
    return keras.tree.pack_sequence_as(graph_of(model).input, values)


def is_quantized(layer):
    """Return whether the weights of a layer are quantized, as by `keras.Model.quantize`."""
    return bool(getattr(getattr(layer, "dtype_policy", None), "quantization_mode", None))


def input_model(model, path):
    """Build the model that computes what one layer of `model` reads.

    The new model shares its layers with `model`, which does not change. Run it with `training=False`
    to get exactly what the layer is given at inference, before it casts that to its compute dtype.

    Args:
        model: as in `check_graph`.
        path: path of the layer, as in `LayerNode.path`.

    Returns:
        keras.Model with the inputs of `model` and a list of outputs, one for each call of the layer in
        the order of `LayerNode.calls` (for a layer of several inputs: one for each of them, call by
        call). Keras returns a single output without the list: use `keras.tree.flatten`.

    Raises:
        ValueError: `check_graph` refuses the model, or it has no layer at `path`.
    """
    model = check_graph(model)
    found = {node.path: node.layer for node in layer_nodes(model)}
    return _input_model(model, found[check_choice("path of the layer", path, found)])


def has_linear_activation(operation):
    """Return whether an operation has the activation "linear", so that its output is not transformed."""
    return getattr(operation, "activation", None) is keras.activations.linear


def copy_layer(layer, **changes):
    """Make a layer with the configuration of `layer`, except for `changes`. It is not built and has no weights.

    The activation may be a function that Keras does not know by name. If it is a layer, it is copied too.

    Raises:
        ValueError: Keras cannot make the layer from its configuration, as with a Lambda; its activation
            has weights, which Keras would not save; or it is quantized and the dtype shall change.
    """
    if "dtype" in changes and is_quantized(layer):
        raise ValueError(f"layer {layer.name!r} is quantized, so that its dtype can't be changed: quantize afterwards")
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


def in_float32(model):
    """Return the model, or a copy of it in float32 if a layer computes with other floats. Integers stay."""
    dtypes = {node.layer.compute_dtype for node in layer_nodes(model)}
    return rebuild(model, {}, dtype="float32") if dtypes & {"float16", "bfloat16", "float64"} else model


# --- reading the graph -------------------------------------------------------------------------------------------


def graph_of(model):
    """Return the Functional that holds the nodes; a Sequential keeps one inside."""
    return getattr(model, "_functional", None) or model


def keras_nodes(graph):
    """Return Keras's own nodes, one for each call of an operation, from the inputs to the outputs."""
    return [node for depth in sorted(graph._nodes_by_depth, reverse=True) for node in graph._nodes_by_depth[depth]]


def _calls_by_operation(graph):
    """Yield (operation, its Keras nodes) in the graph's order, without the input layers."""
    nodes = keras_nodes(graph)
    for operation in graph.operations:
        if not isinstance(operation, layers.InputLayer):
            yield operation, [node for node in nodes if node.operation is operation]


def _operation_calls(model, prefix, inputs, training):
    """Yield the calls in a graph that is called on `inputs` (None: its own) with the argument `training`."""
    graph = graph_of(model)
    arguments = _arguments(graph, inputs)
    for operation, nodes in _calls_by_operation(graph):
        for node in nodes:
            args, kwargs, outputs = arguments[id(node)]
            own = kwargs.get("training")
            own = training if own is None else own
            if is_graph(operation):
                read = keras.tree.flatten(args[0] if args else kwargs["inputs"])
                yield from _operation_calls(operation, f"{prefix}{operation.name}/", read, own)
            else:
                yield Call(prefix + operation.name, operation, args, kwargs, outputs, own, node)


def _arguments(graph, inputs):
    """Return dict id(Keras node) -> (args, kwargs, outputs), for a graph that is called on `inputs`."""
    values, found = {id(x): value for x, value in zip(graph.inputs, inputs or graph.inputs, strict=True)}, {}
    same = all(x.shape == values[id(x)].shape for x in graph.inputs)
    same = same and not any(map(_trace.matrix_of, graph.operations))
    for node in keras_nodes(graph):
        if node.is_input:
            continue
        args, kwargs = node.arguments.fill_in(values)
        outputs = node.outputs if same else _trace.output_specs(node.operation, args, kwargs)
        values |= {id(x): value for x, value in zip(node.outputs, outputs, strict=True)}
        found[id(node)] = args, kwargs, outputs
    return found


def _consumers(model):
    """Return dict id(tensor) -> operations that read it, None for an output, in a model and those nested in it."""
    graph, found = graph_of(model), {}
    for node in keras_nodes(graph):
        for tensor in node.input_tensors:
            found.setdefault(id(tensor), []).append(node.operation)
    for tensor in {id(tensor) for tensor in graph.outputs}:
        found.setdefault(tensor, []).append(None)
    for nested in filter(is_graph, graph.operations):
        found |= _consumers(nested)
    return found


def _input_model(model, layer):
    """Build the model from the inputs of `model` to what `layer` reads; None if `model` does not contain it."""
    graph = graph_of(model)
    calls = []  # (call of the layer, None) or (call of a nested model, the nested model up to the layer)
    for inner, nodes in _calls_by_operation(graph):
        part = _input_model(inner, layer) if is_graph(inner) else None
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

    def copy(operation):
        if id(operation) not in copies:
            if is_graph(operation):
                copies[id(operation)] = _rebuild(operation, copies, dtype)
            else:
                is_float = "float" in getattr(operation, "compute_dtype", "")  # not a lookup of integers
                copies[id(operation)] = copy_layer(operation, **{"dtype": dtype} if dtype and is_float else {})
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
        if is_graph(layer):
            continue
        if not isinstance(new, list):  # a chain has its own weights
            _carry_over_state(layer, new)
        for part in _as_list(new):
            part.trainable = layer.trainable


def _carry_over_state(layer, new):
    """Give a copied layer the weights of `layer`, and what else Keras saves with it, such as a vocabulary."""
    if layer.weights:
        new.set_weights(layer.get_weights())
    for one, other in zip(layer._flatten_layers(), new._flatten_layers(), strict=True):
        if hasattr(one, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                one.save_assets(folder)
                other.load_assets(folder)
        if hasattr(other, "finalize_state"):  # a Normalization computes with values derived from its weights
            other.finalize_state()


def _as_list(value):
    return value if isinstance(value, list) else [value]
