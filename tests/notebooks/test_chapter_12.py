"""Chapter 12, how is a recipe found?: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

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
    assert (nearest["optimizer"], nearest["rate"]) == ("sgd", "0.01 inverse_time") and second["optimizer"] == "adam"
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
    clear = chapter["search"][chapter["search"]["difference"].abs() > 1.2].set_index("change")["difference"]
    assert sorted(clear.index) == ["head scale 3.0", "head scale 6.0", "kernels glorot", "rate 0.05", "rate 0.2"]
    assert (clear > 0).tolist() == [False, True, True, True, True]


def test_noise(chapter):
    assert len(chapter["seeds"]) == 5 and chapter["seeds"].std() == pytest.approx(0.41, abs=0.005)
    assert len(chapter["small"]) == 8 and np.sqrt(np.mean(chapter["small"] ** 2)) < 0.6
    assert 100 * np.sqrt(0.5 * 0.5 / 5000) == pytest.approx(0.7, abs=0.01)


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
    assert chapter["gain"] == pytest.approx(0.4 * 1.965, abs=0.02)  # the mean of the largest of 25 normal numbers
    assert abs(chapter["again"].mean() - 50) < 0.02
    needed = chapter["needed"].set_index("seeds")
    assert round(needed.loc[5, "± points"], 1) == 0.6 and needed.iloc[0, -1] == "0.4 to 31.9"


def test_exercises(check_exercises):
    check_exercises(WRONG)
