"""Find the plan that meets a measured target: a speed-up in an engine, or a bound on the network's own metric."""

import math
import numbers
import warnings

from fcnn_utils import batch_norm, benchmark, deploy, keras_graph
from fcnn_utils._clock import Clock
from fcnn_utils._network_runs import output_change, outputs_of

_ROUNDS = 4  # networks that are timed; if none of them meets the target, up to as many again
_TOLERANCE = 0.05  # of a speed-up: the search stops within it above the target; further below, a warning follows
_OVERSHOOT = 1.5  # times the target; a warning follows
_CALLS = 40  # of each network
_EVALUATIONS = 6  # networks whose metric is computed, beside the dense one
_RANGE = 0.04, 0.7  # shares of a kernel's parameters whose chains are timed


class Seconds:
    """Time of a call of the whole network in an engine; see `_planning.Macs`."""

    name, unit = "time", " s"

    def __init__(self, clock, total):
        self._clock, self.total = clock, total

    def dense(self, site):
        return self._clock.seconds(site)

    def chain(self, site, method, ranks):
        return self._clock.seconds(site, method, ranks)


class Timer:
    """Time networks in turn with the dense one, batch norms folded.

    Attributes:
        seconds: median time of the dense network in the last comparison.
        table: of the last comparison, from `benchmark.compare`.
    """

    # parameters: the model and how it is timed
    def __init__(self, model, sites, engine, batch, threads):
        self._model, self._sites = model, sites
        self._engine, self._batch, self._threads = engine, batch, threads
        self._dense = self._load(model)
        self._inputs = deploy.random_inputs(model, batch)
        self.speedup({})

    def speedup(self, plan):
        """Return how many times faster the network of a plan is; its weights are random, as they do not matter."""
        runs = {"dense": self._dense}
        if plan:
            runs["factorized"] = self._load(self._skeleton(plan))
        inputs = dict.fromkeys(runs, self._inputs)
        self.table = benchmark.compare(runs, inputs, self._batch, self._engine, _CALLS)
        self.seconds = self.table["median_ms"].iloc[0] / 1e3
        return float(self.table["speedup"].iloc[-1])

    def _load(self, model):
        return deploy.load(batch_norm.fold_batch_norm(model), self._engine, threads=self._threads)

    def _skeleton(self, plan):
        taken = keras_graph.operation_names(self._model)
        chains = {
            id(self._sites[path].layer): self._sites[path].chain(
                choice.method.chain(self._sites[path].kernel_shape, choice.ranks), taken
            )
            for path, choice in plan.items()
        }
        return keras_graph.rebuild(self._model, chains)


# parameters: what `factorize` was given
def by_speedup(model, chosen, planner, speedup, engine, batch, threads, progress):
    """Search for a plan whose network is `speedup` times as fast as the dense one; return it and what was measured.

    The costs of the candidates are measured layer by layer (`_clock`). Then at most four whole networks are timed, and
    the time that the next plan may take is corrected after each. If none of them meets the target, up to four more are
    timed. The search stops early if one exceeds the target by at most 5%, or if even the smallest network is too slow.
    The slowest of these networks that meets the target is taken; if none meets it, the fastest. It is timed once more,
    for the report. A warning follows if this last speed-up is more than 5% below the target. Another follows if it is
    more than 1.5 times the target: then accuracy was lost without need.
    """
    clock = Clock(engine, batch, threads, weight_bytes=4 * model.count_params())  # first: it checks what it is given
    timer = Timer(model, chosen, engine, batch, threads)
    requests = [(site, None, None) for site in chosen.values()]
    for site in chosen.values():
        for method in site.methods:
            low, high = (planner.ranks(site, method, share) for share in _RANGE)
            requests += [(site, method, ranks) for ranks in clock.ladder(site, method, low, high)]
    clock.measure(requests, progress)
    planner.predict(0.25)  # widely: a share of the time is not one of the parameters
    costs = Seconds(clock, timer.seconds)
    least, limit, tried = planner.smallest(costs), costs.total / speedup, []
    for _ in progress.over(range(2 * _ROUNDS), "networks timed", name=lambda _: f"{tried[-1][0]:.2f} times as fast"):
        plan = planner.within(costs, max(limit, least + 1e-9 * abs(least)))
        tried.append((timer.speedup(plan), plan, limit <= least))
        if speedup <= tried[-1][0] <= (1 + _TOLERANCE) * speedup or (limit <= least and tried[-1][0] < speedup):
            break
        if len(tried) >= _ROUNDS and any(each[0] >= speedup for each in tried):
            break
        limit += costs.total / (speedup * (1 + _TOLERANCE / 3)) - costs.total / tried[-1][0]
    enough = [each for each in tried if each[0] >= speedup]
    _, plan, is_smallest = min(enough, key=_first) if enough else max(tried, key=_first)
    reached = timer.speedup(plan)
    fast = f"in {engine} the network is {reached:.2f} times as fast as the dense one"
    if reached < (1 - _TOLERANCE) * speedup:
        why = _shortfall(chosen, planner, costs, tried, is_smallest, bool(enough))
        warnings.warn(f"{fast}, not {speedup:g} times{why}", stacklevel=3)
    elif reached > _OVERSHOOT * speedup:
        warnings.warn(
            f"{fast}; {speedup:g} times was asked. The extra speed costs accuracy. Other programs may have disturbed "
            "the measurement: measure again on a quiet machine",
            stacklevel=3,
        )
    before, after = timer.table["median_ms"].iloc[[0, -1]]
    return plan, {
        "latency_before_ms": before,
        "latency_after_ms": after,
        "speedup": timer.table["speedup"].iloc[-1],
        "engine": engine,
        "batch": batch,
    }


