from __future__ import annotations

import gc
import hashlib
import resource
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from appliance.catalog import Bundle
from appliance.core.types import Segment
from appliance.drivers import runtime
from appliance.drivers.devices import anonymous_bytes
from appliance.engine.arena import Arena
from appliance.engine.cancellation import Cancellation
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import Cancelled, LoadError, ModelError, OutOfMemory, RunError, StoreError
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests import kit_models as kit
from tests.kit_children import kept_children
from tests.kit_process import alone, amid_work
from tests.kit_segments import bytes_of

__all__ = ["kept_children"]  # a fixture

pytestmark = pytest.mark.usefixtures("kept_children")


@dataclass(frozen=True, slots=True)
class Shop:
    """Compiled experts `e0` … `e3` of one architecture and `wide` of another, and a place to run them."""

    bundles: Mapping[str, Bundle]
    compiled: Mapping[str, Compiled]
    memory: Weights
    sessions: Sessions

    def ready(self, name: str) -> Compiled:
        compiled = self.compiled[name]
        self.memory.load(compiled.segments)
        self.sessions.activate(compiled)
        return compiled

    def plain(self, name: str, pictures: NDArray[np.float32]) -> NDArray[Any]:
        return kit.run_plain(self.bundles[name].model_path, {"image": pictures})["logits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]:
    folder = tmp_path_factory.mktemp("sessions")
    bundles = [kit.write_bundle(folder / "models", f"e{i}", kit.conv_net(i)) for i in range(4)]
    bundles.append(kit.write_bundle(folder / "models", "wide", kit.conv_net(9, width=300)))
    store = Store(folder / "store")
    results = compile_bundles(store, bundles, report=lambda name, result: None)
    return store, bundles, {name: result for name, result in results.items() if isinstance(result, Compiled)}


@pytest.fixture
def shop(made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]) -> Shop:
    return opened(*made)


def opened(store: Store, bundles: Sequence[Bundle], compiled: Mapping[str, Compiled]) -> Shop:
    memory = Weights(store.segment_path)
    return Shop(
        {b.manifest.name: b for b in bundles},
        compiled,
        memory,
        Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20),
    )


