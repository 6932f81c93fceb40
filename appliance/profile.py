"""profiles/*.json: what running and loading costs on a box, and how many executors it should have.

`default.json` serves any box: its load costs are cautious, and running costs come from the brief measurement that
compiling an architecture makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.core.costs import Cost
from appliance.errors import ConfigError

Seconds = Annotated[float, Field(ge=0)]


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    name: str
    cpu_executors: Annotated[int, Field(ge=1)] | None = Field(None, description="None: one per usable core.")
    batch_cap: Annotated[int, Field(ge=1)] = Field(16, description="Largest batch, whatever an expert allows.")
    load_fixed_seconds: Seconds = Field(0.002, description="Part of a load that does not depend on its bytes.")
    disk_bytes_per_second: Annotated[float, Field(gt=0)] = Field(5e8, description="Read bandwidth for weights.")

    gpu_speed: Annotated[float, Field(gt=0)] = Field(10.0, description="Times as fast as the CPU: a guess.")

    def cost(self, item_seconds: float, fixed_seconds: float, weights_bytes: int) -> Cost:
        """K and B as measured when the architecture was compiled; L from the bytes and this box's disk."""
        load_seconds = self.load_fixed_seconds + weights_bytes / self.disk_bytes_per_second
        return Cost(item_seconds, fixed_seconds, load_seconds)


def load(path: Path) -> Profile:
    """Raises ConfigError naming the file and the key."""
    try:
        return Profile.model_validate(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "set paths.profile in appliance.toml") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}", "correct that line") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}", "correct these keys") from error
