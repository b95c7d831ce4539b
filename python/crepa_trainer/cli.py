"""The command line, `crepa-train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. An error that the user can put right is one line on stderr and exit code 2."""
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        _complain(f"{error}: pip install crepa-kernels[trainer]")
    except (ValueError, OSError, FloatingPointError) as error:
        # The traceback of a user's error helps nobody but a developer: crepa-train --debug ...
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        _complain(str(error))
    return USER_ERROR


def _complain(message: str) -> None:
    print(f"crepa-train: error: {' '.join(message.split())}", file=sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    import torch
    import transformers
    from rich.console import Console
    from rich.logging import RichHandler

    from crepa_kernels import CrepaConfig

    from .demo import DEMO_CREPA, DemoOptions, run_demo

    parser = argparse.ArgumentParser(
        prog="crepa-train", description="Trains video diffusion transformers with CREPA.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        usage="%(prog)s [--data FOLDER] [--output FOLDER] [--steps N] [--seed N] [--strict] [--crepa_... VALUE]",
        help="train a small random Wan on real video and show what CREPA does",
        description="Trains a small Wan with seeded random weights on real video, with CREPA, in about a minute on "
        "a CPU core; downloads nothing. It ends with a table and plots in the output folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    defaults = DemoOptions(output=Path("runs/demo"))
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="folder of videos, instead of the two sample videos")
    demo.add_argument(
        "--output", type=Path, metavar="FOLDER", default=defaults.output, help="folder for everything it writes"
    )
    demo.add_argument("--steps", type=_positive, metavar="N", default=defaults.steps, help="optimiser steps")
    demo.add_argument(
        "--seed", type=int, metavar="N", default=defaults.seed, help="of weights, noise and order of clips"
    )
    demo.add_argument("--batch-size", type=_positive, metavar="N", default=defaults.batch_size, help="clips a step")
    demo.add_argument("--strict", action="store_true", help="stop at a video that cannot be used")
    demo.add_argument("--debug", action="store_true", help="log everything, with the traceback of an error")
    CrepaConfig.add_arguments(demo)

    given, rest = parser.parse_known_args(argv)
    base = {**DEMO_CREPA, "crepa_encoder": str(DemoOptions(output=given.output).teacher_folder)}
    # Before the other words that nobody knows: it names the option that was meant.
    config = CrepaConfig.from_args(given, base, rest=rest)
    if rest:
        demo.error(f"unrecognized arguments: {' '.join(rest)}")
    console = Console()
    # The same console as the progress bar's, which a line from elsewhere would tear.
    _log_through(RichHandler(console=console, show_path=False, show_time=False), given.debug)
    # Bars for files of a few megabytes that load at once; warnings stay on.
    transformers.utils.logging.disable_progress_bar()
    # Work this small gains little from more threads on an idle machine, and is up to ten times slower on a busy one.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    options = DemoOptions(
        output=given.output,
        data=given.data,
        steps=given.steps,
        seed=given.seed,
        strict=given.strict,
        batch_size=given.batch_size,
    )
    run_demo(options, config, console)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _log_through(handler: logging.Handler, debug: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    for name in ("crepa_kernels", "crepa_trainer"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
