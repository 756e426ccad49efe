"""Command lines of the entry points: parse, call one function, print. Mistakes of the user end with exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from simla_ray.config.enums import FORMS
from simla_ray.config.load import load_run, to_yaml
from simla_ray.config.schema import Method, Run, Size, Variant
from simla_ray.errors import UserError, guarded

#: What a run that is interrupted says.
INTERRUPTED = "interrupted; the same command with the same --name goes on from the last checkpoint"


def pretrain_main(argv: Sequence[str]) -> int:
    """``experiments/pretrain.py``"""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pretrain an image-text model. Without arguments: SIMLA, tiny, on the built-in world.",
    )
    config_arguments(parser)
    run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: train(run_from(arguments), arguments), INTERRUPTED)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command understands that trains a run."""
    parser.add_argument("--config", action="append", type=Path, metavar="FILE", help="YAML file; may be given again")
    parser.add_argument(
        "--name", help="folder under storage (default: a fresh numbered one); an interrupted run goes on"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check config, data and resources, print the plan, train nothing"
    )


def train(run: Run, arguments: argparse.Namespace) -> int:
    """Train, evaluate and report; or only print the config, or check, as ``run_arguments`` say."""
    if arguments.print_config:
        print(to_yaml(run), end="")
        return 0
    if arguments.dry_run:
        from simla_ray.orchestration.preflight import dry_run

        dry_run(run, _say)
        return 0
    from simla_ray.orchestration.launch import pretrain
    from simla_ray.report.terminal import summary_table

    summary = pretrain(run, _say)
    print(summary_table(summary))
    print(f"report     {run.storage / summary['name'] / 'report.html'}")
    return 0


