"""A client's Gram matrices against the layers' inputs themselves, and who may ask for them."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from bora_fl.blocks.gram import unpacked
from bora_fl.client.grams import input_grams
from bora_fl.client.job import perform
from bora_fl.client.site import site
from bora_fl.config import parse
from bora_fl.simulations.engine import simulate
from bora_fl.state import flatten
from bora_fl.wire.records import Instruction, to_arrays
from bora_fl.wire.refusals import Code
from bora_fl.wire.replies import RejectedReplyError, read_grams
from bora_fl.wire.schema import GRAMS, INSTRUCTION, REPLY, STATE

NO_AUTOCAST = {"device_type": "cpu", "enabled": False}


def dense_grams(model, data) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ over all tokens of all examples, one example at a time, so that nothing is padded."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0]))
        for name, layer in model.adapted_layers().items()
    ]
    model.model.eval()
    with torch.no_grad():
        for index in range(len(data)):
            batch = {k: v for k, v in data.batch([index]).items() if k != "labels"}
            model.model(**batch)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


@pytest.mark.parametrize(("kind", "blocks"), [("blocks", 1), ("blocks", 4), ("diagonal", 4)])
def test_they_are_means_over_tokens_without_padding(kind, blocks, tiny_config):
    here = site(parse(tiny_config | {"adapter.num-blocks": blocks}))
    model, data = here.model(2), here.data(0, 3).train
    found = input_grams(model, data, kind, 10**6, 7, 0, lambda: torch.autocast(**NO_AUTOCAST))
    wanted = dense_grams(model, data)
    assert found.keys() == wanted.keys() == model.read().layers.keys()
    for name, G in wanted.items():
        gram = unpacked(found[name], blocks, 16, kind)
        whole = torch.diag(gram.flatten()) if kind == "diagonal" else torch.block_diag(*gram)
        inside = whole != 0
        torch.testing.assert_close(whole[inside], G[inside], rtol=1e-4, atol=1e-5)
        assert int(inside.sum()) == (16 if kind == "diagonal" else 256 // blocks)


def test_a_sample_is_of_the_size_asked_for(tiny_config):
    here = site(parse(tiny_config))
    model, data = here.model(2), here.data(0, 3).train
    few, other, all_ = (
        input_grams(model, data, "diagonal", count, 7, seed, lambda: torch.autocast(**NO_AUTOCAST))
        for count, seed in ((5, 0), (5, 1), (len(data), 0))
    )
    name = min(few)
    assert not torch.equal(few[name], all_[name])
    assert not torch.equal(few[name], other[name])


def asked(settings, gram: str) -> RecordDict:
    state = site(settings).model(settings.adapter.rank).read()
    parts = frozenset({"A", "sigma", "B", "tensors"})
    instruction = Instruction(1, "run", parts, parts, False, gram=gram)
    return RecordDict({STATE: to_arrays(flatten(state)), INSTRUCTION: instruction.record()})


def answer(config, content, node=None) -> RecordDict:
    return perform(
        "train", content, Context(1, 2, {"partition-id": 0, "num-partitions": 3, **(node or {})}, RecordDict(), config)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.mode": "record"},
        {"privacy.mode": "client"},
        {"privacy.mode": "local"},
    ],
)
def test_a_site_under_privacy_refuses_them(changes, tiny_config, tmp_path: Path):
    config = tiny_config | changes | {"strategy.weighting": "uniform", "privacy.ledger-dir": str(tmp_path)}
    reply = answer(config, asked(parse(config), "blocks"))
    assert reply.config_records[REPLY]["refused"] == Code.STATISTICS_WITHHELD
    assert not reply.array_records


@pytest.mark.parametrize("released", [False, True])
def test_a_site_s_policy_decides(released, tiny_config, tmp_path: Path):
    keys = {"data-set": "tiny", "data-path": tiny_config["data.name"], "models": ["*"], "modes": ["none"]}
    keys |= {"ledger-folder": str(tmp_path / "ledger"), "head-statistics": released}
    file = tmp_path / "policy.toml"
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    reply = answer(tiny_config, asked(parse(tiny_config), "blocks"), {"policy": str(file)})
    assert (GRAMS in reply.array_records) == released
    if not released:
        assert reply.config_records[REPLY]["refused"] == Code.STATISTICS_WITHHELD


def test_the_server_rejects_a_reply_without_them_or_with_others(tiny_config):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    settings = parse(tiny_config)
    state = site(settings).model(2).read()
    reply = answer(tiny_config, asked(settings, "blocks"))

    def read(content: RecordDict, kind="blocks"):
        request = Message(RecordDict(), dst_node_id=2, message_type="train")
        return read_grams(Message(content, reply_to=request), state, kind)

    grams = read(reply)
    assert {name: g.shape for name, g in grams.items()} == dict.fromkeys(state.layers, torch.Size([4, 4, 4]))
    with pytest.raises(RejectedReplyError, match="no Gram matrices"):
        read(answer(tiny_config, asked(settings, "")))
    with pytest.raises(RejectedReplyError, match="shape"):
        read(reply, "diagonal")
    some = {name: torch.zeros(4, 10) for name in list(state.layers)[1:]}
    with pytest.raises(RejectedReplyError, match="on one side only"):
        read(RecordDict({GRAMS: to_arrays(some)}))


def test_a_run_merges_by_them_and_rejects_who_lies(tiny_config):
    def lie(reply: Message, partition: int) -> Message:
        if partition == 1 and GRAMS in reply.content.array_records:
            del reply.content.array_records[GRAMS]
        return reply

    config = tiny_config | {"strategy.name": "regmean", "run.num-rounds": 1, "train.local-steps": 1}
    rows = (simulate(config, 3, tamper=lie) / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    assert (row["clients"], row["rejected"]) == (2, 1)
    assert "no Gram matrices" in next(iter(row["reasons"].values()))
