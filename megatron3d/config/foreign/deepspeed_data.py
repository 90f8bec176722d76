"""What a DeepSpeed file asks for in `data_efficiency` and in the older `curriculum_learning`, as options of ours.

A metric with `clustering_type` schedule_based bounds the samples by its index files (--curriculum-metric). Metrics
of one cluster bound no sample: seqlen_truncate and seqlen_reshape, and `curriculum_learning` of the older form, shorten
the sequences (--seq-length-curriculum). `data_routing.random_ltd` is --random-ltd.

Source: DeepSpeed's "Configuration JSON" page, "Data Efficiency" and "Curriculum Learning", and
`deepspeed/runtime/data_pipeline/config.py`; Megatron-DeepSpeed `megatron/training.py` for the two names of seqlen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LENGTHS = {"seqlen_truncate": "truncate", "seqlen_reshape": "reshape", "seqlen": "truncate"}
_NO_STATE = "the sampler keeps no state, and reads as --num-workers says"
_NAMES_OF_LAYERS = "the layers of this model need no description"
_METRIC_KEYS = (
    "index_to_sample_path index_to_metric_path difficulty_type clustering_type min_difficulty max_difficulty "
    "schedule_type schedule_config"
)
_SCHEDULE_KEYS = "total_curriculum_step difficulty_step root_degree difficulty max_step"
_PACINGS = ("fixed_linear", "fixed_root", "fixed_discrete")


@dataclass
class DataEfficiency:
    """What was found: (where, option, value) in order, clauses about mistakes, and keys without effect by reason."""

    values: list[tuple[str, str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    inert: list[tuple[str, str]] = field(default_factory=list)

    def known(self, where: str, value: Any, names: str, inert: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The object at a key; its unknown keys are problems, and those of `inert` are noted."""
        if not isinstance(value, dict):
            self.problems.append(f"{where} is {value!r:.60}; write an object with {names.split()[0]}")
            return {}
        inert = inert or {}
        for name in value:
            if name in inert:
                self.inert.append((f"{where}.{name}", inert[name]))
            elif name not in names.split():
                self.problems.append(f"{where} has the key {name}, which is not known; correct or remove it")
        return {name: one for name, one in value.items() if name in names.split()}

    def enabled(self, where: str, value: Mapping[str, Any]) -> bool:
        """Whether the object at a key is switched on; anything but true and false is a problem."""
        switch = value.get("enabled", False)
        if not isinstance(switch, bool):
            self.problems.append(f"{where}.enabled is {switch!r:.40}; write true or false")
        return switch is True


def read_data_efficiency(value: Any) -> DataEfficiency:
    """The object `data_efficiency`."""
    found, where = DataEfficiency(), "data_efficiency"
    top = found.known(where, value, "enabled seed data_sampling data_routing")
    if top.get("enabled", False) is False:
        return found if not isinstance(value, dict) else DataEfficiency()
    if not found.enabled(where, top):
        return found
    sampling = found.known(
        f"{where}.data_sampling",
        top.get("data_sampling", {}),
        "enabled curriculum_learning dynamic_batching",
        dict.fromkeys(("num_epochs", "num_workers", "pin_memory"), _NO_STATE),
    )
    if found.enabled(f"{where}.data_sampling", sampling):
        _sampling(found, f"{where}.data_sampling", sampling)
    routing = found.known(f"{where}.data_routing", top.get("data_routing", {}), "enabled random_ltd")
    if found.enabled(f"{where}.data_routing", routing) and "random_ltd" in routing:
        _random_ltd(found, f"{where}.data_routing.random_ltd", routing["random_ltd"])
    if "seed" in top and any(name == "curriculum_metric" for _, name, _ in found.values):
        found.values.append((f"{where}.seed", "curriculum_seed", top["seed"]))
    return found


