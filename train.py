"""Train a class-conditional latent diffusion transformer.

The same command starts a run, goes on with an interrupted one, and does nothing when it is finished. It runs alone
or under torchrun, on one node or several.
"""

import argparse
from dataclasses import dataclass, fields, replace
from logging import Logger
from pathlib import Path

import torch
from torch.utils.data import Dataset

from diffusion.objectives import OBJECTIVES
from runtime import data, distributed, estimate, files, monitor, options, trackers, validation
from runtime.config import DEFAULT_OBJECTIVE, DataConfig, ModelConfig, Recipe, RunConfig
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError, check_image_size, check_rope
from runtime.run import RunFolder, is_finished, recorded_warmup, steps_done
from runtime.training import Trainer, initial_model
from runtime.vae import VAE, check_unloaded, latents_from, load_same

DEFAULT_EPOCHS = 1400


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--data-path", type=Path, help="folder with a sub-folder of images for each class")
    source("--latents-dir", type=Path, help="latent cache made by cache_latents.py, instead of --data-path")
    add("--results-dir", type=Path, default=Path("results"), help="the run's folder; its newest checkpoint is resumed")
    add("--model", type=options.model_name, default="DiT-XL/2", help="size and patch, as in DiT-B/4")
    add("--image-size", type=options.image_size, default=(256, 256), help="pixels, as in 256 or 256x384")
    add("--num-classes", type=options.count, default=None, help="classes of the label table (None: class folders)")
    help = f"passes over the data ({DEFAULT_EPOCHS} without --max-steps)"
    add("--epochs", type=options.count, default=None, help=help)
    add("--max-steps", type=options.count, default=None, help="training steps; ends the run if it comes first")
    add("--global-batch-size", type=options.count, default=256, help="images a step, over all processes")
    add("--global-seed", type=options.seed, default=0, help="decides initial weights, data order and noise")
    options.add_vae(parser, none="ema, or the latent cache's")
    options.add_num_workers(parser, "data-loading processes for each process")
    add("--log-every", type=options.count, default=100, help="steps between log lines")
    add("--ckpt-every", type=options.count, default=50_000, help="steps between checkpoints")
    help = "steps between grids of EMA samples (None: at checkpoints; 0: none)"
    add("--sample-every", type=options.non_negative_int, default=None, help=help)
    add("--keep-checkpoints", type=options.count, default=None, help="newest checkpoints to keep (None: all)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    help = "let other images stand in for unreadable ones of --data-path, and list these in log and checkpoint"
    add("--skip-unreadable", action="store_true", help=help)
    add_optimisation(parser)
    speed = parser.add_argument_group("speed and memory")
    options.add_precision(speed)
    options.add_compile(speed)
    add = speed.add_argument
    add("--grad-accum-steps", type=options.count, default=1, help="micro-batches a step, for less memory")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass, for less memory")
    validation.add_options(parser)
    trackers.add_options(parser)
    options.add_rope_options(parser)
    options.add_dry_run(parser, planned=True, steps=True)
    return parser


def add_optimisation(parser: options.Parser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--objective", choices=list(OBJECTIVES), default=DEFAULT_OBJECTIVE, help="what the model learns to predict")
    add("--lr", type=options.positive, default=1e-4, help="learning rate of AdamW")
    add("--lr-schedule", choices=["constant", "linear"], default="constant", help="linear: to 0 at the last step")
    help = "steps of linear rise to --lr; auto: 100, or a tenth of a run of less than 1,000 steps as it begins"
    add("--warmup-steps", type=warmup_steps, default=0, help=help)
    add("--weight-decay", type=options.non_negative, default=0.0, help="weight decay of AdamW")
    add("--grad-clip", type=options.positive, default=None, help="largest gradient norm (None: no clipping)")
    add("--ema-decay", type=options.number(float, 0, 1, open_high=True), default=0.9999, help="of the averaged weights")
    add("--max-bad-steps", type=options.count, default=10, help="non-finite steps in a row that end the run")


def warmup_steps(text: str) -> int | str:
    """An argparse type: a number of steps, or auto."""
    return text if text == "auto" else options.non_negative_int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    trackers.check(args)
    validation.check_options(args)
    check_rope(options.rope_from_args(args), ModelConfig(model=args.model).head_dim, args.model)
    if args.max_steps is not None:
        total_steps(args, args.max_steps)
    processes = args.planned or distributed.expected_processes()
    parts = processes * args.grad_accum_steps
    if args.global_batch_size % parts:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {processes} processes x "
            f"{args.grad_accum_steps} micro-batches; use a multiple of {parts}"
        )
    return args


@dataclass
class Job:
    """A run as its command describes it, checked against the data and the VAE."""

    args: argparse.Namespace
    device: torch.device
    dataset: Dataset
    vae: VAE | None  # None when latents are cached
    held_out: validation.HeldOut | None  # None without validation
    config: RunConfig
    total_steps: int
    steps_per_epoch: int

    @property
    def processes(self) -> int:
        return self.args.planned or distributed.world_size()

    def checkpoint_due(self, step: int) -> bool:
        return step % self.args.ckpt_every == 0 or step == self.total_steps

    def samples_due(self, step: int) -> bool:
        every = self.args.sample_every
        if every is None:
            return self.checkpoint_due(step)
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def trainer(self) -> Trainer:
        args, model = self.args, initial_model(self.config.model, self.args.global_seed)
        model.grad_checkpointing = args.grad_checkpointing
        latents = latents_from(self.config.vae, self.vae)
        precision = distributed.resolve_precision(args.precision, self.device)
        return Trainer(
            model, self.config.recipe, self.total_steps, latents, self.device, precision, args.objective, args.compile
        )


def plan(args: argparse.Namespace, device: torch.device) -> Job:
    """Check the command against the data and the VAE. Raises UserError; writes nothing."""
    if args.latents_dir is not None:
        source, vae = LatentCache(args.latents_dir), None
        check_cache(source, args, device)
        vae_config = source.vae
    else:
        source, vae = data.ImageList(args.data_path), VAE(args.vae or "ema", device)
        vae_config = vae.config
    training, held_out = validation.hold_out(source, vae, args, device)
    if vae is None:
        dataset = LatentData(training, args.flip, args.global_seed)
    else:
        dataset = data.ImageData(training, args.image_size, args.flip, args.global_seed, args.skip_unreadable)
    classes = len(source.classes)
    if args.num_classes is not None and args.num_classes < classes:
        raise UserError(f"--num-classes {args.num_classes} is less than the {classes} class folders; leave it out")
    steps_per_epoch = len(training) // args.global_batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is more than the {len(training)} images; use a smaller batch"
        )
    total = total_steps(args, steps_per_epoch)
    model = ModelConfig(args.model, rope=options.rope_from_args(args))
    config = RunConfig(
        model=replace(
            model,
            input_size=check_image_size(args.image_size, vae_config.downsampling, model.patch_size),
            in_channels=vae_config.latent_channels,
            num_classes=args.num_classes or classes,
            learn_sigma=OBJECTIVES[args.objective].learn_sigma,
        ),
        image_size=args.image_size,
        vae=vae_config,
        data=DataConfig(source.fingerprint, len(training), source.classes),
        recipe=recipe_of(args, total, distributed.on_main(recorded_warmup, args.results_dir)),
        validation=held_out and held_out.config,
        objective=args.objective,
    )
    return Job(args, device, dataset, vae, held_out, config, total, steps_per_epoch)


