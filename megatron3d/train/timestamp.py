"""The time stamp of a log line: local time to the second, in brackets before the text, as Megatron-LM has it."""

from __future__ import annotations

from datetime import datetime


def local_time() -> datetime:
    """Now, in the time zone of this machine."""
    return datetime.now().astimezone()


def stamped(text: str, at: datetime) -> str:
    """The line with its time: "[2026-03-01 09:05:00] text"."""
    return f"[{at:%Y-%m-%d %H:%M:%S}] {text}"
