"""The report of a compression: one HTML file without links, for people who were not there."""

from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from denselab._version import __version__
from denselab.compress.layer_table import COLUMNS, Layer, layer_cells
from denselab.compress.pipeline import Outcome
from denselab.files import atomic_path

_WEIGHT, _ACTIVATION, _MUTED = "#2a6f97", "#e07a1f", "#8a8f98"
_NAMES_SHOWN = 60
_TEXT_COLUMNS = 3

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1d2129; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; } td, th { padding: 0.2rem 0.9rem 0.2rem 0; text-align: left; }
th { border-bottom: 1px solid #c9ccd2; vertical-align: bottom; } td { vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.warning { background: #fff1e0; border-left: 4px solid #e07a1f; padding: 0.5rem 1rem; }
.note { color: #5b616b; font-size: 0.9rem; } svg { max-width: 100%; height: auto; }
"""


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(to_html(outcome), "utf-8")


def to_html(outcome: Outcome) -> str:
    """The whole page."""
    receipt = outcome.receipt
    warnings = "".join(f'<p class="warning">{escape(_sentence(each))}</p>' for each in receipt.warnings())
    facts = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in receipt.rows())
    parts = [
        f"<h1>{escape(outcome.subject)}, compressed</h1>",
        f'<p class="note">{escape(str(outcome.out))}, by DenseLab {__version__}; stages in '
        f"{escape(str(outcome.work))}.</p>",
        f"<p>{escape(_summary(outcome))}</p>",
        warnings,
        f"<h2>Receipt</h2><div class='wide'><table>{facts}</table></div>",
        *(_layer_parts(outcome) if outcome.layers else ()),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(outcome.subject)}, compressed'
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def bits_figure(layers: Sequence[Layer]) -> Figure:
    """Bits of both operands of every layer, in order of execution."""
    figure, axes = _axes(len(layers), 2.6)
    places = range(len(layers))
    weights = [layer.first_bits if layer.first == "weight" else None for layer in layers]
    axes.bar(places, [each or 0 for each in weights], width=0.7, color=_WEIGHT, label="weights")
    for offset, choose in ((-0.18, 0), (0.18, 1)):
        values = [_activation_bits(layer)[choose] for layer in layers]
        shown = [
            (place + (offset if _two(layer) else 0), value)
            for place, value, layer in zip(places, values, layers, strict=True)
            if value
        ]
        if shown:
            axes.scatter(
                *zip(*shown, strict=True), s=16, color=_ACTIVATION, zorder=3, label="activations" if choose else None
            )
    axes.set_ylabel("bits")
    axes.set_ylim(0, 8.6)
    axes.legend(frameon=False, ncol=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    _name_layers(axes, layers)
    return figure


def relevance_figure(layers: Sequence[Layer]) -> Figure:
    """Share of relevance of every layer above, its error below."""
    figure = Figure(figsize=(_width(len(layers)), 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    places = range(len(layers))
    upper.bar(places, [100 * layer.relevance for layer in layers], color=_WEIGHT)
    upper.set_ylabel("relevance, %")
    off = [(place, max(100 * layer.error, 1e-4)) for place, layer in enumerate(layers) if layer.error]
    lower.bar([place for place, _ in off], [error for _, error in off], color=_ACTIVATION)
    lower.set_yscale("log")
    lower.set_ylabel("error, %")
    for axes in (upper, lower):
        _plain(axes)
    _name_layers(lower, layers)
    return figure


def sensitivity_figure(layers: Sequence[Layer]) -> Figure:
    """What every layer loses at its bits."""
    figure, axes = _axes(len(layers), 2.6)
    known = [(place, layer.loss) for place, layer in enumerate(layers) if layer.loss]
    axes.bar([place for place, _ in known], [loss for _, loss in known], color=_WEIGHT)
    axes.set_yscale("log")
    axes.set_ylabel("change of the answer")
    _name_layers(axes, layers)
    return figure


def curve_figure(outcome: Outcome) -> Figure:
    """Expected loss against bytes of the parameters, and the plan that was chosen."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    unit, many = ("MB", 1e6) if outcome.curve[-1].bytes >= 1e6 else ("kB", 1e3)
    axes.plot([each.bytes / many for each in outcome.curve], [each.loss for each in outcome.curve], "o-", color=_WEIGHT)
    for each in outcome.curve:
        axes.annotate(
            each.budget.replace("bits", " bits"),
            (each.bytes / many, each.loss),
            (4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    if outcome.chosen is not None:
        axes.plot(outcome.chosen.bytes / many, outcome.chosen.loss, "D", color=_ACTIVATION, label="this plan", zorder=3)
        axes.legend(frameon=False)
    if all(each.loss > 0 for each in outcome.curve):
        axes.set_yscale("log")
    axes.set_xlabel(f"size of the parameters, {unit}")
    axes.set_ylabel(f"loss expected by {outcome.importance}")
    _plain(axes)
    return figure


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _summary(outcome: Outcome) -> str:
    """What came of it, in two or three sentences."""
    receipt = outcome.receipt
    share = receipt.file_bytes / receipt.float_bytes
    text = (
        f"The file takes {receipt.file_bytes} bytes, {share:.3f} of the same network in float32. "
        f"{100 * receipt.same_as_float:.2f} % of its answers on {receipt.photos} photos ({receipt.photos_of}) are "
        "those of the float network."
    )
    if not receipt.small_ms:
        return text
    engine = min(receipt.small_ms, key=receipt.small_ms.__getitem__)
    height, width = receipt.photo_hw
    return (
        f"{text} {engine} is the fastest engine: {receipt.small_ms[engine]:.2f} ms for one photo of {width}x{height} "
        f"px, where the float network takes {receipt.float_ms[engine]:.2f} ms."
    )


def _layer_parts(outcome: Outcome) -> tuple[str, ...]:
    heads = "".join(
        f"<th{' class=number' if place >= _TEXT_COLUMNS else ''}>{escape(each)}</th>"
        for place, each in enumerate(COLUMNS)
    )
    rows = "".join(_row(layer) for layer in outcome.layers)
    measured = any(layer.loss is not None for layer in outcome.layers)
    sensitivity = "" if measured else " Sensitivity was not measured, as the budget left nothing to choose."
    return (
        "<h2>Bits per layer</h2><p class='note'>Bars are weights, dots are activations. What has neither is computed "
        f"in float.</p>{_svg(bits_figure(outcome.layers), 'Bits of the weights and activations of every layer')}",
        f"<h2>Relevance and error</h2><p class='note'>Relevance, by {escape(outcome.relevance_method)}, is the share "
        "of all relevance that what a layer reads carries. Error is the sum of the relative squared errors of what it "
        f"reads.</p>{_svg(relevance_figure(outcome.layers), 'Relevance and error of every layer')}",
        _sensitivity_part(outcome) if measured else "",
        _curve_part(outcome),
        f"<h2>Layers</h2><p class='note'>Sensitivity is how far the answer moves when the operands of this layer, and "
        f"of those that share its input, are quantized and the rest is float.{sensitivity}</p>"
        f"<div class='wide'><table><tr>{heads}</tr>{rows}</table></div>",
    )


def _sensitivity_part(outcome: Outcome) -> str:
    text = (
        "Bars show how far the answer moves when one layer alone takes the bits of the plan: for classes the KL "
        "divergence in nats, for depth the relative squared error, for normals 1 - cosine."
    )
    figure = _svg(sensitivity_figure(outcome.layers), "Sensitivity of every layer")
    return f"<h2>Sensitivity</h2><p class='note'>{text}</p>{figure}"


def _curve_part(outcome: Outcome) -> str:
    if len(outcome.curve) < 2:
        return ""
    scores = "".join(
        f"<p>Measured: {escape(each.name)} {each.before:.4f} at {outcome.receipt.float_bytes} bytes in float, "
        f"{each.after:.4f} at {outcome.receipt.file_bytes} bytes.</p>"
        for each in outcome.receipt.scores or ()
    )
    text = (
        "Every point is the plan of least loss for so many mean bits of weights and of activations alike (a budget of "
        "bytes leaves activations at 8). The loss is expected, a sum over layers measured "
        "one at a time; only what the receipt says was measured of a whole file."
    )
    figure = _svg(curve_figure(outcome), "Expected loss against bytes of the parameters")
    return f"<h2>Size against loss</h2><p class='note'>{text}</p>{figure}{scores}"


def _row(layer: Layer) -> str:
    cells = layer_cells(layer)
    text = "".join(f"<td>{escape(each)}</td>" for each in cells[:_TEXT_COLUMNS])
    return f"<tr>{text}{''.join(f'<td class=number>{escape(each)}</td>' for each in cells[_TEXT_COLUMNS:])}</tr>"


def _two(layer: Layer) -> bool:
    return layer.first != "weight"


def _activation_bits(layer: Layer) -> tuple[int | None, int | None]:
    return (layer.first_bits if _two(layer) else None), layer.second_bits


def _width(layers: int) -> float:
    return min(max(5.0, 0.16 * layers + 1.2), 14.0)


def _axes(layers: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_width(layers), height + 1.2), layout="constrained")
    axes: Any = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb")
    axes.set_axisbelow(True)


def _name_layers(axes: Any, layers: Sequence[Layer]) -> None:
    """Names where there is room for them, else the number in order of execution."""
    if len(layers) > _NAMES_SHOWN:
        axes.set_xlabel("layer, in order of execution")
        return
    axes.set_xticks(range(len(layers)), [_short(layer.name) for layer in layers], rotation=90, fontsize=6)
    axes.set_xlim(-0.8, len(layers) - 0.2)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element of the page, the same for the same figure. label: for who does not see it."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "denselab", "font.family": "DejaVu Sans"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return f'<svg role="img" aria-label="{escape(label)}"{text.getvalue().partition("<svg")[2]}'
