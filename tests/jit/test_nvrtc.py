"""From CUDA C++ to a cubin: includes, every architecture, and each thing that may be wrong."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from awq import jit
from awq.errors import AwqError, KernelError, MissingDependencyError
from awq.jit import nvrtc
from awq.jit.launch import constant

needs_nvrtc = pytest.mark.usefixtures("nvrtc_installed")
SIZE = {"SIZE": 48}


def own_arch(name: str) -> str:
    """sm_90 -> sm_90a"""
    number = int(name.removeprefix("sm_"))
    return jit.arch_of((number // 10, number % 10))


@needs_nvrtc
def test_compiles_for_every_architecture(source: Path) -> None:
    known = jit.architectures()
    assert {"sm_75", "sm_80", "sm_90"} <= set(known)
    assert known == sorted(known, key=lambda name: int(name[3:]))
    for arch in {*known, *map(own_arch, known)}:
        compiled = jit.compile_source(source, arch, SIZE)
        assert compiled.cubin.startswith(b"\x7fELF") and b"scale" in compiled.cubin, arch
        assert compiled.log == "", arch
        assert constant(compiled.cubin, "smem_bytes") == 48 * 1024, arch


@needs_nvrtc
def test_the_log_has_warnings_and_what_ptxas_says(source: Path) -> None:
    source.write_text(source.read_text() + "int unused() { int left_over; return 1; }\n")
    assert re.search(r"scale.cu\(\d+\): warning .*left_over", jit.compile_source(source, "sm_80", SIZE).log)
    verbose = jit.compile_source(source, "sm_80", SIZE, verbose=True).log
    assert "0 bytes spill stores" in verbose and re.search(r"Used \d+ registers", verbose)


@needs_nvrtc
def test_constants_of_a_binary(tmp_path: Path) -> None:
    file = tmp_path / "numbers.cu"
    file.write_text(
        'extern "C" __device__ const int first = -7;\n'
        'extern "C" __device__ const int second = 1 << 30;\n'
        'extern "C" __device__ const long long wide = 5;\n'
        "__constant__ float other[3] = {1, 2, 3};\n"
        'extern "C" __global__ void f(float* y) { *y = other[first & 1]; }\n'
    )
    cubin = jit.compile_cubin(file, "sm_90a")
    assert [constant(cubin, name) for name in ("first", "second")] == [-7, 1 << 30]
    for name in ("third", "firs", "irst", "wide"):
        with pytest.raises(KernelError, match=f"no int called {name}"):
            constant(cubin, name)


def test_includes_come_in_once_and_beside_the_including_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "main.cu").write_text('#include "parts/a.cuh"\n  #  include "parts/b.cuh"\nmain\n#include <none>\n')
    (tmp_path / "parts" / "a.cuh").write_text('#pragma once\n#include "b.cuh"\n#include "../main.cu"\nin a\n')
    (tmp_path / "parts" / "b.cuh").write_text("in b\n")
    lines = [line for line in nvrtc.resolve(tmp_path / "main.cu").splitlines() if line]
    assert [line for line in lines if not line.startswith("#line")] == ["in b", "in a", "main", "#include <none>"]
    assert str(tmp_path) not in "".join(lines)  # a key made from the text is the same wherever the package lies


def test_a_missing_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "main.cu").write_text('#include "gone.cuh"\n')
    with pytest.raises(KernelError, match=r"The kernel source .*gone\.cuh is missing: reinstall awq-int4\.$"):
        nvrtc.resolve(tmp_path / "main.cu")


@needs_nvrtc
def test_a_compile_error_keeps_its_place(tmp_path: Path) -> None:
    """In the header's own lines, and in the source's after it."""
    (tmp_path / "main.cu").write_text('#include "a.cuh"\nint f() { return also_unknown; }\n')
    (tmp_path / "a.cuh").write_text("#pragma once\n\nint g() { return unknown; }\n")
    with pytest.raises(KernelError) as caught:
        jit.compile_cubin(tmp_path / "main.cu", "sm_90a")
    assert str(caught.value) == (
        f"main.cu does not compile for sm_90a by NVRTC {nvrtc.version()}: "
        'a.cuh(3): error: identifier "unknown" is undefined; '
        'main.cu(2): error: identifier "also_unknown" is undefined.'
    )


@needs_nvrtc
def test_ptxas_errors_are_told(tmp_path: Path) -> None:
    """What only the assembler finds: an instruction that the architecture has not."""
    file = tmp_path / "old.cu"
    file.write_text('extern "C" __global__ void f() { asm volatile("griddepcontrol.wait;"); }\n')
    with pytest.raises(KernelError, match=r"old\.cu does not compile for sm_80 .*sm_90"):
        jit.compile_cubin(file, "sm_80")
    assert jit.compile_cubin(file, "sm_90a")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_52a", "sm_999", "90"])
def test_an_unknown_architecture_is_told(source: Path, arch: str) -> None:
    with pytest.raises(KernelError, match=rf"NVRTC [\d.]+ compiles nothing for {arch}: it knows .*sm_80, .*sm_90"):
        jit.compile_cubin(source, arch, SIZE)


@pytest.mark.parametrize(
    ("capability", "arch"), [((7, 5), "sm_75"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 1), "sm_121a")]
)
def test_architecture_of_a_capability(capability: tuple[int, int], arch: str) -> None:
    assert jit.arch_of(capability) == arch


def install(monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, **versions: str) -> None:
    """A machine with these distributions, by name with _ for -, and torch for this CUDA."""
    monkeypatch.setattr(nvrtc, "_installed", lambda name: versions.get(name.replace("-", "_")))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(sys, "platform", "linux")


CORE, BINDINGS, NVRTC = {"cuda_core": "1.2.0"}, {"cuda_bindings": "13.0.1"}, {"nvidia_cuda_nvrtc": "13.0.88"}


def test_each_missing_part_is_named(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    way_out = 'pip install "awq-int4[cu13]"'
    for torch_cuda, present, reason in [
        ("13.0", {}, f"the package cuda-core is not installed: {way_out}"),
        (None, CORE, f"the package cuda-bindings is not installed: {way_out}"),
        ("12.8", {}, 'the package cuda-core is not installed: pip install "awq-int4[cu12]"'),
    ]:
        nvrtc.missing.cache_clear()
        install(monkeypatch, torch_cuda, **present)
        assert jit.missing() == reason
        for call in (jit.architectures, lambda: jit.compile_cubin(source, "sm_80", SIZE)):
            with pytest.raises(MissingDependencyError) as caught:
                call()
            assert str(caught.value) == f"No CUDA kernel can be compiled: {reason}."


def test_a_compiler_of_another_cuda_than_torchs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "12.8", **CORE, **BINDINGS, **NVRTC)
    assert jit.missing() == (
        'cuda-bindings 13.0.1 is for another CUDA than torch, which is for 12: pip install "awq-int4[cu12]"'
    )


def test_the_version_is_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "12.8", **CORE, cuda_bindings="12.9.1", nvidia_cuda_nvrtc_cu12="12.9.86", **NVRTC)
    assert jit.missing() is None
    assert nvrtc.version() == "12.9.86"


def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("Failure finding libnvrtc.so:\nnowhere")

    install(monkeypatch, "13.0", **CORE, **BINDINGS)
    monkeypatch.setattr(nvrtc, "version", fail)
    assert jit.missing() == (
        "NVRTC, CUDA's run-time compiler, does not load (Failure finding libnvrtc.so: nowhere): "
        'pip install "awq-int4[cu13]"'
    )


class Broken:
    """A module whose attributes raise what an installation does that lacks a part."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> object:
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("no libnvrtc.so"), OSError("no libnvrtc.so"), ImportError("no libnvrtc.so")]
)
def test_a_broken_installation_is_told(monkeypatch: pytest.MonkeyPatch, source: Path, error: Exception) -> None:
    install(monkeypatch, "13.0", **CORE, **BINDINGS, **NVRTC)
    told = (
        "No CUDA kernel can be compiled: NVRTC, CUDA's run-time compiler, does not load (no libnvrtc.so): "
        'pip install "awq-int4[cu13]".'
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=Broken(error)))
        nvrtc._supported.cache_clear()
        with pytest.raises(MissingDependencyError, match=re.escape(told)):
            jit.architectures()
    nvrtc._supported.cache_clear()

    def program(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(nvrtc, "architectures", lambda: ["sm_80"])
    for core in (Broken(error), SimpleNamespace(Program=program, ProgramOptions=dict)):
        monkeypatch.setitem(sys.modules, "cuda.core", core)
        with pytest.raises(MissingDependencyError, match=re.escape(told)):
            jit.compile_cubin(source, "sm_80", SIZE)


@needs_nvrtc
def test_without_its_wheel_the_library_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, real = [], metadata.version

    def no_wheel(name: str) -> str:
        if name.startswith("nvidia-cuda-nvrtc"):
            wheels.append(name)
            raise metadata.PackageNotFoundError(name)
        return real(name)

    whole = nvrtc.version()
    nvrtc.version.cache_clear()
    monkeypatch.setattr(metadata, "version", no_wheel)
    assert whole.startswith(nvrtc.version() + ".") and wheels


def test_there_is_no_cuda_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert jit.missing() == "there is no CUDA on macOS"


def test_the_room_imports_neither_torch_nor_cuda() -> None:
    program = "import sys, awq.jit; print(*sorted({'torch', 'numpy', 'cuda'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_errors_are_of_the_tree() -> None:
    assert issubclass(KernelError, AwqError) and issubclass(MissingDependencyError, AwqError)
