"""Two drivers share a search through PostgreSQL, started by the test from the packages of the machine."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper import record

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytestmark = [
    pytest.mark.skipif(not PROGRAMS and shutil.which("initdb") is None, reason="PostgreSQL is not installed"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def database() -> Iterator[str]:
    """URL of a new server that lives as long as the test."""
    pytest.importorskip("psycopg")
    programs = PROGRAMS[-1].parent if PROGRAMS else Path(str(shutil.which("initdb"))).parent
    root = os.geteuid() == 0  # the server refuses to run as root
    user = "postgres" if root else pwd.getpwuid(os.geteuid()).pw_name
    # not in pytest's folder, which another pytest that starts meanwhile closes to other users
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if root:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments], check=True, user=user if root else None, cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip

    data = str(folder / "data")
    call("initdb", "-D", data, "--auth=trust", "-U", "sweeper")
    options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
    call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://sweeper@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_drivers_share_the_trials_and_none_is_run_twice(database: str, root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "train.py", "-m", "experiment=smoke", "placement=attn,ff", "rank=4", "seed=0,1",
        "optim.lr=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=8", "trainer.max_steps=12",
        f"hydra.sweeper.storage={database}", f"output_root={tmp_path}", "study=shared", "sweep.calibrate=false",
        "sweep.max_pack=2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    drivers = [
        subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [driver.communicate()[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    trained = [line for text in said for line in text.splitlines() if ": completed" in line and "trial" in line]
    assert len(trained) == 16, said
    for text in said:
        assert any("trial" in line and ": completed" in line for line in text.splitlines()), "one driver did it all"
    found = list(record.records(tmp_path / "shared"))
    assert len(found) == 2 * 8 * 2
    assert len({(one.search["arm"], one.search["trial"], one.spec["seed"]) for one in found}) == 32
    assert len({(one.search["arm"], one.spec["optim"]["lr"]) for one in found}) == 16
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert "nothing to train" in again.stdout
    assert again.returncode == 0
