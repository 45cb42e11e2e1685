"""Methods that train alone go through the same loop and leave the same records."""

from typing import Any

import pytest

from sweeper import record

@pytest.mark.parametrize("method", [
    {"name": "full_ft"}, {"name": "full_ft", "options": {"modules": "placed"}}, {"name": "bitfit"},
    {"name": "adalora"}, {"name": "qlora"}, {"name": "peft", "options": {"tuner": "ia3"}},
    {"name": "peft", "options": {"tuner": "prompt_tuning", "arguments": {"num_virtual_tokens": 4}}},
    {"name": "peft", "options": {"tuner": "prefix_tuning", "arguments": {"num_virtual_tokens": 4}}},
], ids=str)
def test_trains(method: Any, make_run: Any, run_all: Any, tmp_path: Any) -> None:
    spec = make_run("full", method=method)
    run_all([spec])
    done = record.read_record(tmp_path / "study" / spec.run_id)
    assert done.status == "completed", done.error
    print(done.scores, done.trainable_parameters, done.modules[:2], done.efficiency)
    assert done.scores["test"]["after"].nll < done.scores["test"]["before"].nll
