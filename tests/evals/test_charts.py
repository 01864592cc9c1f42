"""The chart of training losses."""

import numpy as np

from engine.evals.charts import losses


def test_of_one_course_every_loss_is_shown_under_the_running_mean():
    course = np.arange(40, 0, -1).tolist()
    loss, looks = losses({"loss": course}, {20: 0.25, 40: 0.5}).axes
    every, mean = loss.lines
    assert every.get_ydata().tolist() == course
    assert mean.get_xdata().tolist() == list(range(2, 41))
    np.testing.assert_allclose(mean.get_ydata(), np.array(course[1:]) + 0.5)
    assert looks.lines[0].get_xydata().tolist() == [[20, 25], [40, 50]]


def test_several_courses_are_told_apart_by_name_and_a_short_one_is_shown_as_it_is():
    (axes,) = losses({"1%": [3.0, 2.0], "10%": [1.0] * 60}).axes
    assert [line.get_label() for line in axes.lines] == ["1%", "10%"]
    assert axes.lines[0].get_ydata().tolist() == [3.0, 2.0] and len(axes.lines[1].get_ydata()) == 58
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1%", "10%"]
