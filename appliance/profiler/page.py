from collections.abc import Mapping
from typing import Any


def page(found: Mapping[str, Any]) -> str:
    return ""
