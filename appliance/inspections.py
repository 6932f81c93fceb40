"""Pictures between their turn and their recorded verdict: what is asked about each, and what is said of it.

picture → Arrived, one for each placement of a whole board → verdict → body → record → outbox
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from appliance import contract
from appliance.boards import Boards, ServingBy, Whole, body_of, verdict_of
from appliance.catalog import Product
from appliance.contract import Address
from appliance.core import freshness, suspects
from appliance.core.types import Arrived, Batch, Outcome, Refusal, Request, Verdict
from appliance.drivers import heads
from appliance.drivers.album import Album, Subject
from appliance.drivers.deadletters import DeadLetters
from appliance.drivers.intake import component_of
from appliance.drivers.outbox import Outbox
from appliance.drivers.recipes import Recipes
from appliance.drivers.records import Conclusion, Picture, Recorded, Records, Sort, Spooled
from appliance.errors import MessageError
from appliance.feed import Fed
from appliance.startup import Installation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Open:
    """A picture between its turn and its verdict, or a part that is cut from it."""

    spooled: Spooled
    address: Address
    component: str
    product: Product | None
    alone: bool
    is_cut: bool = False


class Inspections:
    """Used by the thread that decides. `left` is called on the writer's when a picture has left the spool."""

    def __init__(
        self,
        installation: Installation,
        records: Records,
        recipes: Recipes,
        boards: Boards,
        serving: ServingBy,
        outbox: Outbox,
        left: Callable[[], None],
    ) -> None:
        self._config, self._bundles = installation.config, installation.catalog.bundles
        self._records, self._recipes, self._boards = records, recipes, boards
        self._serving, self._outbox, self._left = serving, outbox, left
        self._open: dict[str, _Open] = {}
        self._newest = freshness.Newest(lambda place: records.newest_capture(*place))
        limits = self._config.limits
        self.clocks = freshness.Clocks()
        self.dead_letters = DeadLetters(records.folder / "quarantine", int(limits.quarantine))
        self.album = Album(records.payload, self._subject, int(limits.picture_bytes), limits.picture_pixels)
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def __len__(self) -> int:
        """Requests without a verdict."""
        return len(self._open)

    @property
    def attempts(self) -> Collection[int]:
        """Of each picture without a verdict."""
        return {asked.spooled.arrival: asked.spooled.attempts for asked in self._open.values()}.values()

    def arrivals(self, batch: Batch) -> set[int]:
        """Of the batch's pictures those that have no verdict yet."""
        return {asked.spooled.arrival for asked in self._asked(batch)}

    def is_suspect(self, batch: Batch) -> bool:
        """Whether nothing may run beside it."""
        return any(asked.alone for asked in self._asked(batch))

    def _asked(self, batch: Batch) -> list[_Open]:
        return [self._open[request] for request in batch.requests if request in self._open]

    # From a picture to what is asked about it.

    def begin(self, fed: Fed) -> Iterator[Arrived]:
        """What to ask about it. One that the catalogue no longer knows, or that is poison or stale, ends here."""
        spooled, picture, arrived = fed.spooled, fed.spooled.picture, fed.arrived_seconds
        address = Address(picture.line, picture.product, picture.board, picture.part)
        self._boards.join(spooled, address, arrived)
        catalog = self._recipes.of(address)
        product = catalog.products.get(address.product)
        try:
            component = component_of(address, catalog)
        except MessageError as error:  # it was accepted under another catalogue
            self._open[picture.id] = _Open(spooled, address, picture.part, product, fed.alone)
            refusal = Refusal(error.reason, str(error))
            self.conclude(Verdict(picture.id, Outcome.REJECTED, (), time.monotonic() - arrived, refusal))
            return
        self._open[picture.id] = asked = _Open(spooled, address, component, product, fed.alone)
        if (why := suspects.poisoned(spooled.attempts)) is not None:
            self._bury(spooled, Verdict(picture.id, Outcome.ERROR, (), time.monotonic() - arrived, why))
        elif (why := self._stale(picture, time.monotonic() - arrived)) is not None:
            self.conclude(Verdict(picture.id, Outcome.REJECTED, (), time.monotonic() - arrived, why))
        elif address.is_whole:
            yield from self._cut(asked, arrived)
        else:
            yield _arrived(picture.id, asked, arrived)

    def _stale(self, picture: Picture, waited_seconds: float) -> Refusal | None:
        """Why it is too old, if it is; lines whose clocks are ahead are noted."""
        if (captured := picture.captured) is None:
            return None
        behind_seconds = picture.accepted_at - captured.timestamp()
        self.clocks.note(picture.line, -behind_seconds, time.monotonic())
        return freshness.stale(behind_seconds, waited_seconds, self._config.limits.stale_seconds)

    def _cut(self, asked: _Open, arrived: float) -> Iterator[Arrived]:
        """A whole board's picture is a request for each placement of the recipe; together they have its one verdict."""
        picture, product = asked.spooled.picture, asked.product
        assert product is not None
        del self._open[picture.id]
        self.album.keep_whole(picture.id, product)
        for name, address in self._boards.begin_whole(Whole(picture.id, asked.address, product, arrived)):
            component = product.placements[address.part].component
            self._open[name] = part = replace(asked, address=address, component=component, is_cut=True)
            yield _arrived(name, part, arrived)

    def _bury(self, spooled: Spooled, verdict: Verdict) -> None:
        """A dead letter: nobody opens the picture any more, and its bytes are kept for whoever wants to know why."""
        picture = spooled.picture
        log.error("dead_letter request=%s attempts=%d sha256=%s", picture.id, spooled.attempts, picture.picture_sha256)
        self.dead_letters.keep(picture, self._records.payload(picture.id), spooled.attempts)
        self.conclude(verdict)

    def _subject(self, request: str) -> Subject:
        """On an executor's thread; the request is open as long as a batch holds it, unless it became late."""
        asked = self._open.get(request)
        if asked is None:
            raise MessageError("deadline", f"{request} has its verdict already", "nothing to do")
        return Subject(asked.product, asked.address.part, asked.spooled.picture.id if asked.is_cut else None)

    # From a request's verdict to the picture's one record.

    def conclude(self, verdict: Verdict) -> None:
        asked = self._open.pop(verdict.request)
        if not asked.is_cut:
            self._record(asked, verdict, None, self._sort(verdict))
            return
        whole = self._boards.cut_inspected(asked.spooled.picture.id, asked.address.part, verdict)
        if whole is not None:
            sorts = {self._sort(part) for part in whole.parts.values()}
            keep = next((sort for sort in Sort if sort in sorts), None)
            self._record(replace(asked, address=whole.address), verdict_of(whole, verdict), whole, keep)

    def _record(self, asked: _Open, verdict: Verdict, whole: Whole | None, keep: Sort | None) -> None:
        """The picture's one verdict, and after it that of the board for which it was the last."""
        address = asked.address
        self._count(verdict)
        self._records.conclude(
            verdict.request,
            verdict.outcome.value,
            self._body(asked, verdict, whole),
            address.result_topic(self._config),
            lambda answer: self._recorded(verdict, asked, answer),
            keep=keep,
            also=(contract.board_topic(self._config, address.board_name),) if address.is_whole else (),
            part_of=self._boards.part_of(verdict),
        )
        self.album.forget(verdict.request)
        self._boards.inspected(verdict)

    def _count(self, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.refusal is not None:
            self.reasons[verdict.refusal.reason] += 1

    def _body(self, asked: _Open, verdict: Verdict, whole: Whole | None) -> bytes:
        picture, box = asked.spooled.picture, self._config.box
        out_of_order = self._is_out_of_order(picture)
        if asked.address.is_whole:
            return body_of(
                verdict, picture, whole, serving=self._serving, config=self._config, out_of_order=out_of_order
            )
        return contract.verdict_body(
            verdict,
            address=asked.address,
            component=asked.component,
            picture_sha256=picture.picture_sha256,
            captured_at=picture.captured,
            out_of_order=out_of_order,
            serving=self._serving,
            site=box.site,
            box=box.name,
            finished_at=datetime.now(UTC),
        )

    def _is_out_of_order(self, picture: Picture) -> bool:
        place = (picture.line, picture.product, picture.board, picture.part)
        return picture.captured_at is not None and self._newest.is_out_of_order(place, picture.captured_at)

    def _sort(self, verdict: Verdict) -> Sort | None:
        """As what the picture is kept with its verdict. A dead letter is not: nobody shall open it by accident."""
        match verdict.outcome:
            case Outcome.FAIL:
                return Sort.FAIL
            case Outcome.ERROR if verdict.refusal is None or verdict.refusal.reason != suspects.POISON:
                return Sort.DOUBTFUL
            case Outcome.PASS if self._passed_by_little(verdict):
                return Sort.DOUBTFUL
        return None

    def _passed_by_little(self, verdict: Verdict) -> bool:
        little = self._config.keep.margin
        margins = (
            heads.margin(self._bundles[step.expert].manifest.head, finding)
            for step in verdict.steps
            for finding in step.findings
        )
        return any(margin is not None and margin < little for margin in margins)

    def _recorded(self, verdict: Verdict, asked: _Open, answer: Conclusion) -> None:
        """On the writer's thread: the verdict stands, now it may be seen."""
        if isinstance(answer, Recorded):
            self._outbox.post(answer.publications)
        if verdict.refusal is not None and verdict.outcome in (Outcome.ERROR, Outcome.REJECTED):
            error = MessageError(verdict.refusal.reason, verdict.refusal.detail, "see the verdict of this request")
            topic, sha256 = asked.address.picture_topic(self._config), asked.spooled.picture.picture_sha256
            self._outbox.answer(error, topic, verdict.request, sha256, has_verdict=True)
        self._left()


def _arrived(name: str, asked: _Open, arrived: float) -> Arrived:
    address, seconds = asked.address, asked.spooled.picture.deadline_seconds
    deadline = None if seconds is None else arrived + seconds
    picture = asked.spooled.picture.id if asked.is_cut else ""
    return Arrived(
        Request(name, asked.component, arrived, deadline, address.line, address.product, asked.alone, picture)
    )
