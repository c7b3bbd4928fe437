"""device.py: bfloat16 on this CPU, the first line of output, threads, the compilation cache."""

import os
import warnings
from types import SimpleNamespace

import jax
import pytest

from jax_nanogpt import device

pytestmark = pytest.mark.engine

CPU, GPU = (SimpleNamespace(platform=platform, device_kind=platform) for platform in ("cpu", "gpu"))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(flags of the CPU, XLA_FLAGS): what device.py sees from then on."""

    def set_up(instructions, xla_flags=""):
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags : fpu sse2 {instructions}\n", encoding="utf-8")
        monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
        device.has_bfloat16.cache_clear()

    yield set_up
    device.has_bfloat16.cache_clear()


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
    assert device.has_bfloat16() == expected


def test_a_machine_without_cpuinfo_has_none(machine, tmp_path):
    machine("avx512_bf16")
    (tmp_path / "cpuinfo").unlink()
    assert not device.has_bfloat16()


def test_the_first_line_says_where_bfloat16_takes_the_plain_path(machine):
    machine("avx2")
    jax_version = f"jax {jax.__version__}"
    assert device.describe([CPU], "bfloat16") == f"cpu: {jax_version} (no bfloat16 instructions: plain path)"
    assert device.describe([CPU] * 2) == device.describe([CPU] * 2, "float32") == f"2 x cpu: {jax_version}"
    assert device.describe([GPU], "bfloat16") == f"gpu: {jax_version}"
    machine("avx512_bf16")
    assert device.describe([CPU], "bfloat16") == f"cpu: {jax_version}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"^--device must be one that JAX finds here \(cpu\), got 'gpu'$"),
        ("cuda", "^--device must be one of auto, cpu, gpu, tpu, got 'cuda'$"),
    ],
)
def test_a_missing_device_is_an_error_and_not_a_cpu_run(name, message):
    with pytest.raises(ValueError, match=message):
        device.choose_devices(name)


def test_several_cpu_devices_have_threads_enough_to_wait_for_each_other(monkeypatch):
    """With XLA's own number, the larger one of cores and devices, concurrent collectives deadlock."""

    def threads(xla_flags, **more):
        monkeypatch.delenv("PJRT_NPROC", raising=False)
        for name, value in {"XLA_FLAGS": xla_flags, **more}.items():
            monkeypatch.setenv(name, value)
        device.choose_devices("cpu")
        return os.environ.get("PJRT_NPROC")

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert threads("") is None  # one device needs no more threads than cores
    assert threads("--xla_force_host_platform_device_count=1") is None
    assert threads("--xla_force_host_platform_device_count=4") == str(4 * device.THREADS_PER_DEVICE)
    assert threads("--xla_force_host_platform_device_count=4", PJRT_NPROC="7") == "7"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert threads("") == str(device.THREADS_PER_DEVICE)
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    assert threads("") == "100"


@pytest.fixture
def cache_settings(monkeypatch):
    """use_compilation_cache changes the process's settings; the test's end restores them."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_per_host_unless_jaxs_own_variable_names_it_or_home_is_read_only(cache_settings, tmp_path):
    cache_settings.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    cache_settings.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    device.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())
    cache_settings.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "home").touch()
    device.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    (tmp_path / "home").unlink()
    for host in "one", "other":
        cache_settings.setattr(device.platform, "node", lambda host=host: host)
        device.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "home" / "jax_nanogpt" / host)


def test_a_damaged_cache_entry_is_deleted_without_a_warning_and_other_warnings_are_shown(cache_settings, tmp_path):
    shown = []
    cache_settings.setattr(warnings, "showwarning", lambda message, *args, **kwargs: shown.append(str(message)))
    for name in "jit_f-123-cache", "jit_g-123-cache":
        (tmp_path / name).touch()
    device.delete_damaged_entries(tmp_path)
    warnings.showwarning("Error reading persistent compilation cache entry for 'jit_f': damaged", UserWarning, "", 1)
    warnings.showwarning("another", UserWarning, "", 1)
    assert shown == ["another"] and os.listdir(tmp_path) == ["jit_g-123-cache"]