def run(shop: Shop, name: str, pictures: NDArray[np.float32]) -> NDArray[Any]:
    with shop.sessions.lease(name) as lease:
        return lease.run({"image": pictures})["logits"]


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of the sessions that will be opened from now on."""
    opened: list[Path] = []
    really_open = runtime.open_session

    def counting(path: Path, **kwargs: Any) -> Any:
        opened.append(path)
        return really_open(path, **kwargs)

    monkeypatch.setattr(runtime, "open_session", counting)
    return opened


def test_experts_of_one_architecture_each_give_their_own_answers(shop: Shop) -> None:
    pictures = kit.noise(2)
    for name in shop.compiled:
        shop.ready(name)
    for name in [*shop.compiled, *shop.compiled]:
        np.testing.assert_allclose(run(shop, name, pictures), shop.plain(name, pictures), atol=1e-5)


def test_batches_of_every_size_run_on_one_binding(shop: Shop) -> None:
    shop.ready("e0")
    for size in (1, 4, 2, 1, 7):
        np.testing.assert_allclose(
            run(shop, "e0", kit.noise(size)), shop.plain("e0", kit.noise(size)), atol=1e-5, err_msg=str(size)
        )


def test_results_stay_as_they_were_when_the_expert_runs_again(shop: Shop) -> None:
    shop.ready("e0")
    first = run(shop, "e0", kit.noise(2, seed=1))
    kept = first.copy()
    run(shop, "e0", kit.noise(2, seed=2))
    shop.sessions.drop("e0")
    shop.memory.drop(shop.compiled["e0"].segments)
    np.testing.assert_array_equal(first, kept)


def test_pictures_in_any_layout_are_taken(shop: Shop) -> None:
    shop.ready("e0")
    pictures = kit.noise(2)
    crooked = np.asfortranarray(pictures)
    np.testing.assert_array_equal(run(shop, "e0", crooked), run(shop, "e0", pictures))


def test_one_session_serves_an_architecture_however_many_threads_ask(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    start = threading.Barrier(4)

    def ready(name: str) -> None:
        start.wait()
        shop.ready(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ready, ["e0", "e1", "e2", "e3"]))
    assert opened == [shop.compiled["e0"].template_path]


def test_sessions_long_out_of_use_are_closed_and_opened_again_when_wanted(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    monkeypatch.setattr("appliance.engine.sessions._UNUSED_TEMPLATES", 1)
    for name in ("e0", "wide", "e1", "e0", "e2"):
        shop.ready(name)
        np.testing.assert_allclose(run(shop, name, kit.noise(1)), shop.plain(name, kit.noise(1)), atol=1e-5)
        shop.sessions.drop(name)
    conv, wide = shop.compiled["e0"].template_path, shop.compiled["wide"].template_path
    assert opened == [conv, wide, conv]


def test_many_threads_run_many_experts_without_mixing_them(shop: Shop) -> None:
    names = [f"e{i}" for i in range(4)]
    expected = {}
    for name in names:
        shop.ready(name)
        expected[name] = shop.plain(name, kit.noise(2))

    def work(number: int) -> None:
        for turn in range(20):
            name = names[(number + turn) % 4]
            np.testing.assert_allclose(run(shop, name, kit.noise(2)), expected[name], atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_one_expert_may_be_leased_twice_at_a_time(shop: Shop) -> None:
    shop.ready("e0")
    one, other = kit.noise(1, seed=1), kit.noise(3, seed=2)
    with shop.sessions.lease("e0") as first, shop.sessions.lease("e0") as second:
        np.testing.assert_allclose(first.run({"image": one})["logits"], shop.plain("e0", one), atol=1e-5)
        np.testing.assert_allclose(second.run({"image": other})["logits"], shop.plain("e0", other), atol=1e-5)


def test_what_is_lent_is_not_dropped(shop: Shop) -> None:
    compiled = shop.ready("e0")
    with shop.sessions.lease("e0") as lease:
        with pytest.raises(RunError, match="e0 is running"):
            shop.sessions.drop("e0")
        with pytest.raises(LoadError, match="in use"):
            shop.memory.drop(compiled.segments)
        assert lease.run({"image": kit.noise(1)})["logits"].shape == (1, 7)
    shop.sessions.drop("e0")
    shop.memory.drop(compiled.segments)
    assert shop.memory.mapped_bytes == 0


def test_a_lease_that_ends_badly_is_taken_back(shop: Shop) -> None:
    shop.ready("e0")
    with pytest.raises(ZeroDivisionError), shop.sessions.lease("e0"):
        raise ZeroDivisionError
    shop.sessions.drop("e0")


def test_only_active_experts_are_lent_or_dropped(shop: Shop) -> None:
    with pytest.raises(RunError, match="e0 is not active"), shop.sessions.lease("e0"):
        pass
    with pytest.raises(RunError, match="e0 is not active"):
        shop.sessions.drop("e0")


def test_an_expert_without_its_weights_is_not_activated(shop: Shop) -> None:
    with pytest.raises(LoadError, match="not in memory"):
        shop.sessions.activate(shop.compiled["e0"])
    with pytest.raises(RunError), shop.sessions.lease("e0"):
        pass


def test_the_weights_of_an_active_expert_are_not_dropped(shop: Shop) -> None:
    compiled = shop.ready("e0")
    with pytest.raises(LoadError, match="in use"):
        shop.memory.drop(compiled.segments)
    shop.sessions.drop("e0")
    shop.memory.drop(compiled.segments)


def test_weights_that_come_back_elsewhere_are_bound_anew(shop: Shop) -> None:
    pictures = kit.noise(1)
    for name in ["wide", "e0", "wide", "e1", "wide"]:
        compiled = shop.ready(name)
        np.testing.assert_allclose(run(shop, name, pictures), shop.plain(name, pictures), atol=1e-5)
        shop.sessions.drop(name)
        shop.memory.drop(compiled.segments)


def test_another_version_needs_the_first_to_be_dropped(shop: Shop) -> None:
    compiled = shop.ready("e0")
    shop.sessions.activate(compiled)
    with pytest.raises(RunError, match="another version of e0"):
        shop.sessions.activate(replace(compiled, version=2))


@pytest.mark.parametrize(
    "pictures", [kit.noise(1, 3, 8, 8), kit.noise(1, 1, 16, 16), np.zeros((3, 16, 16), np.float32)]
)
def test_pictures_of_a_wrong_shape_are_a_run_error_that_names_the_expert(
    shop: Shop, pictures: NDArray[np.float32]
) -> None:
    shop.ready("e0")
    with pytest.raises(RunError, match="e0 failed"):
        run(shop, "e0", pictures)
    assert run(shop, "e0", kit.noise(1)).shape == (1, 7)


def test_a_missing_input_is_named(shop: Shop) -> None:
    shop.ready("e0")
    with pytest.raises(RunError, match="without its input image"), shop.sessions.lease("e0") as lease:
        lease.run({"picture": kit.noise(1)})


def test_a_damaged_template_is_never_opened(shop: Shop, tmp_path: Path) -> None:
    compiled = shop.compiled["e0"]
    content = bytearray(compiled.template_path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "template.onnx").write_bytes(content)
    shop.memory.load(compiled.segments)
    with pytest.raises(StoreError, match="is damaged"):
        shop.sessions.activate(replace(compiled, template_path=tmp_path / "template.onnx"))
    shop.memory.drop(compiled.segments)
    shop.ready("e0")


def test_a_tensor_outside_its_segment_is_never_bound(shop: Shop) -> None:
    compiled = shop.compiled["e0"]
    beyond = replace(compiled.tensors[-1], offset=compiled.segments[0].bytes - 8)
    shop.memory.load(compiled.segments)
    with pytest.raises(StoreError, match="outside its segment"):
        shop.sessions.activate(replace(compiled, tensors=(*compiled.tensors[:-1], beyond)))


def test_a_resident_expert_does_not_keep_the_pictures_of_its_last_run(shop: Shop) -> None:
    shop.ready("e0")
    pictures = kit.noise(64)
    kept = weakref.ref(pictures)
    run(shop, "e0", pictures)
    del pictures
    gc.collect()
    assert kept() is None


def test_activations_beyond_their_budget_are_given_back(
    made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(run_beyond_the_budget, made)


def run_beyond_the_budget(shop: Shop) -> None:
    compiled = replace(shop.compiled["e0"], activation_item_bytes=32_000)
    shop.memory.load(compiled.segments)
    frugal = Sessions(shop.memory, runtime.CpuPlace(), activation_bytes=0)
    sessions = Sessions(shop.memory, runtime.CpuPlace(), activation_bytes=16 << 20)

    def held_after(count: int, within: Sessions) -> int:
        within.activate(compiled)
        with within.lease("e0") as lease:
            lease.run({"image": kit.noise(count)})
        within.drop("e0")
        runtime.trim()
        return anonymous_bytes()

    held_after(400, frugal)  # what is taken once for a process is there from now on
    before = held_after(1, frugal)
    assert held_after(400, sessions) - before > 4 << 20
    assert held_after(1, sessions) - before > 4 << 20
    assert held_after(300, sessions) - before < 2 << 20


def test_a_run_that_is_given_up_gives_back_what_it_was_to_give_back(
    long_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(run_and_give_up, long_made)


def run_and_give_up(long_shop: Shop) -> None:
    compiled = replace(long_shop.compiled["long"], expert="longer", activation_fixed_bytes=0, activation_item_bytes=1)
    long_shop.memory.load(compiled.segments)
    place = PlaceOfArenas()
    sessions = Sessions(long_shop.memory, place, activation_bytes=1000)
    sessions.activate(compiled)
    cancellation, pictures = Cancellation(), kit.noise(6000)
    with sessions.lease("longer") as lease:
        lease.run({"image": pictures[:1]})
    runtime.trim()
    before = anonymous_bytes()
    with sessions.lease("longer", cancellation) as lease:
        amid_work(cancellation.cancel)
        with pytest.raises(Cancelled):
            lease.run({"image": pictures})
    gc.collect()
    assert anonymous_bytes() - before < pictures.nbytes // 2, "a step's outputs are as large as the pictures"
    with sessions.lease("longer") as lease:
        lease.run({"image": pictures[:1]})
    assert place.shrinks == [False, True, False]


class PlaceOfArenas(runtime.CpuPlace):
    """Each of its sessions pretends to have an arena of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shrinks: list[bool]
        object.__setattr__(self, "shrinks", [])

    @property
    def shares_arena(self) -> bool:
        return False

    def run_options(self, *, shrink: bool) -> Any:
        self.shrinks.append(shrink)
        return super().run_options(shrink=shrink)


