"""Reads recorded traces of PyTorch's CUDA caching allocator."""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from estimator.allocator.blocks import Block, BlockState, Segment
from estimator.errors import InputError

SEGMENT_ACTIONS = ("segment_alloc", "segment_free", "segment_map", "segment_unmap")
BLOCK_ACTIONS = ("alloc", "free_requested", "free_completed")
# PyTorch records these too; their address is something else or nothing.
OTHER_ACTIONS = ("oom", "snapshot", "user_defined")
ADDRESS_LIMIT = 2**60
"""Above the virtual addresses of every process; the replay invents addresses from here on."""
_STATES = ("active_allocated", "active_awaiting_free", "inactive")
_POWERS_OF_TWO = 16


class Event(NamedTuple):
    """One action of the allocator. ``size`` is what was requested, of segments what was had; bytes."""

    action: str
    size: int
    address: int
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recording of one device. It may begin in the middle of a run."""

    events: tuple[Event, ...]
    final_segments: tuple[Segment, ...]
    """When it ended, by address; those of an expandable segment that no event touches are left out (see ``read_trace``)."""
    expandable_segments: bool
    max_split_size_bytes: int | None
    roundup_power2_divisions: tuple[int, ...]


def read_trace(path: Path) -> Trace:
    """Reads ``{"events": [[action, size, address, stream]...], "final_segments": [...], "settings": {...}}``, gzipped JSON.

    ``final_segments`` are as ``torch.cuda.memory._snapshot()`` gives them, with blocks as
    ``[address, size, requested_size, state]``. Such a snapshot shows all devices: as the addresses of one expandable
    segment lie together, its ranges that no event touches are taken for another device's. Raises InputError.
    """
    try:
        document = json.loads(gzip.decompress(path.read_bytes()))
    except OSError as error:
        raise InputError(f"not a gzipped trace: {error.strerror or error}; write the path of a .json.gz") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"a damaged gzip file: {error}; copy it again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {str(error).splitlines()[0]}; write a trace as gzipped JSON") from None
    return _trace(document)


def _trace(document: object) -> Trace:
    record = _record(document, "the trace")
    events = tuple(_event(value, f"events[{i}]") for i, value in enumerate(_list(record, "events", "the trace")))
    final = [
        _segment(value, f"final_segments[{i}]") for i, value in enumerate(_list(record, "final_segments", "the trace"))
    ]
    final.sort(key=lambda segment: segment.address)
    for below, above in pairwise(final):
        if below.address + below.size_bytes > above.address:
            raise InputError(f"final_segments: two segments overlap at address {above.address}")
    touched = touched_segments(final, events)
    final = [segment for segment in final if not segment.expandable or segment.address in touched]
    settings = _record(record.get("settings", {}), "settings")
    configuration = _configuration(settings.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    growth = next((event.action for event in events if event.action in ("segment_alloc", "segment_map")), None)
    if growth is None:
        expandable = settings.get("expandable_segments", any(segment.expandable for segment in final)) is True
    else:
        expandable = growth == "segment_map"
    split = settings.get("max_split_size", -1)
    if not _is_int(split):
        raise InputError(f"settings.max_split_size: {split!r} is not a number of bytes (-1: unlimited)")
    return Trace(
        events=events,
        final_segments=tuple(final),
        expandable_segments=expandable,
        max_split_size_bytes=split if 0 < split < 2**62 else None,
        roundup_power2_divisions=_divisions(configuration.get("roundup_power2_divisions", "")),
    )


def touched_segments(segments: Sequence[Segment], events: Sequence[Event]) -> set[int]:
    """The addresses of those segments (in the order of addresses) that an event lies in."""
    starts = [segment.address for segment in segments]
    touched: set[int] = set()
    for event in events:
        if event.action in OTHER_ACTIONS:
            continue
        index = bisect_right(starts, event.address) - 1
        if index >= 0 and event.address < starts[index] + segments[index].size_bytes:
            touched.add(starts[index])
        if event.action in ("segment_map", "segment_unmap"):
            # Neighbouring ranges are shown as one: any of them may begin inside of the event's.
            first = bisect_right(starts, event.address)
            last = bisect_right(starts, event.address + event.size - 1)
            touched.update(starts[first:last])
    return touched


def _event(value: object, where: str) -> Event:
    if not isinstance(value, list) or len(value) != 4 or not isinstance(value[0], str):
        raise InputError(f"{where}: expected [action, size, address, stream]")
    action = value[0]
    if action in OTHER_ACTIONS:
        size, address, stream = (part if _is_int(part) else 0 for part in value[1:])
        return Event(action, size, address, stream)
    if action not in SEGMENT_ACTIONS + BLOCK_ACTIONS:
        known = ", ".join(BLOCK_ACTIONS + SEGMENT_ACTIONS + OTHER_ACTIONS)
        raise InputError(f"{where}: unknown action {action!r}; expected one of {known}")
    if not all(_is_int(part) and part >= 0 for part in value[1:]):
        raise InputError(f"{where}: size, address and stream of {action!r} must be whole numbers from 0 on")
    if action in SEGMENT_ACTIONS and not value[1]:
        raise InputError(f"{where}: {action!r} of 0 bytes")
    if value[1] + value[2] > ADDRESS_LIMIT:
        raise InputError(f"{where}: {value[1]} bytes at address {value[2]} are beyond the addresses of a process")
    return Event(action, value[1], value[2], value[3])


def _segment(value: object, where: str) -> Segment:
    record = _record(value, where)
    numbers = [_number(record, name, where) for name in ("address", "total_size", "stream")]
    kind = _field(record, "segment_type", where)
    if kind not in ("small", "large"):
        raise InputError(f"{where}.segment_type: {kind!r}; expected 'small' or 'large'")
    expandable = record.get("is_expandable", False)
    if not isinstance(expandable, bool):
        raise InputError(f"{where}.is_expandable: {expandable!r}; expected true or false")
    blocks = []
    position = numbers[0]
    for i, block in enumerate(_list(record, "blocks", where)):
        if not isinstance(block, list) or len(block) != 4 or not all(_is_int(part) for part in block[:3]):
            raise InputError(f"{where}.blocks[{i}]: expected [address, size, requested_size, state]")
        if block[3] not in _STATES:
            raise InputError(f"{where}.blocks[{i}]: state {block[3]!r}; expected one of {', '.join(_STATES)}")
        if block[0] != position or block[1] <= 0:
            raise InputError(f"{where}.blocks[{i}]: the blocks of a segment must follow each other without gaps")
        position += block[1]
        blocks.append(Block(address=block[0], size_bytes=block[1], state=cast(BlockState, block[3])))
    if position > ADDRESS_LIMIT:
        raise InputError(f"{where}: {numbers[1]} bytes at address {numbers[0]} are beyond the addresses of a process")
    if position != numbers[0] + numbers[1]:
        raise InputError(f"{where}: the blocks add up to {position - numbers[0]} bytes, total_size is {numbers[1]}")
    return Segment(
        address=numbers[0],
        size_bytes=numbers[1],
        stream=numbers[2],
        small=kind == "small",
        expandable=expandable,
        blocks=tuple(blocks),
    )


def _configuration(text: object) -> dict[str, str]:
    """``"key:value,key:[a:b,c:d]"`` of PYTORCH_CUDA_ALLOC_CONF, by key."""
    if not isinstance(text, str):
        raise InputError(f"settings.PYTORCH_CUDA_ALLOC_CONF: {text!r} is not a text")
    pairs: dict[str, str] = {}
    depth, start = 0, 0
    for i, character in enumerate(text + ","):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            key, _, value = text[start:i].partition(":")
            pairs[key.strip()] = value.strip()
            start = i + 1
    return pairs


def _divisions(text: str) -> tuple[int, ...]:
    """One division for each power of two from 1 MiB on, from ``"4"`` or ``"[256:1,512:2,>:4]"`` (keys in MiB)."""
    if not text:
        return ()
    try:
        if not text.startswith("["):
            return (int(text),) * _POWERS_OF_TWO
        divisions = [0] * _POWERS_OF_TWO
        index = -1
        for pair in text.strip("[]").split(","):
            key, _, value = pair.partition(":")
            first, last = index + 1, _POWERS_OF_TWO - 1
            if key.strip() != ">":
                last = min(int(key).bit_length() - 1, last)
                first = 0 if index < 0 else last
            divisions[first : last + 1] = [int(value)] * (last + 1 - first)
            index = last
        return tuple(divisions)
    except ValueError:
        raise InputError(
            f"settings.PYTORCH_CUDA_ALLOC_CONF: roundup_power2_divisions:{text} is not a number, nor [256:1,512:2,>:4]"
        ) from None


def _record(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with named fields")
    return value


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise InputError(f"{where}: the field {name!r} is missing")
    return record[name]


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = _field(record, name, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {name!r} must be a list")
    return value


def _number(record: dict[str, Any], name: str, where: str) -> int:
    value = _field(record, name, where)
    if not _is_int(value) or value < 0:
        raise InputError(f"{where}.{name}: {value!r} is not a whole number from 0 on")
    assert isinstance(value, int)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
