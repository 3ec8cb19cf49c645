"""Damage files of every kind in thousands of ways: each is refused by name, or what is read of it is right.

    python tests/fuzz.py --mutations 10000

The kinds: training checkpoints, read as sampling commands read them and as a resumed training does; exported
.safetensors and folders for the hub; .npz of images and of statistics; latent caches; folders of samples; JSON;
metrics.jsonl. Bytes of a file are flipped, cut, zeroed or inserted. In archives, entries are also damaged, dropped,
renamed or exchanged, with checksums that fit; in checkpoints, and in the config.json of a folder for the hub, values
are replaced by others of a wrong type, shape, dtype or size, not finite, or missing, in a file that is otherwise in
order. Every answer has to come within ten seconds, and all of them within one
gigabyte of memory beyond what the program took before.
"""

import argparse
import copy
import io
import json
import logging
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

import cache_latents
import export
import models
import sample_ddp
import train
from demo.digits import write_digits
from runtime import checkpoint, data, files, model_folder, monitor, pictures, pretrained, report
from runtime.image_sets import NpzImages, Reference
from runtime.inception import WIDTHS
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError
from runtime.run import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_XS = {"depth": 1, "hidden_size": 32}
FLAWED = (torch.zeros(3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.complex64), torch.full((2, 3), float("inf")))
OTHER_VALUES = (None, "text", -1, 10**30, float("nan"), [], {}, [[1.0, 2.0]])
OTHER_VALUES += (torch.zeros(0), torch.zeros(1).expand(10**10), *FLAWED)
OTHER_SETTINGS = (*OTHER_VALUES[:8], True, 0, 3, 64, 1e308, "DiT-XL/2", "x" * 10**5, [4, 8], [[[[1]]]], {"rotate": 4})
WRITE_REPORT = report.write  # trainings do without, and it is taken away from them
SECONDS, KILOBYTES = 10, 10**6  # that answers may take: each of them; all of them
SHARES = dict(checkpoint=4, safetensors=0.5, hub=0.5, npz=2, statistics=0.5, cache=2, samples=1, json=1, metrics=1)


# Damage


def damage_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes of the file changed, cut, zeroed or inserted; half of the time near its start or its end."""
    damaged = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        if not damaged:
            break
        near = rng.choice([rng.randrange(len(damaged)), rng.randrange(6000), len(damaged) - rng.randint(1, 6000)])
        at = max(0, min(near, len(damaged) - 1))
        match rng.randrange(5):
            case 0 | 1:
                damaged[at] ^= 1 << rng.randrange(8)
            case 2:
                damaged[at : at + 8] = bytes(8)
            case 3:
                del damaged[at : at + rng.randint(1, 200)]
            case 4:
                damaged[at:at] = rng.randbytes(rng.randint(1, 50))
    return bytes(damaged[: rng.randrange(len(damaged) + 1)] if rng.random() < 0.1 else damaged)


def damage_archive(whole: bytes, rng: random.Random) -> bytes:
    """Another archive, in order as such, with entries changed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    described = next(k for k, (name, _) in enumerate(entries) if name.endswith(("data.pkl", ".npy")))
    for _ in range(rng.randint(1, 3)):
        k = described if rng.random() < 0.5 else rng.randrange(len(entries))
        name, contents = entries[k]
        match rng.randrange(7):
            case 0 | 1 | 2:
                changed = bytearray(contents or b"\0")
                near = rng.choice([len(changed), min(len(changed), 128)])  # where an .npy has its header
                changed[rng.randrange(near)] = rng.randrange(256)
                entries[k] = name, bytes(changed)
            case 3:
                entries[k] = name, contents[: rng.randrange(len(contents) + 1)]
            case 4:
                entries[k] = name, contents + rng.randbytes(rng.randint(1, 100))
            case 5:
                entries[k] = name + "x", contents
            case 6:
                entries[k] = name, rng.choice(entries)[1]
    if rng.random() < 0.2:
        del entries[rng.randrange(len(entries))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, contents in dict(entries).items():
            archive.writestr(name, contents)
    return buffer.getvalue()


def damage_values(state: dict, rng: random.Random) -> bytes:
    """The checkpoint saved with values anywhere in its tree replaced, or keys missing or renamed."""
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 2)):
        parent, key = state, rng.choice(list(state))
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        value = parent[key]
        if isinstance(value, torch.Tensor) and 0 < value.numel() < 10**7 and value.is_floating_point():
            flawed = value.clone().flatten()
            flawed[rng.randrange(len(flawed))] = rng.choice([float("nan"), float("inf")])
            parent[key] = rng.choice([flawed.view(value.shape), value.long(), value.flatten()[:-1], value[None]])
        elif isinstance(parent, dict) and rng.random() < 0.3:
            del parent[key]
        else:
            parent[key] = rng.choice(OTHER_VALUES)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def damage_settings(whole: bytes, rng: random.Random) -> bytes:
    """A config.json without its checksum, and often without that of the weights, with a value changed or missing."""
    if not whole.startswith(b"{"):
        return damage_bytes(whole, rng)
    settings = json.loads(whole)
    for name in ("sha256", *rng.choice([(), ("weights_sha256",), ("weights", "weights_sha256")])):
        del settings[name]
    for _ in range(rng.randint(1, 2)):
        parent, key = settings, rng.choice(list(settings))
        while isinstance(parent[key], dict) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent))
        if rng.random() < 0.3 and len(parent) > 1:
            del parent[key]
        else:
            parent[key] = rng.choice(OTHER_SETTINGS)
    return json.dumps(settings).encode()


