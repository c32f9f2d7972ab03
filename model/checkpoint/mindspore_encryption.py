"""Encrypted `.ckpt` files with random access to the plaintext, which is split into separately encrypted blocks of 64 MiB.

Layout of a block, all numbers uint32 little-endian:

    magic | AES-GCM: tag, 16 bytes | 24 + cipher length | 16 | IV, 16 bytes | cipher length | cipher

For AES-GCM, the first 12 bytes of the IV are the nonce. No plaintext is returned before the tag has been verified, so blocks are
decrypted whole, and the last one is cached. CBC ends each block with PKCS#7 padding and has no authentication, so only the requested
range is decrypted. `cryptography` is imported only when a file is encrypted.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch
from parallel.regular_file import open_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

CIPHERS: Mapping[int, str] = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}
"""By the first word of each block."""
MAGIC_BYTES = 4
_GCM = "AES-GCM"
_IV_BYTES, _NONCE_BYTES, _TAG_BYTES, _CIPHER_BLOCK_BYTES = 16, 12, 16, 16
_BLOCK_BYTES = 64 << 20
_KEY_BYTES = {"AES-GCM": (16, 24, 32), "AES-CBC": (16, 24, 32), "SM4-CBC": (16,)}
_CHUNK_BYTES = 1 << 20
"""Ciphertext bytes in memory at a time."""
_MAX_KEY_FILE_BYTES = 4096
_FIRST_BYTE = 0x0A
"""First byte of every plaintext: the tag of protobuf field 1."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Location of one block."""

    offset_bytes: int
    """Offset of the ciphertext in the file."""
    length_bytes: int
    """Length of the ciphertext."""
    iv: bytes
    tag: bytes
    """Tag of AES-GCM; empty for other ciphers."""


