"""Train a class-conditional latent diffusion transformer.

The same command starts a run, goes on with an interrupted one, and does nothing when it is finished. It runs alone
or under torchrun, on one node or several.
"""

import argparse
import copy
import fcntl
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion import create_diffusion
from models import DiT, ModelConfig
from runtime import checkpoint, data, distributed, holdout, monitor, options, pictures, report, trackers, validation
from runtime.options import UserError, check_image_size, check_rope
from runtime.sampling import autocast, resolve_precision
from runtime.vae import VAE, sample_latents

DEFAULT_EPOCHS = 1400

# Options that decide the weights. A resumed run has to repeat them; how long, how often and where may change.
RECIPE = (
    "global_batch_size",
    "global_seed",
    "flip",
    "lr",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "ema_decay",
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, default=None, help="folder with a sub-folder of images for each class")
    add("--latents-dir", type=Path, default=None, help="latent cache made by cache_latents.py, instead of --data-path")
    add("--results-dir", type=Path, default=Path("results"), help="the run's folder; its newest checkpoint is resumed")
    add("--model", type=options.model_name, default="DiT-XL/2", help="size and patch, as in DiT-B/4")
    add("--image-size", type=options.image_size, default=(256, 256), help="pixels, as in 256 or 256x384")
    add("--num-classes", type=options.count, default=None, help="classes of the label table (None: class folders)")
    add(
        "--epochs",
        type=options.count,
        default=None,
        help=f"passes over the data ({DEFAULT_EPOCHS} without --max-steps)",
    )
    add("--max-steps", type=options.count, default=None, help="training steps; ends the run if it comes first")
    add("--global-batch-size", type=options.count, default=256, help="images a step, over all processes")
    add("--global-seed", type=options.seed, default=0, help="decides initial weights, data order and noise")
    add("--vae", default=None, help="ema, mse, hub id or folder of an AutoencoderKL (None: ema, or the latent cache's)")
    add("--num-workers", type=options.non_negative_int, default=4, help="data-loading processes for each process")
    add("--log-every", type=options.count, default=100, help="steps between log lines")
    add("--ckpt-every", type=options.count, default=50_000, help="steps between checkpoints")
    add(
        "--sample-every",
        type=options.non_negative_int,
        default=None,
        help="steps between grids of EMA samples (None: at checkpoints; 0: none)",
    )
    add("--keep-checkpoints", type=options.count, default=None, help="newest checkpoints to keep (None: all)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    recipe = parser.add_argument_group("optimisation")
    add = recipe.add_argument
    add("--lr", type=options.positive, default=1e-4, help="learning rate of AdamW")
    add("--lr-schedule", choices=["constant", "linear"], default="constant", help="linear: to 0 at the last step")
    add("--warmup-steps", type=options.non_negative_int, default=0, help="steps of linear rise to --lr")
    add("--weight-decay", type=options.non_negative, default=0.0, help="weight decay of AdamW")
    add("--grad-clip", type=options.positive, default=None, help="largest gradient norm (None: no clipping)")
    add("--ema-decay", type=options.number(float, 0, 1, open_high=True), default=0.9999, help="of the averaged weights")
    add("--max-bad-steps", type=options.count, default=10, help="non-finite steps in a row that end the run")
    speed = parser.add_argument_group("speed and memory")
    add = speed.add_argument
    add(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast; auto: where it is native"
    )
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 for float32 products on CUDA")
    add("--compile", action="store_true", help="compile the model")
    add("--grad-accum-steps", type=options.count, default=1, help="micro-batches a step, for less memory")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass, for less memory")
    holdout.add_options(parser)
    trackers.add_options(parser)
    options.add_rope_options(parser)
    args = parser.parse_args(argv)
    trackers.check(args)
    if (args.data_path is None) == (args.latents_dir is None):
        both = "both were" if args.data_path is not None else "neither was"
        raise UserError(f"exactly one of --data-path and --latents-dir is needed, {both} given; see --help")
    holdout.check_options(args)
    return args


@dataclass
class Job:
    """A run as its command describes it, checked against the data and the VAE."""

    args: argparse.Namespace
    device: torch.device
    dataset: data.ImageData | data.LatentData
    vae: VAE | None  # None when latents are cached
    held_out: holdout.HeldOut | None  # None without validation
    decoder: VAE | None  # of samples made during training; with cached latents on rank 0 only, if there are to be any
    config: dict  # what the checkpoint stores: model, image_size, vae, data, recipe, validation
    total_steps: int
    steps_per_epoch: int

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.config["model"])

    def checkpoint_due(self, step: int) -> bool:
        return step % self.args.ckpt_every == 0 or step == self.total_steps

    def samples_due(self, step: int) -> bool:
        every = self.args.sample_every
        if every is None:
            return self.checkpoint_due(step)
        return every > 0 and (step % every == 0 or step == self.total_steps)


