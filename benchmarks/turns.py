"""Benchmarks that prepare at the same time and measure one after another: a machine is lent for a while only."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any


def wait_for_turn(wanted: bool) -> None:
    """Says that all is prepared and waits until it is this process's turn, where one is `wanted`."""
    if wanted:
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()


def measured(commands: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The last JSON line of each command, all of which are called with `--turn`; an error is one of its own."""
    with contextlib.ExitStack() as stack:
        complaints = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command, "--turn"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, text=True,
            )
            for command, stderr in zip(commands, complaints, strict=True)
        ]  # fmt: skip
        for one in running:
            assert one.stdout is not None
            next((line for line in one.stdout if line.startswith('{"ready"')), "")
        for one, stderr in zip(running, complaints, strict=True):
            said, _ = one.communicate("\n")
            lines = [line for line in said.splitlines() if line.startswith("{")]
            if one.returncode or not lines:
                stderr.seek(0)
                yield {"error": (stderr.read().strip().splitlines() or ["nothing said"])[-1]}
            else:
                yield json.loads(lines[-1])
