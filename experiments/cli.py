"""What the commands share: finding and checking ``--config=configs/NAME.py[:size]``, and mistakes told in one line.

A configuration file has ``get_config(size)`` (or ``get_config()``) that returns a ``hybrid_jax.config.RunConfig``, or a
ConfigDict of its fields. Any field can be overridden: ``--config.train.steps=100``. All of it is checked before
JAX is started, and what is wrong is said in one line on stderr, with exit code 2.
"""

import contextlib
import errno
import importlib.util
import inspect
import logging
import os
import re
import select
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict, FieldReference, config_flags

from hybrid_jax.config import ConfigError, RunConfig, from_dict, to_dict
from hybrid_jax.config.errors import meant
from hybrid_jax.data import DataError
from hybrid_jax.storage import run_folder
from hybrid_jax.train.workdir import RunError, read_config

CONFIG_HELP = "configs/NAME.py[:size]; any of its fields as --config.train.steps=100 (docs/configuration.md says what there is)."
NO_MEMORY = (
    "out of memory: a step of training holds less with a smaller --config.train.microbatch, with --config.model.remat=block or on more "
    "devices; evaluation with a smaller --batch"
)

# Of a path that was given: no right to it, or a file where a folder is to be, or the other way round.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
PACKAGE = Path(__file__).resolve().parent
# The exit code of what was stopped from outside, be it by SIGTERM or by the loss of another process: the same command goes on.
STOPPED = 128 + signal.SIGTERM


class Run(NamedTuple):
    """What ``--config`` and its overrides asked for."""

    config: RunConfig
    name: str  # such as "gla_r6-tiny": the file and the size
    command: str  # that starts it again


def start(main: Callable[[Run], int | None], workdir: flags.FlagHolder[str], argv: list[str] | None = None) -> None:
    """Run ``main`` on the configuration and flags of the command line, and exit with its exit code.

    workdir: the flag that names the run's folder. Without ``--config`` the configuration is the one that is there.
    """
    argv = sys.argv if argv is None else argv
    module = sys.modules[main.__module__]

    def run() -> int | None:
        given = parse(argv, module.__doc__, CONFIG_HELP)
        if workdir.value is not None:
            run_folder(workdir.value)  # raises where it can hold no run, before anything else is read
        return main(load_run(given, command(argv, module), workdir.value))

    end(guarded(run))


