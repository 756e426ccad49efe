import numpy as np
from PIL import Image

from simla_ray.config.schema import Augment, Data
from simla_ray.data.augment import evaluation_view, to_array, training_view

RNG = np.random.default_rng


def gradient(px=64):
    x = np.linspace(0, 255, px, dtype=np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(x[None, :], x[:, None], np.uint8(90)), -1).astype(np.uint8))


def test_same_generator_same_view():
    a = training_view(gradient(), 32, Data(), True, RNG(5))
    b = training_view(gradient(), 32, Data(), True, RNG(5))
    assert np.array_equal(to_array(a.image), to_array(b.image))
    assert a.flipped == b.flipped
    assert to_array(a.image).shape == (3, 32, 32)


def test_flip_only_where_allowed_and_half_of_the_time():
    data = Data(augment=Augment.crop, crop_scale_min=1.0)
    flips = [training_view(gradient(), 32, data, True, RNG(i)).flipped for i in range(300)]
    assert 0.4 < np.mean(flips) < 0.6
    assert not any(training_view(gradient(), 32, data, False, RNG(i)).flipped for i in range(50))
    i = flips.index(True)
    red = to_array(training_view(gradient(), 32, data, True, RNG(i)).image)[0].mean(0)
    assert red[0] > red[-1]  # the gradient runs the other way


def test_plain_view_shares_geometry_but_not_colour():
    data = Data(augment=Augment.full, augment_p=1.0, augment_ops=4)
    differing = 0
    for i in range(60):
        view = training_view(gradient(), 32, data, True, RNG(i))
        differing += not np.array_equal(to_array(view.image), to_array(view.plain))
    assert differing > 20
    geometric = Data(augment=Augment.geometric, augment_p=1.0, augment_ops=4)
    for i in range(20):
        view = training_view(gradient(), 32, geometric, True, RNG(i))
        assert np.array_equal(to_array(view.image), to_array(view.plain))


def test_crop_keeps_at_least_its_share():
    """On a horizontal gradient the span of a crop shows its width."""
    data = Data(augment=Augment.crop, crop_scale_min=0.25)
    spans = []
    for i in range(100):
        red = to_array(training_view(gradient(), 32, data, False, RNG(i)).image)[0].astype(int)
        spans.append((red.max() - red.min()) / 255)
    assert min(spans) > 0.35  # a quarter of the area at aspect 3/4 is 0.43 of the width
    assert min(spans) < 0.7


def test_evaluation_view_ignores_the_aspect():
    assert evaluation_view(Image.new("RGB", (100, 20)), 48).size == (48, 48)
