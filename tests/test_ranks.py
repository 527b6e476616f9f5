"""Ranks: which are possible, what they cost (against the built blocks), which are chosen."""

import numpy as np
import pytest

from fcnn_utils import blocks, cost, ranks

SHAPES = [(3, 3, 16, 32), (5, 3, 8, 4), (1, 1, 6, 9), (2, 2, 3, 64)]
SOME = {"cp": 5, "cp4": 5, "tucker": (4, 3), "tt": (3, 4, 2), "spatial": 5, "separable": 2}

# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_up_to_the_maximum_and_no_others(method, shape):
    largest = ranks.maximum(method, shape)
    assert ranks.check(method, shape, largest) == largest
    for wrong in (0, -1, largest[0] + 1, 1.5, True, "1", None, float("nan")):
        with pytest.raises(ValueError, match="whole number between 1 and|rank"):
            ranks.check(method, shape, (wrong, *largest[1:]))


def test_whole_numbers_of_numpy_are_ranks():
    assert ranks.check("cp", (3, 3, 16, 32), np.int64(4)) == (4,)


@pytest.mark.parametrize(("method", "given"), [("cp", (3, 4)), ("tucker", 3), ("tt", (1, 2)), ("tucker", (1, 2, 3))])
def test_number_of_ranks(method, given):
    with pytest.raises(ValueError, match="rank"):
        ranks.check(method, (3, 3, 16, 32), given)


@pytest.mark.parametrize(("method", "given"), [("tucker", (1, 10)), ("tt", (1, 4, 8)), ("tt", (16, 2, 32))])
def test_ranks_that_no_chain_has_together(method, given):
    with pytest.raises(ValueError, match="beside"):
        ranks.check(method, (3, 3, 16, 32), given)


@pytest.mark.parametrize("shape", [(3, 3, 16), (3, 3, 16, 0), (3, 3, 16, 32, 1), (3, 3, 1.5, 2)])
def test_shapes_that_no_kernel_has(shape):
    with pytest.raises(ValueError, match="a kernel has the shape"):
        ranks.maximum("cp", shape)


def test_unknown_names():
    with pytest.raises(ValueError, match="method must be one of cp, cp4, tucker"):
        ranks.maximum("svd", (3, 3, 4, 4))
    with pytest.raises(ValueError, match="cost must be one of"):
        ranks.for_fraction("cp", (3, 3, 4, 4), 0.5, cost="time")


@pytest.mark.parametrize("fraction", [0, -0.1, float("nan"), float("inf"), "half", None, True])
def test_fractions_above_zero(fraction):
    with pytest.raises(ValueError, match="fraction must be a number above 0"):
        ranks.for_fraction("cp", (3, 3, 16, 32), fraction)


def test_a_fraction_below_rank_one_is_refused_with_the_smallest_possible():
    with pytest.raises(ValueError, match=r"at least 0.01237, the parameters of cp at rank 1"):
        ranks.for_fraction("cp", (3, 3, 16, 32), 0.01)


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_costs_are_those_of_the_block(method, strides):
    """Counted layer by layer in the built chain, on an image that the strides divide; where the chain has a padding
    layer of its own, but for what the layers behind that see of the border."""
    block = blocks.BLOCKS[method]((80, 120, 8), 6, (3, 5), SOME[method], strides=strides, use_bias=False)
    total = cost.total_costs(block)
    height, width = block.output_shape[1:3]
    padded = any(layer.name.endswith("_pad") for layer in block.layers)
    assert padded == (
        (method == "cp4" and strides != (1, 1)) or (method in ("cp", "separable") and len(set(strides)) > 1)
    )
    assert total["params"] == ranks.parameters(method, (3, 5, 8, 6), SOME[method])
    expected = height * width * ranks.macs(method, (3, 5, 8, 6), SOME[method], strides)
    assert total["macs"] == pytest.approx(expected, rel=0.03) if padded else total["macs"] == expected


def test_published_counts():
    """Lebedev's chain of an (8, 4, 3, 3) kernel at R = 10, its merged form, and Tucker-2 of ranks (5, 2)."""
    assert ranks.parameters("cp4", (3, 3, 8, 4), 10) == 10 * (3 + 3 + 8 + 4) == 180
    assert ranks.parameters("cp", (3, 3, 8, 4), 10) == 10 * (9 + 8 + 4) == 210
    assert ranks.parameters("tucker", (3, 3, 8, 4), (5, 2)) == 8 * 5 + 9 * 5 * 2 + 2 * 4 == 138


def test_macs_of_a_strided_column_and_row():
    """32→64 channels, 5×5, stride 2, 28×28 to 14×14, rank 40."""
    shape = (5, 5, 32, 64)
    assert 14 * 14 * ranks.macs("spatial", shape, 40, (2, 2)) == 5_017_600
    assert 14 * 14 * ranks.dense(shape) == 10_035_200