# Files, and who reads them


@dataclass
class Subject:
    """Files of a kind. A reader returns whether it took a file as whole, or raises UserError, which names `named`."""

    files: list[Path]
    readers: dict[str, Callable[[], bool]]
    named: list[str]
    changes: dict[str, Callable[[bytes, random.Random], bytes]] = field(default_factory=lambda: {"bytes": damage_bytes})
    close: Callable[[], None] = lambda: None


def assert_finite(*models: torch.nn.Module) -> bool:
    assert all(bool(torch.isfinite(value).all()) for model in models for value in model.state_dict().values())
    return True


def checkpoints(folder: Path, images: Path, vae: Path) -> Subject:
    """A checkpoint of two steps, as sampling commands read it, and as a training that goes on from it."""
    arguments = "--model=DiT-XS/2 --image-size=32 --use-rope --rope-rotate=2 --global-batch-size=8 --max-steps=2"
    arguments = [*arguments.split(), "--sample-every=0", "--num-workers=0", "--precision=fp32"]
    arguments += [f"--data-path={images}", f"--vae={vae}", f"--results-dir={folder / 'run'}"]
    train.main(arguments)
    args = train.parse_args(arguments)
    job = train.plan(args, torch.device("cpu"))
    run = RunFolder(args.results_dir, job.config, args)
    run.logger = logging.getLogger("silent")  # of a warning for every mutation
    path, trainer = run.checkpoints / "0000002.pt", job.trainer()
    state = copy.deepcopy(checkpoint.load(path))  # the file it is mapped from is about to go

    def training() -> bool:
        run.resume(trainer)
        assert trainer.step >= 0 and trainer.sums.shape == (4,)
        return assert_finite(trainer.model, trainer.ema)

    return Subject(
        [path],
        {"sampling": lambda: assert_finite(pretrained.load_trained(path).model), "training": training},
        [str(path.parent), "--rope-rotate"],  # the folder, where no other is left
        {"bytes": damage_bytes, "archive": damage_archive, "values": lambda _, rng: damage_values(state, rng)},
        run.close,
    )


def safetensors(folder: Path, run: Path) -> Subject:
    path = folder / "model.safetensors"
    export.main([f"--ckpt={run}", f"--out={path}"])
    return Subject(
        [path], {"sampling": lambda: assert_finite(pretrained.load_trained(path).model)}, [str(path), "--rope"]
    )


