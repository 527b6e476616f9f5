"""The layers with weights of a model: which can be converted, and what their chains cost.

A site refuses a method whose chain cannot be built in its place, and gives the reason.
"""

import dataclasses
import fnmatch
import functools
import math

import numpy as np
from keras import layers as keras_layers

from fcnn_utils import cost, factorizations, keras_graph, layer_kinds
from fcnn_utils._conv_options import DEPTHWISE

_KINDS = {
    "Depthwise": "depthwise",
    "Separable": "separable already",
    "Attention": "an attention layer, which makes its projections itself: no chain can take their place",
}
_FEW_CHANNELS = 4  # a layer that reads fewer is skipped by default
_SMALL = 0.01  # the smallest candidates, which together have at most this share of all costs, are skipped by default


@dataclasses.dataclass(eq=False)
class Site:
    """A layer with weights in a model: whether it can be converted, and what that costs."""

    node: keras_graph.LayerNode
    macs: float  # of all its calls; NaN if they are not known
    nodes: dict  # id of a layer -> its node, of all layers

    @property
    def layer(self):
        return self.node.layer

    @functools.cached_property
    def kind(self):
        return layer_kinds.KernelLayer(self.layer)

    @property
    def kernel_shape(self):
        return self.kind.kernel_shape

    @property
    def kernel_names(self):
        """Names of its kernels in messages, one for each group."""
        groups = [f", group {number}" for number in range(self.kind.groups)] if self.kind.groups > 1 else [""]
        return [f"layer {self.node.path!r}{group}" for group in groups]

    @property
    def parameters(self):
        return self.layer.count_params()

    @functools.cached_property
    def obstacle(self):
        """Why it can't be converted; "" if it can."""
        layer = self.layer
        if type(layer) not in layer_kinds.KINDS:
            return self._other_kind()
        try:
            self.kind  # noqa: B018  (reads the equation of an EinsumDense)
        except ValueError as error:
            return str(error)
        refusals = {
            "channels come first": getattr(layer, "data_format", "channels_last") != "channels_last",
            "depthwise": self.kind.groups > 1 and self.kernel_shape[-2] == 1,
            "its kernel has a constraint": layer.kernel_constraint is not None,
            "its weights are quantized or have a LoRA adapter": keras_graph.is_quantized(layer)
            or getattr(layer, "lora_enabled", False),
        }
        return next((reason for reason, holds in refusals.items() if holds), "")

    def _other_kind(self):
        layer, name = self.layer, type(self.layer).__name__
        if type(layer) not in vars(keras_layers).values():
            return f"a {name}, not a layer of Keras"
        if isinstance(layer, keras_layers.Wrapper):
            return f"a {name}, not a layer by itself"
        if all(len(weight.shape) < 2 for weight in layer.weights):
            return f"a {name}: it has no kernel"
        return next((said for kind, said in _KINDS.items() if kind in name), f"a {name}, which is not factorized")

    @functools.cached_property
    def reason(self):
        """Why it is skipped by default; "" if it is not."""
        if self.obstacle:
            return self.obstacle
        neighbour = self._other_part()
        if neighbour is not None:
            return f"factorized already, together with {neighbour.name}"
        channels = self.kernel_shape[-2]
        if channels < _FEW_CHANNELS:
            where = " in each group" if self.kind.groups > 1 else ""
            return f"reads {channels} channel{'s' * (channels > 1)}{where}: little to save, much to lose"
        return ""

    def offer(self, methods):
        """Keep those of the methods whose chain can be built here, as `methods`; set `obstacle` if there is none."""
        self.methods = [method for method in methods if not self.refusal(method)]
        if not self.methods:
            self.obstacle = self.reason = self.refusal(methods[0])

    def refusal(self, method):
        """Return why the chain of this method can't be built here; empty if it can."""
        if self.kind.is_pointwise and not issubclass(method, factorizations.SVD):
            return f"{'1×1' if self.kind.axes else 'dense'}: only svd factorizes it"
        ranks = (1,) * len(method.max_ranks(self.kernel_shape))
        try:
            self.kind.block(self.input_shape, method.chain(self.kernel_shape, ranks), use_bias=False)
        except ValueError as error:
            return str(error)
        return ""

    def _other_part(self):
        """Return a layer that forms a factorization together with this one; None if there is none.

        Nothing lies between the two layers, not even an activation. Known patterns, pointwise for 1×1 or dense:
            either layer of a pair k×1, 1×k
            a pointwise layer beside a depthwise one
            a pointwise layer that narrows before another layer, or widens after it
            a k×k layer before a pointwise one that widens
            a k×k layer between a pointwise one that does not widen and one that does not narrow (Tucker-2)
        """
        before, after = (_only_layer(found) for found in (self.node.producers, self.node.consumers))
        if before is not None:
            is_joined = keras_graph.has_linear_activation(before) and len(set(self.nodes[id(before)].consumers)) == 1
            is_joined &= _share_channels(before, self.layer, len(self.node.calls[0][0][0]))
            before = before if is_joined else None
        is_joined = after is not None and _share_channels(self.layer, after, len(self.node.calls[0][1]))
        if not (is_joined and keras_graph.has_linear_activation(self.layer)):
            after = None
        for other in filter(None, (before, after)):
            own, others = _kernel_size(self.layer), _kernel_size(other)
            has_kernels = 1 not in (math.prod(own), math.prod(others))
            if has_kernels and all(min(pair) == 1 < max(pair) for pair in zip(own, others, strict=True)):
                return other  # each extends along the other's axis of size 1
        if self.kind.is_pointwise:
            return self._pointwise_partner(before, after)
        if after is None or not _is_pointwise(after):
            return None
        if before is None or not _is_pointwise(before):
            return after if _widening(after) > 0 else None
        return before if _widening(before) <= 0 <= _widening(after) else None

    def _pointwise_partner(self, before, after):
        """`_other_part` of a 1×1 or dense layer."""
        for other, narrower in ((before, _widening(self.layer) > 0), (after, _widening(self.layer) < 0)):
            if other is not None and (narrower or type(other) in DEPTHWISE.values()):
                return other
        return None

    @property
    def input_shape(self):
        """Shape of what the layer reads, with None for sizes in which its calls differ; of a Dense, the channels."""
        if not (self.kind.axes or self.kind.einsum):
            return (self.kernel_shape[0],)
        shapes = [inputs[0][1:] for inputs, _ in self.node.calls]
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))

    def parameters_at(self, method, ranks):
        """Number of weights of the chain at these ranks, with the bias."""
        dense = math.prod(self.kernel_shape)
        return self.parameters + self.kind.groups * (method.count_parameters(self.kernel_shape, ranks) - dense)

    def macs_at(self, method, ranks):
        """MACs of the chain at these ranks, of all calls; NaN if they are not known."""
        if math.isnan(self.macs):
            return math.nan
        chain = method.chain(self.kernel_shape, ranks)
        return sum(self.kind.macs(chain, inputs[0], output) for inputs, output in self.node.calls)

    def chain(self, chain, taken, decompositions=None):
        """Return the new layers; the last has the layer's name, the others names that are not `taken`.

        Args:
            chain: from `factorizations.Factorization.chain`.
            taken: set of names, to which the new ones are added.
            decompositions: of the kernels of all groups, for the weights; without them they are random.
        """
        _, *bias = self.layer.get_weights()
        block = self.kind.block(self.input_shape, chain, use_bias=bool(bias))
        if decompositions:
            block.set_weights(self.kind.weights(decompositions, *bias or [None]))
        return [self._copy(layer, taken, last=layer is block.layers[-1]) for layer in block.layers[1:]]

    def _copy(self, layer, taken, last):
        name = self.layer.name if last else layer.name
        while not last and name in taken:
            name += "_"
        taken.add(name)
        kept = ("activity_regularizer", "bias_constraint") if last else ()
        copy = keras_graph.copy_layer(layer, name=name, **{key: getattr(self.layer, key) for key in kept})
        copy.build(layer.input.shape)
        copy.set_weights(layer.get_weights())
        return copy


