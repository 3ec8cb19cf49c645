"""Fixtures that several test files share."""

import json
import os
import re
import signal
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
TINY_RUN = dict(model="DiT-XS/2", image_size=32, global_batch_size=8, max_steps=7, num_workers=0, log_every=3)
TINY_RUN |= dict(ckpt_every=4, sample_every=0, lr=0.001, precision="fp32")
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # before a session with the hub looks at the proxies
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
TINY_XS = {"depth": 2, "hidden_size": 64}  # head dimension 32; a checkpoint of 3 MB in place of 30
SLOW = "evaluate validation sample_grid demo benchmark textures experiments cache_latents train pipeline reliability"
SLOW_FILES = [f"test_{name}.py" for name in [*SLOW.split(), "setup_env", "run_all"]]  # the last ones start processes

# A shell's background job ignores SIGINT, and one under nohup SIGHUP; the processes that the tests start would too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    """Files that take long come last, the longest at the end: most mistakes show within seconds."""
    items.sort(key=lambda item: SLOW_FILES.index(item.path.name) if item.path.name in SLOW_FILES else -1)


@pytest.fixture(scope="session", autouse=True)
def early_imports(request):
    """What processes import is imported beside the tests that come before those which start them."""
    if any("two" in item.fixturenames or item.path.name == "test_reliability.py" for item in request.session.items):
        import kill

        kill.start_server()


@pytest.fixture
def golden():
    """Reader of a file of golden numbers: golden("rope_tables.npz") or golden("state_dict.json")."""

    def read(name):
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)

    return read


@pytest.fixture
def run_page():
    """Runs the Python blocks of a section of a page: run_page("extending.md", "A new objective") -> their names."""

    def run(page: str, title: str) -> dict:
        text = (TESTS.parent / "docs" / page).read_text(encoding="utf-8")
        (section,) = re.findall(rf"^##? {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        names = {"__name__": page.removesuffix(".md")}
        for block in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            exec(block, names)
        return names

    return run


@pytest.fixture
def fill_weights():
    """Gives a model the weights of the golden numbers, which follow from the names in its state dict."""

    def fill(model):
        weights = model.state_dict()
        for name in weights.keys() - {"pos_embed", "rope_embedder.freqs"}:
            random = np.random.RandomState(zlib.crc32(name.encode()))
            weights[name] = torch.from_numpy(random.standard_normal(weights[name].shape).astype(np.float32) * 0.05)
        model.load_state_dict(weights)
        return model

    return fill


@pytest.fixture
def tiny_commands(monkeypatch):
    """Runs commands on one thread of the CPU, where bits can be compared, with a smaller DiT-XS and without plots."""
    with tiny(monkeypatch):
        yield


@contextmanager
def tiny(patch: pytest.MonkeyPatch, plots: bool = False):
    import models
    from runtime import distributed, monitor, report

    if not plots:
        patch.setattr(monitor, "plot_loss", lambda _: None)
        patch.setattr(report, "write", lambda _: None)
    patch.setattr(distributed, "_device", lambda *_: torch.device("cpu"))
    for name, value in TINY_XS.items():
        patch.setitem(models.SIZES["XS"], name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compilations(monkeypatch):
    """Counts what is compiled, in place of compiling it to machine code, which takes long."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


@pytest.fixture(scope="session")
def make_vae(tmp_path_factory):
    """Writer of a small, untrained AutoencoderKL: make_vae(stages, scaling_factor) -> its folder."""

    def make(stages: int = 4, scaling_factor: float = 0.5, seed: int = 0) -> Path:
        from diffusers import AutoencoderKL

        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("vae")
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * stages,
            up_block_types=["UpDecoderBlock2D"] * stages,
            block_out_channels=[4, 4, 8, 8][:stages],
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=32,
            scaling_factor=scaling_factor,
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vae_folder(make_vae):
    """A small, untrained AutoencoderKL with a down-sampling of 8."""
    return make_vae()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 images of 32 x 32 in three classes, each of them of its own colours."""
    root = tmp_path_factory.mktemp("data") / "it's a $HOME set"
    random = np.random.default_rng(0)
    for index in range(24):
        folder = root / ("ant", "bee", "käfer")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return root


@pytest.fixture(scope="session")
def train_arguments(image_folder, vae_folder):
    """Command line of a tiny run: train_arguments(results_dir, lr=0.01, no_flip=True, vae=None to leave it out)."""

    def build(results: Path, **changes) -> list[str]:
        options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "results_dir": results}
        return command_line(options | changes)

    return build


@pytest.fixture(scope="session")
def cache_arguments(image_folder, vae_folder):
    """Command line that caches the images: cache_arguments(latents_dir, no_flip=True)."""

    def build(folder: Path, **changes) -> list[str]:
        options = {"data_path": image_folder, "latents_dir": folder, "vae": vae_folder, "image_size": 32}
        return command_line(options | {"num_workers": 0, "batch_size": 5} | changes)

    return build


@pytest.fixture
def sample_arguments(run):
    """Command line that makes 13 images with the run's last checkpoint: sample_arguments(sample_dir, cfg_scale=1)."""

    def build(folder: Path, **changes) -> list[str]:
        options = dict(num_fid_samples=13, num_sampling_steps=4, per_proc_batch_size=5, precision="fp32")
        options |= {"ckpt": run / "checkpoints" / "0000007.pt", "sample_dir": folder}
        return command_line(options | changes)

    return build


def contents(folder: Path) -> dict:
    """Size and time of every file below a folder, None for folders. A lock may have been taken and given back."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if path.name != ".lock":
            found[path] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def stops(main, arguments: list[str], number: int = signal.SIGTERM) -> None:
    """Run a command that this signal stops; its exit status says so."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 128 + number


def metrics_and_features(options: dict) -> tuple[dict, dict]:
    """What evaluate.py measures with these options, and the features that it extracted from each .npz, by its stem."""
    import evaluate
    from runtime import inception

    extract, features = inception.extract, {}

    def remember(images, *args):
        features[images.path.stem] = extract(images, *args)
        return features[images.path.stem]

    with pytest.MonkeyPatch.context() as patch, tiny(patch):
        patch.setattr(inception, "extract", remember)
        evaluate.main(command_line(options))
    return json.loads(options["samples"].with_suffix(".metrics.json").read_text()), features


def command_line(options: dict) -> list[str]:
    """Options as arguments: True is a flag, None is left out, a tuple is several values."""
    arguments = []
    for name, value in options.items():
        if value is None:
            continue
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments += map(str, value) if isinstance(value, tuple) else [str(value)]
    return arguments


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, train_arguments):
    """Trains what tests share, and do not go on with: make_run(lr=0.01) -> the run's folder."""

    def make(plots: bool = False, **changes) -> Path:
        import train

        results = tmp_path_factory.mktemp("run") / "results"
        with pytest.MonkeyPatch.context() as patch, tiny(patch, plots):
            train.main(train_arguments(results, **changes))
        return results

    return make


