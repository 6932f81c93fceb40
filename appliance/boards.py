"""Boards, between those who decide about them and the record: whole pictures, of which the parts are cut and inspected,
and boards that are collected from pictures of their parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from appliance import catalog as catalogs
from appliance import contract
from appliance.catalog import Product, Recipe
from appliance.config import Config
from appliance.contract import WHOLE_BOARD, Address, Placed, Serving
from appliance.core import boards as core
from appliance.core.boards import Came, Standing
from appliance.core.types import BoardName, BoardOutcome, BoardVerdict, Outcome, PartVerdict, Refusal, Verdict
from appliance.drivers.recipes import Recipes
from appliance.drivers.records import (
    BoardPart,
    Conclusion,
    OpenBoard,
    PartOf,
    Picture,
    Publication,
    Recorded,
    Records,
    Spooled,
)

LONGEST_WAIT_SECONDS = 86_400.0
"""No `limits.board_seconds` is longer."""

ServingBy = Mapping[tuple[str, str], Serving]


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole board's picture, under way or done; `parts` has the verdicts of those that were cut from it."""

    id: str
    address: Address
    product: Product
    arrived_seconds: float
    parts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def pixels(self) -> int:
        width, height = self.product.recipe.size
        return width * height

    def verdict(self) -> BoardVerdict:
        parts = {part: PartVerdict(known.request, known.outcome, known.refusal) for part, known in self.parts.items()}
        name, expected = self.address.board_name, tuple(self.product.placements)
        return core.board_verdict(self.id, name, expected, parts, self.arrived_seconds)

    def placed(self) -> dict[str, Placed]:
        placements = self.product.placements
        return {
            part: Placed(placements[part].component, placements[part].rect, known.steps, known.stand_ins)
            for part, known in self.parts.items()
        }


@dataclass(frozen=True, slots=True)
class _Collected:
    board: OpenBoard
    product: Product


class Boards:
    """Used by the thread that decides. `post` publishes what is recorded, on the writer's."""

    def __init__(
        self,
        config: Config,
        recipes: Recipes,
        records: Records,
        serving: ServingBy,
        post: Callable[[tuple[Publication, ...]], None],
    ) -> None:
        self._config, self._recipes, self._records, self._serving, self._post = config, recipes, records, serving, post
        self._collecting = core.Boards(config.limits.board_seconds, config.limits.boards)
        self._collected: dict[str, _Collected] = {}
        self._wholes: dict[str, Whole] = {}

    # Collected boards.

    def resume(self) -> None:
        """What a former process knew of boards under way; before any picture comes."""
        oldest = [spooled.picture.accepted_at for spooled in self._records.waiting(limit=1)]
        since = min([time.time() - self._config.limits.board_seconds, *oldest])
        concluded = [(BoardName(*name), monotonic_of(at)) for name, at in self._records.concluded_boards(since)]
        standing = [self._standing(board, parts) for board, parts in self._records.open_boards()]
        now = time.monotonic()
        for verdict in self._collecting.resume(standing, concluded, now):
            self._conclude(verdict, now)

    def join(self, spooled: Spooled, address: Address, arrived_seconds: float) -> None:
        """A part's picture is about to be inspected: its board may wait for it, or be opened by it."""
        product = self._recipes.of(address).products.get(address.product)
        if address.board == "-" or product is None or address.part not in product.placements:
            return
        picture = spooled.picture
        came = Came(picture.id, address.part, spooled.arrival, arrived_seconds)
        opened = self._collecting.came(address.board_name, came, product.placements)
        if opened is not None:
            board = OpenBoard(
                opened.id, address.line, address.product, address.board, picture.accepted_at, written(product)
            )
            self._keep(board, product)
            self._records.open_board(board)

    def part_of(self, verdict: Verdict) -> PartOf | None:
        """The board that a picture's verdict counts for, to be recorded with it."""
        board, refusal = self._collecting.board_of(verdict.request), verdict.refusal
        if board is None:
            return None
        return PartOf(board, refusal.reason if refusal else None, refusal.detail if refusal else None)

    def inspected(self, verdict: Verdict) -> None:
        """A picture's verdict is on its way to the record; the board's follows if that was the last."""
        now = time.monotonic()
        ended = self._collecting.inspected(PartVerdict(verdict.request, verdict.outcome, verdict.refusal), now)
        if ended is not None:
            self._conclude(ended, now)

    def is_over(self, now: float) -> bool:
        """Whether some board's time is up by then."""
        return self._collecting.is_over(now)

    def look(self, accepted_seconds: float) -> None:
        """All pictures accepted until then have come: boards whose time is up have their verdicts."""
        now = time.monotonic()
        for verdict in self._collecting.passed(accepted_seconds, now):
            self._conclude(verdict, now)

    def numbers(self) -> dict[str, Any]:
        """For the box's statistics."""
        counts = self._collecting.counts
        verdicts = {outcome.value: counts[outcome] for outcome in BoardOutcome if counts[outcome]}
        return {
            "open": len(self._collecting),
            "verdicts": verdicts,
            "too_late": counts["too_late"],
            "replaced": counts["replaced"],
            "whole": len(self._wholes),
        }

    def _standing(self, board: OpenBoard, parts: list[BoardPart]) -> Standing:
        product = _read(self._config, board)
        name = self._keep(board, product)
        known = {part.part: (part.arrival, _part_verdict(part)) for part in parts}
        return Standing(board.id, name, tuple(product.placements), monotonic_of(board.opened_at), known)

    def _keep(self, board: OpenBoard, product: Product) -> BoardName:
        name = BoardName(board.line, board.product, board.board)
        self._collected[board.id] = _Collected(board, product)
        self._recipes.keep(name, product)
        return name

    def _conclude(self, verdict: BoardVerdict, now: float) -> None:
        collected = self._collected.pop(verdict.id)
        self._recipes.release(verdict.name)
        placements = collected.product.placements
        body = contract.board_body(
            verdict,
            placed={part: Placed(placements[part].component, placements[part].rect) for part in verdict.parts},
            picture_sha256=None,
            waited_seconds=now - verdict.opened_seconds,
            serving=self._serving,
            site=self._config.box.site,
            box=self._config.box.name,
            finished_at=datetime.now(UTC),
        )
        topic = contract.board_topic(self._config, verdict.name)
        self._records.conclude_board(collected.board, verdict.outcome.value, body, topic, self._recorded)

    def _recorded(self, answer: Conclusion) -> None:
        """On the writer's thread."""
        if isinstance(answer, Recorded):
            self._post(answer.publications)

    # Whole boards' pictures.

    def has_room(self, picture: Picture) -> bool:
        """Whether it may begin: that of a whole board has to fit, decoded, beside those that are under way."""
        if picture.part != WHOLE_BOARD or not self._wholes:
            return True
        address = Address(picture.line, picture.product, picture.board, picture.part)
        product = self._recipes.of(address).products.get(address.product)
        if product is None:
            return True
        width, height = product.recipe.size
        under_way = sum(whole.pixels for whole in self._wholes.values())
        return under_way + width * height <= self._config.limits.picture_pixels

    def begin_whole(self, whole: Whole) -> Iterator[tuple[str, Address]]:
        """The request that inspects each part, and what it shows."""
        self._wholes[whole.id] = whole
        for part in whole.product.placements:
            yield f"{whole.id}/{part}", replace(whole.address, part=part)

    def cut_inspected(self, picture: str, part: str, verdict: Verdict) -> Whole | None:
        """A part that was cut from the picture has its verdict. The board's picture, if that was the last."""
        whole = self._wholes[picture]
        whole.parts[part] = verdict
        if len(whole.parts) < len(whole.product.placements):
            return None
        return self._wholes.pop(picture)


