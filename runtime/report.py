"""report.html of a run: one page with curves, samples, metrics and settings, which needs nothing beside itself.

    python -m runtime.report results/b4-spiral --metrics samples/<name>.metrics.json

makes it anew for a run folder, finished or not; training writes it at every checkpoint.
"""

import argparse
import base64
import io
import json
from html import escape
from pathlib import Path

from PIL import Image

from runtime import files, monitor, options, previews
from runtime.options import UserError
from runtime.trackers import run_name

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
@media (prefers-color-scheme: dark) { :root { --soft: #9a9a9a; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .2rem 0; color: var(--soft); overflow-wrap: anywhere; }
.tiles, .charts { display: grid; gap: .75rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin-top: 1rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
.tile b { display: block; font-size: 1.2rem; }
.tile span, figcaption { color: var(--soft); font-size: .85rem; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { border-bottom: 1px solid var(--line); padding: .15rem .6rem .15rem 0; }
td { vertical-align: top; overflow-wrap: anywhere; }
td:first-child { width: 14rem; max-width: 45vw; color: var(--soft); }
summary { cursor: pointer; margin: .4rem 0; }
"""
LONGEST = {"grid": 1400, "sheet": 1300}  # pixels to which the wide side of a picture is reduced
POINTS = 1000  # of a curve; a longer one is thinned out
NAMES = 20  # classes that are listed


def write(folder: Path, metrics_files: list[Path] | None = None, out: Path | None = None) -> Path:
    """Make report.html of a run folder, whole or not at all; its path. Raises UserError, and OSError when full."""
    path = out or folder / "report.html"
    config = read_object(folder / "config.json")
    records = monitor.read_metrics(folder / "metrics.jsonl")
    found = sorted(previews.folder_of(folder).glob("*.metrics.json")) if metrics_files is None else metrics_files
    finished = (folder / "finished.json").exists()
    body = [
        heading(folder, config, records, finished),
        section("Curves", curves(records)),
        section("Samples", samples(folder)),
        section("Evaluation", "".join(evaluation(file) for file in found)),
        section("Settings", settings(config, records)),
    ]
    title = escape(run_name(config))
    files.write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(body)}</body>\n</html>\n",
    )
    return path


def read_object(path: Path) -> dict:
    """A JSON object. Raises UserError for anything else."""
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(values).__name__}, expected an object")
    return values


def section(title: str, content: str) -> str:
    """A titled section; nothing where there is no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def heading(folder: Path, config: dict, records: list[dict], finished: bool) -> str:
    """Name and state of the run, and its numbers in short."""
    rope = config["model"]["rope"]
    position = "sin-cos positions"
    if rope:
        kind = f"Spiral RoPE, K = {2 * rope['rotate']} directions" if rope["rotate"] else "axial RoPE"
        position = f"{kind}, border {rope['border']}"
    size = options.format_size(tuple(config["image_size"]))
    lines = [
        f"{config['model']['model']}, {position}, {size} pixels, batch {config['recipe']['global_batch_size']}, "
        f"seed {config['recipe']['global_seed']}",
        str(folder.resolve()),
    ]
    name = "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>\n'
        for label, value in summary(config, records, finished).items()
    )
    return f'<header>\n<h1>{escape(run_name(config))}</h1>\n{name}<div class="tiles">\n{tiles}</div>\n</header>\n'


def summary(config: dict, records: list[dict], finished: bool) -> dict[str, str]:
    """The run in a few numbers: label to text."""
    values = {"step, finished" if finished else "step, not finished": f"{last(records, 'step') or 0:,}"}
    for key, label in (
        ("loss", "training loss"),
        ("val_loss_ema", "validation loss, EMA"),
        ("val_loss", "validation loss"),
    ):
        newest = next((record for record in reversed(records) if key in record), {})
        value, error = newest.get(key), newest.get(f"{key}_se")
        if newest:
            values[label] = "not finite" if value is None else f"{value:.4f}"
            values[label] += "" if error is None else f" ± {error:.4f}"
    timed = [record for record in records if record.get("images_per_second")]
    if timed:
        before = [0, *(record["step"] for record in timed)]
        batch = config["recipe"]["global_batch_size"]
        seconds = [
            (record["step"] - start) * batch / record["images_per_second"]
            for start, record in zip(before, timed, strict=False)
        ]
        images = timed[-1]["step"] * batch
        values["images/s, mean"] = f"{images / sum(seconds):.4g}"
        values["training time, without checkpoints"] = monitor.format_seconds(sum(seconds))
        if not finished:
            values["remaining"] = monitor.format_seconds(timed[-1]["eta_seconds"])
    return values


def last(records: list[dict], key: str):
    """The newest value under a key that is not None; None where there is none."""
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


CHARTS = (  # title, unit, logarithmic, keys with their labels
    ("Loss", "noise MSE; training adds the\nvariational term in bits/dim", True,
     {"loss": "training", "val_loss": "validation, raw", "val_loss_ema": "validation, EMA"}),
    ("Gradient norm", "L2, before clipping", True, {"grad_norm": "gradient norm"}),
    ("Learning rate", "learning rate", False, {"lr": "learning rate"}),
    ("Speed", "images/s", False, {"images_per_second": "images/s"}),
)  # fmt: skip


def curves(records: list[dict]) -> str:
    """Charts of what the records hold, by step."""
    charts = []
    for title, unit, logarithmic, keys in CHARTS:
        lines = {label: [(r["step"], r[key]) for r in records if r.get(key) is not None] for key, label in keys.items()}
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            charts.append(chart(title, unit, logarithmic, lines))
    newest = monitor.newest_tenths(records)
    if newest:
        step, tenths = newest
        lines = {
            monitor.VALIDATED[key][0]: [(100 * k + 50, loss) for k, loss in enumerate(losses) if loss is not None]
            for key, losses in tenths.items()
        }
        x_label = f"timestep (middle of its tenth of the schedule); step {step:,}"
        charts.append(chart("Validation loss by timestep", "noise MSE", True, lines, x_label))
    return f'<div class="charts">\n{"".join(charts)}</div>\n' if charts else ""


def chart(
    title: str,
    unit: str,
    logarithmic: bool,
    lines: dict[str, list[tuple[int, float]]],
    x_label: str = "training step",
) -> str:
    """A figure with a PNG of curves, drawn so that it can be read on light and on dark ground."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    grey = "#808080"
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        points = points[:: -(-len(points) // POINTS)]
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 20 else None)
    axes.set_title(title, color=grey, fontsize=11)
    axes.set_xlabel(x_label, color=grey)
    axes.set_ylabel(unit, color=grey, fontsize=9)
    if logarithmic and all(value > 0 for points in lines.values() for _, value in points):
        monitor.use_log_scale(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(which="both", colors=grey)
    axes.grid(color=grey, alpha=0.25)
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(grey)
    if len(lines) > 1:
        axes.legend(labelcolor=grey, framealpha=0)
    file = io.BytesIO()
    figure.savefig(file, dpi=200, format="png", transparent=True)
    return f"<figure>{image_tag(file.getvalue(), 'png', title)}</figure>\n"


def samples(folder: Path) -> str:
    """The newest grid, and the sheet over time where there is more than one grid."""
    grids = previews.grids(folder)
    figures = ""
    if grids:
        caption = f"newest samples, from EMA weights: step {int(grids[-1].stem):,}"
        figures += picture(grids[-1], LONGEST["grid"], caption)
    if len(grids) > 1 and previews.sheet_path(folder).exists():
        caption = "the same noise and classes over the run"
        figures += picture(previews.sheet_path(folder), LONGEST["sheet"], caption)
    return figures


def picture(path: Path, longest: int, caption: str) -> str:
    """A picture as a JPEG of limited size, and its caption."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((longest, 3 * longest))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, optimize=True)
    caption = escape(caption)
    return f"<figure>{image_tag(file.getvalue(), 'jpeg', caption)}<figcaption>{caption}</figcaption></figure>\n"


def image_tag(content: bytes, kind: str, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(text)}">'


def settings(config: dict, records: list[dict]) -> str:
    """Tables of what decides the run, of its environment and of the newest line of metrics.jsonl."""
    classes = config["data"]["classes"]
    names = ", ".join(classes[:NAMES]) + (f" and {len(classes) - NAMES:,} more" if len(classes) > NAMES else "")
    known = {key: value for key, value in config["data"].items() if key != "classes"}
    about = {key: config.get(key) for key in ("device", "git_commit")}
    tables = {
        "Model": config["model"],
        "Recipe": config["recipe"],
        "Data": {**known, "classes": len(classes), "class names": names},
        "Autoencoder": config["vae"],
        "Command line": config["args"],
        "Environment": about | config["versions"],
        "Newest metrics": records[-1] if records else {},
    }
    return "".join(details(title, values, title in ("Model", "Recipe")) for title, values in tables.items())


def evaluation(path: Path) -> str:
    """What evaluate.py measured, and folded beneath it the settings."""
    values = read_object(path)
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    plain = {key: value for key, value in values.items() if key not in nested}
    return details(path.name, plain, True) + "".join(details(key, nested[key], False) for key in nested)


def details(title: str, values: dict, opened: bool) -> str:
    """A table of nested values that can be folded."""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(shown(value))}</td></tr>\n" for key, value in flat(values))
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(title)}</summary>\n<table>\n{rows}</table></details>\n"


def flat(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested values as (path, value), the keys of a path joined by dots."""
    rows = []
    for key, value in values.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return rows


def shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@options.command
def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the run's folder (--results-dir of train.py)")
    parser.add_argument(
        "--metrics",
        type=Path,
        nargs="+",
        default=None,
        help="files of evaluate.py to show (None: samples/*.metrics.json in the folder)",
    )
    parser.add_argument("--out", type=Path, default=None, help="file to write (None: report.html in the folder)")
    args: argparse.Namespace = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        raise UserError(
            f"{str(args.folder)!r} holds no run (config.json is missing); expected a --results-dir of train.py"
        )
    try:
        print(f"report: {write(args.folder, args.metrics, args.out)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json in {str(args.folder)!r} is not one of train.py ({error!r})") from error
    except OSError as error:
        raise UserError(
            f"the report cannot be written: {error}; free space, or choose another file with --out"
        ) from error


if __name__ == "__main__":
    main()
