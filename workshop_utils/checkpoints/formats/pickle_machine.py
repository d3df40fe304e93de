"""A machine for pickles that cannot run anything: it has no import and calls only what it is given.

A pickle is a program for a stack machine. Python's own machine resolves any name and calls it; this
one asks ``find`` for each name, and what it gets are stand-ins. It also bounds what the C machine
does not: numbers, keys whose hash takes for ever (a tuple of a tuple of a tuple..., each twice in
the next, takes 2^n steps inside C where no signal is heard), a memo index of 2^32.

Source of the opcodes: ``pickletools.py`` (Python 3.11), protocols 0 to 5 without out-of-band
buffers.
"""

import codecs
import contextlib
import gc
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

MAX_NUMBER = 256
"""Bytes of an integer; a longer one takes time to hash and more to print."""

MAX_KEY_PARTS = 64
MAX_CHOSEN_KEYS = 4096
MAX_ATTRIBUTES = 4_000_000
MAX_SETS = 50_000
"""An empty set takes 216 bytes of memory and one in the file."""

_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
# Larger ones can be chosen so that all have one hash, which makes each new key slower than the
# last.
_MAX_KEY = 2**61 - 2
# Numbers of parameters and layers; among so few numbers no long chain of one place in a dictionary
# can be chosen.
_SMALL_KEY = 2**20


class Sealed(type):
    """Metaclass of the stand-ins: they cannot be changed."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"tries to change {cls.__name__}.{name}")


class Record(metaclass=Sealed):
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

    def fill(self, items: list[Any]) -> None:
        """Set the state from its keys and values by turns, as :meth:`__setstate__` does. Raises
        :class:`Harmful` as BUILD does."""
        names = self.__slots__
        values = iter(items)
        for name in values:
            value = next(values, None)
            if name in names:
                setattr(self, name, value)
            elif type(name) is not str or _takes_over(name):
                raise Harmful(f"{type(self).__name__}.__setstate__", [ascii(name)[:80]])

    def get(self, name: str) -> Any:
        """The attribute ``name``, or None where the file did not set it."""
        return getattr(self, name, None)


class Inert:
    """Stands for something of which only its ``text`` matters; what a file puts into it is
    dropped."""

    __slots__ = ("text",)
    is_class = False
    """Whether it stands for a class: what a file puts into that would change the class itself."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


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
        return Inert(
            f"{self.text}({value[:80] if type(value) is str else value!r})"
            if type(value) in (int, str)
            else self.text
        )


GETATTR = Foreign("builtins.getattr")
"""Allowed for one thing only: ``getattr(ENUMERATION, "MEMBER")`` with the name in the pickle at
that place and an :class:`Enumeration` that has it. So Python 3.11.0 to 3.11.4 pickles members
(``Enum.__reduce_ex__`` in ``enum.py``, 3.11.2); earlier and later ones call the class."""


