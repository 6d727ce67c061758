"""The charts of a report: functions that fill matplotlib axes, without importing matplotlib.

Colours are middle tones that can be read on white and on black; text and lines take the colour of the page's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .facts import Facts, finite

BLUE, ORANGE = "#3f86d4", "#d6781d"
LAYERS = (BLUE, "#9467d6", "#d4548a", ORANGE)  # from the first layer to the last
PLAIN = "{x:g}"  # 20, not 2 x 10^1


@dataclass(frozen=True)
class Scales:
    """Ranges that all runs on a page share, so that colours and bars of two runs can be compared."""

    distance: tuple[float, float]
    entropy: tuple[float, float]
    half_life: tuple[float, float]
    loss: float
    kl: float
    bytes: tuple[float, float]


def _range(values: list[float], least: float = 0.0) -> tuple[float, float]:
    found = [v for v in values if finite(v) and v >= least]
    return (min(found), max(found)) if found else (0.1, 1.0)


def shared_scales(runs: Sequence[Facts]) -> Scales:
    def heads(key: str) -> list[float]:
        return [v for r in runs for s in r.measured.values() for v in s.get(key, [])]

    after = [v for r in runs for row in r.aligned_half_life.values() for v in row]
    losses = [v for r in runs for p in r.curve for v in p["held_out"].values()]
    memory = [float(b) for r in runs for n in (r.contexts[0], r.contexts[-1]) for b in r.memory(n)]
    kl = [s["kl"] for r in runs for s in r.scores.values() if finite(s["kl"])]
    return Scales(
        distance=_range(heads("distance"), 1e-9),
        entropy=_range(heads("entropy")),
        half_life=_range([*heads("half_life"), *after], 1e-9),
        loss=max(filter(finite, losses), default=1.0),
        kl=max(kl, default=1.0),
        bytes=_range(memory, 1.0),
    )


def heat_map(axes: Any, run: Facts, key: str, limits: tuple[float, float], *, log: bool, label: str) -> None:
    """Layers down, heads across; layers that stay softmax are not measured and stay empty."""
    layers = [s.index for s in run.layers]
    rows = [run.measured[i][key] if i in run.measured else [] for i in layers]
    width = max(map(len, rows))
    grid = [[*r, *[float("nan")] * (width - len(r))] for r in rows]
    low, high = limits
    mesh = axes.pcolormesh(grid, norm="log" if log and low < high else None)
    mesh.set_clim(low, high)
    axes.invert_yaxis()
    step = max(1, -(-len(layers) // 12))  # numbers of two digits do not touch
    axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], [str(i) for i in layers[::step]])
    stride = max(1, width // 8)
    axes.set_xticks([i + 0.5 for i in range(0, width, stride)], [str(i) for i in range(0, width, stride)])
    axes.set(xlabel="head", ylabel="layer")
    for place, row in enumerate(rows):
        if not row and len(layers) <= 2 * 12:  # with more the rows are too low for words
            axes.text(width / 2, place + 0.5, "stays softmax", ha="center", va="center", fontsize=8)
    _colour_bar(axes, mesh, label)


def _colour_bar(axes: Any, mapped: Any, label: str) -> Any:
    bar = axes.figure.colorbar(mapped, ax=axes)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.yaxis.set_major_formatter(PLAIN)
    bar.ax.yaxis.set_minor_formatter(PLAIN)
    return bar


def _log_ticks(axis: Any) -> None:
    """1, 2, 5, 10 and so on, since powers of ten alone may leave an axis with one number; those alone over decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def _layer_colours(axes: Any, layers: list[int]) -> Any:
    """A function from layer numbers to colours, explained by a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    shades = LinearSegmentedColormap.from_list("layers", LAYERS)
    mapped = ScalarMappable(Normalize(min(layers), max(max(layers), min(layers) + 1)), shades)
    _colour_bar(axes, mapped, "layer").ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return mapped.to_rgba


def half_lives(axes: Any, run: Facts, limits: tuple[float, float]) -> None:
    """One dot per head: the half-life that the initialisation set against the one after alignment."""
    low, high = limits[0] / 1.3, limits[1] * 1.3
    axes.plot([low, high], [low, high], linewidth=0.8, color=axes.xaxis.label.get_color(), zorder=1)
    layers = [i for i in run.measured if i in run.aligned_half_life]
    x = [v for i in layers for v in run.measured[i]["half_life"]]
    y = [v for i in layers for v in run.aligned_half_life[i]]
    colour = _layer_colours(axes, layers)
    axes.scatter(x, y, c=[colour(i) for i in layers for _ in run.measured[i]["half_life"]], s=16, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    _log_ticks(axes.xaxis)
    _log_ticks(axes.yaxis)
    axes.set(xlabel="as set, tokens", ylabel="after alignment, tokens")


def alignment_loss(axes: Any, run: Facts, most: float) -> None:
    """Held-out loss of every converted layer over the steps."""
    steps = [p["step"] for p in run.curve]
    layers = sorted(run.held_out)
    colour = _layer_colours(axes, layers)
    for i in layers:
        axes.plot(steps, [p["held_out"][str(i)] for p in run.curve], marker=".", linewidth=1.2, color=colour(i))
    axes.set(xlabel="step", ylabel="held-out error", ylim=(0, most * 1.1))


def errors(axes: Any, run: Facts, most: float) -> None:
    """Held-out error of every converted layer before and after alignment."""
    layers = sorted(run.held_out)
    places = range(len(layers))
    for shift, part, label, colour in ((-0.2, 0, "before", BLUE), (0.2, 1, "after alignment", ORANGE)):
        heights = [run.held_out[i][part] for i in layers]
        axes.bar([p + shift for p in places], heights, 0.4, color=colour, label=label)
    step = max(1, -(-len(layers) // 12))  # numbers of two digits do not touch
    axes.set_xticks(list(places)[::step], [str(i) for i in layers[::step]])
    axes.set(xlabel="layer", ylabel="held-out error", ylim=(0, most * 1.25))
    axes.legend(frameon=False, ncols=2, loc="upper center")


def policy_scores(axes: Any, run: Facts) -> None:
    """What the policy chose by, and what it chose."""
    for kept, label, colour in ((True, "stays softmax", ORANGE), (False, "becomes Gated DeltaNet", BLUE)):
        chosen = [s.index for s in run.layers if s.kept is kept and s.index in run.policy_scores]
        axes.bar(chosen, [run.policy_scores[i] for i in chosen], color=colour, label=label)
    axes.set(xlabel="layer", ylabel="score")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.25)
    axes.legend(frameon=False, ncols=2, loc="upper center")


def distillation(axes: Any, run: Facts) -> None:
    """Held-out divergence over the steps."""
    values = [p["kl"] for p in run.distillation]
    axes.plot([p["step"] for p in run.distillation], values, marker=".", color=BLUE)
    most = max(filter(finite, values), default=0.0)
    axes.set(xlabel="step", ylabel="held-out KL(teacher, student), nats", ylim=(0, max(most, 1e-9) * 1.1))
    axes.xaxis.get_major_locator().set_params(integer=True)


def divergence(axes: Any, run: Facts, most: float) -> None:
    """KL(teacher, model) of every model, smaller is better."""
    names = [n for n, s in run.scores.items() if n != "teacher" and finite(s["kl"])][::-1]
    values = [run.scores[n]["kl"] for n in names]
    spread = [e if finite(e := run.scores[n]["kl_stderr"]) else 0.0 for n in names]
    ink = axes.xaxis.label.get_color()
    axes.barh(names, values, xerr=spread, color=BLUE, height=0.6, ecolor=ink)
    for place, value in enumerate(values):
        axes.annotate(f"{value:.3g}", (value, place), xytext=(5, 4), textcoords="offset points")
    axes.set(xlabel="KL(teacher, model), nats per token", xlim=(0, max(most, 1e-9) * 1.2))


def memory(axes: Any, run: Facts, limits: tuple[float, float]) -> None:
    """State and caches of one sequence over the number of tokens behind it, both on scales of ratios."""
    tokens = run.contexts
    for part, label, colour in ((0, "teacher", ORANGE), (1, "student", BLUE)):
        values = [run.memory(n)[part] / 2**20 for n in tokens]
        axes.plot(tokens, values, marker=".", color=colour, label=label)
    low, high = (v / 2**20 for v in limits)
    axes.set(xlabel="tokens", ylabel="MiB", xscale="log", yscale="log", ylim=(low / 1.5, high * 1.5))
    axes.set_xticks(tokens, [str(n) for n in tokens])
    _log_ticks(axes.yaxis)
    axes.minorticks_off()
    axes.legend(frameon=False)
