"""AP on resampled images against COCOeval on datasets with copied images."""

import numpy as np
import pytest
from coco_case import coco, copied, dataset, detections, evaluated

from distill_d2.report.bootstrap import Matches, Metric, bootstrap_gain, image_weights, matches_of

_STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture(scope="module")
def case():
    content = dataset()
    return content, detections(content)


def test_as_coco_computes_it_on_copies(case):
    """Bit for bit but for the order of sums; draws without an object of some class or size among them."""
    weights = np.concatenate([image_weights(8, 5), np.eye(8, dtype=int)[:, :2] * 3], axis=1)
    found = {
        name: matches_of(coco(case[0]), case[1], Metric.named("bbox", name)).ap(weights)
        for name in _STATS
    }
    cat = matches_of(coco(case[0]), case[1], Metric.named("bbox", "AP-cat")).ap(weights)
    for draw, counts in enumerate(weights.T):
        evaluation = evaluated(*copied(*case, counts))
        for name, expected in zip(_STATS, evaluation.stats):
            actual = np.nan_to_num(found[name][draw] / 100, nan=-1.0)
            assert actual == pytest.approx(expected, abs=1e-12), (name, counts)
        of_cats = evaluation.eval["precision"][:, :, 1, 0, -1]
        assert np.nan_to_num(cat[draw] / 100, nan=-1.0) == pytest.approx(of_cats.mean(), abs=1e-12)


def test_weights_are_draws_with_replacement():
    weights = image_weights(50, 400, seed=3)
    assert (weights.sum(axis=0) == 50).all() and (weights == image_weights(50, 400, seed=3)).all()
    assert weights.mean(axis=1) == pytest.approx(1.0, abs=0.25)
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.05)


def test_large_arrays_are_worked_off_in_parts(case, monkeypatch):
    matches, weights = (
        matches_of(coco(case[0]), case[1], Metric.named("bbox", "AP")),
        image_weights(8, 9),
    )
    whole = matches.ap(weights)
    monkeypatch.setattr("distill_d2.report.bootstrap._MOST_NUMBERS", 100)
    assert (matches.ap(weights) == whole).all()


def test_no_detections(case):
    matches = matches_of(coco(case[0]), [], Metric.named("bbox", "AP"))
    assert isinstance(matches, Matches) and (matches.ap(image_weights(8, 4)) == 0).all()


def test_gain_by_hand():
    """Gains -1, 0, ..., 98 of the mean of two seeds: percentiles between neighbors; two are not above 0."""
    baseline = np.linspace(5.0, 50.0, 100)
    gains = np.random.default_rng(0).permutation(np.arange(-1.0, 99.0))
    found = bootstrap_gain([baseline + gains - 3, baseline + gains + 3], [baseline])
    assert (found.low, found.high) == (pytest.approx(1.475), pytest.approx(95.525))
    assert found.p == pytest.approx(2 * 3 / 101)


def test_names_of_metrics():
    assert Metric.named("segm", "AP50-tv-set") == ("segm", 0.5, "all", "tv-set")
    for task, name in (("bbox", "AR"), ("box_proposals", "AP"), ("bbox", "AP60")):
        with pytest.raises(ValueError, match="cannot be computed from stored detections"):
            Metric.named(task, name)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Test sets are drawn from 60 images, whose gain is the truth."""
    content = dataset(images=60)
    runs = [
        matches_of(coco(content), detections(content, noise), Metric.named("bbox", "AP50"))
        for noise in (10.0, 20.0)
    ]
    whole = [run.ap(np.ones((60, 1), int)) for run in runs]
    generator, covered = np.random.default_rng(0), 0
    for _ in range(100):
        test_set = generator.multinomial(60, np.full(60, 1 / 60))
        weights = generator.multinomial(60, test_set / 60, size=100).T
        found = bootstrap_gain([runs[0].ap(weights)], [runs[1].ap(weights)])
        covered += bool(found.low <= (whole[0] - whole[1])[0] <= found.high)
    assert 88 <= covered <= 99