def evaluate_main(argv: Sequence[str]) -> int:
    """``experiments/evaluate.py``"""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate the best checkpoint of a run.")
    parser.add_argument("run", type=Path, help="folder of the run, or its name under --storage")
    parser.add_argument(
        "tasks",
        nargs="*",
        help="retrieval match grounding keywords words classification ratings vqa statements; none: all that the data "
        "allow",
    )
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder that holds runs (default: runs)")
    parser.add_argument(
        "--data", nargs="+", metavar="URI", help="evaluate on these files instead of the run's test set"
    )
    parser.add_argument("--split", help="keep only rows of --data whose split column has this value")
    parser.add_argument(
        "--layers", default="all", metavar="all|auto|5,8", help="of grounding; auto: chosen on the run's validation set"
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="FOLDER", default=[], help="where lists may name images in"
    )
    parser.add_argument("--label-column", metavar="NAME", help="column with the class of a row (default: label)")
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", default=[], help='prompts of a class, "a photo of a {}", or a file'
    )
    parser.add_argument(
        "--ratings",
        type=Path,
        metavar="FILE",
        help="people's ratings: CSV, TSV or JSON lines with image, caption, rating",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="share the rows between N Ray workers, of the cluster at RAY_ADDRESS or of this machine: the same numbers",
    )
    parser.add_argument("--score", nargs="+", metavar="URI", help="score the pairs in these files instead; see --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV that --score writes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    arguments = parser.parse_intermixed_args(argv)

    def main() -> int:
        from simla_ray.evaluation.tasks import summary, table
        from simla_ray.orchestration.evaluate import evaluate_run

        if arguments.score is not None or arguments.out is not None:
            return _score(arguments)
        results = evaluate_run(
            arguments.run,
            arguments.tasks,
            arguments.storage,
            arguments.data,
            arguments.split,
            images=arguments.images,
            label_column=arguments.label_column,
            templates=arguments.templates,
            ratings=arguments.ratings,
            layers=arguments.layers,
            workers=arguments.workers,
            say=partial(print, file=sys.stderr, flush=True) if arguments.json else _say,
        )
        for task in arguments.tasks:
            if (why := results["data"].metrics["not_run"].get(task)) is not None:
                print(f"note: {task} is not run: {why}", file=sys.stderr)
        print(json.dumps(summary(results)) if arguments.json else table(results))
        return 0

    return guarded(main)


def _score(arguments: argparse.Namespace) -> int:
    """``evaluate.py --score``"""
    from simla_ray.orchestration.evaluate import score_file

    if arguments.score is None or arguments.out is None:
        raise UserError("--score, --out: give both, the files to score and the CSV to write")
    for option in ("tasks", "data", "split", "label_column", "templates", "ratings", "layers", "workers"):
        if getattr(arguments, option) not in (None, [], "all"):
            raise UserError(f"--score: measures nothing, so it takes no {option.replace('_', '-')}")
    say = partial(print, file=sys.stderr, flush=True) if arguments.json else _say
    counts = score_file(arguments.run, arguments.score, arguments.out, arguments.storage, say, images=arguments.images)
    if arguments.json:
        print(json.dumps(counts))
    else:
        print(f"scored     {counts['scored']:,} of {counts['pairs']:,} pairs, in {arguments.out}")
        if counts["dropped"]:
            print("dropped    " + ", ".join(f"{reason} {n:,}" for reason, n in counts["dropped"].items()))
    return 0


def export_main(argv: Sequence[str]) -> int:
    """``experiments/export.py``"""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Export the best checkpoint of a run, or an official SIMLA or ALBEF file, as a folder that "
        "simla_ray.load opens.",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, its name, or an official file")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="OUT key=value",
        help="the new folder (default: RUN/export); of a file, also keys of its config",
    )
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder that holds runs (default: runs)")
    parser.add_argument("--teacher", action="store_true", help="the EMA teacher's towers in place of the student's")
    parser.add_argument("--layout", choices=["official"], help="write official.safetensors, under official names, too")
    parser.add_argument("--config", action="append", type=Path, metavar="FILE", help="of a file: YAML with its config")
    arguments = parser.parse_intermixed_args(argv)

    def main() -> int:
        from simla_ray.orchestration.export import export_file, export_run

        keys = [text for text in arguments.rest if "=" in text]
        outs = [Path(text) for text in arguments.rest if "=" not in text]
        if len(outs) > 1:
            raise UserError(f"{' '.join(map(str, outs))}: give one folder to export to")
        notes: list[str] = []
        if arguments.source.is_file():
            if not outs or arguments.teacher or arguments.layout:
                raise UserError(
                    f"{arguments.source}: of a file, give the folder to export to, and no --teacher or --layout"
                )
            out, notes = export_file(arguments.source, outs[0], arguments.config or [], keys)
        else:
            if keys or arguments.config:
                raise UserError(f"{[*keys, *(arguments.config or [])][0]}: a run brings its config; keys are for files")
            out = export_run(
                arguments.source,
                outs[0] if outs else None,
                arguments.storage,
                teacher=arguments.teacher,
                official=arguments.layout == "official",
            )
        for note in notes:
            print(f"note       {note}")
        print(f'exported   {out}; simla_ray.load("{out}") opens it')
        return 0

    return guarded(main)


def run_from(arguments: argparse.Namespace) -> Run:
    """The run that a command line describes."""
    return load_run(arguments.config or [], overrides_of(arguments))


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """``key=value`` of a command line; named options are overrides like any other."""
    overrides = list(arguments.overrides)
    for option in ("method", "variant", "size", "name", "init_from"):
        value = getattr(arguments, option)
        if value is not None:
            overrides.append(f"{option}={json.dumps(str(value))}")
    return overrides


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes a pretraining."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, e.g. optim.lr=1e-4")
    parser.add_argument(
        "--method", help=f"one of {', '.join(Method)} (default: simla), {', '.join(FORMS)}; vil is vilt"
    )
    parser.add_argument("--variant", help=f"one of {', '.join(Variant)} (default: default)")
    parser.add_argument("--size", help=f"one of {', '.join(Size)} (default: tiny)")
    parser.add_argument(
        "--init-from", metavar="PATH", help="start from the weights of a run, an exported folder or a file"
    )


def _say(line: str) -> None:
    print(line, flush=True)
