"""What is done to valid files: bytes, JSON, protobuf messages, archives, texts. All from a seed."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 65536, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30)
REALS = (0.0, -1.0, 0.5, 1e-30, 1e38, float("inf"), float("nan"))
TEXTS = (
    "", "x", "x" * 100_000, "../../../../etc/passwd", "/dev/zero", "\x1b[31mred\x1b]0;title\x07",
    "\x00", "ü\u202e", "os:getcwd", "zoo:tiny-vit", "organisation/name", " 12 ", "*", "[", "{}",
)  # fmt: skip


def of_bytes(rng: Random, data: bytes) -> bytes:
    """Bits flipped, a stretch removed, zeroed, doubled or made of junk, the end cut off."""
    buffer = bytearray(data)
    start = rng.randrange(len(buffer) or 1)
    stop = min(len(buffer), start + rng.choice((1, 4, 64, 4096)))
    kind = rng.choice(("flip", "remove", "zero", "double", "junk", "cut"))
    if kind == "flip":
        for _ in range(rng.choice((1, 3, 30)) if buffer else 0):
            buffer[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del buffer[start:]
    elif kind == "remove":
        del buffer[start:stop]
    else:
        same = bytes(buffer[start:stop])
        new = {"zero": bytes(len(same)), "double": 2 * same, "junk": rng.randbytes(len(same))}
        buffer[start:stop] = new[kind]
    return bytes(buffer)


def of_json(rng: Random, item: Any) -> Any:
    """A part removed, or made another number, text, kind, or a very deep one."""
    places = list(_places(item))
    if not places:
        return _other(rng, item)
    holder, key = rng.choice(places)
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = _other(rng, holder[key])
    return item


def _places(item: Any) -> Iterator[tuple[Any, Any]]:
    pairs = item.items() if isinstance(item, dict) else enumerate(item)
    for key, value in pairs:
        yield item, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _other(rng: Random, value: Any) -> Any:
    if rng.random() < 0.5 and isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice((*NUMBERS, value + 1, -value))
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    return rng.choice((
        None, True, [], {}, [value], {"a": value}, deep, str(value), *NUMBERS, *REALS, *TEXTS,
    ))  # fmt: skip


def json_text(rng: Random, data: bytes) -> bytes:
    """A JSON file with up to three parts changed; now and then its bytes."""
    if rng.random() < 0.1:
        return of_bytes(rng, data)
    item = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        item = of_json(rng, item)
    return json.dumps(item).encode()


def safetensors(rng: Random, data: bytes) -> bytes:
    """Its header changed as JSON is, or its bytes."""
    if rng.random() < 0.4:
        return of_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = json_text(rng, data[8 : 8 + length])
    stated = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", stated) + header + data[8 + length :]


def message(rng: Random, root: Any) -> None:
    """One to three fields of a protobuf message, at any depth, set to what nobody would write."""
    for _ in range(rng.randint(1, 3)):
        every = list(_messages(root))
        target = rng.choice(every)
        field = rng.choice(target.DESCRIPTOR.fields)
        try:
            _change(rng, target, field, every)
        except (ValueError, TypeError, OverflowError):
            continue  # protobuf itself refuses it


def _messages(item: Any) -> Iterator[Any]:
    yield item
    for field, value in item.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            yield from _messages(part)


def _change(rng: Random, target: Any, field: Any, every: list[Any]) -> None:
    value = getattr(target, field.name)
    if rng.random() < 0.2:
        target.ClearField(field.name)
    elif field.message_type is not None:
        same = [part for part in every if part.DESCRIPTOR is field.message_type]
        many = not hasattr(value, "ListFields")
        if many and len(value) and rng.random() < 0.5:
            del value[rng.randrange(len(value))]
        elif same:
            # Of a copy: a message may be within the one that it is given, which crashes protobuf.
            copy = type(same[0])()
            copy.CopyFrom(rng.choice(same))
            (value.add() if many else value).CopyFrom(copy)
    elif hasattr(value, "append"):
        value.append(_scalar(rng, rng.choice(list(value) or [1]), every))
    else:
        setattr(target, field.name, _scalar(rng, value, every))


def _scalar(rng: Random, value: Any, every: list[Any]) -> Any:
    if isinstance(value, bytes):
        return of_bytes(rng, value)
    if isinstance(value, str):
        names = [part.name for part in every if getattr(part, "name", "")]
        return rng.choice((*TEXTS, *names))
    return rng.choice(REALS if isinstance(value, float) else NUMBERS)


def archive(rng: Random, data: bytes) -> bytes:
    """A zip file: its bytes, or an entry changed, left out, doubled, renamed or made very long."""
    if rng.random() < 0.3:
        return of_bytes(rng, data)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            kind = rng.choice(("change", "json", "drop", "double", "rename", "long"))
            if name != chosen or kind == "double":
                new.writestr(name, content)
            if name != chosen or kind == "drop":
                continue
            if kind == "json" and name.endswith(".json"):
                content = json_text(rng, content)
            elif kind == "long":
                content += bytes(rng.choice((1, 4096, 1 << 24)))
            elif kind != "rename":
                content = of_bytes(rng, content)
            if kind == "rename":  # a name ends at NUL, and has one letter at least
                name = rng.choice(TEXTS)[:999].partition("\x00")[0] or "x"
            new.writestr(name, content)
    return packed.getvalue()


def text(rng: Random, original: str) -> str:
    """A text of words and signs: one left out, doubled, swapped with another or made a number."""
    parts = re.findall(r"\w+|\W", original)
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        new = {
            "drop": "", "double": 2 * parts[at], "swap": parts[other],
            "number": str(rng.choice((*NUMBERS, *REALS))), "text": rng.choice(TEXTS),
        }  # fmt: skip
        parts[at] = new[rng.choice(sorted(new))]
    return "".join(parts).replace("\x00", "")
