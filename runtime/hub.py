"""Checkpoints by name: published ones, files and repositories of the Hugging Face hub, local files; and uploads."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch

from rope import RopeConfig
from runtime import files, model_folder
from runtime.checkpoint import training_checkpoints
from runtime.options import UserError, format_size, root_cause

SPIRAL_ROPE = "hf://haoyuliu00/Spiral_RoPE"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"
REPOSITORY = r"[\w.-]+/[\w.-]+"
ADDRESS = re.compile(
    rf"hf://(?:(model|dataset|space)s/)?({REPOSITORY})(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(.+))?"
)


@dataclass(frozen=True)
class Published:
    """A checkpoint that others have published."""

    url: str  # hf://user/repo/file, or an address for torch.hub
    args: dict = field(default_factory=dict)  # settings, named as a file's own "args" name them; those win


@dataclass(frozen=True)
class Source:
    """A checkpoint's local file, or the folder of its config.json, and what is known about it from elsewhere."""

    path: Path
    name: str | None = None  # under which it was asked for; None = a path
    args: dict = field(default_factory=dict)  # as in Published

    @property
    def label(self) -> str:
        """The checkpoint in a word: the file without its ending, or what the folder or the repository is called."""
        if not self.path.is_dir():
            return self.path.stem
        if self.name is not None:
            return ADDRESS.fullmatch(self.name)[2].split("/")[1]
        folder = self.path.resolve()
        return folder.parent.name if folder.name == model_folder.BELOW else folder.name


def _spiral(file: str, rotate: int) -> Published:
    rope = asdict(RopeConfig(rotate=rotate, theta=10000.0, max_freq_lang=1.5, border="clamp"))
    return Published(f"{SPIRAL_ROPE}/{file}", {"image_size": 256} | {f"rope_{key}": rope[key] for key in rope})


PUBLISHED = {
    "dit_s2": _spiral("dit_s2/0400000.pt", rotate=4),
    "dit_b2": _spiral("dit_b2/0400000.pt", rotate=4),
    "dit_l2": _spiral("dit_l2/0400000.pt", rotate=4),
    "dit_xl2": _spiral("dit_xl2/0400000.pt", rotate=3),
    "dit_xl2_7m": _spiral("dit_xl2/0700000.pth", rotate=3),
    "DiT-XL-2-256x256.pt": Published(f"{DIT}/DiT-XL-2-256x256.pt"),
    "DiT-XL-2-512x512.pt": Published(f"{DIT}/DiT-XL-2-512x512.pt"),
}


def dit_of(given: dict) -> str:
    """The checkpoint that DiT's own commands take where none is named: DiT-XL/2 of the image size.

    given is what the command line says about the model: see options.given_model. Raises UserError where no file of
    DiT's is such a model.
    """
    size = format_size(given["image_size"] or (256, 256))
    name = f"DiT-XL-2-{size}x{size}.pt"
    fits = {
        f"--image-size {size}": name in PUBLISHED,
        f"--model {given['model']}": given["model"] in (None, "DiT-XL/2"),
        f"--num-classes {given['num_classes']}": given["num_classes"] in (None, 1000),
        "--use-rope": not given["use_rope"],
    }
    if not all(fits.values()):
        wrong = next(flag for flag, does_fit in fits.items() if not does_fit)
        raise UserError(
            f"DiT published no checkpoint that fits {wrong}; name another with --ckpt: a file, a run's folder, or one "
            f"of {', '.join(PUBLISHED)}"
        )
    return name


def find(name: str | Path) -> Source:
    """What a path, a key of PUBLISHED, hf://user/repo[@revision] or a file of such a repository stands for.

    It is downloaded if need be. The folder of a run stands for its newest checkpoint. A file or folder that exists
    wins over a name. Of the processes on a node one downloads, and the others wait for its lock. Raises UserError
    when a name is unknown or cannot be fetched.
    """
    text = str(name)
    address = ADDRESS.fullmatch(text)
    of_repository = address and address[4] in (model_folder.CONFIG, f"{model_folder.BELOW}/{model_folder.CONFIG}")
    if of_repository or (os.path.basename(text) == model_folder.CONFIG and os.path.isfile(text)):
        folder = os.path.dirname(text).removesuffix(f"/{model_folder.BELOW}") or "."
        raise UserError(f"checkpoint {text!r} is a model's settings without its weights; give the folder, {folder!r}")
    if os.path.isfile(text):
        return Source(Path(text))
    if os.path.isdir(text):
        return Source(_in_folder(Path(text)))
    url = PUBLISHED[text].url if text in PUBLISHED else text
    if "://" in url:
        path, url = _from_url(url) if url.startswith(DIT) else _from_hub(url)
        args = next((published.args for published in PUBLISHED.values() if published.url == url), {})
        return Source(path, text, args)
    if os.sep not in text:
        close = difflib.get_close_matches(text, PUBLISHED, n=1)
        raise UserError(
            f"checkpoint {text!r} is neither a file nor the name of a published checkpoint"
            f"{f'; did you mean {close[0]}?' if close else ''}; expected a path such as checkpoints/0050000.pt, "
            f"hf://user/repo, hf://user/repo/file, or one of {', '.join(PUBLISHED)}"
        )
    return Source(Path(text))


