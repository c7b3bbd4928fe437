"""find_model: by name, by folder, from the cache, from a hub (a real client against a local server), and offline."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared import tokenizer
from shared.tokenizer import byte_of_character, find_model

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
FILES = {
    "config.json": b'{"model_type": "gpt2", "vocab_size": 50257}',
    "model.safetensors": b"weights",
    "vocab.json": json.dumps({token: id for id, token in enumerate([*byte_of_character(), "<|endoftext|>"])}).encode(),
    "merges.txt": b"#version: 0.2\n",
    "pytorch_model.bin": b"a pickle that nobody should fetch",
}


def make_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(FILES[name])
    return folder


# -- folders


def test_a_folder_is_found_as_it_is(tmp_path):
    folder = make_model(tmp_path / "ein Modell 我")
    assert find_model(str(folder)) == (str(folder), folder, "a folder")


def test_weights_in_several_files_are_a_model_too(tmp_path):
    folder = make_model(tmp_path / "large")
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    assert find_model(str(folder)).folder == folder


def test_nano_lives_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "CHECKPOINTS", tmp_path)
    with pytest.raises(ValueError, match="model gpt2-nano is missing from "):
        find_model("gpt2-nano")
    folder = make_model(tmp_path / "gpt2-nano")
    assert find_model("gpt2-nano") == ("gpt2-nano", folder, "in the repository")


@pytest.mark.parametrize("name", ["", "gpt3", "GPT2", "\0", "x" * 5000, "\ud800", "gpt2-nano/", "/dev/null", "./gpt2"])
def test_what_is_neither_a_name_nor_a_folder_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is neither one of gpt2, .*, gpt2-nano nor a folder") as error:
        find_model(name)
    assert str(error.value).isprintable()


def test_a_folder_without_a_part_says_which(tmp_path):
    folder = make_model(tmp_path / "part")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a folder without model.safetensors or model.safetensors.index.json"):
        find_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="is a folder without config.json"):
        find_model(str(folder))


# -- the hub and its cache, in a process of its own: the client reads its settings once, at import


def find(*names, setup="", nano=None, **environment):
    """Each name's (name, folder, why), or its error, and the seconds it took."""
    script = (
        "import json, sys, time, pathlib; import shared.tokenizer as t\n"
        f"{setup}\n"
        f"t.CHECKPOINTS = pathlib.Path({str(nano)!r})\n"
        f"for name in {names!r}:\n"
        "    start = time.perf_counter()\n"
        "    try: found = t.find_model(name)\n"
        "    except ValueError as error: found = [str(error)]\n"
        "    print(json.dumps([*map(str, found), time.perf_counter() - start]))\n"
    )
    system = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}  # Windows needs both
    env = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **system, **environment}
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 60
    return [json.loads(line) for line in result.stdout.splitlines()]


def put_in_cache(home, repo, files=("config.json", "model.safetensors", "vocab.json", "merges.txt")):
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for name in files:
        (snapshot / name).write_bytes(FILES[name])
    return snapshot


@pytest.mark.parametrize("repo", ["gpt2", "openai-community/gpt2"])
def test_the_local_cache_is_enough(tmp_path, repo):
    snapshot = put_in_cache(tmp_path, repo)
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        for name in ("gpt2", None):
            [found] = find(name, HF_HOME=str(tmp_path), **environment)
            assert found[:3] == ["gpt2", str(snapshot), "in the local cache"]


