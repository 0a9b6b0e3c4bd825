# SPDX-License-Identifier: Apache-2.0
"""Figures of a report. They use a few named colors for a light page; ``png`` can replace them by those of a dark page.

The label of a figure (``figure.get_label()``) is its alternative text.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.errors import InputError, described
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.lettering import Lettering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastdistill.diffusion.grid import Grid
    from fastdistill.diffusion.guidance import Guidance

#: Color on a light page -> color on a dark page. Figures use no other colors.
THEME = {
    "#1c2430": "#e8ecf1",  # ink
    "#5d6875": "#9ba7b5",  # muted
    "#dfe4ea": "#2d3641",  # grid
    "#ffffff": "#14181d",  # page
    "#0b6bb5": "#5cb3f5",  # blue
    "#c8551b": "#f49a62",  # orange
    "#2b8a57": "#5fd093",  # green
    "#8a4fb0": "#c796ea",  # purple
    "#c5202e": "#ff7a80",  # red
}
INK, MUTED, GRID, PAGE, BLUE, ORANGE, GREEN, PURPLE, RED = THEME
ROLE = {"teacher": MUTED, "random_conditioning": BLUE, "paired": ORANGE}
_MORE = (GREEN, PURPLE, RED, INK)
_SERIES = (*_MORE, BLUE, ORANGE, MUTED)


def label(name: str) -> str:
    """The key of a run or model as words: ``random_conditioning`` -> ``Random conditioning``."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def png(figure: Figure, *, dark: bool = False, transparent: bool = True, dpi: int = 200) -> bytes:
    """The figure as a PNG file; ``dark`` replaces the colors by those of a dark page."""
    figure.draw_without_rendering()  # creates all ticks before their colors are replaced
    buffer = io.BytesIO()
    if dark:
        _exchange(figure, THEME)
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    if dark:
        _exchange(figure, {new: old for old, new in THEME.items()})
    return buffer.getvalue()


def sample_grid(
    samples: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    correct: Mapping[str, Sequence[bool]] | None = None,
    seen: Sequence[bool] | None = None,
    panels: Sequence[str] | None = None,
) -> Figure:
    """Samples with a row per model and a column per prompt. A red frame and a cross mark wrong samples.

    Prompts and names can be any text. A prompt is drawn in at most five lines; longer prompts are shortened. The label
    of the figure contains the full texts.

    Args:
        samples: model -> images [P, C, H, W] or [P, H, W], values in [0, 1] (clipped), C 1 or 3; tensors or arrays.
        prompts: P texts.
        correct: model -> P values: whether the judge accepts the sample.
        seen: for each prompt, whether it is in the cache; gives two panels, seen above unseen.
        panels: for each prompt, the heading of its panel; instead of ``seen``.
    """
    count = len(prompts)
    for index, text in enumerate(prompts):
        if not isinstance(text, str):
            raise InputError.of(f"prompts[{index}]", "a text", type(text).__name__)
    images = {name: _images(f"samples[{name!r}]", value, count) for name, value in samples.items()}
    if not images or not count:
        raise InputError.of("samples", "at least one model and one prompt", f"{len(images)} and {count}")
    judged = {} if correct is None else {name: [bool(right) for right in value] for name, value in correct.items()}
    for name, value in judged.items():
        if name not in images or len(value) != count:
            raise InputError.of(f"correct[{name!r}]", f"{count} values for a model in samples", len(value))
    if seen is not None and panels is not None:
        raise InputError.of("panels", "none where seen is given", described(panels))
    for name, values in (("seen", seen), ("panels", panels)):
        if values is not None and len(values) != count:
            raise InputError.of(name, f"{count} values, one for each prompt", len(values))
    headings = [""] * count if panels is None else list(panels)
    if seen is not None:
        headings = ["Prompts in the cache" if value else "Prompts never seen in the cache" for value in seen]
    order = dict.fromkeys(headings) if seen is None else sorted(set(headings))
    parts = [(heading, [i for i in range(count) if headings[i] == heading]) for heading in order]

    cell, gap, left, title, between = 0.82, 0.09, 1.75, 0.36, 0.28  # inches
    lettering = Lettering([*prompts, *map(label, images)])
    small = {"fontsize": 8.5, "linespacing": 1.15, **lettering.style}
    middle_sized = {"fontsize": 9.5, "linespacing": 1.15, **lettering.style}
    titles = Lettering(name for name, _ in parts)
    bold = {"fontsize": 11, "weight": "bold", **titles.style}
    captions = [lettering.fit(prompt, cell + gap - 0.05, 5, **small) for prompt in prompts]
    names = {model: lettering.fit(label(model), left - 0.12, 2, **middle_sized) for model in images}
    headers = [max(0.42, 0.14 + max(captions[i][2] for i in members)) for _, members in parts]
    if not any(prompts):
        headers = [0.08] * len(parts)
    columns = max(len(members) for _, members in parts)
    heights = [
        (title if name else 0) + header + len(images) * (cell + gap)
        for (name, _), header in zip(parts, headers, strict=True)
    ]
    width = max(left + columns * (cell + gap), *(0.2 + titles.fit(name, 9.0, **bold)[1] for name, _ in parts))
    height = sum(heights) + between * (len(parts) - 1) + 0.06
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    top = 0.0
    for (name, members), header, panel_height in zip(parts, headers, heights, strict=True):
        y = top
        if name:
            axes.text(0.02, y + title / 2, name, color=INK, va="center", **bold)
            y += title
        for column, prompt in enumerate(members):
            x = left + column * (cell + gap) + cell / 2
            axes.text(x, y + header - 0.07, captions[prompt][0], color=MUTED, ha="center", va="bottom", **small)
        y += header
        for model, stack in images.items():
            verdict = judged.get(model)
            text, _, text_height = names[model]
            middle = y + cell / 2
            axes.text(0.02, middle - 0.09 * (verdict is not None), text, color=INK, va="center", **middle_sized)
            if verdict is not None:
                right = f"{sum(verdict[i] for i in members)} of {len(members)} right"
                below = middle + 0.05 + text_height / 2
                axes.text(0.02, below, right, color=MUTED, va="center", **{**lettering.style, "fontsize": 8})
            for column, prompt in enumerate(members):
                wrong = verdict is not None and not verdict[prompt]
                _cell(axes, stack[prompt], left + column * (cell + gap), y, cell, wrong=wrong)
            y += cell + gap
        top += panel_height + between
    figure.set_label(_grid_text(images, prompts, judged))
    return figure


