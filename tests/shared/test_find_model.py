"""find_model: by name, by folder, from the cache, from a hub (a real client against a local server), and offline."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from shared import tokenizer
from shared.tokenizer import byte_of_character, find_model

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
OFFLINE = "gpt2 is not in the local cache and HF_HUB_OFFLINE is set"
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


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_is_found_as_it_is(tmp_path, weights):
    folder = make_model(tmp_path / "ein Modell 我")
    (folder / "model.safetensors").rename(folder / weights)
    assert find_model(str(folder)) == (str(folder), folder, "a folder")


def test_nano_is_in_the_repository():
    assert find_model("gpt2-nano") == ("gpt2-nano", ROOT / "checkpoints" / "gpt2-nano", "in the repository")


@pytest.mark.parametrize("name", ["", "gpt3", "GPT2", "\0", "x" * 5000, "\ud800", "gpt2-nano/", "/dev/null", "./gpt2"])
def test_another_name_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^model must be gpt2, .*, gpt2-nano or a folder, got '") as error:
        find_model(name)
    assert str(error.value).isprintable()


def test_an_incomplete_folder_says_what_it_lacks(tmp_path):
    folder = make_model(tmp_path / "part")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="part must hold model.safetensors or model.safetensors.index.json: "):
        find_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="part must hold config.json"):
        find_model(str(folder))


# -- the hub and its cache: the real client, with other settings


@pytest.fixture
def hub_settings(tmp_path, monkeypatch):
    """Sets the client's constants, which it reads from the environment once, at import."""

    def put(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    put(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE=True)
    monkeypatch.setattr(tokenizer, "CHECKPOINTS", tmp_path / "checkpoints")
    return put


@pytest.fixture
def nano(hub_settings, tmp_path):
    return make_model(tmp_path / "checkpoints" / "gpt2-nano")


class NoNetwork:
    """No host answers while the test runs. Only 0.01 s pass of each time-out."""

    def __init__(self):
        self.ended, self.waits = threading.Event(), []

    def hang(self, *_, **__):
        assert threading.current_thread() is not threading.main_thread(), "the main thread waits without a limit"
        self.ended.wait()
        raise OSError("the test has ended")

    def within(self, seconds, call, within=tokenizer._within):
        self.waits.append(seconds)
        return within(0.01, call)


@pytest.fixture
def no_network(monkeypatch):
    network = NoNetwork()
    monkeypatch.setattr(socket, "getaddrinfo", network.hang)
    monkeypatch.setattr(tokenizer, "_within", network.within)
    yield network
    network.ended.set()


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
@pytest.mark.parametrize("offline", [False, True])
def test_the_local_cache_is_enough(tmp_path, hub_settings, no_network, repo, offline):
    hub_settings(HF_HUB_OFFLINE=offline)
    snapshot = put_in_cache(tmp_path, repo)
    for name in ("gpt2", None):
        assert find_model(name) == ("gpt2", snapshot, "in the local cache")
    assert no_network.waits == []


def test_the_environment_says_where_the_cache_is_and_that_the_hub_is_not_asked(tmp_path):
    snapshot = put_in_cache(tmp_path, "gpt2")
    code = "from shared.tokenizer import find_model\nprint(find_model('gpt2').folder)\nfind_model('gpt2-xl')"
    system = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}  # Windows needs both
    env = system | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8")
    assert result.stdout == f"{snapshot}\n"
    last = result.stderr.splitlines()[-1]
    assert last == "ValueError: gpt2-xl is not in the local cache and HF_HUB_OFFLINE is set"


def test_half_a_model_in_the_cache_is_not_enough(tmp_path, hub_settings):
    put_in_cache(tmp_path, "gpt2", ["config.json"])
    with pytest.raises(ValueError, match=f"^{OFFLINE}$"):
        find_model("gpt2")


def test_a_cached_model_without_a_tokenizer_is_not_the_default(tmp_path, nano, no_network, monkeypatch):
    """By name it is found: the user may have a tokenizer elsewhere."""
    put_in_cache(tmp_path, "gpt2", ["config.json", "model.safetensors"])
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    by_default = find_model(None)
    assert by_default[:2] == ("gpt2-nano", nano)
    assert by_default.why.startswith("GPT-2's tokenizer is not in a local cache")
    assert sum(no_network.waits) < 3
    assert find_model("gpt2").why == "in the local cache"


