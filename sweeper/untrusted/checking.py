"""The process of a check: holds the verdict, and asks the program's process for everything that the program does.

The check's source is run here. Where it runs the text PROGRAM, with `exec` or `eval`, the program's process does;
what that text defines is known here as a `Remote`, or as a plain value. A program's objects never judge themselves:
compared with a value of the check's they are unequal, and arithmetic between the two is refused.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import CodeType

from .wire import Broken, Peer, builtin_name, decode, encode, refill, standard_module

TYPE_CHECKING = False  # typing is not worth its import, once a program
if TYPE_CHECKING:
    from typing import Any

PASSED = "passed"


class Remote:
    """Something in the program's process that is no plain value: a function, a class, an object, an iterator."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: Line, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._line.call(self._number, given, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._line.apply("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.apply("setattr", self, name, value)

    def __eq__(self, other: object) -> Any:
        return isinstance(other, Remote) and self._line.apply("eq", self, other) is True

    __hash__ = object.__hash__

    def __iter__(self) -> Any:
        return self._line.apply("iter", self)

    def __next__(self) -> Any:
        return self._line.step(self._number)

    def __len__(self) -> int:
        return int(self._line.apply("len", self))

    def __bool__(self) -> bool:
        return self._line.apply("bool", self) is True

    def __str__(self) -> str:
        return str(self._line.apply("str", self))

    def __repr__(self) -> str:
        return str(self._line.apply("repr", self))

    def __contains__(self, item: Any) -> bool:
        return self._line.apply("contains", self, item) is True

    def __getitem__(self, key: Any) -> Any:
        return self._line.apply("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._line.apply("setitem", self, key, value)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and self._line.apply("isinstance", instance, self) is True


def _between_remotes(name: str) -> Any:
    def operate(self: Remote, other: Any) -> Any:
        return self._line.apply(name, self, other) if isinstance(other, Remote) else NotImplemented

    return operate


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv"):
    setattr(Remote, f"__{_name}__", _between_remotes(_name))


class Line(Peer):
    """The check's end of the line."""

    def call(self, target: int, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        sent = {name: self.encoded(one) for name, one in named.items()}
        answer = self.ask("call", target, [self.encoded(one) for one in given], sent)
        places: dict[int | str, Any] = {**dict(enumerate(given))} | dict(named)
        try:
            found, left = answer
            changed = [(places[place], self.decoded(now)) for place, now in left]
        except (TypeError, ValueError, KeyError):
            raise Broken("no answer to a call") from None
        for value, now in changed:
            refill(value, now)
        return self.decoded(found)

    def apply(self, function: str, *given: Any) -> Any:
        return self.decoded(self.ask("apply", function, [self.encoded(one) for one in given]))

    def step(self, iterator: int) -> Any:
        match self.ask("step", iterator):
            case []:
                raise StopIteration
            case [value]:
                return self.decoded(value)
            case _:
                raise Broken("no answer to a step")

    def names(self, space: int, text: str) -> dict[str, Any]:
        """What a text defines at its top level."""
        try:
            return {str(name): self.decoded(value) for name, value in self.ask("exec", space, text)}
        except (TypeError, ValueError):
            raise Broken("no names") from None

    def on_function(self, number: int, given: list[Any]) -> Any:
        """A call by the program of a function that the check gave it."""
        return self.encoded(self.kept[number](*map(self.decoded, given)))

    def encoded(self, value: Any) -> Any:
        return encode(value, self._refer)

    def decoded(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ["kept", value._number]
        if callable(value):
            return ["function", self.keep(value)]
        raise TypeError(f"a check cannot give a program a {type(value).__name__}")

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "theirs" and isinstance(content, int):
            return Remote(self, content)
        if tag == "module" and isinstance(content, str):
            return standard_module(content)
        raise Broken("no value")


class Source(str):
    """What `compile` makes of a program's text: the text, which was found to be Python."""

    __slots__ = ()


class Check:
    """A check's source, and `exec`, `eval` and `compile` as it sees them."""

    def __init__(self, source: str, program: str, line: Line) -> None:
        self.code = compile(source, "<check>", "exec")
        self.program, self.line = program, line
        self.own = set(_texts(self.code))
        self.lines = {text for text in map(str.strip, program.splitlines()) if text}
        self.taken: dict[int, set[str]] = {}
        self.builtins = {**vars(builtins), "exec": self.exec, "eval": self.eval, "compile": self.compile}
        self.names = {"__name__": "__main__", "__builtins__": self.builtins, "PROGRAM": program}

    def run(self) -> None:
        """Raises what the check raises."""
        exec(self.code, self.names)

    def exec(self, source: Any, names: Any = None, local: Any = None, /, **others: Any) -> None:
        """The builtin, with the program's text run in the program's process."""
        names, local = self._spaces(names, local)
        text = self._of_program(source)
        if text is None:
            exec(source, names, local, **others)
            return
        taken = self.taken.setdefault(id(local), set())
        for name, value in self.line.names(id(names), text).items():
            # a name that the check has already, or that Python has, keeps its meaning in the check
            if name in taken or (name not in local and name not in names and name not in self.builtins):
                local[name] = value
                taken.add(name)

    def eval(self, source: Any, names: Any = None, local: Any = None, /) -> Any:
        """As `exec`."""
        names, local = self._spaces(names, local)
        text = self._of_program(source)
        if text is None:
            return eval(source, names, local)
        return self.line.decoded(self.line.ask("eval", id(names), text))

    def compile(self, source: Any, filename: Any, mode: str, *others: Any, **more: Any) -> Any:
        """The builtin; of the program's text, or of a tree, it gives a text for `exec` and `eval`."""
        made = compile(source, filename, mode, *others, **more)
        if not isinstance(made, CodeType):
            return made
        if not isinstance(source, str | bytes):
            source = sys.modules["ast"].unparse(source)
        text = self._of_program(source)
        return made if text is None else Source(text)

    def _spaces(self, names: Any, local: Any) -> tuple[Any, Any]:
        if names is None:
            frame = sys._getframe(2)
            names, local = frame.f_globals, frame.f_locals if local is None else local
        if isinstance(names, dict):
            names.setdefault("__builtins__", self.builtins)
        return names, names if local is None else local

    def _of_program(self, source: Any) -> str | None:
        """The text where it is the program's, with or without something before; None where it is the check's own."""
        if isinstance(source, bytes | bytearray):
            source = bytes(source).decode()
        if not isinstance(source, str):
            return None
        if isinstance(source, Source):
            return str(source)
        if source in self.own and source is not self.program:
            return None
        if self.program.strip() in source or self.lines & set(map(str.strip, source.splitlines())):
            return source
        return None


def _texts(constant: Any) -> Iterator[str]:
    """The literal texts of a compiled source."""
    if isinstance(constant, str):
        yield constant
    for inner in (
        constant.co_consts if isinstance(constant, CodeType) else constant if isinstance(constant, tuple) else ()
    ):
        yield from _texts(inner)


def verdict(source: str, program: str, line: Line) -> str:
    """`passed`, or the builtin exception that a check on a program ended with.

    Raises:
        Gone: the program's process ended before the check did.
    """
    try:
        Check(source, program, line).run()
    except Broken:
        return "broken answer"
    except Exception as error:
        return builtin_name(type(error))
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        return builtin_name(type(error))
    return PASSED
