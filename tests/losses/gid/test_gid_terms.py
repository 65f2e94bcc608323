"""The feature and the relation term: against the naive version, by hand, and what they ignore."""

import naive_gid as naive
import pytest
import torch
from gid_case import close

from distill_d2.losses.gid.terms import feature_term, relation_term

FEATURE = [("L2", 0.0), ("L1", 0.0), ("L1", 0.5), ("norm", 0.0)]
SCOPES = ["batch", "image"]
CORNERS = torch.tensor([[0.0, 0], [3, 0], [0, 4]])  # distances 3, 4, 5
EVEN = torch.tensor([[0.0, 0], [2, 0], [1, 3**0.5]])


def pooled(*shape, seed=0):
    """Student (a leaf) and teacher (N, K, C, H, W), and the images' numbers of instances."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator)
    return student.requires_grad_(), teacher


def mask(counts, slots):
    """The first slots of each image are filled, as GeneralInstances has them."""
    return torch.arange(slots) < torch.tensor(counts)[:, None]


def scattered(counts, slots, seed=0):
    """As many slots, anywhere: as a mode leaves them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(counts), slots, generator=generator).argsort(dim=1)
    return mask(counts, slots).gather(1, order)


def term(name, *features, **settings):
    return {"feature": feature_term, "relation": relation_term}[name](*features, **settings)


def compare(name, student, teacher, valid, **settings):
    """With the naive term in float64; the gradient of the student's features too."""
    found = term(name, student, teacher, valid, **settings)
    leaf = student.detach().double().requires_grad_()
    images = () if name == "feature" else (valid.nonzero()[:, 0],)
    function = naive.feature_loss if name == "feature" else naive.relation_loss
    expected = function(teacher.double()[valid], leaf[valid], *images, **settings)
    close(found, expected, name)
    close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((found, student), (expected, leaf))), name)


COUNTS = {
    "some": (3, 5, 4),
    "all": (6, 6, 6),
    "an image without": (4, 0, 5),
    "two and one": (2, 1, 0),
    "one": (0, 1, 0),
    "three": (1, 1, 1),
    "none": (0, 0, 0),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("mode, beta", FEATURE)
def test_naive_feature_term(mode, beta, counts):
    student, teacher = pooled(3, 6, 4, 3, 2)
    compare("feature", student, teacher, scattered(counts, 6), mode=mode, beta=beta)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_naive_relation_term(beta, scope, counts):
    student, teacher = pooled(3, 6, 4, 3, 2)
    compare("relation", student, teacher, scattered(counts, 6), beta=beta, scope=scope)


def test_relation_of_real_sizes():
    """Distances in 25600 dimensions, of features that have something in common."""
    student, teacher = pooled(2, 10, 256, 10, 10)
    student = (student + 1).detach().requires_grad_()
    compare("relation", student, teacher + 1, mask((10, 7), 10))


# By hand


def points(*groups):
    """(N, K, 2, 1, 1) of N lists of K points."""
    return torch.stack(groups)[..., None, None]


def test_relation_of_three_points():
    """3/4, 1 and 5/4 against 1: two differences of 1/4 in three pairs."""
    valid = mask((3,), 3)
    for student in (EVEN, 7 * EVEN + 1):
        loss = relation_term(points(student), points(CORNERS), valid)
        assert loss.item() == pytest.approx(2 / 3 * 0.25**2 / 2)
    loss = relation_term(points(EVEN), points(CORNERS), valid, beta=0.0)
    assert loss.item() == pytest.approx(1 / 6)


EVERY = [("feature", {"mode": m, "beta": b}) for m, b in FEATURE]
EVERY += [("relation", {"scope": scope, "beta": beta}) for scope in SCOPES for beta in (0.0, 1.0)]


@pytest.mark.parametrize("name, settings", EVERY, ids=str)
def test_equal_features_have_no_loss(name, settings):
    student, _ = pooled(2, 5, 3, 2, 2)
    loss = term(name, student, student.detach().clone(), mask((5, 4), 5), **settings)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("name, settings", EVERY, ids=str)
def test_empty_slots_do_not_count(name, settings):
    """Whatever is in them; they get no gradient."""
    student, teacher = pooled(2, 5, 3, 2, 2)
    valid = scattered((4, 3), 5)
    loss = term(name, student, teacher, valid, **settings)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[valid].flatten(1).any(dim=1).all() and not gradient[~valid].any()
    with torch.no_grad():
        student[~valid], teacher[~valid] = 100.0, -100.0
    other = term(name, student, teacher, valid, **settings)
    torch.testing.assert_close(other, loss)


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_instances_have_finite_gradients(scope):
    """Distances of 0, in the student, in the teacher, and in both."""
    for same in ((0,), (1,), (0, 1)):
        features = pooled(1, 4, 3, 2, 2)
        with torch.no_grad():
            for index in same:
                features[index][0, 1:3] = features[index][0, 0]
        loss = relation_term(*features, mask((4,), 4), scope=scope)
        (gradient,) = torch.autograd.grad(loss, features[0])
        assert loss.isfinite() and gradient.isfinite().all()
    student = torch.ones(1, 4, 3, 2, 2, requires_grad=True)
    loss = relation_term(student, features[1], mask((4,), 4), scope=scope)
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()
