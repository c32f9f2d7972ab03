"""Encrypted `.ckpt` files, encrypted here block by block: reading, keys, and every kind of damage."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from model.checkpoint.mindspore_encryption import CIPHERS, read_keys
from model.checkpoint.mindspore_file import MindSporeFile
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

KEY = b"0123456789ABCDEF"
MAGICS = {name: magic for magic, name in CIPHERS.items()}
TENSORS = {
    "first": torch.arange(600, dtype=torch.float32).view(60, 10) - 7.5,
    "second": torch.arange(90, dtype=torch.int8).view(9, 10),
    "third": torch.linspace(-3, 3, 500).half().view(50, 10),
}
TYPES = {torch.float32: b"Float32", torch.int8: b"Int8", torch.float16: b"Float16"}


def has_sm4() -> bool:
    try:
        Cipher(algorithms.SM4(KEY), modes.CBC(KEY)).encryptor()
    except UnsupportedAlgorithm:
        return False
    return True


MODES = ["AES-GCM", "AES-CBC", pytest.param("SM4-CBC", marks=pytest.mark.skipif(not has_sm4(), reason="no SM4 in this OpenSSL"))]


def field(number: int, content: bytes) -> bytes:
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def make_plain() -> bytes:
    out = b""
    for tag, tensor in TENSORS.items():
        dims = b"".join(bytes([8, size]) for size in tensor.shape)
        out += field(1, field(1, tag.encode()) + field(2, dims + field(2, TYPES[tensor.dtype]) + field(3, tensor.numpy().tobytes())))
    return out


def encrypt(plain: bytes, mode: str, key: bytes = KEY, block_bytes: int = 1000) -> bytes:
    out, random = b"", np.random.default_rng(4)
    for start in range(0, len(plain), block_bytes):
        block, iv, tag = plain[start : start + block_bytes], random.bytes(16), b""
        if mode == "AES-GCM":
            encryptor = Cipher(algorithms.AES(key), modes.GCM(iv[:12])).encryptor()
            cipher = encryptor.update(block) + encryptor.finalize()
            tag = encryptor.tag
        else:
            padding = 16 - len(block) % 16
            algorithm = algorithms.SM4(key) if mode == "SM4-CBC" else algorithms.AES(key)
            cipher = Cipher(algorithm, modes.CBC(iv)).encryptor().update(block + bytes([padding]) * padding)
        header = MAGICS[mode].to_bytes(4, "little") + tag + (24 + len(cipher)).to_bytes(4, "little")
        out += header + (16).to_bytes(4, "little") + iv + len(cipher).to_bytes(4, "little") + cipher
    return out


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path / "key"


@pytest.fixture
def save(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "x.ckpt").write_bytes(content)
        return tmp_path / "x.ckpt"

    return write


def read_all(source: MindSporeFile) -> dict[str, torch.Tensor]:
    reader = FileReader()
    try:
        return {name: source.read_rows(reader, name, 0, info.shape[0]) for name, info in source.tensors.items()}
    finally:
        reader.close()


def check_whole(source: MindSporeFile) -> None:
    found = read_all(source)
    assert list(found) == list(TENSORS)
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_bytes", [100, 1000, 1 << 20])
def test_blocks_are_joined(save: Callable[[bytes], Path], key_file: Path, mode: str, block_bytes: int) -> None:
    source = MindSporeFile(save(encrypt(make_plain(), mode, block_bytes=block_bytes)), {}, key_file)
    check_whole(source)
    assert source.checksums == {}
    reader = FileReader()
    for start, stop in ((0, 1), (13, 14), (24, 60), (59, 60), (5, 5)):
        assert torch.equal(source.read_rows(reader, "first", start, stop), TENSORS["first"][start:stop])
    reader.close()


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC"])
@pytest.mark.parametrize("size", [16, 24, 32])
def test_a_key_is_bytes_or_hexadecimal_digits_with_or_without_a_newline(
    save: Callable[[bytes], Path], key_file: Path, mode: str, size: int
) -> None:
    key = bytes(range(1, size)) + b"\n"
    file = save(encrypt(make_plain(), mode, key))
    for content in (key, key + b"\n", key.hex().encode(), key.hex().upper().encode() + b"\r\n"):
        key_file.write_bytes(content)
        check_whole(MindSporeFile(file, {}, key_file))
    # 32 digits are a key as they stand, too.
    digits = key[:16].hex().encode()
    key_file.write_bytes(digits)
    assert read_keys(key_file) == [digits, key[:16]]
    check_whole(MindSporeFile(save(encrypt(make_plain(), mode, digits)), {}, key_file))


@pytest.mark.parametrize("mode", MODES)
def test_without_a_key(save: Callable[[bytes], Path], mode: str) -> None:
    with pytest.raises(CheckpointError, match=rf"is encrypted \({mode}\); give the key with --key-file"):
        MindSporeFile(save(encrypt(make_plain(), mode)), {})


@pytest.mark.parametrize("mode", MODES)
def test_another_key(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    file = save(encrypt(make_plain(), mode))
    for number in range(20):
        key_file.write_bytes(bytes([number]) * 16)
        with pytest.raises(CheckpointError, match=rf"\({mode}\) does not open with the key in .*key: give the key that it was saved with"):
            MindSporeFile(file, {}, key_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes, but a key has 16, 24 or 32"),
        (b"0123456789ABCDE", "holds 15 bytes"),
        (b"z" * 33, "holds 33 bytes"),
        (b"0" * 10_000_000, "holds 4096 or more bytes"),
    ],
)
def test_key_files_without_a_key(save: Callable[[bytes], Path], key_file: Path, content: bytes, message: str) -> None:
    key_file.write_bytes(content)
    file = save(encrypt(make_plain(), "AES-GCM"))
    with pytest.raises(CheckpointError, match=message):
        MindSporeFile(file, {}, key_file)
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file"):
        MindSporeFile(file, {}, key_file.with_name("absent"))


def test_sm4_takes_a_short_key(save: Callable[[bytes], Path], key_file: Path) -> None:
    key_file.write_bytes(b"0" * 31 + b"x")
    file = save(MAGICS["SM4-CBC"].to_bytes(4, "little") + encrypt(make_plain(), "AES-CBC", block_bytes=1 << 20)[4:])
    with pytest.raises(CheckpointError, match=r"which takes a key of 16 bytes, but .* holds a longer one"):
        MindSporeFile(file, {}, key_file)


def test_a_key_beside_a_file_that_is_not_encrypted(save: Callable[[bytes], Path], key_file: Path) -> None:
    file = save(make_plain())
    check_whole(MindSporeFile(file, {}, key_file))
    check_whole(MindSporeFile(file, {}, key_file.with_name("absent")))


@pytest.mark.parametrize("mode", MODES)
def test_a_crc_behind_the_blocks_or_inside_them(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    crc = b"crc_num" + bytes(10)
    for content in (encrypt(make_plain(), mode) + crc, encrypt(make_plain() + crc, mode)):
        source = MindSporeFile(save(content), {}, key_file)
        check_whole(source)
        assert source.checksums == {}


@pytest.mark.parametrize("mode", MODES)
def test_only_the_blocks_of_the_rows_are_decrypted(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    source, reader = MindSporeFile(save(encrypt(make_plain(), mode, block_bytes=500)), {}, key_file), FileReader()
    source.read_rows(reader, "first", 30, 31)
    if mode == "AES-GCM":
        assert reader.read_bytes == 500
        source.read_rows(reader, "first", 31, 32)
        assert reader.read_bytes == 500
    else:
        # The row, what it is rounded to, and the cipher block before it.
        assert 40 + 16 <= reader.read_bytes <= 40 + 30 + 16
    reader.close()


@pytest.mark.parametrize("mode", MODES)
def test_several_threads_read_at_once(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    source = MindSporeFile(save(encrypt(make_plain(), mode, block_bytes=300)), {}, key_file)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: check_whole(source), range(40)):
            pass


@pytest.mark.parametrize("mode", MODES)
def test_every_cut_inside_a_value_is_an_error(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    plain = make_plain()
    whole = encrypt(plain, mode, block_bytes=len(plain) // 3)
    for size in range(len(whole)):
        file = save(whole[:size])
        with pytest.raises(CheckpointError):
            MindSporeFile(file, {}, key_file)


@pytest.mark.parametrize("mode", MODES)
def test_flipped_bytes(save: Callable[[bytes], Path], key_file: Path, mode: str) -> None:
    plain = make_plain()
    whole = encrypt(plain, mode, block_bytes=len(plain) // 2 + 1)
    second, header = len(whole) // 2, 48 if mode == "AES-GCM" else 32
    places = {*range(header), *range(second - 40, second + 60), *range(0, len(whole), 7)}
    # Of AES-GCM's 16 bytes of IV 12 are used.
    unused = {start + at for start in (0, header + len(plain) // 2 + 1) for at in range(40, 44)} if mode == "AES-GCM" else set()
    for at in sorted(places - unused):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        file = save(bytes(data))
        if mode == "AES-GCM":
            with pytest.raises(CheckpointError):
                read_all(MindSporeFile(file, {}, key_file))
            continue
        try:
            read_all(MindSporeFile(file, {}, key_file))
        except CheckpointError:
            pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0, 1, 15, 17, 0x7FFFFFFF, 0xFFFFFFFF, (64 << 20) + 32])
def test_absurd_lengths(save: Callable[[bytes], Path], key_file: Path, mode: str, value: int) -> None:
    whole, length = encrypt(make_plain(), mode), 20 if mode == "AES-GCM" else 4
    for at in (length, length + 4, length + 24):
        with pytest.raises(CheckpointError):
            MindSporeFile(save(whole[:at] + value.to_bytes(4, "little") + whole[at + 4 :]), {}, key_file)
    both = whole[:length] + ((24 + value) % (1 << 32)).to_bytes(4, "little") + whole[length + 4 : length + 24] + value.to_bytes(4, "little")
    with pytest.raises(CheckpointError):
        MindSporeFile(save(both + whole[length + 28 :]), {}, key_file)


def test_a_damaged_block_is_named(save: Callable[[bytes], Path], key_file: Path) -> None:
    for mode, what in (("AES-GCM", "tag"), ("AES-CBC", "padding")):
        whole = bytearray(encrypt(make_plain(), mode))
        whole[-1] ^= 1
        with pytest.raises(CheckpointError, match=f"is damaged: the {what} of its encrypted block 4 of 4 does not fit"):
            read_all(MindSporeFile(save(bytes(whole)), {}, key_file))


def test_random_bytes_behind_a_magic_number(save: Callable[[bytes], Path], key_file: Path) -> None:
    for magic in CIPHERS:
        for size in (0, 1, 40, 4000):
            with pytest.raises(CheckpointError):
                MindSporeFile(save(magic.to_bytes(4, "little") + os.urandom(size)), {}, key_file)


def test_ranks_may_be_encrypted(tmp_path: Path, key_file: Path) -> None:
    plain = make_plain()
    for rank, content in enumerate((encrypt(plain, "AES-CBC"), plain, encrypt(plain, "AES-GCM"))):
        (tmp_path / f"ranks/rank_{rank}").mkdir(parents=True)
        (tmp_path / f"ranks/rank_{rank}/one.ckpt").write_bytes(content)
    source = MindSporeFile(tmp_path / "ranks", {}, key_file)
    check_whole(source)
    assert len(source.files) == 3


def test_the_package_is_asked_for_when_it_is_missing(
    save: Callable[[bytes], Path], key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(encrypt(make_plain(), "AES-GCM"))
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=r"needs one more package: pip install 'tandem-launcher\[encrypted\]'"):
        MindSporeFile(file, {}, key_file)


def test_a_cipher_that_openssl_was_built_without(save: Callable[[bytes], Path], key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(MAGICS["SM4-CBC"].to_bytes(4, "little") + encrypt(make_plain(), "AES-CBC", block_bytes=1 << 20)[4:])

    def refuse(key: bytes) -> None:
        raise UnsupportedAlgorithm("no SM4")

    message = r"is encrypted \(SM4-CBC\), which the installed cryptography cannot decrypt: save it again with AES-GCM"
    monkeypatch.setattr(algorithms, "SM4", refuse)
    with pytest.raises(CheckpointError, match=message):
        MindSporeFile(file, {}, key_file)
    monkeypatch.delattr(algorithms, "SM4")
    with pytest.raises(CheckpointError, match=message):
        MindSporeFile(file, {}, key_file)