class Harmful(pickle.UnpicklingError):
    """Raised by the stand-in of ``name``, which is harmless but with what it was called with here:
    ``arguments``, each as text."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        super().__init__(f"{name} is called with {'; '.join(arguments)}"[:300])
        self.name, self.arguments = name, arguments


def _takes_over(name: str) -> bool:
    """Whether Python's machine would call the attribute ``name`` of an object in the file: it looks
    these up on the object itself."""
    return name[:2] == "__" or name in ("append", "extend", "add")


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


class Machine:
    """Runs the pickle ``data``.

    ``find(module, name)`` answers names with a plain value or with something to call, ``storage``
    answers persistent ids, and ``called(what, arguments)`` hears of each call of a
    :class:`Foreign`, which ``find`` may answer, too.
    """

    def __init__(
        self,
        data: bytes,
        find: Callable[[str, str], Any],
        storage: Callable[[Any], Any] | None = None,
        called: Callable[[str, Any], None] | None = None,
    ) -> None:
        self.data, self.find, self.storage, self.called = data, find, storage, called
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.at = 0
        self.sets = self.chosen_keys = self.attributes = self.members = 0
        self.pair: tuple | None = None
        self.failure: Exception | None = None

    def run(self) -> Any:
        """What the pickle describes. Raises ``pickle.UnpicklingError``, or ValueError, TypeError,
        IndexError... if it is broken."""
        with without_collector():
            return self._run()

    def _run(self) -> Any:
        # The common opcodes, in the order of their number in an index: a chain of if's is the
        # fastest that Python has for this.
        # Three runs of opcodes that make up most of an index (an object without arguments, its
        # state, a torch.Size) are one step.
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        int16, int32, uint32 = (
            struct.Struct("<H").unpack_from,
            struct.Struct("<i").unpack_from,
            struct.Struct("<I").unpack_from,
        )
        remember, push, pop, rare, follows, strict = (
            memo.append,
            stack.append,
            stack.pop,
            _RARE,
            data.startswith,
            self.called is None,
        )
        at = 0
        # The text on top of the stack, while it has been read just now and not taken from the memo.
        literal = None
        while True:
            op = data[at]
            if op == 0x6A:  # LONG_BINGET
                push(memo[uint32(data, at + 1)[0]])
                literal = None
                at += 5
            elif op == 0x68:  # BINGET
                push(memo[data[at + 1]])
                literal = None
                at += 2
            elif op == 0x4B:  # BININT1
                push(data[at + 1])
                at += 2
            elif op == 0x4D:  # BININT2
                push(int16(data, at + 1)[0])
                at += 3
            elif op == 0x29:  # EMPTY_TUPLE
                if follows(b"\x81\x94}\x94(", at + 1) and type(stack[-1]) is Sealed:
                    made = stack[-1] = stack[-1]()
                    state = {}
                    remember(made)
                    remember(state)
                    push(state)
                    marks.append(len(stack))
                    at += 6
                else:
                    push(())
                    at += 1
            elif op == 0x75:  # SETITEMS
                mark = marks.pop()
                if mark > len(stack):
                    raise IndexError("a mark is missing")
                items = stack[mark:]
                del stack[mark:]
                state = stack[-1]
                at += 1
                if (
                    follows(b"b", at)
                    and len(stack) > 1
                    and isinstance(stack[-2], Record)
                    and type(state) is dict
                    and not state
                    and len(items) % 2 == 0
                ):
                    pop()
                    try:
                        stack[-1].fill(items)
                    except Harmful as error:
                        self._harm(error)
                    at += 1
                else:
                    self._set(state, items)
            elif op == 0x87 or op == 0x86 or op == 0x85:  # TUPLE3, TUPLE2, TUPLE1
                if op == 0x87:
                    third, second = pop(), pop()
                    made = (pop(), second, third)
                elif op == 0x86:
                    second = pop()
                    made = (pop(), second)
                    if second is literal:
                        self.pair = made
                else:
                    made = (pop(),)
                if (
                    strict
                    and follows(b"\x94\x85\x94R\x94", at + 1)
                    and type(stack[-1]) is FunctionType
                ):
                    arguments = (made,)
                    result = stack[-1] = stack[-1](made)
                    remember(made)
                    remember(arguments)
                    remember(result)
                    at += 6
                else:
                    push(made)
                    at += 1
            elif op == 0x94:  # MEMOIZE
                remember(stack[-1])
                at += 1
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = at + 2 + data[at + 1]
                made = literal = str(data[at + 2 : end], "utf-8")
                push(made)
                # Also the end of the data: they cannot end with a string.
                if data[end] == 0x94:
                    remember(made)
                    end += 1
                at = end
            elif op == 0x4A:  # BININT
                push(int32(data, at + 1)[0])
                at += 5
            elif op == 0x8A:  # LONG1
                end = at + 2 + data[at + 1]
                push(int.from_bytes(data[at + 2 : end], "little", signed=True))
                at = end
            elif op == 0x4E:  # NONE
                push(None)
                at += 1
            elif op == 0x28:  # MARK
                marks.append(len(stack))
                at += 1
            elif op == 0x7D:  # EMPTY_DICT
                push({})
                at += 1
            elif op == 0x81 or op == 0x52:  # NEWOBJ, REDUCE
                arguments = pop()
                stack[-1] = self._call(stack[-1], arguments)
                at += 1
            elif op == 0x62:  # BUILD
                state = pop()
                self._build(stack[-1], state)
                at += 1
            elif op == 0x2E:  # STOP
                self.at = at + 1
                return pop()
            else:
                run = rare.get(op)
                if run is None:
                    raise pickle.UnpicklingError(f"it has the unknown opcode {op:#04x}")
                self.at = at + 1
                run(self)
                at = self.at
                if op in _TEXTS:
                    literal = stack[-1]
                elif op not in _PUTS:
                    literal = None

    # What is called, built and filled.

    def _call(self, what: Any, arguments: Any, keywords: Any = None) -> Any:
        """Call a stand-in; of everything else only the name is passed on."""
        if isinstance(what, Foreign):
            if what is GETATTR and self._names_a_member(arguments):
                self.members += 1
                return Inert(f"{arguments[0].text}.{arguments[1]}")
            if self.called is None:
                raise pickle.UnpicklingError("it calls something that is no name")
            self.called(what.text, arguments)
            return Foreign(f"{what.text}(...)"[:200])
        # Nothing that a file can make is callable but stand-ins, so that this is one of those that
        # ``find`` gave.
        if type(arguments) is not tuple or keywords or not callable(what):
            raise pickle.UnpicklingError("it calls something that is no name")
        if self.called is None:
            return what(*arguments)
        try:
            return what(*arguments)
        except Harmful as error:
            self._harm(error)
            return Inert("...")
        except (pickle.UnpicklingError, TypeError, ValueError) as error:
            # What comes after it would be called all the same.
            self.failure = self.failure or error
            return Inert("...")

    def _names_a_member(self, arguments: Any) -> bool:
        return (
            arguments is self.pair
            and isinstance(arguments[0], Enumeration)
            and arguments[1] in arguments[0].members
        )

    def _build(self, what: Any, state: Any) -> None:
        if isinstance(what, Foreign) and self.called is not None:
            self.called(f"{what.text}.__setstate__", (state,))
        elif isinstance(what, Inert) and what.is_class:
            self._harm(Harmful(f"{what.text}.__setstate__", ["attributes of the class"]))
        elif not hasattr(type(what), "__setstate__"):
            raise pickle.UnpicklingError(f"it tries to change {type(what).__name__}")
        elif name := self._taken_over(state):
            self._harm(Harmful(f"{type(what).__name__}.__setstate__", [name]))
        else:
            what.__setstate__(state)

    def _harm(self, error: Harmful) -> None:
        """Put down what would be called, or stop."""
        if self.called is None:
            raise error
        for argument in error.arguments:
            self.called(error.name, (Inert(argument),))

    def _taken_over(self, state: Any) -> str | None:
        """The name in ``state`` that Python's machine would call, if there is one; BytesIO and
        objects with slots have a tuple as it."""
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict):
                self.attributes += len(part)
                if self.attributes > MAX_ATTRIBUTES:
                    raise pickle.UnpicklingError(f"it sets more than {MAX_ATTRIBUTES:,} attributes")
                for name in part:
                    if type(name) is str and _takes_over(name):
                        return ascii(name)[:80]
        return None

    def _set(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise pickle.UnpicklingError("it has a key without a value")
        if not isinstance(target, dict):
            if isinstance(target, Inert):
                return
            raise pickle.UnpicklingError(f"it puts items into {type(target).__name__}")
        for i in range(0, len(items), 2):
            key = items[i]
            if type(key) is not str:
                self._check_key(key)
            target[key] = items[i + 1]

    def _check_key(self, key: Any) -> None:
        """Refuse what may not be hashed, or not in constant time."""
        if type(key) is int:
            if abs(key) > _MAX_KEY:
                raise pickle.UnpicklingError("it has a large number as a key")
            if abs(key) > _SMALL_KEY:
                self._count_key()
        elif type(key) is tuple:
            self._count_key()
            if len(key) > MAX_KEY_PARTS or not all(type(part) in _SCALARS for part in key):
                raise pickle.UnpicklingError("it has a nested or long tuple as a key")
        elif type(key) not in _SCALARS and not isinstance(key, Record | Inert):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key")

    def _count_key(self) -> None:
        """Count one whose place in a dictionary the file can choose, which makes each new one
        slower than the last."""
        self.chosen_keys += 1
        if self.chosen_keys > MAX_CHOSEN_KEYS:
            raise pickle.UnpicklingError("it has too many tuples or large numbers as keys")

    def _after_mark(self) -> list[Any]:
        """Take what stands after the last mark from the stack."""
        mark = self.marks.pop()
        if mark > len(self.stack):
            raise IndexError("a mark is missing")
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    # Arguments of opcodes.

    def _bytes(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise EOFError("it is cut off")
        found = self.data[self.at : end]
        self.at = end
        return found

    def _counted(self, width: int) -> bytes:
        return self._bytes(int.from_bytes(self._bytes(width), "little"))

    def _raw_line(self) -> bytes:
        end = self.data.index(b"\n", self.at)
        found = self.data[self.at : end]
        self.at = end + 1
        return found

    def _line(self) -> str:
        return self._raw_line().decode()

    def _number(self) -> int:
        content = self._counted(4)
        if len(content) > MAX_NUMBER:
            raise pickle.UnpicklingError(f"it has a number of {len(content):,} bytes")
        return int.from_bytes(content, "little", signed=True)

    def _written_number(self, bools: bool) -> int | bool:
        line = self._line()
        if len(line) > 2 * MAX_NUMBER:
            raise pickle.UnpicklingError(f"it has a number of {len(line):,} digits")
        if bools and line in ("00", "01"):
            return line == "01"
        return int(line.removesuffix("L"))

    def _string(self) -> str:
        line = self._line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
            raise pickle.UnpicklingError("it has a string without quotes")
        return codecs.escape_decode(line[1:-1].encode())[0].decode()

    def _escaped(self) -> str:
        text = self._raw_line().decode("raw-unicode-escape")
        # Half of a surrogate pair cannot be printed later.
        return text.encode().decode()

    def _name(self) -> Any:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("it has a name that is no text")
        return self.find(module, name)

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

    def _get(self, place: int) -> Any:
        if place < 0:
            raise IndexError("nothing has a negative number")
        return self.memo[place]

    def _pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _extend(self, items: list[Any], target: Any) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            for item in items:
                self._check_key(item)
                target.add(item)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"it puts items into {type(target).__name__}")

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend([item], self.stack[-1])

    def _append_all(self) -> None:
        items = self._after_mark()
        self._extend(items, self.stack[-1])

    def _new_set(self) -> set:
        self.sets += 1
        if self.sets > MAX_SETS:
            raise pickle.UnpicklingError(f"it has more than {MAX_SETS:,} sets")
        return set()

    def _frozen_set(self) -> frozenset:
        items, made = self._after_mark(), self._new_set()
        self._extend(items, made)
        return frozenset(made)

    def _new_dict(self) -> dict:
        items, made = self._after_mark(), {}
        self._set(made, items)
        return made

    def _inst(self) -> Any:
        module, name = self._line(), self._line()
        return self._call(self.find(module, name), tuple(self._after_mark()))

    def _obj(self) -> Any:
        what, *arguments = self._after_mark()
        return self._call(what, tuple(arguments))

    def _new_with_keywords(self) -> Any:
        keywords, arguments, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if isinstance(what, Foreign) and type(arguments) is tuple and keywords:
            arguments = (*arguments, keywords)
        return self._call(what, arguments, keywords)

    def _persistent(self, key: Any) -> Any:
        if self.storage is None:
            raise pickle.UnpicklingError("it refers to things outside the pickle")
        return self.storage(key)

    def _extension(self, width: int) -> Any:
        return self.find(
            "copyreg", f"_extension_registry[{int.from_bytes(self._bytes(width), 'little')}]"
        )


def _pushing(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def run(machine: Machine) -> None:
        """Push what ``make`` returns."""
        machine.stack.append(make(machine))

    return run


_RARE: dict[int, Callable[[Machine], None]] = {
    **{
        ord(op) if isinstance(op, str) else op: _pushing(make)
        for op, make in {
            "]": lambda m: [],
            "l": Machine._after_mark,
            "t": lambda m: tuple(m._after_mark()),
            "d": Machine._new_dict,
            0x8F: Machine._new_set,
            0x91: Machine._frozen_set,
            0x88: lambda m: True,
            0x89: lambda m: False,
            "I": lambda m: m._written_number(True),
            "L": lambda m: m._written_number(False),
            "F": lambda m: float(m._line()),
            0x8B: Machine._number,
            "G": lambda m: struct.unpack(">d", m._bytes(8))[0],
            "S": Machine._string,
            "T": lambda m: m._counted(4).decode(),
            "U": lambda m: m._counted(1).decode(),
            "V": Machine._escaped,
            "X": lambda m: m._counted(4).decode(),
            0x8D: lambda m: m._counted(8).decode(),
            "B": lambda m: m._counted(4),
            "C": lambda m: m._counted(1),
            0x8E: lambda m: m._counted(8),
            0x96: lambda m: m._counted(8),
            "2": lambda m: m.stack[-1],
            "g": lambda m: m._get(int(m._line())),
            "c": lambda m: m.find(m._line(), m._line()),
            0x93: Machine._name,
            "i": Machine._inst,
            "o": Machine._obj,
            0x92: Machine._new_with_keywords,
            "P": lambda m: m._persistent(m._line()),
            "Q": lambda m: m._persistent(m.stack.pop()),
            0x82: lambda m: m._extension(1),
            0x83: lambda m: m._extension(2),
            0x84: lambda m: m._extension(4),
        }.items()
    },
    0x80: lambda m: m._bytes(1),
    0x95: lambda m: m._bytes(8),
    ord("0"): Machine._pop,
    ord("1"): Machine._after_mark,
    ord("a"): Machine._append,
    ord("e"): Machine._append_all,
    0x90: Machine._append_all,
    ord("s"): Machine._set_one,
    ord("q"): lambda m: m._put(m._bytes(1)[0]),
    ord("r"): lambda m: m._put(int.from_bytes(m._bytes(4), "little")),
    ord("p"): lambda m: m._put(int(m._line())),
}

_TEXTS = frozenset([*b"STUVX", 0x8D])
_PUTS = frozenset(b"qrp")
