"""Preference pairs of messages whose prompt is in the responses."""

import json

from bora_fl.data.preferences import Pair, read_pair

ASK, ANSWER = {"role": "user", "content": "sun"}, {"role": "assistant", "content": "moon"}


def test_where_one_conversation_goes_on_after_the_other_the_last_common_message_is_a_response() -> None:
    longer = [ASK, ANSWER, ASK, ANSWER]
    assert read_pair(None, longer, longer[:2]) == Pair([ASK], longer[1:], [ANSWER])
    assert read_pair(None, longer[:2], longer) == Pair([ASK], [ANSWER], longer[1:])
    assert read_pair(None, longer, longer[:2]).is_whole()


def test_conversations_that_nothing_begins_are_no_pair() -> None:
    other = {"role": "user", "content": "sea"}
    assert not read_pair(None, [ASK, ANSWER], [other, ANSWER]).is_whole()
    assert read_pair(None, [ASK, ANSWER], [ASK, {**ANSWER, "content": "sea"}]).is_whole()


def test_messages_as_json_text_and_in_parts_are_the_messages() -> None:
    def turns(answer: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]

    wanted = read_pair(None, turns("b"), turns("c"))
    assert read_pair(None, json.dumps(turns("b")), json.dumps(turns("c"))) == wanted
    assert read_pair(None, *(turns([{"type": "text", "text": text}]) for text in "bc")) == wanted
    assert read_pair("a", "[1]", "[2]").chosen == "[1]"
