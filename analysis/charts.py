"""The report's charts as Vega-Lite specifications, and the library that draws them in a browser.

A chart names its fields (id, kind, x, y, …) and the page gives it rows, of a finished study or of one that runs. The
parameters `lit` (the arm under the pointer, -1 for none; `kind` is its kind) and `picked` (arms that were brushed, none
for all) are the same in all charts, so that what is chosen in one is seen in the others.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from sweeper import installation

from .shown import Looks
from .style import FADED

Spec = dict[str, Any]

# Vega's names of the figures' markers; those that it lacks are outlines in a square from -1 to 1
SHAPES = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "P": "cross",
    "X": "M-.9,-.5L-.5,-.9L0,-.4L.5,-.9L.9,-.5L.4,0L.9,.5L.5,.9L0,.4L-.5,.9L-.9,.5L-.4,0Z",
    "*": "M0,-1.1L.26,-.36L1.05,-.34L.42,.14L.65,.89L0,.44L-.65,.89L-.42,.14L-1.05,-.34L-.26,-.36Z",
}  # fmt: skip
LINES: dict[str, list[float]] = {"-": [], "--": [6, 3], ":": [2, 2], "-.": [6, 2, 2, 2]}
SEEN = "(lit < 0 || lit === datum.id) && (!length(picked) || indexof(picked, datum.id) >= 0)"
OF_KIND = "!length(kind) || kind === datum.kind"
STARTS = {"lit": -1, "kind": "", "picked": [], "front": True}
PARAMS = [{"name": name, "value": value} for name, value in STARTS.items()]


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one JavaScript module, from the wheel of vl-convert-python.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"the report needs vl-convert-python: {installation.install('analysis')}") from None
    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg] # its stub lacks the default
    return text


def specs(looks: Looks) -> dict[str, Spec]:
    """Name -> specification, whose data is called `rows`.

    Args:
        looks: of every kind of arm, as in the figures.
    """
    kind = _by_kind(looks)
    dash = {
        "field": "kind",
        "legend": None,
        "scale": {"domain": [*looks], "range": [_dash(o.line) for o in looks.values()]},
    }
    by_rank = _axis("x", scale={"type": "log", "base": 2}, axis={"format": "~r"})
    rate = _axis("x", scale={"type": "log"}, axis={"format": "~e"})
    return {
        "pareto": _chart(_bars(kind), _front(), _points(kind), _labels()),
        "rank": _chart(_bars(kind), _line(kind, dash, seen=OF_KIND), _points(kind), x=by_rank),
        "rates": _chart(
            _means(kind, dash),
            _points(kind, size=16, opacity=0.35),
            _ring(kind),
            x=rate,
        ),
        "training": _chart(_band(kind), _line(kind, dash, tooltip=True), _brushable()),
        "validation": _chart(_band(kind), _line(kind, dash), _points(kind, size=20)),
        "forest": _forest(),
        "parallel": _parallel(kind, dash),
        "layers": _layers(),
    }  # fmt: skip


def _by_kind(looks: Looks) -> Mapping[str, Spec]:
    domain, range_ = [*looks], [look.colour for look in looks.values()]
    shapes = [SHAPES[look.marker] for look in looks.values()]
    behind = [kind for kind, look in looks.items() if look == FADED]
    return {
        "color": {"field": "kind", "type": "nominal", "legend": None, "scale": {"domain": domain, "range": range_}},
        "shape": {"field": "kind", "type": "nominal", "legend": None, "scale": {"domain": domain, "range": shapes}},
        "order": {"condition": {"test": {"field": "kind", "oneOf": behind}, "value": 0}, "value": 1},
    }  # fmt: skip


def _dash(line: Any) -> list[float]:
    """Matplotlib's line style in pixels."""
    return LINES[line] if isinstance(line, str) else [2.0 * length for length in line[1]]


