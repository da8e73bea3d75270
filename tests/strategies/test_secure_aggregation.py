"""SecAgg+ over a whole federation: the plain mean, nothing but it, and clients that vanish in each stage."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from safetensors.torch import load_file

from bora_fl.client.app import app
from bora_fl.client.secure_aggregation import answer
from bora_fl.config import ConfigError, PrivacySettings, Settings, StrategySettings, parse
from bora_fl.report import training_rows
from bora_fl.server.run import Server
from bora_fl.simulations.engine import InProcessGrid, simulate
from bora_fl.state import unflatten
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.observer import RunFailedError
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.secure_aggregation import quantization_bits, secure_mean, threshold
from bora_fl.wire.records import Instruction, to_arrays
from bora_fl.wire.refusals import Code, Refusal
from bora_fl.wire.schema import INSTRUCTION, METRICS, STATE, refusal

LINEAR = sorted(name for name, row in PRESETS.items() if row.linear)
MASKED = PrivacySettings(secure_aggregation=True)
STAGES = ("keys", "shares", "masked", "unmask")


@pytest.fixture
def plain(tiny_config):
    return tiny_config | {"run.num-rounds": 2}


@pytest.fixture
def secure(plain, tmp_path):
    return plain | {
        "privacy.secure-aggregation": True,
        "privacy.max-examples": 100,
        "run.output-dir": str(tmp_path / "secure"),
    }


def trained(folder) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds: tensors, and products, since the gauge of factors is not what is aggregated."""
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    flat = load_file(newest / "state.safetensors")
    state = unflatten({n.removeprefix("current/"): t for n, t in flat.items() if n.startswith("current/")})
    return {name: factors.dense() for name, factors in state.layers.items()} | dict(state.tensors)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        step = 5e-5 * tensor.numel() ** 0.5  # of the quantization: 2 · 16 / 2^22 over the smallest client's share
        assert float((found[name] - tensor).norm()) <= 5e-3 * float(tensor.norm()) + step, name


def stage_of(reply) -> str:
    record = reply.content.config_records[RECORD_KEY_CONFIGS]
    keys = {Key.PUBLIC_KEY_1: "keys", Key.CIPHERTEXT_LIST: "shares", Key.MASKED_PARAMETERS: "masked"}
    return next((stage for key, stage in keys.items() if key in record), "unmask")


