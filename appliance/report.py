"""What commands found, as tables and plain words for people. `--json` prints the same dictionaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

COLOURS = {
    "pass": "green",
    "fail": "bold red",
    "error": "magenta",
    "late": "yellow",
    "rejected": "magenta",
    "incomplete": "yellow",
}
MOST_WORDS = 8
"""Of what was found, in one line."""
MOST_FITS = 8
"""Architectures whose latency model is shown on a terminal, the worst first."""


def print_check(found: Mapping[str, Any], console: Console) -> None:
    table = _facts()
    table.add_row("catalogue", escape(found["catalog"]))
    table.add_row("experts", f"{found['experts']} of {found['architectures']} architectures")
    table.add_row("components, products", f"{found['components']}, {len(found['products'])}")
    table.add_row("weights", megabytes(found["weights_bytes"]))
    table.add_row("budget", f"{megabytes(found['budget_bytes'])} ({found['budget_share']:.0%} of the weights)")
    gpus = ", ".join(found["gpus"]) or "no GPU"
    for name, size in found["gpu_budgets_bytes"].items():
        table.add_row(f"budget of {name}", megabytes(size))
    table.add_row("machine", f"{megabytes(found['memory_bytes'])} of memory for this process, {gpus}")
    table.add_row("executors", ", ".join(found["executors"]))
    table.add_row("runs", _runs(found))
    table.add_row("compiled experts", escape(found["store"]))
    table.add_row("int8", _int8(found["int8"]))
    table.add_row("profile", escape(found["profile"]))
    console.print(table)
    console.print(escape(found["graph"]), soft_wrap=True, highlight=False)
    if found["products"]:
        _print_products(found["products"], console)
    if found["budget_bytes"] < found["configured_budget_bytes"]:
        asked = megabytes(found["configured_budget_bytes"])
        given = megabytes(found["budget_bytes"])
        says = f"memory.weights is {asked}, and there is memory for {given}: lower it"
        console.print(f"[red]{says}[/red]", soft_wrap=True)
    if found["profile_trouble"]:
        console.print(f"[red]{escape(found['profile_trouble'])}[/red]", soft_wrap=True)
    for name, why in found["gpu_trouble"].items():
        console.print(f"[red]{name} is not used:[/red] {escape(why)}")
    for name, why in found["int8"]["refused"].items():
        says = f"[red]{name} serves in full precision, not in int8[/red] ({why['reason']}): {escape(why['detail'])}"
        console.print(says, soft_wrap=True)
    for name, why in found["gpu_unavailable"].items():
        says = f"[red]{name} runs on no GPU[/red] ({why['reason']}): {escape(why['detail'])}"
        console.print(says, soft_wrap=True)
    for name in found["unpinned"]:
        console.print(
            f"[red]{name} is pinned and has no room beside the others: raise memory.weights, or pin fewer[/red]"
        )
    for name in found["too_large"]:
        console.print(f"[red]{name} alone is larger than a budget: raise memory.weights or memory.activations[/red]")
    for name, why in found["unavailable"].items():
        console.print(f"[red]{name} cannot serve[/red] ({why['reason']}): {escape(why['detail'])}")
    for path, reason in found["damaged"].items():
        console.print(f"[yellow]put into quarantine:[/yellow] {escape(path)} {escape(reason)}")
    if found["unused"]:
        console.print(_unused(found["unused"], found["freed_bytes"]))
    if not found["unavailable"] and not found["too_large"]:
        console.print("[green]Everything in the catalogue can serve.[/green]")


def _runs(found: Mapping[str, Any]) -> str:
    """What settings and profile come to, beside what has a line of its own."""
    limits = f"batches of {found['batch_cap']} at most in {megabytes(found['activation_bytes'])}"
    return f"by {_threads(found['threads'])} each, {limits}; {found['load_slots']} loads at once"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _int8(found: Mapping[str, Any]) -> str:
    if found["precision"] == "int8":
        return f"{found['experts']} experts, {megabytes(found['saved_bytes'])} less of networks"
    return f"not asked for (experts.precision); {found['variants']} experts have a variant"


def _print_products(products: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table("product", "experts", "weights", "fits", "loads per board", "images per second")
    for product in products:
        fits = "[green]yes[/]" if product["fits"] else "[yellow]no[/]"
        fits = f"[red]lacks {len(product['unavailable'])}[/]" if product["unavailable"] else fits
        rates = (product["loads_per_board"], product["images_per_second"])
        shown = ("" if rate is None else f"{rate:,.1f}" for rate in rates)
        size = megabytes(product["working_set_bytes"])
        table.add_row(escape(product["name"]), f"{product['experts']:,}", size, fits, *shown)
    console.print(table)
    console.print("One board after another of each product, every picture asking all whom it may lead to.")


def _unused(unused: Mapping[str, int], freed_bytes: int | None) -> str:
    many = f"compiled experts that no bundle names: {len(unused)}, {megabytes(sum(unused.values()))} before sharing"
    names = "\n".join(f"  {escape(name)}" for name in unused)
    if freed_bytes is None:
        return f"[yellow]{many};[/yellow] appliance check --prune removes them\n{names}"
    return f"removed {many}; freed {megabytes(freed_bytes)} (while a service runs, weights stay)\n{names}"


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal for each thing that is counted, gone when it ends; on anything else, nothing."""
    if not console.is_terminal or console.quiet:
        yield lambda what, done, total: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        transient=True,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            shown = f"{megabytes(done)} of {megabytes(total)}" if what == "bytes" else f"{done} of {total}"
            if what not in tasks:
                tasks[what] = bars.add_task("reading the store" if what == "bytes" else "compiling experts", shown="")
            bars.update(tasks[what], completed=done, total=total, shown=shown)

        yield tell


