"""The catalogue as it is now, and as boards under way know it: recipes may be replaced while the box serves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from appliance import catalog as catalogs
from appliance.catalog import Catalog, Product
from appliance.contract import Address
from appliance.core.types import BoardName, Refusal
from appliance.errors import ApplianceError

log = logging.getLogger(__name__)

RESTART = "restart"


class Recipes:
    """Safe from several threads: whoever asks gets a whole catalogue, the former or the new one.

    No recipe may have more than `most_placements`.
    """

    def __init__(self, catalog: Catalog, most_placements: int | None = None) -> None:
        self._catalog, self._most_placements = catalog, most_placements
        self._kept: dict[BoardName, tuple[Product, int]] = {}
        self._reloading = threading.Lock()

    def of(self, address: Address) -> Catalog:
        """The catalogue, with the recipe that the address's board was opened with if it is under way."""
        kept = self._kept.get(address.board_name)
        return self._catalog if kept is None else replace(self._catalog, products={address.product: kept[0]})

    def keep(self, name: BoardName, product: Product) -> None:
        """A board of this name is under way. There are two while one is still inspected whose time is up."""
        self._kept[name] = product, self._kept.get(name, (product, 0))[1] + 1

    def release(self, name: BoardName) -> None:
        """The board has its verdict."""
        product, boards = self._kept[name]
        if boards > 1:
            self._kept[name] = product, boards - 1
        else:
            del self._kept[name]

    def reload(self, done: Callable[[Refusal | None], None]) -> None:
        """Read and check the recipes again, on a thread of their own; a catalogue that is wrong changes nothing.

        `done` hears on that thread when they count, or why they do not.
        """
        threading.Thread(target=lambda: done(self._reload()), name="reload", daemon=True).start()

    def _reload(self) -> Refusal | None:
        with self._reloading:
            try:
                fresh = catalogs.load(self._catalog.folder)
                catalogs.check_places(fresh, self._most_placements)
            except ApplianceError as error:
                return Refusal(error.reason, str(error))
            except Exception as error:  # a border: whoever gave the command hears of it
                log.exception("reload failed")
                return Refusal("internal", f"{type(error).__name__}: {error}")
            if changed := _beside_recipes(self._catalog, fresh):
                return Refusal(RESTART, f"{changed} changed: restart the service, only recipes are reloaded")
            self._catalog = replace(self._catalog, products=fresh.products)
        log.info("reloaded products=%d", len(fresh.products))
        return None


def _beside_recipes(old: Catalog, new: Catalog) -> str | None:
    """What else is different, in words."""
    if (old.graph, old.usage) != (new.graph, new.usage):
        return "graph.toml"
    names = old.versions.keys() | new.versions.keys()
    changed = sorted(name for name in names if _expert(old, name) != _expert(new, name))
    return f"the experts {', '.join(changed[:5])}" if changed else None


def _expert(catalog: Catalog, name: str) -> object:
    return catalog.bundles.get(name), str(catalog.broken.get(name))
