"""What `appliance profile` found, as one page for a browser: before and after, what was measured, and how well that
told what came live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import chain, count
from string import ascii_uppercase
from typing import Any

from appliance.lab.pages import Bar, Curve, Marked, bars, curves, document, notes, seconds, section, table, tile

Found = Mapping[str, Any]
_PLOTTED = 6
"""Architectures whose runs are drawn, the worst fit first; the table has all."""
_DEFAULT, _CHOSEN = "default", "chosen"

_FITS = (
    "A batch of n pictures takes K·n + B. Points were measured, lines were fitted to them; the error is the median "
    "distance. Predictions go by the points, and by K beyond the last."
)
_MEMORY = "Pictures per second of the chosen settings with less memory and with more, as predicted."
_IMPORTANCES = "How much of the difference between good and bad predictions each setting accounts for."
_SCATTER = (
    "Each point is a lap: to the right what was predicted, upwards what came live; red is the default, blue what was "
    "chosen. On the line both are the same; what the search needs is that a higher prediction comes higher live."
)
_LAPS = "Pictures per second, live; the mark is what was predicted."
_CONTENTION = (
    "How many times as long a run takes beside others, and how quickly loads come, as measured here. Where serving the "
    "defaults for a moment showed that runs beside each other take far longer or shorter, it is corrected by that."
)


def page(found: Found) -> str:
    """One file of HTML, which is also XML."""
    box = found["hardware"]
    share = f"{found['weights_bytes'] / 1e6:,.0f} MB of weights in {found['memory_bytes'] / 1e6:,.0f} MB of memory"
    content = f"""<h1>{escape(_headline(found))}</h1>