def test_half_a_model_in_the_cache_is_none(tmp_path):
    put_in_cache(tmp_path, "gpt2", ["config.json"])
    [[error, _]] = find("gpt2", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert error == "gpt2 is not in the local cache and HF_HUB_OFFLINE is set"


def test_a_cached_model_without_a_tokenizer_is_not_the_default(tmp_path):
    """By name it is found: who asks for it may have a tokenizer elsewhere."""
    put_in_cache(tmp_path, "gpt2", ["config.json", "model.safetensors"])
    nano = make_model(tmp_path / "checkpoints" / "gpt2-nano")
    setup = "t.find_spec = lambda name: None"
    cache = {"HF_HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    by_default, by_name = find(None, "gpt2", setup=setup, nano=nano.parent, **cache)
    assert by_default[0] == "gpt2-nano"
    assert by_default[2].startswith("GPT-2's tokenizer is in no cache")
    assert by_name[2] == "in the local cache"


def test_without_any_model_the_error_names_both(tmp_path):
    [[error, _]] = find(None, nano=tmp_path / "nowhere", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert error.startswith("gpt2 is not in the local cache and HF_HUB_OFFLINE is set, and model gpt2-nano is missing")


def test_without_cache_and_network_the_default_is_nano_and_says_why(tmp_path):
    nano = make_model(tmp_path / "checkpoints" / "gpt2-nano")
    by_default, by_name = find(None, "gpt2", nano=nano.parent, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    why = "gpt2 is not in the local cache and HF_HUB_OFFLINE is set"
    assert by_default[:3] == ["gpt2-nano", str(nano), why]
    assert by_name[0] == why


@pytest.mark.parametrize(
    "network",
    [
        "import socket; socket.getaddrinfo = lambda *a, **k: time.sleep(60)",
        "import socket; socket.create_connection = lambda *a, **k: time.sleep(60)",
        "import socket\ndef refuse(*a, **k): raise OSError('[Errno -2] Name or service not known')\n"
        "socket.getaddrinfo = refuse",
    ],
    ids=["name look-up hangs", "connection hangs", "no such name"],
)
def test_deciding_takes_under_three_seconds_without_a_network(tmp_path, network):
    nano = make_model(tmp_path / "checkpoints" / "gpt2-nano")
    for name, folder, why, seconds in find(None, setup=network, nano=nano.parent, HF_HOME=str(tmp_path)):
        assert (name, folder) == ("gpt2-nano", str(nano))
        assert why.startswith("gpt2 is not in the local cache and cannot be fetched (")
        assert seconds < 3


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client asks for."""

    mode = "whole"

    def do_GET(self):
        path = self.path.partition("?")[0]
        repo = "/openai-community/gpt2"
        if self.mode == "portal":
            self.answer(b"<html>Please accept our terms</html>")
        elif path == f"/api/models{repo}/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": repo[1:], "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models{repo}/tree/{COMMIT}":
            files = [{"type": "file", "path": n, "size": len(c), "oid": f"{n:0>40}"} for n, c in FILES.items()]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"{repo}/resolve/") and path.rpartition("/")[2] in FILES:
            name = path.rpartition("/")[2]
            self.server.fetched.append(name)
            broken = self.mode == "breaks" and name == "model.safetensors"
            if self.mode == "hangs" and name == "model.safetensors" and self.command == "GET":
                self.server.asked.set()
                self.server.ended.wait(60)
            self.answer(FILES[name], len(FILES[name]) + 1000 * broken)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body, size=None):
        self.send_response(200)
        self.send_header("Content-Length", str(size or len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched, server.asked, server.ended = [], threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def test_the_hubs_model_is_downloaded_once_and_then_in_the_cache(tmp_path, hub):
    first, second = find(None, "gpt2", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert (first[0], first[2]) == ("gpt2", "downloaded from the hub")
    assert second[:3] == ["gpt2", first[1], "in the local cache"]
    assert sorted(os.listdir(first[1])) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert Path(first[1], "model.safetensors").read_bytes() == b"weights"
    assert "pytorch_model.bin" not in hub.fetched


@pytest.mark.parametrize(("mode", "says"), [("portal", "cannot be fetched"), ("breaks", "could not be downloaded")])
def test_a_hub_that_fails_leaves_nano_and_the_reason(tmp_path, hub, monkeypatch, mode, says):
    monkeypatch.setattr(Hub, "mode", mode)
    nano = make_model(tmp_path / "checkpoints" / "gpt2-nano")
    setup = "import huggingface_hub.constants as c; c.HF_HUB_DOWNLOAD_TIMEOUT = 1"
    by_default, by_name = find(None, "gpt2", setup=setup, nano=nano.parent, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert by_default[0] == "gpt2-nano"
    assert says in by_default[2]
    assert says in by_name[0]
    assert "\n" not in by_name[0]


def test_ctrl_c_ends_a_download_that_hangs_and_the_next_one_is_whole(tmp_path, hub, monkeypatch):
    """The client's own threads would be waited for, until the last byte is there."""
    monkeypatch.setattr(Hub, "mode", "hangs")
    code = "import os\nfrom shared.tokenizer import find_model\n"
    code += "try: find_model('gpt2')\nexcept KeyboardInterrupt: os._exit(130)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    assert hub.asked.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    monkeypatch.setattr(Hub, "mode", "whole")
    (found,) = find("gpt2", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert found[2] == "downloaded from the hub" and Path(found[1], "model.safetensors").read_bytes() == b"weights"


def test_a_cache_that_cannot_be_read_is_a_reason_for_nano(tmp_path):
    """Another user's, say; a file in the place of a folder is one that root cannot read either."""
    (tmp_path / "hub" / "models--openai-community--gpt2").mkdir(parents=True)
    (tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots").write_bytes(b"")
    nano = make_model(tmp_path / "checkpoints" / "gpt2-nano")
    by_default, by_name = find(None, "gpt2", nano=nano.parent, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert by_default[0] == "gpt2-nano" and by_default[2] == by_name[0]
    assert by_name[0].startswith("gpt2 is in the local cache, which cannot be read: ") and "\n" not in by_name[0]
