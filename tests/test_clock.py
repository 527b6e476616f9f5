"""Measured times of layers and chains: `fcnn_utils._clock`, with the models that it times."""

import json

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _clock, _small_models, benchmark, cost, deploy, keras_graph
from fcnn_utils._clock import Clock
from fcnn_utils._pieces import Piece, pieces_of
from fcnn_utils._sites import find_sites
from fcnn_utils.factorizations import CP, CP4, SVD, DepthwiseSeparable, SpatialSVD, TensorTrain, Tucker2

ENGINES = tuple(_small_models.PACKAGES)
METHODS = (SVD, SpatialSVD, Tucker2, CP, CP4, TensorTrain, DepthwiseSeparable)
KINDS = {
    "Conv1D": (layers.Conv1D(6, 3), (12, 4)),
    "causal Conv1D": (layers.Conv1D(6, 3, padding="causal", dilation_rate=2), (12, 4)),
    "Conv2D": (layers.Conv2D(6, (5, 3), (2, 1), padding="same"), (9, 8, 4)),
    "strided Conv2D": (layers.Conv2D(6, 3, 2, padding="same"), (9, 8, 4)),
    "valid Conv2D": (layers.Conv2D(6, 3, 2), (9, 8, 4)),
    "dilated Conv2D": (layers.Conv2D(6, 3, padding="same", dilation_rate=2), (9, 8, 4)),
    "grouped Conv2D": (layers.Conv2D(8, 3, groups=2), (9, 8, 4)),
    "Conv3D": (layers.Conv3D(6, 3, padding="same"), (5, 4, 3, 4)),
    "Conv1DTranspose": (layers.Conv1DTranspose(6, 3, 2, padding="same"), (12, 4)),
    "Conv2DTranspose": (layers.Conv2DTranspose(6, 3, 2), (5, 6, 4)),
    "Conv3DTranspose": (layers.Conv3DTranspose(6, 3, 2, padding="same"), (3, 4, 3, 4)),
    "Dense": (layers.Dense(6), (4,)),
    "Dense over an image": (layers.Dense(6), (3, 5, 4)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Let the times be kept in a folder of the test; returns the folder."""
    monkeypatch.setenv("FCNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def needs(engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")


def site_of(layer, shape):
    model = keras.Sequential([keras.Input(shape), keras_graph.copy_layer(layer)])
    (site,) = find_sites(model).values()
    return site


def conv(channels=192, filters=192, size=8):
    return site_of(layers.Conv2D(filters, 3, padding="same"), (size, size, channels))


def methods_for(site):
    """Return the methods with chains in place of a layer, with small ranks."""
    found = {}
    for method in METHODS:
        site.obstacle = ""
        site.offer([method])
        if not site.obstacle:
            found[method] = (2,) * len(method.max_ranks(site.kernel_shape))
    return found


def fake_times(monkeypatch, seconds):
    """Let a function of a piece stand for the engine; returns the list of pieces that are measured."""
    measured = []

    def measure(self, pieces):
        measured.extend(pieces)
        return {piece: [seconds(piece)] * 2 for piece in pieces}

    monkeypatch.setattr(Clock, "_measure", measure)
    return measured


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_macs_of_the_layers(kind):
    site = site_of(*KINDS[kind])
    assert sum(piece.macs for piece in pieces_of(site)) == site.macs
    methods = methods_for(site)
    assert methods
    for method, ranks in methods.items():
        pieces = pieces_of(site, method, ranks)
        assert len(pieces) == len(method.chain(site.kernel_shape, ranks))
        block = site.kind.block(site.input_shape, method.chain(site.kernel_shape, ranks), use_bias=True)
        counted = cost.total_costs(block)["macs"] if site.kind.axes else site.macs_at(method, ranks)
        assert sum(piece.macs for piece in pieces) == counted


def test_every_call_of_a_layer_counts():
    x, shared = keras.Input((8, 8, 4)), layers.Conv2D(4, 3, 2, padding="same", name="shared")
    (site,) = find_sites(keras.Model(x, shared(shared(x)))).values()
    assert [piece.size for piece in pieces_of(site)] == [(8, 8), (4, 4)]
    assert [piece.size for piece in pieces_of(site, SVD, (2,))] == [(8, 8), (4, 4), (4, 4), (2, 2)]


def test_images_of_any_size_are_refused():
    with pytest.raises(ValueError, match="'conv' can't be measured, since its input has no fixed size"):
        pieces_of(site_of(layers.Conv2D(4, 3, name="conv"), (None, None, 4)))


# --- the small models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_every_piece_runs_in_every_engine(engine):
    needs(engine)
    pieces = set()
    for layer, shape in KINDS.values():
        site = site_of(layer, shape)
        pieces |= set(pieces_of(site))
        if engine == "onnxruntime":  # it loads models fastest
            pieces |= {piece for method, ranks in methods_for(site).items() for piece in pieces_of(site, method, ranks)}
    for piece in pieces:
        for empty in (False, True):
            _small_models.start(engine, piece, 2, 3, 1, empty=empty)()


@pytest.mark.parametrize("kind", ["Conv2D", "strided Conv2D", "grouped Conv2D", "Conv2DTranspose"])
def test_onnx_model_computes_what_keras_computes(kind):
    """The layer of the small model has the size, strides, zeros and groups of the Keras layer."""
    needs("onnxruntime")
    import onnx
    import onnxruntime

    layer, shape = KINDS[kind]
    site = site_of(layer, shape)
    (piece,) = pieces_of(site)
    model = onnx.load_from_string(_small_models._onnx_model(piece, 1, 1, (2, shape[-1], *shape[:-1])))
    entered, node = (model.graph.node[number].output[0] for number in (0, 1))
    model.graph.output.extend([onnx.ValueInfoProto(name=name) for name in (entered, node)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, shape[-1], *shape[:-1])).astype("float32")
    reads, written = session.run([entered, node], {"x": x})
    kernel, bias = (onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer[2:4])
    site.layer.set_weights([np.moveaxis(kernel, (0, 1), (-1, -2)), bias])
    expected = keras.ops.convert_to_numpy(site.layer(np.moveaxis(reads, 1, -1)))
    np.testing.assert_allclose(np.moveaxis(written, 1, -1), expected, atol=1e-5)


# --- estimates -------------------------------------------------------------------------------------------------------


def test_times_between_measured_ranks_follow_a_table_made_by_hand(monkeypatch):
    """Every piece takes 5 µs, and 1 ns per channel read, 2 ns per channel written, and 0.25 ns for each product."""
    needs("onnxruntime")

    def seconds(piece):
        return 5e-6 + 1e-9 * piece.reads + 2e-9 * piece.writes + 2.5e-10 * piece.reads * piece.writes

    site, clock = conv(), Clock("onnxruntime")
    measured = fake_times(monkeypatch, seconds)
    clock.measure([(site, SpatialSVD, (rank,)) for rank in (32, 64, 128)])
    assert len(measured) == 6
    # R = 96, between two measured ranks: 3×1 from 192 to 96, then 1×3 from 96 to 192
    assert clock.seconds(site, SpatialSVD, (96,)) == pytest.approx(
        10e-6 + 3e-9 * (192 + 96) + 5e-10 * 192 * 96, rel=1e-3
    )
    assert len(measured) == 6


def test_times_of_two_ranks_are_interpolated_in_both(monkeypatch):
    needs("openvino")
    site, clock = conv(), Clock("openvino")
    fake_times(monkeypatch, lambda piece: 1e-6 + 1e-9 * piece.reads * piece.writes)
    clock.measure([(site, Tucker2, ranks) for ranks in ((16, 16), (16, 64), (64, 16), (64, 64))])
    expected = 3e-6 + 1e-9 * (192 * 32 + 32 * 48 + 48 * 192)
    assert clock.seconds(site, Tucker2, (32, 48)) == pytest.approx(expected, rel=1e-3)


def test_measured_times_stay_as_measured(monkeypatch):
    """A time off the line, which no smooth formula has, is given back; between the ranks it is felt in part."""
    needs("onnxruntime")
    site, clock = conv(), Clock("onnxruntime")
    fake_times(monkeypatch, lambda piece: 3e-6 if 64 in (piece.reads, piece.writes) else 1e-6)
    found = clock.measure([(site, CP, (rank,)) for rank in (32, 64, 128)])
    assert found == pytest.approx([3e-6, 9e-6, 3e-6])
    assert 3e-6 < clock.seconds(site, CP, (48,)) < 9e-6


def test_ranks_count_as_whole_blocks_of_channels(monkeypatch):
    needs("onnxruntime")
    site, clock = conv(), Clock("onnxruntime")
    fake_times(monkeypatch, lambda piece: 1e-9 * piece.reads * piece.writes)
    clock.measure([(site, SVD, (rank,)) for rank in (16, 48, 96)])
    assert clock.seconds(site, SVD, (65,)) == clock.seconds(site, SVD, (80,)) > clock.seconds(site, SVD, (64,))


def test_nothing_is_estimated_from_other_layers(monkeypatch):
    needs("onnxruntime")
    clock = Clock("onnxruntime")
    fake_times(monkeypatch, lambda piece: 1e-6)
    clock.measure([(conv(size=8), SVD, (16,))])
    with pytest.raises(ValueError, match="nothing alike has a time yet"):
        clock.seconds(conv(size=16), SVD, (16,))
    with pytest.raises(ValueError, match="nothing alike has a time yet"):
        clock.seconds(conv(size=8), SpatialSVD, (16,))


def test_weights_that_no_cache_holds_take_time_in_proportion(monkeypatch):
    needs("onnxruntime")
    fake_times(monkeypatch, lambda piece: 1e-6)
    monkeypatch.setattr(_clock, "_last_cache", lambda: 2**20)
    monkeypatch.setattr(Clock, "_measure_stream", lambda self: 1e-6 + 1e-9 * 2**20)  # 1 ns more per weight
    site = conv(16, 16)
    (small,) = Clock("onnxruntime", weight_bytes=2**18).measure([(site, None, None)])
    (large,) = Clock("onnxruntime", weight_bytes=2**23).measure([(site, None, None)])
    assert small == pytest.approx(1e-6) and large - small == pytest.approx(1e-9 * 9 * 16 * 16)


@pytest.mark.parametrize("method, low, high", [(SVD, 8, 192), (CP, (30,), (500,)), (Tucker2, (10, 20), (150, 192))])
def test_ladder_has_few_ranks_that_engines_like(method, low, high):
    needs("onnxruntime")
    site = conv()
    ladder = Clock("onnxruntime").ladder(site, method, low, high)
    assert 3 <= len(ladder) <= 5 and len(set(ladder)) == len(ladder)
    assert ladder == [method.check_ranks(site.kernel_shape, ranks) for ranks in ladder]
    assert all(rank % 16 == 0 for ranks in ladder for rank in ranks)
    first, last = np.array(ladder[0]), np.array(ladder[-1])
    assert np.all(abs(first - low) <= 8) and np.all(abs(last - high) <= 8)


def test_ladder_of_a_narrow_layer_is_its_largest_rank():
    needs("onnxruntime")
    assert Clock("onnxruntime").ladder(conv(8, 8), SVD, 2, 8) == [(8,)]


# --- the file --------------------------------------------------------------------------------------------------------


def test_measured_times_are_kept(monkeypatch, cache):
    needs("onnxruntime")
    measured, site = fake_times(monkeypatch, lambda piece: 1e-6 * piece.reads), conv()
    first = Clock("onnxruntime", 2, 1)
    found = first.measure([(site, None, None), (site, Tucker2, (16, 32))])
    assert len(measured) == 4 and first.path.parent == cache
    again = Clock("onnxruntime", 2, 1)
    assert again.measure([(site, None, None), (site, Tucker2, (16, 32))]) == found and len(measured) == 4
    Clock("onnxruntime", 4, 1).measure([(site, None, None)])  # another batch has times of its own
    assert len(measured) == 5 and len(list(cache.iterdir())) == 2


def test_two_processes_add_to_the_same_file(monkeypatch):
    needs("onnxruntime")
    measured, site = fake_times(monkeypatch, lambda piece: 1e-6), conv()
    one, other = Clock("onnxruntime"), Clock("onnxruntime")
    one.measure([(site, SVD, (16,))])
    other.measure([(site, SVD, (32,))])
    third = Clock("onnxruntime")
    third.measure([(site, SVD, (16,)), (site, SVD, (32,))])
    assert len(measured) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace("e-06", 'e-06, "nonsense": 1'),
        lambda text: json.dumps(json.loads(text) | {"seconds": {"[1]": -1}}),
        lambda text: json.dumps(json.loads(text) | {"seconds": {"[1]": 1}}),
        lambda text: "\x00\xff",
    ],
)
def test_damaged_file_is_measured_again(monkeypatch, change):
    needs("onnxruntime")
    measured, site = fake_times(monkeypatch, lambda piece: 1.5e-6), conv()
    clock = Clock("onnxruntime")
    clock.measure([(site, None, None)])
    clock.path.write_text(change(clock.path.read_text()), encoding="latin-1")
    with pytest.warns(UserWarning, match="damaged or cannot be read: the times are measured again"):
        again = Clock("onnxruntime")
    assert again.measure([(site, None, None)]) == [1.5e-6] and len(measured) == 2
    assert Clock("onnxruntime").measure([(site, None, None)]) == [1.5e-6] and len(measured) == 2


def test_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    needs("onnxruntime")
    fake_times(monkeypatch, lambda piece: 1e-6)
    (tmp_path / "file").touch()
    clock = Clock("onnxruntime", cache=tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="the measured times are not kept: cannot write"):
        assert clock.measure([(conv(), None, None)]) == [1e-6]


def test_folder_is_that_of_the_user(monkeypatch, tmp_path):
    assert _clock.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FCNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _clock.cache_folder() == tmp_path / "xdg" / "fcnn-utils"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _clock.cache_folder() == tmp_path / ".cache" / "fcnn-utils"


def test_bad_arguments_are_rejected():
    with pytest.raises(ValueError, match="must be one of onnxruntime, openvino, litert; got 'keras'"):
        Clock("keras")
    needs("onnxruntime")
    with pytest.raises(ValueError, match="batch must be a whole number"):
        Clock("onnxruntime", 0)
    with pytest.raises(ValueError, match="threads must be a whole number"):
        Clock("onnxruntime", 1, 0)


# --- with an engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_times_grow_with_the_work(engine):
    """64 times the multiplications take at least 5 times as long, even on a busy machine."""
    needs(engine)
    large, small = (site_of(layers.Conv2D(n, 3, padding="same"), (24, 24, n)) for n in (128, 16))
    short, long = Clock(engine, threads=1).measure([(small, None, None), (large, None, None)])
    assert 0 < 5 * short < long


def test_piece_that_an_engine_cannot_run_is_named(monkeypatch):
    needs("onnxruntime")

    def fail(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(_small_models, "start", fail)
    with pytest.raises(ValueError, match="ONNX Runtime cannot run a layer that must be timed, Piece.*no such kernel"):
        Clock("onnxruntime").measure([(conv(), None, None)])


def test_disturbed_measurement_warns(monkeypatch):
    needs("onnxruntime")
    monkeypatch.setattr(Clock, "_measure", lambda self, pieces: {piece: [1e-3, 2e-3] for piece in pieces})
    with pytest.warns(UserWarning, match="1 of 1 measured times vary by more than 10%"):
        Clock("onnxruntime").measure([(conv(), None, None)])


def test_piece_is_measured_until_two_times_agree(monkeypatch):
    needs("onnxruntime")
    taken = iter([5e-3, 2e-3, 9e-3, 2.1e-3])
    monkeypatch.setattr(Clock, "_start", lambda self, piece, copies, empty=False: empty)
    monkeypatch.setattr(
        _clock, "_least_times", lambda runs: {name: 1e-3 if run else 1e-3 + next(taken) for name, run in runs.items()}
    )
    piece = Piece((64, 64), 64, 64, 1, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))  # so heavy that it is not copied
    times = Clock("onnxruntime")._measure([piece])[piece]
    assert times == pytest.approx([5e-3, 2e-3, 9e-3, 2.1e-3])


@pytest.mark.bench
@pytest.mark.parametrize("batch", [1, 16])
def test_times_of_layers_add_up_to_that_of_the_network(batch):
    """Dense network's time, minus its layers, plus the chains: the factorized network's time, within 20%."""
    needs("onnxruntime")
    x = inputs = keras.Input((32, 32, 64))
    for filters in (64, 128, 128):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    sites, clock, models = find_sites(model), Clock("onnxruntime", batch), {"dense": model}
    plans = {CP: (48,), Tucker2: (48, 48), SpatialSVD: (48,), SVD: (32,)}
    for method, ranks in plans.items():
        taken = keras_graph.operation_names(model)
        chains = {}
        for site in sites.values():
            block = site.kind.block(site.input_shape, method.chain(site.kernel_shape, ranks), use_bias=True)
            chains[id(site.layer)] = [site._copy(part, taken, part is block.layers[-1]) for part in block.layers[1:]]
        models[method.name] = keras_graph.rebuild(model, chains)
    table = benchmark.latency(models, batch, "onnxruntime").set_index("model")["low_ms"]
    requests = [(site, method, ranks) for method, ranks in plans.items() for site in sites.values()]
    clock.measure([*requests, *((site, None, None) for site in sites.values())])
    for method, ranks in plans.items():
        saved = sum(clock.seconds(site) - clock.seconds(site, method, ranks) for site in sites.values())
        assert table["dense"] - 1e3 * saved == pytest.approx(table[method.name], rel=0.2), method.name
