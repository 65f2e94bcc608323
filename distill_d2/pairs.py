"""The KEY VALUE pairs at the end of a command line."""

from __future__ import annotations

from collections.abc import Sequence

from .messages import shortened


def pairs_of(words: Sequence[str]) -> list[str]:
    """The end of a command line, KEY VALUE KEY=VALUE ..., as KEY VALUE KEY VALUE ...

    Raises:
        ValueError: an option or a config stands where a key is expected; the last key has no value.
    """
    pairs: list[str] = []
    for word in words:
        if len(pairs) % 2:
            pairs.append(word)
        elif word.startswith("-"):
            raise ValueError(
                f"{shortened(word)} stands after a KEY VALUE pair; options must come before"
            )
        else:
            key, equals, value = word.partition("=")  # no key has a "="
            if not equals and key.endswith((".yaml", ".yml", ".py")):
                raise ValueError(
                    f"{shortened(key)} stands where a key is expected; a config is given by --config-file"
                )
            pairs += [key, value] if equals else [key]
    if len(pairs) % 2:
        raise ValueError(
            f"the KEY VALUE pairs are incomplete: {shortened(' '.join(words), 300)}; expected a value after "
            f"the key {shortened(pairs[-1])}"
        )
    return pairs