def test_where_each_session_has_an_arena_they_keep_together_what_one_may(shop: Shop) -> None:
    place = PlaceOfArenas()
    sessions = Sessions(shop.memory, place, activation_bytes=100)
    for name, item_bytes in (("e0", 60), ("e1", 60), ("wide", 50)):
        compiled = replace(
            shop.compiled[name], activation_fixed_bytes=0, fixed_seconds=1.0, activation_item_bytes=item_bytes
        )
        shop.memory.load(compiled.segments)
        sessions.activate(compiled)
    for name in ("e0", "e1", "wide", "wide", "e0", "wide", "wide"):
        with sessions.lease(name) as lease:
            lease.run({"image": kit.noise(1)})
    assert place.shrinks == [False, False, True, True, True, False, False]


def test_a_run_that_is_over_at_once_is_not_made_one_that_can_be_ended(shop: Shop) -> None:
    place = PlaceOfArenas()
    sessions = Sessions(shop.memory, place, activation_bytes=1 << 20)
    compiled = replace(shop.compiled["e0"], fixed_seconds=0.01, item_seconds=0.002)
    shop.memory.load(compiled.segments)
    sessions.activate(compiled)
    with sessions.lease("e0") as lease:
        lease.run({"image": kit.noise(4)})
        assert place.shrinks == []
        lease.run({"image": kit.noise(8)})
        assert place.shrinks == [False]


