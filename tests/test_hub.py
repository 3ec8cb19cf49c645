"""Checkpoints by name: what a name stands for, and downloads from a server that stands in for the hub."""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_checkpoint import build, disk_full_at, write

import export
import sample
import sample_ddp
from models import DiT
from rope import RopeConfig
from runtime import files, hub, pretrained
from runtime.options import UserError

pytestmark = pytest.mark.usefixtures("tiny_commands")
TOKEN = "hf_you"
SPIRAL = RopeConfig(rotate=4, theta=10000.0, max_freq_lang=1.5)


class StandIn(ThreadingHTTPServer):
    """Serves files as the hub does (/user/repo/resolve/revision/file) or plainly; seen holds (method, path, range)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.errors: dict[str, tuple[int, str]] = {}  # path to status and the hub's name of the error
        self.cut: list[int] = []  # lengths after which the next answers to GET break off
        self.pause = 0.0  # seconds before the contents of a file
        self.seen: list[tuple[str, str, str | None]] = []
        self.stored: dict[str, bytes] = {}  # large files by their hash, before a commit names them
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, path: str, contents: bytes, revision: str = "main") -> None:
        user, repository, file = path.split("/", 2)
        for name in (revision, commit_of(f"/{user}/{repository}/resolve/{revision}/{file}")):
            self.files[f"/{user}/{repository}/resolve/{name}/{file}"] = contents

    def downloads(self) -> list[str]:
        return [path for method, path, _ in self.seen if method == "GET" and path in self.files]


def commit_of(path: str) -> str:
    """The commit that /user/repo/resolve/revision/file is of; that of a commit is itself."""
    start, revision = "/".join(path.split("/")[:4]), path.split("/")[4:5]
    return (
        revision[0] if revision and len(revision[0]) == 40 else hashlib.sha1(f"{start}{revision}".encode()).hexdigest()
    )


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, part = self.server, self.headers.get("Range")
        server.seen.append((self.command, self.path, part))
        if self.path == "/api/whoami-v2":
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return self.answer({"name": "you", "type": "user"})
            return self.begin(401, {"X-Error-Code": "Unauthorized", "Content-Length": 0})
        contents = server.files.get(self.path)
        if self.path in server.errors or contents is None:
            status, name = server.errors.get(self.path, (404, "EntryNotFound"))
            return self.begin(status, {"X-Error-Code": name, "Content-Length": 0})
        first = int(part.removeprefix("bytes=").split("-")[0]) if part else 0
        headers = {"ETag": f'"{hashlib.sha256(contents).hexdigest()}"'}
        headers["X-Repo-Commit"] = commit_of(self.path)
        headers["Content-Length"] = len(contents) - first
        if part:
            headers["Content-Range"] = f"bytes {first}-{len(contents) - 1}/{len(contents)}"
        self.begin(206 if part else 200, headers)
        if self.command == "GET":
            time.sleep(server.pause)
            cut = server.cut.pop(0) if server.cut else len(contents)
            self.wfile.write(contents[first : first + cut])
            self.close_connection = True

    do_HEAD = do_GET

    def do_POST(self):
        """What an upload asks for: who one is, a repository, which files are large, where these go, and a commit."""
        server, path = self.server, self.path.split("?")[0]
        server.seen.append((self.command, path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path in server.errors or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, name = server.errors.get(path, (401, "Unauthorized"))
            return self.begin(status, {"X-Error-Code": name, "Content-Length": 0})
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] in ("file", "lfsFile"):
                    value, repo = line["value"], path.removeprefix("/api/models/").removesuffix("/commit/main")
                    large = line["key"] == "lfsFile"
                    content = server.stored[value["oid"]] if large else base64.b64decode(value["content"])
                    server.put(f"{repo}/{value['path']}", content)
            return self.answer({"commitUrl": f"{server.url}/you/repo/commit/{'0' * 40}", "commitOid": "0" * 40})
        asked = json.loads(body or "{}")
        if path == "/api/repos/create":
            return self.answer({"url": f"{server.url}/{asked['organization']}/{asked['name']}"})
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            found = [{"path": file["path"], "shouldIgnore": False} for file in asked["files"]]
            return self.answer({"files": [f | {"uploadMode": modes[f["path"].endswith("tensors")]} for f in found]})
        if path.endswith("/objects/batch"):
            upload = [{"actions": {"upload": {"href": f"{server.url}/large/{f['oid']}"}}} | f for f in asked["objects"]]
            return self.answer({"transfer": "basic", "objects": upload})
        return self.answer({"errors": [], "warnings": []})  # of the card's metadata

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[self.path.split("/")[-1]] = content
        self.answer({})

    def answer(self, values: dict) -> None:
        content = json.dumps(values).encode()
        self.begin(200, {"Content-Type": "application/json", "Content-Length": len(content)})
        self.wfile.write(content)

    def begin(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_):
        pass


def move_hub(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the second where old versions look
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(hub, "DIT", url)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in for the hub and for the server of the original DiT, with empty caches."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it has read the environment already
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)  # here is no such server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    move_hub(monkeypatch, server.url)
    for name, published in hub.PUBLISHED.items():
        moved = hub.Published(published.url.replace("https://dl.fbaipublicfiles.com/DiT/models", server.url))
        if published.url.startswith("https://"):
            monkeypatch.setitem(hub.PUBLISHED, name, moved)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def model_bytes(folder: Path, wrap=lambda state: {"ema": state}, **options) -> bytes:
    """A file of a tiny model's weights that are not zero."""
    return write(folder / "a.pt", wrap(build(**({"num_classes": 3} | options)).state_dict())).read_bytes()


