from __future__ import annotations

import os
import select
from pathlib import Path

import pytest

from appliance.errors import ModelError, UnsafeModel
from appliance.sandbox import Child, run_limited

MEMORY = 500_000_000


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.syspath_prepend(tmp_path)
    return Module(tmp_path)


class Module:
    """Writes a child's module whose function `answer(request)` has the given body, and returns its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, body: str) -> str:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        return self.text(
            "import os, signal, resource, subprocess, sys\n"
            "from appliance import sandbox\n"
            "from appliance.errors import ModelError\n"
            f"def answer(request):\n{lines}\n"
            "sandbox.serve(answer)\n"
        )

    def text(self, source: str) -> str:
        (self.folder / "under_test.py").write_text(source)
        return "under_test"


def test_the_childs_answer_comes_back(module: Module) -> None:
    name = module("return {'twice': 2 * request['number']}")
    assert run_limited(name, {"number": 21}, memory_bytes=MEMORY, seconds=60) == {"twice": 42}


def test_what_libraries_print_is_not_part_of_the_answer(module: Module) -> None:
    name = module("print('hello')\nos.write(1, b'*** EP Error ***')\nreturn {}")
    assert run_limited(name, {}, memory_bytes=MEMORY, seconds=60) == {}


def test_an_orderly_error_keeps_its_words(module: Module) -> None:
    name = module("raise ModelError('it has no outputs', 'export it again')")
    with pytest.raises(ModelError) as caught:
        run_limited(name, {}, memory_bytes=MEMORY, seconds=60)
    assert type(caught.value) is ModelError
    assert (caught.value.what, caught.value.remedy) == ("it has no outputs", "export it again")


@pytest.mark.parametrize(
    ("body", "blamed"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("return {'n': len(bytearray(1 << 32))}", "memory limit of 500000000 bytes"),
        ("print('bad magic', file=sys.stderr); os._exit(3)", "exit status 3 and no answer: bad magic"),
        ("return {}['absent']", "KeyError"),
        ("signal.raise_signal(signal.SIGXCPU)", "processor time limit"),
    ],
)
def test_a_child_that_dies_is_blamed_by_its_cause(module: Module, body: str, blamed: str) -> None:
    with pytest.raises(UnsafeModel, match=blamed):
        run_limited(module(body), {}, memory_bytes=MEMORY, seconds=60)


def test_a_child_that_never_answers_is_killed_at_its_deadline(module: Module) -> None:
    with pytest.raises(UnsafeModel, match=r"longer than 0\.5 s"):
        run_limited(module("while True: signal.pause()"), {}, memory_bytes=MEMORY, seconds=0.5)


def test_what_the_child_started_dies_with_it(module: Module) -> None:
    name = module(
        "started = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(module.folder / 'pid')!r}, 'w').write(str(started.pid))\n"
        "os.abort()"
    )
    with pytest.raises(UnsafeModel, match="SIGABRT"):
        run_limited(name, {}, memory_bytes=MEMORY, seconds=60)
    assert has_ended(int((module.folder / "pid").read_text()))


def test_the_limits_are_in_force_before_the_request_is_seen(module: Module) -> None:
    name = module(
        "return {\n"
        "  'memory': resource.getrlimit(resource.RLIMIT_AS), 'core': resource.getrlimit(resource.RLIMIT_CORE),\n"
        "  'cpu': resource.getrlimit(resource.RLIMIT_CPU)[0], 'file': resource.getrlimit(resource.RLIMIT_FSIZE)[0],\n"
        "  'oom': int(open('/proc/self/oom_score_adj').read()), 'leads': os.getsid(0) == os.getpid()}"
    )
    found = run_limited(name, {}, memory_bytes=MEMORY, seconds=60)
    assert found["memory"] == [MEMORY, MEMORY]
    assert found["file"] == MEMORY
    assert found["core"] == [0, 0]
    assert 60 <= found["cpu"] <= 65
    assert found["oom"] == 900
    assert found["leads"]


def test_one_child_answers_many_requests_and_survives_orderly_errors(module: Module) -> None:
    name = module("if request['bad']: raise ModelError('no')\nreturn {'pid': os.getpid()}")
    with Child(name, memory_bytes=MEMORY) as child:
        first = child.ask({"bad": False}, seconds=60)
        with pytest.raises(ModelError, match="no"):
            child.ask({"bad": True}, seconds=60)
        assert child.is_alive
        assert child.ask({"bad": False}, seconds=60) == first


def test_a_dead_child_says_so(module: Module) -> None:
    with Child(module("os.abort()"), memory_bytes=MEMORY) as child:
        with pytest.raises(UnsafeModel):
            child.ask({}, seconds=60)
        assert not child.is_alive


@pytest.mark.parametrize("said", ["nonsense\\n", "[1]\\n", "half"])
def test_an_answer_that_is_no_json_object_is_not_believed(module: Module, said: str) -> None:
    name = module.text(f"import sys; sys.stdin.readline(); sys.stdout.write({said!r}.replace('\\\\n', chr(10)))")
    with pytest.raises(UnsafeModel):
        run_limited(name, {}, memory_bytes=MEMORY, seconds=60)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or goes soon: a signal takes a moment to be delivered."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    try:
        return bool(poll.poll(20_000))
    finally:
        os.close(handle)