def secure_means(
    updates: list[dict[str, torch.Tensor]], weights: list[int], **privacy
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The protocol's mean of updates, between the server's and the clients' own code, and the exact weighted mean."""
    settings = parse({f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()})
    zeros = to_arrays({name: torch.zeros_like(t) for name, t in updates[0].items()})
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        k = context.node_config["partition-id"]

        def trained(inner: Message) -> RecordDict:
            metrics = MetricRecord({"num-examples": weights[k], "train-loss": 0.5})
            return RecordDict({STATE: to_arrays(updates[k]), METRICS: metrics})

        return Message(answer(message, context, settings, trained), reply_to=message)

    grid = InProcessGrid(app, len(updates), settings.flat())
    parts = frozenset({"A", "B", "tensors"})
    asked = {STATE: zeros, INSTRUCTION: Instruction(1, "run", parts, parts, False).record()}
    messages = [Message(RecordDict(asked), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    found = secure_mean(
        grid,
        messages,
        settings.privacy,
        [tuple(updates[0][name].shape) for name in sorted(updates[0])] + [(1,)],
        round=1,
        max_weight=settings.privacy.max_examples,
        timeout=60.0,
    )
    assert found.mean is not None, found.failures
    share = np.array(weights) / sum(weights)
    exact = [
        sum(p * u[name].double().numpy() for p, u in zip(share, updates, strict=True)) for name in sorted(updates[0])
    ]
    return found.mean[:-1], exact


def small_updates(clients: int, size: float = 1e-4) -> list[dict[str, torch.Tensor]]:
    """As small as what a few steps change, in odd shapes."""
    g = torch.Generator().manual_seed(clients)
    shapes = {"layers/q/A": (3, 7), "layers/q/B": (11, 3), "tensors/bias": (1,), "tensors/head": (2, 5, 3)}
    return [{name: size * torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(clients)]


def relative_error(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    gap = np.concatenate([(f - e).ravel() for f, e in zip(found, exact, strict=True)])
    return float(np.linalg.norm(gap) / np.linalg.norm(np.concatenate([e.ravel() for e in exact])))


@pytest.mark.parametrize(
    "weights", [[200] * 4, [200] * 3, [200, 13, 977, 60, 5000, 1, 10_000], [500] * 16, [10_000, 10_000]]
)
def test_a_sum_at_the_default_settings_is_the_weighted_mean(weights: list[int]):
    """Four clients of 200 examples under max-examples = 10000 lose no more to rounding than the others."""
    assert relative_error(*secure_means(small_updates(len(weights)), weights)) < 0.02


@pytest.mark.parametrize("bits", [16, 22, 28])
@pytest.mark.parametrize("weights", [[200] * 4, [9999, 10_000, 3], [700] * 13])
def test_the_error_is_that_of_rounding_at_random(bits: int, weights: list[int]):
    """Each of K entries is off by at most one step, with variance at most s²/4; the total weight divides the sum."""
    updates = small_updates(len(weights), size=0.1)
    found, exact = secure_means(updates, weights, quantization_bits=bits)
    step = 2 * 8.0 / 2**bits * 10_000 / sum(weights)
    gap = np.concatenate([(f - e).ravel() for f, e in zip(found, exact, strict=True)])
    # A weight is a whole number of 2^-bits of the largest allowed, too.
    weight = 0.5 * 10_000 / 2**bits * len(weights) / sum(weights)
    assert np.abs(gap).max() <= len(weights) * step + weight
    assert np.sqrt(np.mean(gap**2)) <= 1.2 * step * math.sqrt(len(weights)) / 2 + weight


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7, 8, 1000, 2**20])
def test_an_entry_has_the_bits_that_the_sum_has_room_for(clients: int):
    bits = quantization_bits(clients, PrivacySettings())
    assert clients * 2**bits < 2**32
    assert bits == 30 or clients * 2 ** (bits + 1) >= 2**32
    with pytest.raises(ValueError, match=r"privacy\.quantization-bits = 30: the sum has room for 3"):
        quantization_bits(4, PrivacySettings(quantization_bits=30))
    with pytest.raises(ValueError, match="room for 16777215"):
        quantization_bits(2**24, PrivacySettings())


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("strategy", LINEAR)
def test_the_masked_mean_is_the_plain_one_up_to_quantization(strategy: str, weighting: str, plain, secure):
    chosen = {"strategy.name": strategy, "strategy.weighting": weighting, "data.partition": "linear"}
    chosen |= {"run.num-rounds": len(PRESETS[strategy].schedule), "privacy.max-examples": 200}
    chosen["privacy.clipping-range"] = 16.0
    chosen["run.keep-best"] = False
    assert_close(trained(simulate(secure | chosen, 3)), trained(simulate(plain | chosen, 3)))


def test_the_server_sees_no_weight_no_metric_and_nothing_but_masks(plain, secure):
    seen = []

    def watch(reply, partition: int):
        if stage_of(reply) == "masked":
            seen.append(reply.content)
        return reply

    rows = training_rows(simulate(secure, 3, tamper=watch) / "metrics.jsonl")
    assert len(seen) == 3 * 2
    for content in seen:
        assert {name: dict(record) for name, record in content.metric_records.items()} == {
            "fitres.num_examples": {"num_examples": 1}
        }
        assert sum(len(array.data) for record in content.array_records.values() for array in record.values()) == 0
        assert not content.config_records["fitres.metrics"]
        arrays = [bytes_to_ndarray(b) for b in content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]]
        entries = np.concatenate([array.ravel() for array in arrays])
        assert entries.min() >= 0
        share, _ = np.histogram(entries, bins=4, range=(0, 2**32))
        np.testing.assert_allclose(share / len(entries), 0.25, atol=0.12)
    in_clear = training_rows(simulate(plain, 3) / "metrics.jsonl")
    for row, reference in zip(rows, in_clear, strict=True):
        assert row["per_client"] == {}
        assert row["clients"] == 3
        assert row["train_loss"] == pytest.approx(reference["train_loss"], abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_vanishes_in_any_stage_is_left_out_or_counted_and_the_mean_is_right(stage: str, plain, secure):
    """Lost before its masked vector arrives it is in no mean; lost after that it is, and the others unmask it."""
    chosen = {"run.num-rounds": 1, "strategy.weighting": "uniform", "data.partition": "iid"}
    order = Counter()

    def lose(reply, partition: int):
        if partition == 1:
            order[stage_of(reply)] += 1
            return None if stage_of(reply) == stage else reply
        return reply

    folder = simulate(secure | chosen, 4, tamper=lose)
    row = training_rows(folder / "metrics.jsonl")[0]
    assert order[stage] == 1
    assert row["clients"] == (4 if stage == "unmask" else 3)
    assert row["reasons"] == ({} if stage == "unmask" else {"3": "no reply in time"})

    def lose_plainly(reply, partition: int):
        return None if partition == 1 and stage != "unmask" else reply

    assert_close(trained(folder), trained(simulate(plain | chosen, 4, tamper=lose_plainly)))


def _arrays(record, change) -> None:
    arrays = [bytes_to_ndarray(b) for b in record[Key.MASKED_PARAMETERS]]
    record[Key.MASKED_PARAMETERS] = [ndarray_to_bytes(array) for array in change(arrays)]


LIES = {
    "keys: none": ("keys", lambda r, _: r.clear()),
    "keys: no keys": ("keys", lambda r, _: r.update({Key.PUBLIC_KEY_1: b"x"})),
    "keys: no bytes": ("keys", lambda r, _: r.update({Key.PUBLIC_KEY_1: [1]})),
    "keys: of another": ("keys", lambda r, seen: r.update(seen["keys"])),
    "shares: too few": ("shares", lambda r, _: (r[Key.DESTINATION_LIST].pop(), r[Key.CIPHERTEXT_LIST].pop())),
    "shares: for nobody": ("shares", lambda r, _: r.update({Key.DESTINATION_LIST: [1, 9, 77]})),
    "masked: no arrays": ("masked", lambda r, _: r.update({Key.MASKED_PARAMETERS: [b"x"]})),
    "masked: fewer": ("masked", lambda r, _: _arrays(r, lambda arrays: arrays[:-1])),
    "masked: of one entry": ("masked", lambda r, _: _arrays(r, lambda arrays: [a.flat[:1] for a in arrays])),
    "masked: not whole": ("masked", lambda r, _: _arrays(r, lambda arrays: [a + 0.5 for a in arrays])),
    "masked: too large": ("masked", lambda r, _: _arrays(r, lambda arrays: [a + 2**40 for a in arrays])),
    "unmask: about nobody": ("unmask", lambda r, _: r.update({Key.NODE_ID_LIST: [1, 2, 3, 77]})),
    "unmask: too few": ("unmask", lambda r, _: r[Key.SHARE_LIST].pop()),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_none_costs_its_client_the_round_and_nobody_else(lie: str, plain, secure):
    chosen = {"run.num-rounds": 1, "strategy.weighting": "uniform", "data.partition": "iid"}
    at, spoil = LIES[lie]
    seen: dict[str, dict] = {}

    def garble(reply, partition: int):
        if partition == 0 and stage_of(reply) == "keys":
            seen["keys"] = dict(reply.content.config_records[RECORD_KEY_CONFIGS])
        if partition == 1 and stage_of(reply) == at:
            spoil(reply.content.config_records[RECORD_KEY_CONFIGS], seen)
        return reply

    folder = simulate(secure | chosen, 4, tamper=garble)
    row = training_rows(folder / "metrics.jsonl")[0]
    assert row["clients"] == (4 if at == "unmask" else 3)
    assert row["reasons"] == ({} if at == "unmask" else {"3": row["reasons"]["3"]})
    plainly = simulate(plain | chosen, 4, tamper=lambda reply, k: None if k == 1 and at != "unmask" else reply)
    assert_close(trained(folder), trained(plainly))


def test_a_refusal_in_the_place_of_keys_is_said_and_the_others_go_on(secure):
    """As of a site of another version, which cannot read the run config, and so not know that replies are masked."""

    def refuses(reply, partition: int):
        if partition == 1:
            reply.content = refusal(Refusal(Code.RUN_CONFIG_INVALID))
        return reply

    row = training_rows(simulate(secure | {"data.partition": "iid"}, 4, tamper=refuses) / "metrics.jsonl")[0]
    assert row["clients"] == 3
    assert "run-config-invalid" in row["reasons"]["3"]


@pytest.mark.parametrize("stage", ["masked", "unmask"])
def test_a_sum_that_cannot_be_unmasked_changes_nothing_and_the_run_goes_on(stage: str, secure, tmp_path):
    """Masks, or shares of them, of the right form and of other bits: no check of one reply can tell."""
    met = Counter()

    def lie(reply, partition: int):
        if partition == 1 and stage_of(reply) == stage:
            met[stage] += 1
            record = reply.content.config_records[RECORD_KEY_CONFIGS]
            if met[stage] == 2 and stage == "masked":
                draw = np.random.default_rng(0)
                _arrays(record, lambda arrays: [draw.integers(0, 2**32, a.shape) for a in arrays])
            elif met[stage] == 2:
                record[Key.SHARE_LIST] = [bytes(reversed(share)) for share in record[Key.SHARE_LIST]]
        return reply

    chosen = {"run.num-rounds": 3, "data.partition": "iid", "run.keep-checkpoints": 3}
    folder = simulate(secure | chosen, 4, tamper=lie)
    rows = training_rows(folder / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [4, 0, 4]
    assert "no mean of updates" in rows[1]["reasons"]["sum"]
    states = [load_file(folder / "checkpoints" / f"round-{n:05d}" / "state.safetensors") for n in (1, 2)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def asking(change, **config):
    """A federation whose server asks for something else than the protocol does."""
    settings = parse(config)

    class Lying(InProcessGrid):
        def _handle(self, message):
            record = message.content.config_records.get(RECORD_KEY_CONFIGS)
            if record is not None:
                change(record, message.metadata.dst_node_id)
            return super()._handle(message)

    return Server(settings).run(Lying(app, 4, settings.flat()))


def both_secrets(record, node: int) -> None:
    """Say of each client that it is there, and that it is not."""
    if record[Key.STAGE] == Stage.UNMASK:
        record[Key.DEAD_NODE_ID_LIST] = list(record[Key.ACTIVE_NODE_ID_LIST])


def split(record, node: int) -> None:
    """Tell two clients that the others are there, and the others that they are not."""
    if record[Key.STAGE] == Stage.UNMASK:
        record[Key.DEAD_NODE_ID_LIST] = [node]
        record[Key.ACTIVE_NODE_ID_LIST] = [n for n in record[Key.ACTIVE_NODE_ID_LIST] if n != node]


def few(record, node: int) -> None:
    """Let the shares of two of four be enough."""
    if record[Key.STAGE] == Stage.SETUP:
        record[Key.THRESHOLD] = 2


def twice(record, node: int) -> None:
    """Send a client the shares of another twice."""
    if record[Key.STAGE] == Stage.COLLECT_MASKED_VECTORS:
        for key in (Key.SOURCE_LIST, Key.CIPHERTEXT_LIST):
            record[key] = [*record[key], record[key][0]]


@pytest.mark.parametrize("change", [both_secrets, split, few, twice])
def test_a_server_that_asks_for_both_secrets_of_a_client_is_refused(change, secure):
    with pytest.raises(RunFailedError, match="protocol-mismatch"):
        asking(change, **secure | {"data.partition": "iid"})


@pytest.mark.parametrize("stage", Stage.all()[1:])
def test_a_stage_is_answered_once(stage: str, secure):
    """A mask that is on two vectors is on none: their difference is in the clear."""
    settings = parse(secure | {"data.partition": "iid", "run.num-rounds": 2})
    again, keys = [], []

    class Twice(InProcessGrid):
        def _handle(self, message):
            replayed = copy.deepcopy(message)
            reply = super()._handle(message)
            record = replayed.content.config_records.get(RECORD_KEY_CONFIGS, {})
            if record.get(Key.STAGE) == stage:
                again.append(super()._handle(replayed))
            elif record.get(Key.STAGE) == Stage.SETUP:
                answer = reply.content.config_records[RECORD_KEY_CONFIGS]
                keys.extend([answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2]])
            return reply

    folder = Server(settings).run(Twice(app, 3, settings.flat()))
    assert [row["clients"] for row in training_rows(folder / "metrics.jsonl")] == [3, 3]
    assert len(again) == 2 * 3
    assert all("protocol-mismatch" in reply.error.reason for reply in again)
    assert len(set(keys)) == len(keys) == 2 * 3 * 2


@pytest.mark.parametrize("clients", range(2, 12))
def test_the_threshold_is_above_one_half(clients: int):
    for share in (0.51, 0.67, 1.0):
        assert clients / 2 < threshold(clients, PrivacySettings(secure_threshold=share)) <= clients


def test_clients_lost_in_different_stages_do_not_spoil_the_sum(plain, secure):
    chosen = {"run.num-rounds": 1, "strategy.weighting": "uniform", "data.partition": "iid"}
    lost = {0: "keys", 2: "shares", 3: "masked"}
    folder = simulate(
        secure | chosen | {"privacy.secure-threshold": 0.51},
        8,
        tamper=lambda reply, partition: None if lost.get(partition) == stage_of(reply) else reply,
    )
    assert training_rows(folder / "metrics.jsonl")[0]["clients"] == 5
    plainly = simulate(plain | chosen, 8, tamper=lambda reply, partition: None if partition in lost else reply)
    assert_close(trained(folder), trained(plainly))


def test_below_the_threshold_nothing_is_unmasked_and_the_adapter_stays(secure):
    def lose(reply, partition: int):
        return None if partition > 0 and stage_of(reply) == "masked" else reply

    with pytest.raises(RunFailedError, match="no reply in time"):
        simulate(secure | {"data.partition": "iid"}, 4, tamper=lose)


def test_a_client_alone_is_asked_for_nothing_and_the_run_says_why(secure):
    asked = []
    with pytest.raises(RunFailedError, match=r"only client of its round.*strategy\.min-nodes"):
        simulate(secure, 1, tamper=lambda reply, partition: asked.append(reply.metadata.message_type) or reply)
    assert "train" not in asked


def test_a_site_that_cannot_train_says_why_and_the_others_go_on(secure):
    crowded = secure | {"data.partition": "linear", "privacy.max-examples": 80}
    row = training_rows(simulate(crowded, 4) / "metrics.jsonl")[0]
    assert row["clients"] == 3
    assert "weight-out-of-range" in row["reasons"]["5"]


def test_an_update_that_would_be_cut_is_refused_by_its_site(secure):
    with pytest.raises(RunFailedError, match=r"update-out-of-range .* beyond privacy\.clipping-range"):
        simulate(secure | {"privacy.clipping-range": 1e-4}, 3)


def test_a_client_of_another_rank_takes_no_part(secure):
    mixed = secure | {"adapter.sigma-transform": "identity", "data.partition": "iid"}
    row = training_rows(simulate(mixed, 4, node_configs={2: {"rank": 1}}) / "metrics.jsonl")[0]
    assert row["clients"] == 3
    assert "federation's rank" in row["reasons"]["4"]


@pytest.mark.parametrize("mode", ["record", "local"])
def test_it_goes_with_noise_on_the_client(mode: str, secure, tmp_path):
    private = secure | {
        "privacy.mode": mode,
        "privacy.epsilon": 50.0,
        "privacy.delta": 1e-2,
        "privacy.accountant": "rdp",
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.weighting": "uniform",
        "strategy.name": "ffa",
    }
    rows = training_rows(simulate(private, 3) / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [3, 3]
    assert all(row["train_loss"] is None and row["epsilon"] is None for row in rows)
    assert len(list((tmp_path / "ledger").glob("*.json"))) == 3


@pytest.mark.parametrize("strategy", sorted(set(PRESETS) - set(LINEAR)))
def test_a_strategy_that_needs_every_update_refuses_it_with_the_reason(strategy: str):
    with pytest.raises(ValueError, match=r"privacy\.secure-aggregation = true with .*no function of the updates' mean"):
        build(Settings(strategy=StrategySettings(name=strategy), privacy=MASKED))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"robust": "krum"}, "robust = 'krum'.*compares the updates"),
        ({"max_update_norm": 1.0}, "screening looks at every update"),
        ({"min_cosine": 0.0}, "screening looks at every update"),
        ({"max_loss_increase": 0.1}, "screening looks at every update"),
    ],
)
def test_so_do_rules_that_look_at_single_updates(settings, reason: str):
    with pytest.raises(ValueError, match=reason):
        build(Settings(strategy=StrategySettings(name="fedavg", **settings), privacy=MASKED))


def test_the_server_refuses_at_its_start(secure):
    with pytest.raises(ValueError, match="secure-aggregation"):
        simulate(secure | {"strategy.name": "refactor"}, 3)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"privacy.mode": "client", "strategy.weighting": "uniform"}, "does not see"),
        ({"strategy.fraction-evaluate": 0.5}, "fraction-evaluate"),
        ({"privacy.secure-threshold": 0.5}, "secure-threshold"),
        ({"privacy.quantization-bits": 7}, "quantization-bits"),
    ],
)
def test_settings_that_would_undo_it_are_refused(extra, reason: str):
    with pytest.raises(ConfigError, match=reason):
        parse({"privacy.secure-aggregation": True} | extra)
