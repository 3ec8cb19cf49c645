"""What a model learns, measured against the exact optimum: oriented Gaussian textures.

A class is an angle and a width; an image is white noise, filtered by a Gaussian that is long in that direction, plus a
little white noise. Everything is Gaussian, so the best possible denoiser is known in closed form, and a model's excess
loss is the mean squared difference of its answer to the best one. DiT works on pixels here: a token is a pixel.
The same command goes on after an interruption. Run from the repository root: python -m experiments.textures
"""

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from diffusion import create_diffusion
from diffusion.objectives import NoisePrediction
from experiments import runs
from experiments.comparisons import CONFIDENCE, band, holm, mark, plus_minus, steps_to_reach, table
from experiments.encodings import ENCODINGS, Encoding, LearnedRoPE
from experiments.kernels import ASPECT, WIDTH, best, features, oriented, query_places
from experiments.runs import Results
from models import DiT
from runtime import distributed, files, monitor, options
from runtime.config import Recipe
from runtime.monitor import REPOSITORY
from runtime.options import UserError
from runtime.training import Trainer

PUBLISHED = REPOSITORY / "experiments" / "textures.json"
BUDGETS = (8, 32)  # of a head, at which section 1 measures what it could express
ANGLES = tuple(22.5 * k for k in range(8))  # degrees from the x axis; y counts downwards
AXES, OBLIQUE = [0, 4], [1, 2, 3, 5, 6, 7]  # of the angles
TARGETS = (0.04, 0.02, 0.012)  # mean excess
FEWEST = 3  # seeds of which a difference gets an interval and a test
TENTHS = torch.arange(50, 1000, 100)  # timesteps at which a model is measured


# The textures


def covariance(grid: int, degrees: float, sigma: float, noise: float) -> np.ndarray:
    """Covariance (N, N) of the pixels of a texture, of variance 1, a share of which is white noise.

    White noise filtered by f has the autocorrelation of f, which is computed on a field so large that f has ended.
    """
    field = 2 * grid + 1 + 2 * int(6 * sigma * ASPECT)
    kernel = oriented((field, field), query_places(field, 1), degrees, sigma)[0].reshape(field, field)
    spectrum = np.abs(np.fft.rfft2(kernel, (2 * field, 2 * field))) ** 2
    correlation = np.fft.irfft2(spectrum, (2 * field, 2 * field))
    y, x = np.divmod(np.arange(grid * grid), grid)
    filtered = correlation[y[:, None] - y, x[:, None] - x] / correlation[0, 0]
    return (1 - noise) * filtered + noise * np.eye(grid * grid)


