"""Damage a real training checkpoint in thousands of ways: it is refused by name, or what loads is whole and finite.

    python tests/fuzz_checkpoint.py --mutations 2000

Each mutation is read as sampling commands read it and as a resumed training does. There are three kinds: bytes of the
file are flipped, cut, zeroed or inserted; entries of the archive are damaged, dropped, renamed or exchanged, with
checksums that fit; values are replaced by others of a wrong type, shape, dtype or size, not finite, or missing, in a
file that is otherwise in order.
"""

import argparse
import copy
import io
import logging
import random
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import models
import train
from demo.digits import write_digits
from runtime import checkpoint, monitor, pretrained, report
from runtime.options import UserError
from runtime.run import RunFolder
from runtime.training import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_XS = {"depth": 1, "hidden_size": 32}
FLAWED = (torch.zeros(3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.complex64), torch.full((2, 3), float("inf")))
OTHER_VALUES = (None, "text", -1, 10**30, float("nan"), [], {}, [[1.0, 2.0]])
OTHER_VALUES += (torch.zeros(0), torch.zeros(1).expand(10**10), *FLAWED)


def damage_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes of the file changed, cut, zeroed or inserted; half of the time near its start or its end."""
    damaged = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
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
    return bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)


def damage_archive(whole: bytes, rng: random.Random) -> bytes:
    """Another archive, in order as such, with entries changed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    pickled = next(k for k, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    for _ in range(rng.randint(1, 3)):
        k = pickled if rng.random() < 0.5 else rng.randrange(len(entries))
        name, contents = entries[k]
        match rng.randrange(7):
            case 0 | 1 | 2:
                changed = bytearray(contents or b"\0")
                changed[rng.randrange(len(changed))] = rng.randrange(256)
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


@dataclass
class Readers:
    """Reads the checkpoint of a run's folder: as sampling commands do, and as a training that goes on from it."""

    folder: RunFolder
    trainer: Trainer
    path: Path

    def sampling(self) -> None:
        self.assert_finite(pretrained.load_trained(self.path).model)

    def training(self) -> None:
        self.folder.resume(self.trainer)
        self.assert_finite(self.trainer.model, self.trainer.ema)
        assert self.trainer.step >= 0 and self.trainer.sums.shape == (4,)

    def assert_finite(self, *models: torch.nn.Module) -> None:
        assert all(bool(torch.isfinite(value).all()) for model in models for value in model.state_dict().values())

    def refuses(self, message: str) -> bool:
        """Whether a refusal names the file, or the folder in which no other is left."""
        return str(self.path.parent) in message or message.startswith("--rope-rotate")


def prepare(folder: Path, images: Path, vae: Path) -> tuple[Path, Readers]:
    """A checkpoint of two steps, and who reads it."""
    arguments = "--model=DiT-XS/2 --image-size=32 --use-rope --rope-rotate=2 --global-batch-size=8 --max-steps=2"
    arguments = [*arguments.split(), "--sample-every=0", "--num-workers=0", "--precision=fp32"]
    arguments += [f"--data-path={images}", f"--vae={vae}", f"--results-dir={folder / 'run'}"]
    train.main(arguments)
    args = train.parse_args(arguments)
    job = train.plan(args, torch.device("cpu"))
    run = RunFolder(args.results_dir, job.config, args)
    run.logger = logging.getLogger("silent")  # of a warning for every mutation
    path = run.checkpoints / "0000002.pt"
    return path, Readers(run, job.trainer(), path)


def fuzz(path: Path, readers: Readers, mutations: int, seed: int = 0) -> Counter:
    """Mutate the checkpoint and read it both ways; how often each kind was refused or loaded by each reader.

    Raises AssertionError, or whatever else a reader lets through, where that is not a UserError naming the file.
    """
    whole, outcomes = path.read_bytes(), Counter()
    state = copy.deepcopy(checkpoint.load(path))  # the file it is mapped from is about to go
    for number in range(mutations):
        rng = random.Random(seed * 10**6 + number)
        kind = ("bytes", "archive", "values")[number % 3]
        change = {"bytes": damage_bytes, "archive": damage_archive, "values": damage_values}[kind]
        path.unlink()  # and not overwritten: tensors of the last one may still be mapped from it
        path.write_bytes(change(state if kind == "values" else whole, rng))
        for reader in ("sampling", "training"):
            try:
                getattr(readers, reader)()
                outcomes[reader, kind, "loaded"] += 1
            except UserError as error:
                assert readers.refuses(str(error)), (number, str(error))
                outcomes[reader, kind, "refused"] += 1
            except Exception as error:
                raise AssertionError(f"mutation {number} ({kind}, seed {seed}) as {reader}: {error!r}") from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits", 32)
        path, readers = prepare(Path(folder), Path(folder) / "digits", ROOT / "assets" / "demo_vae")
        outcomes = fuzz(path, readers, args.mutations, args.seed)
        readers.folder.close()
    for (reader, kind, outcome), times in sorted(outcomes.items()):
        print(f"{reader:10} {kind:10} {outcome:10} {times}")
    print(f"{args.mutations} mutations, read as sampling and as training: no crash")


if __name__ == "__main__":
    monitor.plot_loss = report.write = lambda _: None
    models.SIZES["XS"].update(SMALLEST_XS)
    torch.set_num_threads(1)
    main()
