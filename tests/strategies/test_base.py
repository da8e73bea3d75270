"""The strategy as a Flower user calls it, with no observer, and the stages of a round as values."""

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from bora_fl.config import parse
from bora_fl.report import RoundReport
from bora_fl.state import flatten
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.observer import Observer, RunFailedError
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import REPLY, SCHEMA, STATE
from tests.strategies.four_nodes import CONFIG, SICK, Grid, adapter


def settings(**changes):
    return parse(CONFIG | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()})


class Watch(Observer):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def on_round(self, report: RoundReport, *_: object) -> None:
        self.reports.append(report)


def test_start_runs_as_many_rounds_as_it_is_told_and_evaluates_after_each():
    seen = []

    def evaluate(round, arrays):
        seen.append((round, from_arrays(arrays)))
        return MetricRecord({"loss": float(round)})

    grid, initial = Grid(), to_arrays(flatten(adapter(0)))
    result = FederatedStrategy(settings(run__num_rounds=7)).start(grid, initial, num_rounds=1, evaluate_fn=evaluate)
    assert [round for round, _ in seen] == [0, 1]
    assert {message.metadata.message_type for message in grid.seen} == {"query", "train", "evaluate"}
    assert sum(message.metadata.message_type == "train" for message in grid.seen) == 4
    assert all(torch.equal(seen[0][1][name], tensor) for name, tensor in flatten(adapter(0)).items())
    final = from_arrays(result.arrays)
    assert all(torch.equal(seen[1][1][name], tensor) for name, tensor in final.items())
    assert not torch.equal(final["layers/q/B"], seen[0][1]["layers/q/B"])
    assert dict(result.evaluate_metrics_serverapp[1]) == {"loss": 1.0}
    assert result.train_metrics_clientapp[1]["train-loss"] == pytest.approx(0.5)
    assert result.evaluate_metrics_clientapp[1]["eval-accuracy"] == pytest.approx(0.5)


def test_start_sends_the_configs_that_it_is_given():
    grid, initial = Grid(), to_arrays(flatten(adapter(0)))
    FederatedStrategy(settings()).start(
        grid, initial, 1, train_config=ConfigRecord({"lr": 0.5}), evaluate_config=ConfigRecord({"split": "dev"})
    )
    sent = {m.metadata.message_type: m.content.config_records.get("config") for m in grid.seen}
    assert sent["train"]["lr"] == 0.5
    assert sent["evaluate"]["split"] == "dev"


def test_start_waits_as_long_as_it_is_told():
    timeouts = []

    class Slow(Grid):
        def send_and_receive(self, messages, *, timeout=None):
            timeouts.append(timeout)
            return super().send_and_receive(messages, timeout=timeout)

    FederatedStrategy(settings()).start(Slow(), to_arrays(flatten(adapter(0))), 1, timeout=12.5)
    assert timeouts[-2:] == [12.5, 12.5]


def test_start_leaves_the_observer_in_its_place():
    watch = Watch()
    strategy = FederatedStrategy(settings(), observer=watch)
    strategy.start(Grid(), to_arrays(flatten(adapter(0))), 2)
    assert strategy.observer is watch
    assert [report.round for report in watch.reports] == [0, 1, 2]