class Textures:
    """All classes on one grid: images of them, and the best possible prediction of the noise in them.

    Classes are numbered angle by angle, then width by width. The image of a class is a Gaussian vector of covariance C.
    """

    def __init__(self, grid: int, sigmas: tuple[float, ...], noise: float, device: torch.device):
        matrices = [covariance(grid, degrees, sigma, noise) for sigma, degrees in product(sigmas, ANGLES)]
        values, vectors = np.linalg.eigh(np.stack(matrices))
        self.grid, self.device = grid, device
        self.eigenvalues = torch.tensor(values, dtype=torch.float32, device=device)  # (C, N)
        self.eigenvectors = torch.tensor(vectors, dtype=torch.float32, device=device)  # (C, N, N), in columns
        self.alphas = torch.tensor(create_diffusion(None).alphas_cumprod, dtype=torch.float32, device=device)  # (T,)

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def images(self, labels: Tensor, white: Tensor) -> Tensor:
        """Images (n, 1, grid, grid) of classes (n,) from white noise (n, N)."""
        scaled = self.eigenvalues[labels].sqrt() * white
        return self._square(torch.einsum("nij,nj->ni", self.eigenvectors[labels], scaled))

    def best_noise(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The expected noise given the noised images x_t (n, 1, grid, grid): what no model can improve on.

        x_t = sqrt(a) x + sqrt(1 - a) noise is Gaussian of covariance a C + (1 - a) I, a being alpha-bar at t, so that
        the expectation is sqrt(1 - a) (a C + (1 - a) I)^-1 x_t.
        """
        a, vectors = self.alphas[t][:, None], self.eigenvectors[labels]
        shares = torch.einsum("nij,ni->nj", vectors, x_t.flatten(1))
        shares = (1 - a).sqrt() / (a * self.eigenvalues[labels] + 1 - a) * shares
        return self._square(torch.einsum("nij,nj->ni", vectors, shares))

    def least_loss(self, t: Tensor) -> Tensor:
        """The least possible loss (C, len(t)), mean squared error of the noise: the mean of a l / (a l + 1 - a) over
        the eigenvalues l of C."""
        signal = self.alphas[t][None, :, None] * self.eigenvalues[:, None]  # (C, len(t), N)
        return (signal / (signal + 1 - self.alphas[t][None, :, None])).mean(2)

    def noised(self, labels: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
        """Images (n, 1, grid, grid) of classes (n,), diffused to timesteps (n,), from the random numbers of source."""
        white, noise = torch.randn(2, len(labels), self.grid**2, generator=source).to(self.device)
        return NOISE_ALONE.noised(self.images(labels, white), t, self._square(noise))

    def _square(self, pixels: Tensor) -> Tensor:
        return pixels.view(-1, 1, self.grid, self.grid)


def random(*seed: int | str) -> torch.Generator:
    """On the CPU, so that every device has the same images."""
    return torch.Generator().manual_seed(distributed.hash_seed("textures", *seed))


@torch.no_grad()
def excess(model: DiT, textures: Textures, images: int) -> Tensor:
    """Mean squared difference (C, len(TENTHS)) of a model's prediction to the best one: the loss above the least one.

    Of so many images a class and timestep, the same for every model.
    """
    source, found = random("held out", textures.grid), torch.zeros(len(textures), len(TENTHS))
    model.eval()
    t = TENTHS.repeat_interleave(images).to(textures.device)
    for label in range(len(textures)):
        labels = torch.full_like(t, label)
        x_t = textures.noised(labels, t, source)
        difference = model(x_t, t, labels) - textures.best_noise(x_t, t, labels)
        found[label] = difference.square().flatten(1).mean(1).view(len(TENTHS), images).mean(1).cpu()
    return found


# The runs


class NoiseAlone(NoisePrediction):
    """DiT's objective without its variational term: the noise by its squared error, which is what the optimum is of."""

    learn_sigma = False

    def __init__(self):
        self.diffusion = create_diffusion(None, learn_sigma=False)


NOISE_ALONE = NoiseAlone()


class Run(NamedTuple):
    """One training run of the study."""

    encoding: str
    heads: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.encoding}/heads{self.heads}/lr{self.lr:g}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What decides the results beside the encodings and the code, stored with them."""

    main: tuple[str, ...] = ("sincos", "axial", "spiral4", "best")  # with all the seeds
    wide: tuple[str, ...] = ("sincos", "axial", "best")  # again with more heads
    seeds: int = 5
    wide_seeds: int = 2
    other_seeds: int = 1  # of all other encodings
    sigmas: tuple[float, ...] = (0.7, 1.0, 1.5)  # short axis of the filter in pixels; the long one is 5.7 times that
    noise: float = 0.01  # white part of the variance
    grid: int = 8  # pixels a side, tokens a side
    larger_grids: tuple[int, ...] = (12, 16)
    depth: int = 3
    hidden: tuple[tuple[int, int], ...] = ((2, 128), (6, 192))  # by number of heads
    steps: int = 2000
    batch: int = 16
    lr: float = 4e-3
    warmup_steps: int = 150
    ema_decay: float = 0.98
    measured_every: int = 200  # steps
    sweep: tuple[tuple[float, tuple[str, ...], int], ...] = (  # learning rate, encodings, seeds
        (2e-3, ("sincos", "axial"), 2),
        (4e-3, ("sincos", "axial", "spiral4", "best"), 5),
        (8e-3, ("sincos", "axial", "spiral4", "best"), 5),
        (1.6e-2, ("sincos", "axial"), 2),
    )

    @property
    def runs(self) -> list[Run]:
        """Every run, once, in the order in which they are made."""
        compared = [(name, 2, self.lr, seed) for seed in range(self.seeds) for name in self.main]
        wide = [(name, 6, self.lr, seed) for seed in range(self.wide_seeds) for name in self.wide]
        swept = [(name, 2, lr, seed) for lr, names, seeds in self.sweep for seed in range(seeds) for name in names]
        others = [(name, 2, self.lr, seed) for seed in range(self.other_seeds) for name in ENCODINGS]
        return list(dict.fromkeys(Run(*names) for names in [*swept, *compared, *others, *wide]))

    def textures(self, grid: int, device: torch.device) -> Textures:
        return Textures(grid, self.sigmas, self.noise, device)


def build(run: Run, study: Study) -> DiT:
    """The model of a run, with the weights that its seed gives, the same for every encoding."""
    hidden, encoding = dict(study.hidden)[run.heads], ENCODINGS[run.encoding]
    torch.manual_seed(distributed.hash_seed(run.seed, "weights"))
    model = DiT(
        input_size=study.grid,
        patch_size=1,
        in_channels=1,
        hidden_size=hidden,
        depth=study.depth,
        num_heads=run.heads,
        class_dropout_prob=0.0,
        num_classes=len(study.sigmas) * len(ANGLES),
        learn_sigma=False,
        rope=encoding.rope,
    )
    model.rope_embedder = encoding.build(hidden // run.heads, study.grid)
    return model


def trained(run: Run, study: Study, device: torch.device) -> dict:
    """Train, and measure on the way and at the end: what is kept of a run."""
    textures, source = study.textures(study.grid, device), random("batches", run.seed)
    recipe = Recipe(
        global_batch_size=study.batch,
        global_seed=run.seed,
        lr=run.lr,
        lr_schedule="linear",
        warmup_steps=study.warmup_steps,
        grad_clip=1.0,
        ema_decay=study.ema_decay,
    )
    precision, curve = distributed.resolve_precision("auto", device), []
    trainer = Trainer(build(run, study), recipe, study.steps, lambda x: x, device, precision)
    trainer.objective = NOISE_ALONE
    while trainer.step < study.steps:
        labels = torch.randint(len(textures), (study.batch,), generator=source)
        white = torch.randn(study.batch, study.grid**2, generator=source)
        labels, white = labels.to(device), white.to(device)
        trainer.train_step([(textures.images(labels, white), labels)])
        if trainer.step % study.measured_every == 0:
            by_angle = excess(trainer.ema, textures, 2).mean(1).view(-1, len(ANGLES)).mean(0)
            curve.append([trainer.step, *(float(by_angle[part].mean()) for part in (AXES, OBLIQUE))])
    final = excess(trainer.ema, textures, 8)
    found = {
        "curve": curve,
        "classes": final.mean(1).tolist(),
        "tenths": final.mean(0).tolist(),
    }
    if run.encoding != "sincos":  # which has a table for the trained grid alone
        found["grids"] = beyond_grid(trainer.ema, study, device)
        if run.seed == 0:
            found["attention"] = attention(trainer.ema, textures, label=ANGLES.index(45)).tolist()
    return found


def beyond_grid(model: DiT, study: Study, device: torch.device) -> dict[str, float]:
    """Mean excess on larger grids, where positions go on beyond those of the training or are squeezed into them."""
    found, rope = {}, model.rope_embedder
    for grid, extension in product(study.larger_grids, ("extrapolate", "interpolate")):
        rope.pt_grid = (grid, grid) if extension == "extrapolate" else (study.grid, study.grid)
        found[f"{grid} × {grid}, {extension}"] = float(excess(model, study.textures(grid, device), 2).mean())
    rope.pt_grid = (study.grid, study.grid)
    return found


@torch.no_grad()
def attention(model: DiT, textures: Textures, label: int, images: int = 64) -> Tensor:
    """Where the pixel in the middle attends to (blocks * heads, N): mean over images of a class, slightly noised."""
    kept, middle = [], int(query_places(textures.grid, 1)[0])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, middle], k)
        kept.append((scores * q.shape[-1] ** -0.5).softmax(-1).mean(0).cpu())  # (heads, N)
        return F.scaled_dot_product_attention(q, k, v)

    for block in model.blocks:
        block.attn.attend = attend
    labels = torch.full((images,), label, device=textures.device)
    t = torch.full_like(labels, int(TENTHS[1]))
    model(textures.noised(labels, t, random("attention")), t, labels)
    for block in model.blocks:
        del block.attn.attend
    return torch.cat(kept)


# Tables and pictures

Groups = dict[tuple[str, int], list[dict]]  # what is kept of the runs by encoding and heads, in the order of seeds
IS_AXIS = np.isin(np.arange(len(ANGLES)), AXES)
PARTS = {"axes": IS_AXIS / len(AXES), "oblique": ~IS_AXIS / len(OBLIQUE), "mean": np.full(len(ANGLES), 1 / len(ANGLES))}
PARTS["oblique − axes"] = PARTS["oblique"] - PARTS["axes"]  # (angles,) weights of the angles in each


def grouped(study: Study, found: dict[str, dict]) -> Groups:
    """The runs at the study's learning rate."""
    groups = defaultdict(list)
    for run in sorted(study.runs, key=lambda run: (run.heads, list(ENCODINGS).index(run.encoding), run.seed)):
        if run.lr == study.lr:
            groups[run.encoding, run.heads].append(found[run.key])
    return dict(groups)


