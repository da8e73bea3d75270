"""Each law can be broken, and is said to be."""

import pytest

from bora_fl.strategies import aggregation
from bora_fl.testing import LAWS, check

BROKEN = {
    "one_client_is_a_no_op": "halfway",
    "identical_clients_are_a_no_op": "counting",
    "the_order_of_clients_does_not_matter": "forgetful",
    "only_the_ratio_of_weights_matters": "forgetful",
    "weights_are_not_ignored": "uniform",
    "a_client_of_tiny_weight_changes_next_to_nothing": "uniform",
    "an_exact_strategy_reproduces_the_mean_product": "exact",
    "the_adapter_keeps_its_form": "wider",
    "inputs_are_left_alone": "in_place",
    "preparing_does_not_change_the_model": "preparing",
    "a_second_round_goes_on_from_the_first": "folding",
    "float32_stays_float32": "double",
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_law_fails_for_a_strategy_that_breaks_it(law: str):
    name = f"tests.testing.broken:{BROKEN[law]}"
    with pytest.raises(AssertionError, match=f"{BROKEN[law]} on .*: {law.replace('_', ' ')}: "):
        check(name, law)


@pytest.mark.parametrize("law", sorted(set(LAWS) - {"one_client_is_a_no_op"}))
def test_a_strategy_that_goes_half_of_the_way_keeps_the_others(law: str):
    check("tests.testing.broken:halfway", law)


def test_a_wrong_report_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aggregation, "summed", lambda *_: {"merge_error": 0.0, "update_norm": 1.0})
    law = "the_report_measures_the_distance_to_the_mean_product"
    with pytest.raises(AssertionError, match="off by"):
        check("bora_fl.strategies.averaging:average", law)
    assert {law} == LAWS.keys() - BROKEN.keys()
