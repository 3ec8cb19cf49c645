"""Sample many images from a checkpoint, for FID: PNGs, one .npz for the ADM evaluator, and a labelled grid.

Image i depends on the checkpoint, the settings and i alone: any number of processes gives the same images, and an
interrupted command goes on with the missing ones.
"""

import argparse
import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runtime import checkpoint, distributed, monitor, options, pictures, sampling
from runtime.options import UserError
from runtime.sampling import SamplingConfig
from runtime.vae import VAE, load_vae

GRID_SAMPLES = 100
WHERE = ("checkpoint", "vae")  # settings that tell where something was found; hashes tell what it is
PNG_END = b"IEND\xaeB`\x82"  # type and checksum of the chunk that ends every PNG


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_checkpoint_options(parser)
    add = parser.add_argument
    add("--sample-dir", type=Path, default=Path("samples"), help="where the folder of images and the .npz go")
    add("--num-fid-samples", type=options.count, default=50_000, help="images to make")
    add("--per-proc-batch-size", type=options.count, default=32, help="images at a time for each process")
    add("--global-seed", type=options.seed, default=0, help="with the index of an image, decides its label and noise")
    balanced = argparse.BooleanOptionalAction
    add("--class-balanced", action=balanced, default=False, help="labels in turn instead of uniformly random")
    add("--print-name", action="store_true", help="print the path of the .npz that would be made, and stop")
    sampling.add_sampling_options(parser, sampler="ddpm", steps=250, cfg_scale=1.5)
    return parser.parse_args(argv)


def run_name(trained: checkpoint.Trained, vae_source: str, args: argparse.Namespace) -> str:
    """DiT-B-4-0400000-size-256-vae-mse-cfg-1.0-seed-100; size-512-interpolate beyond the trained size."""
    model = trained.config.model.replace("/", "-")
    size, vae = options.format_size(trained.image_size), Path(vae_source).resolve().name
    size += f"-{trained.rope_extend}" if trained.rope_extend else ""
    return f"{model}-{trained.path.stem}-size-{size}-vae-{vae}-cfg-{args.cfg_scale}-seed-{args.global_seed}"