def by_angle(records: list[dict]) -> np.ndarray:
    """Excess (seeds, angles), mean over the widths."""
    return np.array([record["classes"] for record in records]).reshape(len(records), -1, len(ANGLES)).mean(1)


def named(encoding: str, heads: int) -> dict[str, str]:
    return {"encoding": ENCODINGS[encoding].label, "heads": str(heads)}


def excess_table(groups: Groups) -> str:
    """Mean over the seeds by angle; over several angles with the standard deviation between seeds, too."""
    rows = []
    for names, records in groups.items():
        values = by_angle(records)
        row = named(*names) | {"seeds": str(len(records))}
        row |= {f"{angle:g}°": f"{mean:.4f}" for angle, mean in zip(ANGLES, values.mean(0), strict=True)}
        row |= {part: plus_minus(values @ weights, ".4f") for part, weights in PARTS.items()}
        rows.append(row | {"median seed": f"{np.median(values.mean(1)):.4f}"})
    return table(rows)


def differences_table(groups: Groups) -> str:
    """To axial RoPE with as many heads at the same seeds, with 95 % intervals where there are seeds enough.

    Holm's correction is over the table.
    """
    rows, tested = [], []  # tested: row, part of the angles, p
    for (name, heads), records in groups.items():
        if name == "axial":
            continue
        values, others = by_angle(records), by_angle(groups["axial", heads][: len(records)])
        row = named(name, heads)
        for part, weights in PARTS.items():
            difference = (values - others) @ weights
            row[part] = f"{difference.mean():+.4f}"
            if len(difference) >= FEWEST:
                mean, half = band(difference, CONFIDENCE)
                row[part] += f" [{mean - half:+.4f}, {mean + half:+.4f}]"
                tested.append((row, part, stats.ttest_1samp(difference, 0).pvalue))
        row["of the mean"] = f"{100 * (values.mean() / others.mean() - 1):+.0f} %"
        rows.append(row)
    corrected = holm(np.array([p for *_, p in tested]))
    for (row, part, p), p_holm in zip(tested, corrected, strict=True):
        row[part] += mark(p, p_holm)
    return table(rows)


