"""The commands and their flags. Each calls one function, imported when the command runs, and turns errors into one
line and an exit code: 1 for what went wrong, 2 for what was asked wrongly."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from appliance.errors import ApplianceError, ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Serve hundreds of expert networks from one box beside a production line.\n\n"
    "Begin with [bold]appliance demo[/bold]: real pictures through a real broker and real experts.",
)

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure what this box does with experts, on networks that it makes itself.\n\n"
    "Nothing is downloaded and no service is needed; stop one that runs, for it would be measured too.",
)
app.add_typer(bench, name="bench")

records = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look up what the box decided: by line, product, board, part, outcome, reason, time or a request's id.\n\n"
    "Reads the state directory of the settings, beside the running service or without it.",
)
app.add_typer(records, name="records")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The box's settings; see docs/configuration.md.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]
BenchFolder = Annotated[
    Path, typer.Option(help="Where experts and store lie meanwhile: on the disk that is to be measured.")
]
LineName = Annotated[str | None, typer.Option("--line", help="Only of this line.")]
ProductName = Annotated[str | None, typer.Option("--product", help="Only of this product.")]
BoardName = Annotated[str | None, typer.Option("--board", help="Only of the board with this serial number.")]
PartName = Annotated[
    str | None, typer.Option("--part", help="Only of this designator, or component type; _board for whole boards.")
]
OutcomeName = Annotated[
    str | None, typer.Option("--outcome", help="pass, fail, error, late or rejected; of a board also incomplete.")
]
ReasonName = Annotated[str | None, typer.Option("--reason", help="Such as picture-damaged or poison.")]
Since = Annotated[
    str | None,
    typer.Option("--since", help="Recorded since then: 2026-01-31 or 2026-01-31T08:15, here; or with a zone."),
]
Until = Annotated[str | None, typer.Option("--until", help="Recorded before then.")]
DEFAULT_CONFIG = Path("/etc/appliance/appliance.toml")
LEAST_BUDGET_SECONDS = 10.0
"""Of a profiler: measuring alone takes six and more."""


@app.command()
def serve(
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines instead of text.")] = False,
    debug: Annotated[bool, typer.Option(help="Log every decision, not only what an operator acts on.")] = False,
) -> None:
    """Run the service in the foreground; systemd keeps it.

    Connects to the broker of the settings (or starts its own), answers every picture with one verdict, and stops
    cleanly on SIGTERM. Logs go to standard error.
    """
    from appliance import config as settings
    from appliance import service
    from appliance.logs import log_to_stderr

    log_to_stderr(as_json=as_json, debug=debug)
    service.serve(settings.load(config))


@app.command()
def check(
    config: ConfigFile = DEFAULT_CONFIG,
    prune: Annotated[bool, typer.Option(help="Remove compiled experts that no bundle names any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check settings, catalogue, graph, digests and compiled experts, without serving.

    Compiles what is new, so that the next start is quick. Says of each product whether its experts fit into the budget
    together, and what one board after another of it will come to. Exit code 1 when any expert could not serve.
    """
    from appliance import config as settings
    from appliance.lab.feasibility import products
    from appliance.report import print_check, progress
    from appliance.startup import checked

    with progress(Console(stderr=True, quiet=as_json)) as tell:
        found = checked(settings.load(config), prune=prune, tell=tell, forecast=products)
    _print(found) if as_json else print_check(found, Console())
    raise typer.Exit(0 if not found["unavailable"] else 1)


