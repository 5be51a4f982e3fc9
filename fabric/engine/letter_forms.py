"""Messages into letters, and letters into messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fabric.core import events
from fabric.core.wire import (
    ADDRESSED,
    HAS_ADDRESSED,
    HAS_METADATA,
    NONE,
    Burst,
    checksum_of,
    encode_burst,
    encode_descriptor,
)
from fabric.message import Message, RedrivenFeed
from fabric.storage.letter_rows import SPILLED, LetterRow

if TYPE_CHECKING:
    from fabric.config import Letters
    from fabric.core.lanes import InboundFeed

__all__ = ["TOO_LARGE", "Burial", "cut_text", "letter_of", "message_of", "notice_of"]


TOO_LARGE = "its value is larger than letters.value_bytes_max"


class Burial(NamedTuple):
    """Why a message is buried."""

    reason: str
    detail: str
    attempts: int
    parked: bool = False


def letter_of(message: Message, name: str, why: Burial, limits: Letters, now_ns: int) -> LetterRow:
    """A message as a letter that has no number yet; of a large value it has the head."""
    burst, row, blob = message._burst, message._row, message._blob()
    is_large, is_too_large = blob.nbytes > limits.record_bytes_max, blob.nbytes > limits.value_bytes_max
    return LetterRow(
        id=0,
        kind="letter",
        subscription=name,
        source=message.source,
        incarnation=message.incarnation,
        topic=message.topic,
        seed=message.seed,
        sequence=message.sequence,
        first=message.offset,
        end=message.offset + 1,
        reason=str(why.reason),
        detail=cut_text(why.detail, limits.detail_bytes_max),
        attempts=why.attempts,
        parked=why.parked,
        published_ns=message.published_ns,
        buried_ns=now_ns,
        value_kind=burst.columns[2][row] & ~ADDRESSED,
        size=blob.nbytes,
        checksum=checksum_of(blob),
        metadata=burst.metadata(row),
        value=bytes(blob[: limits.record_bytes_max]),
        cut="" if not is_large else TOO_LARGE if is_too_large else SPILLED,
    )


def notice_of(command: events.ReportGap, name: str, now_ns: int) -> LetterRow:
    """Records that were lost without a letter."""
    return LetterRow(
        id=0,
        kind="notice",
        subscription=name,
        source=command.source,
        incarnation=command.incarnation,
        topic=command.topic,
        seed=-1,
        sequence=-1,
        first=command.first,
        end=-1 if command.end is None else command.end,
        reason=str(command.reason),
        detail="",
        attempts=0,
        parked=False,
        published_ns=0,
        buried_ns=now_ns,
        value_kind=0,
        size=0,
        checksum=0,
        metadata=b"",
        value=b"",
        cut="",
    )


def cut_text(text: str, most: int) -> str:
    """What can be written, and no more of it."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def message_of(row: LetterRow, number: int) -> events.Deliver:
    """A letter as it comes to the inbox of this number: a burst of one record, of a feed that stands for its own."""
    feed: Any = RedrivenFeed(row.id, number, row.source, row.topic, row.incarnation, row.first, parked=row.parked)
    metadata = [row.metadata] if row.metadata else None
    lane = [row.seed], [row.sequence], [NONE]
    is_addressed = row.cut == SPILLED
    kind = row.value_kind | (ADDRESSED if is_addressed else 0)
    body = encode_descriptor(row.size, row.checksum) if is_addressed else row.value
    frame = encode_burst(0, row.incarnation, row.first, row.published_ns, *lane, [kind], [body], metadata)
    flags = (HAS_METADATA if metadata else 0) | (HAS_ADDRESSED if is_addressed else 0)
    burst = Burst(frame, 0, row.incarnation, row.first, 1, flags, row.published_ns)
    burst.payloads = {row.first: row.value} if is_addressed else None  # not copied once more
    return events.Deliver(number, cast("InboundFeed", feed), burst, None, burst.size)
