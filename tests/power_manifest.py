"""Remember what was done to a cluster, and what of it was acknowledged as synced; tell what a power cut must not take.

What is remembered of a file since it was last synced is everything that it may be after a cut: its bytes then, each
write since, all sizes that it had; of its names, all sets of names that it had. Whatever was done to a name is lost
from some point on, whole: nothing in between, nothing twice. What was under way may be done or not.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from power_work import BLOCK, Found, content

from benchfs_fuse.limits import CHUNK_SIZE_MIN

#: A directory's inode, and a name in it.
Place = tuple[int, str]


class Item:
    """Be a file or directory that was made."""

    def __init__(self, kind: str, synced: bool) -> None:
        self.is_dir = kind == "mkdir"
        #: All sets of names that it had since they were last synced, the newest last.
        self.places: list[frozenset[Place]] = [frozenset()] if not synced else []
        #: Bytes as they were synced, and as they are without a cut.
        self.synced = b""
        self.now = bytearray()
        #: What was written since, and which ranges may read as zeros, or as errors.
        self.writes: list[tuple[int, bytes]] = []
        self.doubt: list[tuple[int, int]] = []
        self.sizes = [0]

    def write(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))
        end, chunk = offset + len(data), CHUNK_SIZE_MIN
        self.doubt.append((min(offset, len(self.now)), end))
        # What goes to several chunks may be published in parts.
        first = max(offset, len(self.now)) // chunk + 1
        self.sizes.extend(range(first * chunk, end, chunk))
        self.now.extend(bytes(max(0, offset + len(data) - len(self.now))))
        self.now[offset : offset + len(data)] = data
        self.sizes.append(len(self.now))

    def truncate(self, size: int) -> None:
        self.doubt.append((min(size, len(self.now)), max(size, len(self.now))))
        del self.now[size:]
        self.now.extend(bytes(size - len(self.now)))
        self.sizes.append(size)

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.now))
        if offset < end:
            self.doubt.append((offset, end))
            self.now[offset:end] = bytes(end - offset)

    def sync_data(self) -> None:
        self.synced = bytes(self.now)
        self.writes.clear()
        self.doubt.clear()
        self.sizes = [len(self.now)]

    def complaints(self, found: Found) -> Iterator[str]:
        """Say what is wrong with what was found of a file."""
        if found.size not in self.sizes:
            yield f"has {found.size} bytes, not one of {sorted(set(self.sizes))}"
        for index, block in enumerate(found.blocks):
            start, end = index * BLOCK, min((index + 1) * BLOCK, found.size)
            doubtful = [(max(start, one), min(end, other)) for one, other in self.doubt if one < end and other > start]
            if block is None:
                if not doubtful:
                    yield f"cannot be read at {start}, where all was synced"
                continue
            if len(block) != end - start:
                yield f"gives {len(block)} bytes at {start}"
                continue
            if bad := self._first_bad(start, block, doubtful):
                yield bad

    def _first_bad(self, start: int, block: bytes, doubtful: list[tuple[int, int]]) -> str:
        """Say where a block has what it cannot have."""
        expected = self.synced[start : start + len(block)].ljust(len(block), b"\0")
        if block == expected:
            return ""
        unsure = bytearray(len(block))
        for one, other in doubtful:
            unsure[one - start : other - start] = b"\1" * (other - one)
        for at, (there, right) in enumerate(zip(block, expected, strict=True)):
            if there == right or (unsure[at] and there == 0):
                continue
            position = start + at
            if not unsure[at]:
                return f"has {there} at {position}, {right} was synced"
            if not any(
                offset <= position < offset + len(data) and data[position - offset] == there
                for offset, data in self.writes
            ):
                return f"has {there} at {position}, which was never written there"
        return ""


class Manifest:
    """Follow what the tasks say."""

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}
        #: What each task has begun and not ended.
        self.under_way: dict[int, tuple[str, dict[str, Any]]] = {}
        self._of_task: dict[int, set[int]] = {}
        self.failures: list[str] = []
        self.acknowledged = 0
        self.syncs = 0

    def take(self, words: Sequence[Any]) -> None:
        """Take one line of what is said."""
        match words:
            case ["begin", task, kind, arguments]:
                self.under_way[task] = (kind, arguments)
            case ["end", task, result]:
                kind, arguments = self.under_way.pop(task)
                self.acknowledged += 1
                self._apply(task, kind, arguments, result)
            case ["fail", task, sentence]:
                self.failures.append(sentence)

    def _names(self, ino: int) -> set[Place]:
        item = self.items[ino]
        return set(item.places[-1]) if item.places else set()

    def _set_names(self, ino: int, places: Iterable[Place]) -> None:
        self.items[ino].places.append(frozenset(places))

    def _apply(self, task: int, kind: str, given: dict[str, Any], result: Any) -> None:
        match kind:
            case "mkdir" | "create":
                self.items[result] = Item(kind, synced=False)
                self._of_task.setdefault(task, set()).add(result)
                self._set_names(result, [(given["parent"], given["name"])])
            case "write":
                self.items[given["ino"]].write(given["offset"], content(given["number"], given["length"]))
            case "write_synced":
                self.items[given["ino"]].write(given["offset"], content(given["number"], given["length"]))
                self._synced(given["ino"])
            case "truncate":
                self.items[given["ino"]].truncate(given["size"])
            case "punch":
                self.items[given["ino"]].punch(given["offset"], given["length"])
            case "fsync":
                self._synced(given["ino"])
            case "link":
                self._set_names(given["ino"], self._names(given["ino"]) | {(given["parent"], given["name"])})
            case "unlink":
                self._set_names(given["ino"], self._names(given["ino"]) - {(given["parent"], given["name"])})
            case "rename":
                self._rename(given)
            case "sync_names":
                self.syncs += 1
                for ino in self._of_task.get(task, ()):
                    self._names_synced(ino)

    def _rename(self, given: dict[str, Any]) -> None:
        old, new = ((given[which]["parent"], given[which]["name"]) for which in ("old", "new"))
        if given["replaced"] is not None:
            self._set_names(given["replaced"], self._names(given["replaced"]) - {new})
        self._set_names(given["ino"], self._names(given["ino"]) - {old} | {new})

    def _synced(self, ino: int) -> None:
        """Note that a file was synced: its names, too, and that the directories above it are there."""
        self.syncs += 1
        self.items[ino].sync_data()
        self._names_synced(ino)
        todo = {parent for parent, _ in self._names(ino)}
        while todo:
            above = self.items.get(todo.pop())
            if above is not None:
                while above.places and not above.places[0]:
                    del above.places[0]
                todo |= {parent for parent, _ in above.places[-1]}

    def _names_synced(self, ino: int) -> None:
        del self.items[ino].places[:-1]

    def end(self) -> None:
        """Take what is under way as what may have been done."""
        for kind, given in self.under_way.values():
            if kind == "write_synced":
                kind = "write"
            if kind not in ("mkdir", "create", "fsync", "sync_names"):
                self._apply(-1, kind, given, None)

    def complaints(self, found: Sequence[Found]) -> Iterator[str]:
        """Say what is wrong with what was found after a cut."""
        places: dict[int, set[Place]] = {}
        files: dict[int, Found] = {}
        for one in found:
            places.setdefault(one.ino, set()).add((one.parent, one.name))
            files[one.ino] = one
        new = {
            (given["parent"], given["name"]) for kind, given in self.under_way.values() if kind in ("mkdir", "create")
        }
        for ino, one in files.items():
            item = self.items.get(ino)
            label = f"inode {ino}, now {sorted(places[ino])},"
            if one.nlink != (len(places[ino]) if not one.is_dir else one.nlink):
                yield f"{label} has {one.nlink} links and {len(places[ino])} names"
            if item is None:
                if not places[ino] <= new or one.size:
                    yield f"{label} is unknown"
                continue
            if frozenset(places[ino]) not in item.places:
                yield f"{label} has names that it never had: {[sorted(one) for one in item.places]}"
            if not item.is_dir:
                yield from (f"{label} {sentence}" for sentence in item.complaints(one))
        for ino, item in self.items.items():
            if ino not in files and frozenset() not in item.places:
                yield f"inode {ino} has gone, it was at {[sorted(one) for one in item.places]}"
