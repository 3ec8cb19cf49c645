"""report.html of a run: one page with metrics, samples, curves and settings, which needs nothing beside itself.

    python -m runtime.report results/b4-spiral

makes it anew for a run folder, finished or not, from the pictures and numbers that lie there; training writes it at
every checkpoint.
"""

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import files, monitor, options, pictures
from runtime.config import RunConfig, flatten
from runtime.options import UserError
from runtime.validation import format_loss

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
@media (prefers-color-scheme: dark) { :root { --soft: #9a9a9a; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .2rem 0; color: var(--soft); overflow-wrap: anywhere; }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
.tile b { display: block; font-size: 1.2rem; }
.tile span, figcaption { color: var(--soft); font-size: .85rem; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { border-bottom: 1px solid var(--line); padding: .15rem .6rem .15rem 0; }
td { vertical-align: top; overflow-wrap: anywhere; }
td:first-child { width: 18rem; max-width: 45vw; color: var(--soft); }
summary { cursor: pointer; margin: .4rem 0; }
"""
LONGEST = 1400  # pixels to which the wide side of a picture is reduced
LISTED = 20  # entries of a list at most
METRIC_NAMES = {"fid": "FID", "sfid": "sFID", "kid": "KID"}  # others are called by their key


def write(folder: Path, metrics_files: list[Path] | None = None) -> Path:
    """Make report.html of a run folder, whole or not at all; its path. Raises UserError, and OSError when full."""
    path = folder / "report.html"
    stored = files.read_json(folder / "config.json")
    with files.reading(f"config.json in {str(folder)!r}", "it is not one of train.py"):
        config = RunConfig.from_dict(stored | {"recipe": dict(stored["recipe"])})  # which a run always has
    records = monitor.read_metrics(folder / "metrics.jsonl")
    with files.reading(f"what the report of {str(folder)!r} shows", "remove what is damaged"):
        body = [
            heading(folder, config, records),
            section("Samples", evaluation(folder, metrics_files)),
            section("Curves", curves(folder)),
            section("Samples during training", samples(folder)),
            section("Settings", settings(config.to_dict(), stored)),
        ]
    files.write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(monitor.run_name(config))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{''.join(body)}</body>\n</html>\n",
    )
    return path


def is_current(folder: Path) -> bool:
    """Whether a page is newer than all that it shows. A folder changes when something is added to it or removed."""
    path, inside = folder / "report.html", pictures.samples_folder(folder)
    sources = [*folder.glob("*.json*"), folder / "loss.png"]
    sources += [inside, *inside.glob("*.png"), *inside.glob("*.metrics.json")]
    changed = max(source.stat().st_mtime_ns for source in sources if source.exists())
    return path.exists() and path.stat().st_mtime_ns > changed


def section(title: str, content: str) -> str:
    """A titled section; nothing where there is no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def positions(config: RunConfig) -> str:
    """The position encoding in words."""
    rope = config.model.rope
    if rope is None:
        return "sin-cos positions"
    kind = f"Spiral RoPE, K = {2 * rope.rotate} directions" if rope.rotate else "axial RoPE"
    return f"{kind}, border {rope.border}"


def heading(folder: Path, config: RunConfig, records: list[dict]) -> str:
    """Name and state of the run, and its numbers in short."""
    size = options.format_size(config.image_size)
    lines = [f"{positions(config)}, {size} pixels, batch {config.recipe.global_batch_size}", str(folder.resolve())]
    about = "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    numbers = summary(config.recipe.global_batch_size, records, (folder / "finished.json").exists())
    return f"<header>\n<h1>{escape(monitor.run_name(config))}</h1>\n{about}{tiles(numbers)}</header>\n"


def tiles(values: dict[str, str]) -> str:
    """Numbers, each above its label."""
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>\n'
        for label, value in values.items()
    )
    return f'<div class="tiles">\n{boxes}</div>\n'


def summary(batch: int, records: list[dict], finished: bool) -> dict[str, str]:
    """The run in a few numbers: label to text."""
    values = {"step, finished" if finished else "step, not finished": f"{records[-1]['step'] if records else 0:,}"}
    labels = {"loss": "training loss", "val_loss_ema": "validation loss, EMA", "val_loss": "validation loss, raw"}
    for key, label in labels.items():
        newest = next((record for record in reversed(records) if key in record), None)
        if newest is not None:
            values[label] = format_loss(newest[key], newest.get(f"{key}_se"))
    steps, speeds = monitor.points(records, "images_per_second")
    if len(steps):
        seconds = float((np.diff(steps, prepend=0) * batch / speeds).sum())
        values["images/s, mean"] = f"{steps[-1] * batch / seconds:.4g}"
        values["training time, without checkpoints"] = monitor.format_seconds(seconds)
        if not finished:
            values["remaining"] = monitor.format_seconds(monitor.points(records, "eta_seconds")[1][-1])
    return values


def evaluation(folder: Path, metrics_files: list[Path] | None) -> str:
    """The newest grid of sample_ddp.py under what was measured of it, and what was measured of others.

    <name>.metrics.json and <name>.digits.metrics.json are of the samples <name>.npz, whose grid is <name>.png. A grid
    of which nothing was measured is there where nothing was measured of any.
    """
    inside, measured, blocks = pictures.samples_folder(folder), {}, []
    for path in sorted(inside.glob("*.metrics.json")) if metrics_files is None else metrics_files:
        name = path.name.removesuffix(".metrics.json").removesuffix(".digits")
        measured.setdefault(path.with_name(f"{name}.png"), {})[path.name] = files.read_json(path)
    grids = list(measured) or [path.with_suffix(".png") for path in inside.glob("*.npz")]
    grids.sort(key=lambda grid: grid.stat().st_mtime_ns if grid.exists() else 0, reverse=True)
    for grid in grids if measured else grids[:1]:
        found = measured.get(grid, {})
        numbers = {label: text for values in found.values() for label, text in metrics(values).items()}
        blocks.append(f"<h3>{escape(grid.stem)}</h3>\n{tiles(numbers) if numbers else ''}")
        if grid == grids[0] and grid.exists():
            blocks.append(picture(grid, "the first samples, each under its label"))
        blocks += [details(name, values) for name, values in found.items()]
    return "".join(blocks)


def metrics(values: dict) -> dict[str, str]:
    """The metrics among what a file of evaluate.py holds: its numbers, label to text."""
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    texts = {}
    for key, value in numbers.items():
        if not key.endswith("_std"):
            error = f" ± {numbers[f'{key}_std']:.4g}" if f"{key}_std" in numbers else ""
            texts[METRIC_NAMES.get(key, key.replace("_", " "))] = f"{value:,.4g}{error}"
    return texts


def curves(folder: Path) -> str:
    """loss.png, as it is."""
    path = folder / "loss.png"
    return figure(path.read_bytes(), "png", "losses, gradient norm, learning rate, speed") if path.exists() else ""


def samples(folder: Path) -> str:
    """The newest grid of training, and the sheet over time where there is more than one grid."""
    grids, text = pictures.grids_by_step(folder), ""
    if grids:
        text += picture(grids[-1], f"newest samples, from EMA weights: step {int(grids[-1].stem):,}")
    if len(grids) > 1 and pictures.sheet_path(folder).exists():
        text += picture(pictures.sheet_path(folder), "the same noise and classes over the run")
    return text


def picture(path: Path, caption: str) -> str:
    """A picture and its caption."""
    return figure(jpeg(path), "jpeg", caption)


def jpeg(path: Path) -> bytes:
    """A picture as a JPEG of limited size."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((LONGEST, 3 * LONGEST))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, optimize=True)
    return file.getvalue()


def figure(content: bytes, kind: str, caption: str) -> str:
    source, caption = f"data:image/{kind};base64,{base64.b64encode(content).decode()}", escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"/><figcaption>{caption}</figcaption></figure>\n'


def settings(config: dict, stored: dict) -> str:
    """A table of what decides the run, and folded, of what else is stored in config.json: command line, versions."""
    others = {key: value for key, value in stored.items() if key not in config}
    return table(config) + details("Command line and environment", others)


def details(title: str, values: dict) -> str:
    """A folded table."""
    return f"<details><summary>{escape(title)}</summary>\n{table(values)}</details>\n"


def table(values: dict) -> str:
    """A table of nested values."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(text_of(value))}</td></tr>\n" for key, value in flatten(values).items()
    )
    return f"<table>\n{rows}</table>\n"


def text_of(value) -> str:
    """A value for a reader: of lists the first few entries."""
    if isinstance(value, list):
        more = f" and {len(value) - LISTED:,} more" if len(value) > LISTED else ""
        return (", ".join(map(text_of, value[:LISTED])) or "none") + more
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@options.command
def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(prog="report.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder (--results-dir of train.py)")
    help = "files of evaluate.py to show (None: samples/*.metrics.json in the folder)"
    parser.add_argument("--metrics", type=Path, nargs="+", default=None, help=help)
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        raise UserError(
            f"{str(args.folder)!r} holds no run (config.json is missing); expected a --results-dir of train.py"
        )
    if args.metrics is None and is_current(args.folder):
        return print(f"nothing to do: {args.folder / 'report.html'} is newer than all that it shows")
    with files.cannot_write(f"report.html in {str(args.folder)!r}", "free space, or make the page of a copy"):
        print(f"report: {write(args.folder, args.metrics)}")


if __name__ == "__main__":
    main()
