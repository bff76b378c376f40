"""A policy as a table in memory that processes share: written once, and read where it is asked instead of loaded.

A reload costs a process that serves one mapping, whatever the number of rules: a rule is made from its row when a
verdict needs it. As objects 100,000 rules would be seconds of work and 200 MB in every process, and a pause for each
collection over them. The memory is sealed: what was compiled is what judges, and nobody shrinks it under a reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast, overload
from zlib import crc32

from policies.addresses import PrefixMap, PrefixTables
from policies.hostnames import Hostname
from policies.index import HostGroup, HostTable, Policy, TransportTable, WorkloadIndex, group_of
from policies.model import AnyRule, Test, TransportRule, Workload
from proxy.wire.rows import SHAPE, Later, read_row, write_row

KNOWN = 4096  # answers kept ready, absent keys among them: names that nobody asks for again must not grow our memory
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_MAGIC = b"outgate policy 2" + SHAPE
# where the head's row is, the rows' offsets, the tables, the slots; their count
_HEAD = struct.Struct(f"={len(_MAGIC)}s5Q")
_OFFSET = struct.Struct("=Q")  # of a row
_SIZE = struct.Struct("=I")  # of a row, which follows
_TABLE = struct.Struct("=QQ")  # offset of the first entry, how many there are
_ENTRY = struct.Struct("=III")  # table, bytes of the key, bytes of the value; both follow
_SLOT = struct.Struct("=IQ")  # hash of table and key, offset of the entry; 0: free
_ROWS = -1  # no table's number
_ABSENT = object()


class NotCompiled(ValueError):
    """A file that holds no policy which this version could judge by."""


def write_policy(policy: Policy) -> BinaryIO:
    """`policy` in sealed memory. 100,000 rules take seconds: nothing to do on a loop that serves."""
    file = open(os.memfd_create("policy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")  # noqa: SIM115 - given away
    try:
        _Writer(file).write(policy)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        file.close()
        raise
    return file


def read_policy(file: BinaryIO) -> Policy:
    """The policy in `file`, which may be closed afterwards. Takes less than a millisecond. Raises NotCompiled."""
    try:
        return _Reader(file).policy()
    except (OSError, ValueError, struct.error) as error:
        raise NotCompiled(f"this is no compiled policy of this version: {error}") from error


def duplicate(file: BinaryIO) -> BinaryIO:
    """One more descriptor of the same memory, to give away."""
    return open(os.dup(file.fileno()), "rb")


# --- what keys and values look like --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Keys[K]:
    spell: Callable[[K], bytes]
    read: Callable[[bytes], K]


def _spell_pattern(key: tuple[Hostname, bool]) -> bytes:
    return f"*.{key[0]}".encode() if key[1] else key[0].encode()


def _read_pattern(key: bytes) -> tuple[Hostname, bool]:
    text = key.decode()
    return Hostname(text.removeprefix("*.")), text.startswith("*.")


_TEXTS: _Keys[str] = _Keys(
    lambda key: key.encode("utf-8", "surrogatepass"), lambda key: key.decode("utf-8", "surrogatepass")
)
_HOSTNAMES: _Keys[Hostname] = _Keys(str.encode, lambda key: Hostname(key.decode()))
_PATTERNS = _Keys(_spell_pattern, _read_pattern)
_PREFIXES: _Keys[int] = _Keys(lambda number: b"%x" % number, lambda key: int(key, 16))


# --- writing -------------------------------------------------------------------------------------------------------


class _Writer:
    """Rows and tables as they come, the entries of a table in one piece; at the end, what finds them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = _HEAD.size
        self._rows = array("Q")
        self._numbers: dict[int, int] = {}  # of rows, by the id of their value
        self._kept: list[object] = []  # no id may come back meanwhile
        self._tables: list[tuple[int, int]] = []
        self._hashes = array("I")
        self._entries = array("Q")

    def write(self, policy: Policy) -> None:
        self._file.seek(self._at)
        head = self._put_row(
            {
                "generation": policy.generation,
                "guard": self._add(policy.guard),
                "guard_table": self._host_table(policy.guard_table),
                "tests": self._add(policy.tests),
                "index": self._table(_TEXTS, policy.index, lambda one: write_row(self._workload(one))),
                "sources": self._prefix_map(policy.sources, lambda names: write_row(tuple(names))),
                "users": self._table(_TEXTS, policy.users, _TEXTS.spell),
                "pods": self._table(_TEXTS, policy.pods, write_row),
            }
        )
        rows = self._put(self._rows.tobytes())
        tables = self._put(b"".join(_TABLE.pack(*one) for one in self._tables))
        slots = self._slots()
        found = head, rows, tables, self._put(slots), len(slots) // _SLOT.size
        self._file.seek(0)
        self._file.write(_HEAD.pack(_MAGIC, *found))
        self._file.flush()

    def _workload(self, index: WorkloadIndex) -> dict[str, object]:
        return {
            "workload": replace(index.workload, rules=()),
            "rules": self._add(index.workload.rules),  # before the tables, which refer to them
            "hosts": self._host_table(index.hosts),
            "tcp": self._transport_table(index.tcp),
            "udp": self._transport_table(index.udp),
            "ntp": self._table(_HOSTNAMES, index.ntp, self._refer),
            "dns": self._table(_PATTERNS, index.dns, self._refer),
            "host_ports": index.host_ports,
            "plain_ports": index.plain_ports,
            "ancestors": self._table(_HOSTNAMES, dict.fromkeys(index.ancestors), lambda _: b""),
        }

    def _host_table(self, table: HostTable) -> dict[str, object]:
        def refer(group: HostGroup) -> bytes:
            return self._refer(group.rules)

        return {
            "exact": self._table(_HOSTNAMES, table.exact, refer),
            "wildcards": self._table(_HOSTNAMES, table.wildcards, refer),
            "closes": table.closes,
        }

    def _transport_table(self, table: TransportTable) -> dict[str, object]:
        def refer(found: Iterable[tuple[TransportRule, bool]]) -> bytes:
            return array("I", [self._number(rule) << 1 | inside_private for rule, inside_private in found]).tobytes()

        return {
            "names": self._table(_HOSTNAMES, table.names, self._refer),
            "prefixes": self._prefix_map(table.prefixes, refer),
            "ports": table.ports,
            "prefix_ports": table.prefix_ports,
            "quic_ports": table.quic_ports,
        }

    def _prefix_map[V](self, prefixes: PrefixMap[V], spell: Callable[[list[V]], bytes]) -> dict[str, object]:
        return {
            name: tuple((shift, self._table(_PREFIXES, table, spell)) for shift, table in tables)
            for name, tables in (("v4", prefixes.v4), ("v6", prefixes.v6))
        }

    def _table[K, V](self, keys: _Keys[K], content: Mapping[K, V], spell: Callable[[V], bytes]) -> int:
        """The number of a new table."""
        spelled = [(keys.spell(key), spell(value)) for key, value in content.items()]  # may write tables of its own
        number = len(self._tables)
        self._tables.append((self._at, len(spelled)))
        for key, value in spelled:
            self._hashes.append(crc32(key, number))
            self._entries.append(self._put(_ENTRY.pack(number, len(key), len(value)) + key + value))
        return number

    def _slots(self) -> bytes:
        """A hash table with linear probing, half empty at least: an absent name costs two looks or three."""
        count = 1 << len(self._entries).bit_length() + 1
        slots = bytearray(count * _SLOT.size)
        taken = bytearray(count)
        for hash, offset in zip(self._hashes, self._entries, strict=True):
            slot = hash % count
            while taken[slot]:
                slot = (slot + 1) % count
            taken[slot] = 1
            _SLOT.pack_into(slots, slot * _SLOT.size, hash, offset)
        return bytes(slots)

    def _refer(self, rules: Iterable[AnyRule]) -> bytes:
        return array("I", map(self._number, rules)).tobytes()

    def _number(self, rule: AnyRule) -> int:
        number = self._numbers.get(id(rule))
        return self._add([rule])[0] if number is None else number

    def _add(self, values: Iterable[AnyRule | Test]) -> tuple[int, int]:
        """A row for each: the number of the first, and how many."""
        first = len(self._rows)
        for value in values:
            self._kept.append(value)
            self._numbers[id(value)] = len(self._rows)
            self._rows.append(self._put_row(value))
        return first, len(self._rows) - first

    def _put_row(self, value: object) -> int:
        row = write_row(value)
        return self._put(_SIZE.pack(len(row)) + row)

    def _put(self, content: bytes) -> int:
        """Where it was written."""
        at = self._at
        self._file.write(content)
        self._at += len(content)
        return at


