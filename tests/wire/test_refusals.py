"""Codes are a closed list; whatever is raised at a site becomes one of them, and its text stays."""

import re

import pytest
import torch

from bora_fl.privacy.accounting import Budget, BudgetExceeded, Spent
from bora_fl.wire.refusals import Code, Refusal, Refused, code_of, explain, refuse_as

SPENT = BudgetExceeded("the run's budget", Budget(1.0, 1e-5), 0.5, Spent(1.0, 0.1, 3), 2.0, "record")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("Anna Schmidt"), Code.INTERNAL_ERROR),
        (MemoryError(), Code.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Code.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), Code.OUT_OF_MEMORY),
        (FloatingPointError("the loss became nan in step 2 of 4"), Code.TRAINING_DIVERGED),
        (SPENT, Code.BUDGET_EXCEEDED),
        (Refused(Code.POLICY_MODE, "text"), Code.POLICY_MODE),
    ],
)
def test_every_exception_has_a_code(error: Exception, code: Code):
    assert code_of(error) is code
    with pytest.raises(Refused) as refused, refuse_as(Code.DATA_UNREADABLE, Code.BUDGET_EXCEEDED):
        raise error
    kept = code in (Code.BUDGET_EXCEEDED, Code.POLICY_MODE)
    assert refused.value.code is (code if kept else Code.DATA_UNREADABLE)


def test_what_ends_a_job_passes_through():
    with pytest.raises(KeyboardInterrupt), refuse_as(Code.DATA_UNREADABLE):
        raise KeyboardInterrupt


@pytest.mark.parametrize("code", list(Code))
def test_a_code_is_a_plain_word_with_a_sentence(code: Code):
    assert re.fullmatch("[a-z]+(-[a-z]+)*", code)
    assert len(code.sentence) > 20
    assert explain(str(code), "0123abcd") == f"{code}: {code.sentence} (error 0123abcd in the site's log)"


def test_error_ids_are_random():
    ids = {Refusal(Code.INTERNAL_ERROR).error_id for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{8}", i) for i in ids)
