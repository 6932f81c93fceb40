from __future__ import annotations

from appliance.engine.arena import Arena

SMALL, LARGE = ("conv", 1), ("conv", 8)


def run(arena: Arena, kind: tuple[str, int], size_bytes: int) -> bool:
    """Whether a run of this kind, alone, shrank the arena."""
    shrink = arena.begin(kind, size_bytes)
    arena.end(kind, has_shrunk=shrink)
    return shrink


def test_runs_of_one_kind_use_again_what_the_first_left() -> None:
    arena = Arena(100)
    assert not any(run(arena, SMALL, 60) for _ in range(1000))


def test_the_run_that_leads_beyond_the_limit_gives_everything_back() -> None:
    arena = Arena(100)
    assert [run(arena, kind, size) for kind, size in [(SMALL, 40), (LARGE, 60), (("wide", 1), 1)]] == [
        False,
        False,
        True,
    ]
    assert [run(arena, kind, size) for kind, size in [(SMALL, 40), (LARGE, 60), (("wide", 1), 1)]] == [
        False,
        False,
        True,
    ]


def test_a_run_that_is_larger_than_the_limit_always_gives_back() -> None:
    arena = Arena(100)
    assert [run(arena, LARGE, 101) for _ in range(3)] == [True] * 3
    assert not run(arena, SMALL, 100)


def test_runs_of_one_kind_at_the_same_time_count_each() -> None:
    arena = Arena(100)
    assert not arena.begin(LARGE, 60)
    assert arena.begin(LARGE, 60)
    arena.end(LARGE, has_shrunk=False)
    arena.end(LARGE, has_shrunk=False)
    assert run(arena, LARGE, 60)
    assert not run(arena, LARGE, 60)


def test_what_still_runs_is_not_given_back_by_another() -> None:
    arena = Arena(100)
    arena.begin(LARGE, 60)
    assert run(arena, SMALL, 50)
    assert run(arena, SMALL, 50)
    arena.end(LARGE, has_shrunk=False)
    assert run(arena, SMALL, 50)
    assert not run(arena, SMALL, 50)


def test_a_run_that_failed_to_shrink_leaves_it_to_the_next() -> None:
    arena = Arena(100)
    assert arena.begin(LARGE, 101)
    arena.end(LARGE, has_shrunk=False)
    assert run(arena, SMALL, 1)


def test_the_run_after_a_session_was_closed_gives_back_what_that_left() -> None:
    arena = Arena(100)
    run(arena, SMALL, 1)
    arena.left_behind()
    assert run(arena, SMALL, 1)
    assert not run(arena, SMALL, 1)


# Arenas of their own.

OTHER = ("mlp", 1)


def test_all_arenas_together_keep_no_more_than_the_limit() -> None:
    arena = Arena(100, is_shared=False)
    assert not run(arena, LARGE, 60)
    assert [run(arena, OTHER, 50) for _ in range(3)] == [True] * 3, "it gives back its own alone"


def test_the_arena_that_holds_most_gives_back_when_it_is_run_again() -> None:
    arena = Arena(100, is_shared=False)
    run(arena, LARGE, 60)
    run(arena, OTHER, 50)
    assert run(arena, SMALL, 1), "of the architecture that holds most"
    assert not run(arena, OTHER, 50)
    assert not run(arena, OTHER, 50)
    assert run(arena, LARGE, 60)


def test_an_arena_that_shrinks_keeps_its_other_runs_and_the_other_arenas() -> None:
    arena = Arena(100, is_shared=False)
    run(arena, OTHER, 30)
    arena.begin(LARGE, 40)
    assert run(arena, SMALL, 31)
    arena.end(LARGE, has_shrunk=False)
    assert not run(arena, SMALL, 30)
    assert run(arena, SMALL, 31)


def test_a_closed_session_takes_its_arena_along() -> None:
    arena = Arena(100, is_shared=False)
    run(arena, LARGE, 60)
    run(arena, OTHER, 50)
    assert arena.is_due("conv")
    arena.closed("conv")
    assert not arena.is_due("conv")
    assert not run(arena, OTHER, 50)


def test_where_memory_is_short_every_arena_gives_back() -> None:
    arena = Arena(100, is_shared=False)
    run(arena, LARGE, 30)
    run(arena, OTHER, 30)
    arena.left_behind()
    assert [run(arena, kind, 30) for kind in (LARGE, OTHER, LARGE, OTHER)] == [True, True, False, False]


def test_a_shared_arena_outlives_every_session() -> None:
    arena = Arena(100)
    run(arena, LARGE, 60)
    arena.closed("conv")
    assert not arena.is_due("conv")
    assert run(arena, OTHER, 50)
