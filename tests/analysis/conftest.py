"""Studies that several tests read; nobody writes to them."""

from pathlib import Path

import pytest

from analysis import Analysis, analyse, load
from tests.analysis.synthetic import write_study


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, three placements, two ranks, three seeds, two learning rates; full fine-tuning; forgetting."""
    return write_study(
        tmp_path_factory.mktemp("outputs") / "grid",
        datasets=("icd10_chapter", "gsm_symbolic"),
        ranks=(4, 16),
        lrs=(1e-3, 3e-3),
        methods=("lora", "full_ft"),
        forgetting=True,
        spectra=True,
        examples=120,
        steps=20,
    )


@pytest.fixture(scope="session")
def analysis(study_folder: Path) -> Analysis:
    return analyse(load(study_folder), draws=500)