# --- reading -------------------------------------------------------------------------------------------------------


class _Reader:
    """The memory, mapped; it stays as long as somebody holds one of its tables."""

    def __init__(self, file: BinaryIO) -> None:
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise NotCompiled("it is not sealed")  # shrunk under us it would end this process (SIGBUS)
        self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        magic, *found = _HEAD.unpack_from(self._map)
        if magic != _MAGIC:
            raise NotCompiled("another version wrote it")
        self._head, self._rows, self._tables, self._slots, self._slot_count = found
        self._known: OrderedDict[tuple[int, object], object] = OrderedDict()  # the least recently asked first

    def policy(self) -> Policy:
        head = self._read_row(self._head)
        index = _Index(self, head["index"], _TEXTS, lambda row: self._workload_index(read_row(row)))
        return Policy(
            workloads=_Workloads(index),
            guard=self._values(head["guard"]),
            tests=self._values(head["tests"]),
            index=index,
            guard_table=self._host_table(head["guard_table"]),
            sources=self._prefix_map(head["sources"], lambda row: list(read_row(row))),
            users=_Table(self, head["users"], _TEXTS, _TEXTS.read),
            pods=_Table(self, head["pods"], _TEXTS, read_row),
            generation=head["generation"],
        )

    def _workload_index(self, row: dict[str, Any]) -> WorkloadIndex:
        return WorkloadIndex(
            workload=replace(row["workload"], rules=self._values(row["rules"])),
            hosts=self._host_table(row["hosts"]),
            tcp=self._transport_table(row["tcp"]),
            udp=self._transport_table(row["udp"]),
            ntp=_Table(self, row["ntp"], _HOSTNAMES, self._referred),
            dns=_Table(self, row["dns"], _PATTERNS, self._referred),
            host_ports=row["host_ports"],
            plain_ports=row["plain_ports"],
            ancestors=_Table(self, row["ancestors"], _HOSTNAMES, lambda _: None),
        )

    def _host_table(self, row: dict[str, Any]) -> HostTable:
        def read(value: bytes) -> HostGroup:
            return group_of(self._referred(value))

        return HostTable(
            _Table(self, row["exact"], _HOSTNAMES, read),
            _Table(self, row["wildcards"], _HOSTNAMES, read),
            closes=row["closes"],
        )

    def _transport_table(self, row: dict[str, Any]) -> TransportTable:
        def read(value: bytes) -> list[tuple[TransportRule, bool]]:
            return [(self._value(number >> 1), bool(number & 1)) for number in array("I", value)]

        return TransportTable(
            names=_Table(self, row["names"], _HOSTNAMES, self._referred),
            prefixes=self._prefix_map(row["prefixes"], read),
            ports=row["ports"],
            prefix_ports=row["prefix_ports"],
            quic_ports=row["quic_ports"],
        )

    def _prefix_map[V](self, row: dict[str, Any], read: Callable[[bytes], list[V]]) -> PrefixMap[V]:
        def tables(name: str) -> PrefixTables[V]:
            return tuple((shift, _Table(self, number, _PREFIXES, read)) for shift, number in row[name])

        return PrefixMap.of(tables("v4"), tables("v6"))

    def bounds(self, table: int) -> tuple[int, int]:
        """Where its first entry is, and how many there are."""
        first, count = _TABLE.unpack_from(self._map, self._tables + table * _TABLE.size)
        return first, count

    def _values(self, found: tuple[int, int]) -> Later[Any]:  # Any: as the field it is for says
        first, count = found
        return Later(count, lambda index: self._value(first + index))

    def _referred(self, value: bytes) -> tuple[Any, ...]:  # as `_values`
        return tuple(map(self._value, array("I", value)))

    def _value(self, number: int) -> Any:  # as `_values`
        return self._known_or((_ROWS, number), lambda: self._read_numbered(number))

    def _read_numbered(self, number: int) -> object:
        (offset,) = _OFFSET.unpack_from(self._map, self._rows + number * _OFFSET.size)
        return self._read_row(offset)

    def _read_row(self, offset: int) -> Any:  # as `read_row`
        (size,) = _SIZE.unpack_from(self._map, offset)
        return read_row(self._map[offset + _SIZE.size : offset + _SIZE.size + size])

    def ask[K](self, table: int, key: K, keys: _Keys[K], read: Callable[[bytes], object]) -> object:
        """What `key` leads to in `table`, or _ABSENT. It is kept ready."""
        return self._known_or((table, key), lambda: self.look(table, key, keys, read))

    def look[K](self, table: int, key: K, keys: _Keys[K], read: Callable[[bytes], object]) -> object:
        """As `ask`, made anew."""
        value = self._find(table, keys.spell(key))
        return _ABSENT if value is None else read(value)

    def _known_or(self, asked: tuple[int, object], look: Callable[[], object]) -> object:
        known = self._known
        if asked in known:
            known.move_to_end(asked)
            return known[asked]
        found = known[asked] = look()
        if len(known) > KNOWN:
            known.popitem(last=False)
        return found

    def _find(self, table: int, key: bytes) -> bytes | None:
        hash = crc32(key, table)
        slot = hash % self._slot_count
        while True:
            theirs, offset = _SLOT.unpack_from(self._map, self._slots + slot * _SLOT.size)
            if not offset:
                return None
            if theirs == hash:
                number, _, entry_key, value = self._entry(offset)
                if number == table and entry_key == key:
                    return value
            slot = (slot + 1) % self._slot_count

    def keys(self, first: int, count: int) -> Iterator[bytes]:
        """The keys of the table whose entries begin at `first`."""
        for _ in range(count):
            _, first, key, _ = self._entry(first)
            yield key

    def _entry(self, offset: int) -> tuple[int, int, bytes, bytes]:
        """Its table, where the next one begins, its key and value."""
        table, key_size, value_size = _ENTRY.unpack_from(self._map, offset)
        key = offset + _ENTRY.size
        value = key + key_size
        end = value + value_size
        return table, end, self._map[key:value], self._map[value:end]