@pytest.mark.parametrize("cost_of", ["parameters", "macs"])
@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("fraction", [0.15, 0.5, 1.0])
def test_ranks_for_a_fraction_are_the_largest_that_fit(method, fraction, cost_of):
    shape, strides = (3, 3, 48, 96), (2, 2)

    def share(given):
        count = (
            ranks.parameters(method, shape, given)
            if cost_of == "parameters"
            else ranks.macs(method, shape, given, strides)
        )
        return count / ranks.dense(shape)

    largest = ranks.maximum(method, shape)
    found = ranks.for_fraction(method, shape, fraction, cost=cost_of, strides=strides)
    bigger = tuple(min(rank + max(1, high // max(largest)), high) for rank, high in zip(found, largest, strict=True))
    assert share(found) <= fraction
    assert found == largest or share(bigger) > fraction


@pytest.mark.parametrize("shape", [(3, 3, 96, 192), (5, 5, 32, 32), (3, 1, 20, 7)])
def test_break_even_in_closed_form(shape):
    kh, kw, s, t = shape
    area = kh * kw
    assert ranks.break_even("cp", shape) == ((area * s * t - 1) // (area + s + t),)
    assert ranks.break_even("cp4", shape) == ((area * s * t - 1) // (kh + kw + s + t),)
    assert ranks.break_even("spatial", shape) == (min((area * s * t - 1) // (kh * s + kw * t), min(kh * s, kw * t)),)


def test_no_break_even_where_even_rank_one_costs_more():
    with pytest.raises(ValueError, match="fraction must be at least"):
        ranks.break_even("cp", (1, 1, 2, 2))


def test_a_large_fraction_gives_the_exact_ranks():
    assert ranks.for_fraction("tucker", (3, 3, 4, 6), 100) == ranks.maximum("tucker", (3, 3, 4, 6)) == (4, 6)


@pytest.mark.parametrize(("rank", "size"), [(0, (40, 90)), (1, (40, 90)), (5, (60, 60)), (12, (200, 50))])
def test_vbmf_finds_the_rank_under_noise(rank, size):
    rng = np.random.default_rng(rank)
    signal = rng.standard_normal((size[0], rank)) @ rng.standard_normal((rank, size[1]))
    assert ranks.vbmf(signal + 0.3 * rng.standard_normal(size)) == rank


def test_vbmf_without_noise_and_without_anything():
    rng = np.random.default_rng(0)
    assert ranks.vbmf(rng.standard_normal((30, 4)) @ rng.standard_normal((4, 50))) == 4
    assert ranks.vbmf(np.zeros((5, 7))) == 0


def test_vbmf_of_a_kernel_of_noise_gives_a_layer_one_channel():
    rng = np.random.default_rng(0)
    kernel = np.einsum("sa,ijab,tb->ijst", *(rng.standard_normal(n) for n in ((32, 6), (3, 3, 6, 4), (48, 4))))
    kernel *= 1 / kernel.std()
    assert ranks.vbmf_tucker(kernel + 0.3 * rng.standard_normal(kernel.shape)) == (6, 4)
    assert ranks.vbmf_tucker(rng.standard_normal((3, 3, 32, 48))) == (1, 1)
    assert ranks.vbmf_tucker(np.zeros((3, 3, 4, 5))) == (1, 1)


def test_what_vbmf_can_not_read_is_refused():
    for bad in (np.ones(5), np.zeros((0, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="vbmf takes a matrix of finite numbers"):
            ranks.vbmf(bad)
    with pytest.raises(ValueError, match="36 values that are not finite"):
        ranks.vbmf_tucker(np.full((3, 3, 2, 2), np.nan))


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_ranks_in_steps(method, multiple):
    """Multiples of the step or the maximum, the largest within the share, possible together."""
    shape = (3, 3, 96, 192)
    if method == "separable" and multiple > 1:
        return  # at most 9: any step is the maximum
    found = ranks.for_fraction(method, shape, 0.4, multiple=multiple)
    largest = ranks.maximum(method, shape)
    assert all(rank % multiple == 0 or rank == high for rank, high in zip(found, largest, strict=True))
    assert ranks.check(method, shape, found) == found
    assert ranks.parameters(method, shape, found) <= 0.4 * ranks.dense(shape)
    if len(found) == 1:
        assert ranks.parameters(method, shape, found[0] + multiple) > 0.4 * ranks.dense(shape)


def test_a_share_below_the_first_step_says_what_that_is():
    with pytest.raises(ValueError, match="fraction must be at least 0.02865, the parameters of cp at rank 16"):
        ranks.for_fraction("cp", (3, 3, 96, 192), 0.02, multiple=16)
    with pytest.raises(ValueError, match="multiple must be a whole number between 1 and"):
        ranks.for_fraction("cp", (3, 3, 96, 192), 0.2, multiple=0)