def _shortfall(chosen, planner, costs, tried, is_smallest, reached_before):
    """Return what limits the speed-up, as the end of a warning."""
    if reached_before:
        return ". An earlier measurement met the target: measure again on a quiet machine"
    if not any(each[2] for each in tried):
        retry = "measure again on a quiet machine, or ask for a slightly larger speed-up"
        return f". None of {len(tried)} networks met the target: {retry}"
    fixed = max(0.0, 1 - sum(costs.dense(site) for site in chosen.values()) / costs.total)
    lower = f" of multiple={planner.multiple}" if planner.multiple > 1 else ""
    smallest = f", with the smallest ranks{lower}" if is_smallest else ""
    return f"{smallest}: {fixed:.0%} of the dense network's time is outside the layers that may be converted"


def _first(item):
    return item[0]


class Metric:
    """A number of the network that must stay above a bound; it counts how often it is computed.

    Args:
        function: from a keras.Model to a number, higher is better.
        at_least: the bound.
        is_loss: whether the number is minus a loss.
    """

    def __init__(self, function, at_least, is_loss=False):
        self._function, self.at_least, self._is_loss, self.calls = function, at_least, is_loss, 0

    @classmethod
    def of_loss(cls, model, images, max_loss):
        """Make the metric whose bound is a largest change of the outputs on these images."""
        before = outputs_of(keras_graph.in_float32(model), images)

        def minus_loss(new):
            return -output_change(before, outputs_of(keras_graph.in_float32(new), images))

        return cls(minus_loss, -max_loss, is_loss=True)

    def note(self, value):
        """Return what the report notes of the final network."""
        return {"loss": -value} if self._is_loss else {"metric": value, "metric_calls": self.calls}

    def __call__(self, model):
        value = self._function(model)
        self.calls += 1
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"the metric must return a finite number; got {value!r}")
        return float(value)


def cheapest(model, planner, costs, metric, build, progress):
    """Return the cheapest network, by bisection on the costs, whose metric is at least the bound.

    Args:
        model: the dense network.
        planner: `_planning.Planner`.
        costs: `_planning.Macs` or another.
        metric: `Metric`.
        build: function from a plan to (network, report).
        progress: `Progress`.

    Returns:
        (network, report).

    Raises:
        ValueError: the dense network does not have the metric.
    """
    dense_value = metric(model)
    if dense_value < metric.at_least:
        raise ValueError(
            f"the least value of the metric must be at most that of the dense network, {dense_value:g}; got "
            f"{metric.at_least:g}"
        )
    planner.predict(0.2, largest=0.9)  # any of these may be needed
    low, high, best = planner.smallest(costs), costs.total, None
    for _ in progress.over(range(_EVALUATIONS), "networks tried"):
        middle = math.sqrt(low * high)
        new, report = build(planner.within(costs, middle))
        value = metric(new)
        if value >= metric.at_least:
            best, high = (new, report, value), middle
        else:
            low = middle
    new, report, value = best or (*build({}), dense_value)
    return new, report.note(**metric.note(value))