def _axis(name: str, **more: Any) -> Spec:
    return {"field": name, "type": "quantitative", "scale": {"zero": False}, "title": f"@{name}", **more}


def _opacity(shown: float = 1.0, hidden: float = 0.12, *, seen: str = SEEN) -> Spec:
    return {"condition": {"test": seen, "value": shown}, "value": hidden}


def _chart(*layers: Spec, **encoding: Spec) -> Spec:
    return {
        "width": "container", "height": 300, "data": {"name": "rows"}, "params": PARAMS,
        "encoding": {"x": _axis("x"), "y": _axis("y"), **encoding}, "layer": [*layers],
    }  # fmt: skip


BRUSH = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
DRAG = "[pointerdown[!event.shiftKey], window:pointerup] > window:pointermove!"


def _brush_and_zoom() -> list[Spec]:
    """Shift and drag brushes; drag pans, the wheel with shift or control zooms, so that a page scrolls past a chart."""
    wheel = "wheel![event.shiftKey || event.ctrlKey]"
    brush = {"type": "interval", "on": BRUSH, "translate": BRUSH, "zoom": False, "clear": "dblclick"}
    view = {"type": "interval", "on": DRAG, "translate": DRAG, "zoom": wheel, "clear": "dblclick"}
    return [{"name": "brush", "select": brush}, {"name": "view", "bind": "scales", "select": view}]


def _points(kind: Mapping[str, Spec], *, size: int = 70, opacity: float = 1.0) -> Spec:
    return {
        "mark": {"type": "point", "filled": True, "size": size, "tooltip": {"content": "data"}, "cursor": "pointer"},
        "params": _brush_and_zoom(),
        "encoding": {
            **kind, "opacity": _opacity(opacity),
            "description": {"field": "label"},
            "size": {"condition": {"test": "lit === datum.id", "value": 2.4 * size}, "value": size},
        },
    }  # fmt: skip


def _brushable() -> Spec:
    """Points that cannot be seen, which make a chart of lines alone brushable."""
    return {"mark": {"type": "point", "opacity": 0, "aria": False}, "params": _brush_and_zoom()}


def _bars(kind: Mapping[str, Spec]) -> Spec:
    encoding = {"y": {**_axis("low"), "title": "@y"}, "y2": {"field": "high"}, "color": kind["color"]}
    return {
        "mark": {"type": "rule", "aria": False}, "encoding": encoding | {"opacity": _opacity()},
        "transform": [{"filter": "isValid(datum.low)"}],
    }  # fmt: skip


def _front() -> Spec:
    return {
        "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3], "color": "@quiet", "aria": False},
        "transform": [{"filter": "front && datum.front"}],
    }


def _labels() -> Spec:
    return {
        "mark": {"type": "text", "dx": 7, "dy": -7, "align": "left", "fontSize": 11, "limit": 180, "aria": False},
        "transform": [{"filter": "isValid(datum.text)"}],
        "encoding": {"text": {"field": "text"}, "opacity": _opacity(), "color": {"value": "@ink"}},
    }


def _line(kind: Mapping[str, Spec], dash: Spec, *, tooltip: bool = False, seen: str = SEEN) -> Spec:
    mark: Spec = {"type": "line", "aria": False, "strokeJoin": "round"}
    if tooltip:
        mark |= {"tooltip": {"content": "data"}, "cursor": "pointer"}
    wide = {"condition": {"test": "lit === datum.id", "value": 3}, "value": 1.4}
    encoding = {"color": kind["color"], "strokeDash": dash, "detail": {"field": "line"}, "opacity": _opacity(seen=seen)}
    return {"mark": mark, "encoding": encoding | {"strokeWidth": wide}}


def _means(kind: Mapping[str, Spec], dash: Spec) -> Spec:
    """A line an arm through its mean at each `x`."""
    mean = {"aggregate": [{"op": "mean", "field": "mean", "as": "y"}], "groupby": ["id", "kind", "x"]}
    line = _line(kind, dash)
    return line | {"transform": [mean], "encoding": line["encoding"] | {"detail": {"field": "id"}}}


