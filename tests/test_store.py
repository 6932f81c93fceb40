"""The store on disk: sharing, checking, tidying, and what is left after a kill at any moment."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.catalog import Bundle
from appliance.errors import StoreError
from appliance.store import sharing
from appliance.store.store import Compiled, Store
from appliance.store.storecheck import StoreCheck
from tests import kit_models as kit
from tests.kit_process import alone

TRUNK = [bytes([n]) * 40_000 for n in (1, 2, 3, 4)]


@dataclass(frozen=True, slots=True)
class Shelf:
    """A store, and experts for it that no compiler made: what counts here are their bytes."""

    folder: Path
    store: Store

    @classmethod
    def at(cls, folder: Path) -> Shelf:
        return cls(folder, Store(folder / "store"))

    def bundle(self, name: str, tensors: Sequence[bytes]) -> Bundle:
        source = self.folder / f"{name}.onnx"
        source.write_bytes(b"".join(tensors) or b"nothing")
        return kit.write_bundle(self.folder / "models", name, source)

    def keep(self, bundle: Bundle, tensors: Sequence[bytes], **costs: Any) -> Compiled:
        with self.store.workshop() as folder:
            return self.store.keep(bundle, _made(tensors, folder, **costs), folder)

    def put(self, name: str, tensors: Sequence[bytes]) -> Bundle:
        bundle = self.bundle(name, tensors)
        self.keep(bundle, tensors)
        return bundle

    def found(self, bundle: Bundle) -> Compiled:
        compiled = self.store.find(bundle)
        assert compiled is not None
        return compiled

    def read(self, bundle: Bundle) -> list[bytes]:
        compiled = self.found(bundle)
        files = [self.store.segment_path(segment.id).read_bytes() for segment in compiled.segments]
        return [files[slot.segment][slot.offset : slot.offset + slot.bytes] for slot in compiled.tensors]

    def segment_files(self) -> set[str]:
        return {path.name for path in (self.store.folder / "segments").glob("*")}


def _made(tensors: Sequence[bytes], folder: Path, **costs: Any) -> dict[str, Any]:
    distinct = list(dict.fromkeys(tensors))
    offsets, size = sharing.layout([len(tensor) for tensor in distinct])
    content = bytearray(size)
    for tensor, offset in zip(distinct, offsets, strict=True):
        content[offset : offset + len(tensor)] = tensor
    (folder / "segment").write_bytes(content)
    template = b"the template of %d tensors" % len(tensors)
    (folder / "template.onnx").write_bytes(template)
    (folder / "plain.onnx").write_bytes(b"plain")
    return {
        "architecture": _sha256(template),
        "segment": _sha256(content),
        "bytes": size,
        "tensors": [
            {
                "name": f"w{i}",
                "dtype": "uint8",
                "shape": [len(tensor)],
                "offset": offsets[distinct.index(tensor)],
                "sha256": _sha256(tensor),
            }
            for i, tensor in enumerate(tensors)
        ],
        "outputs": ["logits"],
        "output_bytes": 28,
        "plain": _sha256(b"plain"),
        "costs": {
            "is_plain": False,
            "item_seconds": 0.001,
            "fixed_seconds": 0.0,
            "activation_item_bytes": 1000,
            "activation_fixed_bytes": 500,
            "private_bytes": 70,
            **costs,
        },
    }


def _sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf.at(tmp_path)


def flip_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content) if position >= 0 else len(content) // 2] ^= 1
    path.write_bytes(content)


def fine_tunes(shelf: Shelf, count: int, start: int = 0) -> dict[str, tuple[Bundle, list[bytes]]]:
    contents = {f"e{n}": [*TRUNK, bytes([100 + n]) * 20_000] for n in range(start, start + count)}
    return {name: (shelf.put(name, tensors), tensors) for name, tensors in contents.items()}


def test_a_frozen_trunk_is_stored_once(shelf: Shelf) -> None:
    experts = fine_tunes(shelf, 5)
    before = {name: shelf.found(bundle).weights_sha256 for name, (bundle, _) in experts.items()}
    assert shelf.store.tidy() == []
    trunks = {shelf.found(bundle).segments[1] for bundle, _ in experts.values()}
    assert len(trunks) == 1
    assert len(shelf.segment_files()) == 1 + 5
    assert {name: shelf.read(bundle) for name, (bundle, _) in experts.items()} == {
        name: tensors for name, (_, tensors) in experts.items()
    }
    assert {name: shelf.found(bundle).weights_sha256 for name, (bundle, _) in experts.items()} == before
    for bundle, _ in experts.values():
        shelf.store.verify(shelf.found(bundle))


def test_one_more_fine_tune_joins_the_trunk_that_is_there(shelf: Shelf) -> None:
    old = fine_tunes(shelf, 3)
    shelf.store.tidy()
    before = {name: shelf.found(bundle) for name, (bundle, _) in old.items()}
    [(bundle, tensors)] = fine_tunes(shelf, 1, start=3).values()
    shelf.store.tidy()
    assert {name: shelf.found(bundle) for name, (bundle, _) in old.items()} == before
    assert shelf.found(bundle).segments[1] == before["e0"].segments[1]
    assert shelf.read(bundle) == tensors


def test_a_fine_tune_that_shares_half_a_trunk_divides_it(shelf: Shelf) -> None:
    old = fine_tunes(shelf, 2)
    shelf.store.tidy()
    half = [*TRUNK[:2], b"5" * 40_000, b"6" * 40_000, b"head" * 5000]
    bundle = shelf.put("half", half)
    shelf.store.tidy()
    assert shelf.read(bundle) == half
    assert [len(shelf.found(bundle).segments) for bundle, _ in old.values()] == [3, 3]
    assert [shelf.read(bundle) for bundle, _ in old.values()] == [tensors for _, tensors in old.values()]
    assert len(shelf.segment_files()) == 2 + 3


def test_experts_of_other_architectures_share_too(shelf: Shelf) -> None:
    one, other = shelf.put("one", [*TRUNK, b"7" * 700]), shelf.put("other", [*TRUNK, b"8" * 900, b"9" * 900])
    shelf.store.tidy()
    assert shelf.found(one).architecture != shelf.found(other).architecture
    assert shelf.found(one).segments[1] == shelf.found(other).segments[1]


def test_nothing_is_written_when_nothing_was_kept(shelf: Shelf) -> None:
    fine_tunes(shelf, 2)
    shelf.store.tidy()
    before = _files(shelf.store.folder)
    shelf.store.tidy()
    assert _files(shelf.store.folder) == before


def test_segments_that_a_running_service_read_about_stay_until_it_ends(shelf: Shelf) -> None:
    [(bundle, _)] = fine_tunes(shelf, 1).values()
    service = Store(shelf.folder / "store")
    service.join()
    known = service.find(bundle)
    assert known is not None
    fine_tunes(shelf, 1, start=1)
    shelf.store.tidy()
    assert shelf.found(bundle).segments != known.segments
    service.verify(known)
    del service
    shelf.store.tidy()
    assert not shelf.segment_files() & {segment.id for segment in known.segments}


pieces = st.builds(lambda fill, size: bytes([fill]) * size, st.integers(0, 5), st.sampled_from([1, 100, 5000]))


@settings(max_examples=40)
@given(
    st.lists(st.lists(pieces, max_size=6), min_size=1, max_size=5),
    st.sampled_from([1, 300, sharing.LEAST_SHARED_BYTES]),
    st.booleans(),
)
def test_however_tensors_are_shared_each_expert_gets_its_own_bytes_back(
    contents: list[list[bytes]], least: int, tidies_each_time: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST_SHARED_BYTES", least)
        shelf, bundles = Shelf.at(Path(folder)), []
        for number, tensors in enumerate(contents):
            bundles.append(shelf.put(f"e{number}", tensors))
            if tidies_each_time:
                shelf.store.tidy()
        shelf.store.tidy()
        assert [shelf.read(bundle) for bundle in bundles] == contents
        named = {segment.id for bundle in bundles for segment in shelf.found(bundle).segments}
        assert shelf.segment_files() == named


def test_a_flipped_bit_in_a_shared_segment_sets_all_aside_who_share_it(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    experts = fine_tunes(shelf, 3)
    apart = shelf.put("apart", [b"a" * 500])
    shelf.store.tidy()
    path = shelf.store.segment_path(shelf.found(experts["e0"][0]).segments[1].id)
    flip_bit(path)
    with caplog.at_level(logging.ERROR):
        [damage] = shelf.store.check()
    assert (damage.path, damage.experts) == (path, ("e0", "e1", "e2"))
    assert f"quarantined file={path}" in caplog.text
    assert "experts=e0,e1,e2" in caplog.text
    assert (shelf.store.quarantine / path.name).is_file()
    assert "SHA-256" in (shelf.store.quarantine / f"{path.name}.reason").read_text()
    assert [shelf.store.find(bundle) for bundle, _ in experts.values()] == [None] * 3
    shelf.found(apart)
    for bundle, tensors in experts.values():
        shelf.keep(bundle, tensors)
    shelf.store.tidy()
    assert shelf.store.check() == []
    assert [shelf.read(bundle) for bundle, _ in experts.values()] == [tensors for _, tensors in experts.values()]


def test_damage_in_a_segment_is_never_copied_into_another(shelf: Shelf) -> None:
    [(bundle, tensors)] = fine_tunes(shelf, 1).values()
    path = shelf.store.segment_path(shelf.found(bundle).segments[0].id)
    flip_bit(path, 10)
    others = fine_tunes(shelf, 2, start=1)
    found = shelf.store.tidy()
    assert [damage.path for damage in found] in ([path], [])
    if found:
        shelf.keep(bundle, tensors)
        shelf.store.tidy()
    assert [shelf.read(bundle) for bundle, _ in others.values()] == [tensors for _, tensors in others.values()]


def test_a_flipped_bit_anywhere_in_an_experts_file_is_noticed(shelf: Shelf) -> None:
    bundle = shelf.put("e", [b"a" * 500, b"b" * 300])
    [path] = (shelf.store.folder / "experts" / "e").iterdir()
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        flip_bit(path, position)
        assert shelf.store.find(bundle) is None
        path.write_bytes(sound)
    assert shelf.store.find(bundle) is not None


def test_an_offset_that_somebody_edited_is_noticed(shelf: Shelf) -> None:
    bundle = shelf.put("e", [b"a" * 500, b"b" * 300])
    [path] = (shelf.store.folder / "experts" / "e").iterdir()
    entry = json.loads(path.read_text())
    entry["content"]["tensors"][0]["offset"] = 256
    path.write_text(json.dumps(entry))
    assert shelf.store.find(bundle) is None


def test_a_file_that_nobody_may_read_now_is_not_called_damaged(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shelf.put("e", [b"a" * 500])
    opened = Path.open

    def too_many(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent.name == "segments":
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", too_many)
    with pytest.raises(StoreError, match="Too many open files"):
        shelf.store.check()
    monkeypatch.undo()
    shelf.store.verify(shelf.found(bundle))
    assert not shelf.store.quarantine.exists()


def test_a_check_can_be_ended(shelf: Shelf) -> None:
    fine_tunes(shelf, 2)
    told: list[float] = []

    def rest(seconds: float) -> bool:
        told.append(seconds)
        return len(told) == 2

    assert shelf.store.check(rest) == []
    assert len(told) == 2


def test_a_store_is_checked_beside_the_service(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    experts = fine_tunes(shelf, 2)
    bundle = experts["e1"][0]
    flip_bit(shelf.store.segment_path(shelf.found(bundle).segments[0].id))
    check = StoreCheck(shelf.store, {}, {}, share=1.0)
    with caplog.at_level(logging.INFO):
        check.start()
        check.wait()
        check.stop()
    assert "store_checked damaged=1" in caplog.text
    assert shelf.store.find(bundle) is None


def test_a_check_that_goes_on_for_days_is_stopped_at_once(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    fine_tunes(shelf, 2)
    check = StoreCheck(shelf.store, {}, {}, share=1e-9)
    with caplog.at_level(logging.INFO):
        check.start()
        check.stop()
    assert "store_checked" not in caplog.text


def test_what_was_not_written_as_it_was_made_is_not_kept(shelf: Shelf) -> None:
    tensors = [b"a" * 500]
    bundle = shelf.bundle("e", tensors)
    with shelf.store.workshop() as folder:
        made = _made(tensors, folder)
        flip_bit(folder / "segment", 3)
        with pytest.raises(StoreError, match="not what was written"):
            shelf.store.keep(bundle, made, folder)
    assert shelf.store.find(bundle) is None


@pytest.mark.parametrize("first", [True, False])
def test_who_measures_an_architecture_first_decides_for_all(shelf: Shelf, first: bool) -> None:
    one, other = shelf.bundle("one", [b"a" * 500]), shelf.bundle("other", [b"b" * 500])
    shelf.keep(one, [b"a" * 500], is_plain=first, item_seconds=0.1)
    shelf.keep(other, [b"b" * 500], is_plain=not first, item_seconds=0.2)
    found = [shelf.found(bundle) for bundle in (one, other)]
    assert [compiled.plain_path is not None for compiled in found] == [first, first]
    assert [compiled.item_seconds for compiled in found] == [0.1, 0.1]
    assert [compiled.private_bytes for compiled in found] == [70 * first] * 2


def test_an_expert_without_a_plain_graph_is_compiled_again_when_its_architecture_wants_one(shelf: Shelf) -> None:
    bundle = shelf.bundle("e", [b"a" * 500])
    compiled = shelf.keep(bundle, [b"a" * 500], is_plain=False)
    (compiled.template_path.parent / "architecture.json").unlink()
    shelf.keep(shelf.bundle("other", [b"b" * 500]), [b"b" * 500], is_plain=True)
    assert shelf.store.find(bundle) is None
    shelf.keep(bundle, [b"a" * 500], is_plain=False)
    assert shelf.found(bundle).plain_path is not None


@pytest.mark.parametrize("missing", ["costs", "plain"])
def test_what_a_child_relied_on_must_still_be_there(shelf: Shelf, missing: str) -> None:
    """It began when the architecture was known otherwise."""
    tensors = [b"a" * 500]
    if missing == "plain":
        shelf.keep(shelf.bundle("before", tensors), tensors, is_plain=True)
    with shelf.store.workshop() as folder, pytest.raises(StoreError, match=r"architecture\.json"):
        shelf.store.keep(shelf.bundle("e", tensors), {**_made(tensors, folder), missing: None}, folder)


def test_another_runtime_version_has_a_store_of_its_own(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shelf.put("e", [b"a" * 500])
    before = _files(shelf.store.folder)
    monkeypatch.setattr("appliance.store.store._runtime_version", lambda: "9.9.9")
    later = Shelf.at(shelf.folder)
    assert later.store.find(bundle) is None
    later.keep(bundle, [b"a" * 500])
    later.store.tidy()
    later.found(bundle)
    assert _files(shelf.store.folder) == before


def test_a_kill_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    """Keeps and shares in a child that kills itself at its first step on disk, then at its second, and so on."""
    alone(kill_at_every_step, tmp_path)  # which has no threads: with some it may not be forked


def kill_at_every_step(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.store.sealed._flush", lambda path: None)  # matters to power cuts only
        assert _steps_until_done(home) > 30


def _steps_until_done(home: Path) -> int:
    for step in itertools.count(1):
        (home / str(step)).mkdir()
        shelf = Shelf.at(home / str(step))
        old = fine_tunes(shelf, 2)
        shelf.store.tidy()
        contents = {"half": [*TRUNK[:2], b"h" * 400], "e9": [*TRUNK, b"9" * 100]}
        bundles = {name: shelf.bundle(name, tensors) for name, tensors in contents.items()}
        shelf = Shelf.at(shelf.folder)  # so that its child is alone in the store
        survived = _ends_well(shelf, bundles, contents, step)
        assert shelf.store.check() == []
        assert [shelf.read(bundle) for bundle, _ in old.values()] == [tensors for _, tensors in old.values()]
        for name, bundle in bundles.items():
            if shelf.store.find(bundle) is None:
                shelf.keep(bundle, contents[name])
        shelf.store.tidy()
        assert shelf.store.check() == []
        assert {name: shelf.read(bundle) for name, bundle in bundles.items()} == contents
        everybody = [*bundles.values(), *(bundle for bundle, _ in old.values())]
        named = {segment.id for bundle in everybody for segment in shelf.found(bundle).segments}
        assert shelf.segment_files() == named
        if survived:
            return step
    raise AssertionError("it has no end")


def _ends_well(shelf: Shelf, bundles: Mapping[str, Bundle], contents: Mapping[str, list[bytes]], last: int) -> bool:
    """Whether the work was done before its `last` step on disk, at which its process is killed."""
    pid = os.fork()
    if pid == 0:
        steps = itertools.count(1)

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            is_step = event in ("os.rename", "os.remove", "os.mkdir", "open") and str(shelf.folder) in str(arguments[0])
            if is_step and next(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            for name, bundle in bundles.items():
                shelf.keep(bundle, contents[name])
            shelf.store.tidy()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFEXITED(status)


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