class _Table[K, V](Mapping[K, V]):
    """One table, asked as a dict is."""

    __slots__ = ("_count", "_first", "_keys", "_number", "_read", "_reader")

    def __init__(self, reader: _Reader, number: int, keys: _Keys[K], read: Callable[[bytes], V]) -> None:
        self._reader = reader
        self._number = number
        self._first, self._count = reader.bounds(number)
        self._keys = keys
        self._read = read

    @overload
    def get(self, key: K, /) -> V | None: ...
    @overload
    def get[D](self, key: K, /, default: V | D) -> V | D: ...
    def get(self, key: K, /, default: object = None) -> object:
        found = self._reader.ask(self._number, key, self._keys, self._read) if self._count else _ABSENT
        return default if found is _ABSENT else found

    def __getitem__(self, key: K) -> V:
        found = self.get(key, _ABSENT)
        if found is _ABSENT:
            raise KeyError(key)
        return cast(V, found)

    def __contains__(self, key: object) -> bool:
        return self.get(cast(K, key), _ABSENT) is not _ABSENT

    def __iter__(self) -> Iterator[K]:
        return map(self._keys.read, self._reader.keys(self._first, self._count))

    def __len__(self) -> int:
        return self._count


class _Index(_Table[str, WorkloadIndex]):
    """Each workload's tables. The reader must not keep them, for they hold it: a policy that was replaced would stay,
    with its memory, until a cycle is looked for."""

    __slots__ = ("_made",)

    def __init__(self, reader: _Reader, number: int, keys: _Keys[str], read: Callable[[bytes], WorkloadIndex]) -> None:
        super().__init__(reader, number, keys, read)
        self._made: dict[str, WorkloadIndex] = {}

    @overload
    def get(self, key: str, /) -> WorkloadIndex | None: ...
    @overload
    def get[D](self, key: str, /, default: WorkloadIndex | D) -> WorkloadIndex | D: ...
    def get(self, key: str, /, default: object = None) -> object:
        if key in self._made:
            return self._made[key]
        found = self._reader.look(self._number, key, self._keys, self._read) if self._count else _ABSENT
        if isinstance(found, WorkloadIndex):
            self._made[key] = found
        return default if found is _ABSENT else found


class _Workloads(Mapping[str, Workload]):
    def __init__(self, index: Mapping[str, WorkloadIndex]) -> None:
        self._index = index

    def __getitem__(self, name: str) -> Workload:
        return self._index[name].workload

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
