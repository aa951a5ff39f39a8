"""What is raised for a configuration that can not be run."""


class ConfigError(ValueError):
    """A configuration that can not be run; the message names the field, what it got and what it needs."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def divides(part: int, whole: int, message: str) -> None:
    need(part >= 1 and whole % part == 0, message)