@app.command()
def publish(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files: JPEG, PNG, BMP, TIFF, PNM or NPY.")],
    part: Annotated[
        str, typer.Option(help="Component type, or the designator when --product is given; _board is the whole board.")
    ],
    line: Annotated[str, typer.Option(help="Name of the publishing line.")] = "line1",
    product: Annotated[str, typer.Option(help="Product whose recipe places the part; - for none.")] = "-",
    board: Annotated[str, typer.Option(help="Serial number of the board; - for none.")] = "-",
    host: Annotated[str, typer.Option(help="The broker.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 1883,
    site: Annotated[str, typer.Option(help="Site name, as in the box's settings.")] = "plant",
    root: Annotated[str, typer.Option(help="First topic level, as in the box's settings.")] = "coe",
    username: Annotated[str | None, typer.Option(help="User name at the broker.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="File whose first line is the password.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) of who may sign the broker's; with it the link is TLS.")
    ] = None,
    certificate_file: Annotated[Path | None, typer.Option(help="The line's certificate (PEM).")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for all verdicts.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Send pictures to a box and wait for their verdicts, sending again what is not answered.

    Exit code 0 only if every picture got a verdict. One by hand:

        appliance publish crop.jpg --part moulded-figure

    A whole board, and its verdict, with all parts:

        appliance publish board.jpg --product 12100003 --board SN-1 --part _board
    """
    from appliance.client import Camera, publish_files
    from appliance.report import print_answers
    from appliance.tls import Certificates

    if (certificate_file is None) != (key_file is None) or (certificate_file and not ca_file):
        raise typer.BadParameter("--certificate-file and --key-file go together, with --ca-file")
    password = _password(password_file) if password_file else None
    files = Certificates(ca_file, certificate_file, key_file) if ca_file else None
    camera = Camera(
        host, port, line=line, site=site, root=root, username=username, password=password, certificates=files
    )
    found = publish_files(camera, pictures, part=part, product=product, board=board, timeout_seconds=timeout)
    _print(found) if as_json else print_answers(found, Console())
    raise typer.Exit(0 if not found["unanswered"] and not found["refused"] else 1)


@app.command(
    name="export",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def export_experts(context: typer.Context) -> None:
    """Turn PyTorch experts, or foreign ONNX files, into verified bundles (the same as python -m export)."""
    from export.__main__ import app as exporting

    exporting(args=context.args, prog_name="appliance export")


@app.command()
def simulate(
    context: typer.Context,
    journal: Annotated[
        Path | None, typer.Argument(help="A journal that a service wrote (paths.journal), such as the demo's.")
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(help="Take only the arrivals and answers from the journal, and predict all timings from costs."),
    ] = False,
    device: Annotated[str, typer.Option(help="One of CoServe's machines: numa or uma.")] = "numa",
    task: Annotated[
        str | None, typer.Option(help="One of CoServe's tasks, instead of a journal: A1, A2, B1, B2.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Such as appliance, coserve, em+ra, em, none, samba, all-resident, oracle; ours by default."),
    ] = None,
    loader: Annotated[
        str, typer.Option(help="paper: each load takes what it took there; segments: its bytes over the shared disk.")
    ] = "paper",
    gap: Annotated[float, typer.Option(min=0.0, help="Seconds from one picture of a task to the next.")] = 0.004,
    due: Annotated[
        float | None, typer.Option(min=0.0, help="In how many seconds each picture has to be answered.")
    ] = None,
    boards: Annotated[int, typer.Option(min=1, help="How many times a task's pictures come.")] = 1,
    paper_table: Annotated[bool, typer.Option(help="Every number that CoServe prints, beside ours.")] = False,
    our_table: Annotated[
        bool, typer.Option(help="Ours beside CoServe at every task on every machine, and which targets are met.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a journal, or a task of the CoServe paper, through the scheduler in virtual time, without disk or models.

    A journal is replayed event by event: loads and evictions are then exactly those of the live run. With --predict,
    loads and runs take as long as the costs say, which shows what another --policy or other circumstances would do.
    """
    from appliance.lab.ours import lines
    from appliance.lab.ours import our_table as compared
    from appliance.lab.simulate import simulated
    from appliance.lab.trial import Pace, tried_by_name
    from appliance.lab.trial import paper_table as tabled
    from appliance.report import print_our_table, print_paper_table, print_simulation

    if paper_table:
        _refuse_unused(context, {"paper_table"}, "the table has all machines, tasks and policies")
        found = tabled()
        _print(found) if as_json else print_paper_table(found, Console())
        return
    if our_table:
        _refuse_unused(context, {"our_table"}, "the table has all machines, tasks and loaders")
        found = compared()
        _print(found) if as_json else print_our_table(found, lines(found), Console())
        return
    if (journal is None) == (task is None):
        raise typer.BadParameter("give a journal, or --task, or --paper-table, or --our-table")
    if journal is not None:
        if policy is not None and not predict:
            raise typer.BadParameter("a journal is replayed as it was; add --predict", param_hint="--policy")
        _refuse_unused(context, {"journal", "predict", "policy"}, "a journal has its own; it goes with --task")
        found = simulated(journal, predict=predict, policy=policy)
    else:
        of_a_task = {"device", "task", "policy", "loader", "gap", "due", "boards"}
        _refuse_unused(context, of_a_task, "it goes with a journal")
        found = tried_by_name(device, str(task), policy or "appliance", loader, Pace(gap, due, boards))
    _print(found) if as_json else print_simulation(found, Console())


@app.command()
def explain(
    journal: Annotated[
        Path, typer.Argument(help="A journal that a service wrote (paths.journal), such as the demo's.")
    ],
    request: Annotated[str | None, typer.Argument(help="A request's id, or how it begins.")] = None,
    at: Annotated[float | None, typer.Option(min=0.0, help="This second since the journal began.")] = None,
    minute: Annotated[int | None, typer.Option(min=0, help="This minute of the journal; 0 is the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell from a journal why a request took so long, or what happened in a minute.

    The journal is replayed through the same scheduler. Of a request: each expert it asked, behind whom it was queued,
    who was resident then, who was loaded for it and who left by which rule, and what it waited for. Without one,
    the slowest requests and what they waited for. With --at or --minute: who was resident, loads, evictions, queue.
    """
    from appliance.lab.explain import explained
    from appliance.report import print_explanation

    if sum(choice is not None for choice in (request, at, minute)) > 1:
        raise typer.BadParameter("give a request, or --at, or --minute")
    since, seconds = (at, 1.0) if at is not None else (minute * 60.0 if minute is not None else None, 60.0)
    found = explained(journal, request, since=since, until=None if since is None else since + seconds)
    _print(found) if as_json else print_explanation(found, Console())


@app.command()
def profile(
    context: typer.Context,
    config: ConfigFile = Path("appliance.toml"),
    budget: Annotated[str, typer.Option(help="How long it may take, such as 5m or 1h; 10s at least.")] = "5m",
    objective: Annotated[
        str, typer.Option(help="What shall be best: throughput, deadlines (boards in time), or p99 (of the waits).")
    ] = "throughput",
    requests: Annotated[int, typer.Option(min=1, help="How many pictures a workload has that is no journal.")] = 1000,
    product: Annotated[str | None, typer.Option(help="Boards of this product, by its bill of materials.")] = None,
    due: Annotated[
        str | None,
        typer.Option(
            help="With --product: when each board is due after its first picture, such as 60s. Without --gap all come, "
            "and are due, at once."
        ),
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="What a service recorded (paths.journal), with the answers given there.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.01, help="With --journal: let pictures come so many times as fast.")
    ] = 1.0,
    gap: Annotated[
        str, typer.Option(help="Time from one picture to the next, such as 40ms; 0: all wait. Not of a journal.")
    ] = "0",
    checked: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pictures that lead on to a next expert; not of a journal.")
    ] = 0.35,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures as the cameras send them: decoding is part of what runs take. By default small "
            "ones are made, of 320 x 240."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Not the box of --config, but experts made for it: 14MB, 45MB or 170MB.")
    ] = None,
    experts: Annotated[int, typer.Option(min=2, help="With --shape: how many types of components.")] = 100,
    memory: Annotated[
        str, typer.Option(help="With --shape: share of the experts' bytes that memory may hold.")
    ] = "25%",
    out: Annotated[
        Path | None, typer.Option(help="The profile's file; by default <box.name>.json beside paths.profile.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots into this file, for a browser.")] = None,
    folder: Annotated[
        Path,
        typer.Option(
            help="What is known so far lies there: to go on, the same command needs the same folder. With --shape, "
            "experts and store do, too: on the disk that is to be measured."
        ),
    ] = Path(".appliance"),
    seed: Annotated[int, typer.Option(help="Of the search.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Find the best configuration of this box by measurement, and write it as profiles/<box>.json.

    It measures what batches and loads take here, on the CPU and on a GPU, searches executors, threads, batches, the
    split of memory and the policy's hold in the simulator with these costs, and serves the best of them live beside
    the defaults. Nothing is chosen that does not beat them live. Killed or interrupted, the same command goes on where
    it was.

    Stop the service meanwhile: it would be measured too. Then set paths.profile to the file that is printed.

        appliance profile --budget 5m
        appliance profile --journal state/journal.jsonl --speed 2 --objective p99
    """
    from appliance.lab.laps import Workload
    from appliance.profiler.command import Pictures, of_box, of_made
    from appliance.profiler.profiled import Plan
    from appliance.report import print_profile, profiling

    _refuse_profile_options(context, is_made=shape is not None, is_product=product is not None, journal=journal)
    with profiling(Console(stderr=True)) as (say, begun):
        plan = Plan(_budget(budget), folder / "profiler", objective, seed, begun)
        if shape is None:
            until = None if due is None else _seconds(due, "--due")
            asked_for = Pictures(requests, checked, _seconds(gap), journal, speed, product, until, pictures)
            found = of_box(config, asked_for, plan, out, html, say)
        else:
            asked = Workload(shape, experts, requests, _share(memory, "--memory"), _seconds(gap), checked)
            found = of_made(asked, plan, folder, out or folder / f"profile-{experts}-{shape}.json", html, say)
    _print(found) if as_json else print_profile(found, Console())


@app.command()
def demo(
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures the lines publish.")] = 1200,
    lines: Annotated[int, typer.Option(min=1, max=16, help="How many lines publish at the same time.")] = 4,
    budget: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the experts' bytes that may be resident.")
    ] = 0.33,
    keep: Annotated[bool, typer.Option(help="Leave broker and service up, and print how to publish by hand.")] = False,
    folder: Annotated[Path, typer.Option(help="Where compiled experts, spool and journal go.")] = Path(".appliance"),
    catalog: Annotated[Path, typer.Option(help="The expert bundles and products.")] = Path("models_onnx"),
    as_json: AsJson = False,
) -> None:
    """Publish real pictures of circuit boards through a real broker to real experts, and watch the verdicts come.

    Starts the embedded broker and the service with a memory budget of a third of the experts. Exit code 0 only if
    every picture got exactly one verdict, memory stayed within its bounds, and a replay of the journal in the
    simulator comes to the same loads and evictions.
    """
    from appliance.lab.demo import Demo, run_demo

    found = run_demo(Demo(pictures, lines, budget, keep, folder, catalog), Console(stderr=as_json))
    if as_json:
        _print(found)
    raise typer.Exit(0 if not found["broken"] else 1)


@records.command(name="list")
def list_records(
    line: LineName = None,
    product: ProductName = None,
    board: BoardName = None,
    part: PartName = None,
    outcome: OutcomeName = None,
    reason: ReasonName = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show the newest verdicts.

    appliance records list --outcome fail --since 2026-01-31
    """
    from appliance import config as settings
    from appliance.drivers.records.archive import Archive, Wanted
    from appliance.drivers.records.export import plain
    from appliance.report import print_records

    wanted = Wanted(None, line, product, board, part, outcome, reason, _wall(since), _wall(until))
    with Archive(settings.load(config).paths.state) as archive:
        found = [plain(record) for record in islice(archive.find(wanted), limit)]
    _print({"records": found}) if as_json else print_records(found, Console())


@records.command()
def show(
    request: Annotated[str, typer.Argument(help="A request's id, or how it begins.")],
    image: Annotated[
        Path | None, typer.Option(help="Write the picture, if it was kept, with the boxes that were found.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one verdict: experts with versions and weights, scores, thresholds, times.

    appliance records show 9f3a --image out.png
    """
    from appliance import config as settings
    from appliance.drivers.drawing import write_drawn
    from appliance.drivers.records.archive import Archive
    from appliance.drivers.records.export import plain
    from appliance.report import print_record

    box = settings.load(config)
    with Archive(box.paths.state) as archive:
        found = plain(archive.one(request))
        payload = None if image is None else archive.picture(found["request_id"])
    if image is not None and payload is not None:
        write_drawn(payload, found, image, max_pixels=box.limits.picture_pixels)
    _print(found) if as_json else print_record(found, Console())


@records.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; standard output by default.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table for spreadsheets instead of JSON lines.")] = False,
    line: LineName = None,
    product: ProductName = None,
    board: BoardName = None,
    part: PartName = None,
    outcome: OutcomeName = None,
    reason: ReasonName = None,
    since: Since = None,
    until: Until = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Write verdicts as JSON lines or CSV, the newest first, however many there are.

    appliance records export fails.csv --csv --outcome fail
    """
    from appliance import config as settings
    from appliance.drivers.records.archive import Archive, Wanted
    from appliance.drivers.records.export import write_csv, write_lines

    wanted = Wanted(None, line, product, board, part, outcome, reason, _wall(since), _wall(until))
    write = write_csv if as_csv else write_lines
    with Archive(settings.load(config).paths.state) as archive:
        if file is None:
            write(archive.find(wanted), sys.stdout)
            return
        try:
            with file.open("w", encoding="utf-8", newline="") as out:
                write(archive.find(wanted), out)
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}", "give another place") from error


@bench.command()
def switch(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="14MB (MobileNetV2), 45MB (ResNet-18) or 170MB (ResNet-101); several times for several."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="How many switches of each kind, by turns.")] = 15,
    quick: Annotated[bool, typer.Option(help="3 pairs and few runs: whether it works, not what it takes.")] = False,
    folder: BenchFolder = Path(".appliance"),
    as_json: AsJson = False,
) -> None:
    """Measure what making an absent expert ready costs, beside the disk's bound and plain sessions.

    For each shape: bytes from the disk into memory against a bare direct read of the same file; binding; the first
    run's penalty; evicting; the processor time of all that against an InferenceSession per expert; runs against that
    session's; runs while other experts are loaded beside them; memory booked against memory measured. Each target
    stands beside what was found: a missed one is shown, not an error. Four minutes on a quiet machine of two cores.

        appliance bench switch --quick --shape 14MB
    """
    from appliance.lab.bench import switch as measured
    from appliance.report import print_switching

    errors = Console(stderr=True)
    found = measured(shape or [], pairs=pairs, quick=quick, folder=folder, say=errors.print)
    _print(found) if as_json else print_switching(found, Console())


@bench.command()
def soak(
    cycles: Annotated[int, typer.Option(min=1, help="How often an expert is loaded, run and evicted.")] = 2000,
    experts: Annotated[int, typer.Option(min=2, help="How many experts take turns; a tenth is resident.")] = 200,
    folder: BenchFolder = Path(".appliance"),
    as_json: AsJson = False,
) -> None:
    """Load, run and evict experts thousands of times, and see that nothing is left behind.

    Small experts of three architectures in an order without locality. Memory that no file backs must stay flat within
    2 % once all is warm, files and threads must not become more. Exit code 1 when they do. One minute.

        appliance bench soak --cycles 200 --experts 20
    """
    from appliance.lab.soak import soak as soaked
    from appliance.report import print_soak

    found = soaked(cycles=cycles, experts=experts, folder=folder, say=Console(stderr=True).print)
    _print(found) if as_json else print_soak(found, Console())
    raise typer.Exit(0 if found["flat"] else 1)


@bench.command()
def task(
    shape: Annotated[str, typer.Option(help="14MB, 45MB or 170MB; detectors are as large or less.")] = "45MB",
    experts: Annotated[int, typer.Option(min=2, help="How many types of components, each with its classifier.")] = 352,
    requests: Annotated[int, typer.Option(min=1, help="How many pictures, drawn by Zipf's law.")] = 2500,
    budget: Annotated[str, typer.Option(help="Share of the experts' bytes that memory may hold.")] = "25%",
    gap: Annotated[str, typer.Option(help="Time from one picture to the next, such as 4ms or 0.04s.")] = "4ms",
    checked: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of pictures that go on to a detector; 0: none."),
    ] = 0.35,
    policies: Annotated[
        str, typer.Option(help="Names with commas between; all when empty. all-resident, the bound, is always run.")
    ] = "",
    pairs: Annotated[int, typer.Option(min=1, help="How many rounds; what is printed are medians.")] = 1,
    beside: Annotated[
        str, typer.Option(help="Other budgets, such as 10%,50%: ours, CoServe and plain-lru once more with each.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="Write a report with plots into this file, for a browser.")] = None,
    folder: BenchFolder = Path(".appliance"),
    as_json: AsJson = False,
) -> None:
    """Serve one of CoServe's tasks live with each policy in turn: real sessions, real reads, a real memory budget.

    One expert per architecture is compiled; the others are copies with segment files of their own, whose weights differ
    in the last bits. Pictures are decoded and prepared as the service does it. Policies run on our loader (segments);
    plain-lru is what a user would build today: an InferenceSession per expert, the least recently used leave, the
    better of two thread settings, model files in the page cache. The disk needs room for all experts: 16 GB for 352 of
    45 MB.

        appliance bench task --shape 14MB --experts 40 --requests 300 --beside 10%,50% --html task.html
    """
    from appliance.lab.laps import Workload
    from appliance.lab.task import task as served
    from appliance.lab.taskreport import page
    from appliance.report import print_task

    asked = Workload(shape, experts, requests, _share(budget), _seconds(gap), checked)
    shares = [_share(share, "--beside") for share in _listed(beside)]
    say = Console(stderr=True).print
    found, rounds = served(asked, _listed(policies), pairs=pairs, beside=shares, folder=folder, say=say)
    if html is not None:
        html.write_text(page(found, rounds[0]), "utf-8")
    _print(found) if as_json else print_task(found, Console())


@bench.command()
def schedule(
    repeats: Annotated[int, typer.Option(min=1, help="How many runs; what is printed are medians.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure what deciding costs per request, with thousands queued, in virtual time: the scheduler and nothing else.

    3,500 requests for 350 experts and 100,000 for 10,000, all there at once, memory for a quarter; and 3,500 where all
    experts are in memory and room for activations is what they wait for. Each target beside what was found: a missed
    one is shown, not an error. Ten minutes.
    """
    from appliance.lab.overhead import scheduling
    from appliance.report import print_scheduling

    found = scheduling(repeats=repeats, say=Console(stderr=True).print)
    _print(found) if as_json else print_scheduling(found, Console())


@bench.command()
def search(
    seed: Annotated[int, typer.Option(help="Of the joint search.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare the profiler's search with CoServe's own two at its eight tasks, in virtual time.

    The casual configuration, the paper's searches one after the other (experts on the GPU, then executors), and the
    joint search of all settings at once, all under CoServe's policy; the joint search plays the task no more often than
    the two steps. Each target stands beside what was found: a missed one is shown, not an error. Two minutes.
    """
    from appliance.profiler.contest import contest
    from appliance.report import print_search

    found = contest(seed, Console(stderr=True).print)
    _print(found) if as_json else print_search(found, Console())


@bench.command()
def door(
    broker: Annotated[str | None, typer.Option(help="embedded or mosquitto; all that are here by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, by turns.")] = 5,
    quick: Annotated[
        bool, typer.Option(help="One round of few pictures: whether it works, not what it takes.")
    ] = False,
    folder: BenchFolder = Path(".appliance"),
    catalog: Annotated[Path, typer.Option(help="The demo's bundles and products.")] = Path("models_onnx"),
    as_json: AsJson = False,
) -> None:
    """Measure what the way in and out costs: a real broker, the real service and a camera on the same cores.

    With pictures of 50 KB at QoS 1: what the broker alone does, confirming and handing on; what a box does without
    experts (one that takes the mean of 64 pixels), from publishing to the recorded verdict; one picture at a time;
    with an expert of 25 ms and with the demo's, beside the same work without broker, spool and records. The disk's
    fsync is measured meanwhile. Medians; each target stands beside what was found: a missed one is shown, not an error.
    Four minutes with two brokers.
    """
    from appliance.lab.door import door as measured
    from appliance.report import print_door

    say = Console(stderr=True).print
    found = measured(broker=broker, rounds=rounds, quick=quick, folder=folder, catalog=catalog, say=say)
    _print(found) if as_json else print_door(found, Console())


@bench.command(name="profile")
def bench_profile(
    shape: Annotated[str, typer.Option(help="14MB, 45MB or 170MB; detectors are as large or less.")] = "45MB",
    experts: Annotated[int, typer.Option(min=2, help="How many types of components, each with its classifier.")] = 100,
    requests: Annotated[int, typer.Option(min=1, help="How many pictures, drawn by Zipf's law.")] = 2500,
    memory: Annotated[str, typer.Option(help="Share of the experts' bytes that memory may hold.")] = "25%",
    budget: Annotated[
        str, typer.Option(help="How long the profiler may take, 10s at least; the grid comes on top.")
    ] = "3m",
    seed: Annotated[int, typer.Option(help="Of the search.")] = 1,
    folder: BenchFolder = Path(".appliance"),
    as_json: AsJson = False,
) -> None:
    """What `appliance profile` finds, beside the best of 24 configurations that are all served live; and its
    predictions, beside what comes of them.

        appliance bench profile --budget 3m --requests 2500
    """
    from appliance.lab.laps import Workload
    from appliance.profiler.boxes import made_rig
    from appliance.profiler.gridded import against_grid
    from appliance.profiler.profiled import Plan
    from appliance.profiler.progress import alone
    from appliance.report import print_gridded

    say = Console(stderr=True).print
    plan = Plan(_budget(budget), folder / "profiler", seed=seed)
    asked = Workload(shape, experts, requests, _share(memory, "--memory"))
    with alone(plan.folder), made_rig(asked, folder, say) as (rig, default):
        found = against_grid(rig, default, plan, say)
    _print(found) if as_json else print_gridded(found, Console())


@bench.command()
def faults(
    minutes: Annotated[float, typer.Option(min=0.05, help="How long, shared by the brokers.")] = 2.0,
    broker: Annotated[str | None, typer.Option(help="embedded or mosquitto; all that are here by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of what breaks when.")] = 0,
    folder: BenchFolder = Path(".appliance"),
    as_json: AsJson = False,
) -> None:
    """Break everything between a camera and its verdict, at random, and count what was lost.

    A line publishes all the while and keeps each picture until its verdict comes. Service and broker are killed with
    SIGKILL, the box's link is reset, cut in mid-packet, held up and swallowed. At the end what was published, answered
    and recorded is compared. Exit code 1 when anything was lost, or told in two ways, or the service grew.

        appliance bench faults --minutes 20 --json
    """
    from appliance.lab.faults import faults as broken
    from appliance.report import print_faults

    found = broken(minutes=minutes, broker=broker, seed=seed, folder=folder, say=Console(stderr=True).print)
    _print(found) if as_json else print_faults(found, Console())
    raise typer.Exit(0 if found["is_clean"] and found["is_flat"] else 1)


def main() -> None:
    """The console script. One of the two borders where every error becomes an answer."""
    try:
        app()
    except ApplianceError as error:
        print(f"appliance: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse_unused(context: typer.Context, used: set[str], why: str) -> None:
    """Who gives an option means something by it: it is not passed over."""
    _refuse_given(context, {str(parameter.name) for parameter in context.command.params} - used - {"as_json"}, why)


def _refuse_given(context: typer.Context, unused: set[str], why: str) -> None:
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE" and parameter.name in unused:
            raise typer.BadParameter(f"leave it out: {why}", param_hint=parameter.opts[0])


def _refuse_profile_options(context: typer.Context, *, is_made: bool, is_product: bool, journal: Path | None) -> None:
    """Of `appliance profile`: those that would change nothing."""
    if is_made:
        of_a_box = {"config", "product", "due", "journal", "speed", "pictures"}
        _refuse_given(context, of_a_box, "it goes with the box of --config; --shape makes experts and pictures")
    else:
        _refuse_given(context, {"experts", "memory"}, "it goes with --shape")
    if journal is not None:
        _refuse_given(context, {"requests", "product", "gap", "checked"}, "a journal has its own pictures and times")
    else:
        _refuse_given(context, {"speed"}, "it goes with --journal")
    if not is_product:
        _refuse_given(context, {"due"}, "it goes with --product")


def _password(path: Path) -> str:
    """The file's first line. Raises ConfigError when it has none."""
    try:
        first, *_ = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--password-file {path} has no password", "put it on the first line") from error
    return first


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _share(text: str, option: str = "--budget") -> float:
    """Of `25%` or `0.25`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text} is no share; write it like 25%", param_hint=option)
    return share


def _seconds(text: str, option: str = "--gap") -> float:
    """Of `4ms`, `0.04s`, `0.04`, `5m` or `1h`."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                seconds = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 <= seconds < float("inf"):
                return seconds
            break
    raise typer.BadParameter(f"{text} is no time; write it like 4ms, 60s or 5m", param_hint=option)


def _budget(text: str) -> float:
    """Of a profiler, in seconds."""
    seconds = _seconds(text, "--budget")
    if seconds < LEAST_BUDGET_SECONDS:
        raise typer.BadParameter(f"{text} is too short; at least {LEAST_BUDGET_SECONDS:.0f}s", param_hint="--budget")
    return seconds


def _wall(text: str | None) -> float | None:
    """Wall seconds of `2026-01-31T08:15`, in this machine's zone unless it names one."""
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise typer.BadParameter(f"{text} is no time; write it like 2026-01-31T08:15") from error


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
