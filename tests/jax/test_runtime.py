"""runtime.py: bfloat16 on this CPU, the first line of output, threads, the compilation cache."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jax_nanogpt import runtime

pytestmark = pytest.mark.engine

ROOT = Path(runtime.__file__).parents[1]
CPU, GPU = (SimpleNamespace(platform=platform, device_kind=platform) for platform in ("cpu", "gpu"))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(flags of the CPU, XLA_FLAGS): what runtime.py sees from then on."""

    def set_up(instructions, xla_flags=""):
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags : fpu sse2 {instructions}\n", encoding="utf-8")
        monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
        runtime.has_bfloat16.cache_clear()

    yield set_up
    runtime.has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "xla_flags", "expected"),
    [
        ("avx2 avx512f avx512_bf16", "", True),
        ("avx2 avx512f amx_bf16", "", True),
        ("avx2 avx512f avx512_vnni", "", False),
        ("avx2", "", False),
        ("avx512_bf16 amx_bf16", "--xla_cpu_max_isa=AVX2", False),
        ("avx512_bf16 amx_bf16", "--xla_cpu_max_isa=AVX512", False),
        ("avx512_bf16 amx_bf16", "--xla_dump_to=x --xla_cpu_max_isa=AVX512_BF16", True),
        ("avx512_bf16 amx_bf16", "--xla_cpu_max_isa=amx", True),
        ("avx512_bf16", "--xla_cpu_max_isa=AMX --xla_cpu_max_isa=AVX2", False),  # the last one counts
        ("avx2", "--xla_cpu_max_isa=AMX", False),  # it is only a limit
    ],
)
def test_bfloat16_is_what_the_cpu_has_and_xla_may_use(instructions, xla_flags, expected, machine):
    machine(instructions, xla_flags)
    assert runtime.has_bfloat16() == expected


def test_a_machine_without_cpuinfo_has_none(machine, tmp_path):
    machine("avx512_bf16")
    (tmp_path / "cpuinfo").unlink()
    assert not runtime.has_bfloat16()


def test_the_first_line_says_where_bfloat16_takes_the_plain_path(machine):
    machine("avx2")
    jax_version = f"jax {jax.__version__}"
    assert runtime.describe([CPU], "bfloat16") == f"cpu: {jax_version} (no bfloat16 instructions: plain path)"
    assert runtime.describe([CPU] * 2) == runtime.describe([CPU] * 2, "float32") == f"2 x cpu: {jax_version}"
    assert runtime.describe([GPU], "bfloat16") == f"gpu: {jax_version}"
    machine("avx512_bf16")
    assert runtime.describe([CPU], "bfloat16") == f"cpu: {jax_version}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"^--device must be one that JAX finds here \(cpu\), got 'gpu'$"),
        ("cuda", "^--device must be one of auto, cpu, gpu, tpu, got 'cuda'$"),
    ],
)
def test_a_missing_device_is_an_error_and_not_a_cpu_run(name, message):
    with pytest.raises(ValueError, match=message):
        runtime.choose_devices(name)


STARTED = """
import sys
from jax_nanogpt import runtime
{before}
runtime.choose_devices("cpu")
import jax
from jax._src import xla_bridge
print(*xla_bridge.backends(), jax.devices()[0].platform)
"""


def started(before, **variables):
    """A process that chooses the CPU: its exit status, what it printed, its errors."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", STARTED.format(before=before)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
    return result.returncode, result.stdout, result.stderr


def test_the_cpu_starts_no_other_device():
    """Another one would be a GPU's, whose memory JAX takes: here it is one that cannot be started."""
    assert started("", JAX_PLATFORMS="cpu,tpu")[:2] == (0, "cpu cpu\n")


def test_deterministic_ops_are_a_flag_that_xla_knows_and_reads():
    """XLA ends the process for a flag that it does not know."""
    assert started("runtime.use_deterministic_ops()")[0] == 0
    spoil = "runtime.use_deterministic_ops(); runtime.os.environ['XLA_FLAGS'] += '_or_so'"
    status, _, errors = started(spoil)
    assert status != 0 and "xla_gpu_deterministic_ops" in errors


