"""The process of a program that a model wrote: runs it and answers what its check asks, of which it knows no more."""

from __future__ import annotations

import builtins
import operator
import os

from .wire import CHANGEABLE, Gone, Peer, decode, encode, receive, send, standard_module

TYPE_CHECKING = False  # typing is not worth its import, once a program
if TYPE_CHECKING:
    from typing import Any


class Program(Peer):
    """Namespaces in which the program's text was run, and the values that its check knows by number."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing)
        self.spaces: dict[int, dict[str, Any]] = {}

    def serve(self) -> None:
        """Answers until nobody asks any more. A copy of this process that the program made does not answer."""
        own = os.getpid()
        while True:
            verb, *arguments = receive(self.incoming)
            answer = self.reply(verb, arguments)
            if os.getpid() != own:
                raise Gone
            send(self.outgoing, answer)

    def on_exec(self, space: int, text: str) -> list[Any]:
        """Names and values at the top level of the text."""
        names = self._space(space)
        exec(compile(text, "<program>", "exec"), names)
        return [[name, self.encoded(value)] for name, value in list(names.items()) if not name.startswith("__")]

    def on_eval(self, space: int, text: str) -> Any:
        return self.encoded(eval(compile(text, "<program>", "eval"), self._space(space)))

    def on_call(self, target: int, given: list[Any], named: dict[str, Any]) -> list[Any]:
        """What a call gives, and what it left of the arguments that it may have changed: [position or name, value]."""
        places: dict[int | str, Any] = {place: self.decoded(one) for place, one in enumerate(given)}
        places |= {name: self.decoded(one) for name, one in named.items()}
        before = [*given, *named.values()]
        values = list(places.values())
        found = self.kept[target](*values[: len(given)], **dict(zip(named, values[len(given) :], strict=True)))
        left = [
            [place, now]
            for (place, value), former in zip(places.items(), before, strict=True)
            if isinstance(value, CHANGEABLE) and (now := self.encoded(value)) != former
        ]
        return [self.encoded(found), left]

    def on_apply(self, function: str, given: list[Any]) -> Any:
        """What a builtin function or an operator gives of values."""
        home = builtins if hasattr(builtins, function) else operator
        return self.encoded(getattr(home, function)(*map(self.decoded, given)))

    def on_step(self, iterator: int) -> list[Any]:
        """The next value of an iterator, in a list, or an empty list at its end."""
        for value in self.kept[iterator]:
            return [self.encoded(value)]
        return []

    def encoded(self, value: Any) -> Any:
        return encode(value, lambda other: ["theirs", self.keep(other)])

    def decoded(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "module":
            return standard_module(content)
        return self._function(content) if tag == "function" else self.kept[content]

    def _function(self, number: int) -> Any:
        """A function of the check's that was given as an argument."""
        return lambda *given: self.decoded(self.ask("function", number, [self.encoded(one) for one in given]))

    def _space(self, number: int) -> dict[str, Any]:
        return self.spaces.setdefault(number, {"__name__": "__main__"})
