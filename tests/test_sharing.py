"""Which tensors share a segment: values in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.store import sharing
from appliance.store.sharing import Content, Recipe, layout, recipes

BIG = 1 << 20


def of(**experts: str) -> dict[str, tuple[Recipe, ...]]:
    """Each letter is a tensor of a megabyte, a dot one of a kilobyte that only its expert has."""
    return recipes(
        {name: [_content(name, number, letter) for number, letter in enumerate(text)] for name, text in experts.items()}
    )


def _content(expert: str, number: int, letter: str) -> Content:
    return Content(f"{expert}{number}", 1000) if letter == "." else Content(letter, BIG)


def test_an_expert_alone_has_one_segment() -> None:
    assert of(a="xyz") == {"a": (("x", "y", "z"),)}


def test_a_common_trunk_is_one_segment_and_heads_stay_private() -> None:
    assert of(a="xyp", b="xyq", c="xyr") == {
        "a": (("p",), ("x", "y")),
        "b": (("q",), ("x", "y")),
        "c": (("r",), ("x", "y")),
    }


def test_equal_experts_have_nothing_private() -> None:
    assert of(a="xy", b="xy") == {"a": (("x", "y"),), "b": (("x", "y"),)}


def test_each_set_of_sharers_has_its_own_segment() -> None:
    assert of(a="xyp", b="xyq", c="xzr") == {
        "a": (("p",), ("x",), ("y",)),
        "b": (("q",), ("x",), ("y",)),
        "c": (("z", "r"), ("x",)),
    }


def test_a_newcomer_to_a_trunk_leaves_the_others_as_they_were() -> None:
    before, after = of(a="xyp", b="xyq"), of(a="xyp", b="xyq", c="xyr")
    assert {name: after[name] for name in before} == before


def test_what_would_save_little_is_stored_twice() -> None:
    small = [Content("s", sharing.LEAST_SHARED_BYTES - 1)]
    assert recipes({"a": [Content("p", 5), *small], "b": small}) == {"a": (("p", "s"),), "b": (("s",),)}


def test_a_tensor_that_an_expert_has_twice_is_stored_once() -> None:
    assert of(a="xyx") == {"a": (("x", "y"),)}


def test_an_expert_without_weights_still_has_a_segment() -> None:
    assert recipes({"a": []}) == {"a": ((),)}


def test_trunks_frozen_at_every_depth_do_not_make_a_segment_per_layer() -> None:
    layers = "abcdefghijklmnop"
    found = of(**{f"e{depth}": layers[:depth] + "." * (len(layers) - depth) for depth in range(1, len(layers) + 1)})
    assert max(len(segments) for segments in found.values()) == sharing.MOST_SHARED + 1
    assert ("a",) in found["e1"]


contents = st.builds(Content, st.sampled_from("abcdefgh"), st.just(100_000)) | st.builds(
    Content, st.sampled_from("stuv"), st.just(10)
)


@given(st.dictionaries(st.sampled_from("123456"), st.lists(contents, max_size=8), min_size=1))
def test_every_tensor_lies_in_exactly_one_segment_of_its_expert(experts: Mapping[str, Sequence[Content]]) -> None:
    found = recipes(experts)
    for name, tensors in experts.items():
        assert sorted(d for recipe in found[name] for d in recipe) == sorted({tensor.sha256 for tensor in tensors})
        assert len(found[name]) <= sharing.MOST_SHARED + 1
    assert found == recipes(dict(reversed(list(experts.items()))))


@pytest.mark.parametrize(
    ("sizes", "offsets", "size"), [([], [], 4096), ([1, 256, 3], [0, 256, 512], 4096), ([4096, 1], [0, 4096], 8192)]
)
def test_tensors_are_aligned_and_segments_are_whole_pages(sizes: list[int], offsets: list[int], size: int) -> None:
    assert layout(sizes) == (offsets, size)
