"""What is raised where images or examples are not what they should be."""

import re

_ADDRESS = re.compile(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>")


class CorruptExampleError(ValueError):
    """One example cannot be used: unreadable record, undecodable image, label out of range."""


class CorruptImageError(CorruptExampleError):
    """The bytes are not an image that can be decoded; the message says why."""


class TooManyCorruptError(RuntimeError):
    """More corrupt examples than allowed: the data need looking at, not skipping."""


def reason(error: BaseException) -> str:
    """Return an error of another library as one phrase: its kind and message, without addresses in memory."""
    return f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}".rstrip(": ")