def _in_folder(folder: Path) -> Path:
    """The newest checkpoint of a run's folder, or the folder itself (or its transformer/) where that is a model."""
    runs = folder / "checkpoints"
    newest = training_checkpoints(runs)[-1:]
    found = newest[0] if newest else None if runs.is_dir() else model_folder.find(folder)
    path = os.path.abspath(folder)
    if found is None and os.path.basename(path) == "checkpoints" and training_checkpoints(folder):
        run = os.path.dirname(path)
        raise UserError(
            f"checkpoint {str(folder)!r} has those of a run; give one of them, or the run's folder, {run!r}"
        )
    if found is None:
        raise UserError(
            f"checkpoint {str(folder)!r} is a folder without checkpoints/0050000.pt or the like, or config.json and "
            f"{model_folder.WEIGHTS}; give a file, the folder of a run, or one that export.py wrote"
        )
    return found


def _is_repository(name: str) -> bool:
    """Whether this could be the name of a repository, with its owner."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _from_hub(url: str) -> tuple[Path, str]:
    """Path in the cache of huggingface_hub of a file or of a repository, and the address without the revision."""
    match = ADDRESS.fullmatch(url)
    if match is None or {"", ".", ".."} & set((match[4] or "file").split("/")) or not _is_repository(match[2]):
        raise UserError(
            f"checkpoint {url!r} is not hf://user/repo or hf://user/repo/file; correct it, or download it by hand and "
            "pass its path"
        )
    kind, repository, revision, file = match.groups()
    repo = {"repo_id": repository, "repo_type": kind or "model", "revision": revision}
    if file is None:
        return _repository_from_hub(url, repo), f"hf://{repository}"
    return _file_from_hub(url, repo, file), f"hf://{repository}/{file}"


def _file_from_hub(url: str, repo: dict, file: str) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url

    with _fetching(url, hf_hub_url(filename=file, **repo), _reasons(repo, f"file {file}")):
        return Path(hf_hub_download(filename=file, **repo))


def _repository_from_hub(url: str, repo: dict) -> Path:
    """The folder of config.json and weights. Of another kind of model no weights are fetched."""
    places = ("", f"{model_folder.BELOW}/")
    folder = _first_from_hub(url, repo, [place + model_folder.CONFIG for place in places]).parent
    place = places[folder.name == model_folder.BELOW]
    commit = (folder.parent if place else folder).name  # of config.json: weights of a later one may be others
    names = model_folder.weights_names(model_folder.read_config(folder)[0])
    _first_from_hub(url, repo | {"revision": commit}, [place + name for name in names])
    return folder


def _first_from_hub(url: str, repo: dict, names: list[str]) -> Path:
    """The first of several files that the repository has."""
    from huggingface_hub import errors, hf_hub_download

    with _fetching(url, f"the repository {repo['repo_id']}", _reasons(repo, " or ".join(names))):
        for name in names:
            try:
                return Path(hf_hub_download(filename=name, **repo))
            except errors.EntryNotFoundError:  # without a network too, where only the next one is in the cache
                if name == names[-1]:
                    raise


def _reasons(repo: dict, missing: str) -> dict[type, str]:
    """What the errors of huggingface_hub mean, whose own texts take several lines."""
    from huggingface_hub import errors

    kind, name = repo["repo_type"], repo["repo_id"]
    return {
        errors.LocalEntryNotFoundError: "",
        errors.GatedRepoError: "it is gated: accept its conditions on the hub, then log in with `hf auth login` or set "
        "HF_TOKEN",
        errors.RepositoryNotFoundError: f"the hub has no {kind} {name}, or it is private: check the name, or log in "
        "with `hf auth login`",
        errors.RevisionNotFoundError: f"{name} has no revision {repo['revision']}",
        errors.EntryNotFoundError: f"{name} has no {missing}",
    }


def _from_url(url: str) -> tuple[Path, str]:
    """Path of a downloaded file in the cache of torch.hub, and its url."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    with _fetching(url, url, {}):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(path.name + ".lock")):
            if not path.exists():
                with files.whole_file(path) as file:
                    http_get(url, file)
    return path, url


@contextmanager
def _fetching(name: str, url: str, reasons: dict[type, str]) -> Iterator[None]:
    """Context of a download, whose errors become a UserError: with these reasons, or with the error's own."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries take lines; what went wrong is said below, once
    try:
        yield
    except Exception as error:  # whatever a network, a disk or a server makes the library raise
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), "") or root_cause(error)
        raise UserError(
            f"checkpoint {name!r} cannot be fetched: {reason.rstrip('.')}; otherwise download {url} by hand and pass "
            "its path"
        ) from error


def check_push(repository: str) -> None:
    """Raise UserError unless huggingface_hub could upload to this repository, as far as a login tells."""
    from huggingface_hub import HfApi, get_token

    if not _is_repository(repository):
        raise UserError(f"--push {repository!r} is not the name of a repository; expected you/repo")
    if get_token() is None:
        raise UserError(f"--push {repository} needs a token of the hub; log in with `hf auth login`, or set HF_TOKEN")
    with _pushing(repository, "check it, or leave --push out"):
        HfApi().whoami()


def push(folder: Path, names: list[str], repository: str) -> str:
    """Upload these files of a folder in one commit, making the repository if need be; its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with _pushing(repository, f"{str(folder)!r} is whole: `hf upload {repository} {folder}` goes on with it"):
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="Weights by export.py"
        )
    return str(address)


@contextmanager
def _pushing(repository: str, remedy: str) -> Iterator[None]:
    """Context of an upload, whose errors become a UserError."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # whatever a network or a server makes the library raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = {401: "the hub does not accept the token", 403: "the token may not write there"}
        reason = (refused.get(status) or root_cause(error)).rstrip(".")
        raise UserError(f"--push {repository} failed: {reason}; {remedy}") from error
