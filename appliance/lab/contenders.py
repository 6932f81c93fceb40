"""Whom the simulator and the live bench compare, by name, and which executors of a box share a memory under each.

Beside the policies of a service there are the bound, whose memory holds everything, and the oracle, who knows what will
be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.core import policies
from appliance.core.controller import Controller
from appliance.core.graph import ExpertGraph
from appliance.core.policies import Policy
from appliance.core.types import Device, Executor, Expert

ALL = policies.ALL_RESIDENT.name
ORACLE = "oracle"
NAMES = (*policies.POLICIES, ALL, ORACLE)


def contender(name: str, uses: Mapping[str, Sequence[float]]) -> Policy:
    """One of `NAMES`. The oracle alone looks at `uses`: which expert is asked when."""
    known = {**policies.POLICIES, ALL: policies.ALL_RESIDENT, ORACLE: policies.oracle(uses)}
    return known[name]


@dataclass(frozen=True, slots=True)
class Pool:
    """Executors that share a memory: those of a device with these numbers."""

    name: str
    device: str
    executors: tuple[int, ...]


def pools(policy: Policy, executors: Mapping[str, int]) -> tuple[Pool, ...]:
    """`executors` is how many each device has, of which the first counts where a policy gives everything to one.

    Where a load occupies its executor, each has a memory of its own, as CoServe has it; else each device is one.
    """
    if policy.assign is policies.first:
        device = next(iter(executors))
        return (Pool(device, device, (0,)),)
    whole = [Pool(device, device, tuple(range(count))) for device, count in executors.items()]
    if not policy.in_order:
        return tuple(whole)
    return tuple(
        Pool(f"{pool.name}{number}" if len(pool.executors) > 1 else pool.name, pool.device, (number,))
        for pool in whole
        for number in pool.executors
    )


@dataclass(frozen=True, slots=True)
class Setup:
    """What a policy is given to work with, and who is in memory where when the first picture comes."""

    devices: tuple[Device, ...]
    executors: tuple[Executor, ...]
    experts: Mapping[str, Expert]
    residents: tuple[tuple[str, str], ...]
    pinned: tuple[str, ...] = ()
    """Who stays."""

    def controller(self, graph: ExpertGraph, policy: Policy) -> Controller:
        return Controller(
            graph,
            self.experts,
            self.devices,
            self.executors,
            pinned=self.pinned,
            policy=policy,
            residents=self.residents,
        )
