"""What is told of work that takes long."""

from engine.core import progress


def test_without_a_terminal_it_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.watched(4, "packing") as watch:
        for _ in range(4):
            watch(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" images, ")[0] for line in lines] == [f"packing: {done} of 4" for done in (1, 2, 3, 4)]
    assert lines[-1].endswith("0 min left")