def _only_layer(operations):
    """Return the layer with a kernel that the operations are, if they are one and the same; else None."""
    if len(set(operations)) != 1:
        return None
    has_kernel = type(operations[0]) in DEPTHWISE.values() or layer_kinds.read_kernel(operations[0]) is not None
    return operations[0] if has_kernel else None


def _share_channels(before, after, count):
    """Return whether a layer reads along the axes of `count` that the one before it writes along."""
    kinds = [layer_kinds.read_kernel(layer) for layer in (before, after)]
    return None in kinds or kinds[0].output_axes(count) == kinds[1].input_axes(count)


def _kernel_size(layer):
    return getattr(layer, "kernel_size", ())


def _is_pointwise(layer):
    return type(layer) in layer_kinds.KINDS and set(_kernel_size(layer)) <= {1}


def _widening(layer):
    """Return by how many channels the output of a layer exceeds its input."""
    *_, reads, writes = layer_kinds.KernelLayer(layer).kernel_shape
    return writes - reads


def find_sites(model):
    """Return the layers with weights, by path."""
    nodes, macs = {id(node.layer): node for node in keras_graph.layer_nodes(model)}, {}
    try:
        for call, count, _ in cost.call_costs(model):
            macs[id(call.operation)] = macs.get(id(call.operation), 0) + count
    except cost.SizeNotFixed:
        macs = dict.fromkeys(nodes, math.nan)
    return {node.path: Site(node, macs[key], nodes) for key, node in nodes.items() if node.layer.weights}