def hub(folder: Path, run: Path) -> Subject:
    """What export.py writes for the hub: what is taken is a model of finite weights, and what describes it."""
    root = folder / "model"
    export.main([f"--ckpt={run}", f"--out={root}"])

    def read() -> bool:
        found = pretrained.load_trained(root)
        assert found.config == pretrained.describe(root).config and found.config.model.build().state_dict()
        return assert_finite(found.model)

    paths = [root / model_folder.CONFIG, root / model_folder.WEIGHTS]
    return Subject(
        paths, {"sampling": read}, [str(root), "--rope"], {"bytes": damage_bytes, "settings": damage_settings}
    )


def npz(folder: Path) -> Subject:
    """Images and labels, compressed and not, as evaluate.py and the demo's measurement read them."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    paths = [folder / "stored.npz", folder / "packed.npz"]
    for path, save in zip(paths, (np.savez, np.savez_compressed), strict=True):
        save(path, arr_0=images, arr_1=np.arange(6))

    def read() -> bool:
        for path in paths:
            found = NpzImages(path, "--samples", labelled=True)
            assert sum(len(part) for part in found.batches(4)) == len(found) == len(found.labels)
        return True

    return Subject(paths, {"images": read}, [str(folder)], {"bytes": damage_bytes, "archive": damage_archive})


def statistics(folder: Path) -> Subject:
    path, width = folder / "statistics.npz", WIDTHS["pool"]
    np.savez_compressed(path, mu=np.zeros(width), sigma=np.zeros((width, width)))

    def read() -> bool:
        return np.isfinite(Reference(path, None).statistics["pool"]["sigma"]).all()

    return Subject([path], {"reference": read}, [str(path)], {"bytes": damage_bytes, "archive": damage_archive})


def cache(folder: Path, images: Path, vae: Path) -> Subject:
    """Every file of a latent cache: what training reads of it is what was written."""
    root, few = folder / "latents", folder / "few"
    for path in sorted(images.iterdir())[:3]:
        shutil.copytree(path, few / path.name, ignore=lambda _, names: sorted(names)[4:])
    arguments = [f"--data-path={few}", f"--latents-dir={root}", f"--vae={vae}", "--image-size=32", "--num-workers=0"]
    cache_latents.main(arguments)

    def items() -> list:
        found = LatentCache(root)
        dataset = LatentData(found, True, 0)
        return [*(dataset[0, index] for index in range(len(dataset))), found.classes, found.paths.tolist()]

    whole = items()

    def read() -> bool:
        found = items()
        damaged = [item for item in found if isinstance(item, data.Unreadable)]
        for item, expected in zip(found, whole, strict=True):
            if isinstance(item, tuple):
                assert torch.equal(item[0], expected[0]) and item[1] == expected[1]
            else:
                assert isinstance(item, data.Unreadable) or item == expected
        return not damaged

    return Subject(sorted(root.iterdir()), {"training": read}, [str(root)])


def samples(folder: Path) -> Subject:
    """Images, .npz, grid and settings of sample_ddp.py: what is taken for whole is what was written."""
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    root, settings, labels = sample_ddp.SampleFolder(folder, "run"), {"steps": 250, "seed": 0}, [0, 1, 2, 0, 1, 2]
    root.images.mkdir(parents=True)
    root.open(settings)
    for index, pixels in enumerate(images):
        pictures.save_png(Image.fromarray(pixels), root.path(index))
    sample_ddp.write_npz(root, labels, (16, 16))
    pictures.save_png(Image.fromarray(images[0]), root.grid)

    def read() -> bool:
        root.check(settings)
        missing, packed = root.missing(range(6), (16, 16)), root.is_packed(labels, (16, 16))
        assert all(np.array_equal(root.read(k), images[k]) for k in range(6) if k not in missing)
        if packed:
            with np.load(root.npz) as archive:
                assert np.array_equal(archive["arr_0"], images)
        return packed and not missing

    paths = [*map(root.path, range(6)), root.npz, root.grid, root.settings]
    return Subject(paths, {"sampling": read}, [str(folder)])


def settings(folder: Path, run: Path) -> Subject:
    """What a run's report shows of its settings and of what was measured."""
    paths = [folder / "config.json", folder / "samples" / "a.metrics.json"]
    paths[1].parent.mkdir()
    shutil.copy(run / "config.json", paths[0])
    shutil.copy(run / "metrics.jsonl", folder)
    files.write_json(paths[1], {"samples": 6, "fid": 12.5, "kid": 0.1, "kid_std": 0.01, "settings": {"seed": 0}})
    return Subject(paths, {"report": lambda: WRITE_REPORT(folder).exists()}, [str(folder)])