def _band(kind: Mapping[str, Spec]) -> Spec:
    encoding = {"y": {**_axis("low"), "title": "@y"}, "y2": {"field": "high"}, "color": kind["color"]}
    shade = {"opacity": _opacity(0.15, 0.0), "detail": {"field": "id"}}
    return {"mark": {"type": "area", "aria": False}, "encoding": encoding | shade}


def _ring(kind: Mapping[str, Spec]) -> Spec:
    encoding = {"y": {**_axis("mean"), "title": "@y"}, "color": kind["color"], "opacity": _opacity()}
    return {
        "mark": {"type": "point", "size": 160, "filled": False, "aria": False},
        "transform": [{"filter": "datum.chosen"}], "encoding": encoding,
    }  # fmt: skip


def _forest() -> Spec:
    """A row a comparison: `id` and `other` are its arms."""
    seen = SEEN.replace("datum.id", "datum.other")
    opacity = {"condition": {"test": f"({SEEN}) || ({seen})", "value": 1}, "value": 0.12}
    colour = {"condition": {"test": "datum.significant", "value": "@link"}, "value": "@quiet"}
    row = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220}}
    spec = _chart(
        {"mark": {"type": "rule", "color": "@quiet", "aria": False}, "encoding": {"x": {"datum": 0}, "y": None}},
        {
            "mark": {"type": "rule", "aria": False, "strokeWidth": 1.6},
            "encoding": {"x": _axis("low", title="@x"), "x2": {"field": "high"}, "opacity": opacity, "color": colour},
        },
        {
            "mark": {"type": "point", "tooltip": {"content": "data"}, "size": 55, "cursor": "pointer", "filled": True},
            "encoding": {"opacity": opacity, "color": colour, "description": {"field": "label"}},
        },
        y=row,
    )
    return spec | {"height": {"step": 18}}


def _parallel(kind: Mapping[str, Spec], dash: Spec) -> Spec:
    """`y` from 0 to 1 on each of the axes `x`; `text` at their ends."""
    x = {"field": "x", "type": "nominal", "sort": None, "title": None, "scale": {"type": "point"},
         "axis": {"grid": True, "labelAngle": -25, "labelLimit": 130, "domain": False}}  # fmt: skip
    y = {"field": "y", "type": "quantitative", "title": None, "axis": None, "scale": {"domain": [-0.06, 1.06]}}
    brush = _brush_and_zoom()[0]
    brush["select"] |= {"on": DRAG, "translate": DRAG}
    points = {"mark": {"type": "point", "opacity": 0, "aria": False, "tooltip": {"content": "data"}}, "params": [brush]}
    ends = {
        "mark": {"type": "text", "fontSize": 10, "aria": False}, "transform": [{"filter": "isValid(datum.end)"}],
        "encoding": {"text": {"field": "end"}, "color": {"value": "@quiet"},
                     "yOffset": {"condition": {"test": "datum.y > 0.5", "value": -10}, "value": 10}},
    }  # fmt: skip
    return _chart(_line(kind, dash, tooltip=True), points, ends, x=x, y=y)


def _layers() -> Spec:
    cell = {"type": "rect", "tooltip": {"content": "data"}, "stroke": "@paper", "strokeWidth": 0.5}
    scale = {"scheme": "cividis", "zero": True}
    colour = {"field": "value", "type": "quantitative", "title": "@value", "scale": scale}
    spec = _chart(
        {"mark": cell, "encoding": {"color": colour}},
        x={"field": "x", "type": "ordinal", "title": "layer", "axis": {"labelAngle": 0, "labelOverlap": True}},
        y={"field": "y", "type": "nominal", "title": None, "sort": None},
    )  # fmt: skip
    return spec | {"height": {"step": 20}}
