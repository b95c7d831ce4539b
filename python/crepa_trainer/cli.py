"""The command line, `crepa-train`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .stopping import Stopped, stopped_by_signals
from .terminal import PlainFormatter, plain, say

if TYPE_CHECKING:
    from rich.console import Console

USER_ERROR = 2
PACKAGES = ("crepa_kernels", "crepa_trainer")  # whose log lines are shown
# What diffusers imports with itself, used or not, of which only errors are shown: what is missing of them where they
# are used is said in one line before.
IMPORTED_ALONG = ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers")
# Of a norm whose weight is of another type than the activations, as in full training: it computes in fp32.
_ABOUT_TYPES = "Mismatch dtype between input and weight"
FILE_WIDTH = 250  # columns of what is printed elsewhere than to a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    An error that the user can put right is one line on stderr and 2, a stop by SIGINT or SIGTERM one and 130 or 143.
    """
    with _logging_left_as_it_was(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ABOUT_TYPES)
        try:
            with stopped_by_signals():
                return _run(sys.argv[1:] if argv is None else argv)
        except Stopped as stopped:
            if _first_process():
                print(f"crepa-train: {stopped.line}", file=sys.stderr)
            return stopped.status
        except ModuleNotFoundError as error:
            _complain(f"{error}: pip install crepa-kernels[trainer]")
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            # The traceback of a user's error helps nobody but a developer: crepa-train --debug ...
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            _complain(str(error))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            advice = "crepa-train run --plan says what each phase needs, and what to switch on"
            _complain(f"{str(error).strip() or 'the host is out of memory'}; {advice}")
    return USER_ERROR


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


@contextmanager
def _logging_left_as_it_was() -> Iterator[None]:
    # `main` may be one call of a larger program.
    loggers = [logging.getLogger(name) for name in (None, *PACKAGES, *IMPORTED_ALONG)]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers


def _complain(message: str) -> None:
    # One line, however many settings are wrong.
    line = "; ".join(message.split("\n  ")).replace(":; ", ": ")
    print(f"crepa-train: error: {plain(' '.join(line.split()))}", file=sys.stderr)