def test_a_session_out_of_use_whose_arena_holds_too_much_is_closed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    place = PlaceOfArenas()
    sessions = Sessions(shop.memory, place, activation_bytes=100)
    for name in ("e0", "wide", "e1"):
        shop.memory.load(shop.compiled[name].segments)
    for name, item_bytes in (("e0", 60), ("wide", 50)):
        sessions.activate(
            replace(shop.compiled[name], activation_fixed_bytes=0, fixed_seconds=1.0, activation_item_bytes=item_bytes)
        )
        with sessions.lease(name) as lease:
            lease.run({"image": kit.noise(1)})
    sessions.drop("e0")
    with sessions.lease("wide") as lease:
        lease.run({"image": kit.noise(1)})
    assert place.shrinks == [False, True, False]
    openings = count_openings(monkeypatch)
    sessions.activate(shop.compiled["e1"])
    assert openings == [shop.compiled["e1"].template_path]


# Batch sizes.


@pytest.mark.parametrize(("count", "size", "ran"), [(1, 2, 2), (2, 2, 2), (3, 4, 4), (5, 0, 5), (5, 4, 5)])
def test_batches_are_filled_and_answered_without_the_filling(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, count: int, size: int, ran: int
) -> None:
    sizes: list[int] = []
    really_begin = Arena.begin

    def begin(arena: Arena, kind: tuple[str, int], size_bytes: int) -> bool:
        sizes.append(kind[1])
        return really_begin(arena, kind, size_bytes)

    monkeypatch.setattr(Arena, "begin", begin)
    compiled = shop.compiled["e0"]
    shop.memory.load(compiled.segments)
    sessions = Sessions(shop.memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    sessions.activate(compiled)
    pictures = kit.noise(count)
    with sessions.lease("e0") as lease:
        found = lease.run({"image": pictures}, size=size)["logits"]
    assert found.shape == (count, 7)
    np.testing.assert_allclose(found, shop.plain("e0", pictures), atol=1e-5)
    assert sizes == [ran]


# Plain sessions.


def as_plain(compiled: Compiled, folder: Path) -> Compiled:
    """The same expert in the plain form: its weights are initializers that have to be given when it is opened."""
    model = onnx.load_model(compiled.template_path)
    names = {slot.name for slot in compiled.tensors}
    pictures = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(pictures)
    for slot in compiled.tensors:
        weight = model.graph.initializer.add()
        weight.name, weight.data_location = slot.name, TensorProto.EXTERNAL
        weight.data_type = helper.np_dtype_to_tensor_dtype(np.dtype(slot.dtype))
        weight.dims.extend(slot.shape)
        for key, value in {"location": "template.onnx", "offset": 1 << 40, "length": slot.bytes}.items():
            entry = weight.external_data.add()
            entry.key, entry.value = key, str(value)
    content = model.SerializeToString()
    (folder / "template.onnx").touch()  # the runtime insists that it exists
    path = folder / f"plain-{hashlib.sha256(content).hexdigest()}.onnx"
    path.write_bytes(content)
    return replace(compiled, plain_path=path)


def int8_net(seed: int, channels: int) -> onnx.ModelProto:
    """Picture `image` to `logits`, all of it between them in eight bits."""
    numbers = np.random.default_rng(seed)

    def kernel(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(numbers.integers(-40, 40, shape, np.int8), name)

    def constant(value: float, dtype: type[np.generic], name: str) -> TensorProto:
        return numpy_helper.from_array(np.array(value, dtype), name)

    scale = [constant(0.02, np.float32, "s"), constant(0.01, np.float32, "ws")]
    zero = [constant(100, np.uint8, "z"), constant(0, np.int8, "wz")]
    quant = ["s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["image", *quant], ["q"]),
        helper.make_node("QLinearConv", ["q", *quant, "k1", "ws", "wz", *quant], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("QLinearConv", ["a", *quant, "k2", "ws", "wz", *quant], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("DequantizeLinear", ["b", *quant], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "head"], ["logits"]),
    ]
    weights = [
        *scale,
        *zero,
        kernel("k1", channels, 3, 3, 3),
        kernel("k2", channels, channels, 3, 3),
        numpy_helper.from_array(numbers.standard_normal((channels, 7), np.float32), "head"),
    ]
    return kit.model(nodes, weights, {"image": ["n", 3, kit.SIDE, kit.SIDE]}, {"logits": ["n", 7]})


@pytest.fixture(scope="module")
def plain_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]:
    """`byte` in eight bits, `other` of the same architecture, `float` with a large dense layer."""
    folder = tmp_path_factory.mktemp("plain")
    nets = {"byte": int8_net(0, 256), "other": int8_net(1, 256), "float": kit.conv_net(2, width=300)}
    bundles = [kit.write_bundle(folder / "models", name, net, max_batch=2) for name, net in nets.items()]
    store = Store(folder / "store")
    found = {}
    for name, result in compile_bundles(store, bundles, report=lambda name, result: None).items():
        assert isinstance(result, Compiled)
        (folder / name).mkdir()
        found[name] = as_plain(result, folder / name)
    return store, bundles, found


@pytest.fixture
def plain_shop(plain_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]) -> Shop:
    return opened(*plain_made)


def test_plain_experts_give_what_a_session_of_their_model_gives(plain_shop: Shop) -> None:
    for name in plain_shop.compiled:
        plain_shop.ready(name)
    for name in [*plain_shop.compiled, *plain_shop.compiled]:
        for count in (1, 3):
            pictures = kit.noise(count, seed=count)
            np.testing.assert_allclose(run(plain_shop, name, pictures), plain_shop.plain(name, pictures), atol=1e-5)


def test_plain_experts_read_their_weights_where_they_lie(plain_shop: Shop) -> None:
    compiled = plain_shop.ready("float")
    before = run(plain_shop, "float", kit.noise(1))
    slot = next(
        slot for slot in compiled.tensors if len(slot.shape) == 4
    )  # of a Conv; a MatMul's are packed when opened
    with bytes_of(plain_shop.memory, compiled.segments[slot.segment].id) as view:
        start = slot.offset
        kept = bytes(view[start : start + slot.bytes])
        view[start : start + slot.bytes] = bytes(slot.bytes)
        assert not np.array_equal(run(plain_shop, "float", kit.noise(1)), before)
        view[start : start + slot.bytes] = kept
    np.testing.assert_array_equal(run(plain_shop, "float", kit.noise(1)), before)


def test_many_threads_run_one_plain_expert_at_a_time(plain_shop: Shop) -> None:
    plain_shop.ready("byte")
    pictures = [kit.noise(2, seed=seed) for seed in range(4)]
    expected = [plain_shop.plain("byte", one) for one in pictures]

    def work(number: int) -> None:
        for turn in range(20):
            chosen = (number + turn) % 4
            np.testing.assert_allclose(run(plain_shop, "byte", pictures[chosen]), expected[chosen], atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_plain_expert_that_is_lent_is_not_dropped(plain_shop: Shop) -> None:
    compiled = plain_shop.ready("byte")
    with plain_shop.sessions.lease("byte") as lease:
        with pytest.raises(RunError, match="byte is running"):
            plain_shop.sessions.drop("byte")
        with pytest.raises(LoadError, match="in use"):
            plain_shop.memory.drop(compiled.segments)
        assert lease.run({"image": kit.noise(1)})["logits"].shape == (1, 7)
    plain_shop.sessions.drop("byte")
    plain_shop.memory.drop(compiled.segments)
    assert plain_shop.memory.mapped_bytes == 0


def test_a_plain_experts_memory_is_back_after_the_next_run_of_any_expert(
    plain_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(run_another_after_plain_ones, plain_made)


def run_another_after_plain_ones(plain_shop: Shop) -> None:
    def cycle(name: str) -> None:
        compiled = plain_shop.ready(name)
        run(plain_shop, name, kit.noise(2))
        plain_shop.sessions.drop(name)
        plain_shop.memory.drop(compiled.segments)

    plain_shop.ready("float")
    cycle("byte")
    run(plain_shop, "float", kit.noise(1))
    before = settled_bytes()
    for name in ("byte", "other"):
        plain_shop.ready(name)
        run(plain_shop, name, kit.noise(2))
    assert settled_bytes() - before > plain_shop.compiled["byte"].bytes
    for name in ("byte", "other"):
        plain_shop.sessions.drop(name)
        plain_shop.memory.drop(plain_shop.compiled[name].segments)
    run(plain_shop, "float", kit.noise(1))
    assert settled_bytes() - before < 256 << 10


def settled_bytes() -> int:
    gc.collect()
    runtime.trim()
    return anonymous_bytes()


def test_plain_experts_come_and_go_without_growth(
    plain_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(let_come_and_go, plain_made)


def let_come_and_go(plain_shop: Shop) -> None:
    def cycles(count: int) -> int:
        for number in range(count):
            name = ("byte", "other", "float")[number % 3]
            compiled = plain_shop.ready(name)
            run(plain_shop, name, kit.noise(1 + number % 2))
            plain_shop.sessions.drop(name)
            plain_shop.memory.drop(compiled.segments)
        return settled_bytes()

    before = cycles(20)
    assert cycles(200) - before < 1 << 20
    assert plain_shop.memory.mapped_bytes == 0


class WatchedPlace(runtime.CpuPlace):
    """It remembers the plain session that it opened last, without keeping it."""

    session: weakref.ref[Any]

    def open_plain(self, path: Path, weights: Mapping[str, Any]) -> Any:
        session = super().open_plain(path, weights)
        object.__setattr__(self, "session", weakref.ref(session))
        return session


class WatchedWeights(Weights):
    """They are not released while a session reads them."""

    place: WatchedPlace

    def release(self, segments: Sequence[Segment]) -> None:
        assert self.place.session() is None
        super().release(segments)


def test_a_plain_session_is_closed_before_its_weights_are_released_though_an_error_still_tells_of_it(
    plain_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    store, bundles, compiled = plain_made
    memory = WatchedWeights(store.segment_path)
    memory.place = WatchedPlace()
    sessions = Sessions(memory, memory.place, activation_bytes=64 << 20)
    shop = Shop({b.manifest.name: b for b in bundles}, compiled, memory, sessions)
    shop.ready("byte")
    with pytest.raises(RunError) as caught:
        run(shop, "byte", kit.noise(1, 1, 8, 8))
    assert memory.place.session() is not None
    sessions.drop("byte")
    memory.close()
    assert caught.value.__traceback__ is not None


def test_a_damaged_plain_graph_is_never_opened(plain_shop: Shop, tmp_path: Path) -> None:
    compiled = plain_shop.compiled["byte"]
    assert compiled.plain_path is not None
    content = bytearray(compiled.plain_path.read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / compiled.plain_path.name
    path.write_bytes(content)
    plain_shop.memory.load(compiled.segments)
    with pytest.raises(StoreError, match="is damaged"):
        plain_shop.sessions.activate(replace(compiled, plain_path=path))
    plain_shop.memory.drop(compiled.segments)


def test_a_plain_expert_whose_weights_are_not_all_given_is_a_model_error(plain_shop: Shop) -> None:
    compiled = plain_shop.compiled["byte"]
    plain_shop.memory.load(compiled.segments)
    with pytest.raises(ModelError, match="byte is refused by the runtime"):
        plain_shop.sessions.activate(replace(compiled, tensors=compiled.tensors[1:]))
    plain_shop.memory.drop(compiled.segments)


# Cancelling.


def long_net() -> onnx.ModelProto:
    """Hundreds of short steps: 0.02 s a picture in all."""
    names = ["image", *(f"t{i}" for i in range(300))]
    nodes = [
        *(helper.make_node("Conv", [a, "kernel"], [b], pads=[7, 7, 7, 7]) for a, b in pairwise(names)),
        helper.make_node("GlobalAveragePool", [names[-1]], ["g"]),
        helper.make_node("Flatten", ["g"], ["logits"]),
    ]
    kernel = numpy_helper.from_array(np.full((3, 3, 15, 15), 1e-3, np.float32), "kernel")
    return kit.model(nodes, [kernel], {"image": ["n", 3, kit.SIDE, kit.SIDE]}, {"logits": ["n", 3]})


@pytest.fixture(scope="module", params=["template", "plain"])
def long_made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]:
    folder = tmp_path_factory.mktemp("long")
    bundle = kit.write_bundle(folder / "models", "long", long_net(), max_batch=1)
    store = Store(folder / "store")
    [compiled] = compile_bundles(store, [bundle], report=lambda name, result: None).values()
    assert isinstance(compiled, Compiled)
    if request.param == "plain":
        compiled = as_plain(compiled, folder)
    return store, [bundle], {"long": compiled}


@pytest.fixture(scope="module")
def long_shop(long_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]) -> Shop:
    shop = opened(*long_made)
    shop.ready("long")
    return shop


def test_a_cancelled_run_ends_soon_and_leaves_the_expert_well(long_shop: Shop) -> None:
    expected = run(long_shop, "long", kit.noise(2))
    half_a_minute = kit.noise(1500)
    for _ in range(3):
        cancellation, begun = Cancellation(), time.process_time()
        amid_work(cancellation.cancel)
        with (
            pytest.raises(Cancelled, match="the run of long was given up"),
            long_shop.sessions.lease("long", cancellation) as lease,
        ):
            lease.run({"image": half_a_minute})
        assert time.process_time() - begun < 5, "of work, of which the run has half a minute"
        np.testing.assert_array_equal(run(long_shop, "long", kit.noise(2)), expected)


def test_what_is_cancelled_first_never_runs(long_shop: Shop) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with long_shop.sessions.lease("long", cancellation) as lease:
        for _ in range(2):
            with pytest.raises(Cancelled):
                lease.run({"image": kit.noise(1500)})


def test_cancelling_one_run_leaves_the_expert_s_other_runs_alone(long_shop: Shop) -> None:
    cancellation = Cancellation()
    expected = run(long_shop, "long", kit.noise(20))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, long_shop, "long", kit.noise(20))
        amid_work(cancellation.cancel)
        with pytest.raises(Cancelled), long_shop.sessions.lease("long", cancellation) as lease:
            lease.run({"image": kit.noise(1500)})
        np.testing.assert_array_equal(other.result(), expected)


def test_a_failure_of_a_run_that_nobody_cancelled_is_no_cancellation(shop: Shop) -> None:
    shop.ready("e0")
    with pytest.raises(RunError, match="e0 failed"), shop.sessions.lease("e0", Cancellation()) as lease:
        lease.run({"image": kit.noise(1, 1, 8, 8)})


def test_a_lease_that_has_ended_runs_nothing(shop: Shop) -> None:
    shop.ready("e0")
    with shop.sessions.lease("e0") as lease:
        pass
    with pytest.raises(RunError, match="after its lease had ended"):
        lease.run({"image": kit.noise(1)})


# Memory that is not there.


def repeating_net() -> onnx.ModelProto:
    """Picture `image` to `logits`, by way of sixteen thousand copies of it, twice: 50 MB a picture, then 100 MB."""
    times = numpy_helper.from_array(np.array([1, 1, 128, 128], np.int64), "times")
    nodes = [
        helper.make_node("Tile", ["image", "times"], ["many"]),
        helper.make_node("Concat", ["many", "many"], ["more"], axis=1),
        helper.make_node("GlobalAveragePool", ["more"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "head"], ["logits"]),
    ]
    head = numpy_helper.from_array(np.random.default_rng(0).standard_normal((6, 7), np.float32), "head")
    return kit.model(nodes, [times, head], {"image": ["n", 3, kit.SIDE, kit.SIDE]}, {"logits": ["n", 7]})


@pytest.fixture(scope="module")
def hungry_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]:
    folder = tmp_path_factory.mktemp("hungry")
    bundles = [
        kit.write_bundle(folder / "models", "hungry", repeating_net(), max_batch=1),
        kit.write_bundle(folder / "models", "e", kit.conv_net(width=300)),
    ]
    store = Store(folder / "store")
    results = compile_bundles(store, bundles, report=lambda name, result: None)
    return store, bundles, {name: result for name, result in results.items() if isinstance(result, Compiled)}


Test = Callable[[Shop], None]


def in_a_process_of_its_own(test: Test, made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]]) -> None:
    """A limit on memory holds for a whole process, and so does what it measures of itself."""
    store, bundles, compiled = made
    alone(with_shop, test, store.folder.parent, bundles, compiled)


