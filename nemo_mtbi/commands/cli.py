# SPDX-License-Identifier: Apache-2.0
"""The Hydra entry point of ``mtbi`` and of every script in ``examples/``, with a quiet start.

``import nemo`` takes about ten seconds, so nothing here loads it before the command line has been understood.
"""

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.io.display import printable

VERBOSE_ENV = "NEMO_MTBI_VERBOSE"

# (category, message pattern, module pattern) of warnings that tell a user nothing to act on; matched from the start.
# Megatron falls back to torch where Transformer Engine and Apex are missing, and warns once per file.
_NOISY_WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    (SyntaxWarning, "invalid escape sequence", ""),
    (UserWarning, "pkg_resources is deprecated", ""),
    (UserWarning, "", r"(megatron|lightning|pytorch_lightning|numba|torchmetrics)(\.|$)"),
    (RuntimeWarning, "Couldn't find ffmpeg or avconv", ""),
    (DeprecationWarning, "", r"(?!nemo_mtbi)"),
    (FutureWarning, "", r"(?!nemo_mtbi)"),
)

# Logger -> the least severe record it may still show.
_NOISY_LOGGERS = {
    "nv_one_logger.api.config": logging.ERROR,
    "nv_one_logger.training_telemetry.api.training_telemetry_provider": logging.ERROR,
    "numba": logging.WARNING,
    "megatron": logging.WARNING,
    "lightning": logging.WARNING,
    "lightning.pytorch": logging.WARNING,
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "lightning.fabric.utilities.rank_zero": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "lightning_fabric.utilities.rank_zero": logging.WARNING,
    "pytorch_lightning": logging.WARNING,
    "pytorch_lightning.utilities.rank_zero": logging.WARNING,
    "matplotlib": logging.WARNING,
    "datasets": logging.WARNING,
    "torch.distributed": logging.WARNING,
}


def quiet() -> None:
    """Hide what NeMo, Megatron, Lightning and numba print when they start; errors and our own output stay.

    Call it once before these are imported (their import is what warns) and once after, since NeMo and Lightning set
    the level of their loggers when they are imported. Calling it again changes nothing.
    """
    for category, message, module in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for name, level in _NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    if "nemo.utils" in sys.modules:
        nemo_logging = sys.modules["nemo.utils"].logging
        if nemo_logging.get_verbosity() < nemo_logging.WARNING:
            nemo_logging.set_verbosity(nemo_logging.WARNING)


def wants_quiet() -> bool:
    """Return whether to hide start-up noise: unless the environment variable NEMO_MTBI_VERBOSE is set and not 0."""
    return os.environ.get(VERBOSE_ENV, "0") in ("", "0")


def _parse(argv: list[str]) -> argparse.Namespace:
    from nemo_mtbi.compat.hydra import command_line_parser

    return command_line_parser().parse_args(argv)


def _is_query(args: argparse.Namespace) -> bool:
    """Return whether the command line requests information about the program instead of running it."""
    return bool(args.help or args.hydra_help or args.shell_completion or args.cfg is not None or args.info is not None)


def _description(task: Callable[[DictConfig], Any]) -> str:
    """Return the docstring of the script that defines ``task``."""
    module = sys.modules.get(task.__module__)
    return (getattr(module, "__doc__", None) or task.__doc__ or "").strip()


def _with_defaults(folder: Path, name: str) -> list[Path]:
    """Return the YAML of a name, and below it those that its ``defaults`` name."""
    path = folder / f"{name}.yaml"
    content = OmegaConf.load(path) if path.is_file() else None
    bases = content.get("defaults", []) if isinstance(content, DictConfig) else []
    names = [base for base in bases if isinstance(base, str) and base != "_self_"]
    return [path, *(below for base in names for below in _with_defaults(folder, base))]


def _answer(
    task: Callable[[DictConfig], Any], config_path: str, config_name: str, args: argparse.Namespace, description: str
) -> None:
    """Let plain Hydra answer ``--help`` and its like; Hydra exits or returns without running ``task``."""
    import hydra

    if args.help:
        chosen = _with_defaults(Path(args.config_path or config_path), args.config_name or config_name)
        print(description)
        print("\nEach key is explained in", "\nand in ".join(map(str, chosen)), end="\n\n", flush=True)
    if args.resolve:
        # NeMo registers these two for its configs (replacing what stands there); resolving needs them without NeMo.
        OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
        OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)
    hydra.main(version_base=None, config_path=config_path, config_name=config_name)(task)()


