"""Figures show what they are given, and say it in a sentence."""

import json

import pytest

from workshop_utils.inference import evaluate
from workshop_utils.series import plots

LABELS = [
    json.dumps({"team": team, "reply": f"We have {i}."})
    for i, team in enumerate(["billing", "login"] * 5)
]
WRONG = [label.replace("login", "billing") for label in LABELS]


def scores():
    return {
        "base": evaluate.score(["?"] * 10, LABELS),
        "majority-class": evaluate.score(WRONG, LABELS),
        "adapter": evaluate.score([*LABELS[:-1], "{}"], LABELS),
    }


def test_scores_are_bars_with_numbers_and_hatches(capsys):
    axes = plots.plot_scores(scores()).axes[0]
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["base", "majority class", "adapter"]
    bars = {container.get_label(): container for container in axes.containers}
    assert list(bars) == ["exact match", "valid JSON", "team", "reply"]
    assert [bar.get_height() for bar in bars["exact match"]] == pytest.approx([0, 50, 90])
    hatches = {bar[0].get_hatch() for bar in bars.values()}
    assert len(hatches) == 4, "colour is never the only difference"
    assert "90" in [text.get_text() for text in axes.texts]
    said = "0.0% for the base, 90.0% with the adapter (majority class 50.0%)"
    assert said in capsys.readouterr().out


def test_scores_of_plain_text(capsys):
    figure = plots.plot_scores({"base": evaluate.score(["a", "b"], ["a", "a"])})
    assert [container.get_label() for container in figure.axes[0].containers] == ["exact match"]
    assert "base 50.0%" in capsys.readouterr().out


def test_training_curves(capsys):
    events = [{"event": "start", "step": 0}]
    for i in (1, 2, 3, 4):
        more = {"tokens_per_second": 100 * i, "memory": i * 10**9}
        events.append({"event": "step", "step": i, "loss": 4 / i, "lr": 1e-4 * i, **more})
    events.append({"event": "validation", "step": 2, "loss": 1.5})
    events.append({"event": "validation", "step": 4, "loss": 1.25})
    loss, rate, speed, memory = plots.plot_training(events).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[4, 2, 4 / 3, 1], [1.5, 1.25]]
    assert list(rate.lines[0].get_ydata()) == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert list(speed.lines[0].get_ydata()) == [100, 200, 300, 400]
    assert list(memory.lines[0].get_ydata()) == [1, 2, 3, 4]
    said = "4.000 at step 1, 1.000 at step 4; lowest validation loss 1.250 at step 4."
    assert said in capsys.readouterr().out
    (only,) = plots.plot_training([{"event": "step", "step": 1, "loss": 1.0}]).axes
    assert only.get_ylabel() == "loss"
    with pytest.raises(ValueError, match="no training step"):
        plots.plot_training(events[:1])


def test_the_curve_of_a_resumed_run_has_each_step_once(capsys):
    steps = ((1, 4.0), (2, 3.0), (3, 9.0), (3, 2.0), (4, 1.0))
    again = [{"event": "step", "step": step, "loss": loss} for step, loss in steps]
    again.insert(3, {"event": "start", "step": 2})
    again += [{"event": "validation", "step": 2, "loss": loss} for loss in (3.5, 2.5)]
    (axes,) = plots.plot_training(again).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3, 4], [2]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[4, 3, 2, 1], [2.5]]


def test_confusion(capsys):
    result = scores()
    axes = plots.plot_confusion(result["majority-class"], "team").axes[0]
    assert [text.get_text() for text in axes.texts] == ["5", "0", "5", "0"]
    said = "5 of 10 rows right; most frequent mistake: login answered as billing (5 rows)"
    assert said in capsys.readouterr().out
    axes = plots.plot_confusion(result["adapter"], "team").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["billing", "login", "no answer"]
    with pytest.raises(ValueError, match="'reply' is no class"):
        plots.plot_confusion(result["base"], "reply")


def test_shown_with_alternative_text_and_saved(tmp_path, monkeypatch):
    import IPython.display

    shown = []
    display = lambda *args, **options: shown.append((args[0], options))  # noqa: E731
    monkeypatch.setattr(IPython.display, "display", display)
    figure = plots.plot_scores(scores())
    plots.show(figure, "Three groups of bars")
    data, options = shown[0]
    assert data["text/plain"] == options["metadata"]["image/png"]["alt"] == "Three groups of bars"
    assert plots.save(figure, tmp_path / "a" / "plot.png").read_bytes().startswith(b"\x89PNG")