Command = Callable[[argparse.Namespace, list[str], argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="crepa-train", description="Trains video diffusion transformers with CREPA.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Command]] = {
        "run": (_add_run_options, _run_training),
        "cache": (_add_cache_options, _run_cache),
        "export": (_add_export_options, _run_export),
        "demo": (_add_demo_options, _run_demo),
        "control": (_add_control_options, _run_control),
        "report": (_add_report_options, _run_report),
        "ui": (_add_page_options, _run_page),
    }
    run = commands.add_parser(
        "run",
        usage="%(prog)s [--config FILE] [--KEY VALUE ...] [--crepa_... VALUE ...] [--preset NAME] [--plan] [--json] "
        "[--queue RUNS]",
        help="train a model on a folder of videos with captions beside them",
        description="Trains a LoRA or the whole transformer on videos with captions. Every key of the settings' file "
        "is an option too, which goes before the file; values are read as JSON.",
        allow_abbrev=False,
    )
    cache = commands.add_parser(
        "cache",
        usage="%(prog)s [--shard I/N] [--config FILE] [--KEY VALUE ...] [--crepa_... VALUE ...] [--preset NAME]",
        help="encode what a run would, without the training, in as many jobs as there are machines",
        description="Encodes videos, captions and the teacher's side into the cache of a run with the same settings, "
        "which then encodes nothing. With --shard one share of them: jobs with the same n may run side by side, on "
        "machines that share the folder, and be killed and started again.",
        allow_abbrev=False,
    )
    export = commands.add_parser(
        "export",
        help="write a checkpoint's trained weights for other programs",
        description="Writes the LoRA of a checkpoint, or its whole transformer where all weights were trained.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    demo = commands.add_parser(
        "demo",
        usage="%(prog)s [--data FOLDER] [--output FOLDER] [--steps N] [--seed N] [--batch-size N] [--strict] "
        "[--no-comparison] [--crepa_... VALUE]",
        help="train a small random Wan on real video and show what CREPA does",
        description="Trains a small Wan with seeded random weights on real video, with CREPA and without it, in about "
        "four minutes on a CPU core; downloads nothing. It ends with a table and plots in the output folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    control = commands.add_parser(
        "control",
        help="ask a run for a checkpoint, a sample, or its end",
        description="Asks a run that is under way for a checkpoint now, for a clip of each validation prompt now, or "
        "to stop as a signal stops it. It does so after the step that it is at.",
        allow_abbrev=False,
    )
    report = commands.add_parser(
        "report",
        help="curves, samples and settings of runs as one HTML file",
        description="Writes the curves, samples, similarity matrices and settings of one run, or of several side by "
        "side, as one HTML file that needs no server and no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    page = commands.add_parser(
        "ui",
        help="a web page to set up, start, watch and compare runs",
        description="Serves a web page to this machine, which sets up, starts, watches and compares runs. Runs need "
        "no page: they go on when it ends.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parsers = {
        "run": run, "cache": cache, "export": export, "demo": demo, "control": control, "report": report, "ui": page,
    }  # fmt: skip
    chosen = parsers.get(argv[0] if argv else "")
    if chosen is not None:
        # Only its own options: those of the other command would import what only that one needs.
        parts[argv[0]][0](chosen)
        chosen.add_argument("--debug", action="store_true", help="log everything, with the traceback of an error")
    given, rest = parser.parse_known_args(argv)
    parts[given.command][1](given, rest, parser if chosen is None else chosen)
    return 0


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    from . import settings

    parser.add_argument("--config", type=Path, metavar="FILE", help="file of settings: JSON, TOML or YAML")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--json", action="store_true", help="print the plan's names and values as JSON, and stop")
    parser.add_argument(
        "--queue", type=Path, metavar="RUNS", help="wait until no run that came earlier is in the queue of this folder"
    )
    settings.add_arguments(parser)


def _run_training(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    from .settings import given_values, load_settings

    console = _console(given.debug)
    settings, config = load_settings(given.config, given_values(given), rest=rest)
    from .run import check_resume, plan_run, run, show_plan

    _no_bars_in_files()
    if given.json or given.plan:
        check_resume(settings, config)
    if given.json:
        from .reporting.table import plan_rows

        print(json.dumps(plan_rows(plan_run(settings, config), named=sys.maxsize, memory=True)))
    elif given.plan:
        show_plan(settings, config, console, memory=True)
    else:
        run(settings, config, console, given.queue)


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    from . import settings

    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="file of settings, those of the run: JSON, TOML or YAML"
    )
    parser.add_argument("--shard", metavar="I/N", help="encode the I-th of N shares alone, such as 1/8")
    settings.add_arguments(parser)


def _run_cache(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    from .data.shares import Share
    from .settings import given_values, load_settings

    share = None if given.shard is None else Share.read(given.shard)
    console = _console(given.debug)
    settings, config = load_settings(given.config, given_values(given), rest=rest)
    from .caching import fill_cache

    _no_bars_in_files()
    try:
        fill_cache(settings, config, share, console)
    except Stopped as stopped:
        raise Stopped(stopped.number, ": start it again, what is encoded is kept") from None


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, or a run's output folder for the newest")
    add("--output", type=Path, metavar="FOLDER", help="where to write, exported/step-... in the run's folder when none")
    add("--format", choices=("diffusers", "comfyui", "both", "peft"), default="diffusers", help="of a LoRA")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights")


def _run_export(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    import torch

    from .export import export_checkpoint

    _no_bars_in_files()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[given.dtype]
    console = _console(given.debug)
    line = export_checkpoint(given.checkpoint, given.output, given.format, dtype)
    say(console, line)


def _add_control_options(parser: argparse.ArgumentParser) -> None:
    from .control import COMMANDS

    parser.add_argument("run", type=Path, metavar="RUN", help="its output folder")
    parser.add_argument("what", choices=COMMANDS, help="what it shall do")


def _run_control(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    from .control import ask

    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    say(_console(given.debug), ask(given.run, given.what))


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    from crepa_kernels import CrepaConfig

    from .demo.run import DEMO_CREPA, DemoOptions

    defaults = DemoOptions(output=Path("runs/demo"))
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="folder of videos, instead of the two sample videos")
    add("--output", type=Path, metavar="FOLDER", default=defaults.output, help="folder for everything it writes")
    add("--steps", type=_positive, metavar="N", default=defaults.steps, help="optimiser steps")
    add("--seed", type=int, metavar="N", default=defaults.seed, help="of weights, noise and order of clips")
    add("--batch-size", type=_positive, metavar="N", default=defaults.batch_size, help="clips a step")
    add("--strict", action="store_true", help="stop at a video that cannot be used")
    add("--no-comparison", dest="comparison", action="store_false", help="do not train the same without CREPA too")
    CrepaConfig.add_arguments(parser, DEMO_CREPA)


def _run_demo(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    import torch
    import transformers

    from crepa_kernels import CrepaConfig

    from .demo.run import DEMO_CREPA, DemoOptions, run_demo

    # Before the other words that nobody knows: it names the option that was meant.
    config = CrepaConfig.from_args(given, DEMO_CREPA, rest=rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    console = _console(given.debug)
    # Bars for files of a few megabytes that load at once; warnings stay on.
    transformers.utils.logging.disable_progress_bar()
    # Work this small gains little from more threads on an idle machine, and is up to ten times slower on a busy one.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    said = vars(given)
    options = DemoOptions(**{each.name: said[each.name] for each in fields(DemoOptions) if each.name in said})
    try:
        run_demo(options, config, console)
    except Stopped as stopped:
        raise Stopped(stopped.number, ": the demo begins anew when it is started again") from None


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folders of runs")
    add("--output", type=Path, metavar="FILE", help="report.html in the run's folder, or here for several, when none")
    add("--language", default="en", help="en or ja")


def _run_report(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from .reporting.report import REPORT, write_report

    beside = given.runs[0] if len(given.runs) == 1 else Path()
    say(_console(given.debug), write_report(given.runs, given.output or beside / REPORT, given.language))


def _add_page_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--runs", type=Path, metavar="FOLDER", default=Path("runs"), help="folder of the runs and their settings")
    add(
        "--folder",
        type=Path,
        metavar="FOLDER",
        action="append",
        default=[],
        help="another that it may read: videos, models",
    )
    add("--host", default="127.0.0.1", help="address to serve at; one that other machines reach needs the token")
    add("--port", type=int, metavar="N", default=7865, help="0 for a free one")
    add("--token", help="what visitors must have, made and printed where it is needed and not given")


def _run_page(given: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from .ui.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install crepa-kernels[ui]") from error
    try:
        serve(given.runs, given.folder, given.host, given.port, given.token, _console(given.debug))
    except Stopped as stopped:
        raise Stopped(stopped.number, ": runs go on without the page") from None


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def _console(debug: bool) -> Console:
    """The console of a command; log lines go through it, which would tear a progress bar's from elsewhere."""
    from rich.console import Console
    from rich.logging import RichHandler

    # One of several processes speaks for all; errors are everybody's own.
    first = _first_process()
    # In a file nothing is gained by breaking lines, least of all in the middle of a path.
    console = Console(quiet=not first, width=None if sys.stdout.isatty() else FILE_WIDTH)
    handler: Any = RichHandler(console=console if first else Console(stderr=True), show_path=False, show_time=False)
    handler.setFormatter(PlainFormatter(PACKAGES))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if debug else logging.INFO if first else logging.ERROR
    for name in PACKAGES:
        logging.getLogger(name).setLevel(level)
    for name in IMPORTED_ALONG:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.ERROR)
    return console


def _no_bars_in_files() -> None:
    """Leaves out the bars of models that load where they would not move."""
    import diffusers
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