def metrics(folder: Path) -> Subject:
    """Lines that are as they were are all found, whatever stands between them."""
    path = folder / "metrics.jsonl"
    records = [{"step": step, "loss": 1 / step, "tenths": [None, 0.5, step]} for step in range(1, 200)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def read() -> bool:
        lines, told = set(path.read_bytes().split(b"\n")), []
        found = monitor.read_metrics(path, told.append)
        assert all(record in found for record in records if json.dumps(record).encode() in lines)
        assert all(str(path) in text for text in told)
        return not told

    return Subject([path], {"metrics": read}, [str(path)])


def prepare(folder: Path, images: Path, vae: Path) -> dict[str, Subject]:
    """A subject of every kind, each in a folder of its own."""
    for name in SHARES:
        (folder / name).mkdir(parents=True)
    trained = checkpoints(folder / "checkpoint", images, vae)
    run = folder / "checkpoint" / "run"
    return {
        "checkpoint": trained,
        "safetensors": safetensors(folder / "safetensors", run),
        "hub": hub(folder / "hub", run),
        "npz": npz(folder / "npz"),
        "statistics": statistics(folder / "statistics"),
        "cache": cache(folder / "cache", images, vae),
        "samples": samples(folder / "samples"),
        "json": settings(folder / "json", run),
        "metrics": metrics(folder / "metrics"),
    }


def fuzz(subject: Subject, mutations: int, seed: int = 0) -> tuple[Counter, float]:
    """Mutate files and read them; how often each reader took or refused each kind of change, and the slowest answer.

    Raises AssertionError, or whatever else a reader lets through, where that is not a UserError naming the file.
    """
    wholes, outcomes, slowest = {path: path.read_bytes() for path in subject.files}, Counter(), 0.0
    for number in range(mutations):
        rng = random.Random(seed * 10**6 + number)
        path, change = rng.choice(subject.files), list(subject.changes)[number % len(subject.changes)]
        path.unlink()  # and not overwritten: tensors of the last one may still be mapped from it
        path.write_bytes(subject.changes[change](wholes[path], rng))
        for reader, read in subject.readers.items():
            started = time.perf_counter()
            try:
                outcomes[reader, change, "taken" if read() else "found damaged"] += 1
            except UserError as error:
                assert any(name in str(error) for name in subject.named), (number, str(error))
                outcomes[reader, change, "refused"] += 1
            except Exception as error:
                raise AssertionError(f"mutation {number} ({change} of {path.name}, seed {seed}): {error!r}") from error
            slowest = max(slowest, time.perf_counter() - started)
        path.unlink()
        path.write_bytes(wholes[path])
    assert slowest < SECONDS
    return outcomes, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000, help="of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(SHARES), default=None, help="mutate files of this kind alone")
    args = parser.parse_args()
    shares = SHARES if args.kind is None else {args.kind: 1}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits", 32)
        subjects = prepare(Path(folder) / "files", Path(folder) / "digits", ROOT / "assets" / "demo_vae")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in shares:
            subject, mutations = subjects[name], round(args.mutations * shares[name] / sum(shares.values()))
            outcomes, slowest = fuzz(subject, mutations, args.seed)
            subject.close()
            for (reader, change, outcome), times in sorted(outcomes.items()):
                print(f"{name:12} {reader:10} {change:8} {outcome:14} {times:5}")
            print(f"{name:12} {mutations} mutations, slowest answer {slowest:.2f} s", flush=True)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < KILOBYTES
    print(f"no crash; {grown / 1000:.0f} MB of memory beyond what was taken before")


if __name__ == "__main__":
    monitor.plot_loss = report.write = lambda _: None
    models.SIZES["XS"].update(SMALLEST_XS)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main()
