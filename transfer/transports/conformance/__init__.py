"""What every transport must do, one function per rule. An outside transport runs it too:

    @pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
    def test_rule(rule, subject):
        conformance.run(rule, subject)

Each rule brings up two daemons' ends of its own and takes them down again. No rule measures time: PATIENCE_S bounds a hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pdserve.transfer.transports.conformance import calling, cancelling, connecting, pushing
from pdserve.transfer.transports.conformance.ends import PATIENCE_S
from pdserve.transfer.transports.conformance.subject import Subject

Rule = Callable[[Subject], Awaitable[None]]

RULES: tuple[Rule, ...] = (
    pushing.pieces_of_all_sizes_arrive_whole,
    pushing.many_small_pieces_arrive_in_one_push,
    pushing.nothing_is_a_push_too,
    pushing.either_end_may_push,
    pushing.pushes_at_once_do_not_mix,
    pushing.what_is_refused_is_not_sent,
    pushing.what_was_asked_for_comes_to_the_slot_named,
    pushing.changed_bytes_are_noticed,
    pushing.a_ticket_for_another_piece_ends_the_connection,
    pushing.a_ticket_of_nobody_ends_the_connection,
    pushing.what_lies_outside_the_arena_is_refused,
    pushing.the_books_say_what_went,
    calling.messages_are_answered_both_ways,
    calling.an_error_reaches_the_caller_in_words,
    calling.a_message_that_nobody_answers_ends_at_its_deadline,
    calling.too_large_a_message_is_refused_here,
    calling.small_messages_pass_bytes_that_are_stuck,
    cancelling.a_cancelled_slot_is_left_alone,
    cancelling.a_slot_cancelled_while_it_is_written_is_left_alone,
    cancelling.an_expected_piece_that_never_comes_is_given_back,
    cancelling.a_push_ends_at_its_deadline,
    cancelling.a_push_may_be_cancelled,
    cancelling.whatever_is_cancelled_when_the_rest_arrives,
    connecting.a_way_cut_mid_transfer_ends_everything,
    connecting.closing_ends_everything,
    connecting.nobody_listening_is_said_so,
    connecting.a_wedged_peer_costs_one_deadline,
    connecting.a_connection_can_be_made_again,
    connecting.closing_leaves_no_thread,
)


def name_of(rule: Rule) -> str:
    name: str = getattr(rule, "__name__", "rule")
    return name


def run(rule: Rule, subject: Subject) -> None:
    """One rule on a loop of its own; fails rather than hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await rule(subject)

    try:
        asyncio.run(bounded())
    finally:
        subject.close()
