"""A check sees of a program what it would see in one process: values, classes, iterators, exceptions, changed
arguments.
"""

import json
import math
import os
import threading

import pytest

from sweeper.untrusted import sandbox, syscalls, wire
from sweeper.untrusted.checking import Line, Remote, verdict
from sweeper.untrusted.program import Program

POINT = """\
class Point:
    def __init__(self, x, y=0): self.x, self.y = x, y
    def __eq__(self, other): return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __len__(self): return 2
    def __getitem__(self, place): return (self.x, self.y)[place]
    def __repr__(self): return f"Point({self.x}, {self.y})"
    def __bool__(self): return bool(self.x)
    def __lt__(self, other): return self.x < other.x
    def __contains__(self, item): return item in (self.x, self.y)
"""
SAME = {  # the program, and what a check of it may say
    "numbers": ("def f(x): return x * 2", "assert f(21) == 42 and f(1.5) == 3.0 and f(2j) == 4j and f(True) == 2"),
    "large numbers": (
        "def f(n): return 7 ** n",
        "assert f(20000) == 7 ** 20000 and f(30) == 7 ** 30 and -f(99) == -(7 ** 99)",
    ),
    "no numbers": ("inf = float('inf')\nnan = float('nan')", "assert inf == float('inf') and nan != nan"),
    "texts": ("def f(s): return s + '\\ud800é'", "assert f('ü') == 'ü\\ud800é' and type(f('')) is str"),
    "bytes": ("def f(b): return bytearray(b) + b'\\xff'", "assert f(b'a') == bytearray(b'a\\xff')"),
    "containers": (
        "def f(x): return [x, (x,), {x}, {x: [x]}, frozenset((x,)), range(x), None]",
        "assert f(3) == [3, (3,), {3}, {3: [3]}, frozenset((3,)), range(3), None] and type(f(3)[1]) is tuple",
    ),
    "subclasses of containers": (
        "import collections\nP = collections.namedtuple('P', 'x y')\ndef f(): return P(1, 2)\n"
        "def g(): return collections.Counter('aab')\ndef h(): return collections.deque([1], 3)",
        "import collections\nassert f() == (1, 2) and g() == {'a': 2, 'b': 1} == collections.Counter('baa')\n"
        "assert h() == collections.deque([1])",
    ),
    "numbers of other kinds": (
        "import decimal, fractions, datetime\ndef f(d): return d + decimal.Decimal('0.1')\n"
        "def g(): return fractions.Fraction(1, 3), datetime.date(2020, 1, 2), datetime.timedelta(1, 2)",
        "import decimal, fractions, datetime\nassert f(decimal.Decimal(1)) == decimal.Decimal('1.1')\n"
        "assert g() == (fractions.Fraction(1, 3), datetime.date(2020, 1, 2), datetime.timedelta(1, 2))",
    ),
    "changed arguments": (
        "def f(xs, *, d): xs.sort(); d['n'] = len(xs)",
        "xs, d = [3, 1, 2], {}\nsame = xs\nassert f(xs, d=d) is None and same == [1, 2, 3] and d == {'n': 3}",
    ),
    "exceptions": (
        "class Own(ValueError): pass\ndef f(x):\n    if x: raise Own('no', 3)\n    return {}[x]",
        "try: f(1)\nexcept ValueError as error: assert error.args == ('no', 3)\nelse: assert False\n"
        "try: f(0)\nexcept KeyError as error: assert error.args == (0,)\nelse: assert False",
    ),
    "iterators": (
        "def f(n):\n    yield from range(n)\ndef g(): return map(str, (1, 2))",
        "assert list(f(3)) == [0, 1, 2] and next(g()) == '1' and sorted(f(2), reverse=True) == [1, 0]\n"
        "made = f(1)\nassert iter(made) and next(made) == 0 and next(made, None) is None",
    ),
    "classes": (
        POINT,
        "p = Point(1, y=2)\np.x = 5\n"
        "assert p.x == 5 and p.y == 2 and len(p) == 2 and p[0] == 5 and 2 in p and 9 not in p\n"
        "assert repr(p) == str(p) == 'Point(5, 2)' and p == Point(5, 2) and p != Point(1, 2) and bool(p) and not "
        "Point(0)\n"
        "assert (p + Point(1)).x == 6 and isinstance(p, Point) and not isinstance(3, Point) and Point(1) < p\n"
        "assert p != (5, 2) and Point.__name__ == 'Point' and not hasattr(p, 'z')",
    ),
    "functions as arguments": (
        "def f(g, xs): return [g(x) for x in xs]\ndef double(x): return 2 * x",
        "seen = []\nassert f(lambda x: seen.append(x) or x + 1, (1, 2)) == [2, 3] and seen == [1, 2]\n"
        "assert f(double, [2]) == [4]\nassert f(lambda x: double(x), [3]) == [6]",
    ),
    "functions as results": ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5 and f(2)(n := 1) == 3"),
    "modules of the library": (
        "import math\nimport os.path\nfrom typing import List",
        "assert math.pi > 3 and os.sep == '/'",
    ),
}


@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize("name", SAME)
def test_a_check_sees_what_it_would_see_in_one_process(name: str) -> None:
    program, check = SAME[name]
    exec(f"{program}\n{check}", {"__name__": "__main__"})  # the check is right of a program in its own process
    assert sandbox.run(program, f"exec(PROGRAM, globals())\n{check}", sandbox.Limits()).reason == "passed"


