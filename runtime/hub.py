"""Checkpoints by name: published ones, files on the Hugging Face hub, local files; each becomes a local file."""

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch

from rope import RopeConfig
from runtime import files
from runtime.checkpoint import training_checkpoints
from runtime.options import UserError, format_size, root_cause

SPIRAL_ROPE = "hf://haoyuliu00/Spiral_RoPE"
# hf://[datasets/]user/repository[@revision]/file, as huggingface_hub's own file system has it; the file may be missing.
HUB_FILE = (
    r"hf://(?:(?P<repo_type>model|dataset|space)s/)?(?P<repo_id>(?!(?:model|dataset|space|bucket)s/)[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<filename>[^/]+(?:/[^/]+)*))?/?"
)
DIT = "https://dl.fbaipublicfiles.com/DiT/models"


@dataclass(frozen=True)
class Published:
    """A checkpoint that others have published."""

    url: str  # hf://user/repo/file, or an address for torch.hub
    args: dict = field(default_factory=dict)  # settings, named as a file's own "args" name them; those win


@dataclass(frozen=True)
class Source:
    """A checkpoint's local file, and what is known about it from elsewhere."""

    path: Path
    name: str | None = None  # under which it was asked for; None = a path
    args: dict = field(default_factory=dict)  # as in Published


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
    """The local file of a path, a key of PUBLISHED or hf://user/repo[@revision]/file, downloaded if need be.

    The folder of a run stands for its newest checkpoint. A file or folder that exists wins over a name. Of the
    processes on a node one downloads, and the others wait for its lock. Raises UserError when a name is unknown or
    its file cannot be fetched.
    """
    text = str(name)
    if os.path.isfile(text):
        return Source(Path(text))
    if os.path.isdir(text):
        found = training_checkpoints(Path(text) / "checkpoints")
        if not found:
            raise UserError(f"checkpoint {text!r} is a folder without checkpoints/0050000.pt or the like; give a file")
        return Source(found[-1])
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
            f"hf://user/repo/file, or one of {', '.join(PUBLISHED)}"
        )
    return Source(Path(text))


def _from_hub(url: str) -> tuple[Path, str]:
    """Path in the cache of huggingface_hub of hf://user/repo[@revision]/file, and the same without the revision."""
    from huggingface_hub import errors, hf_hub_download, hf_hub_url

    match = re.fullmatch(HUB_FILE, url)
    if match is None:
        raise UserError(
            f"checkpoint {url!r} is not hf://user/repo/file; correct it, or download it by hand and pass its path"
        )
    file = match.groupdict()
    repository, kind = file["repo_id"], file["repo_type"] or "model"
    if not file["filename"]:
        raise UserError(f"checkpoint {url!r} names no file of a repository; expected hf://user/repo/file")
    reasons = {  # the library's own take several lines; None: what was the cause
        errors.GatedRepoError: "it is gated: accept its conditions on the hub, then log in with `hf auth login` or set "
        "HF_TOKEN",
        errors.RepositoryNotFoundError: f"the hub has no {kind} {repository}, or it is private: check the name, or log "
        "in with `hf auth login`",
        errors.RevisionNotFoundError: f"{repository} has no revision {file['revision']}",
        errors.LocalEntryNotFoundError: None,
        errors.EntryNotFoundError: f"{repository} has no file {file['filename']}",
    }
    with _fetching(url, hf_hub_url(**file), reasons):
        return Path(hf_hub_download(**file)), f"hf://{repository}/{file['filename']}"


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
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None) or root_cause(error)
        raise UserError(
            f"checkpoint {name!r} cannot be fetched: {reason.rstrip('.')}; otherwise download {url} by hand and pass "
            "its path"
        ) from error