def curve(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and mean excess over all angles at each."""
    steps, axes, oblique = np.array(record["curve"]).T
    return steps, (len(AXES) * axes + len(OBLIQUE) * oblique) / len(ANGLES)


def steps_table(groups: Groups) -> str:
    """First step at which the mean excess is that low, mean over the seeds."""
    rows = []
    for names, records in groups.items():
        row = named(*names)
        for target in TARGETS:
            reached = np.array([steps_to_reach(*curve(record), target) for record in records])
            missing = int((~np.isfinite(reached)).sum())
            row[f"to {target:g}"] = f"not by {missing} of {len(reached)}" if missing else plus_minus(reached, ".0f")
        rows.append(row)
    return table(rows)


def grids_table(groups: Groups) -> str:
    """Mean excess on the trained grid and on larger ones."""
    rows = []
    for names, records in groups.items():
        if "grids" in records[0]:
            row = named(*names) | {"as trained": f"{by_angle(records).mean():.4f}"}
            rows.append(
                row | {grid: f"{np.mean([r['grids'][grid] for r in records]):.4f}" for grid in records[0]["grids"]}
            )
    return table(rows)


def fits_table(groups: Groups, fits: dict) -> str:
    """What one head could express beside what a model with two heads learned."""
    rows = []
    for name, errors in fits.items():
        if (name, 2) not in groups:
            continue
        row, learned = {"encoding": ENCODINGS[name].label}, by_angle(groups[name, 2]).mean(0)
        for budget, part in product(BUDGETS, ("axes", "oblique")):
            error = (np.array(errors[str(budget)]).reshape(-1, len(ANGLES)) @ PARTS[part]).mean()
            row[f"misplaced at budget {budget}, {part}"] = f"{error:.2f}"
        rows.append(row | {f"excess, {part}": f"{learned @ PARTS[part]:.4f}" for part in ("axes", "oblique")})
    return table(rows)


def agreement(groups: Groups, fits: dict) -> str:
    """Spearman's rank correlation of the misplaced attention of one head, in whole percents, with the excess."""
    lines, both = [], [name for name in fits if (name, 2) in groups]
    learned = np.mean([[record["classes"] for record in groups[name, 2][:1]] for name in both], axis=1)
    learned = learned.reshape(len(both), -1, len(ANGLES))  # (encodings, widths, angles), of seed 0, which all have
    for budget in BUDGETS:
        # Rounded, because the solver's own error ranks nothing.
        errors = np.round([fits[name][str(budget)] for name in both], 2).reshape(learned.shape)
        pairs = zip(errors.reshape(-1, len(ANGLES)), learned.reshape(-1, len(ANGLES)), strict=True)
        within = [stats.spearmanr(*pair).statistic for pair in pairs if len(set(pair[0])) > 1]
        line = (
            f"Rank correlation at budget {budget}: {np.mean(within):+.2f} over the eight angles, mean of {len(within)} "
        )
        line += "encodings and widths whose angles differ"
        if len(both) > 2:
            parts = ("oblique", "oblique − axes")
            means = [[(values @ PARTS[part]).mean(1) for values in (errors, learned)] for part in parts]
            found = [
                f"{stats.spearmanr(*pair).statistic:+.2f} ({part})" for pair, part in zip(means, parts, strict=True)
            ]
            line += f"; over {len(both)} encodings {' and '.join(found)}"
        lines.append(f"{line}.")
    return "\n".join(lines)


def sweep_table(study: Study, found: dict[str, dict]) -> str:
    """Mean excess at each learning rate, of every seed."""
    rows: dict[str, dict[str, str]] = {}
    for lr, names, seeds in study.sweep:
        for name in names:
            values = by_angle([found[Run(name, 2, lr, seed).key] for seed in range(seeds)]).mean(1)
            row = rows.setdefault(name, {"encoding": ENCODINGS[name].label})
            row[f"learning rate {lr:g}"] = ", ".join(f"{value:.4f}" for value in values)
    return table(list(rows.values()))


def least_losses(study: Study) -> str:
    """The optimum that the excess is above: by width, mean over angles and timesteps."""
    by_width = study.textures(study.grid, torch.device("cpu")).least_loss(TENTHS).view(-1, len(ANGLES) * len(TENTHS))
    listed = ", ".join(
        f"{loss:.4f} (σ = {sigma:g})" for loss, sigma in zip(by_width.mean(1), study.sigmas, strict=True)
    )
    return f"The least possible loss is {listed}, {by_width.mean():.4f} on average."


def all_tables(study: Study, found: dict[str, dict], fits: dict) -> str:
    groups = grouped(study, found)
    parts = {
        "Excess by angle": f"{least_losses(study)}\n\n{excess_table(groups)}",
        "Differences to axial RoPE": differences_table(groups),
        "Steps to a given excess": steps_table(groups),
        "Larger grids": grids_table(groups),
        "What one head could express, and what was learned": f"{fits_table(groups, fits)}\n\n{agreement(groups, fits)}",
    }
    if study.sweep:
        parts["Learning rate"] = sweep_table(study, found)
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def draw_excess(study: Study, groups: Groups, fits: dict) -> Figure:
    """By angle and by step, the mean and every seed; and against what one head could express, a point an angle."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    around, falling, against = figure.subplots(1, 3)
    for name in study.main:
        look, records = ENCODINGS[name], groups[name, 2]
        closed = [*range(len(ANGLES)), 0]  # 180 degrees are 0 again
        angles, steps = by_angle(records)[:, closed], np.array([curve(record)[1] for record in records])
        for panel, x, values in ((around, [*ANGLES, 180], angles), (falling, curve(records[0])[0], steps)):
            panel.plot(x, values.T, color=look.colour, alpha=0.3, linewidth=0.8)
            panel.plot(x, values.mean(0), color=look.colour, linewidth=2, label=look.label)
    for name in fits:
        if (name, 2) in groups:
            look, errors = ENCODINGS[name], np.array(fits[name][str(BUDGETS[0])]).reshape(-1, len(ANGLES)).mean(0)
            colour = look.colour if name in study.main else "silver"
            against.plot(
                errors, by_angle(groups[name, 2]).mean(0), "o", color=colour, markersize=4, zorder=name in study.main
            )
    around.set(xlabel="angle of the texture, degrees", ylabel="loss above the optimum", xticks=range(0, 181, 45))
    falling.set(xlabel="training step", yscale="log")
    against.set(xlabel=f"misplaced by one head at best, budget {BUDGETS[0]}", ylim=(0, None))
    around.set_ylim(0)
    for panel in (around, falling, against):
        panel.grid(alpha=0.3)
    handles, labels = around.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(study.main), frameon=False)
    return figure


def draw_attention(study: Study, groups: Groups) -> Figure:
    """Where the pixel in the middle of a 45 degree texture looks, in every head of the trained models of seed 0."""
    names = [name for name in study.main if "attention" in groups[name, 2][0]]
    figure = Figure(figsize=(WIDTH, 1.75 * len(names)), layout="constrained")
    for name, line in zip(names, figure.subplots(len(names), 2 * study.depth + 1, squeeze=False), strict=True):
        wanted = covariance(study.grid, 45, study.sigmas[0], study.noise)[query_places(study.grid, 1)[0]]
        line[0].set_ylabel(ENCODINGS[name].label.replace(", ", "\n"), fontsize="small")
        for k, (panel, pattern) in enumerate(zip(line, [wanted, *groups[name, 2][0]["attention"]], strict=True)):
            panel.imshow(np.reshape(pattern, (study.grid, study.grid)), cmap="magma", vmin=0)
            panel.set(xticks=[], yticks=[])
            if name == names[0]:
                panel.set_title(f"block {(k + 1) // 2}, head {2 - k % 2}" if k else "correlation", fontsize="small")
    return figure


# The command

QUICK = Study(main=("sincos", "axial", "spiral4"), wide=(), seeds=2, other_seeds=0, sweep=())
ON_GPU = Study(
    grid=16, larger_grids=(24, 32), depth=6, hidden=((2, 128), (6, 384)), steps=20_000, batch=128, warmup_steps=1000
)


def fit_errors(encoding: Encoding, study: Study) -> dict[str, list[float]]:
    """What one head of the models with two could express at its best: misplaced attention by budget and class.

    For 4 x 4 queries of the training grid together, because with clamp a query's place matters.
    """
    queries, shape = query_places(study.grid, 4), (study.grid, study.grid)
    waves = features(encoding.build(dict(study.hidden)[2] // 2, study.grid), shape, queries)
    wanted = [oriented(shape, queries, angle, sigma) for sigma, angle in product(study.sigmas, ANGLES)]
    return {str(budget): [best(waves, pattern, budget).error for pattern in wanted] for budget in BUDGETS}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="three encodings, two seeds: ten minutes; results in --work-dir")
    help = "cuda: larger images, models and batches, ten times the steps"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=help)
    add("--run", help="train one run alone, as axial/heads2/lr0.004/seed0, into --work-dir/finished.json")
    args = runs.parse_args(parser, PUBLISHED, argv)
    args.study = QUICK if args.quick else ON_GPU if args.device == "cuda" else Study()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave it out for the CPU")
    if args.run is not None and args.run not in (known := [run.key for run in args.study.runs]):
        raise UserError(f"--run {args.run!r} is not a run of this study; expected one such as {known[0]}")
    if args.run is None and (args.quick or args.device == "cuda"):
        args.work_dir /= "quick" if args.quick else "cuda"
        if args.out == PUBLISHED:
            args.out, args.figures = args.work_dir / PUBLISHED.name, args.work_dir
    return args


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, all_runs = torch.device(args.device), {run.key: run for run in args.study.runs}
    if args.run is not None:
        torch.set_num_threads(1)
        return files.write_json(args.work_dir / "finished.json", trained(all_runs[args.run], args.study, device))
    precision = distributed.resolve_precision("auto", device)
    settings = {"device": args.device, "precision": precision} | asdict(args.study)
    results = Results(args.out, settings)

    def prepare() -> None:
        trained_ones = {run.encoding for run in all_runs.values()}
        for name, encoding in ENCODINGS.items():
            # sin-cos rotates nothing, and what learned vectors become is not known beforehand.
            known = encoding.rope is not None and encoding.kind is not LearnedRoPE
            if known and name in trained_ones and name not in results.sections["fits"]:
                results.add("fits", name, fit_errors(encoding, args.study))

    def begin(folder: Path, given: dict) -> subprocess.Popen:
        (folder / "finished.json").unlink(missing_ok=True)  # of other settings
        words = [sys.executable, "-m", "experiments.textures", "--device", args.device, "--work-dir", str(folder)]
        words += ["--run", given["run"], *(["--quick"] if args.quick else [])]
        visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if device.type == "cuda" else {}
        return runs.launch(folder, words, runs.ENVIRONMENT | visible)

    def measure(folder: Path) -> dict:
        return files.read_json(folder / "finished.json")

    found = runs.complete(args, results, {key: {"run": key} for key in all_runs}, prepare, measure, begin)
    if found is not None:
        fits = results.sections["fits"]
        groups = grouped(args.study, found)
        monitor.save_figure(draw_excess(args.study, groups, fits), args.figures / "evidence_textures.png")
        monitor.save_figure(draw_attention(args.study, groups), args.figures / "evidence_attention.png")
        print(all_tables(args.study, found, fits))


if __name__ == "__main__":
    main()
