"""The same input makes the same actions also in another process, where sets have another order."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

from appliance.core.graph import Edge, compile_graph
from appliance.lab.simulate import simulate
from tests import kit

PICTURES, EXPERTS, ASKED_FIRST = 150, 12, 6


def _digest() -> str:
    """Of what a box does with pictures that ask several at once, many of which become late."""
    digest = hashlib.sha256()
    for seed in range(8):
        chance = random.Random(seed)
        names = [f"e{number}" for number in range(EXPERTS)]
        experts = [
            kit.expert(
                name,
                chance.randint(5, 20),
                item=chance.choice((0.1, 0.2, 0.3)),
                fixed=chance.choice((0.0, 0.1, 0.7)),
                load=chance.choice((0.1, 0.3, 0.7)),
            )
            for name in names
        ]
        later = names[ASKED_FIRST:]
        edges = [Edge(name, to) for name in names[:ASKED_FIRST] for to in chance.sample(later, 3)]
        limits = dict.fromkeys([edge.to for edge in edges[:2]], 8)
        graph = compile_graph({f"c-{name}": name for name in names[:ASKED_FIRST]}, edges, names, limits=limits)
        requests, at = [], 0.0
        for number in range(PICTURES):
            at += chance.choice((0.0, 0.1, 0.2))
            asked = f"c-{chance.choice(names[:ASKED_FIRST])}"
            requests.append(kit.request(str(number), asked, at, at + chance.choice((2.0, 5.0))))
        controller, devices = kit.box(experts, graph, 60, executors=3)
        digest.update(repr(simulate(controller, kit.pretend(experts, devices), requests).actions).encode())
    return digest.hexdigest()


def test_another_process_decides_the_same() -> None:
    found = set[str]()
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.test_determinism"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1


if __name__ == "__main__":
    print(_digest())
