"""Choose the method and the ranks of every layer, for a ratio or for a budget of the whole network."""

import dataclasses
import itertools
import math

import numpy as np

from fcnn_utils import cost, factorizations, rank_selection, sensitivity

_SMALLEST = 1e-9  # a fraction of the parameters that every smallest rank exceeds
_TRIED = 5  # sizes of each layer and method whose loss is predicted from its own decomposition
_STEPS = 60  # sizes from the smallest ranks to the largest tried ones; their losses follow from those of the tried ones
_NEGLIGIBLE = 0.02  # share of a budget below which it is not worth the time to factorize the cheapest layers
_LARGE = 500_000  # of larger kernels only 3 sizes are tried, and larger ones seldom (`_ladder`)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of a layer: a class of `factorizations`, its ranks, and options that come from the images."""

    method: type
    ranks: tuple
    options: dict = dataclasses.field(default_factory=dict)


def named_method(value):
    """Return the class of a pair (method, ranks); None if the value is ranks alone."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], (str, type))
    return factorizations.get(value[0]) if is_pair else None


class Macs:
    """Multiply-adds of the whole network for one image."""

    name, unit = "macs", ""

    def __init__(self, model, chosen):
        if any(math.isnan(site.macs) for site in chosen.values()):
            raise ValueError(
                "macs=, max_loss= and metric= need a model with a fixed input size: use params=, size_mb=, ratio= or "
                "ranks="
            )
        self.total = cost.total_costs(model)["macs"]  # warns if some are not known

    def dense(self, site):
        return site.macs

    def chain(self, site, method, ranks):
        return site.macs_at(method, ranks)


class Parameters:
    """Weights of the whole network."""

    name, unit = "params", ""

    def __init__(self, model, chosen):
        self.total = model.count_params()

    def dense(self, site):
        return site.parameters

    def chain(self, site, method, ranks):
        return site.parameters_at(method, ranks)


class Megabytes(Parameters):
    """Size of the weights in 10⁶ bytes, in the precision in which the model stores them."""

    name, unit = "size_mb", " MB"

    def __init__(self, model, chosen):
        self.total = megabytes(model)

    def dense(self, site):
        return super().dense(site) * _megabytes(site.layer.variable_dtype)

    def chain(self, site, method, ranks):
        return super().chain(site, method, ranks) * _megabytes(site.layer.variable_dtype)


def megabytes(model):
    """Return the size of a model's weights in 10⁶ bytes."""
    return sum(_megabytes(weight.dtype) * math.prod(weight.shape) for weight in model.weights)


def _megabytes(dtype):
    return cost.value_bytes(dtype) / 1e6