def plan(args: argparse.Namespace, device: torch.device) -> Job:
    """Check the command against the data and the VAE. Raises UserError; writes nothing."""
    rope = options.rope_from_args(args)
    check_batch(args)
    if args.latents_dir is not None:
        source, vae = data.LatentCache(args.latents_dir), None
        vae_config = source.meta["vae"]
        check_cache(source, args)
        decoder = decoder_of(source, args, device)
    else:
        source, vae = data.ImageList(args.data_path), VAE(args.vae or "ema", device)
        decoder = vae
        vae_config = {"source": vae.source, **vae.describe()}
    training, held_out = holdout.hold_out(source, vae, decoder, vae_config, args, device)
    if vae is None:
        dataset = data.LatentData(training, args.flip, args.global_seed)
    else:
        dataset = data.ImageData(training, args.image_size, args.flip, args.global_seed)
    classes = len(source.classes)
    if args.num_classes is not None and args.num_classes < classes:
        raise UserError(f"--num-classes {args.num_classes} is less than the {classes} class folders; leave it out")
    steps_per_epoch = len(training) // args.global_batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is more than the {len(training)} images; use a smaller batch"
        )

    model = ModelConfig(model=args.model, num_classes=args.num_classes or classes, rope=rope)
    check_rope(rope, model.head_dim, args.model)
    latent_size = check_image_size(args.image_size, vae_config["downsampling"], model.patch_size)
    model = {**model.to_dict(), "input_size": list(latent_size), "in_channels": vae_config["latent_channels"]}
    config = {
        "model": model,
        "image_size": list(args.image_size),
        "vae": vae_config,
        "data": {"fingerprint": source.fingerprint, "images": len(training), "classes": source.classes},
        "recipe": {name: getattr(args, name) for name in RECIPE},
    }
    if held_out is not None:
        config["validation"] = held_out.describe()
    total = total_steps(args, steps_per_epoch)
    return Job(args, device, dataset, vae, held_out, decoder, config, total, steps_per_epoch)


def check_batch(args: argparse.Namespace) -> None:
    """Raise UserError when the global batch does not split evenly."""
    parts = distributed.world_size() * args.grad_accum_steps
    if args.global_batch_size % parts:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {distributed.world_size()} processes x "
            f"{args.grad_accum_steps} micro-batches; use a multiple of {parts}"
        )


def check_cache(cache: data.LatentCache, args: argparse.Namespace) -> None:
    """Raise UserError when the command asks for other latents than the cache holds."""
    name = f"--latents-dir {str(args.latents_dir)!r}"
    if tuple(cache.meta["image_size"]) != args.image_size:
        stored, asked = (options.format_size(size) for size in (cache.meta["image_size"], args.image_size))
        raise UserError(f"{name} was made at image size {stored}, the command says {asked}; pass --image-size {stored}")
    # decoder_of compares the weights of a folder, and so does a validation set that has to be encoded.
    moved = args.vae is not None and (
        (args.sample_every != 0 and Path(args.vae).is_dir()) or args.val_data_path is not None
    )
    if args.vae is not None and args.vae != cache.meta["vae"]["source"] and not moved:
        raise UserError(
            f"{name} was made with --vae {cache.meta['vae']['source']}, the command says {args.vae}; leave --vae out"
        )
    if args.flip and cache.moments.shape[1] == 1:
        raise UserError(f"{name} has no flipped latents; pass --no-flip, or make the cache with --flip")