def start_without_config(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
    """The same for a command that takes no ``--config``."""
    argv = sys.argv if argv is None else argv

    def run() -> int | None:
        parse(argv, sys.modules[main.__module__].__doc__)
        return main()

    end(guarded(run))


def end(code: int) -> NoReturn:
    """Exit; where that is a failure in a run of several processes, without waiting for the others: all stop together."""
    if code not in (0, STOPPED) and (distributed := _joined()):
        distributed.leave(code)
    sys.exit(code)


def _joined():
    """`hybrid_jax.distributed` where this process has joined others, else None; not imported before JAX is wanted."""
    module = sys.modules.get("hybrid_jax.distributed")
    return module if module and module.connected() else None


def guarded(action: Callable[[], int | None]) -> int:
    """The exit code of ``action``; after one line on stderr 2: a mistake in what was asked, 1: the run cannot go on, 130: Ctrl-C;
    after none 141: nobody reads what is printed any more.

    Where another process of the run was lost this one ends here, with `STOPPED`.
    """
    # Orbax reports through absl, and leaves tasks and coroutines behind when it fails; gcsfs and google.auth log what they raise too.
    # What matters is raised, and told here in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = action() or 0
        sys.stdout.flush()  # here, where a reader that has gone can be told from what is wrong
        return code
    except (ConfigError, DataError, RunError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 128 + signal.SIGPIPE
        if error.errno in UNUSABLE and error.filename:
            print(f"error: {error.filename} cannot be used ({error.strerror}): give another path, or mend that one", file=sys.stderr)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(f"error: no space left{where}: make room and run the same command again, to go on from the last checkpoint", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: {NO_MEMORY} ({' '.join(str(error).split())[:200]})", file=sys.stderr)
            return 1
        if not (distributed := _joined()):
            raise
        if said := distributed.loss(error):
            print(f"error: {said}", file=sys.stderr)
            distributed.leave(STOPPED)
        traceback.print_exc()
        return 1


def _reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as of ``| head``; then what is left for it is dropped."""
    output = select.poll()
    output.register(1, 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def command(argv: list[str], module) -> str:
    """What to type to run this again."""
    name = module.__spec__.name if module.__spec__ else module.__name__
    return shlex.join(["python", "-m", name, *argv[1:]])


def parse(argv: list[str], doc: str, config_help: str | None = None) -> list[str]:
    """Parse all flags but ``--config...``, and return those.

    config_help: what ``--help`` says of them; None: the command takes none. Raises ConfigError for what is wrong with a flag.
    """
    arguments = joined(argv[1:])
    config = [arg for arg in arguments if re.match("--?config([.=]|$)", arg)]
    others = [arg for arg in arguments if arg not in config]
    known = _known_flags(config_help)
    if "--help" in others or "-h" in others:
        print(doc, known.get_help("  ", include_special_flags=False), sep="\n", flush=True)
        sys.exit(0)
    try:
        unexpected = flags.FLAGS([argv[0], *others])[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown(error.flagname, known) from None
    if unexpected:
        raise ConfigError(f"unexpected {unexpected[0]!r}; values are given as --name=value, such as --config.train.steps=100, globs quoted")
    if config and not config_help:
        instead = "; the configuration is read from the run's folder" if "workdir" in known else ""
        raise ConfigError(f"this command takes no {config[0].split('=')[0]}{instead}")
    return config


def joined(arguments: list[str]) -> list[str]:
    """``arguments`` with ``--config PATH`` and ``--config.FIELD VALUE`` as the one word, with =, that they are elsewhere."""
    words, left = [], list(arguments)
    while left:
        word = left.pop(0)
        takes_next = re.fullmatch(r"--?config(\.[^=]+)?", word) and left and not left[0].startswith("--")
        words.append(f"{word}={left.pop(0)}" if takes_next else word)
    return words


def _known_flags(config_help: str | None) -> flags.FlagValues:
    """The flags of the command that runs, and of the modules of its package that it imports: not those of libraries."""
    known = flags.FlagValues()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.split(".")[0] in ("experiments", "launch"):
            for flag in defined:
                known[flag.name] = flag
    if config_help:
        known["config"] = flags.Flag(flags.ArgumentParser(), None, "config", None, config_help)
    return known


def _unknown(name: str, known: flags.FlagValues) -> ConfigError:
    fields = "; fields of the configuration are set as --config.train.steps=100" if "config" in known else ""
    all_flags = f"it has {', '.join(f'--{flag}' for flag in sorted(known))}{fields}"
    hint = meant(name, list(known), all_flags, form="--{}", most=1)
    return ConfigError(f"this command has no flag --{name}; {hint}")


def load_run(arguments: list[str], command: str = "", workdir: str | None = None) -> Run:
    """The run that ``--config=PATH[:size] --config.FIELD=VALUE ...`` describe; without PATH, the one in ``workdir``.

    Raises ConfigError for whatever is wrong with it.
    """
    given = [arg.split("=", 1)[1] for arg in arguments if re.match("--?config=", arg)]
    if not given and workdir:
        config = ConfigDict(to_dict(read_config(run_folder(workdir))))
        return Run(from_dict(RunConfig, _override(config, arguments).to_dict()), epath.Path(workdir).name, command)
    if len(given) != 1:
        several = f" ({len(given)} were given)" if given else ""
        raise ConfigError(f"give one --config=configs/NAME.py[:size], such as --config=configs/gla_r6.py:tiny{several}")
    path, _, size = given[0].partition(":")
    file = find_config(path)
    config, size = _get_config(file, size)
    config = _override(config, [arg for arg in arguments if not re.match("--?config=", arg)])
    return Run(from_dict(RunConfig, config.to_dict()), f"{file.stem}-{size}" if size else file.stem, command)


def known_configs() -> list[str]:
    """The names of the package's own configurations, sorted."""
    return sorted(file.stem for file in (PACKAGE / "configs").glob("*.py") if file.stem not in ("__init__", "recipe"))


def find_config(path: str) -> Path:
    """The configuration file at ``path``, from the current folder or else from the installed package's own folder."""
    for folder in (Path.cwd(), PACKAGE):
        if (folder / path).is_file():
            return folder / path
    known, name = known_configs(), Path(path).stem
    hint = meant(name, [name] if name in known else known, form="configs/{}.py")
    raise ConfigError(f"no configuration file {path!r} in {Path.cwd()} or in {PACKAGE}; {hint}")


def _get_config(file: Path, size: str) -> tuple[ConfigDict, str]:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with _told_of(file):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config(size) that returns a RunConfig or a ConfigDict")
    parameters = list(inspect.signature(module.get_config).parameters.values())
    if size and not parameters:
        raise ConfigError(f"{file} knows no sizes: leave out :{size}")
    if parameters and not size:
        if parameters[0].default is inspect.Parameter.empty:
            raise ConfigError(f"{file} needs a size: --config={file.name}:SIZE")
        size = parameters[0].default
    with _told_of(file):
        config = module.get_config(size) if parameters else module.get_config()
    if isinstance(config, RunConfig):
        config = ConfigDict(to_dict(config))
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of {file} returns a {type(config).__name__}, needs a hybrid_jax.config.RunConfig or a ConfigDict")
    return config, size


@contextlib.contextmanager
def _told_of(file: Path) -> Iterator[None]:
    """Raise ConfigError, with its line, for what goes wrong in a configuration file that is run here."""
    try:
        yield
    except ConfigError:  # which says what is wrong with a field
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(file) else lines[-1] if lines else "?"
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"{file}, line {line}: {type(error).__name__}: {said}") from error


def _override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """``config`` with every ``--config.a.b=value`` applied."""
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument} has no value; write {argument}=VALUE")
        _check_path(config, argument.split("=", 1)[0].split(".", 1)[-1])
    config = _any_literal(config)  # types are checked by from_dict, which knows what may be None and says what it needs
    values = flags.FlagValues()
    argv = ["config", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
    values(argv)
    return config


def _check_path(config: ConfigDict, path: str) -> None:
    node, seen = config, "config"
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"{seen} is a single value and has no field {name!r}")
        if name not in node:
            hint = meant(name, node.keys(), f"it has {', '.join(node)}", form="{!r}", most=1)
            raise ConfigError(f"{seen} has no field {name!r}; {hint}")
        node, seen = node[name], f"{seen}.{name}"
    if isinstance(node, ConfigDict):
        raise ConfigError(f"{seen} is a group of fields; set one of them: {', '.join(f'--{seen}.{name}' for name in node)}")


def _any_literal(config: ConfigDict) -> ConfigDict:
    """The same values in fields that take any Python literal, so that None and numbers can replace each other."""

    def field(value):
        if isinstance(value, ConfigDict):
            return _any_literal(value)
        return value if isinstance(value, str) else FieldReference(value, field_type=object)

    return ConfigDict({name: field(value) for name, value in config.items()})
