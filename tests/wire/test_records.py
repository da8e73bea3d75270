from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from bora_fl.blocks import BlockFactors
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.wire.records import PACKED, Instruction, from_arrays, reply_content, to_arrays
from bora_fl.wire.refusals import Code, Refusal
from bora_fl.wire.replies import RejectedReplyError, read_reply
from bora_fl.wire.schema import INSTRUCTION, METRICS, REPLY, SCHEMA, STATE, refusal

ALL = frozenset({"A", "sigma", "B", "tensors"})
ROUND = 4


def state(rank: int = 3, seed: int = 0) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    layer = BlockFactors(
        torch.randn(8, rank, generator=g), torch.rand(2, 2, rank, generator=g), torch.randn(rank, 4, generator=g), 2.0
    )
    return AdapterState({"q": layer, "v": replace(layer)}, {"head.weight": torch.randn(2, 4, generator=g)})


@pytest.fixture
def request_message() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(RecordDict(), dst_node_id=7, message_type="train")


def reply(request: Message, content: RecordDict) -> Message:
    return Message(content, reply_to=request)


def good(parts: frozenset[str] = ALL, trained: AdapterState | None = None) -> RecordDict:
    return reply_content(trained or state(seed=1), state(), parts, ROUND, {"num-examples": 10, "train-loss": 0.5})


def same(a: AdapterState, b: AdapterState) -> bool:
    fa, fb = flatten(a), flatten(b)
    return fa.keys() == fb.keys() and all(torch.equal(fa[k], fb[k]) for k in fa)


def test_a_state_survives_the_wire_bit_for_bit():
    assert same(unflatten(from_arrays(to_arrays(flatten(state())))), state())


def test_an_instruction_survives_the_wire():
    instruction = Instruction(3, "run", frozenset({"A"}), ALL, True, 2, 0.5)
    assert Instruction.read(RecordDict({INSTRUCTION: instruction.record()})) == instruction


def test_another_schema_is_named():
    with pytest.raises(ValueError, match="schema 99, this site 3"):
        Instruction.read(RecordDict({INSTRUCTION: ConfigRecord({"schema": 99})}))


def test_a_good_reply_is_the_client_s_state(request_message: Message):
    got, metrics = read_reply(reply(request_message, good()), state(), ALL, ROUND, 3)
    assert same(got, state(seed=1))
    assert metrics == {"num-examples": 10.0, "train-loss": 0.5}


def test_frozen_parts_stay_home_and_are_filled_in(request_message: Message):
    content = good(frozenset({"B"}))
    names = set(from_arrays(content.array_records[STATE]))
    assert {n.rpartition("/")[2] for n in names} == {"B", "scaling"}
    got, _ = read_reply(reply(request_message, content), state(), frozenset({"B"}), ROUND, 3)
    assert torch.equal(got.layers["q"].B, state(seed=1).layers["q"].B)
    assert torch.equal(got.layers["q"].A, state().layers["q"].A)
    assert torch.equal(got.tensors["head.weight"], state().tensors["head.weight"])


def test_a_client_of_smaller_rank_replies_in_full(request_message: Message):
    content = good(frozenset({"B"}), state(rank=2, seed=1))
    got, _ = read_reply(reply(request_message, content), state(), frozenset({"B"}), ROUND, 3)
    assert same(got, state(rank=2, seed=1))


def _arrays(content: RecordDict, change: dict[str, torch.Tensor | None]) -> RecordDict:
    flat = from_arrays(content.array_records[STATE])
    for name, tensor in change.items():
        if tensor is None:
            flat.pop(name)
        else:
            flat[name] = tensor
    content.array_records[STATE] = to_arrays(flat)
    return content


def _metric(name: str, value: float) -> RecordDict:
    content = good()
    content.metric_records[METRICS] = MetricRecord({**content.metric_records[METRICS], name: value})
    return content


def _stored(kind: str) -> RecordDict:
    content = good()
    packed = content.array_records[STATE][PACKED]
    content.array_records[STATE] = ArrayRecord({PACKED: Array("uint8", (len(packed.data),), kind, packed.data)})
    return content


def _garbage() -> RecordDict:
    content = good()
    content.array_records[STATE] = ArrayRecord({PACKED: Array("uint8", (14,), PACKED, b"\x80\x04not an array")})
    return content