def loss_curves(runs: Mapping[str, tuple[Sequence[float], Any]]) -> Figure:
    """``curves`` of training losses."""
    return curves(runs, "loss")


def curves(runs: Mapping[str, tuple[Sequence[float], Any]], what: str, *, linear: bool = False) -> Figure:
    """Values over optimizer steps: logged values in a light color, their running mean on top. A single run has no
    label.

    runs: name -> (steps [n], values [n] or [seeds, n]). With several seeds, the mean is also over seeds. Values above
        0. what: the name of the values. linear: a linear axis from 0, instead of a logarithmic one.
    """
    figure, axes = _axes(9.0, 3.9)
    ends, texts = [], []
    for index, (name, (steps, losses)) in enumerate(runs.items()):
        x, y = np.asarray(steps, dtype=float), np.atleast_2d(np.asarray(losses, dtype=float))
        if x.ndim != 1 or not len(x) or y.ndim != 2 or y.shape[1] != len(x):
            raise InputError.of(f"runs[{name!r}]", "steps [n] and values [n] or [seeds, n]", (x.shape, y.shape))
        color = ROLE.get(name, _SERIES[index % len(_SERIES)])
        for row in y:
            axes.plot(x, row, color=color, alpha=0.22, linewidth=0.9)
        mean = _smooth(y.mean(0))
        axes.plot(x, mean, color=color, linewidth=2, solid_capstyle="round")
        ends.append((mean[-1], name, color, x[-1]))
        texts.append(f"{label(name)}: from {mean[0]:.3g} to {mean[-1]:.3g} at step {x[-1]:.0f}")
    axes.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    axes.set_ylabel(what, color=MUTED, fontsize=9)
    axes.margins(x=0.01)
    if linear:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        _log_ticks(axes)
    if len(ends) > 1:
        _end_labels(figure, axes, ends)
    figure.set_label(f"{label(what)} over training steps. " + "; ".join(texts) + ".")
    return figure


