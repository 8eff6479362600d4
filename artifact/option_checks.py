"""Options of `ArtifactBuilder` that Python would take with any type."""

from __future__ import annotations

from .. import errors
from ..models.config_types import SchedulerConfig
from ..models.stages import is_whole


def check_flag(option: str, value: object) -> None:
    """Raises: BLD027. A text such as "False" would count as true."""
    if type(value) is not bool:
        raise errors.option_of_another_type(option, value, "True or False")


def check_number(option: str, value: object) -> None:
    """Raises: BLD027 for what is neither a whole number nor None."""
    if value is not None and not is_whole(value):
        raise errors.option_of_another_type(option, value, "a whole number")


def check_workers(option: str, count: int) -> None:
    """Raises: BLD020, BLD027."""
    if not is_whole(count):
        raise errors.option_of_another_type(option, count, "a whole number")
    if count < 1:
        raise errors.no_workers(option, count)


def check_scheduler(scheduler: SchedulerConfig) -> None:
    """Raises: BLD023 for chunked prefill, BLD027."""
    if not isinstance(scheduler, SchedulerConfig):
        option = "default_scheduler_config"
        raise errors.option_of_another_type(option, scheduler, "a SchedulerConfig")
    if scheduler.prefill_chunk_size is not None:
        raise errors.option_not_supported(
            "SchedulerConfig.prefill_chunk_size",
            scheduler.prefill_chunk_size,
            "a prompt is processed in one run of a prefill bucket",
            "leave it out, and build prefill buckets as long as your prompts",
        )
