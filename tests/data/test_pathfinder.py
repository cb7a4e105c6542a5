"""Images of dashed paths are drawn by the published law, each from random numbers of its own."""

import numpy as np
import pytest

from infformer.data.pathfinder import DRAWINGS, draw_images


@pytest.fixture(scope="module")
def images():
    return draw_images(32, range(36), seed=0, split=0)


def test_an_image_depends_on_its_number_seed_and_split_alone(images):
    pixels, labels = images
    some, some_labels = draw_images(32, range(30, 33), seed=0, split=0)
    assert np.array_equal(some, pixels[30:33])
    assert np.array_equal(some_labels, labels[30:33])
    for seed, split in ((1, 0), (0, 1)):
        assert not np.array_equal(draw_images(32, range(2), seed, split)[0], pixels[:2])


def test_images_are_as_dark_as_the_published_ones(images):
    """Of their pixels 66 % are 0; each image reaches from 0 to 255, and has nothing at its edges but ends of discs."""
    pixels, labels = images
    assert pixels.shape == (36, 1024)
    assert abs((pixels == 0).mean() - 0.66) < 0.03
    assert (pixels.min(1) == 0).all()
    assert (pixels.max(1) == 255).all()
    assert set(labels.tolist()) == {0, 1}


def test_two_discs_are_in_every_image(images):
    """The only places where all of 3 × 3 pixels have the brightness of a disc, or more."""
    for image in images[0].reshape(-1, 32, 32):
        bright = image >= 0.9 * 255 / DRAWINGS[32].short_contrast
        windows = np.lib.stride_tricks.sliding_window_view(bright, (2, 2)).all(axis=(2, 3))
        assert windows.any()


def test_path_x_is_drawn_too():
    pixels, labels = draw_images(128, range(2), seed=0, split=2)
    assert pixels.shape == (2, 128 * 128)
    assert 0.8 < (pixels == 0).mean() < 0.92
    assert len(labels) == 2