def test_several_cpu_devices_have_threads_enough_to_wait_for_each_other(monkeypatch):
    """With XLA's own number, the larger one of cores and devices, concurrent collectives deadlock."""

    def threads(xla_flags, **more):
        monkeypatch.delenv("PJRT_NPROC", raising=False)
        for name, value in {"XLA_FLAGS": xla_flags, **more}.items():
            monkeypatch.setenv(name, value)
        runtime.choose_devices("cpu")
        return os.environ.get("PJRT_NPROC")

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert threads("") is None  # one device needs no more threads than cores
    assert threads("--xla_force_host_platform_device_count=1") is None
    assert threads("--xla_force_host_platform_device_count=4") == str(4 * runtime.THREADS_PER_DEVICE)
    assert threads("--xla_force_host_platform_device_count=4", PJRT_NPROC="7") == "7"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert threads("") == str(runtime.THREADS_PER_DEVICE)
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    assert threads("") == "100"


@pytest.fixture
def cache_settings(monkeypatch, tmp_path):
    """use_compilation_cache changes the process's settings; the test's end restores them."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def cache_folder():
    runtime.use_compilation_cache()
    return Path(jax.config.jax_compilation_cache_dir)


def test_jaxs_own_variable_names_the_cache(cache_settings, tmp_path):
    cache_settings.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    before = Path(jax.config.jax_compilation_cache_dir)
    assert cache_folder() == before and not list(tmp_path.iterdir())


def test_the_cache_is_shared_by_hosts_with_the_same_cpu_and_by_no_others(cache_settings, machine, tmp_path):
    folders = []
    for host, instructions in ("one", "avx2"), ("other", "avx2"), ("other", "avx2 avx512f"):
        cache_settings.setattr(runtime.platform, "node", lambda host=host: host)
        machine(instructions)
        folders.append(cache_folder())
    assert folders[0] == folders[1] != folders[2]
    assert {folder.parent for folder in folders} == {tmp_path / "home" / "jax_nanogpt"}


def test_where_home_cannot_be_written_or_is_unknown_the_cache_is_a_temporary_folder(cache_settings, tmp_path):
    private = tmp_path / f"cache-{os.getuid()}" / "jax_nanogpt"
    cache_settings.setattr(runtime.tempfile, "gettempdir", lambda: str(tmp_path))
    with cache_settings.context() as change:  # a read-only home, also for root
        change.setattr(runtime.os, "access", lambda folder, mode: private in folder.parents)
        assert cache_folder().parent == private and private.parent.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").touch()
    assert cache_folder().parent == private
    cache_settings.delenv("XDG_CACHE_HOME")
    cache_settings.setattr(runtime.Path, "home", no_home)
    assert cache_folder().parent == private
    owner = os.getuid()
    cache_settings.setattr(runtime.os, "getuid", lambda: owner + 1)
    private.parent.rename(tmp_path / f"cache-{os.getuid()}")  # which another user has made
    before = jax.config.jax_compilation_cache_dir
    runtime.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_damaged_cache_entry_is_deleted_without_a_warning_and_other_warnings_are_shown(cache_settings, tmp_path):
    shown = []
    cache_settings.setattr(warnings, "showwarning", lambda message, *args, **kwargs: shown.append(str(message)))
    for name in "jit_f-123-cache", "jit_g-123-cache":
        (tmp_path / name).touch()
    runtime.delete_damaged_entries(tmp_path)
    warnings.showwarning("Error reading persistent compilation cache entry for 'jit_f': damaged", UserWarning, "", 1)
    warnings.showwarning("another", UserWarning, "", 1)
    assert shown == ["another"] and os.listdir(tmp_path) == ["jit_g-123-cache"]


def test_of_a_large_cache_the_entries_read_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "CACHE_BYTES", 25)
    for read_s, name in enumerate(["d", "a", "c", "b"]):
        (tmp_path / f"{name}-cache").write_bytes(bytes(10))
        os.utime(tmp_path / f"{name}-cache", (read_s, 9 - read_s))
    runtime.delete_old_entries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["b-cache", "c-cache"]