<p>{escape(found["workload"])}, for {escape(found["objective"])}: {found["requests"]:,} pictures for
{found["experts"]:,} experts, {share}.
{escape(box["processor"])}, {box["cores"]} cores, {escape(", ".join((*box["gpus"], box["runtime"])))}.</p>
{_incomplete(found)}
<div class="tiles">{"".join(_tiles(found))}</div>
{"".join(_sections(found))}"""
    return document(f"Profile of {found['workload']}", content)


def _headline(found: Found) -> str:
    if not found["default_live"]:
        return "Nothing was served live"
    now, before = _reached(found, found["live"]), _reached(found, found["default_live"])
    said = {"p99": f"99 % of the pictures waited {now} at most", "deadlines": f"{now} came late"}
    after = said.get(found["objective"], f"{now} pictures per second")
    return f"{after}, by default" if found["settings"] == found["default"] else f"{after}, {before} by default"


def _reached(found: Found, live: Mapping[str, float]) -> str:
    """What the objective asks for."""
    match found["objective"]:
        case "p99":
            return seconds(live["wait_p99_seconds"])
        case "deadlines":
            return f"{live['late_share']:.2%}"
    return f"{live['images_per_second']:.1f}"


def _now(found: Found) -> float:
    return float(found["live"].get("images_per_second", 0.0))


def _before(found: Found) -> float:
    return float(found["default_live"].get("images_per_second", 0.0))


def _incomplete(found: Found) -> str:
    if found["complete"]:
        return ""
    return "<p><strong>Interrupted: this is what was known by then. The same command goes on from there.</strong></p>"


_REACHED = {"p99": "99 % waited at most", "deadlines": "late"}


def _tiles(found: Found) -> Iterator[str]:
    if (name := _REACHED.get(found["objective"])) and found["default_live"]:
        yield tile(_reached(found, found["default_live"]), f"{name}, live by default")
        if found["settings"] != found["default"]:
            yield tile(_reached(found, found["live"]), f"{name}, live as chosen")
    if _before(found):
        yield tile(f"{_before(found):.1f} /s", "live by default")
    if _before(found) and found["settings"] != found["default"]:
        yield tile(f"{_now(found):.1f} /s", "live as chosen")
        yield tile(f"{_now(found) / _before(found):.2f} &#215;", "as many as by default")
    yield tile(f"{found['predicted_images_per_second']:.1f} /s", "predicted as chosen")
    searched = f"configurations searched, {found['configurations_confirmed_live']} served live"
    yield tile(f"{found['trials']:,}", searched)


def _sections(found: Found) -> Iterator[str]:
    yield section("Settings", _changed(found), _settings(found))
    if found["laps"]:
        names = _names(found)
        yield section("Laps by round", _LAPS, _lap_bars(found, names))
        yield section("Predicted and live", _SCATTER, _scatter(found, names))
        yield section("All laps", "", _lap_table(found, names) + _legend(found, names))
    if found["importances"]:
        yield section("What matters", _IMPORTANCES, _importances(found))
    if found["memory_curve"]:
        yield section("Memory", _MEMORY, _memory(found))
    if found["fits"]:
        yield section("What runs take", _FITS, "".join(_fit_plots(found)) + _fit_table(found))
    yield section("Loads, and runs beside each other", _CONTENTION, _loading(found) + _contention(found))
    yield section("How it was found", "", _how(found))


def _changed(found: Found) -> str:
    if found["settings"] == found["default"]:
        return escape(found["why_default"])
    return f"Changed: {escape(found['changed'])}."


def _settings(found: Found) -> str:
    changed = [name for name, value in found["settings"].items() if value != found["default"][name]]
    rows = (
        ("ours" if name in changed else "", (name, f"{found['default'][name]:.3g}", f"{value:.3g}"))
        for name, value in found["settings"].items()
    )
    return table(("setting", _DEFAULT, _CHOSEN), rows)


def _names(found: Found) -> dict[str, str]:
    """Of each configuration that was served live, by its settings: the default, the chosen one, and letters."""
    names = {_key(found["settings"]): _CHOSEN, _key(found["default"]): _DEFAULT}
    served = dict.fromkeys(_key(lap["settings"]) for lap in found["laps"])
    letters = chain(ascii_uppercase, map(str, count(1)))
    return {key: names.get(key) or next(letters) for key in served}


def _key(settings: Mapping[str, Any]) -> str:
    return repr(sorted(settings.items()))


def _kind(name: str) -> str:
    return {_DEFAULT: "plain", _CHOSEN: "ours"}.get(name, "other")


def _lap_bars(found: Found, names: Mapping[str, str]) -> str:
    rows = []
    for lap in found["laps"]:
        name, rate = names[_key(lap["settings"])], lap["images_per_second"]
        predicted = lap["predicted_images_per_second"]
        rows.append(Bar(f"{lap['round'] + 1}: {name}", _kind(name), rate, f"{rate:.1f} /s", predicted))
    return bars(rows)


def _scatter(found: Found, names: Mapping[str, str]) -> str:
    spots: dict[str, list[tuple[float, float]]] = {}
    for lap in found["laps"]:
        spot = (lap["predicted_images_per_second"], lap["images_per_second"])
        spots.setdefault(names[_key(lap["settings"])], []).append(spot)
    most = max(min(x, y) for points in spots.values() for x, y in points)
    drawn = [Curve(name, _kind(name), points, ()) for name, points in spots.items()]
    return curves([Curve("", "bound", (), ((0.0, 0.0), (most, most))), *drawn], " /s", " /s")


def _lap_table(found: Found, names: Mapping[str, str]) -> str:
    heads = ("round", "settings", "predicted", "live", "wait p99", "late", "loads")
    lines = []
    for lap in found["laps"]:
        name = names[_key(lap["settings"])]
        cells = (
            str(lap["round"] + 1),
            name,
            f"{lap['predicted_images_per_second']:.1f}",
            f"{lap['images_per_second']:.1f}",
            seconds(lap["wait_p99_seconds"]),
            f"{lap['late_share']:.1%}",
            f"{lap['loads']:,}",
        )
        lines.append((_kind(name), cells))
    return table(heads, lines)


def _legend(found: Found, names: Mapping[str, str]) -> str:
    """In what the configurations that were served live are other than the default."""
    usual, served = found["default"], {_key(lap["settings"]): lap["settings"] for lap in found["laps"]}
    others = {names[key]: settings for key, settings in served.items() if settings != usual}
    return notes(
        f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in settings.items() if value != usual[key])}"
        for name, settings in others.items()
    )


def _importances(found: Found) -> str:
    return bars([Bar(name, "ours", share, f"{share:.0%}") for name, share in found["importances"].items()])


def _memory(found: Found) -> str:
    points = [(point["memory_bytes"] / 1e6, point["images_per_second"]) for point in found["memory_curve"]]
    here = found["memory_bytes"] / 1e6
    return curves([Curve(_CHOSEN, "ours", points, points)], " MB", " /s", here=Marked(here, "this box"))


def _fit_plots(found: Found) -> Iterator[str]:
    """A plot per architecture, a line per number of threads; what is compiled for GPUs has others."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for fit in sorted(found["fits"], key=lambda fit: -fit["fit_error"]):
        groups.setdefault(fit["architecture"], []).append(fit)
    for fits in list(groups.values())[:_PLOTTED]:
        drawn = [_fitted(fit, found["settings"]["threads"]) for fit in fits]
        most = max(sample["items"] for fit in fits for sample in fit["samples"])
        yield f"<p>{escape(fits[0]['expert'])}</p>{curves(drawn, '', ' ms', right=most)}"
    if len(groups) > _PLOTTED:
        yield f"<p>The {_PLOTTED} worst fits of {len(groups)} architectures are drawn.</p>"