def closed_address() -> str:
    """One where no server listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def find_in_the_end(name: str) -> hub.Source:
    """After a broken connection old versions of huggingface_hub have to be asked again."""
    try:
        return hub.find(name)
    except UserError:
        return hub.find(name)


def refusal(name) -> str:
    with pytest.raises(UserError) as error:
        hub.find(name)
    return str(error.value)


# Names


def test_the_table_of_published_checkpoints():
    files = {f"dit_{size}": f"dit_{size}/0400000.pt" for size in ("s2", "b2", "l2", "xl2")}
    files = {name: f"hf://haoyuliu00/Spiral_RoPE/{file}" for name, file in files.items()}
    files["dit_xl2_7m"] = "hf://haoyuliu00/Spiral_RoPE/dit_xl2/0700000.pth"
    others = {f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}
    files |= {name: f"https://dl.fbaipublicfiles.com/DiT/models/{name}" for name in others}
    assert {name: published.url for name, published in hub.PUBLISHED.items()} == files
    for name, published in hub.PUBLISHED.items():
        rope = asdict(replace(SPIRAL, rotate=3 if "xl" in name else 4))
        settings = {"image_size": 256} | {f"rope_{key}": value for key, value in rope.items()}
        assert published.args == ({} if name in others else settings)


def test_a_file_wins_over_a_name(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dit_b2").touch()
    assert hub.find("dit_b2") == hub.Source(Path("dit_b2"))
    assert hub.find(tmp_path / "not" / "there.pt") == hub.Source(tmp_path / "not" / "there.pt")
    assert server.seen == []


def test_a_name_that_stands_for_nothing_is_refused(server, refused, tmp_path):
    start = "is neither a file nor the name of a published checkpoint"
    end = "; expected a path such as checkpoints/0050000.pt, hf://user/repo, hf://user/repo/file, or one of "
    end += ", ".join(hub.PUBLISHED)
    message = refused(sample_ddp.main, ["--ckpt", "dit_b4", "--sample-dir", tmp_path / "samples"])
    assert message == f"checkpoint 'dit_b4' {start}; did you mean dit_b2?{end}"
    assert f"{start}; did you mean DiT-XL-2-256x256.pt?" in refusal("DiT-XL-2-256x256")
    assert refusal("weights.bin") == f"checkpoint 'weights.bin' {start}{end}"
    others = ("hf://", "hf://file.pt", "https://example.org/a.pt", "s3://user/repo/file", "hf://user/repo/a//b")
    for name in (*others, "hf://user/repo/../../../escape.pt", "hf://user/repo/", "hf://user/repo@", "hf://../a"):
        assert refusal(name) == (
            f"checkpoint {name!r} is not hf://user/repo or hf://user/repo/file; correct it, or download it by hand and "
            "pass its path"
        )
    assert server.downloads() == []


# Downloads


def test_a_file_of_the_hub_is_downloaded_once_and_needs_no_network_then(server, tmp_path, monkeypatch):
    server.put("user/repo/folder/a.pt", b"contents")
    first = hub.find("hf://user/repo/folder/a.pt")
    assert first.path.read_bytes() == b"contents" and first.path.name == "a.pt" and first.args == {}
    assert first.path.is_relative_to(tmp_path / "hf")
    assert hub.find("hf://user/repo/folder/a.pt") == first
    assert server.downloads() == ["/user/repo/resolve/main/folder/a.pt"]
    move_hub(monkeypatch, closed_address())
    assert hub.find("hf://user/repo/folder/a.pt") == first


def test_a_revision_is_asked_for_and_a_broken_connection_resumed(server, monkeypatch):
    contents = bytes(range(256)) * 1000
    server.put("user/repo/a.pt", b"old", revision="v1")
    server.put("user/repo/a.pt", contents, revision="refs%2Fpr%2F7")
    assert hub.find("hf://user/repo@v1/a.pt").path.read_bytes() == b"old"
    server.cut = [100_000]
    server.seen.clear()
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    assert find_in_the_end("hf://user/repo@refs/pr/7/a.pt").path.read_bytes() == contents
    parts = [part for method, path, part in server.seen if method == "GET" and path in server.files]
    assert parts == [None, "bytes=100000-"]


GATED = "it is gated: accept its conditions on the hub, then log in with `hf auth login` or set HF_TOKEN"
PRIVATE = "the hub has no model user/repo, or it is private: check the name, or log in with `hf auth login`"


@pytest.mark.parametrize(
    ("status", "error", "revision", "reason"),
    [
        (404, "EntryNotFound", "main", "user/repo has no file a.pt"),
        (404, "RevisionNotFound", "v2", "user/repo has no revision v2"),
        (404, "RepoNotFound", "main", PRIVATE),
        (401, "RepoNotFound", "main", PRIVATE),
        (401, "GatedRepo", "main", GATED),
        (403, "GatedRepo", "main", GATED),
        (403, "Other", "main", ".*403.* Forbidden.* url.*LINK.*"),  # as the library has it
    ],
)
def test_what_the_hub_refuses(status, error, revision, reason, server):
    server.errors[f"/user/repo/resolve/{revision}/a.pt"] = (status, error)
    name = "hf://user/repo/a.pt" if revision == "main" else f"hf://user/repo@{revision}/a.pt"
    assert re.fullmatch(
        f"checkpoint {name!r} cannot be fetched: {reason}; otherwise download LINK by hand and pass its path",
        refusal(name).replace(f"{server.url}/user/repo/resolve/{revision}/a.pt", "LINK"),
    )


def test_a_server_that_is_not_there(server, monkeypatch):
    closed = closed_address()
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its retries
    move_hub(monkeypatch, closed)
    for url, link in (("hf://user/repo/a.pt", f"{closed}/user/repo/resolve/main/a.pt"), (f"{closed}/a.pt",) * 2):
        assert refusal(url) == (
            f"checkpoint {url!r} cannot be fetched: [Errno 111] Connection refused; otherwise download {link} by hand "
            "and pass its path"
        )


NAMES = ["hf://user/repo/a.pt", "DiT-XL-2-256x256.pt"]


@pytest.fixture(params=NAMES)
def name(request, server):
    """A name of each kind, whose file has 300,000 bytes."""
    server.put("user/repo/a.pt", bytes(300_000))
    server.files["/DiT-XL-2-256x256.pt"] = bytes(300_000)
    return request.param


def test_a_full_disk(name, tmp_path):
    with disk_full_at(100_000):
        assert " cannot be fetched: [Errno 27] File too large; otherwise download " in refusal(name)
    large = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 50_000]
    assert all(path.suffix == ".incomplete" for path in large)  # with which old versions of huggingface_hub go on


def test_of_several_processes_one_downloads(name, server):
    """Threads stand in for processes: the locks are of files that each opens for itself."""
    server.pause = 0.5
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(hub.find, [name] * 3))
    assert len({source.path for source in found}) == 1 and found[0].path.read_bytes() == bytes(300_000)
    assert len(server.downloads()) == 1


def test_the_original_dit_is_downloaded_once_and_a_broken_connection_resumed(server, tmp_path, monkeypatch):
    name = "DiT-XL-2-512x512.pt"
    assert re.search("404.* Not Found", refusal(name))
    server.files[f"/{name}"] = bytes(1000)
    server.seen.clear()
    server.cut = [400]
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    found = find_in_the_end(name)
    assert [part for _, _, part in server.seen] in ([None, "bytes=400-"], [None, None])  # old versions begin again
    assert {path.name for path in tmp_path.rglob("*512*")} == {f"{name}.lock", name}
    assert found == hub.Source(tmp_path / "torch" / "hub" / "checkpoints" / name, name)
    assert found.path.read_bytes() == bytes(1000)
    assert hub.find(name) == found and hub.find(found.path) == hub.Source(found.path)
    assert len(server.seen) == 2


# Repositories


def test_a_repository_is_its_model_and_needs_no_network_then(server, run, tmp_path, monkeypatch, capsys):
    """For --ckpt, and for DiT.from_pretrained."""
    export.main(["--ckpt", str(run), "--out", str(tmp_path / "folder")])
    for path in (tmp_path / "folder").iterdir():
        server.put(f"user/repo/{path.name}", path.read_bytes())
    capsys.readouterr()
    trained = pretrained.load_trained("hf://user/repo")
    assert trained.sha256 == pretrained.load_trained(run).sha256 and trained.label == "0000007"
    assert capsys.readouterr().err.startswith("checkpoint hf://user/repo: DiT-XS/2 at step 7, image size 32, 3 classes")
    asked = {path.split("/")[-1] for path in server.downloads()}
    assert asked == {"config.json", "model.safetensors"}
    weights = DiT.from_pretrained("user/repo").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trained.model.state_dict().items())
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its retries
    move_hub(monkeypatch, closed_address())
    assert pretrained.load_trained("hf://user/repo").sha256 == trained.sha256
    assert refusal("hf://user/other").startswith("checkpoint 'hf://user/other' cannot be fetched: ")


def test_a_repository_without_a_dit_is_refused_before_its_weights_are_fetched(server):
    assert refusal("hf://user/repo") == (
        "checkpoint 'hf://user/repo' cannot be fetched: user/repo has no config.json or transformer/config.json; "
        "otherwise download the repository user/repo by hand and pass its path"
    )
    for name, config in (
        ("user/bert", {"hidden_size": 768, "model_type": "bert"}),
        ("user/unet", {"_class_name": "UNet2DConditionModel"}),
    ):
        server.put(f"{name}/config.json", json.dumps(config).encode())
        server.put(f"{name}/model.safetensors", b"never asked for")
        assert " is no DiT by its config.json (" in refusal(f"hf://{name}")
    assert all(path.endswith("/config.json") for path in server.downloads())


# Uploads


@pytest.fixture
def push_arguments(run, tmp_path):
    return ["--ckpt", str(run), "--out", str(tmp_path / "folder"), "--push", "you/repo"]


def test_an_uploaded_folder_is_what_is_downloaded(server, run, push_arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export.main([*push_arguments, "--dry-run"])
    assert capsys.readouterr().out.endswith(f"to {tmp_path / 'folder'} and upload it to you/repo\n")
    assert {path for _, path, _ in server.seen} == {"/api/whoami-v2"} and not (tmp_path / "folder").exists()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "private.txt").write_text("of nobody's concern")
    export.main(push_arguments)
    assert capsys.readouterr().out.endswith(f"uploaded: {server.url}/you/repo\n")
    names = {path.split("/")[-1] for path in server.files}
    assert names == {path.name for path in (tmp_path / "folder").iterdir()} - {"private.txt"}
    for path, content in server.files.items():
        assert content == (tmp_path / "folder" / path.split("/")[-1]).read_bytes()
    assert b"--ckpt hf://you/repo" in server.files["/you/repo/resolve/main/README.md"]
    assert pretrained.load_trained("hf://you/repo").sha256 == pretrained.load_trained(run).sha256


def test_an_upload_without_a_token_or_a_network_is_refused_before_anything_is_written(
    server, push_arguments, refused, monkeypatch, tmp_path
):
    assert refused(export.main, push_arguments) == (
        "--push you/repo needs a token of the hub; log in with `hf auth login`, or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    reason = "the hub does not accept the token; check it, or leave --push out"
    assert refused(export.main, push_arguments) == f"--push you/repo failed: {reason}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refused(export.main, [*push_arguments[:-1], "repo"]).startswith("--push 'repo' is not the name of a repo")
    one_file = ["--out", str(tmp_path / "a.safetensors")]
    assert refused(export.main, [*push_arguments, *one_file]).startswith("--push uploads a folder, and --out '")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        move_hub(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert refused(export.main, push_arguments) == (
        "--push you/repo failed: [Errno 111] Connection refused; check it, or leave --push out"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused(export.main, push_arguments).startswith("--push you/repo failed: ")
    assert not (tmp_path / "folder").exists()


def test_an_upload_that_fails_leaves_the_folder(server, push_arguments, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "folder"
    server.errors["/api/models/you/repo/commit/main"] = (403, "Other")
    remedy = f"{str(folder)!r} is whole: `hf upload you/repo {folder}` goes on with it"
    message = refused(export.main, push_arguments, has_begun=True)
    assert message == f"--push you/repo failed: the token may not write there; {remedy}"
    assert pretrained.load_trained(folder).step == 7


# Settings


def test_a_published_file_takes_its_settings_from_the_table(server, tmp_path, capsys):
    """Where the file carries none; whatever the name it was asked for by, and the revision."""
    server.put("haoyuliu00/Spiral_RoPE/dit_b2/0400000.pt", model_bytes(tmp_path, rope=SPIRAL, input_size=32))
    server.put("haoyuliu00/Spiral_RoPE/dit_b2/0400000.pt", model_bytes(tmp_path, rope=SPIRAL), "v1")
    for user in ("hf://haoyuliu00/Spiral_RoPE", "hf://haoyuliu00/Spiral_RoPE@v1", None):
        name = f"{user}/dit_b2/0400000.pt" if user else "dit_b2"
        trained = pretrained.load_trained(name)
        assert (trained.config.model.rope, trained.image_size) == (SPIRAL, (256, 256))
        assert trained.path.name == "0400000.pt"
        size = files.format_bytes(trained.path.stat().st_size)
        assert capsys.readouterr().err == (
            f"checkpoint {name}: DiT-XS/2, image size 256, 3 classes, RoPE {asdict(SPIRAL)}; {size} in {trained.path}\n"
        )
    pretrained.load_trained("dit_b2", given=dict(use_rope=True, rope={"rotate": 4, "theta": 10000.0}))
    with pytest.raises(UserError, match="--rope-rotate 2 disagrees with checkpoint '.*0400000.pt', which was trained"):
        pretrained.load_trained("dit_b2", given=dict(use_rope=True, rope={"rotate": 2}))
    capsys.readouterr()
    pretrained.load_trained(trained.path, given=dict(use_rope=True, rope={"rotate": 4}))
    assert capsys.readouterr().err == ""  # of a path there is nothing to tell


def test_the_settings_in_a_published_file_win(server, tmp_path):
    rope = RopeConfig(rotate=2, theta=100.0)
    args = argparse.Namespace(image_size=32, rope_rotate=2, rope_theta=100.0, vae="mse")
    contents = model_bytes(tmp_path, lambda state: {"ema": state, "args": args, "train_steps": 7}, rope=rope)
    server.put("haoyuliu00/Spiral_RoPE/dit_xl2/0700000.pth", contents)
    trained = pretrained.load_trained("dit_xl2_7m")
    assert (trained.config.model.rope, trained.image_size, trained.step) == (rope, (32, 32), 7)


# The commands


def test_the_first_commands_of_users_of_dit(server, vae_folder, monkeypatch, capsys, tmp_path):
    """Without --ckpt they take the file that DiT published for the image size; here it holds a smaller model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_check_agreement", lambda *_: None)
    for size in (256, 512):
        contents = model_bytes(tmp_path, lambda state: state, num_classes=1000, input_size=size // 8)
        server.files[f"/DiT-XL-2-{size}x{size}.pt"] = contents
    sample.main(f"--image-size 512 --seed 1 --dry-run --vae {vae_folder}".split())
    assert "DiT-XL-2-512x512, cfg 4, ddpm 50 steps, seed 1" in capsys.readouterr().out
    sample_ddp.main("--model DiT-XL/2 --num-fid-samples 50000 --print-name".split())
    assert capsys.readouterr().out == "samples/DiT-XS-2-DiT-XL-2-256x256-size-256-vae-ema-cfg-1.5-seed-0.npz\n"
    assert server.downloads() == ["/DiT-XL-2-512x512.pt", "/DiT-XL-2-256x256.pt"]
    assert not (tmp_path / "samples").exists() and not (tmp_path / "sample.png").exists()


@pytest.mark.parametrize("given", ["--model DiT-B/2", "--image-size 256x384", "--num-classes 10", "--use-rope"])
def test_where_dit_has_no_checkpoint_one_has_to_be_named(given, server, refused):
    for command in (sample, sample_ddp):
        assert refused(command.main, given.split()) == (
            f"DiT published no checkpoint that fits {given}; name another with --ckpt: a file, a run's folder, or one "
            f"of {', '.join(hub.PUBLISHED)}"
        )
    assert server.seen == []


def test_an_exported_file_from_the_hub_is_the_checkpoint(server, run, sample_arguments, tmp_path, capsys):
    """The same weights, to the bit, and so the same name of the samples."""
    path, name = run / "checkpoints" / "0000007.pt", "hf://user/repo/0000007.safetensors"
    export.main(["--ckpt", str(path), "--out", str(tmp_path / "0000007.safetensors")])
    server.put("user/repo/0000007.safetensors", (tmp_path / "0000007.safetensors").read_bytes())
    assert pretrained.load_trained(name).sha256 == pretrained.load_trained(path).sha256
    capsys.readouterr()
    for ckpt in (path, name):
        sample_ddp.main(sample_arguments(tmp_path / "samples", ckpt=ckpt, print_name=True))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