def test_a_loop_of_ones_own_over_flowers_methods_reaches_the_same_adapter():
    grid, arrays = Grid(), to_arrays(flatten(adapter(0)))
    wanted = FederatedStrategy(settings()).start(Grid(), arrays, 2).arrays
    strategy = FederatedStrategy(settings())
    strategy.state = ServerState.start(adapter(0))
    for number in (1, 2):
        strategy.nodes.discover(grid)
        replies = grid.send_and_receive(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        merged, metrics = strategy.aggregate_train(number, replies)
        arrays = arrays if merged is None else merged
        assert metrics["train-loss"] == pytest.approx(0.5)
    found = from_arrays(arrays)
    assert all(torch.equal(found[name], tensor) for name, tensor in from_arrays(wanted).items())


def test_a_round_reports_what_its_stages_returned():
    watch = Watch()
    strategy = FederatedStrategy(settings(), observer=watch)
    strategy.run(Grid(), ServerState.start(adapter(0)), [], 1)
    report = watch.reports[0]
    assert report.clients == 4
    assert report.rejected == 0
    assert sorted(report.per_client) == [0, 1, 2, 3]
    assert report.per_client[2].num_examples == 12
    assert report.per_client[2].eval_loss == 3.0
    assert report.client_loss == pytest.approx(2.5)
    assert (report.loss, report.evaluated) == (report.client_loss, "clients")
    assert report.bytes_down == 4 * sum(len(a.data) for a in to_arrays(flatten(adapter(0))).values())
    assert report.bytes_up > 0


def test_too_few_replies_change_nothing():
    watch = Watch()
    strategy = FederatedStrategy(settings(strategy__min_replies=5), observer=watch)
    state = strategy.run(Grid(), ServerState.start(adapter(0)), [], 1)
    start = flatten(adapter(0))
    assert all(torch.equal(tensor, start[name]) for name, tensor in flatten(state.current).items())


@pytest.mark.parametrize("size", [1e18, 1e20, 3e38])
@pytest.mark.parametrize("name", ["refactor", "florist"])
def test_numbers_that_overflow_in_the_merge_do_not_end_the_run(name: str, size: float):
    def huge(content: RecordDict) -> RecordDict:
        if STATE not in content.array_records:  # an evaluation
            return content
        flat = from_arrays(content.array_records[STATE])
        for entry, tensor in flat.items():
            if not entry.endswith("/scaling"):
                tensor.view(-1)[0] = size
        content[STATE] = to_arrays(flat)
        return content

    options, watch, start = settings(strategy__name=name, strategy__server_optimizer="none"), Watch(), adapter(0)
    state = FederatedStrategy(options, build(options), "run", watch).run(Grid(huge), ServerState.start(start), [], 1)
    assert len(watch.reports) == 2
    for report in watch.reports:
        assert "merge" not in report.reasons or report.reasons["merge"].endswith("the adapter stays as it was")
    assert all(bool(tensor.isfinite().all()) for tensor in flatten(state.current).values())


def test_a_run_without_any_usable_reply_says_why():
    class Sick(Grid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "train":
                reply.content.metric_records["metrics"]["num-examples"] = -1.0
            return reply

    with pytest.raises(RunFailedError, match="num-examples"):
        FederatedStrategy(settings()).run(Sick(), ServerState.start(adapter(0)), [], 1)


def test_a_node_that_claims_a_partition_that_is_served_is_left_out_and_the_report_says_so():
    class Twins(Grid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "query":
                name = "berlin" if message.metadata.dst_node_id == 2 + SICK else "a line\nof its own"
                reply.content.config_records["reply"]["name"] = name
            if message.metadata.message_type == "query" and message.metadata.dst_node_id == 2 + SICK:
                reply.content.config_records["reply"]["partition"] = 0
            return reply

    watch = Watch()
    strategy = FederatedStrategy(settings(strategy__min_nodes=3), observer=watch)
    strategy.run(Twins(), ServerState.start(adapter(0)), [], 1)
    assert strategy.nodes.called(2 + SICK) == f"berlin (node {2 + SICK})"
    assert strategy.nodes.called(2) == strategy.nodes.called_client(0) == "client 0 (node 2)"
    assert (strategy.nodes.called(77), strategy.nodes.called_client(77)) == ("node 77", "client 77")
    assert watch.reports[0].clients == 3
    assert "another node serves partition 0" in watch.reports[0].reasons[str(2 + SICK)]


def test_clients_evaluate_in_the_rounds_that_the_server_evaluates_in():
    grid = Grid()
    FederatedStrategy(settings(run__num_rounds=4, run__evaluate_every=3, strategy__fraction_evaluate=0.0)).run(
        grid, ServerState.start(adapter(0)), [], 1
    )
    asked = [m.content.config_records["instruction"] for m in grid.seen if m.metadata.message_type == "train"]
    assert {(i["round"], i["evaluate"]) for i in asked} == {(1, False), (2, False), (3, True), (4, True)}


@pytest.mark.parametrize("liar", [2, 3, 5])
def test_one_node_does_not_say_how_many_there_are(liar: int, caplog):
    """The server would wait for a million."""

    class Late(Grid):
        """Nodes connect one after the other, the liar first."""

        def __init__(self) -> None:
            super().__init__()
            self.there = [liar]

        def get_node_ids(self):
            found = list(self.there)
            self.there = [liar, *[node for node in (2, 3, 4, 5) if node != liar]][: len(self.there) + 1]
            return found

        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "query" and message.metadata.dst_node_id == liar:
                reply.content.config_records[REPLY] = ConfigRecord(
                    {"schema": SCHEMA, "partition": liar - 2, "num-partitions": 10**6}
                )
            return reply

    watch = Watch()
    chosen = settings(run__num_rounds=1, strategy__wait_seconds=4.0)
    FederatedStrategy(chosen, build(chosen), "run", watch).run(Late(), ServerState.start(adapter(0)), [], 1)
    assert watch.reports[0].clients == 4
    assert "says that there are 1000000 clients, where most say 4" in caplog.text
