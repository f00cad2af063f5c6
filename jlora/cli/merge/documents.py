"""The YAML file of a merge: strictly, as people write it.

Source: PyYAML's safe loader.
Deviates: a key that is there twice is an error, where YAML libraries keep the last one silently.
"""

from collections.abc import Hashable
from pathlib import Path

import yaml

from jlora.cli.merge.config import ConfigError
from jlora.types import Json


class _Strict(yaml.SafeLoader):
    """Mappings whose keys are there once."""

    def construct_mapping(self, node: Json, deep: bool = False) -> dict[Hashable, Json]:
        seen: dict[Json, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and name in seen:
                raise ConfigError(
                    f"line {line}: got the key {key.value!r} twice, expected it once (first in "
                    f"line {seen[name]})"
                )
            if isinstance(key, yaml.ScalarNode):
                seen[name] = line
        return super().construct_mapping(node, deep)


def read(path: Path) -> Json:
    """What a YAML file says; a byte order mark is skipped.

    Args:
      path: the file.

    Returns:
      The value; any kind.

    Raises:
      ConfigError: not UTF-8, not YAML, several documents in one file, or a key twice; the message
        is one line that names the file and the line in it.
    """
    try:
        documents = list(yaml.load_all(path.read_bytes().decode("utf-8-sig"), _Strict))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: not YAML: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if len(documents) > 1:
        raise ConfigError(
            f"{path}: got {len(documents)} documents (separated by ---), expected one merge in a "
            "file; run the merges of a file of mergekit-multi one after another"
        )
    return documents[0] if documents else None