def monotonic_of(at: float) -> float:
    """The monotonic second of something that a former process noted by wall time.

    Where that ran backwards it was just now, and where it leapt it was a day ago.
    """
    return time.monotonic() - min(max(0.0, time.time() - at), LONGEST_WAIT_SECONDS)


def verdict_of(whole: Whole, last: Verdict) -> Verdict:
    """That of the picture as a whole, when its `last` part has one."""
    board = whole.verdict()
    return Verdict(board.id, Outcome(board.outcome.value), (), last.waited_seconds, board.refusal)


def body_of(
    verdict: Verdict, picture: Picture, whole: Whole | None, *, serving: ServingBy, config: Config, out_of_order: bool
) -> bytes:
    """The verdict of a whole board's picture; of one that was never cut, no part has one."""
    name = BoardName(picture.line, picture.product, picture.board)
    unseen = BoardVerdict(picture.id, name, BoardOutcome(verdict.outcome), {}, (), 0.0, verdict.refusal)
    return contract.board_body(
        unseen if whole is None else whole.verdict(),
        placed={} if whole is None else whole.placed(),
        picture_sha256=picture.picture_sha256,
        waited_seconds=verdict.waited_seconds,
        serving=serving,
        site=config.box.site,
        box=config.box.name,
        finished_at=datetime.now(UTC),
        captured_at=picture.captured,
        out_of_order=out_of_order,
    )


def _part_verdict(part: BoardPart) -> PartVerdict:
    refusal = None if part.reason is None else Refusal(part.reason, part.detail or "")
    return PartVerdict(part.request, Outcome(part.outcome), refusal)


def written(product: Product) -> bytes:
    """The recipe that a board was opened with: after a restart there may be another."""
    recipe = product.recipe.model_dump(mode="json", by_alias=True)
    return json.dumps({"recipe": recipe, "golden_sha256": product.golden_sha256}).encode()


def _read(config: Config, board: OpenBoard) -> Product:
    known = json.loads(board.recipe)
    folder = config.paths.catalog / "products" / board.product
    return catalogs.product_of(folder, Recipe.model_validate(known["recipe"]), known["golden_sha256"])
