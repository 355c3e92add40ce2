"""PNG files, sound ones and bombs, made without a library."""

import base64
import struct
import zlib


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """Colour 2 is RGB, 6 has alpha. The pixels are compressed as they come, whether they fit or not."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    )


def grey(width: int, height: int) -> bytes:
    """A sound picture of one colour."""
    return file(width, height, (b"\0" + b"\x80" * width * 3) * height)


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def bombs() -> dict[str, bytes]:
    """Small files that would be large pictures."""
    return {
        "a header of 2^31-1 squared": file(2**31 - 1, 2**31 - 1, b"\0" * 64),
        "a header of 16384 squared": file(16384, 16384, b"\0" * 64),
        "5792 squared, all there": file(5792, 5792, (b"\0" * (5792 * 3 + 1)) * 5792),
        "5792 squared of 16 bits, cut": file(5792, 5792, b"\0" * (1 << 20), depth=16, colour=6),
        "100 MiB of pixels for one": file(1, 1, b"\0" * (100 << 20)),
        "a text of 100 MiB": file(
            8, 8, (b"\0" + b"\0" * 24) * 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (100 << 20), 9))
        ),
        "a colour profile of 100 MiB": file(
            8, 8, (b"\0" + b"\0" * 24) * 8, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * (100 << 20), 9))
        ),
    }
