"""Features of images by torch-fidelity's Inception-v3, the TensorFlow-compatible one that published FIDs use."""

import hashlib
import io
import os
import textwrap
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from runtime import checkpoint, distributed, files, monitor
from runtime.options import UserError, format_size

PUBLISHED = "6726825d"  # the weights of published numbers, by the digits that torch.hub tells them apart with
PUBLISHED_NAME = URL_INCEPTION_V3.rsplit("/", 1)[1]
WIDTHS = {  # numbers for each image
    "pool": 2048,  # average of the last block: FID, KID, precision and recall
    "spatial": 17 * 17 * 7,  # sFID, as the evaluator of ADM takes it
    "logits": 1008,  # without their bias: Inception Score
}


class Inception:
    """The network with weights from a file; None: from torch-fidelity, downloaded once. Raises UserError."""

    def __init__(self, weights: Path | None, device: torch.device):
        path = weights or distributed.on_main(download)
        self.device, (self.weights, state) = device, read_weights(path)
        checked = io.BytesIO()  # torch-fidelity would unpickle whatever the file asks for: it gets what was found in it
        torch.save(state, checked)
        checked.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
            )
        except Exception as error:  # whatever values of other kinds make it raise
            differing = textwrap.shorten((str(error).splitlines() or [repr(error)])[-1], 120, placeholder=" ...")
            raise UserError(
                f"--inception-weights {str(path)!r} holds other weights than torch-fidelity's Inception-v3 "
                f"({differing}); expected {PUBLISHED_NAME}"
            ) from error
        self.network = network.to(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module, inputs, output: Tensor) -> None:
        """The first 7 channels after the ReLU, flattened as TensorFlow lays them out: height, width, channel."""
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 192, 17, 17) -> (N, 2023)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) uint8 of any size to (N, WIDTHS[name]) float32 on the CPU; the network resizes them."""
        pool, logits = self.network(images.to(self.device))
        found = {"pool": pool, "spatial": self.spatial, "logits": logits}
        return {name: values.cpu() for name, values in found.items()}


def published_path() -> Path:
    """Where torch-fidelity keeps its weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED_NAME


def find_weights(weights: Path | None) -> str:
    """Which weights Inception would take, without a download; those that are there are loaded. Raises UserError."""
    path = weights or published_path()
    if weights is None and not path.exists():
        files.check_folder(path.parent, "folder of torch.hub")
        return f"would be downloaded once (96 MB) to {path}"
    network = Inception(path, torch.device("cpu"))
    return str(path) if network.weights == PUBLISHED else f"{path}, which are not those of published numbers"


def download() -> Path:
    """torch-fidelity's weights, in the folder where it keeps them; fetched unless they are there. Raises UserError."""
    path = published_path()
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED)
        except (OSError, RuntimeError) as error:  # no network, a full disk; another checksum
            raise UserError(
                f"the Inception-v3 weights cannot be downloaded ({error}); fetch {URL_INCEPTION_V3} where there is a "
                "network, and pass the file as --inception-weights FILE"
            ) from error
    return path


def read_weights(path: Path) -> tuple[str, dict]:
    """How the sha256 of a file begins, and the tensors and plain values in it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--inception-weights {str(path)!r} is not a file; expected {PUBLISHED_NAME}")
    with open(path, "rb") as file:
        digits = hashlib.file_digest(file, "sha256").hexdigest()[: len(PUBLISHED)]
    if path.name == PUBLISHED_NAME and digits != PUBLISHED:
        raise UserError(
            f"--inception-weights {str(path)!r} is damaged: its sha256 begins with {digits}, expected {PUBLISHED} "
            "as its name tells; fetch it again"
        )
    try:
        return digits, checkpoint.load(path)
    except UserError as error:
        raise UserError(f"--inception-weights: {error}") from error


def extract(images, names: list[str], network: Inception, batch_size: int, description: str) -> dict[str, Tensor]:
    """Features (N, WIDTHS[name]) float32 of a set of images, computed by all processes and complete on each.

    images is a set of runtime.image_sets. Raises UserError, on every process, for an image that cannot be read.
    """
    features = {name: torch.zeros(len(images), WIDTHS[name]) for name in names}
    bar = monitor.progress_bar(len(images), unit="image", description=description)
    failure = None
    try:
        for rows, pixels in images.share(batch_size):
            found = network.features(pixels)
            for name in names:
                features[name][rows] = found[name]
            bar.update(min(len(rows) * distributed.world_size(), bar.total - bar.n))
    except UserError as error:
        failure = str(error)
    bar.close()
    for seen in distributed.gather(failure):
        if seen is not None:
            raise UserError(seen)
    for values in features.values():
        distributed.all_reduce(values)  # a row is 0 on all processes but one, so the sum is exact
        if not bool(torch.isfinite(values).all()):
            raise UserError("the Inception-v3 weights give features that are not finite numbers; use others")
    return features


def extract_cached(
    images, contents: str, names: list[str], network: Inception, batch_size: int, folder: Path, say: Callable
) -> dict[str, Tensor]:
    """Features of a reference as extract gives them, but complete on rank 0 alone.

    They are kept for the next time in a folder for (contents of the images, their size, weights), a file for each name.
    One command at a time makes them; another that needs them says that it waits, and reads them then. Where that folder
    cannot be written, a warning says so, and they are for this time alone.
    """
    place = folder / f"{contents}-{format_size(images.size)}-{network.weights}"
    features: dict[str, Tensor] = {}

    def look() -> list[str]:
        """Read what is kept and was not read before; names of what is not."""
        for name in (name for name in names if name not in features):
            values = load_kept(place, name, len(images))
            features.update({} if values is None else {name: values})
        return [name for name in names if name not in features]

    if not distributed.on_main(look):
        return features
    with ExitStack() as stack:
        is_held = True
        try:
            stack.enter_context(distributed.hold(place, f"--cache-dir {str(folder)!r}", say))
        except UserError as error:
            is_held = False
            distributed.on_main(warnings.warn, f"features of the reference are not kept: {error}")
        missing = distributed.on_main(look)  # of another command, meanwhile
        made = extract(images, missing, network, batch_size, "reference") if missing else {}
        if is_held and distributed.is_main():
            for name, values in made.items():
                keep(place, name, values)
    return features | made


def load_kept(place: Path, name: str, count: int) -> Tensor | None:
    """Features (count, WIDTHS[name]) from their file; None without one, and for a damaged one, which is told."""
    path = place / f"{name}.safetensors"
    if not os.path.exists(path):  # False also where somebody else's folder is closed to us
        return None
    try:
        with files.reading(repr(str(path)), "it is made again"), safe_open(path, framework="pt") as file:
            values, stored = file.get_tensor(name), (file.metadata() or {}).get("sha256")
            if values.shape != (count, WIDTHS[name]) or stored != checkpoint.tensor_hash({name: values}):
                raise ValueError("it has not the features that its checksum is of")
            return values
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def keep(place: Path, name: str, values: Tensor) -> None:
    """Write features for the next time. Where that fails they are told to be lost, and this time goes on."""
    path = place / f"{name}.safetensors"
    try:
        with files.whole_file(path) as file:
            file.write(save({name: values}, {"sha256": checkpoint.tensor_hash({name: values})}))
    except OSError as error:
        warnings.warn(f"{str(path)!r} cannot be written ({error}); the next command makes it again", stacklevel=2)