def decoder_of(cache: data.LatentCache, args: argparse.Namespace, device: torch.device) -> VAE | None:
    """The VAE of cached latents, for samples during training: on rank 0, if any are to be made. Raises UserError."""
    loaded = []

    def load() -> None:
        try:
            vae = VAE(args.vae or cache.meta["vae"]["source"], device)
        except UserError as error:
            raise UserError(
                f"{error}; samples during training need the VAE of the latent cache: pass --vae FOLDER where it lies "
                "elsewhere, or --sample-every 0"
            ) from error
        if vae.describe()["sha256"] != cache.meta["vae"]["sha256"]:
            raise UserError(
                f"--vae {vae.source!r} has other weights than the VAE that made --latents-dir {str(cache.root)!r}; "
                "pass --vae FOLDER with the same, or --sample-every 0"
            )
        loaded.append(vae)

    if args.sample_every != 0:
        distributed.on_main(load)
    return loaded[0] if loaded else None


def total_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Steps of the run: --epochs or --max-steps, the smaller when both are given."""
    epochs = args.epochs or (None if args.max_steps else DEFAULT_EPOCHS)
    limits = [args.max_steps, epochs and epochs * steps_per_epoch]
    total = min(limit for limit in limits if limit)
    if args.lr_schedule == "linear" and args.warmup_steps >= total:
        raise UserError(f"--warmup-steps {args.warmup_steps} leaves nothing of the run's {total} steps; use fewer")
    return total


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Learning rate of the update that completes step (1 to total)."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    if args.lr_schedule == "linear":
        return args.lr * (total - step) / (total - args.warmup_steps)
    return args.lr


class NonFiniteWatch:
    """Counts steps in a row whose loss or gradient was not finite, without waiting for the device.

    On a GPU the count is copied in the background and seen a step or two later.
    """

    def __init__(self, device: torch.device, streak: int = 0):
        self.streak = torch.tensor(streak, device=device)
        self.seen = streak
        self._copy, self._copied = None, None

    def update(self, finite: Tensor) -> None:
        self.streak = torch.where(finite, 0, self.streak + 1)
        if self.streak.device.type != "cuda":
            self.seen = int(self.streak)
        elif self._copied is None or self._copied.query():
            self.seen = self.seen if self._copy is None else int(self._copy)
            self._copy = self.streak.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()


class Trainer:
    """Weights, their average and the optimizer, and the step that changes them."""

    def __init__(self, job: Job):
        self.job, self.args, self.device = job, job.args, job.device
        torch.manual_seed(distributed.hash_seed(job.args.global_seed, "weights"))
        self.model: DiT = job.model_config.build().to(job.device)
        self.model.grad_checkpointing = job.args.grad_checkpointing
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.ema_parameters = list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=job.args.lr, weight_decay=job.args.weight_decay, fused=True
        )
        self.diffusion = create_diffusion(None)
        self.precision = resolve_precision(job.args.precision, job.device)
        self.step = 0
        self.sums = torch.zeros(4, device=job.device)  # since the last log line: loss, gradient norm, steps, skipped
        self.watch = NonFiniteWatch(job.device)
        self.loss = torch.zeros((), device=job.device)
        if job.args.compile:
            self.model.compile()
        self.model.train()
        self.distributed_model = distributed.wrap(self.model, job.device)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.distributed_model(x, t, y)

    def micro_batch_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of images (n, 3, H, W) uint8, or of cached moments (n, 2C, h, w)."""
        inputs, y = (tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels))
        moments = inputs if self.job.vae is None else self.job.vae.encode(inputs)
        vae = self.job.config["vae"]
        x = sample_latents(moments, vae["scaling_factor"], vae["shift_factor"])
        t = torch.randint(self.diffusion.num_timesteps, (len(x),), device=self.device)
        return self.diffusion.training_losses(self.predict, x, t, {"y": y})["loss"].mean()

    def train_step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """One update from this process's micro-batches. A non-finite loss or gradient skips it on every process."""
        lr = learning_rate(self.step + 1, self.job.total_steps, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for k, (inputs, labels) in enumerate(batches):
            distributed.seed_step(self.args.global_seed, self.step, k)
            with distributed.no_sync(self.distributed_model, last=k == len(batches) - 1):
                loss = self.micro_batch_loss(inputs, labels) / len(batches)
                # Times 1, or NaN when the loss is not finite: the averaged gradient then tells every process.
                (loss * (1 + 0 * loss.detach())).backward()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).sum()
        self.update()
        self.step += 1

    @torch.no_grad()
    def update(self) -> None:
        """Optimizer step, skipped unless the gradients are finite, then a step of the average to the weights."""
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm)
        if self.args.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.grad_clip, norm)
        self.optimizer.found_inf = (~finite).float()  # the fused optimizer then leaves everything as it is
        self.optimizer.step()
        torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - self.args.ema_decay)
        one, zero = torch.ones_like(norm), torch.zeros_like(norm)
        values = torch.stack([self.loss, norm, one, zero])
        self.sums += torch.where(finite, values, torch.stack([zero, zero, zero, one]))
        self.watch.update(finite)

    def log_record(self) -> dict:
        """Means since the last log line over steps and processes; loss and norm are None if every step was skipped."""
        loss, norm, steps, skipped = self.sums.tolist()
        loss = float(distributed.all_reduce(torch.tensor(loss, dtype=torch.float64))) / distributed.world_size()
        self.sums.zero_()
        return {
            "step": self.step,
            "epoch": self.step // self.job.steps_per_epoch,
            "loss": loss / steps if steps else None,
            "grad_norm": norm / steps if steps else None,
            "lr": learning_rate(self.step, self.job.total_steps, self.args),
            "skipped": int(skipped),
        }

    def state(self) -> dict:
        """What the checkpoint holds. Called on every process."""
        sums = distributed.gather(self.sums.tolist())
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "step": self.step,
            "config": self.job.config,
            "args": {name: plain(value) for name, value in vars(self.args).items()},
            "log": {"sums": sums, "streak": int(self.watch.streak)},
        }

    def load(self, path: Path) -> dict:
        """Go on from a checkpoint; its args. Raises UserError when it is of another model, data set or recipe."""
        state = checkpoint.load(path)
        try:
            check_same(state.get("config"), self.job.config, path)
            checkpoint.check_training_state(state, self.model, path)
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            moments, groups = copy.deepcopy(state["opt"]["state"]), self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})  # settings are the command's
            self.step, log = int(state["step"]), state["log"]
            sums = log["sums"]
            if len(sums) != distributed.world_size():  # sum them up where the number of processes changed
                loss = sum(row[0] for row in sums) * distributed.world_size() / len(sums)
                sums = [[loss if rank == 0 else 0.0, *sums[0][1:]] for rank in range(distributed.world_size())]
            self.sums = torch.tensor(sums[distributed.rank()], dtype=torch.float32, device=self.device).view(4)
            # A run that a streak has ended gets the whole number of tries again.
            streak = int(log["streak"])
            self.watch = NonFiniteWatch(self.device, streak if streak < self.args.max_bad_steps else 0)
            return dict(state["args"])
        except UserError:
            raise
        except Exception as error:  # whatever a hostile file makes these raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"checkpoint {str(path)!r} cannot be resumed ({reason}); use another") from error