# parameters: what the user said, beside the model's layers
def choose(sites, named, excluded, model, methods):
    """Return the sites to convert, by path.

    Args:
        sites: from `find_sites`.
        named: paths of the layers to convert, or patterns such as "block*/conv?"; None for all that can be.
        excluded: paths or patterns of layers to leave.
        model: they belong to.
        methods: classes; one of them must do.

    Raises:
        ValueError: there is nothing to convert, or a layer that is named does not exist or can't be converted.
    """
    for site in sites.values():
        if not site.obstacle:
            site.offer(methods)
    left = set(_matching(sites, excluded, model, "exclude"))
    for path in left:
        sites[path].reason = sites[path].reason or "excluded"
    if named is None:
        _leave_small([site for site in sites.values() if not site.reason])
        chosen = {path: site for path, site in sites.items() if not site.reason}
    else:
        if not named:
            raise ValueError("name at least one layer to convert")
        paths = [path for path in _matching(sites, named, model, "layers") if path not in left]
        for path in paths:
            if sites[path].obstacle and path in _listed(named):
                raise ValueError(f"layer {path!r} can't be factorized: {sites[path].obstacle}")
        chosen = {path: site for path, site in sites.items() if path in paths and not site.obstacle}
    if not chosen:
        reasons = [f"{path}: {site.reason}" for path, site in sites.items() if "no kernel" not in site.reason][:5]
        said = "; ".join(reasons) or "no layer has a kernel"
        names = " or ".join(method.name for method in methods)
        raise ValueError(f"model {model.name!r} has no layer to factorize by {names} ({said})")
    return chosen


def _leave_small(sites):
    """Set the reason of the smallest sites, which are skipped for it.

    Together they have at most 1% of the parameters and at most 1% of the MACs of the given sites.
    """
    costs = np.array([[site.parameters, site.macs] for site in sites], float).reshape(-1, 2)
    shares = np.nan_to_num(costs / np.maximum(costs.sum(axis=0), 1))  # MACs may be unknown
    order = np.argsort(shares.max(axis=1), kind="stable")
    for number, spent in zip(order, np.cumsum(shares[order], axis=0), strict=True):
        if spent.max() <= _SMALL:
            sites[number].reason = "one of the smallest layers, together at most 1% of the costs: little to save"


def _listed(names):
    return [names] if isinstance(names, str) else list(names or ())


def _matching(sites, names, model, argument):
    """Return the paths that are named or match a pattern; each must find one."""
    found = []
    for name in _listed(names):
        if not isinstance(name, str):
            raise ValueError(f"{argument} must be paths of layers or patterns such as 'block*/conv?'; got {name!r}")
        own = [name] if name in sites else fnmatch.filter(sites, name)
        if not own:
            raise ValueError(
                f"there is no layer {name!r} with weights in model {model.name!r}; it has {', '.join(sites)}"
            )
        found += own
    return found
