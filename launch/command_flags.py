"""What is wrong with the flags that a command is given, as the command itself would say it, without starting it.

    echo '[["--step=abc"]]' | python -m launch.command_flags experiments.eval

The command's module is imported and parses them in a process of its own: flags of one name in two commands, a launcher's own among them,
cannot be in one. That takes half a second, for no command imports JAX before its flags are right.
"""

import functools
import importlib
import inspect
import json
import subprocess
import sys

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError


@functools.cache
def mistakes(module: str, *lines: tuple[str, ...]) -> list[str | None]:
    """What ``python -m MODULE`` would say of each of several lists of arguments; None of one whose flags are right.

    Names, types, choices, bounds and validators are checked, of ``--config`` only whether the command takes it. Raises ConfigError where
    the module cannot be imported here.
    """
    asked = [sys.executable, "-m", "launch.command_flags", module]
    done = subprocess.run(asked, input=json.dumps(lines), capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"the flags of {module} cannot be checked, for it cannot be imported here: {why}")
    return json.loads(done.stdout)


def _mistake(module, arguments: list[str]) -> str | None:
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()  # what the arguments before these were
    takes_config = inspect.signature(module.main).parameters  # by the convention of the commands: those without one take no --config
    try:
        cli.parse([module.__name__, *arguments], module.__doc__, cli.CONFIG_HELP if takes_config else None)
    except (ConfigError, flags.Error) as error:
        return str(error)
    return None


if __name__ == "__main__":
    command = importlib.import_module(sys.argv[1])
    print(json.dumps([_mistake(command, arguments) for arguments in json.load(sys.stdin)]))
