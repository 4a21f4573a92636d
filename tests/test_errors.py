"""What errors say."""

from __future__ import annotations

from nybble.errors import listed


def test_a_cut_list_says_that_it_is_cut() -> None:
    assert listed("bad:", ["a", "b"]) == listed("bad:", ["a", "b"], most=2) == "bad:\n  a\n  b"
    assert listed("bad:", ["a", "b", "c"], most=1) == "bad:\n  a\n  and 2 more"
