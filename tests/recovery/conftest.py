"""Tiny batches are cut up as large ones are."""

import pytest

from flexigpt.recovery import head


@pytest.fixture(autouse=True)
def _few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 13 tokens exist at a time, which divides none of the tests' batches."""
    monkeypatch.setattr(head, "_LEAST_TOKENS", 13)
    monkeypatch.setitem(head._CHUNK_BUDGET, "cpu", 1)