def print_answers(found: Mapping[str, Any], console: Console) -> None:
    table = Table("picture", "verdict", "findings", "ms")
    for answer in found["answers"]:
        table.add_row(escape(answer["file"]), *verdict_cells(answer["body"]), f"{answer['seconds'] * 1000:.0f}")
    console.print(table)
    for name in found["unanswered"]:
        why = "is a box serving this site and root, and may we publish as this line?"
        console.print(f"[red]{escape(name)} got no verdict[/red]: {why}")


def print_simulation(found: Mapping[str, Any], console: Console) -> None:
    table = _facts()
    for name, value in found.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), escape(shown))
    console.print(table)


RULES = {
    "orphaned": "nobody who leads to it was there",
    "least-worth": "it was worth least, and nothing queued kept it",
    "overdue": "queued pictures needed it, but the one it left for was overdue and due before them",
    "pinned": "room was made for an expert that stays",
    "withheld": "the device refused memory and makes do with less",
    "fragmented": "memory was free, but in pieces",
    "commanded": "an operator wanted it",
    "quarantined": "it answered its golden samples wrongly",
    "not-loaded": "its load had failed or was given up",
}
WAITS = {
    "spool": "in the spool: too many others were scheduled, or the box had just started",
    "load slot": "for a load slot: its expert was absent, and all slots loaded others",
    "memory": "for memory: a slot was free, but for its expert, or one whose turn came before, nobody might leave yet",
    "load": "for the load of its expert",
    "executor": "for its executor, which had other work",
    "activations": "for activations: what ran left no room for its batch",
    "run": "while it was looked at",
}


def print_explanation(found: Mapping[str, Any], console: Console) -> None:
    if "request" in found:
        _print_request(found["request"], console)
    elif "span" in found:
        _print_span(found["span"], console)
    else:
        _print_slowest(found, console)