def with_shop(test: Test, folder: Path, bundles: Sequence[Bundle], compiled: Mapping[str, Compiled]) -> None:
    test(opened(Store(folder), bundles, compiled))


def only_more(size: int) -> None:
    """From now on this process may have only so many bytes more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + size, resource.RLIM_INFINITY))


def run_too_much(shop: Shop) -> None:
    for name in ("hungry", "e"):
        shop.ready(name)
    run(shop, "e", kit.noise(1))
    only_more(600 << 20)
    before = settled_bytes()
    for count in (60, 8):  # its first step fails; the first has room, and the second fails
        with pytest.raises(OutOfMemory, match="hungry needs more memory than cpu:0 has"):
            run(shop, "hungry", kit.noise(count))
        run(shop, "e", kit.noise(1))
        assert settled_bytes() - before < 50 << 20
    for name in ("hungry", "e"):
        np.testing.assert_allclose(run(shop, name, kit.noise(1)), shop.plain(name, kit.noise(1)), atol=1e-5)


def test_a_run_that_needs_more_memory_than_there_is_says_so_and_the_next_runs(
    hungry_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(run_too_much, hungry_made)


def open_too_much(shop: Shop) -> None:
    compiled = shop.compiled["float"]
    shop.memory.load(compiled.segments)
    shop.ready("byte")
    run(shop, "byte", kit.noise(1))
    runtime.trim()
    only_more(compiled.bytes // 2)
    with pytest.raises(OutOfMemory, match="float needs more memory than cpu:0 has"):
        shop.sessions.activate(compiled)
    run(shop, "byte", kit.noise(1))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    shop.sessions.activate(compiled)
    np.testing.assert_allclose(run(shop, "float", kit.noise(1)), shop.plain("float", kit.noise(1)), atol=1e-5)


def test_a_plain_session_that_needs_more_memory_than_there_is_says_so(
    plain_made: tuple[Store, Sequence[Bundle], Mapping[str, Compiled]],
) -> None:
    in_a_process_of_its_own(open_too_much, plain_made)


@pytest.mark.parametrize(
    "said",
    [
        "Failed to allocate memory for requested buffer of size 1000",
        "std::bad_alloc",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUDA out of memory",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "BFCArena::AllocateRawInternal Available memory of 1000 is smaller than requested bytes of 2000",
    ],
)
def test_every_way_in_which_the_runtime_says_out_of_memory_is_known(said: str) -> None:
    assert runtime.says_out_of_memory(RuntimeError(said))
    assert not runtime.says_out_of_memory(RuntimeError("Got invalid dimensions for input"))
    assert runtime.says_out_of_memory(MemoryError())
