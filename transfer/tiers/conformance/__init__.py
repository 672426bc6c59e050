"""What every tier must do, one function per rule. An outside tier runs it too:

    @pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
    def test_rule(rule, subject):
        rule(subject)

Each rule opens the tier itself, uses keys of its own, and leaves nothing behind but chunks in the backend.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.transfer.tiers.conformance import ending, failing, storing
from pdserve.transfer.tiers.conformance.subject import Subject, eventually, is_whole, make_chunk, opened, read, soon

__all__ = [
    "RULES",
    "Subject",
    "ending",
    "eventually",
    "failing",
    "is_whole",
    "make_chunk",
    "name_of",
    "opened",
    "read",
    "soon",
    "storing",
]

RULES: tuple[Callable[[Subject], None], ...] = (
    storing.bytes_in_are_bytes_out,
    storing.neighbours_are_not_touched,
    storing.a_new_tier_finds_what_an_old_one_stored,
    storing.what_was_never_stored_is_absent,
    storing.contains_answers_in_order,
    storing.deleted_is_gone,
    storing.what_it_lists_is_what_it_has,
    storing.the_same_again_is_fine,
    storing.of_two_writers_of_a_key_one_is_whole,
    failing.half_a_chunk_is_never_seen,
    failing.a_flipped_byte_is_noticed,
    failing.a_corrupt_chunk_can_be_replaced,
    failing.a_deadline_that_has_passed_is_an_error,
    failing.a_silent_backend_costs_the_deadline_and_no_more,
    storing.many_threads_at_once,
    storing.stats_say_how_it_is,
    ending.closing_ends_threads_and_files,
    ending.after_close_it_refuses,
)


def name_of(rule: Callable[[Subject], None]) -> str:
    return rule.__name__