class SampleFolder:
    """The images of a run, <dir>/<name>/000000.png ..., with the settings that made them in <dir>/<name>.json."""

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        self.images = root / name
        self.settings, self.npz, self.grid = (root / f"{name}{suffix}" for suffix in (".json", ".npz", ".png"))

    def open(self, settings: dict) -> None:
        """Create it, or check that it was begun with the same settings. Raises UserError."""
        if self.settings.exists():
            stored = monitor.read_json(self.settings)
            listed = options.differences(stored, settings, ignored=WHERE)
            if listed:
                raise UserError(
                    f"{str(self.images)!r} was begun with other settings: {listed}; repeat them, or use another "
                    "--sample-dir"
                )
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            monitor.write_json(self.settings, settings)
            for partial in self.images.glob("*.partial"):
                partial.unlink()
        except OSError as error:
            raise UserError(f"--sample-dir {str(self.root)!r} cannot be written ({error.strerror})") from error

    def path(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"

    def is_complete(self, index: int) -> bool:
        """Whether the image is there, to the last byte of a PNG."""
        try:
            with open(self.path(index), "rb") as file:
                file.seek(-len(PNG_END), os.SEEK_END)
                return file.read() == PNG_END
        except OSError:
            return False

    def missing(self, total: int) -> list[int]:
        """Indices below total without a complete image."""
        with ThreadPoolExecutor(16) as pool:
            complete = list(pool.map(self.is_complete, range(total)))
        return [index for index, done in enumerate(complete) if not done]

    def check_space(self, missing: int, total: int, size: tuple[int, int]) -> None:
        """Raise UserError when the disk cannot hold the missing images, each at half its raw size, and the .npz."""
        packed = self.npz.stat().st_size if self.npz.exists() else 0
        needed = size[0] * size[1] * 3 * (missing // 2 + total) - packed
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise UserError(
                f"--sample-dir {str(self.root)!r} needs at least {monitor.format_bytes(needed)} for {missing:,} images "
                f"and the .npz of {total:,}, and its disk has {monitor.format_bytes(free)} free; choose another"
            )

    def read(self, index: int) -> np.ndarray:
        with Image.open(self.path(index)) as image:
            return np.asarray(image.convert("RGB"))


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
        images = [Image.fromarray(pixels.numpy()) for pixels in self.vae.decode(latents)]
        list(self.encoders.map(pictures.save_png, images, [self.folder.path(index) for index in indices]))

    def close(self) -> None:
        """Wait for everything to be on disk. Raises OSError when it cannot be written."""
        for future in self.waiting:
            future.result()
        self.decoder.shutdown()
        self.encoders.shutdown()


def sample_missing(trained, vae: VAE, folder: SampleFolder, config: SamplingConfig, args, device) -> bool:
    """Make this process's share of the missing images. Returns whether all of them were made, or a signal came."""
    missing = distributed.on_main(folder.missing, args.num_fid_samples)
    distributed.on_main(folder.check_space, len(missing), args.num_fid_samples, trained.image_size)
    if missing and distributed.is_main():
        folder.npz.unlink(missing_ok=True)  # whoever finds one may take it for complete
    mine = missing[distributed.rank() :: distributed.world_size()]
    shape = (trained.config.in_channels, *trained.latent_size)
    precision = sampling.resolve_precision(args.precision, device)
    model = trained.model.to(device)
    writer, begun = BackgroundWriter(vae, folder), args.num_fid_samples - len(missing)
    bar = monitor.progress_bar(args.num_fid_samples, begun, "image", "sampling")
    with distributed.StopOnSignal() as stop, bar, distributed.agreed_failure(f"--sample-dir {str(folder.root)!r}"):
        for first in range(0, len(mine), args.per_proc_batch_size):
            if stop.received:
                break
            indices = mine[first : first + args.per_proc_batch_size]
            labels = [sampling.label_of(index, trained.config.num_classes, config) for index in indices]
            writer.put(sampling.sample_latents(model, config, indices, labels, shape, device, precision), indices)
            bar.update(min(len(indices) * distributed.world_size(), bar.total - bar.n))
        writer.close()
    return int(distributed.all_reduce(torch.tensor(int(stop.received is not None)), "max")) == 0


def write_npz(folder: SampleFolder, labels: list[int], size: tuple[int, int]) -> None:
    """Stream images and labels into <name>.npz: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,), the ADM convention."""
    partial = folder.npz.with_name(folder.npz.name + ".partial")
    shape = (len(labels), *size, 3)
    bar = monitor.progress_bar(len(labels), unit="image", description="packing")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor(8) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, len(labels), 256):
                for pixels in pool.map(folder.read, range(first, min(first + 256, len(labels)))):
                    file.write(np.ascontiguousarray(pixels).tobytes())
                    bar.update()
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
    bar.close()
    os.replace(partial, folder.npz)


def write_results(folder: SampleFolder, trained: checkpoint.Trained, config: SamplingConfig, total: int) -> None:
    """The .npz and the labelled grid of the first samples."""
    labels = [sampling.label_of(index, trained.config.num_classes, config) for index in range(total)]
    shown = range(min(total, GRID_SAMPLES))
    captions = [pictures.class_name(labels[index], trained.classes) for index in shown]
    grid = pictures.draw_grid([folder.read(index) for index in shown], captions, columns=10, title=folder.name)
    pictures.save_png(grid, folder.grid)
    try:
        write_npz(folder, labels, trained.image_size)
    except OSError:
        folder.npz.with_name(folder.npz.name + ".partial").unlink(missing_ok=True)  # it may fill the disk
        raise


def is_packed(folder: SampleFolder, total: int) -> bool:
    """Whether the .npz and the grid of exactly total images are there."""
    if not (folder.npz.exists() and folder.grid.exists()):
        return False
    try:
        with np.load(folder.npz) as archive:
            return len(archive["arr_1"]) == total
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged: it is made again from the images
        return False


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = sampling.config_from_args(args, args.global_seed, args.class_balanced)
    trained = checkpoint.load_trained(args.ckpt, args.weights, options.given_model(args))
    vae_source = args.vae or trained.vae["source"]
    folder = SampleFolder(args.sample_dir, run_name(trained, vae_source, args))
    if args.print_name:
        return print(folder.npz)
    device = distributed.setup(args.tf32)
    vae = load_vae(vae_source, trained, device, args.vae_precision)
    settings = {
        **trained.describe(args.ckpt, args.weights),
        "vae": vae_source,
        "vae_sha256": vae.describe()["sha256"],
        "precision": sampling.resolve_precision(args.precision, device),
        "vae_precision": args.vae_precision,
        **asdict(config),
        "guidance_interval": list(config.guidance_interval),
    }
    distributed.on_main(folder.open, settings)
    logger = monitor.make_logger()
    if not sample_missing(trained, vae, folder, config, args, device):
        return logger.info("stopped on request; repeat the same command to go on")
    if distributed.on_main(is_packed, folder, args.num_fid_samples):
        logger.info(f"nothing to do: all {args.num_fid_samples:,} samples are there")
    else:
        with distributed.agreed_failure(f"--sample-dir {str(folder.root)!r}"):
            if distributed.is_main():
                write_results(folder, trained, config, args.num_fid_samples)
    logger.info(f"images: {folder.images}\ngrid: {folder.grid}\nsamples: {folder.npz}")


if __name__ == "__main__":
    main()
