"""Sample many images from a checkpoint, for FID: PNGs, one .npz for the ADM evaluator, and a labelled grid.

Image i depends on the checkpoint, the settings and i alone: any number of processes gives the same images, and an
interrupted command goes on with the missing ones.
"""

import argparse
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runtime import distributed, files, hub, monitor, options, pictures, pretrained, sampling
from runtime.config import VAEConfig
from runtime.image_sets import NpzImages
from runtime.options import UserError
from runtime.pretrained import Description, Trained
from runtime.vae import VAE, check_unloaded, is_surely, load_vae

GRID_SAMPLES = 100
WHERE = ("checkpoint", "vae")  # settings that tell where something was found; hashes tell what it is
PNG_BEGIN = 33  # bytes up to the end of the chunk that tells the size
PNG_END = b"IEND\xaeB`\x82"  # type and checksum of the chunk that ends every PNG


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    options.add_checkpoint_options(parser, none="DiT-XL/2 as published, of --image-size")
    add = parser.add_argument
    add("--sample-dir", type=Path, default=Path("samples"), help="where the folder of images and the .npz go")
    add("--num-fid-samples", type=options.count, default=50_000, help="images to make")
    add("--per-proc-batch-size", type=options.count, default=32, help="images at a time for each process")
    add("--global-seed", type=options.seed, default=0, help="with the index of an image, decides its label and noise")
    help = "labels in turn instead of uniformly random"
    add("--class-balanced", action=argparse.BooleanOptionalAction, default=False, help=help)
    add("--print-name", action="store_true", help="print the path of the .npz that would be made, and stop")
    sampling.add_sampling_options(parser, sampler="ddpm", steps=250, cfg_scale=1.5)
    options.add_dry_run(parser, planned=True)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.sampling = sampling.config_from_args(args, args.global_seed, args.class_balanced)
    given = options.given_model(args)
    args.ckpt = args.ckpt or hub.dit_of(given)
    return args


def run_name(found: Description, vae_source: str, args: argparse.Namespace) -> str:
    """DiT-B-4-0400000-size-256-vae-mse-cfg-1.0-seed-100; size-512-interpolate beyond the trained size."""
    model = found.config.model.model.replace("/", "-")
    size, vae = options.format_size(found.image_size), Path(vae_source).resolve().name
    size += f"-{found.rope_extend}" if found.rope_extend else ""
    return f"{model}-{found.label}-size-{size}-vae-{vae}-cfg-{args.cfg_scale}-seed-{args.global_seed}"