@pytest.fixture(scope="session")
def run(make_run):
    """Folder of a finished run of 7 steps: Spiral RoPE, fast enough a learning rate for the weights to matter."""
    return make_run(plots=True, lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)


@pytest.fixture(scope="session")
def whole(make_run):
    """Folder of a finished run with the arguments of train_arguments."""
    return make_run()


@pytest.fixture(scope="session")
def cache(tmp_path_factory, cache_arguments):
    """Folder of a latent cache of the images."""
    import cache_latents

    folder = tmp_path_factory.mktemp("cache") / "latents"
    with pytest.MonkeyPatch.context() as patch, tiny(patch):
        cache_latents.main(cache_arguments(folder))
    return folder


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that has to be refused: exit status 2 and one line on stderr, which is returned.

    Nothing below tmp_path is changed, unless the command had begun its work when it found the mistake.
    """

    def call(main, arguments, has_begun: bool = False) -> str:
        capsys.readouterr()
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert stopped.value.code == 2
        assert has_begun or contents(tmp_path) == before
        assert errors.count("\n") == 1 and errors.endswith("\n"), errors
        program, line = errors[:-1].split(": error: ", 1)
        assert program == f"{main.__module__.split('.')[-1]}.py"
        return line

    return call


@pytest.fixture(scope="session")
def two(tmp_path_factory, image_folder, vae_folder):
    """What two gloo processes did in each scenario of two_processes.py: two("gradients") -> one dict a rank.

    Each scenario has a folder of its name in two.folder; two.output and two.errors are what was printed.
    """
    import kill
    import two_processes

    folder = tmp_path_factory.mktemp("two")
    process = kill.start(two_processes.torchrun, folder, image_folder, vae_folder)
    status, printed = kill.ended_by(process), [(folder / name).read_text() for name in ("output", "errors")]
    assert status == 0, "".join(printed)

    def read(scenario: str) -> list[dict]:
        return [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(2)]

    read.folder, (read.output, read.errors) = folder, printed
    return read


@pytest.fixture
def signal_after(monkeypatch):
    """Makes this process signal itself when a function returns for the count-th time, and undoes it then."""

    def patch(owner, name: str, count: int, number: int = signal.SIGTERM) -> None:
        original, calls = getattr(owner, name), []

        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(1)
            if len(calls) == count:
                monkeypatch.setattr(owner, name, original)
                os.kill(os.getpid(), number)
            return result

        monkeypatch.setattr(owner, name, wrapper)

    return patch