def read_legacy_curriculum(value: Any) -> DataEfficiency:
    """The object `curriculum_learning` at the top of a file, which is about the length of sequences alone."""
    found, where = DataEfficiency(), "curriculum_learning"
    names = "enabled curriculum_type min_difficulty max_difficulty schedule_type schedule_config"
    curriculum = found.known(where, value, names)
    if curriculum.get("enabled", False) is False:
        return found if not isinstance(value, dict) else DataEfficiency()
    if not found.enabled(where, curriculum):
        return found
    kind = curriculum.get("curriculum_type", "seqlen")
    if kind != "seqlen":
        found.problems.append(f"{where}.curriculum_type is {kind!r:.40}; it can be seqlen alone")
        return found
    _lengths(found, where, curriculum, "truncate")
    return found


def _sampling(found: DataEfficiency, where: str, sampling: Mapping[str, Any]) -> None:
    batching = sampling.get("dynamic_batching")
    if isinstance(batching, dict) and batching.get("enabled"):
        found.problems.append(
            f"{where}.dynamic_batching.enabled is true, but every batch has the samples that --global-batch-size says; "
            "leave it out"
        )
    if "curriculum_learning" not in sampling:
        return
    where = f"{where}.curriculum_learning"
    inert = {"data_cluster_path": "the admitted samples are computed, and no clusters are written"}
    curriculum = found.known(where, sampling["curriculum_learning"], "enabled curriculum_metrics", inert)
    if not found.enabled(where, curriculum):
        return
    metrics = curriculum.get("curriculum_metrics")
    if not isinstance(metrics, dict) or not metrics:
        found.problems.append(f"{where}.curriculum_metrics has no metric; name at least one")
        return
    bounding = {}
    for name, given in metrics.items():
        metric = found.known(f"{where}.curriculum_metrics.{name}", given, _METRIC_KEYS)
        if metric.get("clustering_type") != "single_cluster":
            bounding[name] = metric
        elif name in _LENGTHS:
            _lengths(found, f"{where}.curriculum_metrics.{name}", metric, _LENGTHS[name])
        else:
            reason = "a metric of a single cluster bounds no sample"
            found.inert.append((f"{where}.curriculum_metrics.{name}", reason))
    if bounding:
        _metrics(found, f"{where}.curriculum_metrics", bounding)


