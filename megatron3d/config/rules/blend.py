"""What must hold between the options on several corpora: their weights, and the validation loss of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from megatron3d.config.sections.data import DataConfig


def blend_rule(data: DataConfig) -> Iterator[str]:
    """Weights come from one place, and names are for corpora that are evaluated."""
    temperature = data.data_temperature
    if not temperature > 0:
        yield f"--data-temperature {temperature:g} is not above 0; 1 reads corpora by their size."
    paths = {
        "--data-path": data.data_path,
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    weighted = [option for option, words in paths.items() if words and has_weights(words)]
    if weighted and temperature != 1:
        yield weights_twice(temperature, " and ".join(weighted))
    if data.sample_order == "megatron":
        for flag, is_given in (
            ("--data-temperature", temperature != 1),
            ("--multiple-validation-sets", data.multiple_validation_sets),
        ):
            if is_given:
                yield f"{flag} is not for --sample-order megatron, whose blends are Megatron-LM's; drop one of both."
    if data.mock_data and data.multiple_validation_sets:
        yield "--multiple-validation-sets is for corpora, and --mock-data has none; drop one of both."
    if data.validation_set_names and not data.multiple_validation_sets:
        yield (
            f"--validation-set-names {' '.join(data.validation_set_names)} names corpora that are not evaluated one by "
            "one; give --multiple-validation-sets too."
        )
    if len(set(data.validation_set_names)) < len(data.validation_set_names):
        yield f"--validation-set-names {' '.join(data.validation_set_names)} gives a name twice; make them different."


def weights_twice(temperature: float, option: str) -> str:
    """The sentence for a temperature beside the weights of `option`."""
    return (
        f"--data-temperature {temperature:g} makes weights of the sizes of corpora, but {option} gives weights; drop "
        "one of both."
    )


def has_weights(words: Sequence[str]) -> bool:
    """Whether the words of a data option are weights and prefixes by turns."""
    try:
        Fraction(words[0])
    except (ValueError, ZeroDivisionError):
        return False
    return len(words) % 2 == 0
