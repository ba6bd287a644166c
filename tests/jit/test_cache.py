"""Compiled once and kept: hits, damage, permissions, and many processes or threads at a time."""

import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from awq import jit
from awq.errors import ConfigError, KernelError
from awq.jit import cache as cache_module
from awq.jit import nvrtc
from awq.jit.cache import cache_folder, fetch, key_of

CONTENT = b"\x7fELF" + bytes(range(256)) * 40
fcntl = pytest.importorskip("fcntl")


class Maker:
    """Makes CONTENT, slowly where asked, and counts."""

    def __init__(self, seconds: float = 0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self) -> bytes:
        self.calls += 1
        time.sleep(self.seconds)
        return CONTENT


def unexpected() -> bytes:
    raise AssertionError("made again")


def test_what_is_kept_is_not_made_again(cache: Path) -> None:
    assert fetch("key", Maker()) == CONTENT
    assert fetch("key", unexpected) == CONTENT
    assert [file.name for file in (cache / "kernels").iterdir()] == ["key.cubin"]
    assert (cache / "kernels" / "key.cubin").read_bytes() == hashlib.sha256(CONTENT).digest() + CONTENT


def test_folders_and_files_are_private(cache: Path) -> None:
    before = os.umask(0)
    try:
        fetch("key", Maker())
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (cache, cache / "kernels")}
    assert modes == {0o700}
    assert (cache / "kernels" / "key.cubin").stat().st_mode & 0o777 == 0o600


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "cut in the checksum": lambda data: data[:20],
    "empty": lambda data: b"",
    "checksum alone": lambda data: data[:32],
    "another checksum": lambda data: b"\0" + data[1:],
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    fetch("key", Maker())
    file = cache / "kernels" / "key.cubin"
    file.write_bytes(damage(file.read_bytes()))
    again = Maker()
    assert fetch("key", again) == CONTENT and again.calls == 1
    assert fetch("key", unexpected) == CONTENT


def test_what_fails_is_not_kept(cache: Path) -> None:
    def fail() -> bytes:
        raise KernelError("no")

    with pytest.raises(KernelError):
        fetch("key", fail)
    assert fetch("key", Maker()) == CONTENT


@pytest.mark.parametrize("name", ["", "kernels"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(cache: Path, name: str, mode: int) -> None:
    (cache / "kernels").mkdir(parents=True, mode=0o700)
    (cache / name).chmod(mode)
    folder = str(cache / name)
    with pytest.raises(ConfigError) as caught:
        fetch("key", unexpected)
    assert str(caught.value) == f"Other users may write to the cache folder {folder}: run `chmod go-w {folder}`."
    (cache / name).chmod(mode & ~0o022)
    assert fetch("key", Maker()) == CONTENT


def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(
        ConfigError, match=rf"^The cache folder {cache} belongs to another user: set AWQ_CACHE to .*\.$"
    ):
        fetch("key", unexpected)


def test_without_a_folder_it_is_made_each_time_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "file" / "cache"))
    make = Maker()
    with caplog.at_level(logging.WARNING, "awq"):
        assert [fetch(key, make) for key in ("one", "two", "one")] == [CONTENT] * 3
    assert make.calls == 3
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == (
        f"The cache folder {tmp_path / 'file' / 'cache'} cannot be written (Not a directory), "
        "so kernels are compiled at every start: set AWQ_CACHE to another."
    )


def test_a_full_disk_is_said_once_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    make = Maker()
    with caplog.at_level(logging.WARNING, "awq"):
        assert [fetch(key, make) for key in ("one", "two")] == [CONTENT] * 2
    assert make.calls == 2 and len(caplog.records) == 1 and "No space left" in caplog.text
    assert list((cache / "kernels").iterdir()) == []


