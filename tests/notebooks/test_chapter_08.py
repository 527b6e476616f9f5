"""Chapter 08, the simple network: the numbers in its text, and its exercises."""

import numpy as np

CHAPTER = "08"
WRONG = {
    "08.1": [[5308416, 84934656], [2592, 165888], [2654208, 10616832], [2654208 * 4, 42467328], 2654208],
    "08.2": [
        lambda rows, side, channels: sum(side**2 * size**2 * filters for _, filters, size, _ in rows),
        lambda rows, side, channels: 282279936,
        lambda rows, side, channels: 409_681_920 if side == 32 else 0,  # with the pixels before the strides
    ],
    "08.3": [[4.12, 15.97], [0.0208, 0.0833], [0.16, 0.04], 0.04],
}


def test_network_by_hand_and_by_the_library_agree(chapter):
    assert chapter["difference"].max() < 1e-6
    assert chapter["one_block"].layers[1].count_params() == 3 * 3 * 3 * 96 + 96
    assert chapter["one_block"].layers[2].count_params() == 4 * 96


def test_all_rows_are_those_of_the_thesis(chapter):
    assert len(chapter["compared"]) == 29 and chapter["compared"]["equal"].all()
    assert chapter["theirs"] == (1_392_500, 1_389_804, 2_696)
    assert (chapter["ours"]["params"], chapter["ours"]["trainable"]) == chapter["theirs"][:2]
    assert chapter["ours"]["macs"] == 282_279_936 and "282 million MACs" in chapter.text
    assert 4 * chapter["ours"]["params"] / 1e6 == 5.57  # "5.6 MB"


def test_costs_rank_the_layers_differently(chapter):
    convs = chapter["convs"].set_index("layer")
    macs, params = convs["macs"], convs["params"]
    assert macs["conv2"] == macs["conv5"] == 4 * macs["conv7"] == macs.max()
    assert params["conv5"] == params["conv7"] == params.max()
    assert np.isclose(params["conv5"] / params["conv2"], 4, rtol=1e-3)
    assert round(100 * macs[["conv2", "conv5"]].sum() / macs.sum()) == 60
    share = chapter["share"]
    assert share.idxmax().to_dict() == {"activation_bytes": "32×32", "macs": "16×16", "params": "8×8"}
    assert (share.max() > 0.5).all()  # "most of"


def test_simple_ways_to_save(chapter):
    relative = chapter["relative"].astype(float) / {name: chapter["ours"][name] for name in chapter["relative"]}
    assert relative["macs"].between(0.45, 0.56).all()
    assert (relative["params"] < 0.6).tolist() == [True, False, False]


def test_exercises(check_exercises):
    check_exercises(WRONG)
