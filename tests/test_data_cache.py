"""The cache of made tensors: found again, checked, remade, and never half written."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
from patience import PATIENCE

pytest.importorskip("safetensors")

from trtkern.data import cache

KEY = {"name": "set", "timesteps": 4, "files": "abc"}


def tensors() -> dict[str, torch.Tensor]:
    return {"images": torch.arange(600, dtype=torch.uint8).reshape(3, 200), "labels": torch.tensor([3, 1, 2])}


class Maker:
    """Counts how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return tensors()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


def test_made_once(tmp_path):
    maker = Maker()
    first, second = (cache.cached(tmp_path / "new" / "folder", KEY, maker) for _ in range(2))
    assert maker.calls == 1 and same(first, tensors()) and same(second, tensors())
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("set-") and file.suffix == ".safetensors"


@pytest.mark.parametrize("change", [{"timesteps": 5}, {"files": "abd"}, {"more": None}])
def test_another_key_is_another_file(tmp_path, change):
    maker = Maker()
    for key in (KEY, KEY | change, dict(reversed(KEY.items()))):
        cache.cached(tmp_path, key, maker)
    assert maker.calls == 2 and len(list(tmp_path.iterdir())) == 2


def damage(file, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "bit":
        content[-5] ^= 1
    elif how == "header":
        content[8:40] = b"x" * 32
    elif how == "key":
        content = content.replace(b"abc", b"abd")
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "damaged"), ("empty", "damaged"), ("header", "damaged"), ("bit", "checksum"), ("key", "key")],
)
def test_a_damaged_file_is_named_and_made_again(tmp_path, how, message):
    maker = Maker()
    cache.cached(tmp_path, KEY, maker)
    (file,) = tmp_path.iterdir()
    damage(file, how)
    with pytest.warns(RuntimeWarning, match=f"{message}.*; making it again") as warned:
        assert same(cache.cached(tmp_path, KEY, maker), tensors())
    assert str(file) in str(warned[0].message) and maker.calls == 2
    assert same(cache.cached(tmp_path, KEY, maker), tensors()) and maker.calls == 2


def test_a_file_of_another_key_is_not_taken(tmp_path):
    maker = Maker()
    cache.cached(tmp_path, KEY, maker)
    (other,) = tmp_path.iterdir()
    cache.cached(tmp_path, KEY | {"timesteps": 5}, maker)
    (file,) = set(tmp_path.iterdir()) - {other}
    os.replace(other, file)
    with pytest.warns(RuntimeWarning, match="expected the key"):
        cache.cached(tmp_path, KEY | {"timesteps": 5}, maker)
    assert maker.calls == 3


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path):
    maker = Maker()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache that can be written.*name another one with --cache-dir"):
        cache.cached(tmp_path / "file", KEY, maker)
    assert maker.calls == 0


def test_a_full_disk_leaves_nothing(tmp_path):
    import resource
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(OSError, match=r"has room, got .*name another one with --cache-dir"):
            cache.cached(tmp_path, KEY, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    assert same(cache.cached(tmp_path, KEY, tensors), tensors())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "input or output")])
@pytest.mark.parametrize("where", ["make", "sync", "rename"])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, where, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if where != "make":
            patch.setattr(os, {"sync": "fsync", "rename": "replace"}[where], fail)
        with pytest.raises(type(error)):
            cache.cached(tmp_path, KEY, fail if where == "make" else tensors)
    assert list(tmp_path.iterdir()) == []
    maker = Maker()
    cache.cached(tmp_path, KEY, maker)
    assert maker.calls == 1


def test_two_at_once_do_not_harm_each_other(tmp_path):
    def slow():
        barrier.wait(PATIENCE)
        time.sleep(0.01)
        return tensors()

    barrier, made = threading.Barrier(4), []
    threads = [threading.Thread(target=lambda: made.append(cache.cached(tmp_path, KEY, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and all(same(one, tensors()) for one in made)
    assert len(list(tmp_path.iterdir())) == 1
    assert same(cache.cached(tmp_path, KEY, pytest.fail), tensors())


def test_the_fingerprint_sees_names_sizes_and_times_but_not_order(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("one")
        os.utime(file, ns=(10, 10))
    first = cache.fingerprint(tmp_path, files)
    assert cache.fingerprint(tmp_path, files[::-1]) == first
    os.utime(files[0], ns=(10, 11))
    changed = cache.fingerprint(tmp_path, files)
    files[0].write_text("longer")
    os.utime(files[0], ns=(10, 10))
    longer = cache.fingerprint(tmp_path, files)
    assert len({first, changed, longer, cache.fingerprint(tmp_path, files[:1])}) == 4
    with pytest.raises(FileNotFoundError):
        cache.fingerprint(tmp_path, [tmp_path / "c"])


def test_the_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "trtkern"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "not/absolute"):  # neither counts, by the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.default_folder() == tmp_path / "home" / ".cache" / "trtkern"