class SampleFolder:
    """The images of a run, <dir>/<name>/000000.png ..., with the settings that made them in <dir>/<name>.json."""

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        self.images = root / name
        self.settings, self.npz, self.grid = (root / f"{name}{suffix}" for suffix in (".json", ".npz", ".png"))

    def check(self, settings: dict) -> None:
        """Raise UserError when it was begun with other settings, or with settings that are lost."""
        if self.settings.exists():
            listed = options.differences(files.read_json(self.settings), settings, ignored=WHERE)
            if listed:
                raise UserError(
                    f"{str(self.images)!r} was begun with other settings: {listed}; repeat them, or use another "
                    "--sample-dir"
                )
        elif any(self.images.glob("*.png")):
            raise UserError(
                f"{str(self.images)!r} holds images whose settings are missing ({str(self.settings)!r}); remove it, or "
                "use another --sample-dir"
            )

    def open(self, settings: dict) -> None:
        """Go on with it, or begin it. Raises UserError as check."""
        self.check(settings)
        with files.cannot_write(f"--sample-dir {str(self.root)!r}"):
            files.write_json(self.settings, settings)
            files.remove_partial(self.images)

    def path(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"

    def is_complete(self, index: int, size: tuple[int, int], packed: int) -> bool:
        """Whether the image is there, of this size, to the last byte as it was written.

        Of one that is older than packed, the time of an .npz that holds it, only beginning and end are read.
        """
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                older = os.fstat(file.fileno()).st_mtime_ns < packed
                contents = file.read(PNG_BEGIN) if older else file.read()
                if older:
                    file.seek(-len(PNG_END), os.SEEK_END)
                    contents += file.read()
            check_png(contents, size, whole=not older)
        except (OSError, ValueError):
            return False
        return True

    def missing(self, indices: Iterable[int], size: tuple[int, int], packed: int = 0) -> list[int]:
        """Those indices without a complete image."""
        with ThreadPoolExecutor(16) as pool:
            complete = pool.map(lambda index: self.is_complete(index, size, packed), indices)
            return [index for index, done in zip(indices, complete, strict=True) if not done]

    def check_space(self, missing: int, total: int, size: tuple[int, int]) -> None:
        """Raise UserError unless the missing images, each at half its raw size, and the .npz can be written."""
        packed = self.npz.stat().st_size if self.npz.exists() else 0
        needed = size[0] * size[1] * 3 * (missing // 2 + total) - packed
        files.check_folder(self.root, "--sample-dir", max(needed, 0))

    def is_packed(self, labels: list[int], size: tuple[int, int]) -> bool:
        """Whether the grid and the .npz of exactly these images are there, and every byte is as it was written."""
        try:
            check_png(self.grid.read_bytes(), None)
            packed = NpzImages(self.npz, "--sample-dir", labelled=True)
            with files.open_zip(self.npz, compressed=True) as archive:
                whole = archive.testzip() is None
        except (OSError, ValueError, zipfile.BadZipFile, UserError):  # damaged: it is made again from the images
            return False
        return whole and packed.size == size and packed.labels.tolist() == labels

    def read(self, index: int) -> np.ndarray:
        with Image.open(self.path(index)) as image:
            return np.asarray(image.convert("RGB"))


def check_png(contents: bytes, size: tuple[int, int] | None, whole: bool = True) -> None:
    """Raise ValueError unless contents are a PNG of size (height, width), None for any, in colours of 8 bits.

    Where it is whole, every checksum in it is compared, and it is decoded.
    """
    width, height, *kind = struct.unpack_from(">II5B", contents.ljust(PNG_BEGIN), 16)
    if not (contents.startswith(b"\x89PNG\r\n\x1a\n") and contents.endswith(PNG_END) and kind == [8, 2, 0, 0, 0]):
        raise ValueError("it is not a whole PNG")
    if size not in (None, (height, width)):
        raise ValueError(f"it is of {width} x {height} pixels")
    if not whole:
        return
    at = 8
    while at < len(contents):  # length, type, data and checksum of each chunk
        end = at + 8 + int.from_bytes(contents[at : at + 4])
        if contents[end : end + 4] != zlib.crc32(contents[at + 4 : end]).to_bytes(4):
            raise ValueError("a checksum in it differs")
        at = end + 4
    with Image.open(io.BytesIO(contents)) as image:
        image.load()


class BackgroundWriter:
    """Decodes latents and writes PNGs while the next batch is sampled; at most two batches wait."""

    def __init__(self, vae: VAE, folder: SampleFolder):
        self.vae, self.folder = vae, folder
        self.decoder = ThreadPoolExecutor(1)
        self.encoders = ThreadPoolExecutor(4)
        self.waiting: list[Future] = []

    def put(self, latents: torch.Tensor, indices: list[int]) -> None:
        while len(self.waiting) >= 2:
            self.waiting.pop(0).result()
        self.waiting.append(self.decoder.submit(self._write, latents, indices))

    def _write(self, latents: torch.Tensor, indices: list[int]) -> None:
        images = [Image.fromarray(pixels.numpy()) for pixels in self.vae.decode(latents, indices)]
        list(self.encoders.map(pictures.save_png, images, [self.folder.path(index) for index in indices]))

    def close(self) -> None:
        """Wait for everything to be on disk. Raises OSError when it cannot be written, UserError for no numbers."""
        for future in self.waiting:
            future.result()
        self.decoder.shutdown()
        self.encoders.shutdown()


def sample_missing(
    trained: Trained, vae: VAE, folder: SampleFolder, missing: list[int], args, device: torch.device
) -> int:
    """Make this process's share of the missing images. Returns the signal that any process was stopped by, or 0."""
    mine = missing[distributed.rank() :: distributed.world_size()]
    config, precision = args.sampling, distributed.resolve_precision(args.precision, device)
    model = trained.model.to(device)
    writer, begun = BackgroundWriter(vae, folder), args.num_fid_samples - len(missing)
    bar = monitor.progress_bar(args.num_fid_samples, begun, "image", "sampling")
    with distributed.StopOnSignal() as stop, bar, distributed.agreed_failure(f"--sample-dir {str(folder.root)!r}"):
        if missing and distributed.is_main():
            folder.npz.unlink(missing_ok=True)  # whoever finds one may take it for complete
        for first in range(0, len(mine), args.per_proc_batch_size):
            if stop.received:
                break
            indices = mine[first : first + args.per_proc_batch_size]
            labels = [sampling.label_of(index, trained.config.model.num_classes, config) for index in indices]
            latents = sampling.sample_latents(
                model, config, indices, labels, trained.latent_shape, device, precision, trained.config.objective
            )
            writer.put(latents, indices)
            bar.update(min(len(indices) * distributed.world_size(), bar.total - bar.n))
        writer.close()
    return stop.agreed()


def write_npz(folder: SampleFolder, labels: list[int], size: tuple[int, int]) -> None:
    """Stream images and labels into <name>.npz: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,), the ADM convention."""
    shape = (len(labels), *size, 3)
    bar = monitor.progress_bar(len(labels), unit="image", description="packing")
    with bar, files.whole_file(folder.npz) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor(8) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, len(labels), 256):
                for pixels in pool.map(folder.read, range(first, min(first + 256, len(labels)))):
                    file.write(np.ascontiguousarray(pixels).tobytes())
                    bar.update()
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(labels, dtype=np.int64))