def losses_over_time(timestep: Sequence[int], losses: Mapping[str, Sequence[float]], parts: int = 10) -> Figure:
    """Losses of n samples over their timesteps [n], logarithmic, with the mean in each of ``parts`` equal intervals."""
    t = np.asarray(timestep, dtype=float)
    figure, axes = _axes(9.0, 3.4)
    edges = np.linspace(t.min(), t.max() + 1, parts + 1)
    place = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, parts - 1)
    ends, texts = [], []
    for (name, values), color in zip(losses.items(), (BLUE, ORANGE, *_MORE), strict=False):
        y = np.asarray(values, dtype=float)
        if y.shape != t.shape:
            raise InputError.of(f"losses[{name!r}]", f"{len(t)} values, one for each timestep", y.shape)
        axes.plot(t, y, ".", color=color, alpha=0.25, markersize=4, markeredgewidth=0)
        filled = [part for part in range(parts) if (place == part).any()]
        x = [t[place == part].mean() for part in filled]
        mean = [y[place == part].mean() for part in filled]
        axes.plot(x, mean, color=color, linewidth=2, solid_capstyle="round")
        ends.append((mean[-1], name, color, x[-1]))
        texts.append(f"{label(name)}: {mean[0]:.3g} near t = {x[0]:.0f}, {mean[-1]:.3g} near t = {x[-1]:.0f}")
    if all((np.asarray(values) > 0).all() for values in losses.values()):
        axes.set_yscale("log")
        _log_ticks(axes)
    axes.set_xlabel("timestep t (0: the clean latent, right: pure noise)", color=MUTED, fontsize=9)
    axes.set_ylabel("loss", color=MUTED, fontsize=9)
    axes.margins(x=0.01)
    _end_labels(figure, axes, ends)
    figure.set_label("Loss over timesteps. " + "; ".join(texts) + ".")
    return figure


