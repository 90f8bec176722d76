"""A compilation that failed (`--compile`), as a sentence; recognised by the names of torch's errors, so that nothing
here needs torch."""

from __future__ import annotations

from megatron3d.errors import ConfigError

_TOO_OFTEN = "FailOnRecompileLimitHit"
_BROKEN = ("InductorError", "BackendCompilerFailed", "CppCompileError")


def compile_failed(error: BaseException) -> ConfigError | None:
    """The sentence for an error of torch's compiler, with the notes of the error; None for any other."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if name == _TOO_OFTEN:
        found = ConfigError(
            "--compile compiled the same part of a block as often as it may, each time for other sizes or options, and "
            f"would go on; leave --compile out. torch says: {text}"
        )
    elif name in _BROKEN:
        found = ConfigError(
            "--compile is given, and torch's compiler failed on a block; leave --compile out, or see to what it says: "
            f"{text}"
        )
    else:
        return None
    for note in getattr(error, "__notes__", []):
        found.add_note(note)
    return found