def test_a_folder_that_may_only_be_read_serves_what_it_has(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by its mode, which does not bind root."""

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    fetch("old", Maker())
    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", denied)
    assert fetch("old", unexpected) == CONTENT and caplog.text == ""
    make = Maker()
    assert [fetch(key, make) for key in ("new", "newer", "new")] == [CONTENT] * 3
    assert make.calls == 3 and len(caplog.records) == 1 and "Permission denied" in caplog.text


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"AWQ_CACHE": "own"}, "own"),
        ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/awq"),
        ({"HOME": "home"}, "home/.cache/awq"),
        ({"HOME": "home", "AWQ_CACHE": ""}, "home/.cache/awq"),
    ],
)
def test_where_the_cache_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    for name in ("AWQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache_folder("kernels") == tmp_path / place / "kernels"
    assert (tmp_path / place / "kernels").is_dir()


def test_keys_tell_everything_apart() -> None:
    keys = [key_of("a", "b"), key_of("ab"), key_of("a", "b", ""), key_of("b", "a"), key_of("a", {"x": 1})]
    assert len({*keys}) == len(keys) and key_of("a", {"x": 1}) == keys[-1]


def test_threads_wait_for_the_one_that_makes_it(cache: Path) -> None:
    make = Maker(0.05)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fetch("key", make), range(8))) == [CONTENT] * 8
    assert make.calls == 1


def hold(file: Path, ready: "multiprocessing.synchronize.Event") -> None:
    """Take a key's lock, and keep it."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    ready.set()
    time.sleep(60)


def test_a_holder_that_dies_blocks_nobody(cache: Path) -> None:
    (cache / "kernels").mkdir(parents=True, mode=0o700)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(cache / "kernels" / "key.lock", ready))
    holder.start()
    assert ready.wait(60)
    waiting: list[bytes] = []
    thread = threading.Thread(target=lambda: waiting.append(fetch("key", Maker())))
    thread.start()
    thread.join(0.1)
    assert not waiting
    holder.kill()
    thread.join(30)
    holder.join()
    assert waiting == [CONTENT]


def test_a_holder_that_hangs_is_waited_for_only_so_long(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PATIENCE_S", 0.05)
    with cache_module._locked(cache_folder("kernels") / "key.lock"):  # type: ignore[operator]
        assert fetch("key", Maker()) == CONTENT
    assert fetch("key", unexpected) == CONTENT


def test_a_file_system_without_locks_is_no_obstacle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert fetch("key", Maker()) == CONTENT
    assert fetch("key", unexpected) == CONTENT


CHILD = """
import sys, time
from pathlib import Path
from awq import jit
from awq.jit import nvrtc

place, ready = Path(sys.argv[1]), Path(sys.argv[2])
nvrtc._torch_major = lambda: None  # torch takes seconds to import, and is not needed here
compile_text = nvrtc.compile_text

def counted(text, name, arch, defines):
    (place / f"{defines['SIZE']}-{sys.argv[2].rpartition('/')[2]}.made").touch()
    return compile_text(text, name, arch, defines)

nvrtc.compile_text = counted
ready.touch()
while not (place / "go").exists():
    time.sleep(0.001)
for size in (1, 2):
    jit.prefetch([(place / "scale.cu", "scale", "sm_80", {"SIZE": size})])
for size in (1, 2):
    cubin = jit._cubin(jit._unit(place / "scale.cu", "sm_80", {"SIZE": size}))
    assert jit.launch.constant(cubin, "smem_bytes") == 1024 * size
print("right")
"""


@pytest.mark.usefixtures("nvrtc_installed")
def test_sixteen_processes_on_an_empty_cache(tmp_path: Path, source: Path, cache: Path) -> None:
    """Each gets the right binary, and each source is compiled once."""
    ready = [tmp_path / f"ready{index}" for index in range(16)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(source.parent), str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for file in ready
    ]
    end = time.monotonic() + 60
    while not all(file.exists() for file in ready) and time.monotonic() < end:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    done = [child.communicate(timeout=60) for child in children]
    assert [out.split() for out, _ in done] == [[b"right"]] * 16, done
    assert sorted(file.name[:2] for file in tmp_path.glob("*.made")) == ["1-", "2-"]
    assert sorted(file.suffix for file in (cache / "kernels").iterdir()) == [".cubin", ".cubin"]


@pytest.mark.usefixtures("nvrtc_installed")
def test_each_thing_that_makes_a_binary_is_in_its_key(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> int:
        nvrtc.source_text.cache_clear()
        jit._cubin(jit._unit(source, arch, defines))
        jit._running.clear()
        return len(list((cache / "kernels").iterdir()))

    (source.parent / "part.cuh").write_text("// one\n")
    arch, defines = "sm_80", {"SIZE": 1}
    assert entries() == 1 and entries() == 1
    defines = {"SIZE": 2}
    assert entries() == 2
    arch = "sm_86"
    assert entries() == 3
    source.write_text('#include "part.cuh"\n' + source.read_text())
    assert entries() == 4
    (source.parent / "part.cuh").write_text("// two\n")
    assert entries() == 5
    monkeypatch.setattr(nvrtc, "version", lambda: "13.99")
    assert entries() == 6
    monkeypatch.setitem(nvrtc.OPTIONS, "std", "c++20")
    assert entries() == 7 and entries() == 7
