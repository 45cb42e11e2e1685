"""Searches over an engine that trains nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sweeper import config
from sweeper.record import Record
from sweeper.spec import Settings
from sweeper.study import launch
from sweeper.study.search_settings import SearchSettings
from tests.study.bowl import BowlEngine


@pytest.fixture
def bowl(make_record: Callable[..., Record]) -> BowlEngine:
    return BowlEngine(make_record)


@pytest.fixture
def go(composer: Any, study: Settings, bowl: BowlEngine) -> Callable[..., dict[str, Record]]:
    def run(overrides: Sequence[str], settings: Settings = study, engine: Any = bowl, **search: Any) -> Any:
        found = config.expand(overrides, composer)
        return launch.train(found.arms, settings, SearchSettings(**search), engine=engine)

    return run