WAYS = {
    "a namespace of its own": "n = {}\nexec(PROGRAM, n)\nassert n['f'](2) == 4",
    "two namespaces": (
        "n, m = {}, {}\nexec(PROGRAM, n)\nexec('def f(x): return x', m)\nassert n['f'](2) == 4 and m['f'](2) == 2"
    ),
    "no namespace": "exec(PROGRAM)\nassert f(2) == 4",
    "in a function": "def g():\n    n = {}\n    exec(PROGRAM, globals(), n)\n    return n['f'](3)\nassert g() == 6",
    "something before it": "exec('import math\\n' + PROGRAM, globals())\nassert f(2) == 4",
    "something after it": "exec(PROGRAM + '\\nx = f(8)', globals())\nassert x == 16",
    "compiled": "exec(compile(PROGRAM, 'p', 'exec'), globals())\nassert f(2) == 4",
    "a tree": "import ast\nexec(compile(ast.parse(PROGRAM), 'p', 'exec'), globals())\nassert f(2) == 4",
    "a function of it": "exec(PROGRAM.split('#')[0], globals())\nassert f(2) == 4",
    "a text of the check's own": "exec(PROGRAM, globals())\nfor t in ('assert f(2) == 4', 'assert f(3) == 6'): exec(t)",
    "an expression": "exec(PROGRAM, globals())\nassert eval('f(2)') == 4 and eval('f(2) + 1') == 5",
}


@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize("name", WAYS)
def test_a_check_may_run_the_program_in_any_of_these_ways(name: str) -> None:
    program = "import os\npid = os.getpid()\ndef f(x): return 2 * x  # twice"
    elsewhere = "\nimport os\nassert globals().get('pid', 0) != os.getpid()"
    assert sandbox.run(program, WAYS[name] + elsewhere, sandbox.Limits()).reason == "passed"
    assert not sandbox.run(program.replace("2 * x", "3 * x"), WAYS[name], sandbox.Limits()).passed


def line() -> tuple[Line, threading.Thread]:
    """A line to a program in a thread of this process: what crosses is the same."""
    questions, asking = os.pipe()
    answering, answers = os.pipe()

    def serve() -> None:
        try:
            Program(questions, answers).serve()
        except wire.Gone:
            os.close(answers)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return Line(answering, asking), thread


def test_values_cross_unchanged() -> None:
    made, _ = line()
    for value in (
        0,
        -1,
        2**63,
        -(2**200),
        1.5,
        "",
        "a",
        None,
        (),
        [],
        {(1, "a"): {2: b"x"}},
        {1, 2},
        range(3, 9, 2),
        1j,
    ):
        back = wire.decode(json.loads(json.dumps(made.encoded(value))), made._resolve)
        assert back == value
        assert type(back) is type(value)
    assert math.isnan(wire.decode(made.encoded(math.nan), made._resolve))


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["list"],
        ["list", 3],
        ["dict", [[1]]],
        ["int", 3],
        ["int", "x"],
        ["os.system", "true"],
        ["object", []],
        {"a": 1},
        ["builtins.eval", "1"],
        ["theirs", "x"],
        ["module", 3],
        ["set", [["list", []]]],
        ["decimal.Decimal", "x"],
        ["tuple", None],
        ["datetime.date", 3],
        ["builtins.range", [0, 1, 0]],
        ["function", 0],
    ],
)
def test_nothing_else_is_made_of_what_arrives(data: object) -> None:
    made, _ = line()
    with pytest.raises(wire.Broken):
        made.decoded(data)


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        b"\x02\x00\x00\x00[}",
        b"\x01\x00\x00\x003",
        wire.frame(["answer"]),
        wire.frame(["raised", "os", []]),
        wire.frame(["raised", "print", []]),
        wire.frame(["encoded", 3]),
        wire.frame(["call", 0, [], {}]),
        wire.frame({}),
        wire.frame(["answer", [3]]),
        wire.frame(["answer", [3, [[7, 1]]]]),
        b"\x00\x00\x01\x00" + b"[" * 65536,
    ],
)
def test_a_broken_answer_ends_the_check(sent: bytes) -> None:
    incoming, answers = os.pipe()
    _, outgoing = os.pipe()
    os.write(answers, sent[:60000])
    os.close(answers)
    made = Line(incoming, outgoing)
    with pytest.raises((wire.Broken, wire.Gone)):
        Remote(made, 0)()


def test_a_broken_answer_is_the_outcome() -> None:
    incoming, answers = os.pipe()
    _, outgoing = os.pipe()
    os.write(answers, wire.frame(["answer", 3]))
    check = "try:\n    exec(PROGRAM, globals())\nexcept Exception:\n    pass"
    assert verdict(check, "def f(): pass", Line(incoming, outgoing)) == "broken answer"


def test_a_check_of_the_text_alone_needs_no_program() -> None:
    made, _ = line()
    assert verdict("assert 'return' in PROGRAM", "def f(): return 1", made) == "passed"
    assert verdict("assert f() == 1", "def f(): return 1", made) == "NameError"
    assert verdict("assert", "", made) == "SyntaxError"


def test_the_filter_knows_the_machines_by_their_tables() -> None:
    for machine in syscalls.MACHINES:
        made = syscalls.instructions(machine)
        ends = [
            place + 1 + max(true, false) for place, (code, true, false, _) in enumerate(made) if code != syscalls.RETURN
        ]
        assert max(ends) < len(made)
        assert made[-1] == (syscalls.RETURN, 0, 0, syscalls.ALLOW)
    with pytest.raises(OSError, match="the numbers of system calls on vax are not known"):
        syscalls.instructions("vax")
