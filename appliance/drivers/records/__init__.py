"""The spool of accepted pictures, and their verdicts, which are the outbox: what the box still owes, on disk.

A picture is committed here before it is acknowledged to the broker, and leaves in the same transaction that records
its verdict. A verdict waits in the outbox until the broker has confirmed it. So a crash at any moment loses nothing and
answers nothing differently. The store knows neither MQTT nor experts: ids, bytes and topics are given to it.

`values` is what flows; `schema` the tables; `opening` takes the folder, moves what is damaged aside and counts crashes;
`inhand` knows whose bytes are in work; `ledger` enters requests into a transaction, `boards` what they say of boards;
`writer` is the thread that commits them in groups; `readers` read beside it; `records` joins these. `archive` and
`export` are for whoever asks later.
"""

from appliance.drivers.records.records import Records
from appliance.drivers.records.values import (
    Acceptance,
    Answered,
    BoardPart,
    Conclusion,
    Conflict,
    Counts,
    Full,
    New,
    OpenBoard,
    PartOf,
    Picture,
    Publication,
    Quota,
    Recorded,
    Sort,
    Spooled,
    TurnedAway,
    Unowed,
    Waiting,
)

__all__ = [
    "Acceptance",
    "Answered",
    "BoardPart",
    "Conclusion",
    "Conflict",
    "Counts",
    "Full",
    "New",
    "OpenBoard",
    "PartOf",
    "Picture",
    "Publication",
    "Quota",
    "Recorded",
    "Records",
    "Sort",
    "Spooled",
    "TurnedAway",
    "Unowed",
    "Waiting",
]