BAD = {
    "nan": (lambda: _arrays(good(), {"layers/q/A": torch.full((3, 4), float("nan"))}), "not finite"),
    "infinity": (lambda: _arrays(good(), {"tensors/head.weight": torch.full((2, 4), float("inf"))}), "not finite"),
    "shape": (lambda: _arrays(good(), {"layers/q/A": torch.zeros(3, 5)}), "shape"),
    "broadcastable shape": (lambda: _arrays(good(), {"tensors/head.weight": torch.zeros(1, 1)}), "shape"),
    "larger rank": (lambda: good(trained=state(rank=5)), "rank"),
    "unequal ranks inside a layer": (lambda: _arrays(good(), {"layers/q/B": torch.zeros(8, 2)}), "shape"),
    "no rank": (lambda: good(trained=state(rank=0)), "rank 0"),
    "dtype": (lambda: _arrays(good(), {"layers/q/A": torch.zeros(3, 4, dtype=torch.float64)}), "float64"),
    "missing key": (lambda: _arrays(good(), {"layers/v/sigma": None}), "missing"),
    "unknown key": (lambda: _arrays(good(), {"layers/z/A": torch.zeros(3, 4)}), "unknown entry"),
    "strange key": (lambda: _arrays(good(), {"evil": torch.zeros(1)}), "unknown entry"),
    "negative scaling": (lambda: _arrays(good(), {"layers/q/scaling": torch.tensor(-1.0).double()}), "scaling"),
    "negative weight": (lambda: _metric("num-examples", -5.0), "positive"),
    "zero weight": (lambda: _metric("num-examples", 0), "positive"),
    "nan weight": (lambda: _metric("num-examples", float("nan")), "finite"),
    "stale round": (lambda: reply_content(state(), state(), ALL, 3, {"num-examples": 1}), "round 3 in round 4"),
    "another schema": (lambda: RecordDict({REPLY: ConfigRecord({"schema": 1, "round": ROUND})}), "schema 1"),
    "empty": (lambda: RecordDict(), "schema None"),
    "no state": (lambda: RecordDict({k: v for k, v in good().items() if k != STATE}), "no adapter state"),
    "no arrays": (lambda: RecordDict({**good(), STATE: ArrayRecord()}), "unreadable arrays"),
    "pickled arrays": (lambda: _stored("numpy.ndarray"), "unreadable arrays"),
    "garbage bytes": (_garbage, "unreadable arrays"),
    "a refusal": (lambda: refusal(Refusal(Code.OUT_OF_MEMORY, "0123abcd")), "the site ran out of memory"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_named_with_its_node(case: str, request_message: Message):
    make, words = BAD[case]
    with pytest.raises(RejectedReplyError) as error:
        read_reply(reply(request_message, make()), state(), ALL, ROUND, 3)
    assert error.value.node_id == 7
    assert words in error.value.reason


def test_an_error_reply_is_named_with_its_node(request_message: Message):
    message = Message(Error(3, "\x1b[36mray::boom\x1b[39m\n  line"), reply_to=request_message)
    with pytest.raises(RejectedReplyError, match="node 7: error 3: ray::boom line"):
        read_reply(message, state(), ALL, ROUND, 3)


def test_a_refusal_can_say_which_folds_are_held(request_message: Message):
    with pytest.raises(RejectedReplyError) as error:
        read_reply(reply(request_message, refusal(Refusal(Code.FOLDS_MISSING, folds_held=2))), state(), ALL, ROUND, 3)
    assert error.value.folds_held == 2


@pytest.mark.parametrize("code", ["Anna Schmidt, F32.1", "internal-error\n", 7, [1, 2], True, b"data-unreadable"])
def test_of_a_refusal_nothing_is_shown_that_is_not_of_the_closed_list(code, request_message: Message):
    content = RecordDict({REPLY: ConfigRecord({"schema": SCHEMA, "refused": code, "error-id": "Anna Schmidt"})})
    with pytest.raises(RejectedReplyError) as error:
        read_reply(reply(request_message, content), state(), ALL, ROUND, 3)
    assert error.value.reason == "a refusal with a code that is not known here"
    content.config_records[REPLY]["refused"] = "data-unreadable"
    with pytest.raises(RejectedReplyError) as error:
        read_reply(reply(request_message, content), state(), ALL, ROUND, 3)
    assert error.value.reason == f"data-unreadable: {Code.DATA_UNREADABLE.sentence} (error none in the site's log)"
