"""Messages between a check and the program it checks: plain values by value, everything else by number.

Only plain data is ever made of what arrives: no class of the sender's, no code, no pickle.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from types import ModuleType

TYPE_CHECKING = False  # typing is not worth its import, once a program
if TYPE_CHECKING:
    from typing import Any

LARGEST = 16 << 20  # bytes of one message
SMALL = 1 << 63  # larger integers are sent in hexadecimal: their decimal form takes quadratic time

# tag -> a sequence type
SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
# what a call may change of an argument that was sent as a copy
CHANGEABLE = (list, dict, set, deque, bytearray)
# class, as module and name -> what is sent of a value, and how the class makes a value of it
OTHERS: dict[tuple[str, str], tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    ("builtins", "bytes"): (lambda value: bytes(value).hex(), lambda kind, sent: kind.fromhex(sent)),
    ("builtins", "bytearray"): (lambda value: bytes(value).hex(), lambda kind, sent: kind.fromhex(sent)),
    ("builtins", "complex"): (lambda value: [value.real, value.imag], lambda kind, sent: kind(*sent)),
    ("builtins", "range"): (lambda value: [value.start, value.stop, value.step], lambda kind, sent: kind(*sent)),
    ("decimal", "Decimal"): (str, lambda kind, sent: kind(sent)),
    ("fractions", "Fraction"): (str, lambda kind, sent: kind(sent)),
    ("datetime", "datetime"): (lambda value: value.isoformat(), lambda kind, sent: kind.fromisoformat(sent)),
    ("datetime", "date"): (lambda value: value.isoformat(), lambda kind, sent: kind.fromisoformat(sent)),
    ("datetime", "time"): (lambda value: value.isoformat(), lambda kind, sent: kind.fromisoformat(sent)),
    ("datetime", "timedelta"): (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda kind, sent: kind(*sent),
    ),
}


class Broken(BaseException):
    """The other side sent what is no message. No Exception: a check must not catch it."""


class Gone(BaseException):
    """The other side has ended. No Exception: a check must not catch it."""


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON. One of a subclass (a named tuple, a Counter) is sent as the plain value that it extends.

    Args:
        refer: what is sent of a value that is not plain.
    """
    if value is None or type(value) in (bool, float, str):
        return value
    if isinstance(value, int):
        return int(value) if -SMALL < value < SMALL else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in value.items()]]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(item, refer) for item in value]]
    for (module, name), (plain, _) in OTHERS.items():
        # a module that nobody imported has no values, and importing it takes time
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return [f"{module}.{name}", plain(value)]
    if isinstance(value, ModuleType):
        return ["module", value.__name__]
    return refer(value)


def decode(data: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """The value that `encode` made JSON of.

    Args:
        resolve: gives what another tag and its content stand for.

    Raises:
        Broken: it is nothing that `encode` makes.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    try:
        tag, content = data
        if tag == "int":
            return int(content, 16)
        if tag == "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in content}
        if tag in SEQUENCES:
            return SEQUENCES[tag](decode(item, resolve) for item in content)
        module, _, name = tag.rpartition(".")
        if (module, name) in OTHERS:
            return OTHERS[module, name][1](getattr(importlib.import_module(module), name), content)
        return resolve(tag, content)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Broken(str(error)) from None


def refill(value: Any, now: Any) -> None:
    """Gives an argument the content that a call has left in its copy."""
    if type(value) is not type(now):
        return
    if isinstance(value, list | bytearray):
        value[:] = now
    elif isinstance(value, deque):
        value.clear()
        value.extend(now)
    elif isinstance(value, dict | set):
        value.clear()
        value.update(now)


def standard_module(name: str) -> ModuleType | None:
    """A module of the standard library by its name; None for any other."""
    if name.partition(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def builtin_name(kind: type) -> str:
    """The first class in an exception's line of descent that every Python has: a name not of the program's choice."""
    names = (base.__name__ for base in kind.__mro__ if vars(builtins).get(base.__name__) is base)
    return str(next(names))


def read_exactly(descriptor: int, size: int) -> bytes:
    """Raises Gone where the stream ends before."""
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise Gone
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(descriptor: int, largest: int = LARGEST) -> Any:
    """The next message.

    Raises:
        Gone: there will be none. Broken: it is no message, or one of more than `largest` bytes.
    """
    size = int.from_bytes(read_exactly(descriptor, 4), "little")
    if size > largest:
        raise Broken(f"a message of {size} bytes")
    try:
        return json.loads(read_exactly(descriptor, size))
    except (ValueError, RecursionError) as error:
        raise Broken(str(error)) from None


def frame(message: Any) -> bytes:
    """A message as bytes, its length first."""
    text = json.dumps(message).encode()
    return len(text).to_bytes(4, "little") + text


def send(descriptor: int, framed: bytes) -> None:
    """Raises Gone if nobody reads."""
    rest = memoryview(framed)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BrokenPipeError:
        raise Gone from None


class Peer:
    """One end of the line. It asks the other, and meanwhile answers what the other asks.

    What can be asked for are the methods `on_*` of a subclass, with the message's further items as arguments.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.kept: list[Any] = []

    def ask(self, *message: Any) -> Any:
        """The content of the answer; raises, as an exception that every Python has, what the other side raised."""
        send(self.outgoing, frame(message))
        while True:
            match receive(self.incoming):
                case ["answer", content]:
                    return content
                case ["raised", str(name), list(said)]:
                    raise _exception(name, said)
                case [str(verb), *arguments] if hasattr(self, f"on_{verb}"):
                    send(self.outgoing, self.reply(verb, arguments))
                case _:
                    raise Broken("no message")

    def reply(self, verb: str, arguments: list[Any]) -> bytes:
        """The framed answer to a question."""
        try:
            answer = frame(["answer", getattr(self, f"on_{verb}")(*arguments)])
            return answer if len(answer) <= LARGEST else frame(["raised", "OverflowError", ["an answer too long"]])
        except (Gone, Broken):
            raise
        except BaseException as error:
            return frame(["raised", builtin_name(type(error)), _said(error)])

    def keep(self, value: Any) -> int:
        """A number for a value that stays here."""
        self.kept.append(value)
        return len(self.kept) - 1


def _exception(name: str, said: list[Any]) -> BaseException:
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise Broken("no exception")
    # it would end a loop of the check over its calls as if there were no more of them
    kind = RuntimeError if issubclass(kind, StopIteration | StopAsyncIteration) else kind
    error: BaseException = kind.__new__(kind)
    error.args = tuple(said)
    return error


def _said(error: BaseException) -> list[Any]:
    """The plain arguments of an exception."""
    parts = [one for one in error.args if type(one) in (str, float, bool) or (type(one) is int and abs(one) < SMALL)]
    return [one[:1000] if isinstance(one, str) else one for one in parts]
