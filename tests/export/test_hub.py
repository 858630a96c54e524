"""Exports are pushed to a stand-in of the Hub on this machine; a failure is one sentence, with nothing half done."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lit_sparse.cli import run as run_command
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from tests.export.test_folder import METHODS, Run, files, lora, make_run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub to httpx

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """State of the stand-in: repositories with their files, and the status it answers a path with."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def answer(self, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        """Return status and JSON of the answer to a request."""
        for part, status in self.refusals.items():
            if part in path:
                return status, {"error": "refused"}
        if path.startswith("/lfs/"):
            self.uploads[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            return 200, {"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return 200, self.commit(name, body)
        return 200, {"id": name, "modelId": name, "private": False, "tags": [], "siblings": [], "sha": "0" * 40}

    def create(self, wish: dict[str, Any]) -> tuple[int, Any]:
        """Make a repository."""
        name = f"{wish.get('organization', 'user')}/{wish['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        self.repositories[name], self.private[name] = (
            {},
            bool(wish.get("private")) or wish.get("visibility") == "private",
        )
        return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}

    def mode(self, path: str) -> dict[str, Any]:
        """Say how a file is to be uploaded: weights through LFS, all else in the commit."""
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def batch(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Say where each file of LFS is to be put."""
        actions = [{"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}} for one in wish["objects"]]
        objects = [{**one, "actions": action} for one, action in zip(wish["objects"], actions, strict=True)]
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, body: bytes) -> dict[str, Any]:
        """Add files to a repository."""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.uploads[value["oid"]]
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/0", "hookOutput": ""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the Hub that this process pushes to, with a token that it knows."""
    stand_in = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            path, token = self.path.split("?")[0], self.headers.get("Authorization")
            status, said = stand_in.answer(path, token, self.read_body())
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(data)

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Read from the environment (HF_ENDPOINT, HF_HUB_DISABLE_XET) when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield stand_in
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def smt(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("pushed"), "llama", METHODS["smt"])


def test_a_folder_is_pushed_whole(hub: Hub, smt: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    run_command(["export", str(smt.folder), "--output", str(output), "--push", "user/tuned", "--private"])
    pushed = hub.repositories["user/tuned"]
    assert pushed == {path.relative_to(output).as_posix(): path.read_bytes() for path in files(output)}
    assert {"README.md", "config.json", "model.safetensors"} <= pushed.keys()
    assert hub.private["user/tuned"]
    assert f"{hub.url}/user/tuned" in capsys.readouterr().out


def test_a_delta_is_pushed_with_its_card(hub: Hub, smt: Run, tmp_path: Path) -> None:
    output = export(smt.folder, "delta", tmp_path / "delta.safetensors", push="user/delta")
    card = (tmp_path / "delta.safetensors.md").read_bytes()
    assert hub.repositories["user/delta"] == {"delta.safetensors": output.read_bytes(), "README.md": card}
    assert not hub.private["user/delta"]


def test_an_adapter_is_pushed(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", lora(target_modules=["q_proj"]))
    export(run.folder, "adapter", push="user/adapter")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.repositories["user/adapter"].keys()


def test_a_repository_that_exists_is_kept_unless_told(hub: Hub, smt: Run, tmp_path: Path) -> None:
    hub.repositories["user/tuned"] = {"thesis.tex": b"x"}
    with pytest.raises(BadInput, match=r"there is a repository of that name already.*--overwrite"):
        export(smt.folder, output=tmp_path / "out", push="user/tuned")
    assert hub.repositories["user/tuned"] == {"thesis.tex": b"x"}
    assert not files(tmp_path)
    export(smt.folder, output=tmp_path / "out", push="user/tuned", overwrite=True)
    assert {"thesis.tex", "README.md"} <= hub.repositories["user/tuned"].keys()


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "user/", "user/a b", "https://huggingface.co/user/tuned"])
def test_names_that_are_none(name: str, hub: Hub, smt: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="names no repository of the Hub"):
        export(smt.folder, output=tmp_path / "out", push=name)
    assert not files(tmp_path)


def test_no_token(hub: Hub, smt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(BadInput, match="needs a token of the Hub; log in with hf auth login"):
        export(smt.folder, output=tmp_path / "out", push="user/tuned")
    assert not files(tmp_path)


def test_a_wrong_token(hub: Hub, smt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadInput, match="the token is not valid"):
        export(smt.folder, output=tmp_path / "out", push="user/tuned")
    assert not files(tmp_path)


def test_no_network(hub: Hub, smt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="the Hub cannot be reached"):
        export(smt.folder, output=tmp_path / "out", push="user/tuned")
    assert not files(tmp_path)


def test_no_right_to_make_it(hub: Hub, smt: Run, tmp_path: Path) -> None:
    hub.refusals["/api/repos/create"] = 403
    with pytest.raises(BadInput, match="the token may not write there"):
        export(smt.folder, output=tmp_path / "out", push="other/tuned")
    assert not files(tmp_path)


def test_an_upload_that_fails_leaves_the_export_whole(hub: Hub, smt: Run, tmp_path: Path) -> None:
    hub.refusals["/commit/"] = 403
    output = tmp_path / "out"
    with pytest.raises(BadInput, match=r"may not write there.* The export at .* is complete; hf upload user/tuned"):
        export(smt.folder, output=output, push="user/tuned")
    whole = {path.name for path in files(output)}
    assert whole == {path.name for path in files(export(smt.folder, output=tmp_path / "again"))}


def test_weights_that_cannot_be_uploaded(hub: Hub, smt: Run, tmp_path: Path) -> None:
    hub.refusals["/lfs/"] = 403
    with pytest.raises(BadInput, match=r"--push user/tuned .*The export at .* is complete"):
        export(smt.folder, output=tmp_path / "out", push="user/tuned")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_private_without_push(smt: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give --push user/name"):
        export(smt.folder, output=tmp_path / "out", private=True)
