"""A split written out by the user, in the notation of Megatron-LM's --pipeline-model-parallel-layout.

    Et*3|t*4|(tt|)*2tL

`E` is the embedding, `t` one transformer layer, `L` the output layer with the loss, and `|` ends a stage. `*n` repeats
the symbol or the parenthesis before it; commas and blanks are there for the eye. So the line above has five stages with
3, 4, 2, 2 and 1 layers.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from megatron3d.errors import ConfigError

_OPTION = "--pipeline-model-parallel-layout"
_SYMBOLS = "EtL|"
_MOST_SYMBOLS = 100_000


def split_by_layout(layout: str, num_layers: int, num_stages: int) -> tuple[range, ...]:
    """The layer numbers of each stage, in order, as the layout says.

    Args:
        layout: the notation above.
        num_layers: transformer layers of the model; the layout must hold exactly these.
        num_stages: pipeline ranks times stages per rank; the layout must have exactly these.

    Raises:
        ConfigError: if the text cannot be read, E is not the first symbol or L not the last, a stage is empty, or the
            numbers of stages or layers differ.
    """
    symbols = expand_layout(layout)
    _check_ends(symbols, layout)
    stages = symbols.split("|")
    if len(stages) != num_stages:
        raise ConfigError(
            f"{_OPTION} {layout!r} has {len(stages)} stages, but the pipeline has {num_stages}; write "
            f"{num_stages - 1} bars, or change --pipeline-model-parallel-size or the stages per rank"
        )
    empty = [number for number, stage in enumerate(stages) if not stage]
    if empty:
        raise ConfigError(
            f"{_OPTION} {layout!r} leaves stage {empty[0]} of {num_stages} without anything to do; give it a layer"
        )
    counts = [stage.count("t") for stage in stages]
    if sum(counts) != num_layers:
        raise ConfigError(
            f"{_OPTION} {layout!r} has {sum(counts)} transformer layers ({' + '.join(map(str, counts))}), but "
            f"--num-layers is {num_layers}; make them agree"
        )
    return tuple(range(start, end) for start, end in pairwise(accumulate(counts, initial=0)))


def expand_layout(layout: str) -> str:
    """The layout without repetitions, commas and blanks: `E(t|)*2tL` becomes `Et|t|tL`.

    Raises:
        ConfigError: if the text holds other symbols, an unclosed parenthesis, or a repetition of nothing or by nothing.
    """
    text = "".join(layout.replace(",", "").split())
    expanded, end = _expand(text, 0, layout)
    if end < len(text):
        raise ConfigError(f"{_OPTION} {layout!r} closes a parenthesis that was never opened; remove the ')'")
    return expanded


def _expand(text: str, at: int, layout: str) -> tuple[str, int]:
    """Everything from `at` to the end or to the ')' of the parenthesis that `at` is in, and where that is."""
    symbols: list[str] = []
    while at < len(text) and text[at] != ")":
        if text[at] == "(":
            inner, at = _expand(text, at + 1, layout)
            if at == len(text):
                raise ConfigError(f"{_OPTION} {layout!r} opens a parenthesis that is never closed; add a ')'")
        else:
            inner = _symbol(text[at], layout)
        count, at = _count(text, at + 1, layout)
        if len(inner) * count > _MOST_SYMBOLS:
            raise ConfigError(f"{_OPTION} {layout!r} repeats {inner[:20]!r} {count} times, which is no model; use less")
        symbols.append(inner * count)
    return "".join(symbols), at


def _symbol(symbol: str, layout: str) -> str:
    """A known symbol."""
    if symbol == "m":
        raise ConfigError(
            f"{_OPTION} {layout!r} has a multi-token-prediction layer 'm', which no model here has; drop it"
        )
    if symbol not in _SYMBOLS:
        raise ConfigError(
            f"{_OPTION} {layout!r} has {symbol!r}; it takes E (embedding), t (transformer layer), L (output layer and "
            "loss), | (end of a stage), parentheses and *n"
        )
    return symbol


def _count(text: str, at: int, layout: str) -> tuple[int, int]:
    """The number behind a `*` at `at` (1 without one), and the place behind it."""
    if text[at : at + 1] != "*":
        return 1, at
    end = at + 1
    while text[end : end + 1].isascii() and text[end : end + 1].isdigit():
        end += 1
    digits = text[at + 1 : end]
    if not digits or len(digits) > 6 or int(digits) == 0:
        raise ConfigError(f"{_OPTION} {layout!r} has '*{digits}'; write a number of repetitions from 1, as in t*4")
    return int(digits), end


def _check_ends(symbols: str, layout: str) -> None:
    """One embedding, the very first; one output layer, the very last."""
    ends = (("E", "embedding", "first", symbols[:1]), ("L", "output layer and loss", "last", symbols[-1:]))
    for symbol, what, place, found in ends:
        if symbols.count(symbol) != 1 or found != symbol:
            raise ConfigError(
                f"{_OPTION} {layout!r} has {symbols.count(symbol)} times {symbol} ({what}); it stands once and is the "
                f"{place} symbol"
            )