def _metrics(found: DataEfficiency, where: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """The metrics that bound samples: a word for each of them in every option."""
    rows = [_words(found, f"{where}.{name}", metric) for name, metric in metrics.items()]
    found.values.append((where, "curriculum_metric", list(metrics)))
    files = [word for metric in metrics.values() for word in _files(found, where, metric)]
    found.values.append((where, "curriculum_deepspeed_index", files))
    for name in rows[0]:
        found.values.append((where, f"curriculum_{name}", [row[name] for row in rows]))


def _words(found: DataEfficiency, where: str, metric: Mapping[str, Any]) -> dict[str, str]:
    """The words of one metric; of what its schedule does not use, any that can be read."""
    schedule = _schedule(found, where, metric)
    kind = metric.get("difficulty_type", "value")
    if kind == "percentile" and metric.get("max_difficulty") != 100:
        found.problems.append(
            f"{where}.max_difficulty is {metric.get('max_difficulty')}, and the percentile of all samples is 100; "
            "write percentiles of 100"
        )
    return {
        "difficulty_type": str(kind),
        "pacing": str(metric.get("schedule_type")),
        "min_difficulty": str(metric.get("min_difficulty", 1)),
        "max_difficulty": str(metric.get("max_difficulty", 1)),
        "steps": str(schedule.get("total_curriculum_step", 1)),
        "difficulty_step": str(schedule.get("difficulty_step", 1)),
        "root_degree": str(schedule.get("root_degree", 1)),
        "difficulties": _joined(schedule.get("difficulty", [0])),
        "last_steps": _joined(schedule.get("max_step", [1])),
    }


def _files(found: DataEfficiency, where: str, metric: Mapping[str, Any]) -> tuple[str, str]:
    """The prefixes of both files; percentiles need no second one."""
    sample = metric.get("index_to_sample_path")
    if not isinstance(sample, str):
        found.problems.append(f"{where} has a metric without index_to_sample_path; name the prefix of its files")
        return "", ""
    return sample, str(metric.get("index_to_metric_path", sample))


def _lengths(found: DataEfficiency, where: str, metric: Mapping[str, Any], how: str) -> None:
    """A curriculum over the length of sequences."""
    schedule = _schedule(found, where, metric)
    name = "seq_length_curriculum"
    found.values.append((where, name, how))
    wanted: dict[str, Any] = {
        "pacing": metric.get("schedule_type"),
        "min_difficulty": metric.get("min_difficulty"),
        "max_difficulty": metric.get("max_difficulty"),
        "steps": schedule.get("total_curriculum_step"),
        "difficulty_step": schedule.get("difficulty_step"),
        "root_degree": schedule.get("root_degree"),
        "difficulties": _joined(schedule["difficulty"]) if "difficulty" in schedule else None,
        "last_steps": _joined(schedule["max_step"]) if "max_step" in schedule else None,
    }
    for part, value in wanted.items():
        if value is not None:
            found.values.append((where, f"{name}_{part}", value))


def _schedule(found: DataEfficiency, where: str, metric: Mapping[str, Any]) -> dict[str, Any]:
    """The object `schedule_config`, with all that the schedule needs."""
    kind = metric.get("schedule_type")
    schedule = found.known(f"{where}.schedule_config", metric.get("schedule_config", {}), _SCHEDULE_KEYS)
    if kind not in _PACINGS:
        found.problems.append(
            f"{where}.schedule_type is {kind!r:.40}, which is none of {', '.join(_PACINGS)}; give a function of your "
            "own by --curriculum-pacing FILE.py:FUNCTION instead of the metric here"
        )
        return schedule
    needed = ["difficulty", "max_step"] if kind == "fixed_discrete" else ["total_curriculum_step", "difficulty_step"]
    needed += ["root_degree"] if kind == "fixed_root" else []
    missing = [name for name in needed if name not in schedule]
    missing += [name for name in ("min_difficulty", "max_difficulty") if name not in metric]
    if missing:
        found.problems.append(f"{where} lacks {', '.join(missing)}, which {kind} needs; add what is missing")
    return schedule


def _random_ltd(found: DataEfficiency, where: str, value: Any) -> None:
    names = "enabled random_ltd_layer_id random_ltd_schedule layer_token_lr_schedule"
    described = (
        "total_layer_num random_ltd_layer_num model_mask_name model_type hidden_state_order micro_batch_size "
        "global_batch_size"
    )
    routing = found.known(where, value, names, dict.fromkeys(described.split(), _NAMES_OF_LAYERS))
    if not found.enabled(where, routing):
        return
    if isinstance(rate := routing.get("layer_token_lr_schedule"), dict) and rate.get("enabled"):
        found.problems.append(
            f"{where}.layer_token_lr_schedule.enabled is true, which DeepSpeed itself does not carry out; leave it out"
        )
    schedule = found.known(
        f"{where}.random_ltd_schedule",
        routing.get("random_ltd_schedule", {}),
        "min_value max_value schedule_type schedule_config",
    )
    if (kind := schedule.get("schedule_type", "fixed_linear")) != "fixed_linear":
        found.problems.append(
            f"{where}.random_ltd_schedule.schedule_type is {kind!r:.40}; it can be fixed_linear alone"
        )
    steps = found.known(
        f"{where}.random_ltd_schedule.schedule_config",
        schedule.get("schedule_config", {}),
        "require_steps seq_per_step",
    )
    wanted = {
        "random_ltd": True,
        "random_ltd_min": schedule.get("min_value"),
        "random_ltd_max": schedule.get("max_value"),
        "random_ltd_steps": steps.get("require_steps"),
        "random_ltd_step_size": steps.get("seq_per_step"),
        "random_ltd_layers": routing.get("random_ltd_layer_id"),
    }
    for name, one in wanted.items():
        if one is not None:
            found.values.append((where, name, one))


def _joined(numbers: Any) -> str:
    """A list as one word of an option."""
    listed = numbers if isinstance(numbers, Sequence) and not isinstance(numbers, str) else [numbers]
    return ",".join(map(str, listed))