def recipe_of(args: argparse.Namespace, total: int, recorded: int | None = None) -> Recipe:
    """The recipe of a run of so many steps; recorded is its automatic warm-up where it has begun, with other steps.

    Raises UserError.
    """
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    auto = min(100, total // 10)
    if recorded is not None and 0 <= recorded <= 100:
        auto = recorded
    recipe = replace(recipe, warmup_steps=auto) if recipe.warmup_steps == "auto" else recipe
    check_warmup(recipe.warmup_steps, recipe.lr_schedule, total)
    return recipe


def check_warmup(steps: int, schedule: str, total: int) -> None:
    if schedule == "linear" and steps >= total:
        raise UserError(f"--warmup-steps {steps} leaves nothing of the run's {total} steps; use fewer")


def check_cache(cache: LatentCache, args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError when the command asks for other latents than the cache holds."""
    name = f"--latents-dir {str(args.latents_dir)!r}"
    if cache.image_size != args.image_size:
        stored, asked = (options.format_size(size) for size in (cache.image_size, args.image_size))
        raise UserError(f"{name} was made at image size {stored}, the command says {asked}; pass --image-size {stored}")
    if args.flip and cache.moments.shape[1] == 1:
        raise UserError(f"{name} has no flipped latents; pass --no-flip, or make the cache with --flip")
    if args.vae not in (None, cache.vae.source):  # another place: its weights have to tell
        distributed.only_on_main(load_same, args.vae, cache.vae, device, name)


def open_decoder(job: Job) -> VAE | None:
    """The VAE for samples during training, if there are to be any; of a cache on rank 0 alone. Raises UserError."""
    encoder = job.vae or (job.held_out and job.held_out.vae)
    if encoder is not None or job.args.sample_every == 0:
        return encoder
    name = f"--latents-dir {str(job.args.latents_dir)!r}"
    try:
        return distributed.only_on_main(load_same, job.args.vae, job.config.vae, job.device, name)
    except UserError as error:
        raise UserError(f"{error}; --sample-every 0 trains without samples, which alone need it") from error


def total_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Steps of the run: --epochs or --max-steps, the smaller when both are given. Raises UserError."""
    epochs = args.epochs or (None if args.max_steps else DEFAULT_EPOCHS)
    limits = [args.max_steps, epochs and epochs * steps_per_epoch]
    total = min(limit for limit in limits if limit)
    if args.warmup_steps != "auto":
        check_warmup(args.warmup_steps, args.lr_schedule, total)
    return total


GO_ON, STOP, NO_BATCH, NON_FINITE = range(4)


def reason_to_end(stop: distributed.StopOnSignal, batches: list, trainer: Trainer, max_bad_steps: int) -> int:
    """What all processes do next: the most serious reason that any of them has to end the run."""
    status = GO_ON if stop.received is None else STOP
    if any(isinstance(batch, data.NoBatch) for batch in batches):
        status = NO_BATCH
    if trainer.watch.seen >= max_bad_steps:
        status = NON_FINITE
    return int(distributed.all_reduce(torch.tensor(status), "max"))


def end_early(status: int, stop: distributed.StopOnSignal, batches: list, trainer: Trainer, folder: RunFolder) -> None:
    """Leave the run so that the same command can go on with it; a user error where that needs a remedy."""
    signal_number = stop.agreed()
    if status == NON_FINITE:
        newest = distributed.on_main(folder.newest)
        raise UserError(
            f"loss or gradient not finite in {trainer.watch.seen} steps in a row, the last at step {trainer.step:,} "
            f"(loss {float(trainer.loss):g}); no such step changed the weights, and the newest checkpoint is {newest}: "
            "repeat the command with --precision fp32 to go on from it, or start again with a lower --lr or "
            "--grad-clip 1 in another --results-dir"
        )
    folder.save(trainer, required=True, interrupted=True)
    folder.write_report()
    if status == NO_BATCH:
        found = [str(batch) for batch in batches if isinstance(batch, data.NoBatch)]
        message = next(text for texts in distributed.gather(found) for text in texts)
        raise UserError(f"{message}; everything up to step {trainer.step:,} is saved: repeat the command to go on")
    folder.logger.info(f"stopped on request at step {trainer.step:,}; repeat the same command to go on")
    distributed.exit_stopped(signal_number)


def log(job: Job, trainer: Trainer, pace: monitor.Pace, logger: Logger) -> dict:
    """A line in the log; what it says, for metrics.jsonl."""
    record = trainer.log_record() | pace.measure(job.args.global_batch_size, job.total_steps - trainer.step)
    loss, norm = (f"{value:.4f}" if value is not None else "none" for value in (record["loss"], record["grad_norm"]))
    skipped = f", skipped {record['skipped']} non-finite steps" if record["skipped"] else ""
    logger.info(
        f"step {trainer.step:07d}: loss {loss}, gradient norm {norm}, {record['images_per_second']:.1f} images/s, "
        f"learning rate {record['lr']:.3g}, ETA {monitor.format_seconds(record['eta_seconds'])}{skipped}"
    )
    for path in trainer.newly_skipped():
        logger.info(f"warning: image {path!r} cannot be read; another one stands in for it")
    return record


def train(job: Job, trainer: Trainer, folder: RunFolder, decoder: VAE | None) -> None:
    """Run the remaining steps, or as many as come before a reason to stop."""
    args, logger = job.args, folder.logger
    validator = None
    if job.held_out is not None:
        validator = validation.Validator(job.held_out, args, job.total_steps, job.device, trainer.precision)
    batches = data.EpochBatches(
        len(job.dataset), args.global_batch_size, args.global_seed, trainer.step, args.grad_accum_steps
    )
    metrics = folder.open_metrics(args, trainer.step)
    if trainer.step and job.samples_due(trainer.step) and not folder.has_samples(trainer.step):
        folder.draw_samples(trainer, decoder, metrics)  # a kill came between the checkpoint and its samples
    pace = monitor.Pace()
    stop = distributed.StopOnSignal()
    bar = monitor.progress_bar(job.total_steps, trainer.step)
    opened = data.open_loader(job.dataset, batches, args.num_workers, job.device, stop=stop)
    with stop, bar, metrics, opened as loader:
        while trainer.step < job.total_steps:
            micro_batches = [next(loader, None) for _ in range(args.grad_accum_steps)]
            status = reason_to_end(stop, micro_batches, trainer, args.max_bad_steps)
            if status != GO_ON:
                return end_early(status, stop, micro_batches, trainer, folder)
            trainer.train_step(micro_batches)
            pace.steps += 1
            bar.update()
            last, record, scores = trainer.step == job.total_steps, {}, {}
            if validator is not None and validator.is_due(trainer.step, last):
                with pace.paused():
                    scores = validator.measure(trainer.model, trainer.ema, trainer.step, logger)
            if trainer.step % args.log_every == 0 or last:
                record = log(job, trainer, pace, logger)
            if record or scores:
                epoch = trainer.step // job.steps_per_epoch
                metrics.write({"step": trainer.step, "epoch": epoch, **record, **scores})
            with pace.paused():
                folder.collect()
                if job.checkpoint_due(trainer.step):
                    folder.save(trainer, required=last)
                if job.samples_due(trainer.step):
                    folder.draw_samples(trainer, decoder, metrics)
                if job.checkpoint_due(trainer.step) and not last:
                    folder.write_report()
    folder.finish(trainer.step)
    folder.write_report()


def warn_of_changes(before: dict, args: argparse.Namespace, trainer: Trainer, logger: Logger) -> None:
    """Say which changes that a run may go on with still make it another one; before are its args so far, if any."""
    lengths = [(found.get("max_steps"), found.get("epochs")) for found in (before or vars(args), vars(args))]
    if args.lr_schedule == "linear" and lengths[0] != lengths[1]:
        logger.info("warning: the length of the run changed, so its linear learning rate jumps here")
    precision = before.get("precision")
    if precision not in (None, "auto", trainer.precision):  # older checkpoints have auto, whatever that was
        logger.info(
            f"warning: this run was trained in {precision} so far, and goes on in {trainer.precision}; --precision "
            f"{precision} goes on as before"
        )


def dry_run_without_data(args: argparse.Namespace) -> None:
    """Check what can be checked before an earlier command has made the data. Raises UserError."""
    check_unloaded(args.vae or "ema", args.image_size, ModelConfig(model=args.model).patch_size)
    if args.val_data_path is not None:
        data.ImageList(args.val_data_path, "--val-data-path")
    files.check_folder(args.results_dir, "--results-dir")
    missing = args.latents_dir or args.data_path
    text = f"dry run: would train {args.model} in {args.results_dir}; {missing} is not there yet"
    monitor.make_logger().info(text)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = distributed.setup(args.tf32)
    if args.compile:
        distributed.check_compiler(device)
    source = args.data_path or args.latents_dir / "meta.json"
    if args.planned and not source.exists():
        return dry_run_without_data(args)
    job = plan(args, device)
    if distributed.on_main(is_finished, args.results_dir, job.config, job.total_steps):
        logger = monitor.make_logger()
        return logger.info(f"nothing to do: {args.results_dir} has all of its {job.total_steps:,} steps")
    files.check_folder(args.results_dir, "--results-dir", estimate.checkpoint_bytes(job.config.model))
    decoder = open_decoder(job)
    if args.dry_run is not None:
        done = distributed.on_main(steps_done, args.results_dir, job.config, monitor.make_logger().info)
        return estimate.dry_run(job, decoder, done)
    trainer = job.trainer()
    folder = RunFolder(args.results_dir, job.config, args)
    try:
        before = folder.resume(trainer)
        if trainer.step >= job.total_steps:
            folder.logger.info(f"nothing to do: the run has {trainer.step:,} of {job.total_steps:,} steps")
            return folder.finish(trainer.step)
        warn_of_changes(before or {}, args, trainer, folder.logger)
        folder.begin(device)
        for line in estimate.describe(job):
            folder.logger.info(line)
        train(job, trainer, folder, decoder)
    finally:
        folder.close()


if __name__ == "__main__":
    main()
