"""Cut a model in two before a layer, so that only the second part need be run again when the layer changes."""

import keras

from fcnn_utils import keras_graph


def split_before(model, layer):
    """Return (head, tail): `tail(head(x))` is `model(x)`, and `layer` is in the tail only; (None, model) if impossible.

    The cut is the last place before the layer that meets two conditions. All that follows depends on a single tensor;
    in a residual network this holds before a block. No operation is called on both sides of the cut. Both parts share
    their layers with `model`.

    Args:
        model: functional or Sequential.
        layer: a layer of it, or of a model nested in it.
    """
    graph = keras_graph.graph_of(model)
    nodes = keras_graph.keras_nodes(graph)
    first = next(number for number, node in enumerate(nodes) if _contains(node.operation, layer))
    last_use = {id(x): number for number, node in enumerate(nodes) for x in node.input_tensors}
    last_use |= {id(x): len(nodes) for x in graph.outputs}
    last_call = {id(node.operation): number for number, node in enumerate(nodes)}
    alive, cut, called_until = {}, None, 0
    for number, node in enumerate(nodes[:first]):
        alive = {key: x for key, x in alive.items() if last_use[key] > number}
        alive |= {id(x): x for x in node.outputs if last_use.get(id(x), -1) > number}
        called_until = max(called_until, last_call[id(node.operation)])
        # One tensor is alive and no input comes later: all that follows depends on it alone.
        if len(alive) == 1 and called_until == number and not any(later.is_input for later in nodes[number + 1 :]):
            cut = next(iter(alive.values()))
    if cut is None or any(cut is x for x in graph.inputs):
        return None, model
    head = keras.Model(graph.input, cut, name=f"{model.name}_head")
    return head, keras.Model(cut, keras.tree.pack_sequence_as(graph.output, graph.outputs), name=f"{model.name}_tail")


def _contains(operation, layer):
    if keras_graph.is_graph(operation):
        return any(node.layer is layer for node in keras_graph.layer_nodes(operation))
    return operation is layer
