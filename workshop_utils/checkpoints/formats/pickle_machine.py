"""A machine for pickles that cannot run anything: it has no import and calls only stand-ins.

A pickle is a program for a stack machine. This is the standard library's own in Python
(``pickle._Unpickler``, also the base of torch's ``weights_only``), with every opcode replaced that
resolves a name, calls, changes an object, hashes or takes memory by the file's word. What the C
machine does not bound is bounded here: numbers, keys whose hash takes for ever (a tuple of a tuple
of a tuple..., each twice in the next, takes 2^n steps inside C where no signal is heard), a memo
index of 2^32. A child process under limits around the C machine would be faster for one large
file, and cannot say what a file would have called.
"""

import contextlib
import gc
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from workshop_utils.core.terminal import plain

MAX_CALLS = 100
"""So many calls of one pickle are reported."""

MAX_ARGUMENTS = 64

MAX_NUMBER = 256
"""Bytes of an integer; a longer one takes time to hash and more to print."""

MAX_KEY_PARTS = 64
MAX_KEY_LENGTH = 64 * 1024
"""Of a text or bytes: each time one is looked up, an equal one is compared byte by byte."""

MAX_CHOSEN_KEYS = 4096
MAX_ATTRIBUTES = 4_000_000
MAX_SETS = 50_000
"""An empty set takes 216 bytes of memory and one in the file."""

_TEXT = {str}
_FUNCTION = type(lambda: None)
_FAULTS = (pickle.UnpicklingError, TypeError, ValueError)
#: What follows EMPTY_TUPLE and TUPLE3 in an index, 300,000 times each: NEWOBJ, MEMOIZE, EMPTY_DICT,
#: MEMOIZE, MARK before the state of a Record; MEMOIZE, TUPLE1, MEMOIZE, REDUCE, MEMOIZE of a
#: torch.Size.
_NEW_RECORD, _CALLED_WITH_IT = b"\x81\x94}\x94(", b"\x94\x85\x94R\x94"
_PUTS = rb"(?:\x94|q.|r.{4}|p\d+\n)*"
_TUPLED = re.compile(_PUTS + rb"[\x86t]" + _PUTS, re.DOTALL)
"""What stands between a text and a call of which it is the last argument."""
_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
# Larger ones can be chosen so that all have one hash, which makes each new key slower than the
# last.
_MAX_KEY = 2**61 - 2
# Numbers of parameters and layers; among so few numbers no long chain of one place in a dictionary
# can be chosen.
_SMALL_KEY = 2**20


class StandIn:
    """Base of everything that a file may fill: what it puts in is dropped unless a class keeps
    it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


class Record(StandIn):
    """Stand-in for a class whose pickled state is a mapping of attributes: the slots are kept,
    everything else is dropped.

    Equal only to itself, and so a key that needs no look at its fields.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"{type(self).__name__} has no mapping as its state")
        get = state.get
        for name in self.__slots__:
            setattr(self, name, get(name))
        # The memo keeps the mapping; of 100,000 chunks they are 50 MB.
        state.clear()

    def fill(self, names: list[str], values: list[Any]) -> None:
        """As :meth:`__setstate__`, without the mapping."""
        slots = self.__slots__
        for name, value in zip(names, values, strict=True):
            if name in slots:
                setattr(self, name, value)

    def get(self, name: str) -> Any:
        """The attribute ``name``, or None where the file did not set it."""
        return getattr(self, name, None)


