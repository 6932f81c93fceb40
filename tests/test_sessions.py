from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.catalog import Bundle
from appliance.drivers import runtime
from appliance.drivers.compile import compile_bundles
from appliance.drivers.devices import anonymous_bytes
from appliance.drivers.sessions import Sessions
from appliance.drivers.store import Compiled, Store
from appliance.drivers.weights import Weights
from appliance.errors import LoadError, RunError, StoreError
from tests import kit_models as kit


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
    store, bundles, compiled = made
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
    monkeypatch.setattr("appliance.drivers.sessions._UNUSED_TEMPLATES", 1)
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


def test_activations_of_large_batches_are_given_back_after_a_while(shop: Shop) -> None:
    shop.ready("e0")
    run(shop, "e0", kit.noise(1))
    before = anonymous_bytes()
    run(shop, "e0", kit.noise(1024))
    for _ in range(32):
        run(shop, "e0", kit.noise(1))
    assert anonymous_bytes() - before < 4 << 20