def _print_slowest(found: Mapping[str, Any], console: Console) -> None:
    table = Table("request", "component", "at", "verdict", "waited", "mostly")
    for one in found["slowest"]:
        mostly = f"{one['cause']}: {_seconds(one['cause_seconds'])}"
        times = _seconds(one["arrived_seconds"]), _outcome(one), _seconds(one["waited_seconds"])
        table.add_row(escape(one["request"][:16]), escape(one["component"]), *times, mostly)
    console.print(table)
    for cause, count in found["causes"].items():
        console.print(
            f"{count:,} of {found['requests']:,} requests took most of their time {WAITS[cause]}", soft_wrap=True
        )
    _print_rules(found["evictions_by_rule"], console)


def _outcome(one: Mapping[str, Any]) -> str:
    outcome = one["outcome"]
    if outcome is None:
        return "[bold]no verdict[/]"
    return f"[{COLOURS[outcome]}]{outcome}[/]" + (escape(f" ({one['reason']})") if one["reason"] else "")


def _print_rules(evictions: Mapping[str, int], console: Console) -> None:
    for rule, count in evictions.items():
        console.print(f"{count:,} evictions [bold]{rule}[/]: {RULES[rule]}", soft_wrap=True)


def _print_request(one: Mapping[str, Any], console: Console) -> None:
    table = Table("at", "what", title=f"{one['request']} ({one['component']})", title_justify="left")
    table.add_row(_seconds(one["arrived_seconds"]), "arrived")
    for question in one["questions"]:
        for at, what in _happened(question):
            table.add_row(_seconds(at), what)
    ended = one["answered_seconds"]
    table.add_row("" if ended is None else _seconds(ended), f"{_outcome(one)} after {_seconds(one['waited_seconds'])}")
    console.print(table)
    for wait, seconds in sorted(one["waits"].items(), key=lambda item: -item[1]):
        console.print(f"{_seconds(seconds)} {WAITS[wait]}", soft_wrap=True)