class Planner:
    """Choose methods and ranks for the layers of one model. Losses are predicted once, for all budgets.

    Args:
        model: the dense model.
        chosen: dict path -> `Site`, with the methods that may be taken.
        images: list of arrays or None.
        multiple: ranks are multiples of this, or the largest rank.
        options: function from a method to the options of its decompositions.
        progress: `Progress`.

    Attributes:
        multiple: see above.
    """

    # parameters: what the user said
    def __init__(self, model, chosen, images, multiple, options, progress):
        self._model, self._chosen, self._images = model, chosen, images
        self.multiple, self._options, self._progress = multiple, options, progress
        self._candidates = {}  # path -> list of lists of `Candidate`

    def given(self, ranks, methods):
        """Return the plan of the user.

        Args:
            ranks: dict path -> ranks, or path -> (method, ranks).
            methods: classes of which an unnamed method is one.
        """
        for path in ranks:
            if path not in self._chosen:
                raise ValueError(f"ranks= takes exact paths of layers that are not excluded; got {path!r}")
        return {path: self._given(self._chosen[path], value, methods) for path, value in ranks.items()}

    @staticmethod
    def _given(site, value, methods):
        path, named = site.node.path, named_method(value)
        allowed = [method for method in site.methods if method is named or (named is None and method in methods)]
        if not allowed:
            refused = [named] if named else methods
            names = " or ".join(method.name for method in refused)
            raise ValueError(f"layer {path!r} can't be factorized by {names}: {site.refusal(refused[0])}")
        if len(allowed) > 1:
            raise ValueError(
                f"ranks must name the method where several are allowed: {{{path!r}: ({allowed[0].name!r}, {value!r})}}"
            )
        try:
            return Choice(allowed[0], allowed[0].check_ranks(site.kernel_shape, value[1] if named else value))
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None

    def by_ratio(self, ratio):
        """Return the plan at which each kernel keeps at most this share of its parameters.

        Layers for which even the smallest ranks keep more stay dense. Of several methods each layer gets that of the
        smallest loss; without images, of the smallest error of the kernel.
        """
        least = {path: min(self._least_fraction(site, each) for each in site.methods) for path, site in self._sites}
        if ratio < min(least.values()):
            raise ValueError(
                f"ratio must be at least {_rounded_up(min(least.values()))}, the share of {self._names()} at rank "
                f"{self.multiple}; got {ratio:g}: raise it{self._or_lower_multiple}"
            )
        sites = {path: site for path, site in self._sites if least[path] <= ratio}
        ladders = {
            path: [
                (method, [self.ranks(site, method, ratio)])
                for method in site.methods
                if self._least_fraction(site, method) <= ratio
            ]
            for path, site in sites.items()
        }
        if all(len(ladder) == 1 for ladder in ladders.values()):
            return {path: Choice(method, ranks) for path, [(method, [ranks])] in ladders.items()}
        if self._images is None:
            return {path: self._least_error(sites[path], ladder) for path, ladder in ladders.items()}
        best = {}
        for path, groups in self._predict(ladders).items():
            candidate = min((group[0] for group in groups), key=lambda candidate: candidate.loss)
            best[path] = Choice(candidate.method, candidate.ranks, candidate.options)
        return best

    def within(self, costs, limit, uniform=False):
        """Return the plan within a limit on the costs of the whole network; layers that are not in it stay dense.

        Args:
            costs: `Macs`, `Parameters` or another with these methods.
            limit: of the whole network.
            uniform: whether all layers keep the same share of their parameters. So it is without images, too.
        """
        if limit >= costs.total:
            return {}
        fixed = costs.total - sum(costs.dense(site) for _, site in self._sites)
        least = fixed + self._least_cost(costs)
        if limit < least:
            raise ValueError(
                f"{costs.name} must be at least {_rounded_up(least)}{costs.unit}, with {self._names()} at rank "
                f"{self.multiple} in every layer that is converted; got {_plain(limit)}{costs.unit}: raise it"
                f"{self._or_lower_multiple}, or name more layers by layers="
            )
        if uniform or self._images is None:
            return self._uniform(costs, limit - fixed)
        self.predict((limit - fixed) / max(costs.total - fixed, 1e-300), without=self._negligible(costs, limit - fixed))
        options = {path: self._choices(site, costs) for path, site in self._sites}
        plan = rank_selection.allocate(options, limit - fixed)
        return {path: choice for path, choice in plan.items() if choice is not None}

    def predict(self, share, largest=None, without=()):
        """Predict the losses at sizes around a share of the layers' cost, unless that has been done.

        Args:
            share: of the layers' cost that may remain. The smallest size that is tried has a quarter of this share of a
                kernel's parameters, but at most 20%.
            largest: share of a kernel's parameters at the largest size that is tried. Default: three times `share`, but
                at most 70% (large kernels: 50%) or, if that is more, 1.2 times `share` up to 95%.
            without: paths of layers that are not tried; they stay dense.
        """
        if not self._candidates:
            tried = [(path, site) for path, site in self._sites if path not in without]
            self._candidates = self._predict({path: self._ladder(site, share, largest) for path, site in tried})

    def smallest(self, costs):
        """Return the least cost of the whole network."""
        return costs.total - sum(costs.dense(site) for _, site in self._sites) + self._least_cost(costs)

    def ranks(self, site, method, fraction):
        """Return the largest ranks that keep this share of the parameters, or the smallest."""
        share = max(fraction, self._least_fraction(site, method))
        return rank_selection.ranks_for_fraction(method, site.kernel_shape, share, multiple=self.multiple)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def _sites(self):
        return self._chosen.items()

    @property
    def _or_lower_multiple(self):
        return ", or lower multiple=" if self.multiple > 1 else ""

    def _names(self):
        return " or ".join(sorted({method.name for _, site in self._sites for method in site.methods}))

    def _least_fraction(self, site, method):
        """Return a share of the dense parameters that is just enough for the smallest ranks."""
        least = tuple(min(self.multiple, high) for high in method.max_ranks(site.kernel_shape))
        return (method.count_parameters(site.kernel_shape, least) + 0.5) / math.prod(site.kernel_shape)

    def _least_cost(self, costs, dense=()):
        """Return the least cost of all layers together; those of the paths `dense` stay dense."""
        total = 0
        for path, site in self._sites:
            methods = () if path in dense else site.methods
            chains = [costs.chain(site, each, self.ranks(site, each, _SMALLEST)) for each in methods]
            total += min([costs.dense(site), *chains])
        return total

    def _negligible(self, costs, limit):
        """Return the paths of the cheapest layers, whose dense costs sum to at most 2% of the limit.

        Return none if the limit can't be met with these layers dense.
        """
        cheapest = sorted((costs.dense(site), path) for path, site in self._sites)
        spent = itertools.accumulate(cost for cost, _ in cheapest)
        paths = {path for total, (_, path) in zip(spent, cheapest, strict=True) if total <= _NEGLIGIBLE * limit}
        return paths if self._least_cost(costs, dense=paths) <= limit else set()

    def _least_error(self, site, ladder):
        """Return the choice of the smallest error of the kernels; `ladder` is a list of (method, [ranks])."""
        ladders = [(method, ranks, self._options(method)) for method, ranks in ladder]
        parts = [factorizations.decompose_ladders(kernel, ladders) for kernel in site.kind.kernels()]
        errors = [
            sum((own[n][0].relative_error * own[n][0].kernel_norm) ** 2 for own in parts) for n in range(len(ladder))
        ]
        method, [ranks] = ladder[int(np.argmin(errors))]
        return Choice(method, ranks)

    def _uniform(self, costs, limit):
        """Return the plan of one share of the parameters for all layers; of several methods, by the kernel's error."""
        share = limit / max(sum(costs.dense(site) for _, site in self._sites), 1e-300)
        methods = {}
        for path, site in self._sites:
            ladder = [(method, [self.ranks(site, method, share)]) for method in site.methods]
            methods[path] = ladder[0][0] if len(ladder) == 1 else self._least_error(site, ladder).method

        def at(path, site, fraction):
            """Return (choice, cost); (None, cost of the dense layer) if the chain is not cheaper."""
            ranks = self.ranks(site, methods[path], fraction)
            count = costs.chain(site, methods[path], ranks)
            dense = costs.dense(site)
            return (Choice(methods[path], ranks), count) if count < dense else (None, dense)

        def total(fraction):
            return sum(at(path, site, fraction)[1] for path, site in self._sites)

        low, high = _SMALLEST, 1.0
        if total(high) <= limit:
            low = high
        while high - low > 1e-4 * high:
            middle = (low + high) / 2 if low > 1e-6 else high / 2  # halve first: the fraction may be very small
            low, high = (middle, high) if total(middle) <= limit else (low, middle)
        plan = {path: at(path, site, low)[0] for path, site in self._sites}
        return {path: choice for path, choice in plan.items() if choice is not None}

    def _choices(self, site, costs):
        """Return the options of a layer for `rank_selection.allocate`; the choice None is the dense layer."""
        options = [(None, costs.dense(site), 0.0)]
        for group in self._candidates.get(site.node.path, []):
            method, own = group[0].method, group[0].options
            sizes = [method.count_parameters(site.kernel_shape, each.ranks) for each in group]
            loss = _interpolated(np.log(sizes), np.log([max(each.loss, 1e-9) for each in group]))
            smallest = method.count_parameters(site.kernel_shape, self.ranks(site, method, _SMALLEST))
            for size in np.geomspace(smallest, sizes[-1], _STEPS if sizes[-1] > smallest else 1):
                ranks = self.ranks(site, method, (size + 0.5) / math.prod(site.kernel_shape))
                exact = method.count_parameters(site.kernel_shape, ranks)
                option = Choice(method, ranks, own), costs.chain(site, method, ranks), math.exp(loss(math.log(exact)))
                options.append(option)
        return [option for option in options if option[0] is None or option[1] < options[0][1]]

    def _ladder(self, site, share, largest):
        """Return a list of (method, list of ranks); the arguments are those of `predict`."""
        is_large, ladder = math.prod(site.kernel_shape) > _LARGE, []
        tried, most = (3, 0.5) if is_large else (_TRIED, 0.7)
        if largest is None:  # a layer may keep more than the average share
            largest = min(3 * share, max(most, min(1.2 * share, 0.95)))
        for method in site.methods:
            least = self._least_fraction(site, method)
            ends = max(least, min(share / 4, 0.2)), max(least, largest)
            ranks = [self.ranks(site, method, float(fraction)) for fraction in np.geomspace(*ends, tried)]
            ladder.append((method, sorted(set(ranks))))
        return ladder

    def _predict(self, ladders):
        full = {
            path: [(method, ranks, self._options(method)) for method, ranks in ladder]
            for path, ladder in ladders.items()
        }
        return sensitivity.predict_losses(self._model, self._images, full, progress=self._progress)


def _interpolated(x, y):
    """Return a function that interpolates the points (log size, log loss) linearly.

    Below the first point it continues with the first slope, limited to -3 to -0.5; -1 for a single point. Above the
    last point it is constant.
    """
    slope = np.clip((y[1] - y[0]) / (x[1] - x[0]), -3, -0.5) if len(x) > 1 else -1.0
    return lambda at: float(np.interp(at, x, y) if at >= x[0] else y[0] + slope * (at - x[0]))


def _rounded_up(number):
    return f"{math.ceil(number):,}" if number >= 100 else f"{math.ceil(1e4 * number) / 1e4:g}"


def _plain(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:g}"


COSTS = {"macs": Macs, "params": Parameters, "size_mb": Megabytes}
