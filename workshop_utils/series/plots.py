"""The workshop's figures. Each function returns the figure and prints its finding in one line.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart in all common
forms of colour blindness; bars carry hatches and numbers, lines carry markers, so that colour is
never the only difference.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.core import paths
from workshop_utils.inference.evaluate import ADAPTER, BASE, TITLES, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workshop_utils.adapters.proof import Proof
    from workshop_utils.checkpoints.formats.summary import Checkpoint
    from workshop_utils.inference.client import Timing

ORANGE, SKY, GREEN, BLUE, VERMILION = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
_STYLES = {"exact match": (BLUE, ""), "valid JSON": (ORANGE, "//")}
_BELOW_THE_LOSS = (
    ("lr", "learning rate", GREEN, 1),
    ("tokens_per_second", "tokens/s", ORANGE, 1),
    ("memory", "memory, GB", SKY, 1e9),
)
PINK, YELLOW = "#CC79A7", "#F0E442"
_FIELD_STYLES = ((GREEN, ".."), (SKY, "xx"), (VERMILION, "\\\\"), (PINK, "++"), (YELLOW, "oo"))


def plot_scores(scores: Mapping[str, Scores]) -> Figure:
    """Exact match, valid JSON and the accuracy of each field, of every variant, in per cent."""
    figure, axes = _figure(9, 4.2)
    entries = list(scores.values())
    measures = {"exact match": [entry.exact_match for entry in entries]}
    if all(entry.valid_json is not None for entry in entries):
        measures["valid JSON"] = [entry.valid_json for entry in entries]
    for name in dict.fromkeys(name for entry in entries for name in entry.fields):
        measures[name] = [entry.fields.get(name, 0.0) for entry in entries]
    width = 0.8 / len(measures)
    for number, (name, values) in enumerate(measures.items()):
        colour, hatch = _STYLES.get(name) or _FIELD_STYLES[(number - 2) % len(_FIELD_STYLES)]
        beside = (number - (len(measures) - 1) / 2) * width
        look = {"label": name, "color": colour, "hatch": hatch, "edgecolor": "black"}
        heights = [100 * value for value in values]
        bars = axes.bar([at + beside for at in range(len(scores))], heights, width, **look)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    ticks = {"xticks": range(len(scores)), "yticks": range(0, 101, 20)}
    axes.set(ylim=(0, 112), ylabel="% of test rows", **ticks)
    axes.set_xticklabels([TITLES.get(name, name) for name in scores])
    above = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.14), "ncols": len(measures)}
    axes.legend(frameon=False, fontsize=9, **above)
    print(scores_finding(scores))
    return figure


def scores_finding(scores: Mapping[str, Scores]) -> str:
    """The result in one sentence; also the alternative text of :func:`plot_scores`."""
    rows = next(iter(scores.values())).rows
    rates = {
        TITLES.get(name, name): f"{entry.exact_match:.1%}"
        + ("" if entry.rows == rows else f" of {entry.rows}")
        for name, entry in scores.items()
    }
    begin = f"Exact match on {rows} test rows:"
    if BASE in scores and ADAPTER in scores:
        base, adapter = rates.pop(TITLES[BASE]), rates.pop(TITLES[ADAPTER])
        begin += f" {base} for the base, {adapter} with the adapter"
        others = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        return f"{begin} ({others})." if others else f"{begin}."
    return f"{begin} {', '.join(f'{name} {rate}' for name, rate in rates.items())}."


def plot_training(events: Sequence[Mapping]) -> Figure:
    """Training and validation loss, and below them learning rate, tokens a second and memory as far
    as known, against the step. ``events`` as ``read_events`` returns them: "step" and "validation";
    of a step that a resumed run made again the last. ValueError without a training step."""

    def of_kind(kind: str) -> list[Mapping]:
        last = {event["step"]: event for event in events if event["event"] == kind}
        return [last[step] for step in sorted(last) if last[step].get("loss") is not None]

    def draw(axis, events: Sequence[Mapping], key: str, unit: float = 1, **look) -> None:
        known = [event for event in events if event.get(key) is not None]
        axis.plot([e["step"] for e in known], [e[key] / unit for e in known], **look)

    steps, checks = of_kind("step"), of_kind("validation")
    if not steps:
        raise ValueError("no training step among the events")
    below = [line for line in _BELOW_THE_LOSS if any(e.get(line[0]) is not None for e in steps)]
    layout = {"rows": 1 + len(below), "height_ratios": (3, *[1] * len(below))}
    figure, axes = _figure(8, 3.4 + 1.2 * len(below), sharex=True, squeeze=False, **layout)
    loss, *others = axes.flat
    draw(loss, steps, "loss", color=BLUE, marker=".", label="training")
    look = {"color": VERMILION, "marker": "s", "linestyle": "--"}
    draw(loss, checks, "loss", label="validation", **look)
    loss.set(ylabel="loss", ylim=(0, None))
    loss.legend(frameon=False)
    for axis, (key, title, colour, unit) in zip(others, below, strict=True):
        draw(axis, steps, key, unit, color=colour, marker=".")
        axis.set(ylabel=title, ylim=(0, None))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    axes[-1, 0].set_xlabel("step")
    first, last = (f"{e['loss']:.3f} at step {e['step']}" for e in (steps[0], steps[-1]))
    finding = f"Training loss: {first}, {last}"
    if checks:
        best = min(checks, key=lambda event: event["loss"])
        finding += f"; lowest validation loss {best['loss']:.3f} at step {best['step']}"
    print(finding + ".")
    return figure


def plot_confusion(scores: Scores, field: str) -> Figure:
    """Rows of the test by label (down) and answer (across); ValueError if ``field`` is no class."""
    if field not in scores.confusion:
        known = ", ".join(scores.confusion) or "none"
        raise ValueError(f"{field!r} is no class; there are {known}")
    counts = scores.confusion[field]
    # Answers that are no label get a column only where there are some.
    columns = [
        name
        for name in next(iter(counts.values()))
        if name in counts or any(line[name] for line in counts.values())
    ]
    figure, axes = _figure(1.6 + 0.75 * len(columns), 1.4 + 0.5 * len(counts))
    rows = [[line[name] for name in columns] for line in counts.values()]
    _heat(axes, rows, max(max(line.values()) for line in counts.values()))
    axes.set(xlabel=f"answered {field}", ylabel=f"right {field}")
    axes.set_xticklabels(columns, rotation=30, ha="right")
    axes.set_yticklabels(list(counts))
    print(_confusion_finding(field, counts))
    return figure


def plot_shards(checkpoint: Checkpoint) -> Figure:
    """Files down, layers across, each cell shaded by its megabytes."""
    from workshop_utils.checkpoints.verify.shard_map import shard_map

    shards = shard_map(checkpoint)
    columns = (None, *shards.layers)
    megabytes = [
        [shards.cells[file].get(layer, 0) / 1e6 for layer in columns] for file in shards.files
    ]
    figure, axes = _figure(9, 1.5 + 0.45 * len(shards.files))
    # The embeddings outside the layers would leave all layers white.
    darkest = max(max(line[1:], default=0) for line in megabytes) or None
    image = _heat(axes, megabytes, darkest, len(columns) <= 40, ".0f", 7)
    axes.set(xlabel="layer")
    axes.set_xticklabels(["outside", *map(str, shards.layers)], rotation=90, fontsize=8)
    axes.set_yticklabels(shards.files)
    figure.colorbar(image, ax=axes, label="MB", fraction=0.03)
    print(shards.finding)
    return figure


def _heat(axes, rows, darkest, numbers: bool = True, spec: str = "", fontsize: int | None = None):
    """Cells as dark as their values; a value of 0 in a map with ``spec`` is a dash."""
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    for y, line in enumerate(rows if numbers else ()):
        for x, value in enumerate(line):
            look = {"color": "white" if darkest and value > darkest / 2 else "black"}
            text = format(value, spec) if value or not spec else "-"
            axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, **look)
    axes.set(xticks=range(len(rows[0])), yticks=range(len(rows)))
    axes.grid(False)
    return image


def plot_parameters(checkpoint: Checkpoint) -> Figure:
    """A treemap: the area of a tile is the number of elements of that kind of tensor."""
    import squarify

    from workshop_utils.checkpoints.verify.tree import by_module

    counts = by_module(checkpoint)
    total = sum(counts.values())
    figure, axes = _figure(9, 4)
    shown = {name: count for name, count in counts.items() if count > total / 500}
    styles = list(itertools.islice(itertools.cycle(_FIELD_STYLES), len(shown)))
    colours = [colour for colour, _ in styles]
    labels = [
        f"{name}\n{count / total:.1%}" if count > total / 50 else ""
        for name, count in shown.items()
    ]
    look = {"alpha": 0.6, "edgecolor": "black", "text_kwargs": {"fontsize": 8}}
    squarify.plot(list(shown.values()), ax=axes, pad=True, color=colours, label=labels, **look)
    axes.set_axis_off()
    name, count = next(iter(counts.items()))
    print(f"{total:,} parameters; {name} holds {count / total:.0%} of them.")
    return figure


def plot_labels(answers: Sequence[Mapping[str, str]], down: str, across: str) -> Figure:
    """How many of ``answers`` have each combination of the fields ``down`` and ``across``."""
    rows, columns = (sorted({answer[field] for answer in answers}) for field in (down, across))
    counts = {row: dict.fromkeys(columns, 0) for row in rows}
    for answer in answers:
        counts[answer[down]][answer[across]] += 1
    figure, axes = _figure(1.6 + 0.9 * len(columns), 1.2 + 0.4 * len(rows))
    cells = [count for line in counts.values() for count in line.values()]
    _heat(axes, [list(line.values()) for line in counts.values()], max(cells))
    axes.set(xlabel=across, ylabel=down)
    axes.set_xticklabels(columns)
    axes.set_yticklabels(rows)
    many = f"{len(cells)} combinations of {down} and {across}"
    least, most = min(cells), max(cells)
    each = f"{least} rows each" if least == most else f"{least} to {most} rows each"
    print(f"{many}, {each}.")
    return figure


def plot_proof(proof: Proof) -> Figure:
    """What the adapter does against what its exports get wrong: the largest change of a logit, and
    the weight updates by layer. What is not proven has a white bar and black crosses."""
    figure, (logits, updates) = _figure(10, 3.8, ncols=2)
    told = [form for form in proof.forms if form.logits is not None]
    # Nothing is zero on a logarithmic axis; differences below this are rounding.
    floor = 1e-8
    names = ["the adapter itself", *(form.name for form in told)]
    values = [proof.effect, *(form.logits for form in told)]
    lengths = [max(value, floor) for value in values]
    colours = [ORANGE, *(BLUE if form.proven else "white" for form in told)]
    bars = logits.barh(names, lengths, color=colours, edgecolor="black", left=floor / 10)
    bars.patches[0].set_hatch("//")
    logits.bar_label(bars, [f"{value:.0e}" for value in values], fontsize=8, padding=2)
    label = "largest difference of a logit"
    logits.set(xscale="log", xlabel=label, xlim=(floor, 100 * proof.effect))
    logits.invert_yaxis()
    for number, form in enumerate(told):
        colour, marker = (BLUE, VERMILION, GREEN, PINK, SKY)[number % 5], "osd^v"[number % 5]
        look = {"color": colour, "marker": marker} if form.proven else {"color": "black"}
        look = {"marker": "x", "markersize": 4, "label": form.name, "alpha": 0.8} | look
        updates.plot([max(value, floor) for value in form.by_layer], **look)
    updates.axhline(1, color=ORANGE, linestyle="--", label="as large as the update")
    label = "largest difference / largest update"
    updates.set(yscale="log", ylim=(floor / 2, 10), xlabel="layer", ylabel=label)
    updates.legend(frameon=False, fontsize=8, loc="center right")
    print(proof_finding(proof))
    return figure


def proof_finding(proof: Proof) -> str:
    """The result in one sentence; also the alternative text of :func:`plot_proof`."""
    told = [form for form in proof.forms if form.proven is not None]
    equal = [form.logits for form in told if form.proven]
    wrong = ""
    for form in told:
        if not form.proven:
            why = f": {form.not_checked}" if form.not_checked else f" differs by {form.logits:.1g}"
            wrong += f"; {form.name}{why}"
    close = f", these differ by {max(equal):.0e} at most" if equal else ""
    moved = f"the adapter moves a logit by up to {proof.effect:.0f}"
    return f"{len(equal)} of {len(told)} exports compute what was trained: {moved}{close}{wrong}."


def plot_latency(timings: Mapping[str, Sequence[Timing]]) -> Figure:
    """Time to the first token (a point an answer, the median a line), and tokens a second."""
    from statistics import median

    figure, (first, rate) = _figure(9, 3.4, ncols=2)
    for number, (name, group) in enumerate(timings.items()):
        look = {"color": (BLUE, ORANGE, GREEN, VERMILION)[number % 4], "edgecolor": "black"}
        waits, rates = [timing.first for timing in group], [timing.rate for timing in group]
        places, marker = [number] * len(group), "osd^"[number % 4]
        first.scatter(places, waits, marker=marker, alpha=0.8, **look)
        first.hlines(median(waits), number - 0.25, number + 0.25, color="black")
        hatch = ("", "//", "..", "xx")[number % 4]
        rate.bar(number, median(rates), hatch=hatch, width=0.6, **look)
        figures = f"first token after {median(waits):.2f} s, then {median(rates):.1f} tokens/s"
        print(f"{name}: {figures} (medians of {len(group)} answers)")
    labels = {first: "seconds to the first token", rate: "tokens a second, one answer"}
    for axes, label in labels.items():
        axes.set(xticks=range(len(timings)), ylabel=label, xlim=(-0.6, len(timings) - 0.4))
        axes.set_ylim(bottom=0)
        axes.set_xticklabels(timings)
    return figure


def show(figure: Figure, alt: str) -> None:
    """Display ``figure`` as a PNG with the alternative text ``alt``: as plain text and as ``alt``
    metadata, which nbconvert puts into the page. An HTML ``<img>`` would carry it into JupyterLab,
    too, which removes embedded images from the HTML of a notebook not run yet."""
    from IPython.display import display

    png = base64.b64encode(_png(figure)).decode()
    display({"image/png": png, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def save(figure: Figure, target: Path) -> Path:
    """Write ``figure`` as a PNG, all or nothing, and return ``target``."""
    with paths.new_file(target) as part:
        part.write_bytes(_png(figure))
    return Path(target)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90, metadata={"Software": None})
    return content.getvalue()


def _figure(width: float, height: float, rows: int = 1, **options):
    """A figure without a graphical backend: shown only by :func:`show`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, **options)
    for axis in figure.axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _confusion_finding(field: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    total = sum(sum(line.values()) for line in counts.values())
    right = sum(line[label] for label, line in counts.items())
    wrong = [
        (count, label, answer)
        for label, line in counts.items()
        for answer, count in line.items()
        if answer != label and count
    ]
    if not wrong:
        return f"{field}: all {total} rows right."
    count, label, answer = max(wrong, key=lambda mistake: mistake[0])
    most = f"most frequent mistake: {label} answered as {answer} ({count} rows)"
    return f"{field}: {right} of {total} rows right; {most}."