def _happened(question: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """A question's steps in order, each with its second."""
    expert = escape(question["expert"])
    yield question["asked_seconds"], f"asks [bold]{expert}[/], queued on {question['executor']}; {_found(question)}"
    yield question["asked_seconds"], _behind(question)
    for device, there in question["resident"].items():
        yield question["asked_seconds"], escape(f"resident on {device}: {_some(there)}")
    for load in question["loads"]:
        for left in load["evicted"]:
            yield left["at_seconds"], f"[yellow]evicted[/] {escape(left['expert'])}: {RULES[left['rule']]}"
        ahead = " ahead of its need" if load["ahead"] else f" for {load['waiting']} waiting"
        yield load["began_seconds"], f"[cyan]load[/] of {expert} begins{ahead}"
        if load["ended_seconds"] is not None:
            ended = f"fails: {load['failed']}" if load["failed"] else "ends"
            yield (
                load["ended_seconds"],
                f"its load {ended} after {_seconds(load['ended_seconds'] - load['began_seconds'])}",
            )
    waited = ", ".join(f"{_seconds(seconds)} {wait}" for wait, seconds in question["waits"].items() if wait != "run")
    for run in question["runs"]:
        if waited:
            yield run["began_seconds"], f"[dim]has waited: {waited}[/]"
        yield run["began_seconds"], f"[green]runs[/] on {run['executor']} in a batch of {run['pictures']}"
        if run["failed"]:
            yield run["ended_seconds"], f"the run fails: {escape(run['failed'])}"


def _found(question: Mapping[str, Any]) -> str:
    left = question["left_before"]
    if question["found"] != "absent":
        return f"it is {question['found']}"
    if left is None:
        return "it is absent: nobody has loaded it yet"
    whom = f" for {left['for']}" if left["for"] else ""
    return escape(f"it is absent: left at {_seconds(left['at_seconds'])}{whom} ({RULES[left['rule']]})")


def _behind(question: Mapping[str, Any]) -> str:
    batch, groups = question["running"], question["behind"]
    runs = f"runs {batch['pictures']} of {batch['expert']}" if batch else "runs nothing"
    behind = _some([f"{group['pictures']} of {group['expert']}" for group in groups]) if groups else "nobody"
    return escape(f"{question['executor']} {runs}; queued behind {behind}")


def _print_span(span: Mapping[str, Any], console: Console) -> None:
    table = Table("at", "what", title_justify="left")
    table.title = f"from {_seconds(span['since_seconds'])} to {_seconds(span['until_seconds'])}"
    for device, there in span["resident"].items():
        table.add_row(_seconds(span["since_seconds"]), escape(f"resident on {device}: {_some(there, 40)}"))
    for device, there in span["loading"].items():
        if there:
            table.add_row(_seconds(span["since_seconds"]), escape(f"loading on {device}: {_some(there)}"))
    moves = [(left["at_seconds"], 0, _departed(left)) for left in span["evictions"]]
    moves += [(load["began_seconds"], 1, _loads(load)) for load in span["loads"]]
    for at, _, what in sorted(moves):
        table.add_row(_seconds(at), what)
    console.print(table)
    queued = f"{span['queued_at_start']:,} queued at the start, {span['queued_at_most']:,} at most"
    console.print(
        f"{span['verdicts']:,} verdicts, {len(span['loads']):,} loads; {queued}, {span['queued_at_end']:,} last"
    )
    _print_rules(span["evictions_by_rule"], console)


def _departed(left: Mapping[str, Any]) -> str:
    whom = f" for {left['for']}" if left["for"] else ""
    return f"[yellow]evicted[/] {escape(left['expert'] + whom)}: {left['rule']}"


def _loads(load: Mapping[str, Any]) -> str:
    seconds = load["ended_seconds"] and load["ended_seconds"] - load["began_seconds"]
    took = "not ended" if seconds is None else _seconds(seconds)
    why = "ahead" if load["ahead"] else f"for {load['waiting']} waiting"
    return f"[cyan]load[/] of {escape(load['expert'])}, {why}: {load['failed'] or took}"


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "nobody"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"


def print_paper_table(found: Mapping[str, Any], console: Console) -> None:
    tasks = list(dict.fromkeys(cell["task"] for cell in found["cells"]))
    for device in dict.fromkeys(cell["device"] for cell in found["cells"]):
        for what, printed, ours, off in (
            ("images per second", "paper_images_per_second", "images_per_second", "off"),
            ("switches per executor", "paper_switches", "switches_per_executor", "switches_off"),
        ):
            table = Table("policy", *tasks, title=f"{device}: {what}, paper / ours", title_justify="left")
            cells = [cell for cell in found["cells"] if cell["device"] == device and cell[off] is not None]
            for policy in dict.fromkeys(cell["policy"] for cell in cells):
                row = [cell for cell in cells if cell["policy"] == policy]
                table.add_row(policy, *(f"{c[printed]:g} / {c[ours]:.3g} {_apart(c[off])}" for c in row))
            console.print(table)
    console.print(
        f"images per second: {found['mean_off']:.1%} apart on average, {found['worst_off']:.1%} at most; "
        f"switches: {found['mean_switches_off']:.1%} on average"
    )


def print_our_table(found: Mapping[str, Any], lines: Iterable[str], console: Console) -> None:
    """`lines` are Markdown, to be kept as they are: unwrapped and without colours."""
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    (target,) = found["targets"]
    most = found["most_requests_per_wall_second"]
    goal = f"{target['bound']:,.0f} are aimed at: {'met' if target['met'] else 'missed'}"
    console.print(
        f"simulated: {target['value']:,.0f} to {most:,.0f} requests of ours per second; {goal}", soft_wrap=True
    )


def _apart(off: float) -> str:
    return f"[{'green' if abs(off) <= 0.2 else 'red'}]{off:+.0%}[/]"


def print_switching(found: Mapping[str, Any], console: Console) -> None:
    for shape in found["shapes"]:
        goals = {target["name"]: target for target in shape["targets"]}
        table = Table(
            "", shape["shape"], "target", title=f"{shape['shape']}, like {shape['like']}", title_justify="left"
        )
        for name, value in shape.items():
            if isinstance(value, float | int) and not isinstance(value, bool):
                table.add_row(name.replace("_", " "), quantity(name, value), _goal(goals.pop(name, None)))
        for count, rate in shape["bytes_per_second_at_once"].items():
            table.add_row(
                "one load alone" if int(count) == 1 else f"{count} loads at once",
                quantity("bytes_per_second", rate),
                "",
            )
        for name, target in goals.items():
            table.add_row(name.replace("_", " "), quantity(name, target["value"]), _goal(target))
        console.print(table)

    sharing = found.get("sharing")
    if sharing is not None:
        table = Table("", "fine-tunes of one trunk", "target", title="sharing", title_justify="left")
        for name in ("experts", "trunk_share", "unshared_bytes", "disk_bytes", "resident_bytes"):
            table.add_row(name.replace("_", " "), quantity(name, sharing[name]), "")
        for target in sharing["targets"]:
            table.add_row(target["name"].replace("_", " "), quantity(target["name"], target["value"]), _goal(target))
        console.print(table)


def print_soak(found: Mapping[str, Any], console: Console) -> None:
    table = Table("cycles", "memory beside the weights", "weights", "files", "threads")
    for sample in found["samples"]:
        sizes = megabytes(sample["other_bytes"]), megabytes(sample["booked_bytes"])
        table.add_row(str(sample["cycles"]), *sizes, str(sample["descriptors"]), str(sample["threads"]))
    console.print(table)
    colour, word = ("green", "flat") if found["flat"] else ("red", "not flat")
    console.print(
        f"[{colour}]{word}[/]: memory {found['anonymous_growth']:+.2%}, "
        f"files {found['descriptor_growth']:+}, threads {found['thread_growth']:+}"
    )


def print_scheduling(found: Mapping[str, Any], console: Console) -> None:
    table = Table("policy", "experts", "queued", "come", "activations", "per request", "at most")
    for row in found["rows"]:
        colour = "green" if row["seconds_per_request"] <= row["target_seconds"] else "yellow"
        took, most = (f"{seconds * 1e3:.3f} ms" for seconds in (row["seconds_per_request"], row["target_seconds"]))
        room = "ample" if row["activation_share"] == 1 else "tight"
        come = "one by one" if row["gap_seconds"] else "at once"
        counts = f"{row['experts']:,}", f"{row['queued']:,}"
        table.add_row(row["policy"], *counts, come, room, f"[{colour}]{took}[/]", most)
    console.print(table)


def print_task(found: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for head in ("policy", "loader", "img/s", "of all", "loads", "floor", "p50 s", "p99 s", "MB", "CPU s"):
        table.add_column(head, justify="left" if head in ("policy", "loader") else "right", no_wrap=True)
    for row in found["policies"]:
        table.add_row(
            row["policy"],
            row["loader"],
            f"{row['images_per_second']:.1f}",
            f"{row['fraction_of_all_resident']:.1%}",
            f"{row['loads']}",
            f"{row['loads_floor']}",
            f"{row['wait_p50_seconds']:.2f}",
            f"{row['wait_p99_seconds']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['cpu_seconds']:.1f}",
        )
    console.print(table)
    for row in found["policies"]:
        console.print(f"[dim]{row['policy']}: {row['how']}[/dim]")
    console.print(
        f"{found['experts']} experts of {found['shape']} and two detectors, {megabytes(found['weights_bytes'])}; "
        f"budget {megabytes(found['budget_bytes'])}; {found['requests']:,} pictures, one every "
        f"{found['gap_seconds'] * 1e3:g} ms; {found['cores']} cores, "
        f"disk {quantity('bytes_per_second', found['disk_bytes_per_second'])}"
    )
    console.print(
        "[dim]of all: of the throughput with everything in memory, in that round; p50, p99: waits; MB: weights[/dim]"
    )


_SEARCHES = ("casual", "two_steps", "joint_without_guesses", "joint")


def print_search(found: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    heads = ("task", "casual", "two steps", "no guesses", "joint", "to casual", "paper", "to two steps", "plays")
    for head in heads:
        table.add_column(head, justify="left" if head == "task" else "right", no_wrap=True)
    for row in found["rows"]:
        goals = {target["name"]: target["met"] for target in row["targets"]}
        rates = (f"{row[f'{name}_images_per_second']:.1f}" for name in _SEARCHES)
        table.add_row(
            f"{row['device'].upper()} {row['task']}",
            *rates,
            _ratio(row["joint_to_casual"], goals["joint_to_casual"]),
            f"{row['paper_best_to_casual']:.2f}",
            _ratio(row["joint_to_two_steps"], goals["joint_to_two_steps"]),
            f"{row['joint_plays']:.1f} of {row['two_steps_plays']}",
        )
    console.print(table)
    missed = sum(not target["met"] for row in found["rows"] for target in row["targets"])
    console.print(
        f"[dim]images per second of the policy {found['policy']}, in virtual time, seed {found['seed']}; no guesses: "
        "the joint search from the casual configuration and chance alone; paper: its best configuration to its casual "
        f"one, which the joint search shall reach; to two steps: at least 1. {missed} missed[/dim]",
        soft_wrap=True,
    )


def _ratio(value: float, met: bool) -> str:
    return f"[{'green' if met else 'red'}]{value:.3f}[/]"


def print_door(found: Mapping[str, Any], console: Console) -> None:
    table = Table("", *found["brokers"])
    goals = {name: {goal["name"]: goal for goal in each["targets"]} for name, each in found["brokers"].items()}
    for key in (name for name in next(iter(found["brokers"].values())) if name != "targets"):
        cells = (f"{quantity(key, each[key])} {_goal(goals[name].get(key))}" for name, each in found["brokers"].items())
        table.add_row(key.replace("_", " "), *cells)
    console.print(table)
    console.print(
        f"medians of {found['rounds']} rounds on {found['cores']} cores; pictures of {found['picture_bytes']:,} bytes, "
        f"an expert of {found['work_seconds'] * 1e3:.1f} ms; load {found['load_average']}"
    )


def print_faults(found: Mapping[str, Any], console: Console) -> None:
    table = Table("", *found["brokers"])
    for count in ("published", "verdicts", "records", "lost", "conflicting", "phantom"):
        table.add_row(count, *(f"{run[count]:,}" for run in found["brokers"].values()))
    for kind in found["kills"]:
        table.add_row(f"broken: {kind}", *(f"{run['kills'].get(kind, 0)}" for run in found["brokers"].values()))
    console.print(table)
    clean = "[green]nothing was lost[/]" if found["is_clean"] else "[red]not clean[/]"
    flat = "[green]the service did not grow[/]" if found["is_flat"] else "[red]the service grew[/]"
    console.print(f"{clean}; {flat}; {found['minutes']:g} minutes, seed {found['seed']}")


def quantity(name: str, value: float) -> str:
    """A number in the unit that people read, by the unit that its name ends in."""
    if name.endswith("bytes_per_second"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_per_second"):
        return f"{value:,.0f}/s"
    if name.endswith("_seconds"):
        return f"{value * 1e3:.2f} ms"
    if name.endswith("_bytes"):
        return megabytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _goal(target: Mapping[str, Any] | None) -> str:
    if target is None:
        return ""
    verdict = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
    return f"{target['relation']} {quantity(target['name'], target['bound'])}: {verdict}"


def verdict_cells(body: Mapping[str, Any]) -> tuple[str, str]:
    """A verdict's outcome in its colour, and its findings in a few words."""
    if "outcome" not in body:
        return f"[magenta]refused: {escape(body['reason'])}[/magenta]", escape(body["what"])
    outcome = body["outcome"]
    words = [f"{f['label']} {f['score']:.2f}" for f in body.get("findings", ())]
    words += [f"{part['part']} {part['outcome']}" for part in body.get("parts", ()) if part["outcome"] != "pass"]
    words += [f"{part} missing" for part in body.get("missing", ())]
    if len(words) > MOST_WORDS:
        words[MOST_WORDS:] = [f"{len(words) - MOST_WORDS} more"]
    if body["reason"]:
        words.append(f"{body['reason']}: {body['detail']}")
    return f"[{COLOURS[outcome]}]{outcome}[/]", escape(", ".join(words))


def print_records(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("recorded (UTC)", "request", "line", "product", "board", "part", "outcome", "found"):
        table.add_column(title)
    for body in found:
        where = (escape(body[level]) for level in ("line", "product", "board", "part"))
        table.add_row(body["recorded_at"][:19], escape(body["request_id"][:12]), *where, *verdict_cells(body))
    console.print(table)


def print_record(body: Mapping[str, Any], console: Console) -> None:
    """All that is known of one verdict."""
    table = _facts()
    outcome, words = verdict_cells(body)
    table.add_row("outcome", outcome)
    table.add_row("found", words)
    for key, value in body.items():
        if key not in ("outcome", "reason", "detail", "findings", "steps", "parts", "schema_version"):
            table.add_row(key.replace("_", " "), escape(str(value)))
    console.print(table)
    if "parts" in body:
        _print_parts(body["parts"], console)
        return
    steps = Table(box=None, pad_edge=False)
    for title in ("expert", "version", "precision", "weights", "fails from", "executor", "device", "ms"):
        steps.add_column(title)
    for step in body["steps"]:
        keys = ("expert", "version", "precision", "weights_sha256", "threshold", "executor", "device", "milliseconds")
        steps.add_row(*(escape(str(step.get(key, "not recorded"))) for key in keys))
    console.print(steps)


def _print_parts(parts: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("part", "component", "outcome", "found", "experts", "its own verdict"):
        table.add_column(title)
    for part in parts:
        experts = ", ".join(f"{step['expert']} {step['version']}" for step in part["steps"])
        cells = (escape(part["part"]), escape(part["component"]), *verdict_cells(part), escape(experts))
        table.add_row(*cells, escape(part["request_id"] or "-"))
    console.print(table)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def print_gridded(found: Mapping[str, Any], console: Console) -> None:
    table = _facts()
    table.add_row("found", f"{found['found_images_per_second']:.1f} images/s: {found['found']}")
    table.add_row(
        "best of the grid", f"{found['best_of_grid_images_per_second']:.1f} images/s: {found['best_of_grid']}"
    )
    table.add_row("default", f"{found['default_images_per_second']:.1f} images/s")
    table.add_row("search, grid", f"{found['search_seconds']:.0f} s, {found['grid_seconds']:.0f} s")
    console.print(table)
    rows = Table("configuration", "predicted", "live", "off")
    for row in found["predictions"]:
        rows.add_row(row["changed"], f"{row['predicted']:.1f}", f"{row['live']:.1f}", f"{row['off']:+.1%}")
    console.print(rows)
    for target in found["targets"]:
        colour = "green" if target["met"] else "red"
        says = f"{target['name']}: {target['value']:.3f} ({target['relation']} {target['bound']})"
        console.print(f"[{colour}]{says}[/{colour}]")


def print_profile(found: Mapping[str, Any], console: Console) -> None:
    if not found["complete"]:
        console.print("[yellow]Interrupted: what was known by then; the same command goes on from there.[/]")
    _print_before_and_after(found, console)
    changed = {name: value for name, value in found["settings"].items() if value != found["default"][name]}
    if changed:
        table = Table("setting", "default", "chosen")
        for name, value in changed.items():
            table.add_row(name.replace("_", " "), f"{found['default'][name]:.3g}", f"[green]{value:.3g}[/]")
        console.print(table)
    elif found["why_default"]:
        console.print(found["why_default"], soft_wrap=True)
    _print_fits(found["fits"], console)
    for name, why in found["failed"].items():
        console.print(f"[red]not measured:[/] {escape(f'{name}: {why}')}", soft_wrap=True)
    if found["importances"]:
        shares = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in found["importances"].items())
        console.print(f"what matters: {shares}", soft_wrap=True)
    console.print(f"written to {escape(found['profile_path'])}; to serve by it, in appliance.toml:", soft_wrap=True)
    line = f"[paths]\nprofile = {json.dumps(found['profile_path'])}"
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_before_and_after(found: Mapping[str, Any], console: Console) -> None:
    before, after = found["default_live"], found["live"]
    table = _facts()
    table.add_row("workload", escape(f"{found['workload']}, {found['requests']:,} pictures, for {found['objective']}"))
    if before:
        table.add_row("live by default", _reached(before, found["objective"]))
        is_same = found["settings"] == found["default"]
        gain = f"{after['images_per_second'] / before['images_per_second']:.2f} times as many"
        reached = f"[bold green]{_reached(after, found['objective'])}[/], {gain}"
        table.add_row("live as chosen", "the same" if is_same else reached)
    table.add_row("predicted", f"{found['predicted_images_per_second']:.1f} images/s")
    served = f"{found['configurations_confirmed_live']} served live"
    table.add_row("searched", f"{found['trials']:,} configurations, {served}, in {found['seconds']:.0f} s")
    console.print(table)


def _reached(live: Mapping[str, float], objective: str) -> str:
    """What the objective asks for first."""
    rate = f"{live['images_per_second']:.1f} images/s"
    match objective:
        case "p99":
            return f"99 % waited {live['wait_p99_seconds']:.2f} s at most; {rate}"
        case "deadlines":
            return f"{live['late_share']:.2%} late; {rate}"
    return rate


def _print_fits(fits: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The worst ones."""
    table = Table("runs of", "on", "a picture", "a batch", "fit error", title_justify="left")
    for fit in sorted(fits, key=lambda fit: -fit["fit_error"])[:MOST_FITS]:
        times = (f"{fit[name] * 1e3:.2f} ms" for name in ("item_seconds", "fixed_seconds"))
        on = "GPU" if fit["device"] == "cuda" else _threads(fit["threads"])
        on += ", int8" if fit["precision"] == "int8" else ""
        table.add_row(escape(fit["expert"]), on, *times, f"{fit['fit_error']:.1%}")
    if fits:
        console.print(table)
    if len(fits) > MOST_FITS:
        console.print(f"the {MOST_FITS} worst of {len(fits)} fits")


PHASES = {"measure": "measuring", "search": "searching", "confirm": "serving live"}


@contextmanager
def profiling(console: Console) -> Iterator[tuple[Callable[[str], None], Callable[[str, float], None]]]:
    """Who hears what the profiler says, and who hears of its phases and how many seconds each may take. On a terminal
    a bar for each phase, with what was said last; on anything else lines."""
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, soft_wrap=True), lambda phase, seconds: None
        return
    said = TextColumn("[dim]{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = TextColumn("{task.description:>12}"), _Clock(bar_width=30), _Spent(), said
    with Progress(*columns, console=console, expand=True) as bars:
        phases: list[TaskID] = []

        def say(line: str) -> None:
            if phases:
                bars.update(phases[-1], said=escape(line))
            else:
                bars.print(escape(line))

        def begin(phase: str, seconds: float) -> None:
            for earlier in phases[-1:]:
                bars.stop_task(earlier)
            phases.append(bars.add_task(PHASES[phase], total=max(seconds, 0.0), said=""))

        yield say, begin


class _Clock(BarColumn):
    """How much of its time a phase has used; it may take a little more."""

    def render(self, task: Task) -> ProgressBar:
        spent, total = task.elapsed or 0.0, task.total or 0.0
        return ProgressBar(total=max(total, spent, 1e-9), completed=spent, width=self.bar_width)


class _Spent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.elapsed or 0:.0f} of {task.total or 0:.0f} s", no_wrap=True)