class Inert(StandIn):
    """Stands for something of which only its ``text`` matters."""

    __slots__ = ("text",)
    is_class = False
    """Whether it stands for a class: what a file puts into that would change the class itself."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Foreign(Inert):
    """A name outside the list, or the result of calling it."""

    __slots__ = ()


class Enumeration(Inert):
    """Stand-in for an enumeration with the given names of ``members``; called with a value, as most
    pickles name one, it is inert."""

    __slots__ = ("members",)
    is_class = True

    def __init__(self, text: str, members: Iterable[str]) -> None:
        super().__init__(text)
        self.members = frozenset(members)

    def __call__(self, value: Any) -> Inert:
        if type(value) not in (int, str):
            return Inert(self.text)
        return Inert(f"{self.text}({value[:80] if type(value) is str else value})")


GETATTR = Foreign("builtins.getattr")
"""Allowed for one thing only: ``getattr(ENUMERATION, "MEMBER")`` with an :class:`Enumeration` that
has it, and the name written out there. So Python 3.11.0 to 3.11.4 pickles members
(``Enum.__reduce_ex__`` in ``enum.py``, 3.11.2); earlier and later ones call the class."""


class Harmful(pickle.UnpicklingError):
    """Raised by the stand-in of ``name``, which is harmless but with what it was called with here:
    ``arguments``, each as text."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        super().__init__(f"{name} is called with {'; '.join(arguments)}"[:300])
        self.name, self.arguments = name, arguments


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector would look at a million growing objects over and over, and find
    nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Machine(pickle._Unpickler):
    """Runs the pickle that begins at ``at`` in ``data``.

    ``allowed`` maps (module, name) to a plain value or to what to call in its place; for every
    other name there is a :class:`Foreign`, and the machine goes on. ``storage`` answers persistent
    ids. Afterwards ``seen`` has the calls of foreign names, in their order, and names that are
    looked up and not called; ``failure`` the first call of a stand-in that did not suit it.
    """

    encoding, errors, _buffers = "utf-8", "strict", None

    def __init__(
        self,
        data: bytes,
        allowed: Mapping[tuple[str, str], Any],
        storage: Callable[[Any], Any] | None = None,
        at: int = 0,
    ) -> None:
        self.data, self.allowed, self.storage, self.at = data, allowed, storage, at
        self.stack, self.metastack, self.memo = [], [], []
        self.append = self.stack.append
        self.sets = self.chosen_keys = self.attributes = self.members = 0
        self.text, self.literal = at, False
        self.harmless: set[str] = set()
        self.seen: dict[str, None] = {}
        self.failure: Exception | None = None

    def load(self) -> Any:
        """What the pickle describes. Raises ``pickle.UnpicklingError``, or ValueError, TypeError,
        IndexError... if it is broken."""
        try:
            with without_collector():
                return self._run()
        finally:
            if self.members:
                self.seen.pop(GETATTR.text, None)

    def _run(self) -> Any:
        # What an index is made of is written out, the commonest first: it is seven million opcodes
        # for 100,000 chunks.
        data, stack, marks, memo = self.data, self.stack, self.metastack, self.memo
        push, pop, remember = stack.append, stack.pop, memo.append
        uint16, int32, uint32 = (struct.Struct(form).unpack_from for form in ("<H", "<i", "<I"))
        at, harmless, known = self.at, self.harmless, []  # known: the lists of names of Records
        while True:
            op = data[at]
            at += 1
            if op < 0x80:
                if op == 0x6A:  # LONG_BINGET
                    push(memo[uint32(data, at)[0]])
                    at += 4
                    continue
                if op == 0x68:  # BINGET
                    push(memo[data[at]])
                    at += 1
                    continue
                if op == 0x4B:  # BININT1
                    push(data[at])
                    at += 1
                    continue
                if op == 0x4D:  # BININT2
                    push(uint16(data, at)[0])
                    at += 2
                    continue
                if op == 0x4E:  # NONE
                    push(None)
                    continue
                if op == 0x28:  # MARK
                    marks.append(len(stack))
                    continue
                if op == 0x29:  # EMPTY_TUPLE
                    if data[at : at + 5] == _NEW_RECORD:
                        what = stack[-1]
                        plain_class = type(what) is type and issubclass(what, Record)
                        stack[-1] = record = what() if plain_class else self._call(what, ())
                        push({})
                        memo += (record, stack[-1])
                        marks.append(len(stack))
                        at += 5
                        continue
                    push(())
                    continue
                if op == 0x75:  # SETITEMS
                    mark = marks.pop()
                    if mark > len(stack):
                        raise IndexError("a mark is missing")
                    items = stack[mark:]
                    del stack[mark:]
                    # Nearly always the state of a Record, which BUILD gives it at once and clears.
                    state = stack[-1]
                    if (
                        data[at] == 0x62
                        and type(state) is dict
                        and not state
                        and isinstance(stack[-2], Record)
                    ):
                        names = items[::2]
                        if (
                            len(known) < 9
                            and names not in known
                            and set(map(type, names)) == _TEXT
                            and sum(map(len, names)) < 256
                            and harmless.issuperset(names)
                        ):
                            known.append(names)
                        if names in known:
                            pop()
                            stack[-1].fill(names, items[1::2])
                            at += 1
                            continue
                    self._fill(items)
                    continue
                if op == 0x62:  # BUILD
                    state = pop()
                    self._build(stack[-1], state)
                    continue
                if op == 0x52:  # REDUCE
                    arguments = pop()
                    if stack[-1] is GETATTR:
                        near = at - self.text < 64
                        self.literal = bool(near and _TUPLED.fullmatch(data, self.text, at - 1))
                    stack[-1] = self._call(stack[-1], arguments)
                    if data[at] == 0x94:
                        remember(stack[-1])
                        at += 1
                    continue
                if op == 0x7D:  # EMPTY_DICT
                    push({})
                elif op == 0x4A:  # BININT
                    push(int32(data, at)[0])
                    at += 4
                elif op == 0x58:  # BINUNICODE
                    end = at + 4 + uint32(data, at)[0]
                    push(str(data[at + 4 : end], "utf-8"))
                    at = self.text = end
                elif op == 0x2E:  # STOP
                    self.at = at
                    return pop()
                else:
                    self.at = at
                    self._rare(op)
                    at = self.at
            elif 0x84 < op < 0x88:  # TUPLE1, TUPLE2, TUPLE3
                if op == 0x87:
                    third, second = pop(), pop()
                    values = (pop(), second, third)
                elif op == 0x86:
                    second = pop()
                    values = (pop(), second)
                else:
                    values = (pop(),)
                if data[at : at + 5] == _CALLED_WITH_IT and type(stack[-1]) is _FUNCTION:
                    arguments = (values,)
                    try:
                        result = stack[-1](values)
                    except _FAULTS:
                        result = self._call(stack[-1], arguments)
                    stack[-1] = result
                    memo += (values, arguments, result)
                    at += 5
                    continue
                push(values)
            elif op == 0x81:  # NEWOBJ
                arguments = pop()
                stack[-1] = self._call(stack[-1], arguments)
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = at + 1 + data[at]
                push(str(data[at + 1 : end], "utf-8"))
                at = self.text = end
            elif op == 0x8A:  # LONG1
                end = at + 1 + data[at]
                push(int.from_bytes(data[at + 1 : end], "little", signed=True))
                at = end
            elif op == 0x94:  # MEMOIZE
                remember(stack[-1])
            else:
                self.at = at
                self._rare(op)
                at = self.at
            # MEMOIZE follows all that an index makes. At the end of the data, where no pickle ends,
            # this is an IndexError.
            if data[at] == 0x94:
                remember(stack[-1])
                at += 1

    def _rare(self, op: int) -> None:
        run = self.dispatch.get(op)
        if run is None:
            raise pickle.UnpicklingError(f"it has the unknown opcode {op:#04x}")
        run(self)
        if op == 0x56:  # UNICODE
            self.text = self.at
        top = self.stack[-1] if self.stack else None
        if type(top) is int and top.bit_length() > 8 * MAX_NUMBER:
            raise pickle.UnpicklingError(f"it has a number of more than {MAX_NUMBER} bytes")

    # Names, calls, attributes.

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the name."""
        value = self.allowed.get((module, name))
        if value is None:
            value = Foreign(plain(f"{module}.{name}", 200))
        if isinstance(value, Foreign) and len(self.seen) < MAX_CALLS:
            self.seen.setdefault(value.text)
        return value

    def get_extension(self, code: int) -> None:
        """A name by a number, which means what the process registered that loads it."""
        self.append(self.find_class("copyreg", f"_extension_registry[{code}]"))

    def persistent_load(self, pid: Any) -> Any:
        """What ``storage`` answers."""
        return self.storage(pid) if self.storage else super().persistent_load(pid)

    def _call(self, what: Any, arguments: Any) -> Any:
        if type(what) is Foreign:
            if what is GETATTR and self.literal and _is_member(arguments):
                self.members, self.literal = self.members + 1, False
                return Inert(f"{arguments[0].text}.{arguments[1]}")
            self._note(what.text, arguments)
            return Foreign(f"{what.text}(...)"[:200])
        # Nothing that a file can make is callable but stand-ins, so that this is one of
        # ``allowed``.
        if type(arguments) is not tuple or not callable(what):
            raise pickle.UnpicklingError("it calls something that is no name")
        try:
            if len(arguments) > MAX_ARGUMENTS:
                raise ValueError(f"it calls something with {len(arguments):,} arguments")
            return what(*arguments)
        except Harmful as error:
            self._harm(error)
        except _FAULTS as error:
            # What comes after it would be called all the same.
            self.failure = self.failure or error
        return Inert("...")

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(self._call(klass, tuple(args)))

    def _new_with_keywords(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        if keywords and type(arguments) is tuple:
            arguments = (*arguments[:MAX_ARGUMENTS], keywords)
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _build(self, what: Any, state: Any) -> None:
        if (
            type(state) is dict
            and len(state) < 9
            and isinstance(what, Record)
            and self.harmless.issuperset(state)
        ):
            what.__setstate__(state)
        elif type(what) is Foreign:
            self._note(f"{what.text}.__setstate__", (state,))
        elif not isinstance(what, StandIn):
            raise pickle.UnpicklingError(f"it tries to change {type(what).__name__}")
        elif isinstance(what, Inert) and what.is_class:
            self._harm(Harmful(f"{what.text}.__setstate__", ["attributes of the class"]))
        elif name := self._taken_over(state):
            self._harm(Harmful(f"{type(what).__name__}.__setstate__", [name]))
        else:
            what.__setstate__(state)

    def _taken_over(self, state: Any) -> str | None:
        """The name in ``state`` that Python's machine would call, if there is one: it looks these
        up on the object itself. BytesIO and objects with slots have a tuple as their state."""
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict):
                self.attributes += len(part)
                if self.attributes > MAX_ATTRIBUTES:
                    raise pickle.UnpicklingError(f"it sets more than {MAX_ATTRIBUTES:,} attributes")
                if self.harmless.issuperset(part):
                    continue
                for name in part:
                    if type(name) is str and (
                        name[:2] == "__" or name in ("append", "extend", "add")
                    ):
                        return ascii(name)[:80]
                self.harmless.update(name for name in part if type(name) is str)
        return None

    def _harm(self, error: Harmful) -> None:
        for argument in error.arguments:
            self._note(error.name, (Inert(argument),))

    def _note(self, what: str, arguments: Any) -> None:
        """Put down the call of ``what`` in place of its bare name."""
        if len(self.seen) < MAX_CALLS:
            self.seen.pop(what, None)
            inside = ", ".join(map(_text, arguments[:4])) if type(arguments) is tuple else "..."
            self.seen[f"{what}({inside})"] = None

    # Containers.

    def pop_mark(self) -> list[Any]:
        """What stands after the last mark, taken from the stack."""
        mark = self.metastack.pop()
        if mark > len(self.stack):
            raise IndexError("a mark is missing")
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _pop(self) -> None:
        if self.metastack and self.metastack[-1] == len(self.stack):
            self.metastack.pop()
        else:
            self.stack.pop()

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise pickle.UnpicklingError("it has a key without a value")
        if isinstance(target, dict):
            for i in range(0, len(items), 2):
                key = items[i]
                if type(key) is not str or len(key) > MAX_KEY_LENGTH:
                    self._check_key(key)
                target[key] = items[i + 1]
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"it puts items into {type(target).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            for item in items:
                self._check_key(item)
                target.add(item)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"it puts items into {type(target).__name__}")

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _set(self, items: list[Any], kind: type = set) -> None:
        self.sets += 1
        if self.sets > MAX_SETS:
            raise pickle.UnpicklingError(f"it has more than {MAX_SETS:,} sets")
        for item in items:
            self._check_key(item)
        self.append(kind(items))

    def _check_key(self, key: Any) -> None:
        """Refuse what may not be hashed, or not in constant time."""
        for part in key[:MAX_KEY_PARTS] if type(key) is tuple else (key,):
            if type(part) in (str, bytes) and len(part) > MAX_KEY_LENGTH:
                raise pickle.UnpicklingError(f"it has a key of {len(part):,} characters")
        if type(key) is int:
            if abs(key) > _MAX_KEY:
                raise pickle.UnpicklingError("it has a large number as a key")
            chosen = abs(key) > _SMALL_KEY
        elif chosen := type(key) is tuple:
            if len(key) > MAX_KEY_PARTS or not all(type(part) in _SCALARS for part in key):
                raise pickle.UnpicklingError("it has a nested or long tuple as a key")
        elif not isinstance(key, StandIn) and type(key) not in _SCALARS:
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key")
        # The file can choose their places in a dictionary, which makes each new one slower than
        # the last.
        self.chosen_keys += chosen
        if self.chosen_keys > MAX_CHOSEN_KEYS:
            raise pickle.UnpicklingError("it has too many tuples or large numbers as keys")

    # Bytes and places in the memo.

    def read(self, n: int) -> bytes:
        """The next ``n`` bytes. Raises EOFError where there are fewer."""
        end = self.at + n
        if end > len(self.data):
            raise EOFError("it is cut off")
        self.at, start = end, self.at
        return self.data[start:end]

    def readline(self) -> bytes:
        """The next line. Raises ValueError where there is none."""
        end = self.data.index(b"\n", self.at) + 1
        self.at, start = end, self.at
        return self.data[start:end]

    def _number(self, width: int) -> int:
        return int.from_bytes(self.read(width), "little")

    def _put(self, place: int) -> None:
        if place == len(self.memo):
            self.memo.append(self.stack[-1])
        elif 0 <= place < len(self.memo):
            self.memo[place] = self.stack[-1]
        else:
            # Every pickler counts up, and Python's machine would make room for all the places
            # between.
            raise pickle.UnpicklingError(
                f"it remembers something as number {place:,} after {len(self.memo):,}"
            )

    def _get(self, place: int) -> None:
        if place < 0:
            raise IndexError("nothing has a negative number")
        self.append(self.memo[place])

    def _text_line(self) -> None:
        # Half of a surrogate pair cannot be printed later; nor can it be encoded.
        self.append(self.readline()[:-1].decode("raw-unicode-escape").encode().decode())

    dispatch = pickle._Unpickler.dispatch | {
        ord("("): lambda m: m.metastack.append(len(m.stack)),
        ord("0"): _pop,
        ord("a"): lambda m: m._extend([m.stack.pop()]),
        ord("e"): lambda m: m._extend(m.pop_mark()),
        0x90: lambda m: m._extend(m.pop_mark()),
        ord("s"): lambda m: m._fill([m.stack.pop(-2), m.stack.pop()]),
        ord("d"): _dict,
        0x8F: lambda m: m._set([]),
        0x91: lambda m: m._set(m.pop_mark(), frozenset),
        0x92: _new_with_keywords,
        ord("g"): lambda m: m._get(int(m.readline())),
        ord("p"): lambda m: m._put(int(m.readline())),
        ord("q"): lambda m: m._put(m._number(1)),
        ord("r"): lambda m: m._put(m._number(4)),
        ord("V"): _text_line,
        0x8D: lambda m: m.append(m.read(m._number(8)).decode()),
        0x96: lambda m: m.append(m.read(m._number(8))),
        0x95: lambda m: m.read(8),
    }


def _is_member(arguments: Any) -> bool:
    if type(arguments) is not tuple or len(arguments) != 2:
        return False
    kind, name = arguments
    return isinstance(kind, Enumeration) and type(name) is str and name in kind.members


def _text(value: Any, depth: int = 0) -> str:
    """An argument of a call, shortened."""
    if isinstance(value, Inert):
        return value.text[:80]
    if isinstance(value, str | bytes):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    if isinstance(value, int | float | None):
        return str(value)
    if isinstance(value, tuple | list) and depth < 3:
        inside = ", ".join(_text(item, depth + 1) for item in value[:4])
        return f"[{inside}{', ...' if len(value) > 4 else ''}]"
    return "{...}" if isinstance(value, dict) else "..."