def test_without_any_model_the_error_names_both(hub_settings):
    with pytest.raises(ValueError, match=f"^{OFFLINE}, and .*gpt2-nano must hold config.json"):
        find_model(None)


def test_without_cache_and_network_the_default_is_nano_and_says_why(nano):
    assert find_model(None) == ("gpt2-nano", nano, OFFLINE)
    with pytest.raises(ValueError, match=f"^{OFFLINE}$"):
        find_model("gpt2")


@pytest.mark.parametrize("hangs", ["getaddrinfo", "create_connection"])
def test_a_network_that_hangs_delays_by_under_three_seconds(nano, hub_settings, no_network, monkeypatch, hangs):
    hub_settings(HF_HUB_OFFLINE=False)
    monkeypatch.setattr(socket, hangs, no_network.hang)
    why = "gpt2 is not in the local cache and cannot be fetched (no answer within 0.01 s)"
    assert find_model(None) == ("gpt2-nano", nano, why)
    assert 0 < sum(no_network.waits) < 3


def test_a_name_that_does_not_resolve_is_the_reason(nano, hub_settings, monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    hub_settings(HF_HUB_OFFLINE=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    why = "gpt2 is not in the local cache and cannot be fetched ([Errno -2] Name or service not known)"
    assert find_model(None) == ("gpt2-nano", nano, why)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client uses."""

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
                self.server.ended.wait()
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
def hub(hub_settings):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched, server.asked, server.ended = [], threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    hub_settings(HF_HUB_OFFLINE=False, ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template)
    hub_settings(HF_HUB_DISABLE_XET=True, HF_HUB_DOWNLOAD_TIMEOUT=60)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_and_then_in_the_cache(hub):
    first, second = find_model(None), find_model("gpt2")
    assert (first.name, first.why) == ("gpt2", "downloaded from the hub")
    assert second == ("gpt2", first.folder, "in the local cache")
    assert sorted(os.listdir(first.folder)) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert (first.folder / "model.safetensors").read_bytes() == b"weights"
    assert "pytorch_model.bin" not in hub.fetched


@pytest.mark.parametrize(("mode", "says"), [("portal", "cannot be fetched"), ("breaks", "could not be downloaded")])
def test_a_hub_that_fails_leaves_nano_and_the_reason(hub, nano, hub_settings, monkeypatch, mode, says):
    monkeypatch.setattr(Hub, "mode", mode)
    monkeypatch.setattr(time, "sleep", lambda s: None)  # between the client's five attempts
    found = find_model(None)
    assert found[:2] == ("gpt2-nano", nano) and says in found.why
    with pytest.raises(ValueError, match=f"^gpt2 .*{says} ") as error:
        find_model("gpt2")
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_ctrl_c_ends_a_download_that_hangs_and_the_next_one_is_whole(tmp_path, hub, monkeypatch):
    """The client itself would wait for its threads until the last byte has arrived."""
    monkeypatch.setattr(Hub, "mode", "hangs")
    code = "import sys\nfrom shared.tokenizer import find_model\n"
    code += "try: find_model('gpt2')\nexcept KeyboardInterrupt: sys.exit(130)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    assert hub.asked.wait(120)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130  # the hub sends nothing until the test has ended
    monkeypatch.setattr(Hub, "mode", "whole")
    found = find_model("gpt2")
    assert found.why == "downloaded from the hub" and (found.folder / "model.safetensors").read_bytes() == b"weights"


def test_a_cache_that_cannot_be_read_is_the_reason_for_nano(tmp_path, nano):
    """For example another user's. A file in place of a folder is one that root cannot read either."""
    (tmp_path / "hub" / "models--openai-community--gpt2").mkdir(parents=True)
    (tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots").write_bytes(b"")
    found = find_model(None)
    assert found[:2] == ("gpt2-nano", nano)
    with pytest.raises(ValueError, match="^gpt2 is in the local cache, which cannot be read: ") as error:
        find_model("gpt2")
    assert str(error.value) == found.why and found.why.isprintable()