def _runner(fit: Mapping[str, Any]) -> str:
    if fit["device"] == "cuda":
        return "GPU"
    return _threads(fit["threads"]) + (" in int8" if fit["precision"] == "int8" else "")


def _fitted(fit: Mapping[str, Any], threads: int) -> Curve:
    points = [(sample["items"], sample["seconds"] * 1e3) for sample in fit["samples"]]
    ends = (0, points[-1][0])
    line = [(n, (fit["item_seconds"] * n + fit["fixed_seconds"]) * 1e3) for n in ends]
    kind = "ours" if fit["device"] == "cuda" or fit["threads"] == threads else "other"
    return Curve(_runner(fit), kind, points, line)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _fit_table(found: Found) -> str:
    heads = (
        "architecture of",
        "runs on",
        "K",
        "B",
        "error",
        "worst",
        "best batch",
        "a picture's activations",
        "waited",
    )
    return table(heads, [("", _fit_cells(fit)) for fit in found["fits"]])


def _fit_cells(fit: Mapping[str, Any]) -> Sequence[str]:
    return (
        fit["expert"],
        _runner(fit),
        f"{fit['item_seconds'] * 1e3:.2f} ms",
        f"{fit['fixed_seconds'] * 1e3:.2f} ms",
        f"{fit['fit_error']:.1%}",
        f"{fit['worst_error']:.1%}",
        str(fit["best_batch"]),
        f"{fit['activation_item_bytes'] / 1e6:.1f} MB",
        f"{fit['waited_share']:.0%}",
    )


def _loading(found: Found) -> str:
    tiers = {"disk": found["loading"]}
    if found["gpu"] is not None:
        tiers |= {"disk to a GPU": found["gpu"]["from_disk"], "host memory to a GPU": found["gpu"]["from_host"]}
    rows = [row for tier, loading in tiers.items() if loading["bytes_per_second"] for row in _rates(tier, loading)]
    return table(("loads from", "", ""), [("", row) for row in rows])


def _rates(tier: str, loading: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for at_once, rate in loading["bytes_per_second"].items():
        yield tier, f"{at_once} at once", f"{rate / 1e9:.2f} GB/s"
    yield tier, "before the first byte", f"{loading['fixed_seconds'] * 1e3:.2f} ms"


def _contention(found: Found) -> str:
    lines = [
        ("", (_threads(one["threads"]), f"{executors} at work", f"{times:.2f} times"))
        for one in found["contention"]
        for executors, times in one["beside_runs"].items()
    ]
    lines += [
        ("", (_threads(one["threads"]), "all at work beside loads", f"{one['beside_loads']:.2f} times more"))
        for one in found["contention"]
    ]
    if (gpu := found["gpu"]) is not None:
        lines += [
            ("", ("GPU", "beside all cores at work", f"{gpu['beside_cpu']:.2f} times")),
            ("", ("GPU", "beside loads", f"{gpu['beside_loads']:.2f} times")),
            ("", ("all cores", "beside a GPU at work", f"{gpu['cpu_beside']:.2f} times")),
        ]
    return table(("runs of", "beside", "as long"), lines) if lines else ""


def _how(found: Found) -> str:
    said = [
        f"{found['seconds']:.0f} s of {found['budget_seconds']:.0f} s; {found['trials']:,} configurations in the "
        f"simulator, with what was measured here; the best of them live, {found['requests_per_lap']:,} pictures a lap "
        f"of a workload of {found['requests']:,}: real sessions, real reads, the same controller. Between two batches "
        f"an executor waits {found['handover']['fixed_seconds'] * 1e3:.2f} ms, and "
        f"{found['handover']['item_seconds'] * 1e3:.2f} ms for each picture that is answered.",
        "After the first round, the best so far is served beside the default again, by turns first and last. What was "
        "not better than the default in more than half of the rounds that both were in is not chosen. Rates are "
        "medians over rounds.",
        "Waited is the part of their time for which runs that should have been alone waited for a processor: more than "
        "a few hundredths say that something else was at work, and that predictions are off.",
        f"Written to {found['profile_path']}.",
        *(f"Not measured: {name}: {why}" for name, why in found["failed"].items()),
    ]
    return notes(said)
