"""Programming: a question with the specification of its inputs and output -> a Python function that answers it.

Data: codeio.jsonl.gz of the package reasoning-gym (Apache-2.0), from CodeI/O (Li et al. 2025). Kept are programs that
import only deterministic modules of the standard library, do no input or output, and are at most `MAX_CHARACTERS`
long. A generated program is right if it agrees with the reference on `CASES` inputs, which the task's own generator
draws from fixed seeds; both run in the sandbox. Groups: programs that define the same helper functions or have the same
question.
"""

import ast
import gzip
import json
import sys
import warnings
from functools import cache, partial

from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Example
from sweeper.tasks.package import folder, installed_version, require
from sweeper.tasks.split import split_examples

PACKAGE = "reasoning-gym"
OPTIONS: dict[str, str] = {}
MAX_CHARACTERS = 1200
CASES = 5
IMPURE = frozenset(
    {
        "asyncio", "ctypes", "datetime", "importlib", "io", "logging", "multiprocessing", "os", "pathlib", "random",
        "secrets", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid",
    }
)  # fmt: skip
CALLS = frozenset({"compile", "eval", "exec", "input", "open", "print", "__import__"})

CHECK = """
import copy as _copy, math as _math, random as _random

def _close(a, b):
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float, complex)) and isinstance(b, (int, float, complex)):
        return a == b or abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-3) or (a != a and b != b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b))
    return a == b

exec(PROGRAM, globals())
_reference = {"Random": _random.Random}
exec(%(program)r, _reference)
exec(%(generator)r, _reference)
for _seed in range(%(cases)d):
    _inputs = _reference["generate_inputs"](_random.Random(_seed))
    _expected = _reference["main_solution"](**_copy.deepcopy(_inputs))
    assert _close(main_solution(**_copy.deepcopy(_inputs)), _expected)
"""

UNIT = "programs that define the same helper functions, or answer the same question"

check = partial(require, "reasoning_gym", PACKAGE)
version = partial(installed_version, PACKAGE)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    return split_examples(_programs(), spec, near_duplicates=False)


@cache
def _programs() -> tuple[Example, ...]:
    with gzip.open(folder("reasoning_gym") / "data" / "codeio.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    made = []
    for index, row in enumerate(rows):
        program = row["code_sample"].strip()
        names = _helpers(program)
        if len(program) > MAX_CHARACTERS or names is None:
            continue
        prompt = (
            f"{row['task_description'].strip()}\n\n{row['input_output_spec'].strip()}\n\n"
            "Answer with a Python function main_solution."
        )
        tests = CHECK % {"program": program, "generator": row["input_generator"], "cases": CASES}
        group = " ".join(names) or row["task_description"]
        made.append(Example(f"{index}", prompt, program, group, check=tests))
    return tuple(made)


def _helpers(program: str) -> list[str] | None:
    """Names of the helper functions and classes; None for a program that is not kept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on the programs
            nodes = list(ast.walk(ast.parse(program)))
    except SyntaxError:
        return None
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if modules - sys.stdlib_module_names or modules & IMPURE or called & CALLS:
        return None
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return sorted(defined - {"main_solution", "__init__"})