def _reported(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap ``task`` so that a failed run ends with its message, where Hydra would print a hint of its own.

    torchrun gets the message too: when all processes have ended, it prints that of the first that failed.
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except Exception as error:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it once another process has failed
            with contextlib.suppress(OSError):  # the disk may be full, and the message is what counts
                sys.stdout.flush()
                if "TORCHELASTIC_ERROR_FILE" in os.environ:
                    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                    get_error_handler().record_exception(error)
            text = printable("".join(traceback.format_exception(error)))  # it may quote a manifest
            print(text, end="", file=sys.stderr, flush=True)
            # a thread may still be printing its part of the same failure, which would hide the message
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise SystemExit(1) from None

    return run


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the program with the message alone: a mistake on the command line needs no traceback."""
    try:
        yield
    except ValueError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None


def _run(
    task: Callable[[DictConfig], Any],
    config_path: str,
    config_name: str,
    args: argparse.Namespace,
    schema: Callable[[], Any] | None,
) -> None:
    """Run ``task`` through NeMo's ``hydra_runner``, which makes no ``outputs/`` folder and changes no directory."""
    from hydra import version

    from nemo_mtbi.config.overrides import keep_text, read_overrides

    with _one_line_errors():
        given = read_overrides(args.overrides, args.multirun)

    if wants_quiet():
        quiet()
    from nemo.core.config import hydra_runner

    if wants_quiet():
        quiet()
    # hydra_runner leaves the compatibility level open, and Hydra then falls back to that of 1.1 and warns.
    version.setbase(None)
    with _one_line_errors():
        changed = keep_text(given, schema()) if schema else {}
    sys.argv = [changed.get(argument, argument) for argument in sys.argv]  # which hydra_runner reads again
    hydra_runner(config_path=config_path, config_name=config_name)(_reported(task))()


def _absolute_config_path(args: argparse.Namespace) -> None:
    """Make ``--config-path`` absolute: relative to the working directory, else to the folder of the script.

    Raises:
        ValueError: if there is no such folder.
    """
    given = args.config_path
    if given is None or Path(given).is_absolute() or given.startswith("pkg://"):
        return
    places = [Path.cwd() / given, Path(sys.argv[0]).absolute().parent / given]
    folder = next((place.resolve() for place in places if place.is_dir()), None)
    if folder is None:
        raise ValueError(f"--config-path={given} is not a folder: give a path that exists below {Path.cwd()}")
    args.config_path = str(folder)
    sys.argv += ["--config-path", str(folder)]  # Hydra and NeMo parse the command line again; the last one counts


def hydra_main(
    config_name: str,
    config_path: str | os.PathLike[str],
    schema: Callable[[], Any] | None = None,
    description: str | None = None,
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Decorate the main function of a script: NeMo's ``hydra_runner``, with queries answered at once.

    ``--help``, ``--hydra-help``, ``--cfg``, ``--info`` and ``--shell-completion`` are answered by Hydra alone,
    before NeMo is imported, and mistakes on the command line are reported as early. For this to be quick the script
    must import NeMo, torch and the models inside its main function. A relative ``--config-path`` is looked up in the
    working directory first. The decorated function may also be called with a config; it then runs on that and reads
    no command line.

    Example::

        CONF = Path(__file__).resolve().parent.parent / "conf"

        @hydra_main(config_name="mtbi_demo", config_path=CONF)
        def main(cfg: DictConfig) -> None: ...

    Args:
        config_name: Name of the default YAML, without ``.yaml``; ``--config-name`` on the command line replaces it.
        config_path: Absolute path of the folder of the YAML files.
        schema: Returns the dataclass of the configuration, or types by key, when the script runs: where a type is
            text, the command line is not parsed as a number (``prompt=1e5``).
        description: Printed first by ``--help``; by default the docstring of the script.

    Raises:
        ValueError: ``config_path`` is relative (Hydra would resolve it against a file that the caller can't see).
    """
    path = Path(config_path)
    if not path.is_absolute():
        raise ValueError(f"config_path must be absolute, not {str(path)!r}: build it from Path(__file__).resolve()")

    def decorator(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(task)
        def wrapper(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            args = _parse(sys.argv[1:])
            with _one_line_errors():
                _absolute_config_path(args)
            if _is_query(args):
                return _answer(task, str(path), config_name, args, description or _description(task))
            return _run(task, str(path), config_name, args, schema)

        return wrapper

    return decorator