def probability_curve(probability: Sequence[float]) -> Figure:
    """p(t), the probability that a random prompt replaces the paired one, for timesteps t = 0..T-1."""
    p = np.asarray(probability, dtype=float)
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise InputError.of("probability", "a table of values between 0 and 1", p.shape)
    figure, axes = _axes(9.0, 3.0)
    t = np.arange(len(p))
    axes.fill_between(t, p, color=BLUE, alpha=0.14, linewidth=0)
    axes.plot(t, p, color=BLUE, linewidth=2)
    axes.axhline(p.mean(), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    style = {"textcoords": "offset points", "color": MUTED, "fontsize": 8.5, "va": "bottom"}
    axes.annotate(f"mean {p.mean():.3f}", (0, p.mean()), (4, 4), **style)
    axes.set(xlim=(0, max(len(p) - 1, 1)), ylim=(0, 1.02))
    axes.set_xlabel("timestep t (0: the clean latent, right: pure noise)", color=MUTED, fontsize=9)
    axes.set_ylabel("p(t)", color=MUTED, fontsize=9)
    figure.set_label(
        f"Probability of a random prompt: {p[0]:.3f} at t = 0, {p[-1]:.3f} at t = {len(p) - 1}, mean {p.mean():.3f}."
    )
    return figure


def schedule_curve(
    schedules: Mapping[str, Guidance | float | str] | Sequence[Guidance | float | str],
    grid: Grid,
    band: tuple[float, float] | None = None,
) -> Figure:
    """The weights w of schedules of guidance over the steps of a grid, from the noise to the data.

    Args:
        schedules: any number, with their names or named by their texts. grid: its sigmas are shown below the steps.
        band: two sigmas; the figure is shaded between them, for example where the classes are decided.
    """
    from fastdistill.diffusion.guidance import Guidance

    named = schedules.items() if isinstance(schedules, Mapping) else ((None, given) for given in schedules)
    read = [(name, Guidance.parse(given)) for name, given in named]
    weights = {str(schedule) if name is None else name: schedule.weights(grid).numpy() for name, schedule in read}
    if not weights:
        raise InputError.of("schedules", "at least one schedule", "none")
    figure, axes = _axes(9.0, 3.4)
    steps, sigma = len(grid), grid.sigma.tolist()
    colors = (BLUE, ORANGE, *_MORE)
    axes.axhline(0, color=MUTED, linewidth=1)
    if band is not None:
        known = np.flatnonzero(np.isfinite(sigma))[::-1]
        axes.axvspan(*np.interp(sorted(band, reverse=True), np.asarray(sigma)[known], known), color=GRID, alpha=0.6)
    ends = []
    for index, (name, w) in enumerate(weights.items()):
        color, style = colors[index % len(colors)], ("-", (0, (5, 2)), (0, (1, 1.5)))[index // len(colors) % 3]
        axes.step(np.arange(steps + 1), [*w, w[-1]], where="post", color=color, linewidth=2, linestyle=style)
        ends.append((float(w[-1]), name, color, float(steps)))
    shown = np.unique(np.linspace(0, steps, min(steps, 8) + 1).round().astype(int))
    axes.set_xticks(shown, [f"{sigma[step]:.3g}".replace("inf", "\u221e") for step in shown])
    axes.set_xlabel("noise sigma where a step starts (left: pure noise, right: the data)", color=MUTED, fontsize=9)
    axes.set_ylabel("guidance weight w", color=MUTED, fontsize=9)
    axes.margins(x=0.01)
    _end_labels(figure, axes, ends)
    told = "; ".join(f"{name}: {schedule.describe()}" for name, (_, schedule) in zip(weights, read, strict=True))
    figure.set_label(f"Guidance weight over {steps} steps. {told}.")
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot and its global state, drawn by Agg."""
    require("matplotlib.backends.backend_agg")
    return require("matplotlib.figure").Figure(figsize=(width, height), facecolor=PAGE)  # type: ignore[no-any-return]


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = _figure(width, height)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(facecolor="none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_edgecolor(GRID)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _images(name: str, value: Any, count: int) -> np.ndarray:
    array = value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value, dtype=float)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or len(array) != count or array.shape[1] not in (1, 3):
        raise InputError.of(name, f"images [{count}, 1 or 3, H, W]", tuple(array.shape))
    if not np.isfinite(array).all():
        raise InputError.of(name, "finite values", "NaN or infinity")
    return np.broadcast_to(array, (count, 3, *array.shape[2:])).transpose(0, 2, 3, 1).clip(0, 1)


def _cell(axes: Any, image: np.ndarray, x: float, y: float, size: float, *, wrong: bool) -> None:
    """An image in the middle of a square, with its aspect ratio kept; a signal of a few lines fills the square."""
    patches = require("matplotlib.patches")
    longest = max(image.shape[:2])
    height, width = (size * side / longest if 4 * min(image.shape[:2]) >= longest else size for side in image.shape[:2])
    x, y = x + (size - width) / 2, y + (size - height) / 2
    rounded = patches.BoxStyle.Round(pad=0, rounding_size=0.07)
    frame = patches.FancyBboxPatch(
        (x, y),
        width,
        height,
        rounded,
        facecolor="none",
        edgecolor=RED if wrong else GRID,
        linewidth=1.8 if wrong else 0.8,
    )
    axes.add_patch(frame)
    shown = axes.imshow(image, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto", zorder=0.5)
    shown.set_clip_path(frame)
    if wrong:
        at = (x + width - 0.11, y + 0.11)
        axes.add_patch(patches.Circle(at, 0.095, facecolor=RED, edgecolor=PAGE, linewidth=1, zorder=4))
        axes.plot(*at, marker="x", markersize=4.2, markeredgewidth=1.4, color=PAGE, zorder=5)


def _grid_text(images: Mapping[str, Any], prompts: Sequence[str], judged: Mapping[str, list[bool]]) -> str:
    texts = [prompt for prompt in prompts if prompt]
    text = f"Samples of {', '.join(label(name) for name in images)}"
    text += f" for the prompts {', '.join(texts)}." if texts else "."
    for name, verdict in judged.items():
        missed = [prompt for prompt, right in zip(prompts, verdict, strict=True) if not right]
        shown = ", ".join(missed) if any(missed) else str(len(missed) or "none")
        text += f" {label(name)} wrong: {shown}."
    return text


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centered running mean of the logarithms over 5 % of the points, fewer at the ends."""
    half = max(len(values) // 40, 1)
    logs = np.log(np.maximum(values, np.finfo(float).tiny))
    windows = [logs[max(0, i - half) : i + half + 1] for i in range(len(logs))]
    return np.exp([window.mean() for window in windows])


def _log_ticks(axes: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers."""
    ticker = require("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _end_labels(figure: Figure, axes: Any, ends: list[tuple[float, str, str, float]]) -> None:
    """Names at the ends of their lines, moved apart if they would overlap."""
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    lowest = -np.inf
    lettering = Lettering(label(name) for _, name, _, _ in ends)
    bold = {"fontsize": 9, "weight": "bold", **lettering.style}
    for value, name, color, x in sorted(ends):
        position = axes.transData.transform((x, value))[1] * points
        offset = max(0.0, lowest + 13 - position)
        lowest = position + offset
        text, _, _ = lettering.fit(label(name), 2.0, **bold)
        axes.annotate(text, (x, value), (8, offset), textcoords="offset points", color=color, va="center", **bold)


def _exchange(figure: Figure, colors: Mapping[str, str]) -> None:
    to_hex, to_rgba = (getattr(require("matplotlib.colors"), name) for name in ("to_hex", "to_rgba"))

    def exchanged(color: Any) -> Any:
        if isinstance(color, str) and color.lower() in ("none", "auto", "inherit"):
            return color
        rgba = to_rgba(color)
        return to_rgba(colors.get(to_hex(rgba), to_hex(rgba)), rgba[3])

    for artist in figure.findobj():
        for name in ("color", "markeredgecolor", "markerfacecolor", "facecolor", "edgecolor"):
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or put is None:
                continue
            value = get()
            several = isinstance(value, np.ndarray) and value.ndim == 2
            put([exchanged(color) for color in value] if several else exchanged(value))
