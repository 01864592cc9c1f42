"""Pictures of segmentation: colours, bars and components show what they are given."""

import numpy as np
from matplotlib.colors import to_hex

from engine.evals import label_maps

CLASSES = ("background", "cat", "dog")


def test_classes_have_colours_of_their_own_and_void_is_white():
    for count in (3, 20, 171):
        names = ("background", *(str(label) for label in range(count - 1)))
        table = label_maps.colours(names)(np.arange(256, dtype=np.uint8))
        assert len({to_hex(colour, keep_alpha=True) for colour in table[:count]}) == count
        assert (table[255] == 1).all() and (table[0, :3] < 0.2).all()


def test_images_stand_beside_their_label_maps():
    image, truth = np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 255, np.uint8)
    truth[2:4] = 2
    rows = [{"image": image, "truth": truth, "k-NN": np.zeros((6, 8), np.uint8)}] * 2
    figure = label_maps.beside(rows, CLASSES)
    assert len(figure.axes) == 6 and [axes.get_title() for axes in figure.axes[:3]] == ["image", "truth", "k-NN"]
    shown = figure.axes[1].images[0].get_array()
    assert to_hex(shown[2, 0]) == to_hex(label_maps.colours(CLASSES)(2)) and to_hex(shown[0, 0]) == "#ffffff"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["background", "dog"]


def test_bars_are_of_the_classes_that_occur_and_of_many_those_with_most_pixels():
    one = label_maps.iou_bars({"k-NN": np.array([0.5, np.nan, 0.25])}, np.array([9, 0, 1]), CLASSES).axes[0]
    assert [label.get_text() for label in one.get_yticklabels()] == ["background", "dog"]
    assert [bar.get_width() for bar in one.patches] == [50, 25]
    many = label_maps.iou_bars(
        {"a": np.full(60, 0.5), "b": np.full(60, 0.25)}, np.arange(60), tuple(map(str, range(60)))
    )
    assert [label.get_text() for label in many.axes[0].get_yticklabels()] == [str(k) for k in range(20, 60)]
    assert len(many.axes[0].patches) == 80


def test_components_tell_patches_apart_and_take_constant_features():
    image, values = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0).normal(size=(4, 4, 7)) * 0.01
    values[:2] += 5
    figure = label_maps.components([image, image], [values, values])
    red = figure.axes[2].images[0].get_array()[..., 0]
    assert abs(red[:2].mean() - red[2:].mean()) > 0.8
    flat = label_maps.components([image], [np.ones((4, 4, 7))]).axes[1].images[0].get_array()
    assert not np.isnan(flat).any()