def labels_of(found: Description, args: argparse.Namespace) -> list[int]:
    """Labels of all images."""
    classes = found.config.model.num_classes
    return [sampling.label_of(index, classes, args.sampling) for index in range(args.num_fid_samples)]


def write_results(folder: SampleFolder, trained: Trained, labels: list[int]) -> None:
    """The .npz and the labelled grid of the first samples."""
    images = [folder.read(index) for index in range(min(len(labels), GRID_SAMPLES))]
    captions = [pictures.class_name(label, trained.classes) for label in labels[: len(images)]]
    grid = pictures.draw_grid(images, captions, columns=10, title=folder.name)
    pictures.save_png(grid, folder.grid)
    write_npz(folder, labels, trained.image_size)


def settings_of(found: Description, sha256: str, vae_source: str, vae_sha256: str | None, args, device) -> dict:
    """What decides the images, for the folder's .json."""
    return {
        **pretrained.settings(found, sha256, args.ckpt, args.weights),
        "vae": vae_source,
        "vae_sha256": vae_sha256,
        "precision": distributed.resolve_precision(args.precision, device),
        "vae_precision": args.vae_precision,
        **asdict(args.sampling),
        "guidance_interval": list(args.sampling.guidance_interval),
    }


def is_finished(found: Description, folder: SampleFolder, vae_source: str, args, device: torch.device) -> bool:
    """Whether everything is there, made with these settings; neither model nor autoencoder is loaded to tell."""
    if not (folder.settings.exists() and folder.npz.exists()):
        return False
    stored = files.read_json(folder.settings)
    made_with = VAEConfig(str(stored.get("vae")), stored.get("vae_sha256"))
    if not is_surely(vae_source, made_with):
        return False
    settings = settings_of(found, stored.get("weights_sha256"), vae_source, made_with.sha256, args, device)
    if options.differences(stored, settings, ignored=WHERE):
        return False
    if not folder.is_packed(labels_of(found, args), found.image_size):
        return False
    if folder.missing(range(args.num_fid_samples), found.image_size, packed=folder.npz.stat().st_mtime_ns):
        return False
    return pretrained.weights_sha256(found, args.weights) == stored.get("weights_sha256")


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.planned and not os.path.isfile(args.ckpt):
        return dry_run_without_checkpoint(args)
    found = pretrained.describe(args.ckpt, args.weights, options.given_model(args))
    vae_source = args.vae or found.config.vae.source
    folder = SampleFolder(args.sample_dir, run_name(found, vae_source, args))
    if args.print_name:
        return print(folder.npz)
    sampling.check_sampler(args.sampling, found.config)
    device, logger = distributed.setup(args.tf32), monitor.make_logger()
    places = f"images: {folder.images}\ngrid: {folder.grid}\nsamples: {folder.npz}"
    done = f"nothing to do: all {args.num_fid_samples:,} samples are there"
    if distributed.on_main(is_finished, found, folder, vae_source, args, device):
        return logger.info(f"{done}\n{places}")
    trained = pretrained.load_trained(args.ckpt, args.weights, options.given_model(args))
    if args.compile:
        distributed.check_compiler(device)
        trained.model.compile_blocks()
    vae = load_vae(vae_source, trained, device, args.vae_precision)
    settings = settings_of(trained, trained.sha256, vae_source, vae.config.sha256, args, device)
    distributed.on_main(folder.check, settings)
    missing = distributed.on_main(folder.missing, range(args.num_fid_samples), trained.image_size)
    distributed.on_main(folder.check_space, len(missing), args.num_fid_samples, trained.image_size)
    if args.dry_run:
        return logger.info(
            f"dry run: would make {len(missing):,} of {args.num_fid_samples:,} samples, {args.sampling.steps} steps of "
            f"{args.sampling.sampler} each, and pack them into {folder.npz}; nothing was written"
        )
    with distributed.hold(folder.images, f"--sample-dir {str(args.sample_dir)!r}", logger.info):
        distributed.on_main(folder.open, settings)
        missing = distributed.on_main(folder.missing, missing, trained.image_size)  # of another command, meanwhile
        if number := sample_missing(trained, vae, folder, missing, args, device):
            logger.info("stopped on request; repeat the same command to go on")
            distributed.exit_stopped(number)
        labels = labels_of(trained, args)
        if distributed.on_main(folder.is_packed, labels, trained.image_size):
            logger.info(done)
        else:
            with distributed.agreed_failure(f"--sample-dir {str(folder.root)!r}"):
                if distributed.is_main():
                    write_results(folder, trained, labels)
    logger.info(places)


def dry_run_without_checkpoint(args: argparse.Namespace) -> None:
    """What can be checked before there is a model, or while it is still trained. Raises UserError."""
    check_unloaded(args.vae or "ema", args.image_size, patch_size=2)  # the smallest, of which others are multiples
    files.check_folder(args.sample_dir, "--sample-dir")
    print(f"dry run: would make {args.num_fid_samples:,} samples in {args.sample_dir}; {args.ckpt} was not looked at")


if __name__ == "__main__":
    main()