class EncryptedFile:
    """One encrypted file, opened with its key. Thread-safe if each thread uses its own reader."""

    def __init__(self, path: Path, end: int, cipher: str, key_file: Path, reader: FileReader) -> None:
        """The blocks end before byte `end`.

        Raises CheckpointError for a key file without a key, a key that does not match, corrupt blocks, and ciphers that the installed
        `cryptography` does not support.
        """
        self._path, self._cipher = path, cipher
        self._blocks = self._locate_blocks(reader, end)
        self._lock = threading.Lock()
        self._buffer, self._buffered = bytearray(), -1
        keys = [key for key in read_keys(key_file) if len(key) in _KEY_BYTES[cipher]]
        if not keys:
            raise CheckpointError(f"{path} is encrypted ({cipher}), which takes a key of 16 bytes, but {key_file} holds a longer one")
        self._key = next((key for key in keys if self._fits(key, reader)), b"")
        if not self._key:
            raise CheckpointError(
                f"{path} ({cipher}) does not open with the key in {key_file}: give the key that it was saved with, or copy the file again"
            )
        self._starts = [0]
        for number in range(len(self._blocks)):
            self._starts.append(self._starts[-1] + self._plain_length(number, reader))
        self.size_bytes = self._starts.pop()
        """Size of the plaintext."""

    def read_into(self, reader: FileReader, offset_bytes: int, out: torch.Tensor) -> None:
        """Fill `out` (uint8) with the plaintext from `offset_bytes` on. Raises CheckpointError for a corrupt block."""
        done, number = 0, bisect_right(self._starts, offset_bytes) - 1
        while done < len(out):
            start = self._starts[number]
            stop = self._starts[number + 1] if number + 1 < len(self._starts) else self.size_bytes
            first = offset_bytes + done - start
            part = out[done : done + stop - start - first]
            if self._cipher == _GCM:
                with self._lock:
                    if not self._decrypt_gcm(number, self._key, reader):
                        raise self._damaged(number)
                    part.copy_(torch.frombuffer(self._buffer, dtype=torch.uint8, count=len(part), offset=first))
            else:
                self._decrypt_cbc(number, self._key, reader, first, part)
            done += len(part)
            number += 1

    def _locate_blocks(self, reader: FileReader, end: int) -> list[_Block]:
        blocks: list[_Block] = []
        at, tag_bytes = 0, _TAG_BYTES if self._cipher == _GCM else 0
        header_bytes = MAGIC_BYTES + tag_bytes + 4 + 4 + _IV_BYTES + 4
        padding = 0 if self._cipher == _GCM else _CIPHER_BLOCK_BYTES
        while at < end:
            if at + header_bytes > end:
                raise self._cut_off(end, at + header_bytes)
            header = reader.read_span(self._path, at, header_bytes).numpy().tobytes()
            tag, rest = header[MAGIC_BYTES : MAGIC_BYTES + tag_bytes], header[MAGIC_BYTES + tag_bytes :]
            total, iv_bytes, length = (int.from_bytes(rest[first : first + 4], "little") for first in (0, 4, 8 + _IV_BYTES))
            if (
                CIPHERS.get(int.from_bytes(header[:MAGIC_BYTES], "little")) != self._cipher
                or (iv_bytes, total) != (_IV_BYTES, length + 8 + _IV_BYTES)
                or not 0 < length <= _BLOCK_BYTES + padding
                or (padding and length % padding)
            ):
                raise CheckpointError(
                    f"{self._path} is encrypted ({self._cipher}), but byte {at} of {end} begins no block: copy it again; a file of an "
                    "early MindSpore, which wrote AES-GCM without tags, has to be saved again"
                )
            block = _Block(at + header_bytes, length, rest[8 : 8 + _IV_BYTES], tag)
            at += header_bytes + length
            if at > end:
                raise self._cut_off(end, at)
            blocks.append(block)
        return blocks

    def _fits(self, key: bytes, reader: FileReader) -> bool:
        """Return whether this key decrypts the first block."""
        if self._cipher == _GCM:
            return self._decrypt_gcm(0, key, reader)
        start = torch.empty(_CIPHER_BLOCK_BYTES, dtype=torch.uint8)
        self._decrypt_cbc(0, key, reader, 0, start)
        return int(start[0]) == _FIRST_BYTE and self._padding(0, key, reader) is not None

    def _plain_length(self, number: int, reader: FileReader) -> int:
        if self._cipher == _GCM:
            return self._blocks[number].length_bytes
        padding = self._padding(number, self._key, reader)
        if padding is None or padding == self._blocks[number].length_bytes:
            raise self._damaged(number)
        return self._blocks[number].length_bytes - padding

    def _padding(self, number: int, key: bytes, reader: FileReader) -> int | None:
        """Return the number of CBC padding bytes of a block; None if the padding is invalid."""
        last = torch.empty(_CIPHER_BLOCK_BYTES, dtype=torch.uint8)
        self._decrypt_cbc(number, key, reader, self._blocks[number].length_bytes - _CIPHER_BLOCK_BYTES, last)
        count = int(last[-1])
        return count if 1 <= count <= _CIPHER_BLOCK_BYTES and bool((last[-count:] == count).all()) else None

    def _decrypt_gcm(self, number: int, key: bytes, reader: FileReader) -> bool:
        """Decrypt this block into `_buffer`; return whether its tag is valid."""
        if self._buffered == number:
            return True
        self._buffered, block, done = -1, self._blocks[number], 0
        if not self._buffer:
            # The cipher needs room for one additional cipher block.
            self._buffer = bytearray(max(one.length_bytes for one in self._blocks) + _CIPHER_BLOCK_BYTES)
        decryptor = self._start(key, block.iv, block.tag)
        view = memoryview(self._buffer)
        for first in range(0, block.length_bytes, _CHUNK_BYTES):
            chunk = self._read_cipher(reader, block, first, min(first + _CHUNK_BYTES, block.length_bytes))
            done += decryptor.update_into(chunk, view[done:])
        from cryptography.exceptions import InvalidTag

        try:
            decryptor.finalize()
        except InvalidTag:
            return False
        self._buffered = number
        return True

    def _decrypt_cbc(self, number: int, key: bytes, reader: FileReader, first: int, out: torch.Tensor) -> None:
        """Fill `out` with this block's plaintext from byte `first` on, without decrypting what precedes it."""
        block, unit = self._blocks[number], _CIPHER_BLOCK_BYTES
        stop = first + len(out)
        for start in range(first // unit * unit, stop, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, -(-stop // unit) * unit)
            iv = bytes(self._read_cipher(reader, block, start - unit, start)) if start else block.iv
            plain = np.frombuffer(self._start(key, iv).update(self._read_cipher(reader, block, start, end)), np.uint8)
            low, high = max(first, start), min(stop, end)
            out.numpy()[low - first : high - first] = plain[low - start : high - start]

    def _read_cipher(self, reader: FileReader, block: _Block, start: int, stop: int) -> memoryview:
        return memoryview(reader.read_span(self._path, block.offset_bytes + start, stop - start).numpy().data)

    def _start(self, key: bytes, iv: bytes, tag: bytes = b"") -> CipherContext:
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise CheckpointError(
                f"{self._path} is encrypted ({self._cipher}), which needs one more package: pip install 'tandem-launcher[encrypted]'"
            ) from None
        try:
            if tag:
                return Cipher(algorithms.AES(key), modes.GCM(iv[:_NONCE_BYTES], tag)).decryptor()
            algorithm = algorithms.SM4(key) if self._cipher == "SM4-CBC" else algorithms.AES(key)
            return Cipher(algorithm, modes.CBC(iv)).decryptor()
        except (UnsupportedAlgorithm, AttributeError):
            raise CheckpointError(
                f"{self._path} is encrypted ({self._cipher}), which the installed cryptography cannot decrypt: save it again with AES-GCM"
            ) from None

    def _cut_off(self, end: int, needed: int) -> CheckpointError:
        return CheckpointError(f"{self._path} has {end} bytes, but its blocks reach byte {needed}: copy it again")

    def _damaged(self, number: int) -> CheckpointError:
        what = "tag" if self._cipher == _GCM else "padding"
        return CheckpointError(
            f"{self._path} is damaged: the {what} of its encrypted block {number + 1} of {len(self._blocks)} does not fit: copy it again"
        )


def read_keys(key_file: Path) -> Sequence[bytes]:
    """Return the possible keys in a file: its bytes without a trailing newline, or decoded from hexadecimal.

    Raises CheckpointError when none has 16, 24 or 32 bytes.
    """
    try:
        with open_regular(key_file) as file:
            content = file.read(_MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise CheckpointError(f"the key file {key_file} cannot be read: {error.strerror}") from None
    text = re.sub(rb"\r?\n\Z", b"", content)
    found = [content, text] if content != text else [text]
    if re.fullmatch(rb"[0-9A-Fa-f]{32}|[0-9A-Fa-f]{48}|[0-9A-Fa-f]{64}", text):
        found.append(bytes.fromhex(text.decode()))
    keys = [key for key in found if len(key) in (16, 24, 32)]
    if not keys:
        more = " or more" if len(content) == _MAX_KEY_FILE_BYTES else ""
        raise CheckpointError(
            f"the key file {key_file} holds {len(text)}{more} bytes, but a key has 16, 24 or 32, or twice as many hexadecimal digits"
        )
    return keys
