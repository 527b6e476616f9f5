"""Chapter 12, how is a recipe found?: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import records

CHAPTER = "12"
WRONG = {
    "12.1": [0.0049, 0.69, [0.49]],
    "12.2": [
        lambda first, second: (np.mean(first - second), 0.0, 1.0),
        lambda first, second: np.mean(first - second),
        lambda first, second: (np.mean(second - first), 0.0, 1.0),
        lambda first, second: (
            np.mean(first - second),
            *(
                np.mean(first - second) + side * 1.96 * np.std(first - second, ddof=1) / len(first) ** 0.5
                for side in (-1, 1)
            ),
        ),
    ],
    "12.3": [lambda k, rng: rng.normal(size=k).max(), lambda k, rng: np.sqrt(2 * np.log(k))],
    "12.4": [16, 31, 8],
}


def test_candidates_are_validated_runs_on_45000_images(chapter):
    runs, is_candidate = chapter["runs"], chapter["is_candidate"]
    chosen = runs[is_candidate]["record"]
    assert len(chosen) == len(chapter["candidates"]) == 7
    assert {(record["train_images"], record["seed"], len(record["epochs"])) for record in chosen} == {(45_000, 0, 5)}
    assert all(record["test"] is None for record in chosen) and len({record["device"] for record in chosen}) == 1


def test_nearest_candidate_and_the_shape(chapter):
    table = chapter["candidates"].set_index(["optimizer", "shift"])
    nearest, second = chapter["candidates"].iloc[0], chapter["candidates"].iloc[1]
    assert (nearest["optimizer"], nearest["rate"]) == ("sgd", "0.01 inverse time") and second["optimizer"] == "adam"
    assert second["distance"] - nearest["distance"] < 0.01
    thesis_fall = chapter["fall"](chapter["target"]["loss"])
    closeness = (table["fall, 5th / 2nd"] - thesis_fall).abs()
    assert round(thesis_fall, 2) == 0.32 and closeness.idxmin()[0] == "rmsprop"
    constant = table[table["rate"].isin(["0.01 constant", "0.03 constant"])]
    assert (constant["fall, 5th / 2nd"] > 0.5).all()


def test_recipe_predicts_the_other_networks_within_three_points(chapter):
    difference = chapter["reproduced"]["difference"]
    assert len(difference) == 3 and difference.abs().between(0.7, 3).all()
    assert (difference > 0).any() and (difference < 0).any()


def test_search_is_around_the_pivot_on_one_machine(chapter):
    five = chapter["five"]
    assert len({(record["device"], record["precision"]) for record in five["record"]}) == 1
    assert set(five["seed"]) == {0} and round(chapter["pivot"], 2) == 48.56
    settings = five.set_index("change")["record"][""]["recipe"]
    assert chapter["PIVOT"].items() <= settings.items() and settings["optimizer"] == "sgd"
    clear = chapter["search"].set_index("change")["difference"]
    clear = clear[clear.abs() > chapter["band"]]
    names = ["head scale 1.0 → 6.0", "kernels he → glorot", "rate 0.1 → 0.05", "rate 0.1 → 0.2"]
    assert sorted(clear.index) == names and (clear > 0).tolist() == [False, True, True, True]


def test_noise(chapter):
    repeated = chapter["repeated"]
    assert len(repeated) >= 17 and set(repeated["count"]) <= {2, 3, 4, 5}
    variances = [
        np.var(100 * np.array([records.result(run)[1]["top1"] for run in rows["record"]]), ddof=1)
        for name, rows in chapter["runs"][chapter["runs"]["epochs"] == 5].groupby(["model", "recipe"])
        if len(rows) > 1
    ]
    pooled = np.average(variances, weights=repeated["count"] - 1) ** 0.5
    assert pooled == pytest.approx(chapter["noise"]) and 0.45 < pooled < 0.55 and 1.35 < chapter["band"] < 1.55
    assert chapter["own"]["std"] == pytest.approx(1.11, abs=0.005) and chapter["own"]["count"] == 3
    assert 100 * np.sqrt(0.5 * 0.5 / 5000) == pytest.approx(0.7, abs=0.01)


def test_combination_is_better_on_all_three_networks(chapter):
    gain = chapter["confirmed"]["mean"]["faster"] - chapter["confirmed"]["mean"]["fast"]
    assert len(gain) == 3 and gain.between(2.5, 4.15).all()


def test_muon_against_sgd(chapter):
    muon = chapter["muon"].set_index("optimizer")["validation (%)"]
    best = muon["muon"].sort_values(ascending=False)
    assert 7 < best.iloc[0] - muon["sgd"] < 7.5 and best.iloc[0] - best.iloc[4] < 0.7
    rate = chapter["muon"][(chapter["muon"]["learning_rate"] == 0.24) & (chapter["muon"]["momentum"] <= 0.9)]
    low, high = rate.groupby("momentum")["validation (%)"].mean()
    assert 2 < high - low < 3
    chosen = chapter["muon"].loc[chapter["muon"]["validation (%)"].idxmax()]
    assert chosen["weight_decay"] == 0


def test_winners_curse_and_seeds(chapter):
    assert chapter["gain"] == pytest.approx(0.5 * 1.668, abs=0.02)  # the mean of the largest of 13 normal numbers
    assert abs(chapter["again"].mean() - 50) < 0.02
    needed = chapter["needed"].set_index("seeds")
    assert round(needed.loc[5, "± points"], 1) == 0.7 and needed.iloc[0, -1] == "0.4 to 31.9"


def test_exercises(check_exercises):
    check_exercises(WRONG)