def plain(value):
    """A value of plain types: paths as text."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def flatten(config: dict, prefix: str = "") -> dict:
    """Nested settings as {"recipe.lr": 0.0001, ...}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_same(stored: dict | None, current: dict, path: Path) -> None:
    """Raise UserError, naming the differing settings, unless model, data and recipe are the checkpoint's."""
    if not isinstance(stored, dict):
        raise UserError(f"checkpoint {str(path)!r} has no config, so it cannot be resumed; use another --results-dir")
    old, new = flatten(stored), flatten(current)
    if old.get("data.fingerprint") == new["data.fingerprint"]:
        holdout.check_same(stored.get("validation"), current.get("validation"), path)
    # Where weights came from, and what the fingerprints cover.
    ignored = ("vae.source", "data.classes", "validation.left_out")
    listed = options.differences(old, {key: new.get(key) for key in {**old, **new}}, ignored)
    if listed:
        raise UserError(
            f"checkpoint {str(path)!r} was trained with other settings: {listed}; repeat the run's own command, or use "
            "another --results-dir"
        )


class RunFolder:
    """The run's folder: checkpoints, log, metrics; locked against a second run."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.finished = path / "finished.json"
        self._lock = None
        distributed.on_main(self._prepare)

    def _prepare(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(
                f"--results-dir {str(self.path)!r} cannot be written ({error.strerror}); choose another"
            ) from error
        try:
            # lockf and not flock: a record lock dies with this process even when a data worker outlives it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--results-dir {str(self.path)!r} is in use by another run; wait for it or choose another"
            ) from error
        checkpoint.remove_partial(self.checkpoints)

    def begin(self) -> None:
        """Take back the mark that the run is finished."""
        if distributed.is_main():
            self.finished.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def announce(job: Job, trainer: Trainer, logger) -> None:
    """Log what the run will take."""
    args, model = job.args, job.config["model"]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    position = f"RoPE {model['rope']}" if model["rope"] else "sin-cos positions"
    logger.info(f"model: {args.model}, {parameters:,} parameters, {position}")
    logger.info(
        f"data: {job.config['data']['images']:,} images in {len(job.config['data']['classes'])} classes, "
        f"{'cached latents' if job.vae is None else 'encoded online'}, {job.steps_per_epoch:,} steps an epoch"
    )
    size = checkpoint.tensor_bytes([trainer.model.state_dict(), trainer.ema.state_dict()]) * 2
    saves = -(-job.total_steps // args.ckpt_every)
    kept = min(saves, args.keep_checkpoints or saves)
    logger.info(
        f"run: {job.total_steps:,} steps of batch {args.global_batch_size} on {distributed.world_size()} x "
        f"{job.device.type} in {trainer.precision}; disk for {kept} checkpoints: {monitor.format_bytes(size * kept)} "
        f"({monitor.format_bytes(size)} each)"
    )


def resume(trainer: Trainer, folder: RunFolder, logger) -> None:
    """Load the newest checkpoint of the run, if there is one."""
    newest = distributed.on_main(checkpoint.latest, folder.checkpoints, logger.info)
    if newest is not None:
        old = trainer.load(newest)
        logger.info(f"resumed from {newest} at step {trainer.step:,}")
        if trainer.args.lr_schedule == "linear" and trainer.step < trainer.job.total_steps:
            changed = [k for k in ("max_steps", "epochs") if old.get(k) != getattr(trainer.args, k)]
            if changed:
                logger.info("warning: the length of the run changed, so its linear learning rate jumps here")


def save(trainer: Trainer, folder: RunFolder, logger, required: bool) -> bool:
    """Write a checkpoint and return whether it is there. A failed write is a warning, unless the run ends with it."""
    state = trainer.state()

    def write() -> bool:
        path = checkpoint.step_path(folder.checkpoints, trainer.step)
        try:
            checkpoint.save(path, state)
        except checkpoint.SaveError as error:
            if required:
                raise UserError(f"{error}; earlier checkpoints are whole: free space and repeat the command") from error
            logger.info(f"warning: {error}; training goes on, earlier checkpoints are whole")
            return False
        logger.info(f"saved {path}")
        try:
            checkpoint.prune(path, trainer.args.keep_checkpoints)
            monitor.plot_loss(folder.path)
        except OSError as error:
            logger.info(f"warning: {folder.path / 'loss.png'} and old checkpoints are left as they were: {error}")
        return True

    return distributed.on_main(write)


def draw_samples(trainer: Trainer, folder: RunFolder, metrics: monitor.Metrics, logger, remake: bool = True) -> None:
    """The grid of this step, made by rank 0 while the others wait. A failure is a warning; the trackers get it too."""
    job, step = trainer.job, trainer.step

    def draw() -> None:
        if not remake and pictures.grid_path(folder.path, step).exists():
            return
        try:
            path = pictures.draw_samples(
                folder.path, trainer.ema, job.config, job.decoder, step, trainer.device, trainer.precision
            )
        except (OSError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            return logger.info(
                f"warning: no samples of step {step:,}: {reason}; training goes on (--sample-every 0: none)"
            )
        metrics.write_image("samples", path, step)

    if job.samples_due(step):
        distributed.on_main(draw)


def write_report(folder: RunFolder, logger) -> None:
    """report.html anew. A failed write is a warning."""
    if distributed.is_main():
        try:
            report.write(folder.path)
        except (OSError, UserError) as error:
            logger.info(f"warning: {folder.path / 'report.html'} is left as it was: {error}")


def open_metrics(job: Job, folder: RunFolder, step: int, logger) -> monitor.Metrics:
    """metrics.jsonl and the trackers, at a step. Raises UserError on all ranks."""
    found = []
    distributed.on_main(
        lambda: found.extend(trackers.open_trackers(job.args, job.config, folder.path, step, logger.info))
    )
    return monitor.Metrics(folder.path, step, found)


class Pace:
    """Images per second and remaining time, checkpoints not counted."""

    def __init__(self):
        self.start, self.steps = time.perf_counter(), 0

    def paused(self, since: float) -> None:
        self.start += time.perf_counter() - since

    def measure(self, batch: int, remaining: int) -> dict:
        seconds = max(time.perf_counter() - self.start, 1e-9) / max(self.steps, 1)
        self.start, self.steps = time.perf_counter(), 0
        return {"images_per_second": batch / seconds, "eta_seconds": remaining * seconds}


GO_ON, STOP, UNREADABLE, NON_FINITE = range(4)


def agree(stop: distributed.StopOnSignal, batches: list, trainer: Trainer) -> int:
    """What all processes do next: the most serious reason that any of them has to end the run."""
    status = GO_ON if stop.received is None else STOP
    if any(isinstance(batch, data.Unreadable) for batch in batches):
        status = UNREADABLE
    if trainer.watch.seen >= trainer.args.max_bad_steps:
        status = NON_FINITE
    return int(distributed.all_reduce(torch.tensor(status), "max"))


def end_early(status: int, batches: list, trainer: Trainer, folder: RunFolder, logger, saved: int) -> None:
    """Leave the run so that the same command can go on with it; a user error where that needs a remedy."""
    if status == NON_FINITE:
        newest = checkpoint.latest(folder.checkpoints, logger.info) if distributed.is_main() else None
        raise UserError(
            f"loss or gradient not finite in {trainer.watch.seen} steps in a row, the last at step {trainer.step:,} "
            f"(loss {float(trainer.loss):g}); no such step changed the weights, and the newest checkpoint is {newest}: "
            "repeat the command with --precision fp32 to go on from it, or start again with a lower --lr or "
            "--grad-clip 1 in another --results-dir"
        )
    if trainer.step != saved:
        save(trainer, folder, logger, required=True)
    write_report(folder, logger)
    if status == UNREADABLE:
        found = [str(batch) for batch in batches if isinstance(batch, data.Unreadable)]
        message = next(text for texts in distributed.gather(found) for text in texts)
        raise UserError(f"{message}; everything up to step {trainer.step:,} is saved: repeat the command to go on")
    logger.info(f"stopped on request at step {trainer.step:,}; repeat the same command to go on")


def write_metrics(metrics: monitor.Metrics, record: dict, logger) -> None:
    """One line in metrics.jsonl; a failed write is a warning."""
    try:
        metrics.write(record)
    except OSError as error:
        logger.info(f"warning: step {record['step']} is missing in {metrics.path}: {error}")


def log(trainer: Trainer, metrics: monitor.Metrics, pace: Pace, logger, scores: dict) -> None:
    """One line in the log and in metrics.jsonl, there with the scores of a validation at this step."""
    record = trainer.log_record()
    remaining = trainer.job.total_steps - trainer.step
    record |= pace.measure(trainer.args.global_batch_size, remaining)
    write_metrics(metrics, record | scores, logger)
    loss, norm = (f"{value:.4f}" if value is not None else "none" for value in (record["loss"], record["grad_norm"]))
    skipped = f", skipped {record['skipped']} non-finite steps" if record["skipped"] else ""
    logger.info(
        f"step {trainer.step:07d}: loss {loss}, gradient norm {norm}, {record['images_per_second']:.1f} images/s, "
        f"learning rate {record['lr']:.3g}, ETA {monitor.format_seconds(record['eta_seconds'])}{skipped}"
    )


def validate(validator: validation.Validator | None, trainer: Trainer, pace: Pace, logger, last: bool) -> dict:
    """What a validation adds to the record of this step; empty where none is due."""
    if validator is None or not validator.is_due(trainer.step, last):
        return {}
    began = time.perf_counter()
    scores = validator.measure(trainer.model, trainer.ema)
    pace.paused(began)
    validator.log(trainer.step, scores, logger)
    return scores


def train(job: Job, trainer: Trainer, folder: RunFolder, logger) -> None:
    """Run the remaining steps, or as many as come before a reason to stop."""
    args = job.args
    validator = validation.open_validator(job.held_out, args, job.total_steps, job.device, trainer.precision, logger)
    batches = data.EpochBatches(
        len(job.dataset), args.global_batch_size, args.global_seed, trainer.step, args.grad_accum_steps
    )
    with distributed.agreed_failure(f"--results-dir {str(folder.path)!r}"):
        metrics = open_metrics(job, folder, trainer.step, logger)
    saved = trainer.step
    if trainer.step:  # a kill may have come between the checkpoint and its samples
        draw_samples(trainer, folder, metrics, logger, remake=False)
    pace = Pace()
    stop = distributed.StopOnSignal()
    bar = monitor.progress_bar(job.total_steps, trainer.step)
    with stop, bar, metrics, data.open_loader(job.dataset, batches, args.num_workers, job.device) as loader:
        while trainer.step < job.total_steps:
            micro_batches = [next(loader) for _ in range(args.grad_accum_steps)]
            status = agree(stop, micro_batches, trainer)
            if status != GO_ON:
                return end_early(status, micro_batches, trainer, folder, logger, saved)
            trainer.train_step(micro_batches)
            pace.steps += 1
            bar.update()
            last = trainer.step == job.total_steps
            scores = validate(validator, trainer, pace, logger, last)
            if trainer.step % args.log_every == 0 or last:
                log(trainer, metrics, pace, logger, scores)
            elif scores:
                epoch = trainer.step // job.steps_per_epoch
                write_metrics(metrics, {"step": trainer.step, "epoch": epoch, **scores}, logger)
            began = time.perf_counter()
            if job.checkpoint_due(trainer.step):
                saved = trainer.step if save(trainer, folder, logger, required=last) else saved
            draw_samples(trainer, folder, metrics, logger)
            if job.checkpoint_due(trainer.step) and not last:
                write_report(folder, logger)
            pace.paused(began)
    finish(trainer, folder, logger)
    write_report(folder, logger)


def finish(trainer: Trainer, folder: RunFolder, logger) -> None:
    """Mark the run as finished and say where its results are."""
    with distributed.agreed_failure(f"--results-dir {str(folder.path)!r}"):
        if distributed.is_main():
            monitor.write_json(folder.finished, {"step": trainer.step})
    newest = checkpoint.step_path(folder.checkpoints, trainer.step)
    logger.info(f"finished at step {trainer.step:,}: {newest}, loss curve {folder.path / 'loss.png'}")


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = distributed.setup(args.tf32)
    job = plan(args, device)
    trainer = Trainer(job)
    folder = RunFolder(args.results_dir)
    try:
        logger = monitor.make_logger(folder.path)
        resume(trainer, folder, logger)
        if trainer.step >= job.total_steps:
            logger.info(f"nothing to do: the run has {trainer.step:,} of {job.total_steps:,} steps")
            return finish(trainer, folder, logger)
        folder.begin()
        with distributed.agreed_failure(f"--results-dir {str(folder.path)!r}"):
            if distributed.is_main():
                settings = {"args": {k: plain(v) for k, v in vars(args).items()}, **job.config}
                monitor.write_json(folder.path / "config.json", settings | monitor.describe_environment(device))
        announce(job, trainer, logger)
        train(job, trainer, folder, logger)
    finally:
        folder.close()


if __name__ == "__main__":
    main()
